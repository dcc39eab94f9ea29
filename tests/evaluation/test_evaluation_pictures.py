"""Sets of pictures and the statistics of references: what is read, what is kept, what is refused."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from data_configs import data_config
from PIL import Image

from t2i.errors import ConfigError, DataError
from t2i.evaluation import distances, measure, statistics
from t2i.evaluation.distances import Gaussian
from t2i.evaluation.features import Extractor
from t2i.evaluation.measure import check_enough, figures, mean_figure, share_figure
from t2i.evaluation.pictures import folder_files, generated_folder, reference, shards_pictures
from t2i.evaluation.statistics import Statistics, collect, reference_statistics
from t2i.training.pictures import save_png


def extractor(sha256: str = "a") -> Extractor:
    """The mean and the deviation of each channel."""

    def compute(pictures: torch.Tensor) -> torch.Tensor:
        flat = pictures.double().flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], dim=1)

    return Extractor("plain", "plain", 6, "clean", sha256, "FD", compute)


def folder_of(path: Path, count: int, size: tuple[int, int] = (24, 20), level: int = 100) -> Path:
    path.mkdir(parents=True)
    random = np.random.default_rng(level)
    for i in range(count):
        pixels = random.normal(level, 30, (*size, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{i:03d}.png")
    return path


def progress(done: int) -> None:
    pass


def test_a_folder_is_read_as_it_is(tmp_path):
    folder = folder_of(tmp_path / "a", 3)
    (folder / "001.txt").write_text("a red circle\n")
    save_png(torch.zeros(3, 24, 20), folder / "drawn.png", t2i=json.dumps({"prompt": "a star", "seed": 1}))
    pictures = generated_folder(folder)
    items = list(pictures.read())
    assert (
        (pictures.count, pictures.size_px) == (4, (24, 20)) == (len(items), tuple(items[0].picture.shape[1:]))
    )
    assert [item.caption for item in items] == ["", "a red circle", "", "a star"]
    expected = np.asarray(Image.open(folder / "000.png"))
    assert (items[0].picture.permute(1, 2, 0).numpy() == expected).all()


def test_what_lies_beside_drawn_pictures_is_skipped_by_what_it_is_and_counted(tmp_path):
    folder = folder_of(tmp_path / "a", 2)
    save_png(torch.zeros(3, 24, 20), folder / "gridlock.png", t2i=json.dumps({"prompt": "gridlock"}))
    save_png(torch.zeros(3, 24, 90), folder / "strip.png", t2i=json.dumps({"pictures": [{}, {}]}))
    film = [Image.new("RGB", (20, 24), colour) for colour in ("red", "blue")]
    film[0].save(folder / "video.webp", save_all=True, append_images=film[1:])
    folder_of(folder / "inputs", 3, (7, 7))
    pictures = generated_folder(folder)
    assert [item.caption for item in pictures.read()] == ["", "", "gridlock"]
    assert pictures.bad == {"a sheet of several": 1, "animated": 1, "in inputs/": 3}
    assert reference(str(folder), (7, 7), data_config(shards="-")).count == 8  # all, whatever their name
    for name in ("000.png", "001.png", "gridlock.png"):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"a holds no pictures to measure \("):
        generated_folder(folder)


def test_two_pictures_have_figures_and_no_intervals(tmp_path):
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    real = statistics.Statistics(features, Gaussian.of(features), {})
    for count, has_interval in ((2, False), (3, False), (4, True)):
        made = figures(extractor(), features[:count].double(), real, 5)
        assert [figure.interval_95 is not None for figure in made[:2]] == [has_interval] * 2
    with pytest.raises(ConfigError, match="mine has 1 picture; allowed: 2 or more"):
        check_enough(extractor(), 1, "mine", force=True)


def test_what_a_reference_left_out_is_kept_with_its_statistics(tmp_path):
    folder = folder_of(tmp_path / "real", 3)
    (folder / "bad.jpg").write_bytes(b"no picture")
    for _ in range(2):  # computed, then read
        real = reference(str(folder), (24, 20), data_config(shards="-"))
        (found,) = reference_statistics(real, [extractor()], 5, progress, tmp_path / "kept.safetensors")
        assert found.left_out == {"image": 1}


def test_a_reference_is_cut_to_the_others_size_and_counts_what_it_leaves_out(tmp_path):
    folder = folder_of(tmp_path / "real", 3, (60, 30))
    (folder / "bad.jpg").write_bytes(b"no picture")
    real = reference(str(folder), (24, 20), data_config(shards="-"))
    assert [tuple(item.picture.shape) for item in real.read()] == [(3, 24, 20)] * 3
    assert real.bad == {"image": 1}


def test_a_reference_of_the_same_size_is_not_touched(tmp_path):
    folder = folder_of(tmp_path / "real", 2)
    real, plain = reference(str(folder), (24, 20), data_config(shards="-")), generated_folder(folder)
    for one, other in zip(real.read(), plain.read(), strict=True):
        assert (one.picture == other.picture).all()


def test_shards_and_the_folder_that_they_lie_in(shapes_shards):
    shards = str(shapes_shards / "heldout" / "{00000..00000}.tar")
    for place in (shards, str(shapes_shards / "heldout")):
        real = reference(place, (32, 32), data_config(shards="-"))
        items = list(real.read())
        assert real.count == len(items) >= 8
        assert all(item.caption and "scene" in item.metadata for item in items)
    assert reference(shards, (32, 32), data_config(shards="-"), limit=3).count == 3


def test_a_link_that_leads_nowhere_is_counted_or_said(tmp_path):
    folder = folder_of(tmp_path / "a", 2)
    (folder / "gone.png").symlink_to("nothing.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "self").symlink_to(".")
    real = reference(str(folder), (24, 20), data_config("shapes", None))
    assert len(list(real.read())) == 2
    assert real.bad == {"file": 2}
    with pytest.raises(DataError, match=r"gone\.png cannot be read: No such file"):
        generated_folder(folder)


def test_linked_folders_are_read_once(tmp_path):
    folder, other = folder_of(tmp_path / "a", 2), folder_of(tmp_path / "b", 3)
    (other / "up").symlink_to(folder)  # in a circle
    for name in ("first", "second"):
        (folder / name).symlink_to(other)
    found = reference(str(folder), (24, 20), data_config("shapes", None))
    assert (len(list(found.read())), found.bad) == (5, {})
    assert [path.parent.name for path in folder_files(folder)] == 2 * ["a"] + 3 * ["first"]


def test_a_reference_in_shards_needs_no_captions(tmp_path):
    folder = folder_of(tmp_path / "a", 3)
    (folder / "001.txt").write_text("a red circle\n")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    data = data_config(None, str(tmp_path / "a.tar"))
    pictures = reference(str(tmp_path / "a.tar"), (24, 20), data)
    assert [item.caption for item in pictures.read()] == ["", "a red circle", ""]
    heldout = shards_pictures(str(tmp_path / "a.tar"), (24, 20), data)  # whose captions are prompts
    assert [item.caption for item in heldout.read()] == ["a red circle"]
    assert heldout.bad == {"caption": 2}
    assert heldout.fingerprint != pictures.fingerprint


def test_what_cannot_be_measured_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no pictures; allowed: jpg"):
        reference(str(tmp_path / "empty"), (24, 20), data_config(shards="-"))
    mixed = folder_of(tmp_path / "mixed", 2)
    Image.new("RGB", (7, 9)).save(mixed / "x.png")
    with pytest.raises(DataError, match=r"mixed size: 000.png is 20 x 24, x.png 7 x 9 px; allowed: one size"):
        generated_folder(mixed)
    broken = folder_of(tmp_path / "broken", 1)
    (broken / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad.png cannot be read"):
        generated_folder(broken)
    with pytest.raises(
        ConfigError, match="6 features, and mine has 5 pictures; allowed: 6 or more, or --force"
    ):
        check_enough(extractor(), 5, "mine", force=False)
    check_enough(extractor(), 5, "mine", force=True)
    check_enough(extractor(), 6, "mine", force=False)


def test_statistics_are_kept_under_what_decides_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = folder_of(tmp_path / "real", 12)

    def of(sha256: str = "a", size: tuple[int, int] = (24, 20)) -> statistics.Statistics:
        real = reference(str(folder), size, data_config(shards="-"))
        return reference_statistics(real, [extractor(sha256)], 5, progress)[0]

    def kept() -> int:
        return len(list((tmp_path / "cache").rglob("*.safetensors")))

    first = of()
    assert (len(first.features), first.about["count"], kept()) == (12, 12, 1)
    monkeypatch.setattr(statistics, "collect", None)  # is not computed again
    again = of()
    assert (again.features == first.features).all()
    assert (again.gaussian.covariance == first.gaussian.covariance).all()
    assert again.about == first.about
    monkeypatch.setattr(statistics, "collect", collect)
    of("b")
    of("a", (16, 16))
    assert kept() == 3
    Image.new("RGB", (20, 24)).save(folder / "000.png")  # other data
    of()
    assert kept() == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_a_sentence(tmp_path, bad):
    """Not an error of LAPACK, nor a distance that is NaN."""
    pictures = reference(str(folder_of(tmp_path / "real", 8)), (24, 20), data_config(shards="-"))

    def compute(seen: torch.Tensor) -> torch.Tensor:
        features = extractor()(seen)
        features[-1, 2] = bad
        return features

    broken = dataclasses.replace(extractor(), _compute=compute)
    with pytest.raises(
        DataError, match=r"plain gives numbers that are not finite for 2 of 8 pictures of .*real"
    ):
        collect(pictures, [broken], 5, progress)
    with pytest.raises(DataError, match="not finite"):
        reference_statistics(pictures, [broken], 5, progress, tmp_path / "kept.safetensors")
    assert not (tmp_path / "kept.safetensors").exists()
    (whole,) = reference_statistics(pictures, [extractor()], 5, progress, tmp_path / "kept.safetensors")
    whole.gaussian.covariance[1, 1] = bad
    statistics.write(whole, tmp_path / "kept.safetensors")
    with pytest.raises(DataError, match=r"kept.safetensors holds statistics that are not finite; remove it"):
        reference_statistics(pictures, [extractor()], 5, progress, tmp_path / "kept.safetensors")


def test_a_named_file_of_statistics_has_to_be_of_the_same(tmp_path):
    file, folder = tmp_path / "real.safetensors", folder_of(tmp_path / "real", 12)
    real = reference(str(folder), (24, 20), data_config(shards="-"))
    reference_statistics(real, [extractor()], 5, progress, file)
    reference_statistics(real, [extractor()], 5, progress, file)
    with pytest.raises(DataError, match="sha256 'a', asked is 'b'; allowed: another file"):
        reference_statistics(real, [extractor("b")], 5, progress, file)
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read as statistics"):
        reference_statistics(real, [extractor()], 5, progress, file)


def test_every_figure_has_its_counts_and_an_interval(tmp_path):
    drawn, real = folder_of(tmp_path / "a", 30), folder_of(tmp_path / "b", 40, level=110)
    (features,) = collect(generated_folder(drawn), [extractor()], 7, progress)
    (known,) = reference_statistics(
        reference(str(real), (24, 20), data_config(shards="-")),
        [extractor()],
        7,
        progress,
        tmp_path / "x.safetensors",
    )
    made = figures(extractor(), features, known, rounds=6)
    assert [each.name for each in made] == ["FD", "KID x 1000", "precision", "recall", "density", "coverage"]
    for each in made:
        assert (each.count, each.reference) == (30, 40)
        low, high = each.interval_95
        assert low <= each.value <= high
    assert made[0].value == pytest.approx(3 * 10**2, rel=0.2)  # 10 levels apart in each of 3 channels
    assert all(each.interval_95 is None for each in figures(extractor(), features, known, rounds=0))


def test_a_figure_counts_the_pictures_that_it_is_of(monkeypatch):
    """Neighbours are looked for among the first ones only."""
    for module in (distances, measure):
        monkeypatch.setattr(module, "MOST_NEIGHBOURS", 10)
    drawn, real = torch.randn(12, 3), torch.randn(11, 3)
    known = Statistics(real, Gaussian.of(real), {})
    counts = {
        each.name: (each.count, each.reference) for each in figures(extractor(), drawn, known, rounds=0)
    }
    assert counts == {"FD": (12, 11), "KID x 1000": (12, 11)} | dict.fromkeys(
        ("precision", "recall", "density", "coverage"), (10, 10)
    )


def test_the_interval_of_a_mean():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * float(values.std()) / 2
    assert mean_figure("mean", values).interval_95 == pytest.approx((2.5 - half, 2.5 + half))


@pytest.mark.parametrize(("right", "count"), [(0, 20), (20, 20), (7, 25)])
def test_the_interval_of_a_share_is_wilsons(right, count):
    """As scipy has it."""
    expected = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    found = share_figure("share", [True] * right + [False] * (count - right))
    assert found.value == right / count
    assert found.interval_95 == pytest.approx(tuple(expected), abs=1e-6)
