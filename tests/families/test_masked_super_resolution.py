"""stage=masked_sr: codes at a lower resolution, and those that they are refined to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from grey_codec import GreyCodec
from safetensors.torch import load_file

from t2i import families
from t2i.config import TextConfig, parse_run
from t2i.errors import ConfigError
from t2i.families.builds_on import CodesBuildsOn
from t2i.families.codec_run import low_run
from t2i.families.masked.config import Config, MaskedLowConfig, MuseConfig, SamplingConfig
from t2i.families.masked.model import MaskedModel
from t2i.interfaces import SampleRequest
from t2i.training import checkpoint, run_folder

MUSE = MuseConfig(
    width=32, depth=2, heads=2, positions="rotary", norm="rms", bias=False, qk_norm=True, dropout=0.0
)
SAMPLING = SamplingConfig(
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    guidance_scale=2.0,
    steps=4,
    guidance_schedule="constant",
    choice_temperature=1.0,
    order="confidence",
)
TEXT = TextConfig("learned", max_tokens=8, width=16, depth=1, heads=2)
LOW = Config(CodesBuildsOn("grey"), MUSE, TEXT, SAMPLING, 0.0)
HIGH = dataclasses.replace(LOW, builds_on=CodesBuildsOn("grey", "low"), low=MaskedLowConfig(5, 4, 1))
PROMPTS = ["a red circle", "a blue star"]


def low_model(sampling=SAMPLING):
    torch.manual_seed(0)
    return MaskedModel(dataclasses.replace(LOW, sampling=sampling), GreyCodec(5, 8), 32)


def high_model(config=HIGH, size_px=64, low=None):
    return MaskedModel(config, GreyCodec(7, 8), size_px, low or low_model()).eval()


def asked(**changes):
    return SampleRequest(**({"prompts": PROMPTS, "seeds": [3, 4], "height_px": 64, "width_px": 64} | changes))


def test_codes_at_the_lower_resolution_are_seen_and_drawn_first(float64):
    model = high_model()
    codes, hidden = torch.randint(7, (2, 8, 8)), torch.rand(2, 8, 8) < 0.5
    low, text = torch.randint(5, (2, 4, 4)), model.text(PROMPTS)
    logits = model.logits(codes, hidden, text, low)
    assert logits.shape == (2, 64, 7)
    other = low.clone()
    other[0, 1, 2] = (low[0, 1, 2] + 1) % 5
    changed = model.logits(codes, hidden, text, other)
    assert not torch.allclose(changed[0], logits[0])
    torch.testing.assert_close(changed[1], logits[1])

    drawn = []
    own = model.low.drawn_codes
    model.low.drawn_codes = lambda *given: (drawn.append(own(*given)), drawn[-1])[1]
    seen = []
    predict = model.logits
    model.logits = lambda *given: (seen.append(given[3]), predict(*given))[1]
    reads = []
    model.transformer.low_blocks[0].register_forward_hook(lambda *_: reads.append(1))
    images = model.generate(asked(), SAMPLING)
    assert images.shape == (2, 3, 64, 64)
    assert len(reads) == 1  # for all steps
    assert all(torch.equal(each, torch.cat([drawn[0][0]] * 2)) for each in seen)  # with guidance
    alone = model.generate(asked().rows([1]), SAMPLING)
    assert torch.equal(alone[0], images[1])


def test_a_picture_is_painted_in_at_both_resolutions(float64):
    model = high_model()
    image = model.codec.decode_tokens(torch.randint(7, (2, 8, 8)))
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., 20:41, 8:10] = 1
    hidden = []
    for part in (model.low, model):
        predict = part.logits
        part.logits = lambda *given, predict=predict: (hidden.append(given[1]), predict(*given))[1]
    drawn = model.generate(asked(image=image, mask=mask, strength=1.0), SAMPLING)
    low, high = hidden[0][:2], hidden[SAMPLING.steps][:2]
    assert low[0].nonzero().tolist() == [[1, 0], [2, 0]]
    assert high[0].nonzero().tolist() == [[2, 1], [3, 1], [4, 1], [5, 1]]
    kept = mask.expand_as(drawn) == 0
    assert torch.equal(drawn[kept], image.double()[kept])


def test_what_the_lower_model_cannot_draw_is_said_before_it_draws():
    with pytest.raises(
        ConfigError,
        match="height is 72; allowed: multiples of 16, the pixels of a code at the lower resolution",
    ):
        high_model().check(asked(height_px=72), SAMPLING)
    more_steps = high_model(low=low_model(dataclasses.replace(SAMPLING, steps=5)))
    with pytest.raises(
        ConfigError,
        match=r"lower resolution, which draws first: sampling.steps is 5; allowed: at most 4, the codes",
    ):
        more_steps.check(asked(height_px=32, width_px=32), SAMPLING)


@pytest.mark.parametrize(
    ("low", "size_px", "changes", "sentence"),
    [
        (None, 64, {"num_codes": 6}, "low.num_codes is 6; allowed: 5 with builds_on.low=low"),
        (None, 64, {"side": 3}, "low.side is 3; allowed: 4 with builds_on.low=low"),
        (
            None,
            48,
            {},
            r"resolution.size_px is 48; allowed: sizes whose codes \(6 a side\) are a multiple of 4",
        ),
        (None, 32, {}, r"resolution.size_px is 32; allowed: sizes whose codes \(4 a side\)"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_in_a_sentence(low, size_px, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        high_model(dataclasses.replace(HIGH, low=dataclasses.replace(HIGH.low, **changes)), size_px, low)


def test_what_each_stage_needs_is_said(compose_run):
    with pytest.raises(ConfigError, match=r"builds_on.low is 'run'; allowed: null with stage masked"):
        compose_run("stage=masked", "+builds_on.low=run")
    with pytest.raises(ConfigError, match=r"builds_on.low is None; allowed: a run of stage masked"):
        compose_run("stage=masked_sr", "builds_on.low=null")
    with pytest.raises(
        ConfigError, match=r"transformer.name is 'maskgit'; allowed: muse with stage masked_sr"
    ):
        compose_run("stage=masked_sr", "transformer=maskgit")


def test_both_stages_train_and_draw_from_one_file(compose_run, train, tmp_path):
    """The pictures are those of the run's folder alone, without the runs that it builds on."""
    common = (
        *(
            "resolution.size_px=32",
            "data=shapes",
            "text=learned",
            "text.width=16",
            "text.depth=1",
            "text.heads=2",
        ),
        *("trainer.num_images=16", "trainer.batch_size=8", "trainer.accelerator=cpu", f"runs_dir={tmp_path}"),
    )
    train(compose_run("experiment=autoencoder/tiny_vq", "trainer.num_images=16", f"runs_dir={tmp_path}"))
    small = ("transformer.width=32", "transformer.depth=1", "transformer.heads=2", "sampling.steps=2")
    low = train(compose_run("stage=masked", *common, *small, "resolution.size_px=16", "name=low")).folder
    codec = checkpoint.load(run_folder.weights_file(low)).extra["codec"]
    side = 16 // families.get(codec["family"]).load_codec()(codec).downsampling
    sr = ("low.num_codes=64", f"low.side={side}", "low.depth=1")
    result = train(compose_run("stage=masked_sr", *common, *small, *sr))
    weights = load_file(result.folder / run_folder.FINAL_WEIGHTS)
    for name, value in load_file(low / run_folder.FINAL_WEIGHTS).items():
        assert torch.equal(weights[name.replace("model.", "model.low.", 1)], value)
    assert run_folder.read_config(result.folder)["builds_on"]["low"] == str(low)
    low.rename(tmp_path / "elsewhere")
    loaded = checkpoint.load(run_folder.weights_file(result.folder))
    generator = families.get("masked").load_generator()(loaded, "cpu")
    images = generator.generate(SampleRequest.of_size(PROMPTS, 32))
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()
    config = parse_run(loaded.config, Config)
    with pytest.raises(ConfigError, match=r"of stage masked_sr'; allowed: a run of stage masked"):
        low_run(config, str(result.folder), None)
    resumed = dataclasses.replace(config.model, builds_on=CodesBuildsOn("latest", "latest"))
    stage = families.get("masked").load_stage("masked_sr")
    features = stage(dataclasses.replace(config, model=resumed), loaded).features()
    made = features["low_codes"].make(torch.rand(2, 3, 32, 32) * 2 - 1)["low_codes"]
    assert made.shape == (2, side, side)
    assert made.dtype == torch.uint8
    again = dataclasses.replace(resumed, builds_on=CodesBuildsOn("latest", str(tmp_path / "elsewhere")))
    again = dataclasses.replace(config, model=again)
    stage(again, loaded)
    alone = checkpoint.load(run_folder.weights_file(tmp_path / "elsewhere"))
    with pytest.raises(
        ConfigError, match=r"of stage masked'; allowed: a run with builds_on.low, as this one"
    ):
        stage(again, alone)
