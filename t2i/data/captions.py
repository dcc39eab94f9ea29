"""The captions of a sample: where they are found and which one a batch gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from t2i.data.decode import BadSample


def parse_metadata(members: Mapping[str, bytes], key: str) -> dict[str, Any]:
    """The sample's JSON, {} where it has none. Raises BadSample("json") unless it is an object in UTF-8."""
    if "json" not in members:
        return {}
    try:
        metadata = json.loads(members["json"].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadSample("json", key, str(error)) from error
    if not isinstance(metadata, dict):
        raise BadSample("json", key, f"a {type(metadata).__name__} where an object was expected")
    return metadata


def parse_captions(
    members: Mapping[str, bytes], metadata: Mapping[str, Any], caption_keys: Sequence[str], key: str
) -> list[str]:
    """All captions under the first of `caption_keys` ("txt", or "json:<field>" for a string or a list of
    strings) that has any; surrounding white space is cut off. Raises BadSample("caption") where there is no
    caption but an empty one, or where the one found is not text in UTF-8."""
    for caption_key in caption_keys:
        if caption_key == "txt":
            try:
                found: Any = members.get("txt", b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadSample("caption", key, str(error)) from error
        else:
            found = metadata.get(caption_key.removeprefix("json:"))
        options = found if isinstance(found, list) else [found]
        if not all(option is None or isinstance(option, str) for option in options):
            raise BadSample("caption", key, f"{caption_key} is neither text nor a list of texts")
        captions = [text for option in options if (text := (option or "").strip())]
        if captions:
            return captions
    raise BadSample("caption", key, f"none under {', '.join(caption_keys)}")


def choose_caption(captions: Sequence[str], choice: float, chance: float, dropout: float) -> str:
    """One of `captions` by `choice`, or "" where `chance` < `dropout`; both numbers uniform in [0, 1), pure
    in (seed, epoch, sample), so that a run drops the same captions however it is spread or resumed."""
    return "" if chance < dropout else captions[int(choice * len(captions))]
