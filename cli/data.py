"""`t2i data make emoji|shapes`: writes an embedded source's shards."""

from __future__ import annotations

import argparse

from .console import console
from .embedded import SHAPES_SIZE_PX, make


def run(arguments: list[str]) -> None:
    """Parses, makes, says where."""
    parser = argparse.ArgumentParser(prog="t2i data", description="Make the embedded data.")
    parser.add_argument("action", choices=["make"])
    parser.add_argument("source", choices=["emoji", "shapes"])
    parser.add_argument(
        "--size-px", type=int, default=SHAPES_SIZE_PX, help="side of the pictures; shapes only"
    )
    options = parser.parse_args(arguments)
    console.print(f"{options.source} is in {make(options.source, options.size_px)}")
