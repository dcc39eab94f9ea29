"""trained=decoder: a decoder is trained on, and what pictures are encoded to stays as it is to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from codec_parts import TINY, VQ, first_run, images, saved_codec, saved_masked_model, steps
from PIL import Image
from safetensors.torch import load_file

from t2i import families
from t2i.data.encoded import feature_hash
from t2i.errors import CheckpointError, ConfigError, UserError
from t2i.families.autoencoder.stage import Stage
from t2i.families.codec_run import with_codec
from t2i.families.tokens import codebook_hash, codes_feature, coding_hash
from t2i.generation.recipes import found_in
from t2i.interfaces import SampleRequest
from t2i.training import run_folder
from t2i.training.checkpoint import load
from t2i_cli.generators import load as load_to_draw
from t2i_cli.sample import run as sample

DEEPER = "backbone.decoder_res_blocks=2"
CODECS = {
    "vq": VQ,
    "gumbel": ("codec=gumbel", "codec.num_codes=16"),
    "kl": ("codec=kl",),
}


@pytest.mark.parametrize("codec", CODECS)
def test_the_decoder_learns_and_nothing_that_encodes_moves(codec, compose_run):
    start = first_run(compose_run, *CODECS[codec])
    stage = Stage(compose_run(*TINY, *CODECS[codec], "trained=decoder", DEEPER), start)
    before = Stage(compose_run(*TINY, *CODECS[codec]), start).codec.eval()
    assert not any(module.training for part in stage.codec.frozen() for module in part.modules())
    losses = steps(stage, 8)
    assert losses[-1] < 0.97 * losses[0], losses
    stage.after_training([images()])
    for name, value in stage.codec.state_dict().items():
        if not name.startswith(("decoder.", "post_quant_conv.")):
            assert torch.equal(value, start.weights[f"codec.{name}"]), name
    assert coding_hash(stage.codec) == coding_hash(before)
    assert torch.equal(stage.codec.moments(images()), before.moments(images()))
    assert all(name.startswith(("codec.decoder.", "codec.post_quant_conv.")) for name in stage.averages())


def test_codes_and_their_hash_are_the_same(compose_run):
    start = first_run(compose_run, *VQ)
    before = Stage(compose_run(*TINY, *VQ), start).codec.eval()
    stage = Stage(compose_run(*TINY, *VQ, "trained=decoder"), start)
    steps(stage, 3)
    assert torch.equal(stage.codec.tokens(images()), before.tokens(images()))
    assert codebook_hash(stage.codec) == codebook_hash(before)
    made = (codes_feature(codec, "")["codes"] for codec in (stage.codec, before))
    assert len({feature_hash(each) for each in made}) == 1  # codes computed ahead stay good
    tokens = before.tokens(images())
    assert not torch.allclose(stage.codec.decode_tokens(tokens), before.decode_tokens(tokens))


def test_a_deeper_decoder_starts_as_the_one_that_was(compose_run, float64):
    start = first_run(compose_run, *VQ, "backbone.attention_resolutions=[16]")
    deeper = (DEEPER, "backbone.attention_resolutions=[16]")
    before = Stage(compose_run(*TINY, *VQ, deeper[1]), start).codec.double().eval()
    stage = Stage(compose_run(*TINY, *VQ, "trained=decoder", *deeper), start)
    codec, tokens = stage.codec.double().eval(), before.tokens(images().double())
    more = [sum(p.numel() for p in each.decoder.parameters()) for each in (codec, before)]
    assert more[0] > 1.2 * more[1]
    assert torch.equal(codec.decode_tokens(tokens), before.decode_tokens(tokens))


def test_a_wider_decoder_begins_anew_and_encodes_the_same(compose_run):
    start = first_run(compose_run, *VQ)
    wider = Stage(
        compose_run(*TINY, *VQ, "trained=decoder", "backbone.decoder_base_channels=24"), start
    ).codec
    before = Stage(compose_run(*TINY, *VQ), start).codec
    assert wider.decoder.conv_out.in_channels == 24
    assert before.decoder.conv_out.in_channels == wider.encoder.conv_in.out_channels == 16
    assert torch.equal(wider.eval().tokens(images()), before.eval().tokens(images()))
    assert wider.decode_tokens(wider.tokens(images())).shape == (4, 3, 32, 32)


def test_what_does_not_fit_is_said(compose_run):
    with pytest.raises(ConfigError, match="trained is 'decoder'; allowed: all without init_from=RUN"):
        Stage(compose_run(*TINY, *VQ, "trained=decoder"))
    start = first_run(compose_run, *VQ)
    for other in ("codec.num_codes=32", "backbone.num_res_blocks=2"):
        with pytest.raises(CheckpointError, match="first does not fit the model"):
            Stage(compose_run(*TINY, *VQ, "trained=decoder", other), start)
    with pytest.raises(ConfigError, match=r"codec is 'kl'; allowed: vq with init_from=.*first"):
        Stage(compose_run(*TINY, "trained=decoder"), start)
    for other in ("codec.normalize=true", "backbone.unit_range=true"):
        with pytest.raises(
            ConfigError, match=r"is True; allowed: False with trained=decoder, as first has it"
        ):
            Stage(compose_run(*TINY, *VQ, "trained=decoder", other), start)
    with pytest.raises(ConfigError, match=r"backbone.decoder_base_channels is 12; allowed: a multiple of 8"):
        compose_run(*TINY, *VQ, "backbone.decoder_base_channels=12")


def test_a_model_draws_with_the_decoder_of_another_run(compose_run, tmp_path):
    """Its codes are those of its own; a codec of other codes is refused."""
    start = first_run(compose_run, *VQ)
    stage = Stage(compose_run(*TINY, *VQ, "trained=decoder", DEEPER), start)
    steps(stage, 3)
    found = saved_masked_model(compose_run, start, tmp_path / "masked")
    others = {"finer": stage, "other": Stage(compose_run(*TINY, *VQ))}
    places = {name: saved_codec(each, tmp_path / f"{name}.safetensors") for name, each in others.items()}
    request, codes = SampleRequest.of_size(["a red circle"], 32), []
    loaded = [
        load_to_draw(tmp_path / "masked", torch.device("cpu"), typed)
        for typed in (
            [],
            [f"builds_on.codec={places['finer']}"],
            [f"++builds_on.codec={places['finer']}"],
            [f"builds_on={{codec:{places['finer']}}}"],
        )
    ]
    digests = [each.weights for each in loaded]  # as a picture's recipe has them
    assert digests[0] != digests[1]
    assert digests[1:] == 3 * [digests[1]]  # however it was typed
    said = {
        "": "is ''; allowed: latest, a run or a file",
        "null": "is None; allowed",
        str(tmp_path / "masked"): "is '.*/masked, of stage masked'; allowed: a run of stage autoencoder",
    }
    for typed, words in said.items():
        with pytest.raises(ConfigError, match=f"builds_on.codec {words}"):
            load_to_draw(tmp_path / "masked", torch.device("cpu"), [f"builds_on.codec={typed}"])
    for generator in (each.generator for each in loaded[:2]):
        own = generator.model.drawn_codes
        generator.model.drawn_codes = lambda *given, own=own: (codes.append(own(*given)), codes[-1])[1]
    pictures = [each.generator.generate(request) for each in loaded[:2]]
    assert torch.equal(codes[0][0], codes[1][0])
    expected = stage.codec.eval().decode_tokens(codes[0][0]).clamp(-1, 1)
    torch.testing.assert_close(pictures[1], expected)
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-3)

    with pytest.raises(
        CheckpointError, match=r"other.safetensors makes other codes or latents \(hash \w{12}\)"
    ):
        with_codec(found, places["other"])
    alone = dataclasses.replace(found, extra={})
    with pytest.raises(ConfigError, match=r"builds_on.codec is .*; allowed: a codec for a model that builds"):
        with_codec(alone, places["finer"])


@pytest.mark.slow
def test_a_run_of_its_own_resumes_and_is_built_on(compose_run, train, tmp_path):
    """With an average of its weights and a discriminator; what was cut in two is what was not."""
    typed = ("experiment=autoencoder/tiny_vq", f"runs_dir={tmp_path}", "adversarial.start_images=16")
    first = train(compose_run(*typed, "trainer.num_images=32", "name=first")).folder
    masked = ("experiment=masked/tiny_masked", "trainer.num_images=16", f"runs_dir={tmp_path}")
    model = train(compose_run(*masked, f"builds_on.codec={first}", "name=model")).folder
    typed = (*typed, "trained=decoder", DEEPER, "trainer.checkpoint_every_images=16")
    whole = train(compose_run(*typed, f"init_from={first}", "trainer.num_images=32", "name=whole"))
    cut = tmp_path / "cut" / "autoencoder" / "whole"
    import shutil

    gone = shutil.ignore_patterns("step_0000004", run_folder.FINAL_WEIGHTS, "samples")
    shutil.copytree(whole.folder, cut, ignore=gone)
    resumed = train(
        compose_run(*typed, "trainer.num_images=32", f"runs_dir={tmp_path / 'cut'}", "resume=latest")
    )
    weights, same, start = (
        load_file(folder / run_folder.FINAL_WEIGHTS) for folder in (whole.folder, resumed.folder, first)
    )
    for name, value in weights.items():
        assert torch.equal(value, same[name])
        if not name.startswith(("codec.decoder.", "codec.post_quant_conv.")):
            assert torch.equal(value, start[name]), name
    on = train(compose_run(*masked, f"builds_on.codec={whole.folder}", f"init_from={model}", "name=on"))
    assert on.complete  # weights that have learned the same codes go on with this codec
    found = with_codec(load(run_folder.weights_file(model)), str(whole.folder))
    generator = families.get("masked").load_generator()(found, "cpu")
    assert generator.generate(SampleRequest.of_size(["a red circle"], 32)).isfinite().all()


@pytest.mark.parametrize("codec", ["vq", "kl"])
def test_the_same_weights_for_another_range_of_pixels_are_another_encoding(codec, compose_run):
    one, other = (
        Stage(compose_run(*TINY, *CODECS[codec], f"backbone.unit_range={value}")).codec
        for value in ("false", "true")
    )
    other.load_state_dict(one.state_dict())
    assert coding_hash(one) != coding_hash(other)
    assert not torch.equal(one.moments(images()), other.moments(images()))


def test_a_recipe_names_the_decoder(compose_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = first_run(compose_run, *VQ)
    stage = Stage(compose_run(*TINY, *VQ, "trained=decoder", DEEPER), start)
    steps(stage, 3)
    saved_masked_model(compose_run, start, tmp_path / "masked")
    place = saved_codec(stage, tmp_path / "finer.safetensors")
    common = ("--device", "cpu", "--num-images", "1")
    drawn = {"own": (), "finer": (f"++builds_on.codec={place}",)}
    for name, typed in drawn.items():
        sample(["--checkpoint", "masked", "--prompt", "a", "--out", name, "--steps", "2", *common, *typed])
    sample(["--recipe", "finer/a_0.png", "--out", "again", *common])
    first = saved_codec(Stage(compose_run(*TINY, *VQ), start), tmp_path / "first.safetensors")
    sample(["--recipe", "finer/a_0.png", "--out", "other", *common, f"builds_on.codec={first}"])
    pixels = {name: Image.open(f"{name}/a_0.png").tobytes() for name in (*drawn, "again", "other")}
    assert pixels["again"] == pixels["finer"] != pixels["own"]
    assert pixels["other"] == pixels["own"]
    assert found_in(tmp_path / "again" / "a_0.png") == found_in(tmp_path / "finer" / "a_0.png")
    Path(place).rename("elsewhere.safetensors")
    with pytest.raises(
        UserError, match=r"names .*finer.safetensors, which is not here: name it by builds_on"
    ):
        sample(["--recipe", "finer/a_0.png", "--out", "third"])
    sample(["--recipe", "finer/a_0.png", "--out", "finer", *common, "builds_on.codec=elsewhere.safetensors"])
    assert len(list(Path("finer").glob("a_0*.png"))) == 1  # known as the same, wherever the codec lies
