"""aMUSEd: a folder of diffusers' AmusedPipeline comes in, draws the same pictures, and goes out again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import normalization
from diffusers.models.unets import uvit_2d
from diffusers.schedulers import scheduling_amused
from interop_models import all_weights, clip_tokenizer, randomised, same_weights

from t2i import families
from t2i.errors import UserError
from t2i.interfaces import SampleRequest
from t2i.interop.amused import amused_files, read_transformer
from t2i.interop.convert import Options, prepare, write
from t2i.interop.parts import formats_of
from t2i.nn.embeddings import timestep_embedding
from t2i.training import checkpoint, run_folder

CODES, ROWS, SIDE = 40, 48, 6
PROMPTS, SEEDS, NEGATIVE = ["a red fox", "two green bottles"], [11, 12], "blurred"


def save_amused(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, projection_dim=24
    )
    vqvae = diffusers.VQModel(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=CODES,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    transformer = diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=24,
        encoder_hidden_size=32,
        vocab_size=ROWS,
        codebook_size=CODES,
        in_channels=12,
        block_out_channels=16,
        num_res_blocks=2,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=28,
        downsample=True,
        upsample=True,
        sample_size=SIDE,
    )
    for p in transformer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    vqvae.decoder.conv_out.weight.data *= 0.3  # most of the pictures within [0, 1]
    vqvae.decoder.conv_out.bias.data += 0.5
    diffusers.AmusedPipeline(
        vqvae=randomised(vqvae, 2),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        text_encoder=randomised(CLIPTextModelWithProjection(text), 3),
        transformer=transformer,
        scheduler=diffusers.AmusedScheduler(mask_token_id=ROWS - 1),  # the published one's is 8255 of 8256
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amused") / "theirs"
    save_amused(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    prepared = prepare(folder, folder.with_name("run"), Options())
    assert "12 steps, guidance 10." in prepared.parts.notes[-1]
    write(prepared)
    return folder.with_name("run")


def pipeline_of(folder: Path) -> Any:
    """In float64."""
    pipeline = diffusers.AmusedPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.vqvae, pipeline.text_encoder, pipeline.transformer):
        module.double()
    return pipeline


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return pipeline_of(folder)


def test_pictures_are_those_of_the_pipeline(theirs, run, monkeypatch):
    """In float64, for the same seeds, all settings being the pipeline's defaults."""
    ours = families.get("masked").load_generator()(checkpoint.load(run_folder.weights_file(run)), "cpu")
    ours.model.double()
    ours.model.text.to("cpu", torch.float64)
    side = ours.default_size_px
    assert side == SIDE * 4
    found = ours.model.generate(SampleRequest(PROMPTS, SEEDS, side, side, NEGATIVE), ours.sampling)

    # What diffusers rounds to float32 on the way, and the noise that it would draw in float64.
    monkeypatch.setattr(
        normalization.RMSNorm,
        "forward",
        lambda self, x: torch.nn.functional.rms_norm(x, self.dim, self.weight, self.eps),
    )
    monkeypatch.setattr(
        uvit_2d, "get_timestep_embedding", lambda t, dim, **_: timestep_embedding(t.double(), dim)
    )
    single = scheduling_amused.gumbel_noise
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", lambda t, generator: single(t.float(), generator))
    each = [
        theirs(prompt, negative_prompt=NEGATIVE, generator=torch.manual_seed(seed), output_type="pt").images
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    expected = torch.cat(each)
    inside = (expected > 0) & (expected < 1)
    assert inside.double().mean() > 0.5
    assert ((found + 1) / 2 - expected).abs().max() < 1e-9
    assert (found[0] - found[1]).abs().mean() > 0.01


@torch.no_grad()
def test_its_codec_reads_pictures_as_the_pipeline_does(folder, theirs, run, convert):
    """From 0 to 1, also where the folder of the codec is converted alone."""
    image = torch.rand(2, 3, 16, 24, dtype=torch.float64) * 2 - 1
    _, _, (_, _, expected) = theirs.vqvae.quantize(theirs.vqvae.encode((image + 1) / 2).latents)
    for place, prefix in ((run, "model.codec."), (convert(folder / "vqvae", "codec"), "codec.")):
        loaded = checkpoint.load(run_folder.weights_file(place))
        codec = families.get("autoencoder").load_codec()(loaded.extra.get("codec", loaded.config))
        checkpoint.load_into(codec, loaded.weights, loaded.path, prefix=prefix)
        assert torch.equal(codec.double().tokens(image).flatten(), expected)


def test_the_way_back_is_exact(folder, theirs, run, convert):
    back = convert(run, "back")
    first, second = all_weights(folder), all_weights(back)
    assert first.keys() == second.keys()
    assert all(same_weights(first[place], second[place]) for place in first)
    for place in ("transformer/config.json", "vqvae/config.json", "scheduler/scheduler_config.json"):
        before, after = (json.loads((root / place).read_text()) for root in (folder, back))
        own = {"sample_size", "vq_embed_dim"} if place.startswith("vqvae") else set()
        assert {key for key, value in after.items() if before.get(key) != value} == own
    pictures = [
        pipeline(PROMPTS[0], num_inference_steps=3, generator=torch.manual_seed(3), output_type="pt").images
        for pipeline in (theirs, pipeline_of(back))
    ]
    assert torch.equal(*pictures)
    assert "AmusedPipeline.from_pretrained" in (back / "README.md").read_text()


def test_the_published_transformer_is_taken_whole():
    with torch.device("meta"):
        config = read_transformer(dict(diffusers.UVit2DModel().config), "config.json: ")
    sizes = {"num_codes": 8192, "context_dim": 768, "pooled_dim": 768}
    shapes = formats_of("masked_codes").shapes({"transformer": config, **sizes})
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 603_537_664


def edited(source: Path, to: Path, file: str, **values: Any) -> Path:
    shutil.copytree(source, to, copy_function=os.link)
    text = json.dumps(json.loads((to / file).read_text()) | values)
    (to / file).unlink()
    (to / file).write_text(text)
    return to


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("scheduler/scheduler_config.json", {"masking_schedule": "linear"}, "is 'linear'; allowed: cosine"),
        (
            "scheduler/scheduler_config.json",
            {"mask_token_id": CODES},
            "mask_token_id is 40; allowed: 47, the",
        ),
        ("transformer/config.json", {"codebook_size": 41}, "codebook_size is 41; allowed: 40, as its other"),
        ("transformer/config.json", {"attention_dropout": False}, "attention_dropout is False; allowed: 0.0"),
        ("transformer/config.json", {"use_bias": True}, "use_bias is True; allowed: False"),
        ("transformer/config.json", {"upsample": False}, "upsample is False; allowed: True, as downsample"),
        (
            "transformer/config.json",
            {"_class_name": "os.system"},
            "_class_name is 'os.system'; allowed: UVit",
        ),
        ("transformer/config.json", {"hidden_size": 2**40}, "hidden_size is 1099511627776; allowed: a whole"),
        ("vqvae/config.json", {"_class_name": "AutoencoderKL"}, "'AutoencoderKL'; allowed: VQModel"),
        ("text_encoder/config.json", {"projection_dim": 8}, "text_projection.weight has shape (24, 32)"),
    ],
)
def test_what_does_not_fit_is_one_sentence(folder, tmp_path, file, values, words):
    with pytest.raises(UserError) as raised:
        prepare(edited(folder, tmp_path / "other", file, **values), tmp_path / "out", Options())
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_cannot_go_out_is_one_sentence(folder, run, tmp_path):
    with pytest.raises(UserError, match="aMUSEd has no form as a single file"):
        prepare(run, tmp_path / "one.safetensors", Options())
    with pytest.raises(UserError, match=r"--vae is 'x'; allowed: only with a source that has a UNet"):
        prepare(folder, tmp_path / "out", Options(vae="x"))
    write(prepare(folder / "vqvae", tmp_path / "codec", Options()))
    with pytest.raises(UserError, match=r"backbone.unit_range is True; allowed: false but in"):
        prepare(tmp_path / "codec", tmp_path / "back", Options())
    parts = prepare(run, tmp_path / "back", Options()).parts
    parts.codec.config["backbone"]["unit_range"] = False
    with pytest.raises(UserError, match=r"backbone.unit_range is False; allowed: true in an AmusedPipeline"):
        amused_files(parts)


@pytest.mark.slow
def test_training_goes_on_and_goes_out(run, compose_run, train, tmp_path, convert):
    values = checkpoint.load(run_folder.weights_file(run)).config["transformer"]
    sizes = [f"transformer.{key}={value}" for key, value in values.items() if key != "name"]
    composed = compose_run(
        *("stage=masked", f"init_from={run}", "transformer=uvit", *sizes, "text=clip_with_projection"),
        *(f"text.model={run / 'text_encoder'}", "resolution='32'", f"resolution.size_px={SIDE * 4}"),
        *("trainer.num_images=8", "trainer.batch_size=4", "trainer.accelerator=cpu", "ema=none"),
        *("optimizer.muon_scale=null", "optimizer.warmup_images=0", f"runs_dir={tmp_path}"),
    )
    trained = train(composed).folder
    before, after = (all_weights(folder)["model.safetensors"] for folder in (run, trained))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(name.startswith("model.transformer.") for name in changed)
    pipeline = pipeline_of(convert(trained, "out"))
    name = "mlm_layer.conv2.weight"
    assert torch.equal(pipeline.transformer.state_dict()[name].float(), after[f"model.transformer.{name}"])
