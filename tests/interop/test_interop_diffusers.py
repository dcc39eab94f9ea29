"""diffusers' folders in and out, with diffusers and transformers as the oracles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from interop_models import all_weights, generator_of, relative_error, same_weights, save_pipeline
from safetensors.torch import load_file, save_file

from t2i.errors import CheckpointError, ConfigError
from t2i.interfaces import SampleRequest
from t2i.interop.convert import Options, prepare
from t2i.training import run_folder

CAPTIONS = ["a red bicycle", "", "Two cats, one dog!"]


@torch.no_grad()
def test_every_part_equals_diffusers(pipeline_folder, convert):
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    for part in (theirs.vae, theirs.unet, theirs.text_encoder):
        part.double()
    ours = generator_of(convert(pipeline_folder, "run")).model.double()
    ours.text.to("cpu", torch.float64)
    image, latent = (torch.randn(shape).double() for shape in ((2, 3, 32, 48), (2, 4, 8, 12)))
    scale = ours.codec.latent_scale.item()  # in float32
    assert scale == pytest.approx(theirs.vae.config.scaling_factor, rel=1e-6)
    expected = theirs.vae.encode(image).latent_dist
    noise = torch.randn_like(expected.mean)
    assert relative_error(ours.codec.encode(image), expected.mean * scale) < 1e-9
    assert (
        relative_error(ours.codec.encode(image, noise), (expected.mean + expected.std * noise) * scale) < 1e-9
    )
    assert relative_error(ours.codec.decode(latent), theirs.vae.decode(latent / scale).sample) < 1e-9

    ids = theirs.tokenizer(
        CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    tokens = theirs.text_encoder(ids).last_hidden_state
    assert relative_error(ours.text(CAPTIONS).tokens, tokens) < 1e-9

    t = torch.tensor([17.0, 803.0])
    expected = theirs.unet(latent, t, tokens[:2]).sample
    assert relative_error(ours.denoiser(latent, t, tokens[:2]), expected) < 1e-9


def test_a_round_trip_is_exact(pipeline_folder, convert):
    back = convert(convert(pipeline_folder, "run"), "back")
    first, second = all_weights(pipeline_folder), all_weights(back)
    assert first.keys() == second.keys()
    assert all(same_weights(first[place], second[place]) for place in first)
    for place in ("unet", "vae"):
        theirs, ours = (
            json.loads((root / place / "config.json").read_text()) for root in (pipeline_folder, back)
        )
        for key in ours.keys() & theirs.keys():
            assert ours[key] == theirs[key], key


@torch.no_grad()
def test_what_is_written_loads_in_diffusers_as_it_is(pipeline_folder, convert):
    from diffusers import StableDiffusionPipeline

    back = StableDiffusionPipeline.from_pretrained(convert(convert(pipeline_folder, "run"), "back"))
    theirs = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    for part in ("unet", "vae", "text_encoder"):
        first, second = getattr(theirs, part).state_dict(), getattr(back, part).state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert back.unet.config.attention_head_dim == theirs.unet.config.attention_head_dim
    assert back.vae.config.scaling_factor == theirs.vae.config.scaling_factor
    assert back.scheduler.config.prediction_type == theirs.scheduler.config.prediction_type
    assert back.text_encoder.config.hidden_act == theirs.text_encoder.config.hidden_act
    assert back.safety_checker is None
    ids = [p.tokenizer(CAPTIONS, padding="max_length", max_length=77).input_ids for p in (back, theirs)]
    assert ids[0] == ids[1]


def test_the_published_scheduler_fields(sd1_run, convert):
    values = json.loads((convert(sd1_run, "back") / "scheduler/scheduler_config.json").read_text())
    assert values == {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }


def test_a_run_folder_can_be_moved(sd1_folder, convert, tmp_path):
    folder = convert(sd1_folder, "run")
    moved = tmp_path / "elsewhere" / "again"
    moved.parent.mkdir()
    folder.rename(moved)
    assert "{run}/text_encoder" in (moved / "config.yaml").read_text()
    request = SampleRequest(CAPTIONS[:1], [0], 32, 32)
    assert generator_of(moved).generate(request).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(sd1_folder, sd1_run, convert, dtype):
    run = convert(sd1_folder, "run", dtype=dtype)
    saved = load_file(run / "model.safetensors")
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {value.dtype for name, value in saved.items() if value.ndim} == {wanted}
    assert saved["model.codec.latent_scale"] == torch.tensor(0.18215)  # a scalar is not rounded
    exact = load_file(sd1_run / "model.safetensors")
    name = "model.denoiser.input_blocks.1.0.in_layers.2.weight"
    assert torch.equal(saved[name], exact[name].to(wanted))
    # Widening loses nothing.
    assert torch.equal(
        load_file(convert(run, "wide", to="t2i") / "model.safetensors")[name], exact[name].to(wanted).float()
    )


def as_pickles(folder: Path) -> None:
    for path in list(folder.rglob("*.safetensors")):
        stem = "pytorch_model" if path.parent.name == "text_encoder" else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()


def as_shards(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    names = sorted(weights)
    places = {}
    for i, chosen in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in chosen}, path.with_name(file))
        places |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": places}
    path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()


def as_of_2022(folder: Path) -> None:
    """The names that diffusers gave attention layers when Stable Diffusion 1 was published, and the prefix and
    the positions that transformers then saved."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, value in load_file(path).items():
        for new, former in old.items():
            name = name.replace(new, former)
        weights[name] = value
    assert any(".query." in name for name in weights)
    save_file(weights, path)
    path = folder / "text_encoder/model.safetensors"
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()
    }
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path)


@pytest.mark.parametrize("change", [as_pickles, as_shards, as_of_2022])
def test_other_layouts_hold_the_same(sd1_folder, sd1_run, convert, tmp_path, change):
    folder = tmp_path / "changed"
    shutil.copytree(sd1_folder, folder)
    change(folder)
    first, second = sd1_run, convert(folder, "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    text = "text_encoder/model.safetensors"
    assert (first / text).read_bytes() == (second / text).read_bytes()


def test_heads_of_the_published_configurations():
    from t2i.interop.diffusers_config import read_unet, write_unet

    levels = {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    sd1 = read_unet(levels | {"attention_head_dim": 8, "cross_attention_dim": 768}, "x")
    assert (sd1["num_heads"], sd1["num_head_channels"]) == (8, None)
    sd2 = read_unet(levels | {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}, "x")
    assert (sd2["num_heads"], sd2["num_head_channels"]) == (None, 64)
    assert write_unet(sd1, 512, 8)["attention_head_dim"] == 8
    assert write_unet(sd2, 512, 8)["attention_head_dim"] == [5, 10, 20, 20]
    assert write_unet(sd1, 512, 8)["sample_size"] == 64


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            ("_class_name", "FluxPipeline", "StableDiffusion"),
        ),
        (
            "unet/config.json",
            {"_class_name": "os.system"},
            ("_class_name", "os.system", "UNet2DConditionModel"),
        ),
        # In Python true is 1, and false 0; every text is true.
        ("unet/config.json", {"freq_shift": False}, ("freq_shift is False; allowed: 0",)),
        (
            "unet/config.json",
            {"mid_block_scale_factor": True},
            ("mid_block_scale_factor is True; allowed: 1",),
        ),
        ("unet/config.json", {"only_cross_attention": 0}, ("only_cross_attention is 0; allowed: False",)),
        ("unet/config.json", {"use_linear_projection": "false"}, ("use_linear_projection is 'false'",)),
        (
            "unet/config.json",
            {"num_attention_heads": False},
            ("attention_head_dim is False; allowed: a whole",),
        ),
        ("vae/config.json", {"shift_factor": False}, ("shift_factor is False; allowed: None or 0.0",)),
        ("vae/config.json", {"scaling_factor": True}, ("scaling_factor is True",)),
        ("scheduler/scheduler_config.json", {"beta_start": False}, ("config.json: beta_start is False",)),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": 1}, ("use_karras_sigmas is 1",)),
        (
            "scheduler/scheduler_config.json",
            {"set_alpha_to_one": 0},
            ("set_alpha_to_one is 0; allowed: true",),
        ),
        (
            "scheduler/scheduler_config.json",
            {"rescale_betas_zero_snr": "no"},
            ("rescale_betas_zero_snr is 'no'",),
        ),
        ("unet/config.json", {"act_fn": "relu"}, ("act_fn", "relu", "silu")),
        ("unet/config.json", {"class_embed_type": "timestep"}, ("class_embed_type", "None")),
        ("unet/config.json", {"block_out_channels": [10**9]}, ("down_block_types",)),
        ("unet/config.json", {"block_out_channels": [32, 10**9, 64]}, ("block_out_channels", "1000000000")),
        ("unet/config.json", {"block_out_channels": "wide"}, ("block_out_channels", "wide")),
        ("unet/config.json", {"layers_per_block": 10**9}, ("layers_per_block", "1000000000", "16")),
        ("unet/config.json", {"layers_per_block": 2}, ("unet", "missing")),
        ("unet/config.json", {"transformer_layers_per_block": 10**6}, ("transformer_layers_per_block", "64")),
        ("unet/config.json", {"attention_head_dim": 7}, ("num_heads", "7")),
        ("unet/config.json", {"attention_head_dim": 0}, ("attention_head_dim", "0")),
        ("unet/config.json", {"cross_attention_dim": 65}, ("cross_attention_dim", "65", "64")),
        ("unet/config.json", {"in_channels": 8}, ("in_channels", "8", "4")),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 3}, ("up_block_types",)),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, ("_class_name", "AutoencoderKL or VQModel")),
        ("vae/config.json", {"latent_channels": 10**8}, ("latent_channels", "100000000")),
        ("vae/config.json", {"scaling_factor": -1}, ("scaling_factor", "-1")),
        ("vae/config.json", {"shift_factor": 0.1}, ("shift_factor", "0.1")),
        ("vae/config.json", {"norm_num_groups": 16}, ("norm_num_groups", "16")),
        ("text_encoder/config.json", {"hidden_size": 10**9}, ("hidden_size", "1000000000")),
        ("text_encoder/config.json", {"hidden_size": 128}, ("has shape", "128")),
        ("text_encoder/config.json", {"hidden_act": "relu"}, ("hidden_act", "relu", "gelu")),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, ("prediction_type", "flow")),
        ("scheduler/scheduler_config.json", {"beta_schedule": ["linear"]}, ("beta_schedule", "linear")),
        ("scheduler/scheduler_config.json", {"beta_start": "low"}, ("beta_start", "low")),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, ("trained_betas",)),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_configuration_that_is_not_ours(sd1_folder, convert, tmp_path, file, change, words):
    folder = tmp_path / "changed"
    shutil.copytree(sd1_folder, folder)
    values = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(values))
    with pytest.raises((ConfigError, CheckpointError)) as raised:
        convert(folder, "run")
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_missing_and_unknown_weights_are_named(sd1_folder, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(sd1_folder, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_inn.weight"] = weights.pop("conv_in.weight")
    save_file(weights, path)
    with pytest.raises(
        CheckpointError, match=r"1 weight \[conv_in\.weight\] is missing, 1 weight \[conv_inn"
    ):
        prepare(folder, tmp_path / "run", Options())


def test_zero_terminal_snr_and_cosine_keep_their_meaning(tmp_path, convert):
    save_pipeline(tmp_path / "cosine", "sd1", beta_schedule="squaredcos_cap_v2")
    run = convert(tmp_path / "cosine", "run")
    assert run_folder.read_config(run)["schedule"]["name"] == "cosine"
    values = json.loads((convert(run, "back") / "scheduler/scheduler_config.json").read_text())
    assert values["beta_schedule"] == "squaredcos_cap_v2"
