"""The entries `builds_on` and `low` of families that build on a codec, and on a run at a lower resolution. Imports no
torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from t2i.config import check


@dataclass(frozen=True)
class BuildsOn:
    """codec: "latest", a run folder or a file. A run that continues another keeps that one's codec unless a path is
        given here
    experiment: that trains such a codec, for `t2i plan` and for whom it is missing; None: any of the kind
    """

    codec: str
    experiment: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        allowed = "latest, a run or a file (an empty variable of the shell?)"
        check(self.codec != "", "builds_on.codec", "", allowed)


@dataclass(frozen=True)
class CodesBuildsOn(BuildsOn):
    """low: of super-resolution, the run of the same family whose codes it refines: "latest", a run folder or a file"""

    low: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "latest, a run or a file (an empty variable of the shell?)"
        check(self.low != "", "builds_on.low", "", allowed)


@dataclass(frozen=True)
class LowConfig:
    """What super-resolution is given beside the caption: the codes of the picture at a lower resolution.

    num_codes, side: how many there can be, and how many along each side, as the run builds_on.low has them
    """

    num_codes: int
    side: int

    def __post_init__(self) -> None:
        for key, least in (("num_codes", 2), ("side", 1)):
            check(getattr(self, key) >= least, f"low.{key}", getattr(self, key), f"{least} or more")

    def check_side(self, codes: int) -> None:
        """Raises ConfigError where so many codes along a side are no multiple of those at the lower resolution."""
        check(codes % self.side == 0, "low.side", self.side, f"a divisor of {codes}, the codes along a side")


def check_low_is_there(place: str | None, low: LowConfig | None, stages: str) -> None:
    """Raises ConfigError where one of builds_on.low and low is given and the other is not.

    stages: those that can be built on, to say
    """
    wanted = f"null with stage {stages}" if low is None else f"a run of stage {stages}"
    check((place is None) == (low is None), "builds_on.low", place, wanted)
