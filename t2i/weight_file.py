"""What a file of weights is, told by its content and not by its name, its weights, and whether its numbers are
numbers."""

from __future__ import annotations

import hashlib
import os
import pickle
import pickletools
import re
import tempfile
import textwrap
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from t2i.errors import CheckpointError

ZIP = b"PK\x03\x04"
# What people find under the name of a model, by its first bytes; text is looked at in lower case, without the
# spaces before it.
PAGES = {
    b"version https://git-lfs": "a git-LFS pointer, which only names the file; fetch the file with `git lfs pull`",
    b"<!doctype html": "an HTML page, which a download got in place of the file",
    b"<html": "an HTML page, which a download got in place of the file",
    b"<?xml": "an XML page, which a download got in place of the file",
}
NOT_WEIGHTS = PAGES | {
    b"{": "JSON text",
    b"[": "JSON text",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"rar!": "a RAR archive; unpack it first",
    b"\xfd7zxz": "an xz archive; unpack it first",
    b"gguf": "a GGUF file, whose quantised weights are not read",
    b"\x89hdf": "an HDF5 file of Keras, which is not read",
    b"\x93numpy": "a NumPy array",
    b"\x89png": "a picture",
    b"\xff\xd8\xff": "a picture",
}


def weights_format(path: Path) -> Literal["safetensors", "pickle"]:
    """How the weights in a file are stored. Raises CheckpointError, which says what the file is, where it holds
    none. That they can be read is not yet said."""
    try:
        if not path.stat().st_size:  # before it is opened: a pipe would never answer
            raise CheckpointError(f"{path} is empty; allowed: a file of weights.")
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if start[8:9] == b"{":
        return "safetensors"
    for first, what in NOT_WEIGHTS.items():
        if _plain(start).startswith(first):
            raise CheckpointError(
                f"{path} is {what}; allowed: a file of weights (.safetensors, .ckpt, .bin, .pt)."
            )
    if start[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a tar archive; unpack it, and give what is inside.")
    if start.startswith(ZIP) and not _saved_by_torch(path):
        raise CheckpointError(
            f"{path} is a zip archive without a checkpoint of torch in it; unpack it, and give what is inside."
        )
    if start.startswith((ZIP, b"\x80")):
        return "pickle"
    if _is_text(start) and not _is_pickle(path):
        raise CheckpointError(f"{path} is text; allowed: a file of weights (.safetensors, .ckpt, .bin, .pt).")
    return "safetensors" if path.suffix.lower() == ".safetensors" else "pickle"


def _is_text(start: bytes) -> bool:
    """Whether a file that begins so is text in UTF-8; the last letter may be cut."""
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:
            return False
        text = start[: error.start].decode("utf-8-sig")
    return re.search(r"[^\s\x20-\x7e\xa0-\U0010ffff]", text) is None


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle from its beginning to its end, as far as can be told without obeying it. Those of the
    oldest protocol are text."""
    try:
        with path.open("rb") as file, open(os.devnull, "w") as nowhere:
            pickletools.dis(file, nowhere)
    except Exception:  # whatever text leads it to
        return False
    return True


def _saved_by_torch(path: Path) -> bool:
    """Whether a zip archive is one of torch.save's; one that is cut short may have been."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return True


def explain(folder: Path) -> None:
    """Raises CheckpointError for the first file of a model's folder that is not what its name says, for a folder that
    a library could not read."""
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if suffix in (".safetensors", ".bin"):
            found = weights_format(path)
            if found != ("safetensors" if suffix == ".safetensors" else "pickle"):
                named = {"safetensors": ".safetensors", "pickle": ".bin"}[found]
                raise CheckpointError(f"{path} is a {found} file; name it {path.with_suffix(named).name}.")
        elif suffix in (".json", ".txt"):
            check_no_page(path, path.read_bytes()[:512])


def check_no_page(path: Path, start: bytes) -> None:
    """Raises CheckpointError where a text file that begins with `start` came in place of the one that was meant."""
    if not start.strip():
        raise CheckpointError(f"{path} is empty.")
    for first, what in PAGES.items():
        if _plain(start).startswith(first):
            raise CheckpointError(f"{path} is {what}.")


def _plain(start: bytes) -> bytes:
    return start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()


@contextmanager
def named_by_content(path: Path) -> Iterator[Path]:
    """The file under a name with the ending that belongs to its content, which libraries go by: its own, or that of
    a link for the while."""
    found = weights_format(path)
    fits = path.suffix == ".safetensors" if found == "safetensors" else path.suffix.lower() != ".safetensors"
    if fits:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"weights{'.safetensors' if found == 'safetensors' else '.pt'}"
        link.symlink_to(path.absolute())
        yield link


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle that is one state dict, on the CPU. Raises CheckpointError
    where there is no such file, it holds anything else, or weights that are not finite."""
    if weights_format(path) == "safetensors":
        try:
            weights: Any = load_file(path)
        except Exception as error:  # whatever the reader raises
            raise CheckpointError(f"{path} cannot be read as weights: {reason_of(error)}.") from error
    else:
        weights = unpickled(path)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} is a {type(weights).__name__}; allowed: a state dict of tensors.")
    check_finite(weights, path)
    return weights


def unpickled(path: Path, mmap: bool = False) -> Any:
    """What torch.save wrote into a file, on the CPU; no code that the file names is run. Raises CheckpointError.

    mmap: leave the numbers on the disk until they are used, where `is_zip` holds
    """
    try:
        with named_by_content(path) as named, warnings.catch_warnings(action="ignore"):  # for who programs
            return torch.load(named, map_location="cpu", weights_only=True, mmap=mmap)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read as weights without running code from it, or is damaged; refused."
        ) from error
    except Exception as error:  # damaged bytes lead the unpickler astray in every way there is
        raise CheckpointError(f"{path} cannot be read as weights: {reason_of(error)}.") from error


def is_zip(path: Path) -> bool:
    """Whether a file begins as torch.save's have since 2020, whole or not."""
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def check_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Raises CheckpointError that names the first of `weights` with a number that is NaN or infinite, or with none."""
    for name, value in weights.items():
        if value.is_meta:
            raise CheckpointError(f"{name} in {source} was saved without its numbers (torch's device meta).")
        if not value.is_floating_point() or not value.numel():
            continue
        least, most = (
            value.aminmax()
        )  # NaN if any number is; no copy of the weight is made, as isfinite makes
        if not (least.isfinite() and most.isfinite()):
            bad = value.numel() - int(value.isfinite().sum())
            raise CheckpointError(
                f"{name} in {source} has {bad:,} numbers of {value.numel():,} that are not finite (NaN or infinite); "
                "allowed: finite weights."
            )


def sha256(*files: Path) -> str:
    """Of the files' contents, one after the other. Raises CheckpointError."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def reason_of(error: Exception) -> str:
    """The beginning of what a library says, which may be pages."""
    said = str(error).partition(" This is an internal miniz error")[0]
    if not said or isinstance(error, LookupError):  # whose text is the name that was looked for
        said = f"{type(error).__name__} {said}".strip()
    return textwrap.shorten(said, 200, placeholder=" ...").rstrip(".")
