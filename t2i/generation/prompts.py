"""Files of prompts: text, JSON lines and tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i.errors import ConfigError, UserError
from t2i.schema import MAX_NUMBER, check, check_number, is_unicode

MAX_PX = 16_384
MAX_SEED = 2**64 - 1  # of torch.Generator
KEYS = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "num_images": int,
    "height": int,
    "width": int,
    "sampling": dict,
}


@dataclass(frozen=True)
class Line:
    """One prompt, and what is said of it alone; None leaves it to the command line.

    number: of the line in its file, from 1; 0 where there is none
    sampling: of the family's own options, those that are given
    entry: all that the line says
    between: the other end, where the picture lies between two: seed, share of the way, and prompt where it has another
    """

    prompt: str
    number: int = 0
    seed: int | None = None
    num_images: int | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    entry: Mapping[str, Any] = field(default_factory=dict)
    between: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, limit in {"num_images": MAX_NUMBER, "height": MAX_PX, "width": MAX_PX}.items():
            check_number(name, getattr(self, name), limit)
        if self.seed is not None:
            last = MAX_SEED - (self.num_images or 1) + 1
            check(0 <= self.seed <= last, "seed", self.seed, f"0 to {last}")
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            check(is_unicode(value or ""), name, value, "text that UTF-8 can hold")


@dataclass(frozen=True)
class Prompts:
    """What a file holds. broken: why a line cannot be used, by its number; blank: lines without a word"""

    lines: list[Line]
    broken: dict[int, str]
    blank: int


def read_prompts(path: Path, other_keys: bool = False) -> Prompts:
    """One prompt a line; JSON lines with the keys of `KEYS` where the name ends in .jsonl; a table whose column Prompt
    counts where it ends in .tsv. Raises UserError for a file that cannot be read or has no prompt.

    other_keys: whether a JSON line may have more keys, which mean nothing here
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--prompts-file is {str(path)!r}, which cannot be read: {error.strerror}."
        ) from error
    rows = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    header: list[str] = []
    if path.suffix == ".tsv":
        header = _cells(rows[0].decode(errors="replace").rstrip("\r"))
        check("Prompt" in header, f"{path}, line 1,", header, "a row of names with Prompt among them")
        rows[0] = b""
    if rows[-1] == b"":
        del rows[-1]
    is_json = path.suffix in (".jsonl", ".ndjson")
    parse: Callable[[str, int], Line]
    if is_json:
        parse = lambda text, number: _of_json(text, number, other_keys)  # noqa: E731
    elif header:
        parse = lambda text, number: _of_table(text, number, header)  # noqa: E731
    else:
        parse = Line
    lines, broken, blank = [], {}, 0
    for number, row in enumerate(rows, 1):
        if not row.strip():
            blank += not (header and number == 1)
            continue
        try:
            if b"\0" in row:
                raise ConfigError("it holds zero bytes, as text in UTF-16 does; allowed: UTF-8")
            # The first cell of a table may be empty: its tab counts.
            lines.append(parse(row.decode().strip("\r" if header else None), number))
        except UnicodeDecodeError:
            broken[number] = "it is not text in UTF-8"
        except ConfigError as error:
            broken[number] = str(error).removesuffix(".")
    if not lines and not broken:
        raise UserError(f"{path} holds no prompt; allowed: one a line.")
    return Prompts(lines, broken, blank)


def _of_json(text: str, number: int, other_keys: bool) -> Line:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not JSON: {error}") from error
    check(isinstance(entry, dict), "it", text[:40], 'an object such as {"prompt": "a red circle"}')
    check("prompt" in entry, "its keys", sorted(entry)[:10], "prompt among them")
    given = {}
    for name, value in entry.items():
        if name not in KEYS:
            check(other_keys, "a key", name, ", ".join(KEYS))
            continue
        kind = KEYS[name]
        ok = isinstance(value, kind) and not isinstance(value, bool)
        check(ok, name, value, {str: "text", int: "a whole number", dict: "a mapping"}[kind])
        given[name] = value
    return Line(number=number, entry=entry, **given)


def _cells(text: str) -> list[str]:
    """Of a row of a table between tabs, which has no quotation marks that mean anything."""
    return text.split("\t")


def _of_table(text: str, number: int, header: list[str]) -> Line:
    cells = _cells(text)
    check(
        len(cells) <= len(header), "it", f"{len(cells)} cells", f"up to {len(header)}, as the first line has"
    )
    entry = dict(zip(header, cells, strict=False))
    prompt = entry.get("Prompt", "").strip()
    check(bool(prompt), "its prompt", entry.get("Prompt"), "text")
    return Line(prompt, number, entry=entry)
