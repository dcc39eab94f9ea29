"""stage=ar_sr: codes at a lower resolution, and those that are drawn given them."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from grey_codec import GreyCodec
from safetensors.torch import load_file

from t2i import families
from t2i.codes.config import CodeSampling
from t2i.config import RunConfig, TextConfig, parse_run, run_to_dict
from t2i.data.encoded import Made, Record, check_same, feature_hash
from t2i.errors import CheckpointError, ConfigError, DataError
from t2i.families.autoregressive.config import Config, NetworkConfig
from t2i.families.autoregressive.drawing import draw_codes
from t2i.families.autoregressive.model import Autoregressive
from t2i.families.autoregressive.network import CodeTransformer
from t2i.families.builds_on import CodesBuildsOn, LowConfig
from t2i.families.codec_run import low_run
from t2i.interfaces import Batch, SampleRequest, TextFeatures
from t2i.training import checkpoint
from t2i.training.checkpoint import save_final
from t2i.training.randomness import Randomness
from t2i_cli.generators import load as load_to_draw

NETWORK = NetworkConfig(
    width=16, depth=2, heads=2, positions="rotary", norm="layer", bias=True, qk_norm=True, dropout=0.0
)
SAMPLING = CodeSampling(temperature=1.0, top_k=None, top_p=1.0, guidance_scale=2.0)
TEXT = TextConfig("learned", max_tokens=8, width=16, depth=1, heads=2)
LOW = Config(CodesBuildsOn("grey"), NETWORK, TEXT, SAMPLING)
HIGH = dataclasses.replace(LOW, builds_on=CodesBuildsOn("grey", "low"), low=LowConfig(5, 2))
PROMPTS = ["a red circle", "a blue star"]
WAYS = [("learned", "prefix"), ("rotary", "prefix"), ("rotary", "cross")]


def with_own_weights(module):
    """Everywhere, also where training starts at zero."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def network(positions="rotary", conditioning="prefix", attention="full") -> CodeTransformer:
    torch.manual_seed(0)
    config = dataclasses.replace(NETWORK, positions=positions, conditioning=conditioning, attention=attention)
    return with_own_weights(CodeTransformer(config, 7, (4, 4), 6, 3, LowConfig(5, 2)))


def given() -> TextFeatures:
    torch.manual_seed(1)
    return TextFeatures(
        torch.randn(2, 3, 6), torch.zeros(2, 6), torch.tensor([[True] * 3, [True, True, False]])
    )


@pytest.mark.parametrize(("positions", "conditioning"), WAYS)
def test_each_code_sees_all_codes_at_the_lower_resolution_and_none_after_it(positions, conditioning, float64):
    transformer, text = network(positions, conditioning), given()
    codes, low = torch.randint(7, (2, 15)), torch.randint(5, (2, 2, 2))
    logits = transformer(codes, text.tokens, text.mask, low=low)
    assert logits.shape == (2, 16, 7)
    for place in range(4):
        other = low.clone()
        other[0].view(-1)[place] = (low[0].view(-1)[place] + 1) % 5
        changed = transformer(codes, text.tokens, text.mask, low=other)
        assert ((changed[0] - logits[0]).abs().amax(1) > 1e-6).all()
        torch.testing.assert_close(changed[1], logits[1])
    later = codes.clone()
    later[:, 9:] = (codes[:, 9:] + 1) % 7
    changed = transformer(later, text.tokens, text.mask, low=low)
    torch.testing.assert_close(changed[:, :10], logits[:, :10])
    assert (changed[:, 10:] - logits[:, 10:]).abs().amax() > 1e-6


@pytest.mark.parametrize("attention", ["full", "axial"])
@pytest.mark.parametrize(("positions", "conditioning"), WAYS)
def test_what_is_kept_of_the_slots_before_gives_the_same_codes(positions, conditioning, attention, float64):
    transformer, text = network(positions, conditioning, attention), given()
    low = torch.randint(5, (2, 2, 2))
    plain = dataclasses.replace(SAMPLING, guidance_scale=1.0, temperature=0.0)
    with torch.no_grad():
        drawn, finite = draw_codes(
            transformer, text, None, (4, 4), [torch.Generator(), torch.Generator()], plain, low=low
        )
        afresh = torch.zeros(2, 0, dtype=torch.int64)
        for number in range(16):
            places = torch.arange(number + 1)
            logits = transformer(afresh, text.tokens, text.mask, places, low=low)[:, -1]
            afresh = torch.cat([afresh, logits.argmax(1, keepdim=True)], 1)
    assert finite.all()
    assert torch.equal(drawn.flatten(1), afresh)


def test_a_code_at_the_lower_resolution_lies_in_the_middle_of_those_that_it_covers():
    queries, keys = network().rotation(torch.arange(16), 0)
    frequencies = 10_000.0 ** -(torch.arange(2) / 2)
    # Three of the text, then four of 2 x 2 codes each: the last one is around row and column 2.5.
    expected = torch.cat([2.5 * frequencies, 2.5 * frequencies])
    for angles in (queries, keys):
        assert (angles[:3] == 0).all()
        torch.testing.assert_close(angles[6], expected)
    torch.testing.assert_close(queries[7 + 5], torch.cat([frequencies, frequencies]))  # of row 1, column 1


def low_model(size_px=16) -> Autoregressive:
    torch.manual_seed(0)
    return with_own_weights(Autoregressive(LOW, GreyCodec(5, 8), size_px))


def high_model(config=HIGH, size_px=32) -> Autoregressive:
    model = Autoregressive(config, GreyCodec(7, 8), size_px, low_model()).eval()
    with_own_weights(model.transformer)
    return model


def asked(**changes) -> SampleRequest:
    return SampleRequest(**({"prompts": PROMPTS, "seeds": [3, 4], "height_px": 32, "width_px": 32} | changes))


def test_codes_at_the_lower_resolution_are_drawn_first(float64):
    """By the low run's own model, as if alone; and both go on from one generator a picture."""
    model = high_model()
    drawn, seen = [], []
    own, predict = model.low.drawn_codes, model.transformer.forward
    model.low.drawn_codes = lambda *given: (drawn.append(own(*given)), drawn[-1])[1]
    model.transformer.forward = lambda *given: (seen.append(given[-1]), predict(*given))[1]
    images = model.generate(asked(), SAMPLING)
    assert images.shape == (2, 3, 32, 32)
    low = model.low.generate(asked(height_px=16, width_px=16), SAMPLING)
    assert torch.equal(model.low.codec.decode_tokens(drawn[0][0]), low)
    (once,) = seen
    assert torch.equal(once, torch.cat([drawn[0][0]] * 2))  # with guidance
    model.low.drawn_codes = own
    alone = model.generate(asked().rows([1]), SAMPLING)
    torch.testing.assert_close(alone[0], images[1])


def test_the_numbers_of_both_resolutions_are_not_the_same(float64):
    """Codes drawn from one uniform number would follow one another."""
    model, given_numbers = high_model(), []
    rand = torch.rand

    def kept(*shape, generator=None):
        given_numbers.append(rand(*shape, generator=generator))
        return given_numbers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", kept)
        model.generate(asked().rows([0]), SAMPLING)
    first, second = given_numbers
    assert first.shape == (4,)
    assert second.shape == (16,)
    assert not set(first.tolist()) & set(second.tolist())


@pytest.mark.parametrize(
    ("size_px", "changes", "sentence"),
    [
        (32, {"num_codes": 6}, "low.num_codes is 6; allowed: 5 with builds_on.low=low"),
        (32, {"side": 4}, "low.side is 4; allowed: 2 with builds_on.low=low"),
        (40, {}, r"resolution.size_px is 40; allowed: sizes whose codes \(5 a side\) are a multiple of 2"),
        (16, {}, r"resolution.size_px is 16; allowed: sizes whose codes \(2 a side\)"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_in_a_sentence(size_px, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        high_model(dataclasses.replace(HIGH, low=dataclasses.replace(HIGH.low, **changes)), size_px)


def test_what_it_does_not_draw():
    with pytest.raises(ConfigError, match="width is 40; allowed: 32 with this model of super-resolution"):
        high_model().check(asked(width_px=40), SAMPLING)
    model = high_model()
    model.low.config = dataclasses.replace(LOW, sampling=dataclasses.replace(SAMPLING, top_k=9))
    with pytest.raises(
        ConfigError, match=r"lower resolution, which draws first: sampling.top_k is 9; allowed"
    ):
        model.check(asked(), SAMPLING)


def test_what_each_stage_needs_is_said(compose_run):
    with pytest.raises(ConfigError, match=r"builds_on.low is 'run'; allowed: null with stage ar or parti"):
        compose_run("stage=parti", "+builds_on.low=run")
    with pytest.raises(ConfigError, match=r"builds_on.low is None; allowed: a run of stage ar or parti"):
        compose_run("stage=ar_sr", "builds_on.low=null")


def test_codes_that_are_those_of_the_lower_resolution_are_learned(float64):
    """Each of 2 x 2 codes equal to the one that covers it: what is there to know is in the low codes alone."""
    torch.manual_seed(0)
    transformer = CodeTransformer(NETWORK, 5, (4, 4), 6, 3, LowConfig(5, 2))
    text = given()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    start = None
    for _ in range(80):
        low = torch.randint(5, (32, 2, 2))
        codes = low.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        tokens, mask = text.tokens[:1].expand(32, -1, -1), text.mask[:1].expand(32, -1)
        loss = transformer.losses(codes, tokens, mask, low)["codes"]
        start = start or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert start == pytest.approx(math.log(5))
    assert loss.item() < 0.3  # without them no less than log(5) / 4 = 0.4: no first code of four can be known


def made_by(feature) -> Made:
    return Made(feature.of, feature.tensors, feature_hash(feature), feature.made_by)


def saved(stage, path) -> str:
    header = {"config": run_to_dict(stage.config), "extra": stage.checkpoint_extra()}
    save_final(stage.inference_weights(), header, path)
    return str(path)


def test_both_stages_learn_and_draw_from_one_file(compose_run, tmp_path):
    """The pictures are those of the run's file alone, without the runs that it builds on."""
    build = families.get("autoregressive").load_stage
    tiny = compose_run("experiment=autoencoder/tiny_vq")
    codec = saved(families.get("autoencoder").load_stage("autoencoder")(tiny), tmp_path / "codec")
    common = (f"builds_on.codec={codec}", f"runs_dir={tmp_path}")
    ar_sr = ("experiment=autoregressive/tiny_ar", "stage=ar_sr", "low.num_codes=64", "low.side=4", *common)
    with pytest.raises(CheckpointError, match=r"builds on a run of stage ar or parti at a lower resolution"):
        build("ar_sr")(compose_run(*ar_sr))

    def at_16_px(codec: str) -> RunConfig:
        typed = ("experiment=autoregressive/tiny_parti", "resolution.size_px=16", f"builds_on.codec={codec}")
        return compose_run(*typed, f"runs_dir={tmp_path}")

    low = saved(build("parti")(at_16_px(codec)), tmp_path / "low")
    stage = build("ar_sr")(compose_run(*ar_sr, f"builds_on.low={low}"))

    image, names = torch.rand(2, 3, 32, 32) * 2 - 1, ["a", "b"]
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    batch = Batch(image, PROMPTS, names, zeros, zeros, [{}] * 2, torch.arange(2))
    features = stage.features()
    made = {
        key: value for each in ("codes", "low_codes") for key, value in features[each].make(image).items()
    }
    assert made["low_codes"].shape == (2, 4, 4)
    assert made["low_codes"].dtype == torch.uint8
    for kept, lacks in (
        (["codes"], "low_codes"),
        (["low_codes", "text"], "codes"),
        (["codes", "low_codes"], ""),
    ):
        record = Record(
            {}, {name: made_by(features[name]) for name in kept if name in features}, False, "float32"
        )
        with (
            pytest.raises(DataError, match=f"made of pictures without {lacks}, and")
            if lacks
            else nullcontext()
        ):
            check_same("cache", record, features)
    randomness = Randomness(0, batch.position, torch.float32)
    loss = stage.losses("transformer", batch, randomness)["loss"]
    ahead = stage.losses("transformer", dataclasses.replace(batch, features=made), randomness)["loss"]
    assert torch.equal(loss, ahead)
    loss.backward()
    learns = {name for name, p in stage.named_parameters() if p.grad is not None}
    assert "model.transformer.head.weight" in learns
    assert not [name for name in learns if ".low." in name or ".codec." in name]

    place = saved(stage, tmp_path / "high")
    other = saved(families.get("autoencoder").load_stage("autoencoder")(tiny), tmp_path / "other")
    of_other = saved(build("parti")(at_16_px(other)), tmp_path / "of_other")
    with pytest.raises(
        CheckpointError, match=r"builds_on\.low=.*of_other has another codebook .* has learned"
    ):
        build("ar_sr")(compose_run(*ar_sr, f"builds_on.low={of_other}"), checkpoint.load(Path(place)))
    weights = load_file(place)
    for name, value in load_file(low).items():
        assert torch.equal(weights[name.replace("model.", "model.low.", 1)], value)
    for gone in (codec, low):
        Path(gone).unlink()
    loaded = checkpoint.load(Path(place))
    generator = families.get("autoregressive").load_generator()(loaded, "cpu")
    images = generator.generate(SampleRequest.of_size(PROMPTS, 32))
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()
    for typed in (
        "builds_on.low=elsewhere",
        "++builds_on.low=latest",
    ):  # t2i sample would draw with the same weights
        with pytest.raises(ConfigError, match=r"builds_on.low is .*; allowed: .*low, the run whose weights"):
            load_to_draw(Path(place), torch.device("cpu"), [typed])
    config = parse_run(loaded.config, Config)
    with pytest.raises(ConfigError, match=r"of stage ar_sr'; allowed: a run of stage ar or parti"):
        low_run(config, place, None)
    onwards = dataclasses.replace(config.model, builds_on=CodesBuildsOn("latest", "latest"))
    again = build("ar_sr")(dataclasses.replace(config, model=onwards), loaded)
    assert again.config.model.builds_on == CodesBuildsOn(codec, low)
