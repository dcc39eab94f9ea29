"""Typed configuration of a run.

Units stand in the names (`_px`, `_images`, `_mib`). A value that is not allowed stops here, before any data
is read, with the key's name, what was given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from t2i.data_config import DataConfig
from t2i.errors import ConfigError
from t2i.schema import Upgraded, check, nearest, parse, to_dict

MAX_NAME_BYTES = 240  # of the 255 that file systems take, so that "-2" can be added


TRAINED_ENCODERS = ("learned", "ldm_bert")  # with the model


@dataclass(frozen=True)
class TextConfig(Upgraded):
    """Which text encoder reads the captions.

    name: "clip", "clip_with_projection" (the same as aMUSEd reads it) and "t5" (transformers), "open_clip", "minilm"
        (ships as a package); or, trained with the model, "learned" and "ldm_bert"
    model: local directory, hub id or, for open_clip, architecture name; for ldm_bert a directory with BERT's
        vocabulary, null for the one that comes with minilm's package; null for minilm and learned
    weights: open_clip only: local file or the tag of published weights
    max_tokens: captions are padded or cut to this many tokens
    width, depth, heads: of learned and ldm_bert; null for the others
    allow_download: hub ids are fetched only where this is true
    """

    name: Literal["clip", "clip_with_projection", "open_clip", "t5", "minilm", "learned", "ldm_bert"]
    model: str | None = None
    weights: str | None = None
    max_tokens: int = field(kw_only=True)
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    allow_download: bool = False

    def __post_init__(self) -> None:
        check(self.max_tokens >= 2, "text.max_tokens", self.max_tokens, "2 or more")
        if self.name in TRAINED_ENCODERS:
            for key in ("width", "depth", "heads"):
                value = getattr(self, key)
                check(value is not None and value >= 1, f"text.{key}", value, f"1 or more for {self.name}")
            width, _, heads = self.shape
            check(width % heads == 0, "text.width", width, f"a multiple of text.heads ({heads})")
        if self.name in ("clip", "clip_with_projection", "open_clip", "t5"):
            allowed = (
                "an architecture of open_clip's"
                if self.name == "open_clip"
                else "a local directory or a hub id"
            )
            check(self.model is not None, "text.model", self.model, f"{allowed} for {self.name}")
        if self.name in ("minilm", "learned"):
            check(self.model is None, "text.model", self.model, f"null for {self.name}")
        if self.name != "open_clip":
            check(self.weights is None, "text.weights", self.weights, f"null for {self.name}")

    @classmethod
    def upgraded(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Frozen encoders had a width, depth and heads that meant nothing."""
        unused = () if values.get("name") in TRAINED_ENCODERS else ("width", "depth", "heads")
        return {key: value for key, value in values.items() if key not in unused}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and heads of an encoder that learns with the model."""
        assert self.width is not None
        assert self.depth is not None
        assert self.heads is not None
        return self.width, self.depth, self.heads


@dataclass(frozen=True)
class ResolutionConfig:
    """One step of the progressive ladder.

    size_px: side of the square pictures that are trained on
    min_original_px: sources smaller than this are left out (the published Stable Diffusion filters)
    text_dropout: share of captions replaced by "" for classifier-free guidance (2207.12598)
    """

    size_px: int
    min_original_px: int
    text_dropout: float

    def __post_init__(self) -> None:
        check(self.size_px >= 16, "resolution.size_px", self.size_px, "16 or more")
        check(self.min_original_px >= 0, "resolution.min_original_px", self.min_original_px, "0 or more")
        check(0 <= self.text_dropout <= 1, "resolution.text_dropout", self.text_dropout, "0 to 1")


# What conf/resolution/ has besides: recipes that the files of stages refer to, as in ${resolution.batch_size}. A run's
# configuration has what they came to in its own keys (trainer.batch_size).
#
# learning_rate: peak learning rate of the generator at this size
# num_images: how many pictures this step of the ladder sees
# batch_size: pictures per process and step
# init_from: "lower" continues the newest lower-resolution run of the same stage; null starts afresh
# patch_size: latent positions along each side of a transformer's token. Where it grows with the resolution, the number
#     of tokens stays
RECIPE = ("learning_rate", "num_images", "batch_size", "init_from", "patch_size")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (1711.05101) and its learning-rate schedule, counted in images seen.

    muon_scale: None steps all by AdamW; a number steps the matrices between hidden layers by Muon, at this many
        times the learning rate
    schedule: "constant", "cosine" down to zero at trainer.num_images, or "step" (step decay): halved each time that
        halve_every_images more were seen; each after a linear warm-up
    gradient_clip: largest gradient norm, per group of parameters that share a loss; 0 turns clipping off
    """

    learning_rate: float
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_images: int = field(kw_only=True)
    schedule: Literal["constant", "cosine", "step"] = "constant"
    gradient_clip: float = 1.0
    # What a run had before there were these keys.
    muon_scale: float | None = None
    halve_every_images: int | None = None

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
        every, step = self.halve_every_images, self.schedule == "step"
        ok = every is not None and every >= 1 if step else every is None
        allowed = f"{'1 or more' if step else 'null'} with optimizer.schedule={self.schedule}"
        check(ok, "optimizer.halve_every_images", every, allowed)


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the trained weights, counted in images (EDM, 2206.00364, and its code).

    half_life_images: how many images ago a step counts half
    rampup_ratio: the half-life is at most this share of the images seen so far, so that short runs and
        starts forget the initial weights; None keeps the half-life fixed
    """

    half_life_images: int
    rampup_ratio: float | None

    def __post_init__(self) -> None:
        check(self.half_life_images >= 1, "ema.half_life_images", self.half_life_images, "1 or more")
        ok = self.rampup_ratio is None or self.rampup_ratio > 0
        check(ok, "ema.rampup_ratio", self.rampup_ratio, "more than 0, or null")


Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"]
Strategy = Literal["ddp", "full_shard", "shard_grad_op", "hybrid_shard"]


@dataclass(frozen=True)
class TrainerConfig:
    """How long, on what, and how often something is written.

    num_images: the run ends when this many pictures were seen, over all processes
    batch_size: pictures per process and step; with global_batch_size, that a process takes at most at a time
    micro_batches: in how many parts a process takes its batch: less memory, the same step
    global_batch_size: pictures per step over all processes, on however many; each takes its share in as few equal parts
        as batch_size allows. None: batch_size of each process
    activation_checkpointing: the backward pass runs the networks' blocks again: less memory, about a third more time
    compile: the blocks are compiled by torch when they are first run
    precision: Lightning's names: "32-true", "bf16-mixed", "16-mixed", and "64-true" to compare runs by; "auto" is what
        the run that is resumed had, else bf16-mixed on a GPU that has it, else 32-true
    log_every_steps: metrics are averaged over, and written every, this many steps
    sample_every_images, checkpoint_every_images: 0 does it at the end only
    validate_every_images: the loss of held-out pictures at fixed times is logged, and the weights with the lowest kept
        as best.safetensors; 0: never
    evaluate_every_images: held-out prompts are drawn, and exact attributes and a distance over the features of
        EfficientNet logged; 0: never
    keep_checkpoints: older ones are removed, but for
    keep_every_images: the first after each so many images; 0: none of them
    deadline_s: a process that keeps the others of its run waiting for so long ends it, and is named
    strategy: what of the trained weights, gradients, moments and averages several processes keep: all of them ("ddp"),
        or each its share (FSDP, 2304.11277), the weights gathered block by block in each pass ("full_shard"), in each
        step ("shard_grad_op"), or shared among a machine's processes alone ("hybrid_shard")
    """

    num_images: int
    batch_size: int
    micro_batches: int = 1
    precision: Precision = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    log_every_steps: int = 10
    sample_every_images: int = 0
    validate_every_images: int = 0
    evaluate_every_images: int = 0
    checkpoint_every_images: int = 0
    keep_checkpoints: int = 2
    keep_every_images: int = 0
    deadline_s: float = 600.0
    # What a run had before there were these keys.
    global_batch_size: int | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    strategy: Strategy = "ddp"

    def __post_init__(self) -> None:
        for name in (
            "num_images",
            "batch_size",
            "micro_batches",
            "devices",
            "num_nodes",
            "log_every_steps",
            "keep_checkpoints",
        ):
            check(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "1 or more")
        check(self.deadline_s > 0, "trainer.deadline_s", self.deadline_s, "more than 0")
        parts = self.micro_batches
        check(self.batch_size % parts == 0, "trainer.micro_batches", parts, f"divisors of {self.batch_size}")
        if (whole := self.global_batch_size) is not None:
            allowed = f"multiples of {self.processes}, the number of processes (trainer.devices x trainer.num_nodes)"
            check(whole >= 1 and whole % self.processes == 0, "trainer.global_batch_size", whole, allowed)
            check(
                parts == 1,
                "trainer.micro_batches",
                parts,
                "1 with trainer.global_batch_size: batch_size decides",
            )
        allowed = f"auto, 32-true, bf16-mixed or 64-true with trainer.strategy={self.strategy}"
        ok = self.strategy == "ddp" or self.precision != "16-mixed"
        check(ok, "trainer.precision", self.precision, allowed)
        for name in ("sample", "validate", "evaluate", "checkpoint", "keep"):
            name = f"{name}_every_images"
            check(getattr(self, name) >= 0, f"trainer.{name}", getattr(self, name), "0 or more")

    @property
    def processes(self) -> int:
        """One for each device."""
        return self.devices * self.num_nodes

    @property
    def images_per_process(self) -> int:
        """Of a step."""
        whole = self.global_batch_size
        return self.batch_size if whole is None else whole // self.processes

    def parts(self, images: int) -> int:
        """In how many micro-batches a process takes its `images` of a step."""
        if self.global_batch_size is None:
            return self.micro_batches
        least = math.ceil(images / self.batch_size)
        return next(parts for parts in range(least, images + 1) if images % parts == 0)

    @property
    def images_at_a_time(self) -> int:
        """In a micro-batch."""
        return self.images_per_process // self.parts(self.images_per_process)


@dataclass(frozen=True)
class LoggerConfig:
    """metrics.csv is always written; these are further places.

    wandb: "offline" writes to the run folder only; "online" needs an account and the network
    """

    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = field(kw_only=True)
    wandb_project: str = "t2i"


@dataclass(frozen=True)
class ModelConfig(Upgraded):
    """What a family's own dataclass derives from. Its `upgraded` is given the whole top-level mapping.

    takes_muon: whether the turns of its stages name matrices between hidden layers
    """

    takes_muon: ClassVar[bool] = True

    def text_encoder(self) -> TextConfig | None:
        """Which text encoder the model needs."""
        return None

    def unused(self) -> dict[str, str]:
        """Keys that change nothing in this configuration, each with what it counts with."""
        text = self.text_encoder()
        if text is None or text.name in TRAINED_ENCODERS:
            return {}
        return dict.fromkeys(("text.width", "text.depth", "text.heads"), "text=learned or text=ldm_bert")


M = TypeVar("M", bound=ModelConfig)


@dataclass(frozen=True)
class RunConfig:
    """One training run. `model` is the family's own dataclass, made of the remaining top-level keys.

    stage: name of the stage: the folder under runs_dir
    family: folder of t2i/families/ whose Stage is trained
    name: name of the run's folder; None takes the date and time
    init_from: None, "lower", a run folder or a checkpoint file to take weights from
    resume: None, "latest", the run folder to go on with, or "auto": the run of this name where that has a checkpoint,
        and else a new one, so that one command starts and restarts
    allow_other_shards: resume although shards were replaced since
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
    model: ModelConfig
    allow_other_shards: bool = False

    def __post_init__(self) -> None:
        check(self.seed >= 0, "seed", self.seed, "0 or more")
        name = self.name
        ok = name is None or (name not in ("", ".", "..") and "/" not in name and "\0" not in name)
        check(ok, "name", name, "a folder's name, without /, or null")
        check(
            name is None or name.casefold() != "latest", "name", name, "other names: that link is made by t2i"
        )
        for key in ("init_from", "resume"):
            place = getattr(self, key)
            check(place != "", key, place, "a run, or null (an empty variable of the shell?)")
        scale = self.optimizer.muon_scale
        ok = scale is None or self.model.takes_muon
        check(ok, "optimizer.muon_scale", scale, f"null with stage={self.stage}, which AdamW alone trains")
        length = 0 if name is None else len(name.encode(errors="surrogateescape"))
        check(length <= MAX_NAME_BYTES, "name", name, f"{MAX_NAME_BYTES} bytes at most (this has {length})")


def parse_run(values: Mapping[str, Any], model_class: type[ModelConfig]) -> RunConfig:
    """The composed top-level mapping as a RunConfig: keys that are fields of `model_class` (the family's
    Config) go there, the others must be the shared ones."""
    values = model_class.upgraded(values)
    model_keys = {f.name for f in dataclasses.fields(model_class)}
    shared = {f.name for f in dataclasses.fields(RunConfig)} - {"model"}
    if isinstance(resolution := values.get("resolution"), Mapping):
        values["resolution"] = {key: value for key, value in resolution.items() if key not in RECIPE}
    for key in values:
        if key not in model_keys | shared:
            hint = nearest(key, model_keys | shared)
            raise ConfigError(f"{key} is not a known key of stage {values.get('stage')}; {hint}")
    model = parse_model(values, model_class)
    return parse(RunConfig, {k: v for k, v in values.items() if k in shared} | {"model": model})


def parse_model(values: Mapping[str, Any], model_class: type[M]) -> M:
    """The family's part of a composed top-level mapping that is today's."""
    keys = {f.name for f in dataclasses.fields(model_class)}
    return parse(model_class, {key: value for key, value in values.items() if key in keys})


def run_to_dict(config: RunConfig) -> dict[str, Any]:
    """The flat mapping that `parse_run` reads: what config.yaml and checkpoints hold."""
    values = to_dict(config)
    return values | values.pop("model")
