"""What `t2i train` composes, and the embedded data behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module

from t2i_cli import embedded
from t2i_cli.composition import checked, composed_run, quoted, sentence
from t2i_cli.generators import with_overrides
from t2i_cli.train import typed_run


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("resolution=64", "resolution='64'"),
        ("resolution=32,64", "resolution='32','64'"),
        ("resolution='64'", "resolution='64'"),
        ("resolution=mine", "resolution=mine"),
        ("resolution.size_px=64", "resolution.size_px=64"),
        ("trainer.batch_size=64", "trainer.batch_size=64"),
        ("--multirun", "--multirun"),
        ("data.shards=../a/{00000..00004}.tar", "data.shards='../a/{00000..00004}.tar'"),
        ("data.heldout_shards=a/{0,3}.tar", "data.heldout_shards='a/{0,3}.tar'"),
        ("data.shards='a/{0..3}.tar'", "data.shards='a/{0..3}.tar'"),
        ("data.shards=[a.tar,b.tar]", "data.shards=[a.tar,b.tar]"),
        ("data.shards=a.tar", "data.shards=a.tar"),
        ("--config-dir=it's", "--config-dir=it's"),
        ("trainer.batch_size=[1", "trainer.batch_size=[1"),
        ("~data", "~data"),
    ],
)
def test_arguments_that_hydra_would_misread_are_quoted(typed, meant):
    assert quoted(typed) == meant


def test_a_pattern_of_shards_composes_as_typed():
    argument = quoted("data.shards=../a/{00000..00004}.tar")
    with initialize_config_module("t2i_conf", version_base="1.3"):
        composed = compose("train", ["stage=autoencoder", "data=shards", argument])
    assert composed.data.shards == "../a/{00000..00004}.tar"


AS_TYPED = [
    *(
        "it's",
        "'tis",
        "a=b",
        "a (1)",
        "a(1)",
        "x#1",
        "a b",
        "\u00e4/\u732b.tar",
        "[b] c/x.tar",
        "{0,3}.tar",
        "a\\'b",
    ),
    *(
        'say "x"',
        "s3://b/k?x=1&y=2",
        "*?|~!;<>`",
        "Smith, John",
        "100%",
        "a: b",
        "null=",
        "a\\",
        "-x",
        "x@y:z",
    ),
]


@pytest.mark.parametrize("value", AS_TYPED)
def test_names_and_paths_compose_as_typed(value):
    assert composed_run(["stage=ldm", f"name={value}"])["name"] == value
    if not set("[],\\") & set(value):  # those mean something in a list
        shards = composed_run(["stage=ldm", "data=shards", f"data.shards=[{value},b.tar]"])["data"]["shards"]
        assert shards == [value, "b.tar"]


@pytest.mark.parametrize("value", AS_TYPED)
def test_names_and_paths_reach_every_entry_point(t2i, monkeypatch, value):
    """train, and what plan and data encode call; a folder of configuration may have such a name too."""
    own = Path("mine", value.replace("/", "_")) / "experiment"
    own.mkdir(parents=True)
    (own / "tiny.yaml").write_text("# @package _global_\nseed: 17\n")
    seen = []
    monkeypatch.setattr(
        "t2i_cli.train.train", lambda composed, cluster: seen.append((composed["name"], composed["seed"]))
    )
    typed = ["stage=ldm", "experiment=tiny", f"name={value}"]
    assert t2i("train", f"--config-dir={own.parent}", *typed).err == ""
    assert seen == [(value, 17)]
    composed = composed_run(typed, str(own.parent))
    assert (composed["name"], composed["seed"]) == (value, 17)


@pytest.mark.parametrize("value", AS_TYPED)
def test_sample_reads_them_as_train_does(value):
    changed = with_overrides({"text": {"model": None, "depth": 2}}, [f"text.model={value}", "text.depth=3"])
    assert changed == {"text": {"model": value, "depth": 3}}


def test_what_is_written_for_hydra_is_left_to_hydra():
    typed = ["name=${stage}", "ema={half_life_images: 5, rampup_ratio: null}", "seed=7", "init_from=null"]
    composed = composed_run(["stage=ldm", *typed, "data.horizontal_flip=TRUE", "runs_dir='a b'"])
    assert (composed["name"], composed["seed"], composed["runs_dir"]) == (composed["stage"], 7, "a b")
    assert composed["ema"]["half_life_images"] == 5
    assert composed["data"]["horizontal_flip"] is True
    assert composed["init_from"] is None


def test_multirun_takes_each_of_several_names(t2i, monkeypatch):
    seen = []
    monkeypatch.setattr("t2i_cli.train.train", lambda composed, cluster: seen.append(composed["name"]))
    assert t2i("train", "stage=ldm", "name=it's,{0,1}.tar,b c", "-m").code == 0
    assert seen == ["it's", "{0,1}.tar", "b c"]


@pytest.mark.parametrize("value", ["20241126", "1e3", "true", "nan"])
def test_names_may_look_like_numbers(t2i, monkeypatch, value):
    composed = composed_run(
        ["stage=ldm", *(f"{key}={value}" for key in ("name", "runs_dir", "builds_on.codec"))]
    )
    assert [composed["name"], composed["runs_dir"], composed["builds_on"]["codec"]] == [value] * 3
    assert composed_run(["stage=ldm", "seed=5"])["seed"] == 5
    seen = []
    monkeypatch.setattr("t2i_cli.train.train", lambda composed, cluster: seen.append(composed["name"]))
    assert t2i("train", "stage=ldm", f"name={value},b c,null", "-m").code == 0
    assert seen == [value, "b c", None]


def test_flags_may_stand_between_key_and_value_pairs(t2i, monkeypatch):
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/tiny.yaml").write_text("# @package _global_\nseed: 17\n")
    seen = []
    monkeypatch.setattr(
        "t2i_cli.train.train", lambda composed, cluster: seen.append((composed["name"], composed["seed"]))
    )
    assert t2i("train", "stage=ldm", "--config-dir", "mine", "experiment=tiny", "-m", "name=a,b").err == ""
    assert seen == [("a", 17), ("b", 17)]
    result = t2i("train", "stage=ldm", "--cfg", "job", "seed=3", "-p", "trainer", "trainer.devices=2")
    assert (result.code, yaml.safe_load(result.out)["devices"]) == (0, 2)


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
def test_cfg_job_prints_the_composition(t2i, size):
    result = t2i("train", "stage=ldm", f"resolution={size}", "trainer.devices=2", "--cfg", "job")
    assert (result.code, result.err) == (0, "")
    composed = yaml.safe_load(result.out)
    assert composed["resolution"]["size_px"] == size
    assert (composed["stage"], composed["trainer"]["devices"]) == ("ldm", 2)
    assert list(Path().iterdir()) == []


def test_multirun_takes_each_resolution(t2i, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "t2i_cli.train.train", lambda composed, cluster: seen.append(composed["resolution"]["size_px"])
    )
    assert t2i("train", "stage=ldm", "resolution=32,64", "--multirun").code == 0
    assert seen == [32, 64]
    assert list(Path().rglob("*")) == []


def test_multirun_names_all_that_failed(t2i):
    sentence = t2i("train", "stage=ldm", "data=shapes", "trainer.num_images=0,-1", "seed=0,x", "-m").sentence
    assert sentence.startswith("t2i train: 4 runs failed: trainer.num_images is 0; allowed: 1 or more.; ")
    assert [f"{each}; allowed" in sentence for each in ("num_images is -1", "seed is 'x'")] == [True, True]


def test_a_folder_of_ones_own_experiments(t2i):
    own = Path("mine/experiment/trial")
    own.mkdir(parents=True)
    (own / "tiny.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /resolution: '64'\n  - override /codec: vq\n"
        "name: tiny\ntrainer: {num_images: 8}\n"
    )
    result = t2i("train", "--config-dir=mine", "stage=autoencoder", "experiment=trial/tiny", "--cfg", "job")
    assert (result.code, result.err) == (0, "")
    composed = yaml.safe_load(result.out)
    assert (composed["name"], composed["trainer"]["num_images"]) == ("tiny", 8)  # over the stage's own
    assert (composed["resolution"]["size_px"], composed["codec"]["name"]) == (64, "vq")


def test_the_task_gives_lightning_what_was_typed(t2i, monkeypatch):
    """Lightning starts the processes of the other devices by sys.argv."""
    import sys

    seen = []
    monkeypatch.setattr("t2i_cli.train.train", lambda composed, cluster: seen.append(list(sys.argv)))
    t2i("train", "stage=ldm", "resolution=64")
    assert seen == [["t2i", "train", "stage=ldm", "resolution=64"]]


def test_a_long_message_is_cut_to_a_sentence():
    assert sentence(ValueError("first\n\n second \nthird")) == "first second"
    assert sentence(KeyError()) == "KeyError"


# Embedded data.


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "t2i"


@pytest.fixture
def small_shapes(monkeypatch) -> list[int]:
    """A fast `shapes.build`; the sizes that it was called with."""
    from t2i_pipelines.sources import shapes

    build, sizes = shapes.build, []

    def few(folder, size_px):
        sizes.append(size_px)
        build(folder, num_train=8, num_heldout_one=2, num_heldout_two=2, size_px=size_px)

    monkeypatch.setattr(shapes, "build", few)
    return sizes


def configuration(*overrides: str):
    """The validated configuration of stage=ldm."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("t2i_conf", version_base="1.3"):
        return typed_run(checked(compose("train", ["stage=ldm", *overrides]), overrides))


def test_emoji_that_were_never_made_give_way_to_shapes(cache, small_shapes, capsys):
    config = configuration()
    (line,) = capsys.readouterr().err.splitlines()
    assert "t2i data make emoji" in line
    assert "shapes" in line
    assert config.data.source == "shapes"
    assert [Path(p) for p in config.data.shards] == [cache / "shapes-64" / "train" / "00000.tar"]
    assert [Path(p) for p in config.data.heldout_shards] == [cache / "shapes-64" / "heldout" / "00000.tar"]
    assert all(Path(p).is_file() for p in [*config.data.shards, *config.data.heldout_shards])


def test_embedded_data_is_made_once(cache, small_shapes, capsys):
    first = configuration("data=shapes")
    assert configuration("data=shapes") == first
    assert small_shapes == [64]
    assert capsys.readouterr().err == ""


def test_shapes_are_drawn_as_large_as_they_are_trained_on(cache, small_shapes):
    config = configuration("data=shapes", "resolution='128'")
    assert small_shapes == [128]
    assert "shapes-128" in config.data.shards[0]


def test_emoji_are_taken_where_they_are(cache, small_shapes, capsys):
    for part in ("train", "heldout"):
        (cache / "emoji" / part).mkdir(parents=True)
        (cache / "emoji" / part / "00000.tar").touch()
    config = configuration()
    assert config.data.source == "emoji"
    assert [Path(p) for p in config.data.shards] == [cache / "emoji" / "train" / "00000.tar"]
    assert (small_shapes, capsys.readouterr().err) == ([], "")


def test_shards_of_ones_own_are_left_alone(cache, small_shapes):
    config = configuration("data=shards", "data.shards='own/{00000..00003}.tar'")
    assert config.data.shards == "own/{00000..00003}.tar"
    assert small_shapes == []


def test_an_empty_cache_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert embedded.folder_of("emoji") == Path.home() / ".cache" / "t2i" / "emoji"


def test_data_make_says_where(t2i, small_shapes, tmp_path):
    result = t2i("data", "make", "shapes", "--size-px", "32")
    assert result.code == 0
    assert str(tmp_path / "cache" / "t2i" / "shapes-32") in result.out
    assert small_shapes == [32]


def test_data_too_small_is_one_sentence(t2i):
    assert "16" in t2i("data", "make", "shapes", "--size-px", "16").sentence
