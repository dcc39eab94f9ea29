"""What a codec begins with of which a part is trained alone: the decoder (Muse: Chang et al., 2301.00704, section 2.5)
or the upsampler (Parti: Yu et al., 2206.10789)."""

from __future__ import annotations

from t2i.config import check, parse_run
from t2i.families.autoencoder.codec import Codec
from t2i.families.autoencoder.config import Config
from t2i.families.autoencoder.model import AttentionBlock, ResnetBlock
from t2i.nn.residual import zero_init
from t2i.training.checkpoint import LoadedCheckpoint, load_into

# By which the same weights give other codes or latents.
ENCODING = (("codec", "normalize"), ("codec", "levels"), ("backbone", "unit_range"), ("backbone", "encoder"))


def load_for_part(codec: Codec, start: LoadedCheckpoint) -> None:
    """Copies into `codec` all that stays as it is, and of what learns the weights that are there in its shape. Blocks
    that a deeper decoder has beside add nothing at first; what is wider begins anew. Raises CheckpointError where what
    stays does not fit."""
    frozen = set(codec.frozen())
    learns = tuple(f"{name}." for name, part in codec.named_children() if part not in frozen)
    given = {
        name.removeprefix("codec."): value
        for name, value in start.weights.items()
        if name.startswith("codec.")
    }
    for name, module in codec.decoder.named_modules(prefix="decoder"):
        last = {ResnetBlock: "conv2", AttentionBlock: "proj_out"}.get(type(module))
        if last is not None and f"{name}.{last}.weight" not in given:
            zero_init(getattr(module, last))
    own = {name: value for name, value in codec.state_dict().items() if name.startswith(learns)}
    fitting = {
        name: value
        for name, value in given.items()
        if not name.startswith(learns) or (name in own and own[name].shape == value.shape)
    }
    load_into(codec, {**own, **fitting}, start.path)


def check_same_kind(config: Config, start: LoadedCheckpoint) -> None:
    """Raises ConfigError where `start` is another kind of codec or network, so that no weights could fit, or has an
    upsampler that this one has not."""
    for entry in ("codec", "backbone"):
        own, wanted = getattr(config, entry).name, start.config.get(entry, {}).get("name")
        check(wanted in (None, own), entry, own, f"{wanted} with init_from={start.path}, which has it")
    enlarges = any(name.startswith("codec.upsampler.") for name in start.weights)
    allowed = f"upsampler with init_from={start.path}, which has one, or init_from: its codec before"
    check(config.trained == "upsampler" or not enlarges, "trained", config.trained, allowed)


def check_encodes_alike(config: Config, start: LoadedCheckpoint) -> None:
    """Raises ConfigError where pictures would become other codes or latents than those of `start`, whose
    weights fit."""
    theirs = parse_run(start.config, Config).model
    for entry, key in ENCODING:
        own, wanted = (getattr(getattr(each, entry), key, None) for each in (config, theirs))
        check(
            own == wanted,
            f"{entry}.{key}",
            own,
            f"{wanted} with trained={config.trained}, as {start.path} has it",
        )
