"""Models that t2i trained, given to diffusers: they draw there what they draw here, or are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from interop_models import all_weights, clip_tokenizer, generator_of, same_weights, set_sampling
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2i.errors import CheckpointError, ConfigError
from t2i.families import latent_diffusion
from t2i.interfaces import SampleRequest
from t2i.interop.convert import Options, prepare, write
from t2i.training import run_folder, state_folder

SMALL = ("trainer.global_batch_size=4", "trainer.accelerator=cpu", "ema=short", "resolution='32'")


@pytest.fixture(scope="module")
def trained(compose_run, train, tmp_path_factory) -> Path:
    """A few steps of an autoencoder and of a UNet on it, conditioned on CLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel

    runs_dir = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    text = CLIPTextConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
    CLIPTextModel(text).save_pretrained(runs_dir / "clip")
    clip_tokenizer("<|endoftext|>").save_pretrained(runs_dir / "clip")
    autoencoder = train(
        compose_run(
            *("stage=autoencoder", "backbone=ldm_small", "perceptual=none", "adversarial=none", *SMALL),
            *("trainer.num_images=8", f"runs_dir={runs_dir}"),
        )
    ).folder
    return train(
        compose_run(
            *(
                "stage=ldm",
                "denoiser=unet_small",
                "denoiser.model_channels=32",
                "denoiser.num_heads=8",
                *SMALL,
            ),
            *("schedule=scaled_linear", "objective=v", "sampling=ddim", "optimizer.muon_scale=null"),
            *("text=clip", f"text.model={runs_dir / 'clip'}", "text.max_tokens=20", "mask_padding=false"),
            *("trainer.num_images=16", f"runs_dir={runs_dir}", f"builds_on.codec={autoencoder}"),
            "trainer.checkpoint_every_images=8",
        )
    ).folder


def test_diffusers_draws_what_t2i_draws(trained, convert):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = convert(trained, "diffusers")
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    assert theirs.scheduler.config.prediction_type == "v_prediction"
    assert theirs.tokenizer.model_max_length == 20
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a large red circle",
        height=32,
        width=32,
        num_inference_steps=6,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(4),
        output_type="pt",
    ).images
    ours = generator_of(trained)
    set_sampling(ours, sampler="ddim", steps=6, guidance_scale=3.0)
    actual = ours.generate(SampleRequest(["a large red circle"], [4], 32, 32)) / 2 + 0.5
    assert (actual - expected).abs().max() < 1 / 255


def test_averaged_weights_are_the_default(trained, convert):
    final, path = trained / "model.safetensors", run_folder.checkpoints(trained)[-1]
    saved = state_folder.read(path)
    name = "model.denoiser.out.2.weight"
    averaged, raw = saved["ema"][name], saved["state_dict"][name]
    assert not torch.equal(averaged, raw)
    key = "model.diffusion_model.out.2.weight"
    assert torch.equal(load_file(convert(path, "ema.safetensors"))[key], averaged)
    assert torch.equal(load_file(convert(final, "final.safetensors"))[key], averaged)
    assert torch.equal(load_file(convert(path, "raw.safetensors", ema=False))[key], raw)
    notes = prepare(final, trained / "x", Options(ema=False)).parts.notes
    assert "model.safetensors holds the final weights only: averaged where the run had an EMA." in notes


def test_what_comes_back_is_what_was_trained(trained, convert):
    back = load_file(convert(convert(trained, "diffusers"), "back", to="t2i") / "model.safetensors")
    assert same_weights(back, load_file(trained / "model.safetensors"))


def test_the_card_says_how_it_was_made_and_names_no_path(trained, convert):
    card = (convert(trained, "diffusers") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: unknown\n")
    assert "| `trainer.num_images` | 16 |" in card
    assert "| `data.caption_keys` | txt |" in card
    assert "StableDiffusionPipeline.from_pretrained" in card
    assert "predicts v" in card
    for part in Path(__file__).parts[1:2] + trained.parts[1:3]:
        assert f"/{part}" not in card


def test_a_card_invents_no_recipe(sd1_run, convert):
    assert "Not known to the converter." in (convert(sd1_run, "back") / "README.md").read_text()


def test_no_path_of_this_machine_is_given_away(trained, convert, tmp_path):
    folder = convert(trained, "diffusers")
    single = convert(trained, "single.safetensors")
    for path in [single, *(p for p in folder.rglob("*") if p.is_file())]:
        data = path.read_bytes()
        assert str(trained.parents[1]).encode() not in data, path
        assert str(tmp_path).encode() not in data, path


def with_config(source: Path, target: Path, **changes) -> Path:
    """A copy of a run's final weights with other values in its configuration."""
    with safe_open(source / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["t2i"])
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            header["config"][group][name] = value
        else:
            header["config"][group] = value
    save_file(load_file(source / "model.safetensors"), target, metadata={"t2i": json.dumps(header)})
    return target


DIT = {"name": "dit", "patch_size": 2, "width": 32, "depth": 1, "heads": 2}
FLOW = {"schedule": {"name": "flow", "shift": 1.0}, "objective": {"prediction": "flow"}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"denoiser": DIT}, "denoiser.name is 'dit'; allowed: unet"),
        (FLOW, "schedule.name is 'flow'; allowed: linear, scaled_linear, cosine"),
        ({"mask_padding": True}, "mask_padding is True; allowed: false"),
        (
            {
                "text__name": "learned",
                "text__model": None,
                "text__width": 8,
                "text__depth": 1,
                "text__heads": 1,
            },
            "text.name is 'learned'; allowed: clip, open_clip",
        ),
        ({"text__name": "minilm", "text__model": None}, "text.name is 'minilm'"),
        ({"text__model": "openai/clip-vit-large-patch14"}, "is not a local folder with a CLIP text model"),
        (
            {"text__name": "open_clip", "text__weights": "a_tag"},
            "text.weights is 'a_tag'; allowed: a local file",
        ),
        ({"family": "gan"}, "family in"),
        ({"denoiser__channel_mult": [1, 2, 2]}, "does not fit the UNet that it describes"),
        ({"denoiser__num_heads": 4}, "denoiser.num_heads is 4; allowed: 8 in a single file"),
        ({"denoiser__colour": 4}, "denoiser.colour is not a known key"),
    ],
    ids=str,
)
def test_what_has_no_foreign_form(trained, tmp_path, changes, words):
    path = with_config(trained, tmp_path / "changed.safetensors", **changes)
    with pytest.raises((ConfigError, CheckpointError)) as raised:
        write(prepare(path, tmp_path / "out.safetensors", Options()))
    assert words in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["changed.safetensors"]


def test_a_family_without_formats_has_no_foreign_form(trained, tmp_path, monkeypatch):
    record = dataclasses.replace(latent_diffusion.FAMILY, formats=None)
    monkeypatch.setattr(latent_diffusion, "FAMILY", record)
    words = (
        r"family in .* is 'latent_diffusion'; allowed: autoencoder, masked \(others have no foreign form\)"
    )
    with pytest.raises(ConfigError, match=words):
        prepare(trained, tmp_path / "out", Options())


@pytest.mark.parametrize("codec", [None, "a codec", {"family": ["autoencoder"]}], ids=str)
def test_a_run_whose_codec_is_not_said(trained, tmp_path, codec):
    path = with_config(trained, tmp_path / "changed.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["t2i"])
    header["extra"]["codec"] = codec
    save_file(load_file(path), path, metadata={"t2i": json.dumps(header)})
    with pytest.raises(ConfigError, match=r"family of the codec in .* allowed: autoencoder"):
        prepare(path, tmp_path / "out", Options())


def test_a_patch_autoencoder_has_no_foreign_form(compose_run, train, tmp_path):
    config = compose_run(
        "experiment=autoencoder/tiny_kl", "trainer.num_images=8", f"runs_dir={tmp_path / 'runs'}"
    )
    with pytest.raises(
        ConfigError, match=r"backbone\.name is 'patch'; allowed: ldm, vit, dvae \(other kinds have no"
    ):
        prepare(train(config).folder, tmp_path / "out", Options())


def test_the_text_model_can_be_named(trained, convert, tmp_path):
    moved = with_config(trained, tmp_path / "moved.safetensors", text__model="not/here")
    folder = str(trained.parents[1] / "clip")
    first, second = (
        convert(moved, "first.safetensors", text_model=folder),
        convert(trained, "second.safetensors"),
    )
    assert first.read_bytes() == second.read_bytes()


@torch.no_grad()
def test_a_model_on_open_clip_gets_its_text_encoder_in_transformers_form(trained, convert, tmp_path):
    """Stable Diffusion 2 as it is trained here: `text=open_clip`, the states of the last layer but one."""
    import open_clip
    from diffusers import StableDiffusionPipeline

    from t2i.text.open_clip import OpenClipTextEncoder

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3},
    }
    (tmp_path / "t2i-test-interop.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "t2i-test-interop.json")
    torch.manual_seed(1)
    weights = open_clip.create_model("t2i-test-interop").state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    values = {"text__name": "open_clip", "text__model": "t2i-test-interop"}
    values |= {"text__weights": str(tmp_path / "weights.safetensors"), "text__max_tokens": 77}
    path = with_config(trained, tmp_path / "sd2.safetensors", **values)
    theirs = StableDiffusionPipeline.from_pretrained(convert(path, "diffusers"))
    captions = ["a large red circle", ""]
    encoder = OpenClipTextEncoder("t2i-test-interop", str(tmp_path / "weights.safetensors"), 77).double()
    ours = encoder(captions)
    ids = theirs.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    expected = theirs.text_encoder.double()(ids).last_hidden_state
    assert (ours.tokens - expected).norm() / expected.norm() < 1e-9
    assert theirs.text_encoder.config.num_hidden_layers == 2


def test_an_autoencoder_by_itself(compose_run, train, convert, tmp_path):
    from diffusers import AutoencoderKL

    config = compose_run(
        *("stage=autoencoder", "backbone=ldm_small", "perceptual=none", "adversarial=none", *SMALL),
        *("trainer.num_images=8", f"runs_dir={tmp_path / 'runs'}"),
    )
    run = train(config).folder
    theirs = AutoencoderKL.from_pretrained(convert(run, "vae"))
    saved = load_file(run / "model.safetensors")
    assert theirs.config.scaling_factor == pytest.approx(saved["codec.latent_scale"].item(), rel=1e-6)
    single = load_file(convert(run, "vae.safetensors"))
    assert torch.equal(single["encoder.conv_in.weight"], saved["codec.encoder.conv_in.weight"])
    back = load_file(convert(tmp_path / "vae", "back", to="t2i") / "model.safetensors")
    assert same_weights(back, saved)


def test_training_goes_on_from_foreign_weights(sd1_run, compose_run, train, tmp_path):
    small_unet = ("denoiser.model_channels=32", "denoiser.channel_mult=[1,2,2]", "denoiser.num_res_blocks=1")
    here = ("trainer.precision=32-true", "trainer.devices=1", "trainer.num_nodes=1", f"runs_dir={tmp_path}")
    composed = compose_run(
        *("experiment=sd-v1/512-v1-4", f"init_from={sd1_run}", *SMALL, *small_unet, *here),
        *("denoiser.attention_resolutions=[1,2]", f"text.model={sd1_run / 'text_encoder'}"),
        *("resolution.min_original_px=1", "resolution.num_images=8", "resolution.learning_rate=1e-4"),
        *("optimizer.warmup_images=0", "ema.half_life_images=1"),
    )
    run = train(composed).folder
    before, after = (all_weights(folder)["model.safetensors"] for folder in (sd1_run, run))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(name.startswith("model.denoiser.") for name in changed)
    for name in changed:  # two steps of AdamW at 1e-4
        assert (after[name] - before[name]).abs().max() < 3e-4
