"""The entry `builds_on` of families that build on a codec. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from t2i.config import check


@dataclass(frozen=True)
class BuildsOn:
    """codec: "latest", a run folder or a file. A run that continues another keeps that one's codec unless a path is
    given here"""

    codec: str

    def __post_init__(self) -> None:
        allowed = "latest, a run or a file (an empty variable of the shell?)"
        check(self.codec != "", "builds_on.codec", "", allowed)
