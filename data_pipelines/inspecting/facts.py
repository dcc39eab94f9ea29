"""What is counted of the samples of shards: sums and histograms that add up, whatever the order."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from t2i.config import TextConfig
from t2i.data.captions import parse_captions, parse_metadata
from t2i.data.decode import BadSample, decode_image, image_bytes, open_image, stored_size
from t2i.data.index import ShardIndex, original_size
from t2i.data.members import PICTURE_ENDINGS, SAMPLE_ENDINGS, UNREAD_ENDINGS, among, member
from t2i.text.tokens import TokenCounter, token_counter

NAMED_PER_CAUSE = 100  # so many samples with a flaw are named; all are counted
MAX_JSON_FIELDS = 64  # of so many fields that hold lists of texts the lengths are counted
MAX_SAMPLE_BYTES = 1 << 30  # four times the largest picture that is decoded: no sample of use is larger
ASPECT_EDGES = (0.25, 0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 4.0)  # width / height between two bars
CAPTION_KEYS = ("txt", "json:caption")
CUT = "caption of more tokens than the text encoder takes"
CAUSES = {
    "image": "picture not decodable",
    "format": "picture of a kind that is not read",
    "bomb": "too many pixels or bytes",
    "aspect": "strip, far longer than wide",
    "json": "JSON not readable",
    "truncated": "cut off at the end of the tar",
    "damaged": "lost next to damaged tar headers",
    "duplicate": "a member's name came before",
    "link": "a link that leads out of the tar",
    "sparse": "a sparse member",
    "unreadable": "not to be read at its place",
}


@dataclass
class Facts:
    """Of some samples; `add` joins two.

    pictures: samples whose picture can be read
    members: by extension
    formats: as the pictures' own headers say, whatever the members are called
    stored_px, original_px: shorter sides of the pictures in the shard, and of their sources by the JSON
    aspects: pictures by the number of ASPECT_EDGES up to their width / height
    characters, words: lengths of each sample's first caption; tokens: the same for the text encoder that was named
    lists: JSON field -> number of texts in it -> samples
    causes: what is wrong -> samples. A sample counts under each of its flaws.
    named: what is wrong -> the first samples that have it
    """

    samples: int = 0
    pictures: int = 0
    members: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    stored_px: Counter[int] = field(default_factory=Counter)
    original_px: Counter[int] = field(default_factory=Counter)
    aspects: Counter[int] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    lists: dict[str, Counter[int]] = field(default_factory=dict)
    causes: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def flaw(self, cause: str, name: str) -> None:
        self.causes[cause] += 1
        names = self.named.setdefault(cause, [])
        if len(names) < NAMED_PER_CAUSE:
            names.append(name)

    def add(self, other: Facts) -> None:
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
        self.samples += other.samples
        self.pictures += other.pictures
        for name, counts in other.lists.items():
            self.count_list(name, counts)
        for cause, names in other.named.items():
            known = self.named.setdefault(cause, [])
            known.extend(names[: NAMED_PER_CAUSE - len(known)])

    def count_list(self, name: str, lengths: Iterable[int] | Counter[int]) -> None:
        if name in self.lists or len(self.lists) < MAX_JSON_FIELDS:
            self.lists.setdefault(name, Counter()).update(lengths)


@dataclass(frozen=True)
class Tile:
    """A sample for the contact sheet. picture: RGB, as large as was asked for or smaller; None: `note` says why"""

    picture: Image.Image | None
    caption: str
    note: str = ""


def look_at(
    path: Path,
    shard: str,
    index: ShardIndex,
    fast: bool,
    chosen: Set[int],
    tile_px: int,
    text: TextConfig | None = None,
) -> tuple[Facts, dict[int, Tile]]:
    """The facts of all rows of `index`, and tiles of those that are chosen. Raises OSError.

    path: of the tar file
    shard: its name in messages
    fast: believe the pictures' headers instead of decoding every picture
    text: the encoder whose tokens are counted
    """
    counter = None if text is None else _counter(text)
    facts, tiles = Facts(), {}
    with path.open("rb") as file:
        for row in range(len(index)):
            tile = _Sample(shard, index, row, facts, counter).look(
                file.fileno(), fast, tile_px if row in chosen else None
            )
            if row in chosen:
                tiles[row] = tile
    return facts, tiles


_counter = lru_cache(maxsize=1)(token_counter)  # once for each process


def read_sample(file: int, index: ShardIndex, row: int) -> dict[str, bytes]:
    """Picture, caption and JSON of one sample. Raises BadSample where the tar file ends before, or for sizes that no
    sample of use has, before memory is asked for."""
    there = [column for column in range(len(index.extensions)) if index.offsets[row, column] >= 0]
    meant = among(tuple(index.extensions[column] for column in there), SAMPLE_ENDINGS)
    wanted = [column for column in there if index.extensions[column] in meant]
    if not wanted:
        return {}
    starts = index.offsets[row, wanted]
    ends = starts + index.sizes[row, wanted]
    if ends.max() > index.file_bytes:
        raise BadSample("truncated", index.keys[row])
    if ends.max() - starts.min() > MAX_SAMPLE_BYTES:
        raise BadSample("bomb", index.keys[row], f"more than {MAX_SAMPLE_BYTES} bytes")
    return index.read(file, row, SAMPLE_ENDINGS)


class _Sample:
    def __init__(
        self, shard: str, index: ShardIndex, row: int, facts: Facts, counter: TokenCounter | None
    ) -> None:
        self.shard, self.index, self.row, self.facts, self.counter = shard, index, row, facts, counter
        self.key = index.keys[row]
        self.there = [e for e, at in zip(index.extensions, index.offsets[row], strict=True) if at >= 0]

    def flaw(self, cause: str, detail: object = "") -> str:
        self.facts.flaw(cause, f"{self.shard}: {detail or self.key}")
        return cause

    def look(self, file: int, fast: bool, tile_px: int | None) -> Tile:
        note = ""
        if self.row in self.index.flaws:
            note = self.flaw(CAUSES[self.index.flaws[self.row]])
        self.facts.members.update(self.there)
        if not self.there:  # it stands in for samples that the tar file lost
            return Tile(None, "", note)
        self.facts.samples += 1
        try:
            members = read_sample(file, self.index, self.row)
        except BadSample as error:
            return Tile(None, "", note or self.flaw(CAUSES[error.cause], error))
        except OSError as error:
            return Tile(None, "", note or self.flaw(CAUSES["unreadable"], error))
        caption = self._caption(members, self._metadata(members))
        if not among(tuple(members), (*PICTURE_ENDINGS, *UNREAD_ENDINGS)):
            return Tile(None, caption, self.flaw("no picture"))
        try:
            picture, note = self._picture(image_bytes(members, self.key), fast, tile_px)
        except BadSample as error:
            return Tile(None, caption, self.flaw(CAUSES[error.cause], error))
        return Tile(picture, caption, note)

    def _metadata(self, members: Mapping[str, bytes]) -> dict[str, Any]:
        try:
            metadata = parse_metadata(members, self.key)
        except BadSample as error:
            self.flaw(CAUSES[error.cause], error)
            return {}
        if source_px := original_size(metadata):
            self.facts.original_px[min(source_px)] += 1
        for name, value in metadata.items():
            if isinstance(value, list) and all(isinstance(each, str) for each in value):
                self.facts.count_list(name, (len(value),))
        return metadata

    def _caption(self, members: Mapping[str, bytes], metadata: Mapping[str, Any]) -> str:
        try:
            caption = next(iter(parse_captions(members, metadata, CAPTION_KEYS, self.key)))
        except BadSample as error:
            if member(members, ("txt",)) is None and metadata.get("caption") is None:
                self.flaw("no caption")
            elif "none under" in str(error):
                self.flaw("empty caption")
            else:
                self.flaw("caption is not text", error)
            return ""
        self.facts.characters[len(caption)] += 1
        self.facts.words[len(caption.split())] += 1
        if self.counter is not None:
            tokens = self.counter.count(caption)
            self.facts.tokens[tokens] += 1
            if tokens > self.counter.max_tokens:
                self.flaw(CUT, f"{self.key} with {tokens}")
        return caption

    def _picture(self, data: bytes, fast: bool, tile_px: int | None) -> tuple[Image.Image | None, str]:
        """Counts it; a thumbnail where `tile_px` asks for one, or why there is none. Raises BadSample."""
        picture = None
        if fast:
            height, width = stored_size(data, self.key)
        else:
            picture, (height, width) = decode_image(data, self.key)
        self.facts.formats[open_image(data).format or "unknown"] += 1
        self.facts.pictures += 1
        self.facts.stored_px[min(height, width)] += 1
        self.facts.aspects[bisect.bisect_right(ASPECT_EDGES, width / height)] += 1
        if tile_px is None:
            return None, ""
        if picture is None:
            try:
                picture, _ = decode_image(data, self.key, (tile_px, tile_px))
            except BadSample as error:  # not counted, so that it is the same whichever samples are shown
                return None, CAUSES[error.cause]
        picture.thumbnail((tile_px, tile_px), Image.Resampling.LANCZOS)
        return picture, ""
