"""`t2i convert`: any format that is read into any that is written, streaming, and all or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from t2i.config import check
from t2i.diffusion.config import GridConfig
from t2i.errors import CheckpointError
from t2i.files import made_folder
from t2i.interop.amused import SAMPLING, amused_files
from t2i.interop.codec_form import check_codec
from t2i.interop.compvis_out import write_compvis
from t2i.interop.diffusers_out import write_diffusers
from t2i.interop.options import Format, Options
from t2i.interop.parts import Parts
from t2i.interop.run_out import write_run
from t2i.interop.sources import read
from t2i.interop.writing import DTYPES, Progress, saved_bytes

# Endings of files that others write, and that no folder should have.
OTHER_FILES = (
    ".ckpt",
    ".pt",
    ".pth",
    ".bin",
    ".pkl",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".zip",
    ".tar",
    ".gz",
)
DEFAULTS = asdict(GridConfig())
WRITERS = {"t2i": write_run, "diffusers": write_diffusers, "compvis": write_compvis}


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
        chosen = (parts.codec, parts.denoiser, parts.transformer)
        weights = [part.weights for part in chosen if part is not None]
        if parts.text is not None:
            weights.append(parts.text.saved_weights)
        return sum(saved_bytes(each, dtype) for each in weights)


def prepare(source: Path, out: Path, options: Options) -> Conversion:
    """Reads configurations and headers, and compares names and shapes. Raises a UserError."""
    check(options.dtype in DTYPES, "--dtype", options.dtype, ", ".join(DTYPES))
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already; give a name that is free.")
    for place in (source, *(Path(given) for given in (options.vae, options.text_model) if given)):
        inside = place.is_dir() and out.resolve().is_relative_to(place.resolve())
        check(not inside, "OUT", str(out), f"a name outside of {place}, which is read")
    single = out.suffix.lower() == ".safetensors"
    check(
        out.suffix.lower() not in OTHER_FILES,
        "OUT",
        str(out),
        "a name that ends in .safetensors, or a folder's (other kinds of files are not written)",
    )
    parts, is_ours = read(source, options)
    to: Format = options.to or ("compvis" if single else "diffusers" if is_ours else "t2i")
    if to == "compvis" and not single:
        raise CheckpointError(f"{out} would be a single file; allowed: a name that ends in .safetensors.")
    if to != "compvis" and single:
        raise CheckpointError(
            f"{out} would be a folder; allowed: a name without .safetensors, or --to compvis."
        )
    if to != "t2i":
        _check_foreign(parts, to)
    return Conversion(parts, out, to, options.dtype)


def _check_foreign(parts: Parts, to: Format) -> None:
    """Raises a UserError where parts have no such form; notes what it has no place for."""
    check_codec(parts, to)
    if parts.transformer is not None:
        if to == "compvis":
            raise CheckpointError("aMUSEd has no form as a single file; allowed: --to diffusers, or t2i.")
        amused_files(parts)
        _note_sampling(parts, "An AmusedPipeline", parts.transformer.sampling, SAMPLING)
        return
    said = parts.codec.is_vit or not parts.codec.config["backbone"].get("unit_range", False)
    check(said, "backbone.unit_range", True, "false but in an AmusedPipeline (no file would say so)")
    if to == "compvis" and parts.denoiser is not None:
        _note_sampling(parts, "A single file", parts.denoiser.sampling, DEFAULTS)


def _note_sampling(parts: Parts, what: str, sampling: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    said = {key: value for key, value in sampling.items() if value != usual.get(key, value)}
    if said:
        words = ", ".join(f"{key}={value}" for key, value in said.items())
        parts.notes.append(f"{what} has no place for how pictures are drawn: {words} is left out.")


def write(conversion: Conversion, progress: Progress = lambda _: None) -> None:
    """Writes beside the final name, then renames: under that name there is all of it or nothing."""
    out = conversion.out
    try:
        with made_folder(out.parent):
            unfinished = out.with_name(f".{out.name}.{os.getpid()}")
            _remove(unfinished)
            try:
                WRITERS[conversion.to](conversion.parts, unfinished, DTYPES[conversion.dtype], progress)
                if out.exists() or out.is_symlink():
                    raise CheckpointError(
                        f"{out} was made by someone else meanwhile; give a name that is free."
                    )
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
