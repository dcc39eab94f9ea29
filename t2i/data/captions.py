"""The captions of a sample: where they are found and which one a batch gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t2i.data.decode import BadSample
from t2i.data.members import member

MAX_NESTING = 50  # deeper JSON says nothing, and cannot be sent from a reader process


def parse_metadata(members: Mapping[str, bytes], key: str) -> dict[str, Any]:
    """The sample's JSON, {} where it has none (see `t2i.data.members.member`). Raises BadSample("json") unless it is an
    object in UTF-8, nested not deeper than MAX_NESTING."""
    found = member(members, ("json",))
    if found is None:
        return {}
    text = members[found]
    try:
        metadata = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSample("json", key, str(error)) from error
    if not isinstance(metadata, dict):
        raise BadSample("json", key, f"a {type(metadata).__name__} where an object was expected")
    if is_deep(metadata):
        raise BadSample("json", key, f"nested deeper than {MAX_NESTING}")
    return metadata


def is_deep(value: Any) -> bool:
    """Whether JSON is nested deeper than MAX_NESTING."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        if depth > MAX_NESTING:
            return True
        level = [each for of in level for each in (of.values() if isinstance(of, dict) else of)]
    return False


def parse_captions(
    members: Mapping[str, bytes],
    metadata: Mapping[str, Any],
    caption_keys: Sequence[str] | Mapping[str, float],
    key: str,
) -> dict[str, float]:
    """The captions of a sample with their weights; surrounding white space is cut off.

    caption_keys: "txt", or "json:<field>" for a string or a list of strings. Of a sequence, the first that has any
        captions; of a mapping to weights, all that have any. The captions of one key share its weight.
    Raises BadSample("caption") where there is no caption but an empty one, or where one found is not text in UTF-8.
    """
    weights = caption_keys if isinstance(caption_keys, Mapping) else None
    captions: dict[str, float] = {}
    for caption_key in caption_keys:
        found = _captions_under(caption_key, members, metadata, key)
        for caption in found:
            weight = 1.0 if weights is None else weights[caption_key]
            captions[caption] = captions.get(caption, 0.0) + weight / len(found)
        if captions and weights is None:
            break
    if not captions:
        raise BadSample("caption", key, f"none under {', '.join(caption_keys)}")
    return captions


def _captions_under(
    caption_key: str, members: Mapping[str, bytes], metadata: Mapping[str, Any], key: str
) -> list[str]:
    if caption_key == "txt":
        named = member(members, ("txt",))
        try:
            found: Any = "" if named is None else members[named].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample("caption", key, str(error)) from error
    else:
        found = metadata.get(caption_key.removeprefix("json:"))
    options = found if isinstance(found, list) else [found]
    if not all(option is None or isinstance(option, str) for option in options):
        raise BadSample("caption", key, f"{caption_key} is neither text nor a list of texts")
    # A byte order mark also comes from tables that were joined or saved with one.
    found = [text for option in options if (text := (option or "").strip().strip("\ufeff").strip())]
    try:
        "".join(found).encode()  # JSON can spell halves of characters, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise BadSample("caption", key, str(error)) from error
    return found


def choose_caption(captions: Mapping[str, float], choice: float, chance: float, dropout: float) -> str:
    """One of `captions` by its weight and `choice`, or "" where `chance` < `dropout`; both numbers uniform in [0, 1),
    pure in (seed, epoch, sample), so that a run drops the same captions however it is spread or resumed."""
    if chance < dropout:
        return ""
    if len(captions) == 1:
        return next(iter(captions))
    upto = np.cumsum(list(captions.values()))
    return list(captions)[min(int(np.searchsorted(upto, choice * upto[-1], side="right")), len(captions) - 1)]
