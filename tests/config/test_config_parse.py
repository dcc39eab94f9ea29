"""The one place where a mapping becomes dataclasses: strict, and its own inverse."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import pytest
from data_configs import NEEDED, data_config
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i import families
from t2i.config import (
    RECIPE,
    DataConfig,
    EMAConfig,
    OptimizerConfig,
    ResolutionConfig,
    TextConfig,
    TrainerConfig,
    parse,
    parse_run,
    run_to_dict,
    to_dict,
)
from t2i.errors import ConfigError, UserError
from t2i_cli.composition import composed_run

deterministic = settings(derandomize=True, deadline=None)


@dataclass(frozen=True)
class Circle:
    name: Literal["circle"]
    radius: float


@dataclass(frozen=True)
class Box:
    name: Literal["box"]
    sides: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Drawing:
    width: int
    title: str
    shape: Circle | Box
    scale: float = 1.0
    visible: bool = True
    ink: Literal["red", "blue"] = "red"
    note: str | None = None
    frame: Box | None = None
    places: str | list[str] = "here"
    weights: dict[str, float] = field(default_factory=dict)
    anything: Any = None


GOOD: dict[str, Any] = {"width": 3, "title": "a", "shape": {"name": "circle", "radius": 2}}


def drawing(**changes: Any) -> Drawing:
    return parse(Drawing, GOOD | changes)


def message(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        drawing(**changes)
    return str(caught.value)


def test_what_is_given_and_what_is_default():
    assert drawing() == Drawing(width=3, title="a", shape=Circle("circle", 2.0))
    assert type(drawing().shape.radius) is float  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale", 2),
        ("visible", False),
        ("ink", "blue"),
        ("note", "text"),
        ("note", None),
        ("frame", None),
        ("places", ["a", "b"]),
        ("weights", {"a": 1.5}),
        ("anything", [1, {"x": None}]),
    ],
)
def test_values_are_taken(key, value):
    assert getattr(drawing(**{key: value}), key) == value


def test_nested_and_named():
    assert drawing(shape={"name": "box", "sides": [4, 5, 6]}).shape == Box("box", (4, 5, 6))
    assert drawing(frame={"name": "box"}).frame == Box("box")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widht": 1}, ("widht", "did you mean width?")),
        ({"qqqq": 1}, ("qqqq", "not a known key", "allowed", "title", "width")),
        ({"shape": {"name": "circle", "radius": 1, "radios": 2}}, ("shape.radios", "shape.radius?")),
        ({"width": "3"}, ("width is '3'", "a whole number")),
        ({"width": 3.0}, ("width is 3.0", "a whole number")),
        ({"width": True}, ("width is True", "a whole number")),
        ({"width": None}, ("width is None", "a whole number")),
        ({"scale": "1"}, ("scale is '1'", "a number")),
        ({"scale": True}, ("scale is True", "a number")),
        ({"scale": 10**400}, ("scale is 1000", "a number up to 1e308")),
        ({"title": 5}, ("title is 5", "text")),
        ({"title": None}, ("title is None", "text")),
        ({"visible": 1}, ("visible is 1", "true or false")),
        ({"visible": "yes"}, ("visible is 'yes'", "true or false")),
        ({"ink": "green"}, ("ink is 'green'", "red, blue")),
        ({"ink": None}, ("ink is None", "red, blue")),
        ({"note": 5}, ("note is 5", "text")),
        ({"places": 5}, ("places is 5",)),
        ({"places": ["a", 5]}, ("places[1] is 5", "text")),
        ({"weights": {"a": "b"}}, ("weights.a is 'b'", "a number")),
        ({"weights": [1]}, ("weights is [1]", "a mapping")),
        ({"shape": "circle"}, ("shape is 'circle'", "a mapping")),
        ({"shape": {"name": "star"}}, ("shape.name is 'star'", "circle, box")),
        ({"shape": {"radius": 1}}, ("shape.name is None", "circle, box")),
        ({"shape": {"name": "circle"}}, ("shape.radius is missing",)),
        ({"shape": {"name": "box", "radius": 1}}, ("shape.radius", "not a known key")),
        ({"shape": {"name": "box", "sides": 4}}, ("shape.sides is 4", "a list")),
        ({"shape": {"name": "box", "sides": [4, "5"]}}, ("shape.sides[1] is '5'", "a whole number")),
        ({"frame": {"name": "circle", "radius": 1}}, ("frame",)),
        ({"title": "???"}, ("title is missing",)),
        ({"scale": "???"}, ("scale is missing",)),
    ],
    ids=str,
)
def test_anything_else_is_refused_by_its_full_key(changes, words):
    said = message(**changes)
    for word in words:
        assert word in said
    assert "\n" not in said


@pytest.mark.parametrize(("key", "value"), [("title", "a\0b"), ("note", "\0"), ("places", ["here", "a\0"])])
def test_text_without_nul(key, value):
    """Which no name of a file can have."""
    with pytest.raises(ConfigError, match=rf"^drawing\.{key}(\[1\])? is .*allowed: text without NUL"):
        parse(Drawing, {"width": 1, "title": "a", "shape": {"name": "box"}, key: value}, "drawing.")


@pytest.mark.parametrize("key", ["width", "title", "shape"])
def test_a_key_without_a_default_is_needed(key):
    with pytest.raises(ConfigError, match=f"^{key} is missing"):
        parse(Drawing, {name: value for name, value in GOOD.items() if name != key})


def test_a_prefix_leads_the_key():
    with pytest.raises(ConfigError, match=r"^data\.shards is missing"):
        parse(DataConfig, {"source": None}, "data.")


def test_config_errors_are_a_persons_to_mend():
    assert issubclass(ConfigError, UserError)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@deterministic
@given(
    width=st.integers(),
    title=TEXT.filter(lambda text: text != "???"),
    scale=st.floats(allow_nan=False),
    note=st.none() | TEXT.filter(lambda text: text not in ("", "???")),
    sides=st.lists(st.integers(), max_size=3),
    places=st.lists(TEXT, max_size=3),
    weights=st.dictionaries(TEXT, st.floats(allow_nan=False), max_size=3),
)
def test_parse_undoes_to_dict(width, title, scale, note, sides, places, weights):
    made = Drawing(width, title, Box("box", tuple(sides)), scale, note=note, places=places, weights=weights)
    assert parse(Drawing, to_dict(made)) == made


def test_what_older_runs_say_of_a_frozen_text_encoder_is_read():
    """It had a width, depth and heads that meant nothing; one that learns has them still."""
    older = {"model": None, "weights": None, "max_tokens": 16, "width": 128, "depth": 2, "heads": 4}
    assert parse(TextConfig, older | {"name": "minilm"}) == TextConfig("minilm", max_tokens=16)
    learned = TextConfig("learned", max_tokens=16, width=128, depth=2, heads=4)
    assert parse(TextConfig, older | {"name": "learned"}) == learned
    assert parse(TextConfig, to_dict(learned)) == learned


@pytest.mark.parametrize("key", ["width", "depth", "heads"])
def test_a_text_encoder_that_learns_says_its_shape(key):
    given = {"name": "learned", "max_tokens": 16, "width": 128, "depth": 2, "heads": 4}
    with pytest.raises(ConfigError, match=rf"text\.{key} is None; allowed: 1 or more for learned"):
        TextConfig(**given | {key: None})


# Ranges: for each key, which values are allowed.

RESOLUTION = ResolutionConfig(
    size_px=32,
    min_original_px=0,
    text_dropout=0.1,
)
LEARNED = TextConfig("learned", max_tokens=77, width=8, depth=1, heads=4)
INTEGERS = st.integers(-3, 40)
NUMBERS = st.floats(-2, 2) | st.sampled_from([0.0, 1.0, float("nan")])
RANGES: list[tuple[Any, str, st.SearchStrategy, Any]] = [
    (data_config("shapes", None), "data.shuffle_window_shards", INTEGERS, lambda x: x >= 1),
    (data_config("shapes", None), "data.num_workers", INTEGERS, lambda x: x >= 0),
    (data_config("shapes", None), "data.cache_mib", INTEGERS, lambda x: x >= 0),
    (data_config("shapes", None), "data.max_bad_share", NUMBERS, lambda x: 0 <= x <= 1),
    (LEARNED, "text.max_tokens", INTEGERS, lambda x: x >= 2),
    (LEARNED, "text.depth", INTEGERS, lambda x: x >= 1),
    (LEARNED, "text.width", st.integers(1, 40), lambda x: x % 4 == 0),
    (RESOLUTION, "resolution.size_px", INTEGERS, lambda x: x >= 16),
    (RESOLUTION, "resolution.min_original_px", INTEGERS, lambda x: x >= 0),
    (RESOLUTION, "resolution.text_dropout", NUMBERS, lambda x: 0 <= x <= 1),
    (OptimizerConfig(1e-3, warmup_images=0), "optimizer.learning_rate", NUMBERS, lambda x: x > 0),
    (OptimizerConfig(1e-3, warmup_images=0), "optimizer.weight_decay", NUMBERS, lambda x: x >= 0),
    (OptimizerConfig(1e-3, warmup_images=0), "optimizer.warmup_images", INTEGERS, lambda x: x >= 0),
    (OptimizerConfig(1e-3, warmup_images=0), "optimizer.gradient_clip", NUMBERS, lambda x: x >= 0),
    (
        OptimizerConfig(1e-3, warmup_images=0),
        "optimizer.muon_scale",
        st.none() | NUMBERS,
        lambda x: x is None or x > 0,
    ),
    (
        OptimizerConfig(1e-3, warmup_images=0),
        "optimizer.betas",
        st.lists(NUMBERS, max_size=3).map(tuple),
        lambda x: len(x) == 2 and all(0 <= b < 1 for b in x),
    ),
    (EMAConfig(1, rampup_ratio=0.05), "ema.half_life_images", INTEGERS, lambda x: x >= 1),
    (EMAConfig(1, rampup_ratio=0.05), "ema.rampup_ratio", st.none() | NUMBERS, lambda x: x is None or x > 0),
    *[
        (TrainerConfig(1, 1), f"trainer.{name}", INTEGERS, lambda x: x >= 1)
        for name in (
            "num_images",
            "batch_size",
            "devices",
            "num_nodes",
            "log_every_steps",
            "keep_checkpoints",
        )
    ],
    *[
        (TrainerConfig(1, 1), f"trainer.{name}", INTEGERS, lambda x: x >= 0)
        for name in ("sample_every_images", "checkpoint_every_images")
    ],
]


@pytest.mark.parametrize(("config", "key", "values", "allowed"), RANGES, ids=[row[1] for row in RANGES])
@deterministic
@given(st.data())
def test_ranges(config, key, values, allowed, data):
    value = data.draw(values)
    name = key.partition(".")[2]
    if allowed(value):
        assert getattr(dataclasses.replace(config, **{name: value}), name) == value
    else:
        with pytest.raises(ConfigError, match=f"^{key} is .*; allowed: "):
            dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"source": None, "shards": None}, ("data.shards", "at least one")),
        ({"source": None, "shards": []}, ("data.shards", "at least one")),
        (
            {"source": "shapes", "shards": None, "caption_keys": ["caption"]},
            ("data.caption_keys", "json:<field>"),
        ),
        ({"source": "cifar", "shards": None}, ("data.source", "emoji, shapes")),
        ({"source": "shapes", "shards": None, "crop": "left"}, ("data.crop", "center, random")),
    ],
    ids=str,
)
def test_data(values, words):
    with pytest.raises(ConfigError) as caught:
        parse(DataConfig, NEEDED | values, "data.")
    for word in words:
        assert word in str(caught.value)


# Whole runs.


def composed(*overrides: str) -> dict[str, Any]:
    return composed_run(list(overrides))


RUNS = [
    ("stage=autoencoder",),
    ("stage=autoencoder", "codec=vq", "backbone=ldm_small", "ema=short", "adversarial=none"),
    ("stage=ldm",),
    (
        "stage=ldm",
        "resolution='64'",
        "denoiser=unet_small",
        "schedule=scaled_linear",
        "objective=eps",
        "text=clip",
    ),
    ("stage=ldm", "data=shards", "data.shards=[a.tar,'b/{0..9}.tar']"),
]


@pytest.mark.parametrize("overrides", RUNS, ids=" ".join)
def test_a_run_comes_back_from_its_mapping(overrides):
    values = composed(*overrides)
    config_class = families.get(values["family"]).load_config()
    config = parse_run(values, config_class)
    assert parse_run(run_to_dict(config), config_class) == config
    assert set(run_to_dict(config)) == set(values)


@pytest.mark.parametrize("stage", families.stages_with("generator"))
def test_what_pictures_are_drawn_with_does_not_leave_single_precision(stage):
    values = composed(f"stage={stage}", *([] if not stage.endswith("_sr") else ["builds_on.low=a/run"]))
    config_class = families.get(values["family"]).load_config()
    sampling = parse_run(values, config_class).model.sampling
    only_compared = {"guidance_above", "guidance_below"}
    numbers = {
        name
        for name, hint in get_type_hints(type(sampling)).items()
        if {float, int} & {hint, *get_args(hint)} and name not in only_compared
    }
    assert numbers
    for name in numbers - {"top_k"}:  # at most the number of codes
        with pytest.raises(ConfigError, match=rf"sampling\.{name} is 1.*; allowed: "):
            dataclasses.replace(sampling, **{name: 10**39})


@pytest.mark.parametrize("overrides", RUNS, ids=" ".join)
def test_a_run_comes_back_from_its_folder(overrides, tmp_path):
    from t2i.training.run_folder import read_config, write_config

    values = composed(*overrides) | {"name": "Läufer: 1e-4", "runs_dir": "a {b}, [c] #d", "init_from": "null"}
    values["optimizer"]["weight_decay"] = 1e-30
    config_class = families.get(values["family"]).load_config()
    config = parse_run(values, config_class)
    write_config(tmp_path, run_to_dict(config))
    assert parse_run(read_config(tmp_path), config_class) == config
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    assert f"stage: {config.stage}" in lines
    assert "  size_px: 64" in lines or "  size_px: 32" in lines
    assert not any("!!" in line for line in lines)


def test_a_run_of_an_older_version_is_read():
    """The codec was the key `autoencoder`, and the resolution held its whole recipe."""
    values = composed("stage=ldm")
    config_class = families.get(values["family"]).load_config()
    old = {key: value for key, value in values.items() if key != "builds_on"} | {"autoencoder": "runs/a"}
    assert set(old["resolution"]) == {"size_px", "min_original_px", "text_dropout", *RECIPE}
    config = parse_run(old, config_class)
    assert config.model.builds_on.codec == "runs/a"
    assert run_to_dict(config) == run_to_dict(
        parse_run(values | {"builds_on": {"codec": "runs/a"}}, config_class)
    )
    with pytest.raises(ConfigError, match="autoencoder is not a known key"):
        parse_run(values | {"autoencoder": "runs/a"}, config_class)


def test_config_yaml_may_be_edited_by_hand(tmp_path):
    """1e-4 is a number, as it is in Hydra's files and on the command line."""
    from t2i.training.run_folder import read_config

    (tmp_path / "config.yaml").write_text("optimizer: {learning_rate: 1e-4}\n")
    assert read_config(tmp_path)["optimizer"]["learning_rate"] == 1e-4


@pytest.mark.parametrize("stage", ["autoencoder", "ldm"])
def test_unknown_keys_of_a_run(stage):
    values = composed(f"stage={stage}")
    config_class = families.get(values["family"]).load_config()
    with pytest.raises(
        ConfigError, match=f"trainr is not a known key of stage {stage}; did you mean trainer?"
    ):
        parse_run(values | {"trainr": {}}, config_class)
    with pytest.raises(ConfigError, match=r"qqqq is not .*allowed: .*trainer"):
        parse_run(values | {"qqqq": 1}, config_class)
    del values["seed"]
    with pytest.raises(ConfigError, match="seed is missing"):
        parse_run(values, config_class)
