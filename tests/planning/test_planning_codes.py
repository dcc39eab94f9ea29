"""What `t2i plan` says of models of codes, at one resolution and at two: against real models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2i.config import RunConfig, run_to_dict
from t2i.errors import ConfigError
from t2i.families.autoregressive import model as autoregressive
from t2i.families.low_codes import CodesModel
from t2i.families.masked import model as masked
from t2i.interfaces import SampleRequest
from t2i.nn.resize import smaller
from t2i.planning.count import num_parameters
from t2i.planning.drawing import counted_calls
from t2i.planning.model import build_model, flops_per_image, networks

STAGES = ("ar", "masked", "ar_sr", "masked_sr")


@dataclass(frozen=True)
class Case:
    """A run, what it builds on as a plan and a checkpoint have it, and its model."""

    config: RunConfig
    builds_on: dict[str, Any]
    model: CodesModel


@pytest.fixture(scope="module")
def case_of(compose_run):
    """(stage) -> a small one; of super-resolution from 4 x 4 codes to 8 x 8, with a smaller low transformer."""
    from t2i_cli.composition import composed_run

    codec = composed_run(["experiment=autoencoder/tiny_vq", "codec.num_codes=16"], None)
    made: dict[str, Case] = {}

    def case_of(stage: str) -> Case:
        if stage not in made:
            base, is_masked, size = stage.removesuffix("_sr"), stage.startswith("masked"), 16
            tiny = "masked/tiny_masked" if is_masked else f"autoregressive/tiny_{base}"
            asked = [f"experiment={tiny}", "sampling.guidance_scale=2.0", "transformer.depth=1"]
            builds_on: dict[str, Any] = {"codec": codec}
            if base != stage:
                low = compose_run(*asked, "resolution.size_px=16", "transformer.width=16")
                builds_on["low"] = {"config": run_to_dict(low), "extra": {"codec": codec}}
                asked += [f"stage={stage}", "low.num_codes=16", "low.side=4"]
                size = 32
            config = compose_run(*asked, f"resolution.size_px={size}", "trainer.precision=bf16-mixed")
            model = (masked if is_masked else autoregressive).model_of(config, builds_on).eval()
            made[stage] = Case(config, builds_on, model)
        return made[stage]

    return case_of


@pytest.mark.parametrize("stage", STAGES)
def test_a_picture_takes_the_flops_that_are_planned(stage, case_of):
    """All that is called for one, of all networks, at both resolutions, with guidance."""
    case = case_of(stage)
    planned = {
        network.name: sum(calls.total_flops for calls in counted_calls(network))
        for network in networks(case.config, case.builds_on)
    }
    assert all(planned[f"low {name}"] for name in ("transformer", "text encoder") if stage.endswith("_sr"))
    size = case.config.resolution.size_px
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        case.model.generate(SampleRequest.of_size(["a red circle"], size), case.config.model.sampling)
    assert counter.get_total_flops() == sum(planned.values())


@pytest.mark.parametrize("stage", [pytest.param("ar_sr", marks=pytest.mark.slow), "masked_sr"])
def test_the_run_at_a_lower_resolution_is_there_in_training(stage, case_of):
    """Its weights are the model's, in float32 and frozen; of what it computes only the codes are made there."""
    case = case_of(stage)
    model, low = case.model, case.model.low
    plan = build_model(case.config, case.builds_on)
    parts = {part.name: part for part in plan.parts}
    trained = num_parameters(model.transformer, model.text)
    assert sum(part.parameters for part in plan.parts if part.trained) == trained
    assert plan.trained().frozen_bytes == 4 * (num_parameters(model) - trained)
    assert plan.trained({"codes", "low_codes"}).frozen_bytes == plan.trained().frozen_bytes
    assert plan.cacheable == {"codes", "low_codes"}
    assert (parts["low transformer"].parameters, parts["low transformer"].flops) == (
        num_parameters(low.transformer),
        None,
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        low.codec.moments(smaller(torch.zeros(1, 3, 32, 32), (16, 16)))
    assert parts["low codec encoder"].flops.total == counter.get_total_flops() > 0
    assert [name for name, part in parts.items() if part.cached_as == "low_codes"] == [
        "low codec encoder",
        "low codec decoder",
    ]
    data = case.config.data
    ahead = dataclasses.replace(case.config, data=dataclasses.replace(data, encoded="ahead.tar"))
    made = sum(parts[name].flops.total for name in ("codec encoder", "low codec encoder"))
    assert flops_per_image(case.config, case.builds_on) - flops_per_image(ahead, case.builds_on) == made


def test_a_frozen_text_encoder_is_one_for_both_resolutions(case_of, compose_run):
    case = case_of("masked_sr")
    low = run_to_dict(compose_run("stage=masked", "resolution.size_px=16"))
    builds_on = case.builds_on | {"low": case.builds_on["low"] | {"config": low}}
    for text, names in (("minilm", ["text encoder"]), ("learned", ["text encoder", "low text encoder"])):
        config = compose_run("stage=masked_sr", f"text={text}", "low.num_codes=16", "low.side=4")
        found = [network for network in networks(config, builds_on) if "text" in network.name]
        assert [network.name for network in found] == names
    frozen = found[1]
    assert (frozen.trained, frozen.saved, frozen.calls_per_image, frozen.cached_as) == (False, False, 0, None)


def test_a_palette_builds_on_nothing(compose_run):
    """As `t2i train` asks a plan for its FLOPs."""
    from t2i_cli.train import built_on

    config = compose_run("experiment=imagegpt/small", "data.shards=x.tar", "resolution.size_px=16")
    assert built_on(config) == {}
    assert next(iter(networks(config, {}))).name == "transformer"


@pytest.mark.parametrize(
    ("stage", "low", "expected"),
    [
        ("ar_sr", None, ("ar", 128)),
        ("ar_sr", "autoregressive/tiny_parti", ("parti", 32)),
        ("masked_sr", "masked/tiny_masked", ("masked", 32)),
    ],
)
def test_an_experiment_stands_for_the_run_at_a_lower_resolution(stage, low, expected):
    """At the size at which the codec of small pictures, 4 px a code, gives 8 codes a side."""
    from t2i_cli.plan import built_on, planned_run

    config, _ = planned_run([f"stage={stage}", "data=shards", "cluster=a100x8"], None)
    found = built_on(config, None, None, low)
    values, size = found["low"]["config"], config.resolution.size_px
    assert (values["stage"], values["transformer"]["width"]) == expected
    assert (values["resolution"]["size_px"], size) == (32, 64)
    assert found["low"]["extra"] == {"codec": found["codec"]}
    assert found["codec"]["codec"]["num_codes"] == config.model.low.num_codes


def test_the_run_at_a_lower_resolution_has_the_codec_that_it_names():
    """Muse's base model: 256 px at f16, where its super-resolution is at f8 (2301.00704, section 2.4)."""
    from t2i.families.codec import image_codec
    from t2i_cli.plan import built_on, planned_run

    config, _ = planned_run(["experiment=muse/512", "cluster=a100x8"], None)
    found = built_on(config, None, None, "muse/256")
    assert found["low"]["config"]["resolution"]["size_px"] == 256
    with torch.device("meta"):
        own, low = (image_codec(each["codec"]) for each in (found, found["low"]["extra"]))
    assert (own.downsampling, low.downsampling) == (8, 16)
    assert low.num_codes == config.model.low.num_codes


def test_what_builds_on_no_codec_is_planned_without_one(capsys):
    """ImageGPT's codes are colours."""
    from t2i_cli.plan import built_on, planned_run, run

    typed = ["experiment=imagegpt/small", "text=learned", "cluster=a100x8"]
    config, _ = planned_run(typed, None)
    assert built_on(config, None, None) == {}
    with pytest.raises(
        ConfigError, match="--autoencoder is 'autoencoder/dvae'; allowed: nothing, as this run"
    ):
        built_on(config, "autoencoder/dvae", None)
    run([*typed, "transformer.depth=1", "transformer.width=64"])
    assert "codec" not in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["ar_sr", "masked_sr"])
def test_codes_that_do_not_divide_are_said_before_training(stage):
    from t2i_cli.plan import built_on, planned_run

    config, _ = planned_run([f"stage={stage}", "data=shards", "cluster=a100x8", "low.side=7"], None)
    with pytest.raises(ConfigError, match=r"low.side is 7; allowed: a divisor of 16, the codes along a side"):
        build_model(config, built_on(config, None, None))


@pytest.mark.parametrize(
    ("experiment", "name", "num_codes"),
    [
        ("parti/3b", "vq", 8192),
        ("dalle/12b", "gumbel", 8192),
        ("muse/512", "vq", 8192),
        ("maskgit/256", "vq", 1024),
    ],
)
def test_a_published_recipe_is_planned_with_its_codec(experiment, name, num_codes):
    from t2i_cli.plan import built_on, planned_run

    config, _ = planned_run([f"experiment={experiment}", "cluster=a100x8"], None)
    codec = built_on(config, None, None)["codec"]
    assert (codec["codec"]["name"], codec["codec"]["num_codes"]) == (name, num_codes)
    other = built_on(config, "autoencoder/vqgan_f16_16384", None)["codec"]
    assert other["codec"]["num_codes"] == 16_384


def test_the_codec_that_is_counted_is_said(capsys):
    from t2i_cli.plan import run

    said = "The codec is planned as experiment=autoencoder/small_codes; --autoencoder names another."
    for arguments, expected in (([], True), (["--autoencoder", "autoencoder/tiny_vq"], False)):
        run([*arguments, "experiment=masked/tiny_masked", "cluster=a100x8"])
        assert (said in " ".join(capsys.readouterr().out.split())) == expected
