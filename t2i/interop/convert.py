"""`t2i convert`: any format that is read into any that is written, streaming, and all or nothing."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from t2i.config import check
from t2i.errors import CheckpointError
from t2i.interop.compvis_in import read_single_file
from t2i.interop.compvis_out import write_compvis
from t2i.interop.diffusers_in import read_autoencoder, read_pipeline
from t2i.interop.diffusers_out import write_diffusers
from t2i.interop.folder import read_json
from t2i.interop.parts import Parts
from t2i.interop.reading import only_weights, read_pickle, read_safetensors
from t2i.interop.run_in import is_run, read_run
from t2i.interop.run_out import write_run
from t2i.interop.writing import DTYPES, Progress, saved_bytes

Format = Literal["t2i", "diffusers", "compvis"]
WRITERS = {"t2i": write_run, "diffusers": write_diffusers, "compvis": write_compvis}


@dataclass(frozen=True)
class Options:
    """to: None takes t2i for a foreign source and, for one of ours, what the name of OUT says
    dtype: a name in DTYPES
    ema: take averaged weights where there are any
    prediction: what the UNet of a single file predicts, which the file itself does not say
    text_model: folder of the text encoder, in the place of the one that a run of ours names
    """

    to: Format | None = None
    dtype: str = "fp32"
    ema: bool = True
    prediction: Literal["eps", "v"] | None = None
    text_model: str | None = None


@dataclass(frozen=True)
class Conversion:
    """A source that was understood and checked, and where it is going; no weight has been read yet."""

    parts: Parts
    out: Path
    to: Format
    dtype: str

    @property
    def num_bytes(self) -> int:
        """What will be written, headers aside."""
        dtype, parts = DTYPES[self.dtype], self.parts
        chosen = (parts.codec, parts.denoiser, parts.text)
        return sum(saved_bytes(part.weights, dtype) for part in chosen if part is not None)


def prepare(source: Path, out: Path, options: Options) -> Conversion:
    """Reads configurations and headers, and compares names and shapes. Raises a UserError."""
    check(options.dtype in DTYPES, "--dtype", options.dtype, ", ".join(DTYPES))
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already; give a name that is free.")
    parts, is_ours = read(source, options)
    single = out.suffix == ".safetensors"
    to: Format = options.to or (("compvis" if single else "diffusers") if is_ours else "t2i")
    if to == "compvis" and not single:
        raise CheckpointError(f"{out} would be a single file; allowed: a name that ends in .safetensors.")
    if to != "compvis" and single:
        raise CheckpointError(
            f"{out} would be a folder; allowed: a name without .safetensors, or --to compvis."
        )
    return Conversion(parts, out, to, options.dtype)


def read(source: Path, options: Options) -> tuple[Parts, bool]:
    """The parts of whatever `source` is, and whether t2i made it."""
    if not source.exists():
        raise CheckpointError(
            f"{source} does not exist; give a diffusers folder, a checkpoint file or a t2i run."
        )
    if source.is_dir():
        if (source / "model_index.json").exists():
            return read_pipeline(source), False
        if is_run(source):
            return read_run(source, options.ema, options.text_model), True
        if (source / "config.json").exists() and "_class_name" in read_json(source, "config.json"):
            return Parts("a diffusers autoencoder", read_autoencoder(source)), False
        raise CheckpointError(
            f"{source} is none of: a diffusers folder (model_index.json), a t2i run (config.yaml), an autoencoder's "
            "folder (config.json)."
        )
    if source.suffix == ".safetensors":
        weights, metadata = read_safetensors(source)
        if "t2i" in metadata:
            return read_run(source, options.ema, options.text_model), True
        return read_single_file(source, weights, metadata, options.ema, options.prediction), False
    saved = read_pickle(source)
    if "t2i" in saved:
        return read_run(source, options.ema, options.text_model), True
    inner = saved.get("state_dict")
    weights = only_weights(inner if isinstance(inner, dict) else saved)
    return read_single_file(source, weights, {}, options.ema, options.prediction), False


def write(conversion: Conversion, progress: Progress = lambda _: None) -> None:
    """Writes beside the final name, then renames: under that name there is all of it or nothing."""
    out = conversion.out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(f".{out.name}.{os.getpid()}")
        _remove(unfinished)
        try:
            WRITERS[conversion.to](conversion.parts, unfinished, DTYPES[conversion.dtype], progress)
            if out.exists() or out.is_symlink():
                raise CheckpointError(f"{out} was made by someone else meanwhile; give a name that is free.")
            unfinished.rename(out)
        finally:
            _remove(unfinished)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}.") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
