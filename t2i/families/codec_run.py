"""The runs that a stage builds on: that of its codec, and in super-resolution that at the lower resolution."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from t2i import families
from t2i.codes.embedding import take_vectors
from t2i.config import RunConfig, check, to_dict
from t2i.errors import CheckpointError
from t2i.families.codec import image_codec
from t2i.families.low_codes import CodesModel
from t2i.families.tokens import check_codebook, coding_hash, has_part
from t2i.interfaces import ImageCodec
from t2i.training import run_folder
from t2i.training.checkpoint import LoadedCheckpoint, load, load_into

log = logging.getLogger(__name__)


def codec_run(config: RunConfig, place: str, start: LoadedCheckpoint | None) -> tuple[LoadedCheckpoint, str]:
    """The checkpoint that builds_on.codec of `config` means, and its place. Raises CheckpointError.

    place: what builds_on.codec says; start: what the run continues, whose codec "latest" then means
    """
    if place == "latest" and start is not None:
        found = families.get(start.config["family"]).load_config().upgraded(start.config)
        has_one = found["builds_on"] is not None
        check(has_one, "init_from", f"{start.path}, without builds_on.codec", "a run with one, as this one")
        return start, found["builds_on"]["codec"]
    if place == "latest":
        newest, passed_over = latest_codec(config)
        for run in passed_over:
            log.info("passes over %s, which did not come to its end", run)
        place = str(newest)
    log.info("builds on the codec %s", place)
    return load_codec_run(place), place


def load_codec_run(place: str) -> LoadedCheckpoint:
    """The checkpoint of a codec's run or file. Raises CheckpointError, ConfigError for one that is no codec's."""
    found = load(run_folder.weights_file(place))
    family, stages = found.config.get("family"), families.stages_with("codec")
    what, allowed = f"{place}, of stage {found.config.get('stage')}", f"a run of stage {', '.join(stages)}"
    check(families.get(family).codec is not None, "builds_on.codec", what, allowed)
    return found


def latest_codec(config: RunConfig) -> tuple[Path, list[Path]]:
    """The run that builds_on.codec=latest means, and the unfinished ones that are newer. Raises CheckpointError where
    there is none."""
    part = families.get(config.family).builds_on["codec"]
    newest, passed_over = newest_codec(config.runs_dir, part)
    if newest is None:
        stages = families.stages_with(part)
        folders = " and ".join(f"{config.runs_dir}/{stage}" for stage in stages)
        kind, option = ("a codec of codes", " codec=vq") if part == "token_codec" else ("a codec", "")
        named = config.model.builds_on.experiment  # type: ignore[attr-defined]
        asked = f"stage={stages[0]}{option}" if named is None else f"experiment={named}"
        raise CheckpointError(
            f"stage={config.stage} builds on {kind}, and there is none in {folders}: train one with "
            f"`t2i train {asked}`, or give builds_on.codec=RUN or FILE."
        )
    return newest, passed_over


def with_codec(found: LoadedCheckpoint, place: str) -> LoadedCheckpoint:
    """The same model with the codec of the run or file `place`, which decodes otherwise, perhaps to larger pictures.
    Raises CheckpointError where that makes other codes or latents of a picture, ConfigError where the model builds on
    no codec."""
    values = found.extra.get("codec")
    check(bool(values), "builds_on.codec", place, "a codec for a model that builds on one alone")
    assert values is not None
    run = load_codec_run(place)
    own, other = image_codec(values), image_codec(run.config)
    load_into(own, found.weights, found.path, prefix="model.codec.")
    load_into(other, run.weights, run.path, prefix="codec.")
    hashes = [coding_hash(codec)[:12] for codec in (other, own)]
    if hashes[0] != hashes[1]:
        raise CheckpointError(
            f"builds_on.codec={place} makes other codes or latents (hash {hashes[0]}) than those that {found.path} has "
            f"learned ({hashes[1]}); allowed: its own codec, or one trained on from it with trained=decoder or "
            "trained=upsampler."
        )
    size = found.config["resolution"]
    larger = {**size, "size_px": size["size_px"] * other.downsampling // own.downsampling}
    return dataclasses.replace(
        found,
        weights=_with_weights_of(other, found.weights),
        config={**found.config, "resolution": larger},
        extra={**found.extra, "codec": run.config},
    )


def _with_weights_of(codec: ImageCodec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights, with those of this codec in place of its own."""
    kept = {name: value for name, value in weights.items() if not name.startswith("model.codec.")}
    return kept | {f"model.codec.{name}": value for name, value in codec.state_dict().items()}


def low_run(
    config: RunConfig, place: str, start: LoadedCheckpoint | None
) -> tuple[LoadedCheckpoint, str, dict[str, Any]]:
    """The checkpoint that builds_on.low of `config` means, its place, and what a checkpoint has to say of it: "config"
    and "extra" of its own. Raises CheckpointError or ConfigError.

    place: what builds_on.low says; start: what the run continues, whose low run "latest" then means
    """
    if place == "latest" and start is not None and "low" in start.extra:
        return start, start.config["builds_on"]["low"], start.extra["low"]
    stages = families.get(config.family).low
    said = " or ".join(stages)
    if place == "latest":
        newest, _ = run_folder.newest_finished(config.runs_dir, stages)
        if newest is None:
            folders = " and ".join(f"{config.runs_dir}/{stage}" for stage in stages)
            raise CheckpointError(
                f"stage={config.stage} builds on a run of stage {said} at a lower resolution, and there is none in "
                f"{folders}: train one, or give builds_on.low=RUN or FILE."
            )
        place = str(newest)
    log.info("builds on the run at a lower resolution %s", place)
    found = load(run_folder.weights_file(place))
    stage = found.config.get("stage")
    check(stage in stages, "builds_on.low", f"{place}, of stage {stage}", f"a run of stage {said}")
    return found, place, {"config": found.config, "extra": found.extra}


def load_runs(
    model: CodesModel,
    start: LoadedCheckpoint | None,
    codec: LoadedCheckpoint | None,
    place: str,
    low: LoadedCheckpoint | None,
) -> None:
    """Copies into `model` the weights of the run that it continues, of that of its codec and of that at the lower
    resolution; its transformer takes the codec's vectors. Raises CheckpointError or ConfigError where they do not fit.

    place: the codec's, to say
    """
    another = codec is not None and codec is not start
    if codec is not None and another:
        load_into(model.codec, codec.weights, codec.path, prefix="codec.")
    if start is not None:
        ok = ("low" in start.extra) == (model.low is not None)
        allowed = f"a run {'without' if model.low is None else 'with'} builds_on.low, as this one"
        check(ok, "init_from", f"{start.path}, of stage {start.config['stage']}", allowed)
        said, own = (_has_code_vectors(each) for each in (start.config, to_dict(model.config)))
        check(own == said, "transformer.code_vectors", own, f"{said} with init_from={start.path}")
        if another:
            learned = start.extra.get("codebook")
            check_codebook(model.codec, "builds_on.codec", place, learned, str(start.path))
        weights = _with_weights_of(model.codec, start.weights) if another else start.weights
        load_into(model, weights, start.path, prefix="model.")
    take_vectors(model.transformer, model.codec.code_vectors())
    if low is not None and low is not start:
        assert model.low is not None
        load_into(model.low, low.weights, low.path, prefix="model.")
        if start is not None:
            learned = start.extra["low"]["extra"].get("codebook")
            place = model.config.builds_on.low
            check_codebook(model.low.codec, "builds_on.low", place, learned, str(start.path))


def _has_code_vectors(values: Mapping[str, Any]) -> bool:
    """Of a run's configuration; those from before the key have none."""
    return bool((values.get("transformer") or {}).get("code_vectors"))


def codec_config(found: LoadedCheckpoint) -> dict[str, Any]:
    """The top-level mapping of the configuration of the codec that a checkpoint is or holds."""
    return found.extra.get("codec", found.config)


def newest_codec(runs_dir: str, part: str) -> tuple[Path | None, list[Path]]:
    """As `run_folder.newest_finished`, of the runs that have a "codec" of latents or a "token_codec". Not of those that
    make the pictures of another larger: what is trained at the size of that one would have fewer codes or latents."""

    def fits(folder: Path) -> bool:
        try:
            config = run_folder.read_config(folder)
        except CheckpointError:
            return part == "codec"  # whose weights may be there all the same
        return config.get("trained") != "upsampler" and has_part(config, part)

    return run_folder.newest_finished(runs_dir, families.stages_with(part), fits)
