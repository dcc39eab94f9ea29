"""Errors that are a person's to mend: one sentence each, shown without a traceback."""

from __future__ import annotations

import os

LONG = 500  # characters of a value in a sentence


class UserError(Exception):
    """Something outside the code is wrong. The message is a sentence that names the key or file, what was
    found and what is allowed; the command line prints it and exits with 2."""


class ConfigError(UserError):
    """A configuration key is unknown or has a value that is not allowed."""


class DataError(UserError):
    """Shards are missing, unreadable, or hold too many bad samples."""


class TrainingError(UserError):
    """Training went astray: numbers are not finite."""


class CheckpointError(UserError):
    """A checkpoint or weight file is missing, unsafe, or does not fit the model."""


class SaidByFirst(UserError):
    """What the first process of a run failed with: it says so, the others need not."""


def shortened(text: str) -> str:
    """At most about `LONG` characters of what a person gave: the beginning and the end."""
    return text if len(text) <= LONG else f"{text[: LONG * 4 // 5]} ... {text[-LONG // 5 :]}"


def system_sentence(error: OSError) -> str:
    """What the system refused, as a sentence with the names of the files: "a/b cannot be used: Not a directory."."""
    given = (error.filename, error.filename2)
    names = " to ".join(os.fsdecode(name) for name in given if isinstance(name, str | bytes | os.PathLike))
    reason = error.strerror or str(error).removesuffix(".") or type(error).__name__
    if isinstance(error, FileExistsError):
        reason = "it is there already" + ("" if os.path.isdir(names) else ", as a file")
    return f"{names} cannot be used: {reason}." if names else f"{reason}."


def sentence(error: Exception) -> str:
    """What went wrong with a file, in the words of whoever met it."""
    return system_sentence(error) if isinstance(error, OSError) else str(error) or type(error).__name__
