"""`t2i report` on real runs of every family that draws, side by side."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i import families
from t2i.config import parse_run
from t2i.training import run_folder
from t2i_cli.report import draws, is_trained, larger_size, next_commands, origins

EXPERIMENTS = Path(__file__).parents[2] / "conf" / "experiment"
# Those that build on two runs are drawn with in tests/families/test_*_super_resolution.py.
STAGES = [stage for stage in families.stages_with("generator") if not stage.endswith("_sr")]


def tiny(stage: str) -> str:
    """A small experiment of the stage."""
    said = re.compile(rf"override /stage: {stage}$", re.MULTILINE)
    paths = sorted(path for path in EXPERIMENTS.glob("*/tiny_*.yaml") if said.search(path.read_text()))
    return paths[0].relative_to(EXPERIMENTS).with_suffix("").as_posix()


@pytest.fixture(scope="module")
def trained(compose_run, train, tmp_path_factory) -> Path:
    """A folder of runs, with one run of each stage, the last one of which goes on from another."""
    runs_dir = tmp_path_factory.mktemp("trained") / "runs"
    few = [f"runs_dir={runs_dir}", "trainer.num_images=16"]
    for stage in [*families.stages_with("codec"), *STAGES]:
        train(compose_run(f"experiment={tiny(stage)}", *few, "name=a"))
    train(
        compose_run(f"experiment={tiny(STAGES[-1])}", *few, "name=b", f"init_from={runs_dir}/{STAGES[-1]}/a")
    )
    return runs_dir


@pytest.fixture
def runs(trained: Path, t2i: Callable, tmp_path: Path) -> Path:
    """The folder runs/ of the current one. What the runs continue and build on is where they were trained."""
    shutil.copytree(trained, "runs", symlinks=True)
    return Path("runs")


def num_trained(folder: Path) -> int:
    """Of the parameters that an optimizer moves."""
    values = run_folder.read_config(folder)
    record = families.get(values["family"])
    stage = record.load_stage(values["stage"])(parse_run(values, record.load_config()))
    return sum(p.numel() for turn in stage.turns() for group in turn.groups for p in group)


def report(t2i: Callable, *arguments: str) -> tuple[dict, str, str]:
    """report.json, what was printed, and the page."""
    result = t2i("report", "--out", "out", *arguments)
    assert (result.code, result.err) == (0, "")
    return json.loads(Path("out/report.json").read_text()), result.out, Path("out/report.html").read_text()


def test_one_command_compares_all_families(t2i, runs):
    asked = [word for stage in STAGES for word in ("--checkpoint", str(runs / stage / "a"))]
    figures, out, page = report(t2i, *asked)
    labels = [f"{stage}-32" for stage in STAGES]
    assert list(figures["runs"]) == labels
    assert list(figures["unseen_exact_by_run"]) == list(figures["unseen_two_objects_exact_by_run"]) == labels
    table = out[out.index("chance") - 200 :]
    for stage, (label, run) in zip(STAGES, figures["runs"].items(), strict=True):
        assert run["parameters"] == num_trained(runs / stage / "a")
        assert f"{run['parameters']:,}" in table
        assert run["seconds"] == figures["seconds"][label] > 0
        assert run["groups"]["unseen"].keys() == {"count", "exact", "by_attribute", "real", "chance"}
        assert f"<h2>{stage} at 32 px</h2>" in page
        builds_on = "codec" in families.get(run_folder.read_config(runs / stage / "a")["family"]).builds_on
        assert (run["parameters_in_all"] > run["parameters"]) == builds_on
        assert (run["seconds_in_all"] > run["seconds"]) == builds_on
    (codec,) = figures["codecs"].values()
    assert codec["psnr_db"] > 0
    values = run_folder.read_config(Path(codec["folder"]))
    record = families.get(values["family"])
    codec_parameters = record.load_codec()(values).parameters()
    assert codec["parameters"] == sum(parameter.numel() for parameter in codec_parameters)
    assert f"<h2>{codec['stage']} at 32 px</h2>" in page


@pytest.mark.parametrize("stage", STAGES)
def test_a_report_on_one_run(t2i, runs, stage):
    """A section of a codec stands where the family builds on one; what is suggested can be typed."""
    figures, _, page = report(t2i, "--checkpoint", f"{runs}/{stage}/a")
    assert list(figures["runs"]) == [f"{stage}-32"]
    builds_on = "codec" in families.get(run_folder.read_config(runs / stage / "a")["family"]).builds_on
    assert ("psnr_db" in figures) == bool(figures["codecs"]) == builds_on
    assert ("reconstruction" in page) == builds_on
    sample, compare, *rest = commands_on(page)
    assert sample[:4] == ["t2i", "sample", "--checkpoint", f"runs/{stage}/a"]
    assert t2i(*sample[1:], "--num-images", "1").code == 0
    assert compare[:4] == ["t2i", "report", "--checkpoint", f"runs/{stage}/a"]
    assert compare[5] != compare[3]
    assert (Path(compare[5]) / "config.yaml").is_file()
    named = {word for line in rest for word in line if word.startswith("stage=")}
    assert named == {f"stage={stage}", *(f"stage={codec['stage']}" for codec in figures["codecs"].values())}


def commands_on(page: str) -> list[list[str]]:
    import html

    lines = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)[-1].splitlines()
    return [shlex.split(html.unescape(line)) for line in lines]


def test_the_newest_run_is_taken_with_what_it_goes_on_from(t2i, runs):
    """Which is where it was trained, under the same name."""
    figures, out, _ = report(t2i)
    stage = STAGES[-1]
    assert f"Drawing 12 prompts with runs/{stage}/b" in out
    first, last = figures["runs"].values()
    assert Path(last["folder"]) == runs / stage / "b"
    assert Path(first["folder"]).parts[-3:] == ("runs", stage, "a")
    # Each is rounded to a tenth.
    assert last["seconds_in_all"] > first["seconds"] + last["seconds"] - 0.15


def test_one_run_under_several_names_is_one(t2i, runs):
    stage = STAGES[-1]
    assert (runs / stage / "latest").resolve().name == "b"
    names = [f"{runs}/{stage}/{name}" for name in ("latest", "b")]
    figures, _, _ = report(t2i, *(word for name in names for word in ("--checkpoint", name)))
    assert [Path(run["folder"]).name for run in figures["runs"].values()] == ["a", "latest"]


def test_what_is_gone_is_said(t2i, runs):
    stage = STAGES[-1]
    config = runs / stage / "b" / "config.yaml"
    text = re.sub("^init_from: .*$", "init_from: gone/away", config.read_text(), flags=re.MULTILINE)
    config.write_text(text)
    figures, out, page = report(t2i, "--checkpoint", str(config.parent))
    assert f"{config.parent} began with or builds on gone/away, which is left out" in out
    assert "began with or builds on gone/away" in page
    assert list(figures["runs"]) == [f"{stage}-32"]
    assert figures["runs"][f"{stage}-32"]["seconds_in_all"] is None


def test_what_a_run_builds_on_is_not_what_it_trained():
    assert is_trained("model.transformer.low_embedding.weight")
    assert not is_trained("model.codec.decoder.conv_in.weight")
    assert not is_trained("model.low.transformer.head.weight")
    assert not is_trained("model.transformer.embedding.of_vectors.vectors")  # a copy of the codebook


def test_what_the_run_at_a_lower_resolution_trained_draws_with_the_one_that_builds_on_it():
    for name in ("low_embedding.weight", "head.weight"):
        assert draws(f"model.transformer.{name}")
        assert draws(f"model.low.transformer.{name}")
    for name in ("codec.decoder.conv_in.weight", "transformer.embedding.of_vectors.vectors"):
        assert not draws(f"model.low.{name}")


def test_a_run_comes_with_the_one_at_a_lower_resolution(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heldout = {"heldout_shards": ["a.tar"], "source": None}

    def written(place: str, stage: str, family: str, builds_on: dict[str, str]) -> None:
        config = {"stage": stage, "family": family, "builds_on": builds_on, "data": heldout}
        Path(place).mkdir(parents=True)
        run_folder.write_config(Path(place), config | {"resolution": {"size_px": 32}})

    written("codec", "autoencoder", "autoencoder", {})
    written("low", "masked", "masked", {"codec": "codec"})
    written("high", "masked_sr", "masked", {"codec": "codec", "low": "low"})
    (origin,) = origins(["high"])
    assert (origin.codec, origin.low.folder, origin.low.codec) == (Path("codec"), Path("low"), Path("codec"))
    assert [one.folder.name for one in origin.ladder()] == ["low", "high"]
    assert origin.folders() == [Path("codec"), Path("low"), Path("high")]
    assert origin.left_out == ()
    stages = [line.split()[2] for line in next_commands(origin, "a", [origin], "runs") if "shards" in line]
    assert stages == ["stage=autoencoder", "stage=masked", "stage=masked_sr"]
    shutil.rmtree("low")
    (origin,) = origins(["high"])
    assert (origin.low, origin.left_out) == (None, ("low",))


def test_a_larger_size_is_suggested_where_the_stages_recipe_goes_on_at_one(compose_run):
    """And where the run is of that recipe, on data that a command can name."""
    from t2i.config import run_to_dict

    usual = run_to_dict(compose_run("stage=ldm", "resolution='64'"))
    usual["data"]["source"] = "shapes"
    assert larger_size(usual) == 128
    assert larger_size(usual | {"data": usual["data"] | {"source": None}}) is None
    assert larger_size(usual | {"resolution": usual["resolution"] | {"size_px": 48}}) is None
    assert larger_size(usual | {"resolution": usual["resolution"] | {"size_px": 768}}) is None
    assert larger_size(usual | {"stage": "mine"}) is None
    assert larger_size(usual | {"mask_padding": False}) is None
    gan = run_to_dict(compose_run("stage=gan_int_cls", "resolution='64'"))
    gan["data"]["source"] = "shapes"
    assert larger_size(gan) is None
