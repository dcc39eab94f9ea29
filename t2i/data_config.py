"""Where captioned shards come from and how a sample is read."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from t2i.schema import check

BUCKETS = "data.bucket_step_px"  # which a stage checks as it does the side of its pictures


def check_caption_keys(keys: list[str] | dict[str, float], name: str) -> None:
    """Raises ConfigError for what is not a place of captions."""
    for key in keys:
        check(key == "txt" or key.startswith("json:"), name, key, "txt, or json:<field>")
    if isinstance(keys, dict):
        for key, weight in keys.items():
            check(0 < weight < math.inf, f"{name}.{key}", weight, "more than 0")


@dataclass(frozen=True)
class MixturePart:
    """One of several datasets. What is null is as `data` says for all.

    weight: its share of the stream, relative to the other parts'
    min_original_px: in place of resolution.min_original_px
    """

    shards: str | list[str]
    weight: float = 1.0
    caption_keys: list[str] | dict[str, float] | None = None
    crop: Literal["center", "random"] | None = None
    horizontal_flip: bool | None = None
    min_original_px: int | None = None
    encoded: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where captioned shards come from and how a sample is read.

    source: "emoji" or "shapes", the embedded sources, or None for shards of one's own
    shards: paths, URLs (s3://, gs://, hf://, http://), `pipe:` commands, with brace expansion, or selections (.arrow),
        of the shards to train on
    mixture: several datasets by name, in the place of `shards`
    heldout_shards: as shards, of samples that no stage may train on (for reconstructions and evaluation)
    caption_keys: where a caption is looked for: "txt", or "json:<field>", a text or a list of texts. A list is tried
        in its order; of a mapping to weights, one that is there is drawn
    crop: where the square (or rectangle) is cut from the resized picture
    horizontal_flip: mirror half of the pictures
    shuffle_window_shards: how many shards are open and mixed at a time; a multiple of the number of processes lets each
        process read shards of its own
    bucket_step_px: null cuts squares; a number makes batches of one aspect ratio each, of about the same area, with
        sides that are multiples of it
    max_aspect: longest side of a bucket relative to the shorter one
    encoded: folder of latents and text features that `t2i data encode` made of the shards
    num_workers: reader processes; 0 reads in the training process
    cache_mib: decoded pictures are kept in memory, per process, up to this size
    shard_cache_gib: copies of remote shards are kept on disk up to this size
    deadline_s: seconds for any one read or request
    max_bad_share: above this share of bad samples the run stops
    """

    source: Literal["emoji", "shapes"] | None
    shards: str | list[str] | None
    heldout_shards: str | list[str] | None = None
    mixture: dict[str, MixturePart] = field(default_factory=dict)
    caption_keys: list[str] | dict[str, float] = field(kw_only=True)
    crop: Literal["center", "random"] = "center"
    horizontal_flip: bool = False
    filter_by_size: bool = field(kw_only=True)
    shuffle_window_shards: int = 16
    bucket_step_px: int | None = None
    max_aspect: float = 2.0
    encoded: str | None = None
    num_workers: int = field(kw_only=True)
    cache_mib: int = field(kw_only=True)
    shard_cache_gib: float = 50.0
    deadline_s: float = 60.0
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        check(
            self.source is not None or bool(self.shards) or bool(self.mixture),
            "data.shards",
            self.shards,
            "at least one path or URL, or data.mixture",
        )
        ok = not (self.mixture and self.shards)
        check(ok, "data.shards", self.shards, "null where data.mixture names the datasets")
        check_caption_keys(self.caption_keys, "data.caption_keys")
        for name, part in self.mixture.items():
            check(bool(part.shards), f"data.mixture.{name}.shards", part.shards, "at least one path or URL")
            ok = 0 < part.weight < math.inf
            check(ok, f"data.mixture.{name}.weight", part.weight, "more than 0")
            if part.caption_keys is not None:
                check_caption_keys(part.caption_keys, f"data.mixture.{name}.caption_keys")
        window = self.shuffle_window_shards
        check(window >= 1, "data.shuffle_window_shards", window, "1 or more")
        ok = self.bucket_step_px is None or self.bucket_step_px >= 1
        check(ok, BUCKETS, self.bucket_step_px, "1 or more, or null")
        check(1 <= self.max_aspect < math.inf, "data.max_aspect", self.max_aspect, "1 or more")
        for name in ("num_workers", "cache_mib"):
            check(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "0 or more")
        for name in ("shard_cache_gib", "deadline_s"):
            ok = 0 < getattr(self, name) < math.inf
            check(ok, f"data.{name}", getattr(self, name), "more than 0")
        check(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "0 to 1")
        for key, of in self.parts().items():
            if of.encoded is not None:
                check(of.crop == "center", f"{key}.crop", of.crop, f"center where {key}.encoded is given")

    def parts(self) -> dict[str, DataConfig]:
        """The datasets of the mixture, each as a configuration of its own, by the key that names it; {"data": this}
        where there is none."""
        if not self.mixture:
            return {"data": self}
        return {
            f"data.mixture.{name}": dataclasses.replace(
                self,
                shards=part.shards,
                mixture={},
                **{
                    key: value
                    for key in ("caption_keys", "crop", "horizontal_flip", "encoded")
                    if (value := getattr(part, key)) is not None
                },
            )
            for name, part in self.mixture.items()
        }
