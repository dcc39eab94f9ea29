"""`t2i data make`: the shards of an embedded source."""

from __future__ import annotations

import argparse

from ..arguments import Parser
from ..console import console
from ..embedded import SHAPES_SIZE_PX, make


def run(arguments: list[str]) -> None:
    """Makes what is not there yet and says where it is."""
    options = parser().parse_args(arguments)
    console.print(f"{options.source} is in {make(options.source, options.size_px)}")


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="t2i data make", description="Make an embedded source.")
    made.add_argument("source", choices=["emoji", "shapes"])
    made.add_argument("--size-px", type=int, default=SHAPES_SIZE_PX, help="side of the pictures; shapes only")
    return made
