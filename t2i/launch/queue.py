"""What SLURM's queue says of jobs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

from t2i.errors import UserError

TIMEOUT_S = 60
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
}
ENDED |= {"REVOKED", "TIMEOUT"}


def states(jobs: Iterable[str]) -> dict[str, str]:
    """Of those that SLURM still knows, by number: "RUNNING on n[1-2]", "PENDING (Resources)", "FAILED". Raises
    UserError where there is no SLURM or it does not answer."""
    wanted = set(jobs)
    found: dict[str, str] = {}
    for line in _asked("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%R").splitlines():
        job, state, place = _fields("squeue", line, 3)
        if job in wanted:
            where = place if state == "PENDING" else f"on {place}" if place and state == "RUNNING" else ""
            found[job] = f"{state} {where}".strip()
    if gone := sorted(wanted - found.keys()):
        found |= _ended(gone)
    return found


def has_ended(state: str) -> bool:
    """Of one of those states."""
    return state.partition(" ")[0] in ENDED


def cancel(job: str) -> None:
    """Raises UserError with what scancel said, which is nothing of a job that has ended."""
    _asked("scancel", job)


def _ended(jobs: list[str]) -> dict[str, str]:
    """From the accounts, which not every cluster keeps."""
    try:
        said = _asked(
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            "--format=JobID,State",
            f"--jobs={','.join(jobs)}",
        )
    except UserError:
        return {}
    return dict(_fields("sacct", line, 2) for line in said.splitlines())


def _fields(command: str, line: str, number: int) -> list[str]:
    found = line.split("|", number - 1)
    if len(found) < number:
        raise UserError(f"{command} said {line!r}; allowed: lines with {number} fields between |.")
    return found


def _asked(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="backslashreplace", timeout=TIMEOUT_S
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]} is not on this machine; allowed: a login node of the cluster."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} did not answer within {TIMEOUT_S} s.") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit state {done.returncode}, without a word"
        raise UserError(f"{command[0]} refused: {said}")
    return done.stdout
