"""LDM text-to-image, whose text transformer was trained with its UNet."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from interop_models import LEVELS, randomised, relative_error, small_autoencoder
from safetensors.torch import load_file, save_file

from t2i import families
from t2i.errors import ConfigError
from t2i.interop import ldm_bert
from t2i.interop.convert import Options, prepare
from t2i.text.ldm_bert import LDMBertTextEncoder
from t2i.text.minilm import model_folder
from t2i.training import checkpoint, run_folder

PROMPTS = ["a red bicycle", "two cats and 1 dog!"]


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    torch.manual_seed(0)
    config = LDMBertConfig(d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=256)
    unet = {**LEVELS["sd1"]["unet"], "cross_attention_dim": 64}
    schedule = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
    }
    bert = LDMBertModel(config)
    tokens = json.loads((model_folder() / "tokenizer.json").read_text())["model"]["vocab"]
    return LDMTextToImagePipeline(
        vqvae=small_autoencoder(),
        bert=randomised(bert, 6),
        tokenizer=BertTokenizer(vocab=tokens),
        unet=randomised(UNet2DConditionModel(sample_size=8, **unet), 4),
        scheduler=DDIMScheduler(**schedule, steps_offset=1),
    )


@pytest.fixture(scope="module")
def ldm_folder(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ldm") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_every_part_equals_diffusers(pipeline, ldm_folder, convert):
    run = convert(ldm_folder, "run")
    loaded = checkpoint.load(run_folder.weights_file(run))
    ours = families.get("latent_diffusion").load_generator()(loaded, "cpu").model.double()
    ours.text.to("cpu", torch.float64)
    pipeline = copy.deepcopy(pipeline)
    for part in (pipeline.vqvae, pipeline.bert, pipeline.unet):
        part.double()
    assert Path(loaded.config["text"]["model"]) == run / "tokenizer"
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    tokens = pipeline.bert.model(ids).last_hidden_state
    assert relative_error(ours.text(PROMPTS).tokens, tokens) < 1e-9
    latent, t = torch.randn(2, 4, 8, 8).double(), torch.tensor([17.0, 803.0])
    expected = pipeline.unet(latent, t, tokens).sample
    assert relative_error(ours.denoiser(latent, t, tokens), expected) < 1e-9
    scale = ours.codec.latent_scale.item()  # in float32
    assert scale == pytest.approx(pipeline.vqvae.config.scaling_factor, rel=1e-6)
    expected = pipeline.vqvae.decode(latent / scale).sample
    assert relative_error(ours.codec.decode(latent), expected) < 1e-9


def test_a_single_file_round_trip_is_exact(ldm_folder, convert, tmp_path):
    single = convert(convert(ldm_folder, "run"), "single.safetensors")
    weights = load_file(single)
    assert "cond_stage_model.transformer.attn_layers.layers.3.1.net.2.bias" in weights
    again = convert(convert(single, "again"), "again.safetensors")
    assert again.read_bytes() == single.read_bytes()
    # The original also holds the layer that turns states into words again.
    logits = {"cond_stage_model.transformer.to_logits.bias": torch.zeros(30_522)}
    save_file(weights | logits, tmp_path / "original.safetensors")
    parts = prepare(tmp_path / "original.safetensors", tmp_path / "x", Options(prediction="eps")).parts
    assert parts.denoiser.size_px == 256
    assert any("MiniLM" in note for note in parts.notes)


def test_the_shapes_are_those_of_our_encoder():
    config = ldm_bert.LDMBertConfig(width=64, depth=3, heads=2, max_tokens=77)
    ours = LDMBertTextEncoder(None, **vars(config)).state_dict()
    assert ldm_bert.shapes(config) == {name: tuple(value.shape) for name, value in ours.items()}


def test_it_is_no_stable_diffusion_pipeline(ldm_folder, convert, tmp_path):
    run = convert(ldm_folder, "run")
    with pytest.raises(ConfigError, match=r"text\.name is 'ldm_bert'; allowed: clip, open_clip"):
        convert(run, "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d_model": 10**9}, "text.width is 1000000000"),
        ({"head_dim": 32}, "head_dim is 32; allowed: 64"),
        ({"vocab_size": 7}, "vocab_size is 7; allowed: 30522"),
        ({"encoder_layers": "many"}, "text.depth is 'many'"),
    ],
)
def test_a_configuration_that_is_not_ours(change, words):
    values = {"d_model": 64, "encoder_ffn_dim": 256} | change
    if change.get("d_model"):
        values["encoder_ffn_dim"] = 4 * change["d_model"]
    with pytest.raises(ConfigError) as raised:
        ldm_bert.parse_config(values, "bert/config.json")
    assert words in str(raised.value)
