"""`t2i evaluate` as a person types it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from t2i import families
from t2i.config import run_to_dict
from t2i.evaluation import features
from t2i.evaluation.features import Extractor
from t2i.evaluation.prompts import judge_for, score
from t2i.evaluation.runs import Run
from t2i.families.generator import ModelGenerator
from t2i.training.checkpoint import save_final
from t2i_cli.evaluate.sweep import parsed


def folder_of(path: Path, count: int, level: int, side: int = 16) -> Path:
    path.mkdir(parents=True)
    random = np.random.default_rng(level)
    for i in range(count):
        pixels = random.normal(level, 30, (side, side, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{i:03d}.png")
    return path


def test_a_folder_beside_another(t2i, tmp_path):
    drawn, real = folder_of(tmp_path / "drawn", 14, 100), folder_of(tmp_path / "real", 16, 120)
    arguments = ("evaluate", str(drawn), "--reference", str(real), "--rounds", "2", "--out", "figures.json")
    assert "compares 1,280 features, and" in (refused := t2i(*arguments).sentence)
    assert refused.endswith("allowed: 1,280 or more, or --force, which gives the figure nevertheless.")
    done = t2i(*arguments, "--force")
    assert done.code == 0, done
    figures = json.loads(Path("figures.json").read_text())
    first = figures["figures"][0]
    assert (first["name"], first["count"], first["reference"]) == ("FD over EfficientNet", 14, 16)
    assert "EfficientNet-Lite0 of ImageNet, resize clean" in done.out
    assert f"{first['value']:.5g}" in done.out
    again = t2i(*arguments, "--force")  # the reference comes from the cache
    assert again.out == done.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "1"], "--rounds is 1; allowed: 2 or more, or 0 for none."),
        (["--batch-size", "0"], "--batch-size is 0; allowed: 1 or more."),
        (["--resize", "nice"], "--resize is 'nice'; allowed: clean, legacy_pytorch, legacy_tensorflow."),
        (
            ["--features", "vgg"],
            "--features is 'vgg'; allowed: inception=FILE, dinov2=DIR, clip=DIR or efficientnet.",
        ),
        (
            ["--features", "inception=none.pth"],
            "--features inception: none.pth does not exist; allowed: inception=",
        ),
        (["--reference", "nowhere.tar"], "reference.shards names nowhere.tar, which does not exist."),
        (["--reference", "."], ". holds no pictures; allowed: jpg"),
        (["--count", "5"], "--count is 5; allowed: only with a run."),
        (["--seed", "-1"], "--seed is -1; allowed: 0 to"),
        (["--seed", str(2**63)], "--seed is 9223372036854775808; allowed: 0 to 9223372036854775807."),
        (["--reference", ""], "--reference is ''; allowed: a folder of pictures, or shards."),
        (["--resize", "legacy_pytorch"], "--resize is 'legacy_pytorch'; allowed: only with inception."),
        (["--out", "."], "--out is '.'; allowed: a file, no folder."),
        (["--statistics", f"{__file__}/s.st"], "test_evaluate.py is not a folder."),
    ],
)
def test_what_a_person_can_mend_is_one_sentence(t2i, tmp_path, flags, said):
    drawn = folder_of(tmp_path / "drawn", 2, 100)
    arguments = ["evaluate", str(drawn), "--reference", str(drawn), *flags]
    assert said in t2i(*arguments).sentence


@pytest.mark.parametrize("job", [[], ["compare"], ["sweep"]])
def test_an_empty_name_is_not_this_folder(t2i, job):
    """As a shell makes of "$RUN" where there is no RUN."""
    assert "is ''; allowed: " in t2i("evaluate", *job, "").sentence


def test_flags_are_checked_before_torch_is_imported(tmp_path):
    code = (
        "import sys; sys.argv = ['t2i', 'evaluate', '.', '--rounds', '1']; from t2i_cli.main import main\n"
        "try: main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_what_is_left_of_a_reference_has_to_be_enough(t2i, tmp_path, plain_features):
    """Six features."""
    drawn, real = folder_of(tmp_path / "drawn", 6, 100), folder_of(tmp_path / "real", 6, 120)
    (real / "000.png").write_bytes(b"no picture")
    arguments = ("evaluate", str(drawn), "--reference", str(real), "--rounds", "0")
    assert "real, as far as it can be read, has 5 pictures; allowed: 6 or more" in t2i(*arguments).sentence
    assert "Left out of the reference, image: 1" in t2i(*arguments, "--force").out


@pytest.fixture(scope="module")
def runs(compose_run, train, tmp_path_factory) -> dict[str, Path]:
    """One that draws and one that gives pictures back, after two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    names = {"draws": "gan_int_cls/tiny_published", "codec": "autoencoder/tiny_vq"}
    return {
        key: train(compose_run(f"experiment={name}", "trainer.num_images=16", f"runs_dir={folder}")).folder
        for key, name in names.items()
    }


@pytest.fixture
def plain_features(monkeypatch):
    """Means and deviations of the channels in the place of a network's features."""

    def compute(pictures: torch.Tensor) -> torch.Tensor:
        flat = pictures.double().flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], dim=1)

    made = Extractor("plain", "plain features", 6, "clean", "0", "FD", compute)
    monkeypatch.setattr(features, "load", lambda spec, resize, device: made)


def figures_in(file: str) -> dict[str, dict]:
    return {figure["name"]: figure for figure in json.loads(Path(file).read_text())["figures"]}


def test_a_run_draws_the_compositional_suite(t2i, runs, plain_features):
    flags = [
        "--prompts",
        "shapes",
        "--count",
        "13",
        "--reference-count",
        "99",
        "--rounds",
        "0",
        "--out",
        "a.json",
        "--statistics",
        "r.st",
    ]
    done = t2i("evaluate", str(runs["draws"]), *flags)
    assert done.code == 0, done
    found, about = figures_in("a.json"), json.loads(Path("a.json").read_text())
    assert "--reference-count is 99; the reference has 12: all are taken." in done.out
    assert found["exact"]["count"] == found["FD"]["count"] == 13
    assert found["category counts"]["count"] == 3
    assert found["FD"]["reference"] == 12  # the run's held-out ones
    assert found["category binding"]["count"] == 2
    assert about["training_images"] == 16
    assert Path("r.st").is_file()
    assert (
        "--lpips is 'x'; allowed: only with a codec."
        in t2i("evaluate", str(runs["draws"]), "--lpips", "x").sentence
    )
    assert about["parameters"] > 1000
    assert about["seconds_per_picture"] > 0


def test_the_clip_score_of_each_category_of_a_table(t2i, runs, plain_features, monkeypatch):
    made = dataclasses.replace(features.load("plain", "clean", None), clip=SimpleNamespace())
    monkeypatch.setattr(features, "load", lambda spec, resize, device: made)
    scores = torch.tensor([0.1, 0.2, 0.4])
    monkeypatch.setattr(features, "clip_scores", lambda clip, features, texts, device: scores)
    Path("parti.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na man\tPeople\na dog\tAnimals\n")
    done = t2i("evaluate", str(runs["draws"]), "--prompts", "parti.tsv", "--force", "--out", "b.json")
    assert done.code == 0, done
    found = figures_in("b.json")
    of_category = {name: found[f"CLIP score, category {name}"] for name in ("Animals", "People")}
    assert {name: each["count"] for name, each in of_category.items()} == {"Animals": 2, "People": 1}
    assert of_category["Animals"]["value"] == pytest.approx(0.25)
    assert of_category["People"]["value"] == pytest.approx(0.2)
    assert found["CLIP score"]["count"] == 3


def test_a_codec_gives_pictures_back(t2i, runs, plain_features):
    done = t2i("evaluate", str(runs["codec"]), "--rounds", "0", "--out", "a.json")
    assert done.code == 0, done
    found = figures_in("a.json")
    names = {
        "rFD",
        "rKID x 1000",
        "PSNR in dB",
        "SSIM",
        "codebook usage",
        "codebook perplexity",
    }
    assert names < found.keys()
    assert found["exact"]["count"] == found["category unseen"]["count"] + 4  # with two objects
    assert 1 <= found["codebook perplexity"]["value"] <= 64
    for flags in (["--prompts", "shapes"], ["--seed", "3"]):
        said = t2i("evaluate", str(runs["codec"]), *flags).sentence
        assert said.endswith(
            f"{flags[0]} is {flags[1]!r}; allowed: only with a run that draws.".replace("'3'", "3")
        )
    said = t2i("evaluate", str(runs["codec"]), "--lpips", "none.pth").sentence
    assert "LPIPS needs torchvision's VGG16 weights, and none.pth does not exist" in said


def test_how_many_pictures_a_codec_gives_back_exactly_is_what_a_report_says(t2i, compose_run, plain_features):
    """With a codec that is nothing but the PCA of patches, which gives some back so."""
    config = compose_run("experiment=autoencoder/tiny_kl", "backbone.latent_channels=6")
    run = Run(Path("codec"), run_to_dict(config), "")
    heldout = run.heldout(32)
    codec = families.get(config.family).load_codec()(run.config).eval()
    codec.initialise(heldout.image)
    weights = {f"codec.{name}": value for name, value in codec.state_dict().items()}
    save_final(weights, {"config": run.config, "extra": {}}, Path("codec.safetensors"))
    with torch.no_grad():
        decoded = codec.decode(codec.encode(heldout.image))
    answers = judge_for(lambda: heldout, heldout)(decoded, heldout.metadata)
    expected = score(answers)
    assert 0 < expected.exact < 1
    done = t2i("evaluate", "codec.safetensors", "--rounds", "0", "--out", "a.json")
    assert done.code == 0, done
    found = figures_in("a.json")
    assert found["exact"]["value"] == pytest.approx(expected.exact)
    assert found["exact"]["count"] == expected.count == 12
    for name, share in expected.by_attribute.items():
        assert found[f"attribute {name}"]["value"] == pytest.approx(share)


def test_runs_side_by_side(t2i, runs, plain_features):
    run = str(runs["draws"])
    latest = str(runs["draws"].with_name("latest"))  # the same run, which is measured once
    checkpoint = str(next((runs["draws"] / "checkpoints").glob("step_*")))
    done = t2i(
        "evaluate",
        "compare",
        run,
        latest,
        checkpoint,
        "--rounds",
        "0",
        "--published",
        "--count",
        "8",
        "--out",
        "table",
    )
    assert done.code == 0, done
    values = json.loads(Path("table/compare.json").read_text())["runs"]
    assert len(values) == 2
    assert "--count is" not in done.out
    assert (
        "--count is 999; --prompts heldout has 12: all are drawn."
        in t2i("evaluate", run, "--rounds", "0", "--count", "999").out
    )
    assert values[0]["figures"] == values[1]["figures"]  # one protocol
    assert values[0]["prompts_hash"] == values[1]["prompts_hash"]
    assert "| published, 2205.11487 |" in Path("table/compare.md").read_text()


def test_a_sweep_goes_on_where_it_was_stopped_and_is_shared(t2i, runs, plain_features, monkeypatch):
    run, codec = str(runs["draws"]), str(runs["codec"])
    checkpoint = str(next((runs["draws"] / "checkpoints").glob("step_*")))
    arguments = ("evaluate", "sweep", run, checkpoint, "--rounds", "0", "--count", "6")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    first = t2i(*arguments, str(runs["draws"].with_name("latest")))  # a run that is there already
    assert first.code == 0, first
    assert "Still to come from other processes: 1 of 2 points." in first.out
    (point,) = Path("sweep/points").glob("*.json")
    written = point.stat().st_mtime_ns
    monkeypatch.setenv("RANK", "1")
    assert t2i(*arguments).code == 0
    assert len(Path("sweep/sweep.csv").read_text().splitlines()) == 3
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    again = t2i(*arguments)
    assert again.out.count(" is there") == 2
    assert point.stat().st_mtime_ns == written
    assert "draws nothing for prompts; allowed: a run of stage" in t2i("evaluate", "sweep", codec).sentence


@pytest.mark.parametrize("job", ["compare", "sweep"])
def test_what_cannot_be_measured_is_said_and_the_others_are(t2i, runs, plain_features, monkeypatch, job):
    """A run, or a choice of options, whose pictures are not finite."""
    run, draw = str(runs["draws"]), ModelGenerator.generate
    drawn = []

    def broken(self, request, progress=None):
        drawn.append(request)
        return draw(self, request, progress).fill_(float("nan") if len(drawn) == 1 else 0.5)

    monkeypatch.setattr(ModelGenerator, "generate", broken)
    checkpoint = str(next((runs["draws"] / "checkpoints").glob("step_*")))
    words = (run, checkpoint) if job == "compare" else (run, "noise_scale=1,2")
    done = t2i("evaluate", job, *words, "--rounds", "0", "--count", "6", "--out", "table")
    assert f"1 of 2 {'runs' if job == 'compare' else 'points'} are not measured: {run}" in done.sentence
    assert "6 of 6 pictures came out with numbers that are not finite" in done.sentence
    assert len(Path(f"table/{job}.csv").read_text().splitlines()) == 2
    assert "Still to come" not in done.out
    if job == "sweep":  # it goes on with what failed alone
        assert t2i("evaluate", job, *words, "--rounds", "0", "--count", "6", "--out", "table").code == 0
        assert len(drawn) == 3
        assert len(Path("table/sweep.csv").read_text().splitlines()) == 3


def test_a_reason_that_all_points_have_is_said_once(t2i, runs, plain_features):
    done = t2i("evaluate", "sweep", str(runs["draws"]), "noise_scale=1,2", "--count", "5")
    assert "2 of 2 points are not measured: " in done.sentence
    assert "noise_scale=1" in done.sentence
    assert "noise_scale=2" in done.sentence
    assert done.sentence.count("--force") == 1


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("guidance_scale=1,1.0,2,1e0,2.5", ["1", "2", "2.5"]),
        ("sampling.sampler=ddim,euler,ddim", ["ddim", "euler"]),
        ("top_k=null,10", ["null", "10"]),
    ],
)
def test_equal_values_are_one_point(word, values):
    assert [value for _, value in parsed(word)] == values


def test_a_sweep_is_a_job_of_slurm(t2i):
    Path("run").mkdir()
    words = ("evaluate", "sweep", "run", "steps=1,2", "--count", "8", "cluster=a100x64", "launch=slurm")
    outcome = t2i(*words, "--dry-run")
    assert outcome.code == 0, outcome
    assert "#SBATCH --job-name=t2i-sweep\n" in outcome.out
    assert "#SBATCH --array=0-7\n" in outcome.out
    assert "-m t2i_cli.main evaluate sweep run steps=1,2 --count 8 &\n" in outcome.out
    assert "--dry-run is True; allowed: only with launch=slurm" in t2i(*words[:4], "--dry-run").sentence


def test_what_a_sweep_refuses_is_one_sentence(t2i, runs, plain_features, monkeypatch):
    run = str(runs["draws"])
    assert "RUN is 'none'; allowed: a run or a checkpoint" in t2i("evaluate", "sweep", "none").sentence
    assert "sweep is 'steps='; allowed: key=value,value" in t2i("evaluate", "sweep", run, "steps=").sentence
    assert "sampling.wrong is not a known key" in t2i("evaluate", "sweep", run, "wrong=1").sentence
    assert "RUN is None; allowed: at least one run" in t2i("evaluate", "sweep", "steps=1").sentence
    said = t2i("evaluate", "sweep", run, "steps=1", "sampling.steps=2").sentence
    assert said.endswith("sweep is 'steps twice'; allowed: each key once, as steps=value,value.")
    monkeypatch.setattr(
        "t2i_cli.evaluate.sweep.measure_generator", None
    )  # before the first one draws for hours
    said = t2i("evaluate", "sweep", run, "noise_scale=1,often").sentence
    assert f"{run} cannot be drawn with: sampling.noise_scale is 'often'; allowed: a number." in said


def test_a_sweep_measures_again_what_was_edited_under_its_name(t2i, runs, plain_features, tmp_path):
    prompts, real = tmp_path / "prompts.txt", folder_of(tmp_path / "real", 8, 120)
    prompts.write_text("a red circle\na blue square\n")
    flags = ["--prompts", str(prompts), "--reference", str(real), "--rounds", "0", "--force"]

    def is_there() -> bool:
        done = t2i("evaluate", "sweep", str(runs["draws"]), *flags)
        assert done.code == 0, done
        return " is there" in done.out

    assert [is_there(), is_there()] == [False, True]
    prompts.write_text("a red circle\na blue star\n")
    assert [is_there(), is_there()] == [False, True]
    Image.new("RGB", (16, 16)).save(real / "000.png")
    assert [is_there(), is_there()] == [False, True]


def test_a_process_without_a_point_draws_no_curve(t2i, runs, plain_features, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = t2i("evaluate", "sweep", str(runs["draws"]), "--rounds", "0")
    assert done.code == 0, done
    assert "Still to come from other processes: 1 of 1 point." in done.out


@pytest.mark.parametrize("job", ["compare", "sweep"])
def test_what_draws_nothing_is_refused_before_the_first_draws(t2i, runs, plain_features, monkeypatch, job):
    monkeypatch.setattr(f"t2i_cli.evaluate.{job}.measure_generator", None)
    said = t2i("evaluate", job, str(runs["draws"]), str(runs["codec"])).sentence
    assert "draws nothing for prompts; allowed: a run of stage" in said
    Path("taken").touch()
    said = t2i("evaluate", job, str(runs["draws"]), "--out", "taken/table").sentence
    assert "taken is not a folder" in said
