"""Checkpoints as folders: `step_0000100/` with weights.safetensors, average.safetensors (where there is an EMA),
frozen.safetensors (networks that do not learn: written once, a hard link in later checkpoints), rest.pt (optimizer,
position and whatever else Lightning keeps), under FSDP shard_00000.safetensors and so on, and, as the last of all,
complete.json, which has the size and SHA-256 of each. They are written in the background, from copies in the host's
memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from t2i.errors import CheckpointError
from t2i.files import system_error, written_whole
from t2i.training.state_shards import SHARD, Shards, agreed, is_note

FORMAT = 2
WEIGHTS, AVERAGE, FROZEN = "weights.safetensors", "average.safetensors", "frozen.safetensors"
REST, MARK = "rest.pt", "complete.json"
ENTRIES = {"state_dict": WEIGHTS, "ema": AVERAGE, "frozen": FROZEN}  # of a checkpoint


def on_host(values: Any, buffers: list[Tensor]) -> Any:
    """The same with copies of all tensors in the host's memory, which later steps leave as they are.

    buffers: the copies of the time before, which are written over where they fit, and the new ones; memory that is
        new to the process costs more than the copy itself
    """
    waits = set[torch.device]()
    before, made = iter(list(buffers)), list[Tensor]()

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        host, kind = next(before, None), (value.shape, value.dtype, value.stride())
        if host is None or (host.shape, host.dtype, host.stride()) != kind:
            # In its layout in memory: fused optimizers take for granted that moments have that of their parameter.
            host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        if value.is_cuda:
            waits.add(value.device)
        made.append(host)
        return host.copy_(value.detach(), non_blocking=value.is_cuda)

    copies = pytree.tree_map(copied, values)
    for device in waits:
        torch.cuda.synchronize(device)
    buffers[:] = made
    return copies


def write(
    checkpoint: Mapping[str, Any],
    path: Path,
    shards: Mapping[str, Mapping[str, Tensor]] | None = None,
    group: dist.ProcessGroup | None = None,
    frozen: Path | None = None,
) -> None:
    """Writes aside, flushes to the disk, renames, and marks as complete. Raises OSError; nothing is left then.

    frozen: of an earlier checkpoint of the run, in place of the entry "frozen"
    shards, group: where several processes write one checkpoint, what each of them adds to it, by file; all have to
        call. `checkpoint` counts in the first alone.
    """
    aside = path.with_name(f".{path.name}.unfinished")
    first = group is None or dist.get_rank(group) == 0

    def prepare() -> None:
        if first:
            remove(aside)
            remove(path)  # one without its mark
            aside.mkdir(parents=True)

    def fill() -> dict[str, Any]:
        parts = dict(shards or {})
        if first:
            rest = {key: value for key, value in checkpoint.items() if key not in ENTRIES}
            for key, name in ENTRIES.items():
                if key in checkpoint:
                    parts[name] = {n: v for n, v in checkpoint[key].items() if not is_note(v)}
            with (aside / REST).open("wb") as file:  # torch's own would not tell what the system refused
                torch.save(rest, file)
            if frozen is not None:
                _link(frozen, aside / FROZEN)
        for name, tensors in parts.items():
            place = aside / name
            place.touch()
            mode = place.stat().st_mode
            save_file({n: value.contiguous() for n, value in tensors.items()}, place)
            place.chmod(mode)  # safetensors makes its files with mode 0600
        others = [name for name in (REST, FROZEN) if first and (aside / name).is_file()]
        written = sorted(aside / name for name in {*parts, *others})
        files = {each.name: _described(each) for each in written}
        _flush(*written)
        return files

    def complete(files: dict[str, Any]) -> None:
        if first:
            _flush(aside)
            aside.rename(path)
            _flush(path.parent)
            mark = {"format": FORMAT, "t2i": checkpoint["t2i"], "files": files}
            with written_whole(path / MARK) as unfinished:
                unfinished.write_text(json.dumps(mark, indent=1) + "\n")
                _flush(unfinished)
            _flush(path)

    try:
        agreed(prepare, group)
        files = {name: said for written in agreed(fill, group) for name, said in written.items()}
        agreed(lambda: complete(files), group)
    except Exception as error:
        if first:
            remove(aside)
            if not (path / MARK).is_file():
                remove(path)
        system = system_error(error)
        if system is None:
            raise
        raise OSError(system.errno, os.strerror(system.errno or 0), str(path)) from error


def is_complete(path: Path) -> bool:
    """Whether it is a checkpoint's folder with all its files in their sizes. What is in them is not read."""
    try:
        files = _mark(path)["files"]
        return all((path / name).stat().st_size == said["bytes"] for name, said in files.items())
    except (CheckpointError, OSError, TypeError, KeyError, AttributeError):
        return False


def check_whole(path: Path) -> None:
    """Reads all of a checkpoint's folder. Raises CheckpointError where a file is not as it was written."""
    for name, said in _mark(path)["files"].items():
        try:
            found = _described(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}.") from error
        if found != said:
            sizes = f"{found['bytes']} bytes, written were {said['bytes']}"
            raise CheckpointError(f"{path / name} is not as it was written ({sizes}, or others).")


def header(path: Path) -> Any:
    """What a checkpoint says of its run: config, extra, images_seen. Raises CheckpointError."""
    return _mark(path).get("t2i")


def remove(path: Path) -> None:
    """The mark first, so that what is left after an interruption does not count. Nothing happens where it is not
    there."""
    if path.is_dir():
        (path / MARK).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """All that `write` got. Raises CheckpointError."""
    try:
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes lead the unpickler astray in every way there is
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path / REST} cannot be read: {reason}.") from error
    found = zip(("state_dict", "ema"), weights(path), strict=True)  # with the frozen ones
    return dict(_shards(path).joined(rest)) | {key: value for key, value in found if value}


def weights(path: Path, average: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights, trained and frozen, and those of the EMA, empty where there is none or it is not asked for. Raises
    CheckpointError."""
    found, shards = dict[str, dict[str, Tensor]](), _shards(path)
    for key, name in ENTRIES.items():
        if key == "ema" and not average:
            continue
        try:
            there = load_file(path / name) if key == "state_dict" or (path / name).is_file() else {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path / name} cannot be read as safetensors: {error}.") from error
        found[key] = there | shards.under(key)
    return found["state_dict"] | found["frozen"], found.get("ema", {})


def _link(old: Path, new: Path) -> None:
    """The same file under another name, or a copy where the file system has no such links."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def _shards(path: Path) -> Shards:
    return Shards([path / name for name in sorted(_mark(path)["files"]) if SHARD.fullmatch(name)])


def _mark(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / MARK).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: its {MARK} cannot be read.") from error
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise CheckpointError(f"{path / MARK} names no files.")
    return found


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flush(*paths: Path) -> None:
    """To the disk: of a file its bytes, of a folder its list of names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
