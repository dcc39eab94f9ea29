"""What libraries raise for something outside the code, as sentences."""

from __future__ import annotations

import re

from t2i.errors import UserError, system_sentence

# What moves a terminal's cursor, colours it, breaks a line or turns its direction; names and captions may hold any.
CONTROL = re.compile(r"[\x00-\x08\n-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

# Of a RuntimeError's text; what is left over is a fault of the code, and shown with its traceback.
KNOWN = (
    (r"out of memory|STATUS_ALLOC_FAILED", "The GPU's memory is not enough; a smaller batch takes less"),
    (
        r"can't allocate memory|not enough memory",
        "This machine's memory is not enough; a smaller batch takes less",
    ),
    (
        r"DataLoader worker .*(killed|exited)|shared memory",
        "A process that reads data was ended by the system, mostly for lack of memory or of /dev/shm; a smaller "
        "data.num_workers takes less",
    ),
    (
        r"No working C\+\+ compiler|C\+\+ compile error|Failed to find C compiler|Command '\['\S*(cc|clang)'",
        "Compiling (trainer.compile, --compile) needs a C++ compiler, such as g++, and Python's headers",
    ),
    (r"busy or unavailable|no kernel image|NVIDIA driver", "The GPU cannot be used"),
    (
        r"closed by peer|Connection re(fused|set)|NCCL|TCPStore|ProcessGroup|[Tt]imed out",
        "Another process of this run ended or cannot be reached; look for what it said",
    ),
)


def one_line(text: str) -> str:
    """`text` with its control characters spelt, such as `\\n` and `\\x1b`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def sentence_of(error: Exception) -> str | None:
    """The one line that a person is told; None for what nobody but a programmer can mend."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return system_sentence(error)
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "A name of a file or folder has a NUL character in it, which the system does not allow."
    if isinstance(error, MemoryError):
        return f"This machine's memory is not enough ({str(error) or 'MemoryError'})."
    if isinstance(error, RuntimeError):
        for pattern, sentence in KNOWN:
            if re.search(pattern, str(error)):
                first = next(line.strip() for line in str(error).splitlines() if re.search(pattern, line))
                return f"{sentence} ({first.rstrip('.')})."
    return None
