"""The report end to end on drawn scenes and made-up runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_configs import NEEDED
from html_pages import Tags, assert_stands_alone, embedded_png
from PIL import Image

from t2i.errors import DataError
from t2i.evaluation.prompts import group_of
from t2i.evaluation.report import Families, plot_metrics, psnr_db, write_report
from t2i.evaluation.runs import LEFT_OUT, Origin, Run
from t2i.training.run_folder import write_config, write_summary

# PSNR.


def test_psnr_is_a_mean_over_pictures():
    image = torch.zeros(2, 3, 4, 4)
    offsets = torch.tensor([0.2, 0.02])[:, None, None, None]
    # peak 2: 20 log10(2 / 0.2) = 20 and 20 log10(2 / 0.02) = 40
    assert psnr_db(image, image + offsets) == pytest.approx(30.0, abs=1e-4)


def test_psnr_clamps_what_was_decoded():
    image = torch.ones(1, 3, 4, 4)
    decoded = torch.full((1, 3, 4, 4), 9.0)
    decoded[:, :, :2] = 0.8
    assert psnr_db(image, decoded) == pytest.approx(20 + 10 * np.log10(2), abs=1e-4)


def test_psnr_of_noise():
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(4, 3, 128, 128)
    noise = 0.05 * torch.randn(image.shape, generator=generator)
    assert psnr_db(image, noise) == pytest.approx(10 * np.log10(4 / 0.05**2), abs=0.05)


def test_psnr_of_equal_pictures_is_finite():
    image = torch.zeros(1, 3, 2, 2)
    assert np.isfinite(psnr_db(image, image))


# The report.


def made_up_run(folder: Path, stage: str, size_px: int, shards: Path, seconds: float | None) -> Path:
    """A run folder with what the report reads. seconds None: it was killed before it could write anything."""
    folder.mkdir(parents=True)
    data = NEEDED | {
        "source": "shapes",
        "shards": [str(shards / "train" / "00000.tar")],
        "heldout_shards": [str(shards / "heldout" / "00000.tar")],
    }
    write_config(folder, {"stage": stage, "data": data, "resolution": {"size_px": size_px}})
    if seconds is not None:
        write_summary(folder, complete=True, images_seen=640, seconds=seconds)
        with (folder / "metrics.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "images", "loss", "l1", "discriminator"])
            rows.writerows([[10, 320, 1.0, 0.5, ""], [20, 640, 0.7, 0.3, 2.0]])
    return folder


class Fakes:
    """A codec that is 0.1 off, and a generator that draws the real picture for the first `right` prompts of
    each group and a gray nothing for the others."""

    def __init__(self, right: dict[str, int]) -> None:
        self.right = right
        self.prompts: dict[str, list[str]] = {}

    def families(self) -> Families:
        return Families(self.draw, self.reconstruct, self.num_parameters, self.commands)

    def reconstruct(self, folder: Path, images: torch.Tensor) -> torch.Tensor:
        assert folder.parent.name == "autoencoder"
        return images - 0.1 * images.sign()  # towards 0, so that nothing is clamped

    def draw(self, folder: Path, prompts: list[str]) -> torch.Tensor:
        (run,) = Run.read_all([folder])
        self.prompts[run.label] = prompts
        real = run.heldout(run.size_px)
        images, left = torch.zeros_like(real.image), dict(self.right)
        for i, sample in enumerate(real.metadata):
            group = group_of(sample)
            left[group] -= 1
            if left[group] >= 0:
                images[i] = real.image[i]
        return images

    def num_parameters(self, folder: Path) -> int:
        return {"autoencoder": 1_000, "ldm": 20_000}.get(folder.parent.name, 300_000)

    def commands(self, origin: Origin, prompt: str) -> list[str]:
        return [f"draw {prompt!r} with {origin.folder}"]


def written(folder: Path, origins: list[Origin], fakes: Fakes) -> tuple[Tags, dict]:
    path = write_report(folder, origins, fakes.families())
    return Tags(path), json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def report(shapes_shards, tmp_path_factory) -> tuple[Path, dict, Fakes]:
    runs = tmp_path_factory.mktemp("runs")
    fakes = Fakes({"unseen": 6, "unseen_two_objects": 1})
    codec = made_up_run(runs / "autoencoder" / "a", "autoencoder", 64, shapes_shards, 12.5)
    first = Origin(made_up_run(runs / "ldm" / "first <32>", "ldm", 32, shapes_shards, 100.0), codec=codec)
    second = made_up_run(runs / "ldm" / "second", "ldm", 64, shapes_shards, 50.0)
    path = write_report(runs / "demo", [Origin(second, first, codec)], fakes.families())
    return path, json.loads((path.parent / "report.json").read_text()), fakes


def test_figures(report):
    _, figures, _ = report
    assert figures["unseen_exact"] == 6 / 8
    assert figures["unseen_two_objects_exact"] == 1 / 4
    assert figures["unseen_exact_by_run"] == {"ldm-32": 6 / 8, "ldm-64": 6 / 8}
    assert set(figures["unseen_by_attribute"]) == {
        "count",
        "background",
        "shape",
        "colour",
        "size",
        "position",
    }
    assert set(figures["unseen_two_objects_by_attribute"]) == {
        *("count", "background", "shape", "colour", "size", "relation")
    }
    for name in ("count", "shape", "colour", "size", "position"):
        assert figures["unseen_by_attribute"][name] == 6 / 8
    assert figures["unseen_two_objects_by_attribute"]["relation"] == 1 / 4
    assert figures["psnr_db"] == pytest.approx(10 * np.log10(4 / 0.01), abs=0.02)
    seconds = figures["seconds"]
    assert seconds.pop("report") > 0
    assert seconds == {"autoencoder-64": 12.5, "ldm-32": 100.0, "ldm-64": 50.0}


def test_every_heldout_prompt_is_drawn(report):
    _, _, fakes = report
    assert {label: len(prompts) for label, prompts in fakes.prompts.items()} == {"ldm-32": 12, "ldm-64": 12}


def test_the_page_stands_alone(report):
    path, figures, _ = report
    assert path.name == "report.html"
    assert_stands_alone(path)
    read = Tags(path)
    names = [
        "data",
        "reconstructions_autoencoder-64",
        "samples_ldm-32",
        "samples_ldm-64",
        "loss_autoencoder-64",
        "loss_ldm-32",
        "loss_ldm-64",
    ]
    assert [embedded_png(image) for image in read.images] == [
        (path.parent / f"{name}.png").read_bytes() for name in names
    ]
    text = " ".join(read.text)
    assert f"{figures['psnr_db']} dB" in text
    assert "75.0%" in text
    assert "25.0%" in text
    assert "first <32>" in text  # escaped in the file, read back by the parser


def test_reconstructions_stand_below_their_pictures(report, shapes_shards):
    """Rows of 8 pictures of 64 px, gaps of 2 px, all enlarged twice: 8 pictures above their own."""
    path, _, _ = report
    sheet = Image.open(path.parent / "reconstructions_autoencoder-64.png")
    assert sheet.width == 2 * (8 * 64 + 7 * 2)
    centre = 2 * 32
    above = np.asarray(sheet.crop((0, 0, centre, centre)), dtype=float)
    below = np.asarray(sheet.crop((0, 2 * 66, centre, 2 * 66 + centre)), dtype=float)
    assert np.abs(np.abs(above - below) - 0.1 * 127.5).max() <= 1.5


def test_a_ladder_has_its_bounds_parameters_and_times_in_all(report):
    path, figures, _ = report
    assert list(figures["codecs"]) == ["autoencoder-64"]
    assert figures["codecs"]["autoencoder-64"]["psnr_db"] == figures["psnr_db"]
    assert figures["psnr_db_by_codec"] == {"autoencoder-64": figures["psnr_db"]}
    assert list(figures["runs"]) == ["ldm-32", "ldm-64"]
    first, second = figures["runs"].values()
    assert (second["stage"], second["size_px"], Path(second["folder"]).name) == ("ldm", 64, "second")
    assert (second["parameters"], second["parameters_in_all"]) == (20_000, 21_000)
    assert (first["seconds_in_all"], second["seconds_in_all"]) == (112.5, 162.5)
    assert first["prompts"] == second["prompts"]
    group = second["groups"]["unseen"]
    assert (group["count"], group["exact"]) == (8, 6 / 8)
    assert group["by_attribute"] == figures["unseen_by_attribute"]
    assert group["real"]["exact"] == 1.0
    assert group["chance"]["exact"] < 0.3
    assert group["chance"].keys() == group["real"].keys() == {"exact", "by_attribute"}
    assert 0.2 < group["chance"]["by_attribute"]["count"] < 1.0  # 7 of the 11 others have one object
    headings = Tags(path).of("h2")
    assert [text for text in headings if " px" in text] == [
        *("autoencoder at 64 px", "ldm at 32 px", "ldm at 64 px")
    ]


def test_what_reconstructions_still_show_is_counted(shapes_shards, tmp_path):
    """Two of the eight pictures with one object come back white."""

    class Forgets(Fakes):
        def reconstruct(self, folder: Path, images: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.ones_like(images[:2]), images[2:]])

    codec = made_up_run(tmp_path / "autoencoder" / "a", "autoencoder", 32, shapes_shards, 1.0)
    latents = Origin(made_up_run(tmp_path / "ldm" / "b", "ldm", 32, shapes_shards, 2.0), codec=codec)
    read, figures = written(tmp_path / "demo", [latents], Forgets({"unseen": 8, "unseen_two_objects": 4}))
    assert figures["codecs"]["autoencoder-32"]["exact"] == {"unseen": 6 / 8, "unseen_two_objects": 1.0}
    assert "75.0% of 8 still show exactly what their captions say." in " ".join(read.text)


def test_stages_stand_side_by_side(shapes_shards, tmp_path):
    """One that builds on a codec and one that does not, and as the last one that was asked for the first."""
    fakes = Fakes({"unseen": 8, "unseen_two_objects": 4})
    codec = made_up_run(tmp_path / "autoencoder" / "a", "autoencoder", 32, shapes_shards, 1.0)
    latents = Origin(made_up_run(tmp_path / "ldm" / "b", "ldm", 32, shapes_shards, 2.0), codec=codec)
    pixels = Origin(made_up_run(tmp_path / "pixels" / "c", "pixels", 32, shapes_shards, 4.0))
    read, figures = written(tmp_path / "demo", [pixels, latents], fakes)
    assert list(figures["runs"]) == ["pixels-32", "ldm-32"]
    assert figures["unseen_exact_by_run"] == {"pixels-32": 1.0, "ldm-32": 1.0}
    _, other = written(tmp_path / "other", [latents, pixels], fakes)  # the last one has no codec
    assert "psnr_db" not in other
    assert other["psnr_db_by_codec"] == figures["psnr_db_by_codec"] == {"autoencoder-32": figures["psnr_db"]}
    assert [run["parameters_in_all"] for run in figures["runs"].values()] == [300_000, 21_000]
    assert [run["seconds_in_all"] for run in figures["runs"].values()] == [4.0, 3.0]
    text = " ".join(read.text)
    assert "300,000" in text
    assert "not judged by the same" not in text
    cells = read.of("th")
    assert cells[-4:] == ["pixels-32", "ldm-32", "chance", "real pictures"]
    assert f"with {pixels.folder}" in text
    assert f"with {latents.folder}" in text


def test_the_run_at_a_lower_resolution_counts_with_the_one_that_it_gives_codes_to(shapes_shards, tmp_path):
    """It is shown too, once, also where the run goes on from one that it gives codes to."""
    fakes = Fakes({"unseen": 8, "unseen_two_objects": 4})
    codecs = [
        made_up_run(tmp_path / "autoencoder" / name, "autoencoder", 32, shapes_shards, 1.0) for name in "ab"
    ]
    low = Origin(made_up_run(tmp_path / "masked" / "c", "masked", 32, shapes_shards, 2.0), codec=codecs[0])
    folders = [
        made_up_run(tmp_path / "masked_sr" / name, "masked_sr", size, shapes_shards, 4.0)
        for name, size in (("d", 48), ("e", 64))
    ]
    first = Origin(folders[0], codec=codecs[1], low=low)
    _, figures = written(tmp_path / "demo", [Origin(folders[1], first, codecs[1], low=low)], fakes)
    assert list(figures["psnr_db_by_codec"]) == ["autoencoder-32-a", "autoencoder-32-b"]
    runs = figures["runs"]
    assert list(runs) == ["masked-32", "masked_sr-48", "masked_sr-64"]
    assert [run["parameters"] for run in runs.values()] == [300_000] * 3
    assert [run["parameters_in_all"] for run in runs.values()] == [301_000, 602_000, 602_000]
    assert [run["seconds_in_all"] for run in runs.values()] == [3.0, 8.0, 12.0]


def test_a_family_without_a_codec_has_no_section_of_one(shapes_shards, tmp_path):
    pixels = Origin(made_up_run(tmp_path / "pixels" / "c", "pixels", 32, shapes_shards, 4.0))
    read, figures = written(tmp_path / "demo", [pixels], Fakes({"unseen": 0, "unseen_two_objects": 0}))
    assert "psnr_db" not in figures
    assert figures["codecs"] == {}
    assert read.of("h2") == ["The data", "pixels at 32 px", "Side by side", "Training", "Times", "To go on"]
    assert not (tmp_path / "demo" / "reconstructions.png").exists()
    assert figures["unseen_exact"] == 0.0


def test_what_is_said_of_one_run_is_said_of_the_last_that_was_asked_for(shapes_shards, tmp_path):
    """Though the first one continues it, so that it stands before that on the page."""
    low = Origin(made_up_run(tmp_path / "ldm" / "low", "ldm", 32, shapes_shards, 1.0))
    high = Origin(made_up_run(tmp_path / "ldm" / "high", "ldm", 64, shapes_shards, 1.0), low)
    fakes = Fakes({"unseen": 8, "unseen_two_objects": 4})
    draw = fakes.draw
    fakes.draw = lambda folder, prompts: draw(folder, prompts) * (folder.name == "high")  # type: ignore[method-assign]
    _, figures = written(tmp_path / "demo", [high, low], fakes)
    assert figures["unseen_exact_by_run"] == {"ldm-32": 0.0, "ldm-64": 1.0}
    assert figures["unseen_exact"] == 0.0
    _, figures = written(tmp_path / "demo", [low, high], fakes)
    assert list(figures["unseen_exact_by_run"]) == ["ldm-32", "ldm-64"]
    assert figures["unseen_exact"] == 1.0


def test_runs_that_were_judged_by_other_prompts_are_said_not_to_compare(shapes_shards, tmp_path):
    from t2i_pipelines.sources import shapes

    shapes.build(tmp_path / "others", num_train=4, num_heldout_one=3, num_heldout_two=0, size_px=32, seed=1)
    fakes = Fakes({"unseen": 8, "unseen_two_objects": 4})
    origins = [
        Origin(made_up_run(tmp_path / stage / "a", stage, 32, shards, 1.0))
        for stage, shards in (("pixels", shapes_shards), ("gan", tmp_path / "others"))
    ]
    read, figures = written(tmp_path / "demo", origins, fakes)
    assert "not judged by the same held-out prompts" in " ".join(read.text)
    assert read.of("th")[-2:] == ["pixels-32", "gan-32"]  # no bounds that hold for both
    assert figures["runs"]["gan-32"]["groups"].keys() == {"unseen"}
    assert "unseen_two_objects_exact" not in figures  # the last run has no such prompts
    assert figures["unseen_two_objects_exact_by_run"] == {"pixels-32": 1.0}
    assert (tmp_path / "demo" / "data_gan-32.png").is_file()


def test_what_a_report_leaves_out_is_said_and_its_times_are_not_known(shapes_shards, tmp_path):
    run = made_up_run(tmp_path / "ldm" / "b", "ldm", 32, shapes_shards, 2.0)
    read, figures = written(
        tmp_path / "demo",
        [Origin(run, left_out=("gone/away",))],
        Fakes({"unseen": 8, "unseen_two_objects": 4}),
    )
    assert f"It began with or builds on gone/away, {LEFT_OUT}." in read.text
    assert figures["runs"]["ldm-32"]["seconds_in_all"] is None
    assert figures["seconds"]["ldm-32"] == 2.0


def test_a_run_that_was_killed_is_reported_without_its_times(shapes_shards, tmp_path):
    codec = made_up_run(tmp_path / "autoencoder" / "a", "autoencoder", 32, shapes_shards, 1.0)
    run = made_up_run(tmp_path / "ldm" / "b", "ldm", 32, shapes_shards, None)
    fakes = Fakes({"unseen": 8, "unseen_two_objects": 4})
    _, figures = written(tmp_path / "demo", [Origin(run, codec=codec)], fakes)
    assert set(figures["seconds"]) == {"autoencoder-32", "report"}
    assert figures["runs"]["ldm-32"]["seconds"] is figures["runs"]["ldm-32"]["seconds_in_all"] is None
    assert figures["unseen_exact"] == figures["unseen_two_objects_exact"] == 1.0


def test_what_a_stage_measures_is_plotted_by_whatever_name(tmp_path):
    header = "step,images,epoch,epoch_a,denoiser,classifier,logit_real,gradient_norm,gradient_norm_1"
    (tmp_path / "metrics.csv").write_text(
        f"{header},learning_rate,images_per_second,mfu,data_wait,peak_memory_gib,loss_time_0_25,skipped_steps,"
        "bad_no caption\n1,8,0.1,0.1,0.5,,1,9,9,9,9,9,9,9,9,9,9\n2,16,0.2,0.1,0.4,0.3,1,9,9,9,9,9,9,9,9,9,9\n"
    )
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plot_metrics(axes, tmp_path)
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "denoiser": [[8, 0.5], [16, 0.4]],
        "classifier": [[16, 0.3]],
        "logit_real": [[8, 1], [16, 1]],
    }


def test_a_run_without_heldout_shards_is_one_sentence(shapes_shards, tmp_path):
    folder = made_up_run(tmp_path / "autoencoder" / "a", "autoencoder", 32, shapes_shards, 1.0)
    (run,) = Run.read_all([folder])
    run.config["data"]["heldout_shards"] = None
    with pytest.raises(DataError, match=r"data\.heldout_shards"):
        run.heldout(32)


def test_runs_of_one_resolution_are_told_apart_by_their_folders(shapes_shards, tmp_path):
    folders = [
        made_up_run(tmp_path / "ldm" / name, "ldm", size, shapes_shards, 1.0)
        for name, size in (("a", 32), ("b", 64), ("c", 64))
    ]
    assert [run.label for run in Run.read_all(folders)] == ["ldm-32", "ldm-64-b", "ldm-64-c"]
    other = made_up_run(tmp_path / "elsewhere" / "b", "ldm", 64, shapes_shards, 1.0)
    labels = [run.label for run in Run.read_all([*folders, other])]
    assert labels == ["ldm-32", "ldm-64-b-1", "ldm-64-c", "ldm-64-b-2"]
    assert Run.read_all(folders)[1].title == "ldm at 64 px (b)"
