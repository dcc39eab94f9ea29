"""Codec, text and transformer together: what is drawn, learned and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from t2i import families
from t2i.config import run_to_dict
from t2i.errors import CheckpointError, ConfigError
from t2i.families.autoencoder.codec import from_checkpoint
from t2i.families.autoregressive.model import Autoregressive
from t2i.families.autoregressive.stage import Stage
from t2i.families.tokens import codebook_hash, codes_feature, smallest_integer
from t2i.interfaces import Between, SampleRequest
from t2i.training import run_folder
from t2i.training.checkpoint import load, save_final

PROMPTS = ("a red circle", "a large blue star in the top left")


@pytest.fixture(scope="module")
def codec_config() -> dict:
    from t2i_cli.composition import composed_run

    return composed_run(["experiment=autoencoder/tiny_vq"])


@pytest.fixture(scope="module")
def model(compose_run, codec_config) -> Autoregressive:
    """With weights of its own everywhere."""
    config = compose_run("experiment=autoregressive/tiny_ar").model
    torch.manual_seed(0)
    made = Autoregressive(config, from_checkpoint(codec_config), 32).eval()
    for parameter in made.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def request(**changes) -> SampleRequest:
    return dataclasses.replace(SampleRequest(PROMPTS, [1, 2], 32, 32), **changes)


def test_a_picture_is_its_own_whatever_is_drawn_beside(model):
    both = model.generate(request(), model.config.sampling)
    second = model.generate(request().rows([1]), model.config.sampling)
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=0)
    assert not torch.allclose(both, model.generate(request(seeds=[3, 4]), model.config.sampling), atol=1e-2)


def test_each_code_is_a_step(model):
    steps = []
    model.generate(request(), model.config.sampling, lambda done, all_steps: steps.append((done, all_steps)))
    assert steps == [(i + 1, 64) for i in range(64)]


def test_guidance_of_one_is_as_if_there_were_none(model):
    """The unconditional half is not computed, so it cannot be seen."""
    plain = dataclasses.replace(model.config.sampling, guidance_scale=1.0)
    one = model.generate(request(), plain)
    assert torch.equal(one, model.generate(request(negative_prompt="a green square"), plain))
    strong = dataclasses.replace(plain, guidance_scale=4.0)
    other = model.generate(request(negative_prompt="a green square"), strong)
    assert not torch.allclose(other, model.generate(request(), strong), atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"height_px": 30}, "height is 30; allowed: multiples of 4, the pixels of a code along a side"),
        ({"width_px": 2}, "width is 2; allowed: multiples of 4"),
        (
            {"image": torch.zeros(2, 3, 32, 32)},
            "image is 'given'; allowed: none with this model, which draws",
        ),
        (
            {"image": torch.zeros(2, 3, 32, 32), "mask": torch.ones(2, 1, 32, 32)},
            "mask is 'given'; allowed: none with this model, which draws a picture's codes from the first to",
        ),
        ({"tile": "x"}, "tile is 'x'; allowed: none"),
        ({"between": Between([0.5, 0.5], seeds=[3, 4])}, "between is 'two seeds'; allowed: two prompts"),
    ],
)
def test_what_it_does_not_draw(model, changes, said):
    with pytest.raises(ConfigError, match=said):
        model.check(request(**changes), model.config.sampling)


def test_more_than_its_codes(model):
    sampling = dataclasses.replace(model.config.sampling, top_k=65)
    with pytest.raises(ConfigError, match=r"sampling.top_k is 65; allowed: at most 64"):
        model.check(request(), sampling)


@pytest.mark.parametrize(
    ("num_codes", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)],
)
def test_codes_are_kept_in_the_smallest_integers(num_codes, dtype):
    assert smallest_integer(num_codes) == dtype


def test_codes_ahead_are_those_of_training(model):
    feature = codes_feature(model.codec, "a run")["codes"]
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    made = feature.make(image)["codes"]
    assert made.dtype == torch.uint8
    assert torch.equal(made.long(), model.codec.tokens(image))


def test_another_codebook_has_another_hash(codec_config):
    torch.manual_seed(0)
    one = from_checkpoint(codec_config)
    before = codebook_hash(one)
    with torch.no_grad():
        next(one.decoder.parameters()).add_(1)
    assert codebook_hash(one) == before  # another decoder makes no other codes
    assert codebook_hash(one.double()) == before  # as a run with trainer.precision=64-true holds it
    one.float()
    one.codebook.codes.add_(1)
    assert codebook_hash(one) != before


@pytest.fixture(scope="module")
def runs(compose_run, train, tmp_path_factory) -> dict[str, Path]:
    """Two codecs and a model of the first."""
    found = {}
    for name in ("one", "other"):
        folder = tmp_path_factory.mktemp(name)
        typed = ("trainer.num_images=16", f"runs_dir={folder}", f"seed={len(name)}")
        found[name] = train(compose_run("experiment=autoencoder/tiny_vq", *typed)).folder
    typed = (f"builds_on.codec={found['one']}", "trainer.num_images=8", f"runs_dir={found['one'].parents[1]}")
    found["ar"] = train(compose_run("experiment=autoregressive/tiny_ar", *typed)).folder
    return found


def test_weights_that_have_learned_other_codes_are_refused(compose_run, runs):
    start = load(run_folder.weights_file(runs["ar"]))
    config = compose_run("experiment=autoregressive/tiny_ar", f"builds_on.codec={runs['other']}")
    expected = r"builds_on\.codec=.* has another codebook \(hash \w{12}\) than .*, from which .* has learned"
    with pytest.raises(CheckpointError, match=expected):
        Stage(config, start)
    kept = Stage(compose_run("experiment=autoregressive/tiny_ar"), start)  # "latest" is then its own
    assert kept.config.model.builds_on.codec == str(runs["one"])


def test_a_run_from_before_code_vectors_draws_and_is_gone_on_from_without_them(compose_run, runs, tmp_path):
    typed = ("experiment=autoregressive/tiny_ar", f"builds_on.codec={runs['one']}")
    earlier = Stage(compose_run(*typed, "transformer.code_vectors=false"))
    config = run_to_dict(earlier.config)
    del config["transformer"]["code_vectors"]
    header = {"config": config, "extra": earlier.checkpoint_extra()}
    save_final(earlier.inference_weights(), header, tmp_path / "earlier")
    start = load(tmp_path / "earlier")
    with pytest.raises(ConfigError, match=r"code_vectors is True; allowed: False with init_from=.*earlier"):
        Stage(compose_run(*typed), start)
    with pytest.raises(ConfigError, match=r"code_vectors is False; allowed: True with init_from="):
        Stage(
            compose_run(*typed, "transformer.code_vectors=false"), load(run_folder.weights_file(runs["ar"]))
        )
    onwards = Stage(compose_run(*typed, "transformer.code_vectors=false"), start)
    for name, value in earlier.model.transformer.state_dict().items():
        assert torch.equal(onwards.model.transformer.state_dict()[name], value)
    generator = families.get("autoregressive").load_generator()(start, "cpu")
    assert generator.generate(request()).isfinite().all()


@pytest.mark.parametrize("experiment", ["autoregressive/tiny_ar", "masked/tiny_masked"])
def test_a_transformer_is_given_the_vectors_of_the_codec_that_it_builds_on(compose_run, runs, experiment):
    config = compose_run(f"experiment={experiment}", f"builds_on.codec={runs['other']}")
    stage = families.get(config.family).load_stage(config.stage)(config)
    codes = load(run_folder.weights_file(runs["other"])).weights["codec.codebook.codes"]
    expected = (codes - codes.mean(0)) / codes.std(0, correction=0)
    weights = stage.inference_weights()
    found = [name for name in weights if name.endswith("of_vectors.vectors")]
    assert len(found) == 2  # on the way in and on the way out
    for name in found:
        torch.testing.assert_close(weights[name], expected)


def test_the_newest_codec_of_codes_is_meant(compose_run, train, runs, tmp_path):
    """Not a newer one without."""
    typed = ("trainer.num_images=8", f"runs_dir={runs['one'].parents[1]}")
    train(compose_run("experiment=autoencoder/tiny_kl", *typed))
    config = compose_run("experiment=autoregressive/tiny_ar", f"runs_dir={runs['one'].parents[1]}")
    assert Stage(config).config.model.builds_on.codec == str(runs["one"])
    with pytest.raises(
        CheckpointError, match=r"builds on a codec of codes, and there is none in .* codec=vq"
    ):
        Stage(compose_run("experiment=autoregressive/tiny_ar", f"runs_dir={tmp_path}"))
    named = "builds_on.experiment=autoencoder/vit_vqgan"
    with pytest.raises(CheckpointError, match=r"train one with `t2i train experiment=autoencoder/vit_vqgan`"):
        Stage(compose_run("experiment=autoregressive/tiny_ar", f"runs_dir={tmp_path}", named))


def test_a_codec_without_codes_is_refused(compose_run, train, tmp_path):
    typed = ("experiment=autoencoder/tiny_kl", "trainer.num_images=8", f"runs_dir={tmp_path}")
    folder = train(compose_run(*typed)).folder
    with pytest.raises(ConfigError, match=r"builds_on.codec is .*, whose KLCodec gives no tokens"):
        Stage(compose_run("experiment=autoregressive/tiny_ar", f"builds_on.codec={folder}"))


def test_a_palette_and_a_codec_are_one_too_many(compose_run):
    with pytest.raises(ConfigError, match="palette is 8; allowed: 2 to 65,536 with builds_on=null"):
        compose_run("experiment=autoregressive/tiny_ar", "palette=8")
    with pytest.raises(
        ConfigError, match="palette is 65537; allowed: 2 to 65,536"
    ):  # pixels that it is made of
        compose_run("experiment=autoregressive/tiny_ar", "builds_on=null", "palette=65537")
    with pytest.raises(ConfigError, match="builds_on is None; allowed: a codec"):
        compose_run("experiment=autoregressive/tiny_ar", "builds_on=null")
