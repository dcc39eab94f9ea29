"""Single files with CompVis' names, with diffusers' converters of the same as the oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from interop_models import all_weights, relative_error, same_weights, save_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i import families
from t2i.errors import CheckpointError, ConfigError
from t2i.interop import clip
from t2i.interop.compvis_shapes import infer_codec, infer_unet
from t2i.interop.convert import Options, prepare
from t2i.interop.parts import codec_shapes, denoiser_shapes
from t2i.interop.weights import Weight
from t2i.training import checkpoint, run_folder

TABLES = {
    "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().float(),
    "alphas_cumprod": torch.rand(1000),
    "sqrt_recipm1_alphas_cumprod": torch.rand(1000),
    "posterior_mean_coef2": torch.rand(1000),
    "logvar": torch.zeros(1000),
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
}


def with_all_of_the_original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the original files hold beside the weights that are used: averages, tables, the unused last layer of
    OpenCLIP and its heads."""
    unet = {name: value for name, value in weights.items() if name.startswith("model.diffusion_model.")}
    everything = weights | TABLES
    for name, value in unet.items():
        everything["model_ema." + name.removeprefix("model.").replace(".", "")] = value + 1
    if "cond_stage_model.model.ln_final.weight" in weights:
        last = max(int(name.split(".")[4]) for name in weights if ".resblocks." in name)
        layer = f"cond_stage_model.model.transformer.resblocks.{last}."
        for name, value in weights.items():
            if name.startswith(layer):
                everything[name.replace(layer, layer.replace(str(last), str(last + 1)))] = value * 2
        everything["cond_stage_model.model.text_projection"] = torch.rand(4, 4)
        everything["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    else:
        everything["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return everything


def test_diffusers_reads_the_file_as_the_same_model(pipeline_folder, pipeline_single):
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )
    from transformers import CLIPTextModel

    weights = load_file(pipeline_single)
    expected = all_weights(pipeline_folder)
    config = {p: json.loads((pipeline_folder / p / "config.json").read_text()) for p in ("unet", "vae")}
    stem = "diffusion_pytorch_model.safetensors"
    assert same_weights(convert_ldm_unet_checkpoint(weights, config["unet"]), expected[f"unet/{stem}"])
    assert same_weights(convert_ldm_vae_checkpoint(weights, config["vae"]), expected[f"vae/{stem}"])
    if "cond_stage_model.model.ln_final.weight" in weights:
        text = convert_open_clip_checkpoint(
            CLIPTextModel.from_pretrained(pipeline_folder / "text_encoder"), weights
        )
    else:
        text = convert_ldm_clip_checkpoint(weights)
    named = {name.removeprefix("text_model."): value for name, value in text.items()}
    assert same_weights(named, expected["text_encoder/model.safetensors"])


def test_from_single_file_draws(pipeline_folder, pipeline_single):
    """The whole loader, given the configurations (the hub is where it would take them from)."""
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_single_file(
        str(pipeline_single), config=str(pipeline_folder), safety_checker=None, local_files_only=True
    )
    theirs = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    for part in ("unet", "vae", "text_encoder"):
        first, second = (getattr(p, part).state_dict() for p in (loaded, theirs))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part


def test_a_round_trip_is_exact(pipeline_single, convert):
    again = convert(convert(pipeline_single, "again"), "again.safetensors")
    assert again.read_bytes() == pipeline_single.read_bytes()


@pytest.mark.parametrize(("suffix", "ema"), [(".ckpt", True), (".safetensors", False)])
def test_the_original_with_all_that_is_in_it(pipeline_single, convert, tmp_path, suffix, ema):
    weights = load_file(pipeline_single)
    original = tmp_path / f"original{suffix}"
    everything = with_all_of_the_original(weights)
    if suffix == ".ckpt":
        torch.save({"epoch": 1, "global_step": 2, "state_dict": everything}, original)
    else:
        save_file(everything, original)
    prediction = "v" if "cond_stage_model.model.ln_final.weight" in weights else "eps"
    back = load_file(convert(convert(original, "run", ema=ema, prediction=prediction), "back.safetensors"))
    for name, value in weights.items():
        changed = name.startswith("model.diffusion_model.") and ema
        assert torch.equal(back.pop(name), value + 1 if changed else value), name
    assert back == {}


def test_what_was_taken_and_assumed_is_said(pipeline_single, tmp_path):
    weights = load_file(pipeline_single)
    save_file(with_all_of_the_original(weights), tmp_path / "all.safetensors")
    save_file(weights, tmp_path / "bare.safetensors")

    def notes(name: str, **options) -> str:
        return " ".join(prepare(tmp_path / name, tmp_path / "run", Options(**options)).parts.notes)

    assert "EMA weights were taken" in notes("all.safetensors")
    assert "without EMA were taken" in notes("all.safetensors", ema=False)
    assert "no EMA weights" in notes("bare.safetensors")
    assert "eps is assumed" in notes("bare.safetensors")
    assert "assumed" not in notes("bare.safetensors", prediction="v")
    assert "assumed" not in " ".join(prepare(pipeline_single, tmp_path / "run", Options()).parts.notes)


def test_the_header_tells_prediction_and_size(pipeline_folder, pipeline_single):
    with safe_open(pipeline_single, "pt") as file:
        metadata = file.metadata()
    kind = {"sd1": "epsilon", "sd2": "v"}[pipeline_folder.name]
    assert metadata["modelspec.prediction_type"] == kind
    parts = prepare(pipeline_single, pipeline_single.with_name("x"), Options()).parts
    assert parts.denoiser.prediction == {"epsilon": "eps", "v": "v"}[kind]
    assert parts.denoiser.size_px == 32


def test_zero_terminal_snr_goes_in_and_out(tmp_path, convert):
    save_pipeline(tmp_path / "sd2", "sd2", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    run = convert(tmp_path / "sd2", "run")
    assert run_folder.read_config(run)["schedule"]["zero_terminal_snr"] is True
    single = convert(run, "single.safetensors")
    assert load_file(single)["betas"][-1] == 1
    again = convert(single, "again", prediction="v")
    assert run_folder.read_config(again)["schedule"] == run_folder.read_config(run)["schedule"]


def test_schedule_and_scale_are_read(pipeline_single, tmp_path, convert):
    weights = load_file(pipeline_single)
    weights["betas"] = torch.linspace(0.0001, 0.02, 500)
    weights["scale_factor"] = torch.tensor(0.25)
    save_file(weights, tmp_path / "other.safetensors")
    run = convert(tmp_path / "other.safetensors", "run", prediction="eps")
    schedule = run_folder.read_config(run)["schedule"]
    assert (schedule["name"], schedule["num_train_steps"]) == ("linear", 500)
    assert (schedule["beta_start"], schedule["beta_end"]) == (0.0001, 0.02)
    assert load_file(run / "model.safetensors")["model.codec.latent_scale"] == 0.25
    back = load_file(convert(run, "back.safetensors"))
    assert torch.allclose(back["betas"], weights["betas"], rtol=1e-6)
    assert back["scale_factor"] == 0.25
    weights["betas"] = torch.rand(500) / 10
    save_file(weights, tmp_path / "random.safetensors")
    with pytest.raises(CheckpointError, match="of no schedule that is known"):
        prepare(tmp_path / "random.safetensors", tmp_path / "x", Options())


def described(shapes: dict[str, tuple[int, ...]]) -> dict[str, Weight]:
    def unread() -> Tensor:
        raise AssertionError("no weight is read to learn the architecture")

    return {name: Weight(shape, torch.float32, unread) for name, shape in shapes.items()}


LEVELS = {
    "name": "unet",
    "model_channels": 320,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "dropout": 0.0,
}
LEVELS |= {"attention_resolutions": [1, 2, 4], "transformer_depth": 1, "in_channels": 4, "out_channels": 4}
CONVOLUTIONAL = {"num_heads": 8, "num_head_channels": None, "use_linear_in_transformer": False}
LINEAR = {"num_heads": None, "num_head_channels": 64, "use_linear_in_transformer": True}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LEVELS | CONVOLUTIONAL | {"context_dim": 768}, 859_520_964),
        (LEVELS | LINEAR | {"context_dim": 1024}, 865_910_724),
        (LEVELS | CONVOLUTIONAL | {"context_dim": 1280}, 872_300_484),
    ],
    ids=["sd1", "sd2", "ldm"],
)
def test_published_unets_are_told_from_their_shapes(config, parameters):
    shapes = denoiser_shapes(config, 4, config["context_dim"])
    assert sum(map(math.prod, shapes.values())) == parameters
    assert infer_unet(described(shapes), Path("x")) == config


@pytest.mark.parametrize(
    ("mult", "latent", "attention", "codec", "parameters"),
    [
        ([1, 2, 4, 4], 4, [], {"name": "kl", "kl_weight": 1e-6}, 83_653_863),
        ([1, 2, 4], 3, [], {"name": "vq", "num_codes": 8192, "code_dim": 3}, None),
        ([1, 1, 2, 2, 4], 256, [16], {"name": "vq", "num_codes": 1024, "code_dim": 256}, 72_141_699),
        ([1, 2, 2, 4, 6], 64, [], {"name": "vq", "num_codes": 8192, "code_dim": 64}, None),
    ],
    ids=["kl-f8", "vq-f4", "vqgan-f16", "amused-f16"],
)
def test_published_autoencoders_are_told_from_their_shapes(mult, latent, attention, codec, parameters):
    backbone = {
        "name": "ldm",
        "base_channels": 128,
        "channel_mult": mult,
        "num_res_blocks": 2,
        "dropout": 0.0,
        "mid_attention": latent != 64,
    }
    backbone |= {"attention_resolutions": attention, "resolution_px": 256, "latent_channels": latent}
    shapes = codec_shapes({"backbone": backbone, "codec": codec})
    if parameters is not None:
        assert sum(map(math.prod, shapes.values())) == parameters
    shapes["quantize.embedding.weight"] = shapes.pop("codebook.codes", ())
    if not shapes["quantize.embedding.weight"]:
        del shapes["quantize.embedding.weight"]
    assert infer_codec(described(shapes), Path("x")) == {"backbone": backbone, "codec": codec}


def test_clip_vit_l_14_is_told_from_its_shapes():
    config = clip.ClipConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
    )
    shapes = clip.shapes(config)
    assert sum(map(math.prod, shapes.values())) == 123_060_480
    assert clip.parse_config(clip.infer_config(described(shapes))) == config


def test_the_shapes_of_clip_are_those_of_transformers():
    from transformers import CLIPTextConfig, CLIPTextModel

    values = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}
    with torch.device("meta"):
        theirs = CLIPTextModel(CLIPTextConfig(**values)).state_dict()
    ours = clip.shapes(clip.ClipConfig(**values))
    assert ours == {name.removeprefix("text_model."): tuple(value.shape) for name, value in theirs.items()}
    defaults = CLIPTextConfig().to_dict()
    assert all(defaults[name] == value for name, value in vars(clip.ClipConfig()).items())


def test_the_vocabulary_that_ships_with_open_clip(tmp_path):
    import open_clip
    from transformers import CLIPTokenizer

    captions = ["a photo of an astronaut, riding 12 horses", "", "Über café 🚀 naïve...", "x " * 100]
    expected = open_clip.get_tokenizer("ViT-H-14")(captions)
    for pad_token, name in (("!", "sd2"), (clip.END, "sd1")):
        (tmp_path / name).mkdir()
        for file, data in clip.tokenizer_files(77, pad_token).items():
            (tmp_path / name / file).write_bytes(data)
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path / name)
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert ids.shape == (4, 77)
        assert torch.equal(torch.where(ids == 49407, 0, ids), torch.where(expected == 49407, 0, expected))
        assert ids[1, -1] == {"sd1": 49407, "sd2": 0}[name]


def vqgan(num_codes: int = 64) -> dict[str, Tensor]:
    """A small VQGAN with taming's names, made by diffusers, and the losses that taming saves with it."""
    from diffusers import VQModel
    from interop_models import randomised

    model = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=2,
        latent_channels=8,
        num_vq_embeddings=num_codes,
        scaling_factor=1.0,
    )
    randomised(model, 5)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


@torch.no_grad()
def test_a_vq_autoencoder_equals_diffusers(tmp_path, convert):
    model = vqgan()
    model.save_pretrained(tmp_path / "vqmodel")
    run = convert(tmp_path / "vqmodel", "run")
    loaded = checkpoint.load(run_folder.weights_file(run))
    codec = families.get("autoencoder").load_codec()(loaded.config).eval()
    checkpoint.load_into(codec, loaded.weights, loaded.path, prefix="codec.")
    codec.double()
    model.double()
    image = torch.randn(2, 3, 32, 48).double()
    latent = model.encode(image).latents
    assert relative_error(codec.encode(image), latent) < 1e-9
    assert relative_error(codec.decode(latent), model.decode(latent).sample) < 1e-9
    codes = codec.codebook(codec.quant_conv(codec.encoder(image)))
    _, _, (_, _, indices) = model.quantize(latent)
    assert torch.equal(codes.indices.flatten(), indices.flatten())
    model.float()
    back = convert(run, "back")
    assert same_weights(load_file(back / "diffusion_pytorch_model.safetensors"), model.state_dict())
    type(model).from_pretrained(back)


def test_a_taming_checkpoint(tmp_path, convert):
    vqgan().save_pretrained(tmp_path / "vqmodel")
    taming = load_file(convert(convert(tmp_path / "vqmodel", "first"), "vqgan.safetensors", to="compvis"))
    assert {"encoder.down.1.attn.1.q.weight", "quantize.embedding.weight", "quant_conv.bias"} <= taming.keys()
    assert taming["encoder.mid.attn_1.k.weight"].shape == (64, 64, 1, 1)
    losses = {
        "loss.discriminator.main.0.weight": torch.rand(4),
        "loss.perceptual_loss.lin0.weight": torch.rand(1),
    }
    torch.save({"state_dict": taming | losses, "callbacks": {}}, tmp_path / "last.ckpt")
    notes = prepare(tmp_path / "last.ckpt", tmp_path / "x", Options()).parts.notes
    assert "2 weights of the training losses (loss.*) left out." in notes
    run = convert(tmp_path / "last.ckpt", "run")
    assert same_weights(load_file(convert(run, "back.safetensors")), taming)


def test_training_goes_on_from_the_codes_of_a_vqgan(tmp_path, convert):
    """No code is dead at the start, and each moves towards its cluster from where it was."""
    model = vqgan()
    model.save_pretrained(tmp_path / "vqmodel")
    loaded = checkpoint.load(run_folder.weights_file(convert(tmp_path / "vqmodel", "run")))
    codec = families.get("autoencoder").load_codec()(loaded.config).train()
    checkpoint.load_into(codec, loaded.weights, loaded.path, prefix="codec.")
    before = codec.codebook.codes.clone()
    with torch.no_grad():
        codec.reconstruct(torch.randn(2, 3, 32, 32))
    moved = (codec.codebook.codes - before).norm(dim=1) / before.norm(dim=1)
    used = moved > 1e-5
    assert used.any()
    assert not used.all()  # a restart would have moved them all
    # Of the codes that were used none jumped onto a vector of the batch: an average moves by a share.
    assert codec.codebook.steps == 1


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (
            "control_model.input_blocks.0.0.weight",
            (4,),
            "1 weight that no part of the model has: control_model",
        ),
        ("model.diffusion_model.label_emb.0.0.weight", (4, 4), "label_emb.0.0.weight] is unknown"),
        ("model.diffusion_model.input_blocks.0.0.weight", (32, 8, 3, 3), "shape (32, 8, 3, 3)"),
        ("model.diffusion_model.input_blocks.0.0.weight", (32,), "shape (32,)"),
        ("first_stage_model.decoder.conv_in.weight", (64, 0, 3, 3), "from 1 to"),
        ("first_stage_model.encoder.down.7.block.0.conv1.weight", (4, 4, 3, 3), "unknown"),
    ],
)
def test_files_that_are_of_no_model(sd1_single, tmp_path, name, shape, words):
    weights = load_file(sd1_single)
    save_file(weights | {name: torch.zeros(shape)}, tmp_path / "changed.safetensors")
    with pytest.raises((CheckpointError, ConfigError)) as raised:
        prepare(tmp_path / "changed.safetensors", tmp_path / "x", Options())
    assert words in str(raised.value)


def test_heads_that_no_reader_would_guess_are_refused(sd1_folder, convert, tmp_path):
    run = convert(sd1_folder, "run")
    weights = load_file(run / "model.safetensors")
    with safe_open(run / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["t2i"])
    header["config"]["denoiser"]["num_heads"] = 4
    save_file(weights, run / "model.safetensors", metadata={"t2i": json.dumps(header)})
    with pytest.raises(ConfigError, match=r"denoiser\.num_heads is 4; allowed: 8 in a single file"):
        convert(run, "single.safetensors")
    assert [path.name for path in tmp_path.iterdir() if "single" in path.name] == []
