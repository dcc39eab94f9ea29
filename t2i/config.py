"""Typed configuration: dataclasses, and the one place where a composed mapping becomes one.

Units stand in the names (`_px`, `_images`, `_mib`). A value that is not allowed stops here, before any data
is read, with the key's name, what was given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from t2i.errors import ConfigError

T = TypeVar("T")
MISSING = "???"  # how a configuration file marks a value that has to be given


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises ConfigError unless `condition`: "data.batch_size is 0; allowed: 1 or more."."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}; allowed: {allowed}.")


def parse(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """A dataclass from a plain mapping, strictly: unknown keys, missing keys and wrong types raise
    ConfigError with the full dotted key."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"allowed: {', '.join(sorted(fields))}."
            raise ConfigError(f"{path}{key} is not a known key; {hint}")
    kwargs = {}
    for name, spec in fields.items():
        if name in values and values[name] != MISSING:
            kwargs[name] = _convert(hints[name], values[name], path + name)
        elif name in values or (
            spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        ):
            raise ConfigError(f"{path}{name} is missing; it needs a value.")
    return cls(**kwargs)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain mapping that `parse` would turn into `config` again."""
    return dataclasses.asdict(config)


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        if any(dataclasses.is_dataclass(a) for a in rest):
            return _convert_named(rest, value, key)
        if len(rest) == 1:
            return _convert(rest[0], value, key)
        fitting = [o for o in rest if isinstance(value, typing.get_origin(o) or o)]
        check(bool(fitting), key, value, " or ".join(map(_described, rest)))
        return _convert(fitting[0], value, key)
    if origin is Literal:
        check(value in args, key, value, ", ".join(str(a) for a in args))
        return value
    if origin in (list, tuple):
        check(isinstance(value, list | tuple), key, value, "a list")
        items = [_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
        return items if origin is list else tuple(items)
    if origin is dict:
        check(isinstance(value, Mapping), key, value, "a mapping")
        return {k: _convert(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        check(isinstance(value, Mapping), key, value, "a mapping")
        return parse(typing.cast(type, hint), value, key + ".")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is Any:
        return value
    ok = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    check(ok, key, value, _described(hint))
    return value


def _described(hint: Any) -> str:
    """A type in the words of a configuration file."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
    return names.get(typing.get_origin(hint) or hint, str(hint))


def _convert_named(options: list[Any], value: Any, key: str) -> Any:
    """One of several dataclasses, told apart by the one value that each allows for its field `name`."""
    check(isinstance(value, Mapping), key, value, "a mapping")
    if len(options) == 1:
        return parse(options[0], value, key + ".")
    by_name = {typing.get_args(typing.get_type_hints(o)["name"])[0]: o for o in options}
    check(value.get("name") in by_name, f"{key}.name", value.get("name"), ", ".join(by_name))
    return parse(by_name[value["name"]], value, key + ".")


@dataclass(frozen=True)
class DataConfig:
    """Where captioned shards come from and how a sample is read.

    source: "emoji" or "shapes", the embedded sources, or None for shards of one's own
    shards: paths or URLs with brace expansion, of the shards to train on
    heldout_shards: the same, of samples that no stage may train on (for reconstructions and evaluation)
    caption_keys: where a caption is looked for, in this order: "txt", or "json:<field>"
    crop: where the square (or rectangle) is cut from the resized picture
    horizontal_flip: mirror half of the pictures
    shuffle_window_shards: how many shards are mixed at a time; reading stays sequential beyond that
    num_workers: reader processes; 0 reads in the training process
    cache_mib: decoded pictures are kept in memory, per process, up to this size
    max_bad_share: above this share of bad samples the run stops
    """

    source: Literal["emoji", "shapes"] | None
    shards: str | list[str] | None
    heldout_shards: str | list[str] | None = None
    caption_keys: list[str] = field(default_factory=lambda: ["txt", "json:caption"])
    crop: Literal["center", "random"] = "center"
    horizontal_flip: bool = False
    filter_by_size: bool = True
    shuffle_window_shards: int = 4
    num_workers: int = 0
    cache_mib: int = 0
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        check(
            self.source is not None or bool(self.shards),
            "data.shards",
            self.shards,
            "at least one path or URL",
        )
        for caption_key in self.caption_keys:
            ok = caption_key == "txt" or caption_key.startswith("json:")
            check(ok, "data.caption_keys", caption_key, "txt, or json:<field>")
        check(
            self.shuffle_window_shards >= 1,
            "data.shuffle_window_shards",
            self.shuffle_window_shards,
            "1 or more",
        )
        check(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        check(self.cache_mib >= 0, "data.cache_mib", self.cache_mib, "0 or more")
        check(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "0 to 1")


@dataclass(frozen=True)
class TextConfig:
    """Which text encoder reads the captions.

    name: "clip" and "t5" (transformers), "open_clip", "minilm" (ships as a package); or, trained with the model,
        "learned" and "ldm_bert"
    model: local directory, hub id or, for open_clip, architecture name; for ldm_bert a directory with BERT's
        vocabulary, null for the one that comes with minilm's package; unused by minilm and learned
    weights: open_clip only: local file or the tag of published weights
    max_tokens: captions are padded or cut to this many tokens
    width, depth, heads: learned and ldm_bert only
    allow_download: hub ids are fetched only where this is true
    """

    name: Literal["clip", "open_clip", "t5", "minilm", "learned", "ldm_bert"]
    model: str | None = None
    weights: str | None = None
    max_tokens: int = 77
    width: int = 128
    depth: int = 2
    heads: int = 4
    allow_download: bool = False

    def __post_init__(self) -> None:
        check(self.max_tokens >= 2, "text.max_tokens", self.max_tokens, "2 or more")
        check(self.depth >= 1, "text.depth", self.depth, "1 or more")
        check(
            self.width % self.heads == 0, "text.width", self.width, f"a multiple of text.heads ({self.heads})"
        )


@dataclass(frozen=True)
class ResolutionConfig:
    """One step of the progressive ladder, with the recipe that belongs to it.

    size_px: side of the square pictures that are trained on
    min_original_px: sources smaller than this are left out (the published Stable Diffusion filters)
    text_dropout: share of captions replaced by "" for classifier-free guidance (2207.12598)
    learning_rate: peak learning rate of the generator at this size
    num_images: how many pictures this step sees
    batch_size: pictures per process and step
    init_from: "lower" continues the newest lower-resolution run of the same stage; None starts afresh
    patch_size: latent positions along each side of a transformer's token. Where it grows with the resolution,
        the number of tokens stays
    """

    size_px: int
    min_original_px: int
    text_dropout: float
    learning_rate: float
    num_images: int
    batch_size: int
    init_from: Literal["lower"] | None
    patch_size: int

    def __post_init__(self) -> None:
        check(self.size_px >= 16, "resolution.size_px", self.size_px, "16 or more")
        check(self.min_original_px >= 0, "resolution.min_original_px", self.min_original_px, "0 or more")
        check(0 <= self.text_dropout <= 1, "resolution.text_dropout", self.text_dropout, "0 to 1")
        ok = 0 < self.learning_rate < math.inf
        check(ok, "resolution.learning_rate", self.learning_rate, "more than 0")
        for name in ("num_images", "batch_size", "patch_size"):
            check(getattr(self, name) >= 1, f"resolution.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (1711.05101) and its learning-rate schedule, counted in images seen.

    muon_scale: None steps all by AdamW; a number steps the matrices between hidden layers by Muon, at this many
        times the learning rate
    schedule: "constant", or "cosine" down to zero at trainer.num_images; both after a linear warm-up
    gradient_clip: largest gradient norm, per group of parameters that share a loss; 0 turns clipping off
    """

    learning_rate: float
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_images: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    gradient_clip: float = 1.0
    muon_scale: float | None = None

    def __post_init__(self) -> None:
        ok = 0 < self.learning_rate < math.inf
        check(ok, "optimizer.learning_rate", self.learning_rate, "more than 0")
        ok = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        check(ok, "optimizer.betas", list(self.betas), "two numbers from 0 up to, not including, 1")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        check(self.warmup_images >= 0, "optimizer.warmup_images", self.warmup_images, "0 or more")
        check(self.gradient_clip >= 0, "optimizer.gradient_clip", self.gradient_clip, "0 or more")
        ok = self.muon_scale is None or 0 < self.muon_scale < math.inf
        check(ok, "optimizer.muon_scale", self.muon_scale, "more than 0, or null for AdamW alone")


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the trained weights, counted in images (EDM, 2206.00364, and its code).

    half_life_images: how many images ago a step counts half
    rampup_ratio: the half-life is at most this share of the images seen so far, so that short runs and
        starts forget the initial weights; None keeps the half-life fixed
    """

    half_life_images: int
    rampup_ratio: float | None = 0.05

    def __post_init__(self) -> None:
        check(self.half_life_images >= 1, "ema.half_life_images", self.half_life_images, "1 or more")
        ok = self.rampup_ratio is None or self.rampup_ratio > 0
        check(ok, "ema.rampup_ratio", self.rampup_ratio, "more than 0, or null")


@dataclass(frozen=True)
class TrainerConfig:
    """How long, on what, and how often something is written.

    num_images: the run ends when this many pictures were seen, over all processes
    batch_size: pictures per process and step
    precision: Lightning's names: "32-true", "bf16-mixed", "16-mixed"
    log_every_steps: metrics are averaged over, and written every, this many steps
    sample_every_images, checkpoint_every_images: 0 does it at the end only
    keep_checkpoints: older ones are removed
    """

    num_images: int
    batch_size: int
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    log_every_steps: int = 10
    sample_every_images: int = 0
    checkpoint_every_images: int = 0
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in (
            "num_images",
            "batch_size",
            "devices",
            "num_nodes",
            "log_every_steps",
            "keep_checkpoints",
        ):
            check(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "1 or more")
        for name in ("sample_every_images", "checkpoint_every_images"):
            check(getattr(self, name) >= 0, f"trainer.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class LoggerConfig:
    """metrics.csv is always written; these are further places.

    wandb: "offline" writes to the run folder only; "online" needs an account and the network
    """

    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "t2i"


@dataclass(frozen=True)
class RunConfig:
    """One training run. `model` is the family's own dataclass, made of the remaining top-level keys.

    stage: name of the stage: the folder under runs_dir
    family: folder of t2i/families/ whose Stage is trained
    name: name of the run's folder; None takes the date and time
    init_from: None, "lower", a run folder or a checkpoint file to take weights from
    resume: None, "latest", or the run folder to go on with
    """

    stage: str
    family: str
    name: str | None
    runs_dir: str
    seed: int
    init_from: str | None
    resume: str | None
    data: DataConfig
    resolution: ResolutionConfig
    optimizer: OptimizerConfig
    ema: EMAConfig | None
    trainer: TrainerConfig
    logger: LoggerConfig
    model: Any

    def __post_init__(self) -> None:
        check(self.seed >= 0, "seed", self.seed, "0 or more")


def parse_run(values: Mapping[str, Any], model_class: type) -> RunConfig:
    """The composed top-level mapping as a RunConfig: keys that are fields of `model_class` (the family's
    Config) go there, the others must be the shared ones."""
    model_keys = {f.name for f in dataclasses.fields(model_class)}
    shared = {f.name for f in dataclasses.fields(RunConfig)} - {"model"}
    for key in values:
        if key not in model_keys | shared:
            near = difflib.get_close_matches(key, sorted(model_keys | shared), n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"allowed: {', '.join(sorted(model_keys | shared))}."
            )
            raise ConfigError(f"{key} is not a known key of stage {values.get('stage')}; {hint}")
    model: Any = parse(model_class, {k: v for k, v in values.items() if k in model_keys})
    return parse(RunConfig, {k: v for k, v in values.items() if k in shared} | {"model": model})


def run_to_dict(config: RunConfig) -> dict[str, Any]:
    """The flat mapping that `parse_run` reads: what config.yaml and checkpoints hold."""
    values = to_dict(config)
    return values | values.pop("model")
