"""`t2i data inspect`: what is in shards, as tables and a contact sheet."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.few import first_few, plural
from t2i.schema import check

from ..arguments import Parser, taken_out
from ..console import console, part_of, progress_bar, whole_words

if TYPE_CHECKING:
    from rich.table import Table

    from t2i.config import TextConfig

TILE_PX = 192


def run(arguments: list[str]) -> None:
    """Looks at every sample under a progress bar, prints, and writes what was asked for."""
    settings, others = taken_out(parser(), arguments, re.compile(r"text(\.\w+)+="))
    options = parser().parse_args(others)
    from t2i.data.sources import expand
    from t2i.errors import ConfigError
    from t2i.files import written_whole
    from t2i.launch.ranks import rank_of
    from t2i_pipelines.inspecting.contact_sheet import contact_sheet
    from t2i_pipelines.inspecting.inspection import inspect_shards
    from t2i_pipelines.places import check_writable
    from t2i_pipelines.processes import cores

    check(1 <= options.samples <= 1000, "--samples", options.samples, "1 to 1000")
    check(options.seed >= 0, "--seed", options.seed, "0 or more")
    urls, rank = expand(options.shards, "SHARDS"), rank_of(os.environ)
    if rank.world > 1 and not options.parts:
        raise ConfigError(
            f"--parts is not given; allowed: a folder, where {rank.world} processes share the shards."
        )
    text = text_encoder(options.text, settings)
    for place in (options.json, options.sheet):
        if place:
            check_writable(Path(place))
    num_tiles = options.samples if options.sheet else 0
    with progress_bar() as bar:
        task = bar.add_task("shards", total=len(urls[rank.rank :: rank.world]))
        report = inspect_shards(
            urls,
            options.fast,
            num_tiles,
            TILE_PX,
            options.seed,
            cores(),
            lambda share: bar.advance(task, share),
            text,
            Path(options.parts) if options.parts else None,
            rank,
        )
    if rank.world > 1:
        console.print(f"{plural(len(report.bytes), 'shard is', 'shards are')} looked at{part_of(rank)}")
        return
    facts = report.to_json()
    for table in tables(facts):
        console.print(table)
    for line in first_few(
        [f"Unreadable shard {url}: {why}" for url, why in facts["shards"]["unreadable"].items()]
    ):
        console.print(line)
    for cause, each in facts["flaws"].items():
        console.print(f"Samples, {cause}: {each['samples']:,}, such as {each['first'][0]}")
    if options.json:
        with written_whole(Path(options.json)) as unfinished:
            unfinished.write_text(json.dumps(facts, indent=1))
        console.print(f"Wrote {options.json}")
    if options.sheet and report.tiles:
        with written_whole(Path(options.sheet)) as unfinished:
            contact_sheet(report.tiles, TILE_PX).save(unfinished, format="PNG")
        console.print(f"Wrote {plural(len(report.tiles), 'sample')} to {options.sheet}")


def text_encoder(name: str | None, settings: list[str]) -> TextConfig | None:
    """What `text=NAME text.key=value` says in a training command. Raises ConfigError or CheckpointError, also where the
    encoder's tokenizer is not there."""
    from t2i.config import TextConfig
    from t2i.errors import ConfigError
    from t2i.schema import parse
    from t2i.text.tokens import token_counter

    from .. import hub
    from ..composition import composed_run

    if name is None:
        if settings:
            raise ConfigError(f"{settings[0]} is given without --text; allowed: --text NAME text.key=value.")
        return None
    composed = composed_run([f"+text={name}", *settings], config_name=None)
    config = parse(TextConfig, composed["text"], "text.")
    if config.allow_download:
        hub.allow()
    token_counter(config)
    return config


def tables(facts: dict[str, Any]) -> list[Table]:
    """Of `Report.to_json`."""
    shards, caption, stored = facts["shards"], facts["caption"], facts["shorter_side_px"]["stored"]
    size = shards["samples"]
    made = [
        _table(
            "Shards",
            {
                "shards": f"{shards['read']:,}",
                "GiB": f"{shards['bytes'] / 2**30:.3f}",
                "samples": f"{facts['samples']:,}",
                "samples per shard": f"{size['p0']:,} to {size['p100']:,}, median {size['p50']:,}",
                "readable pictures": f"{facts['pictures']:,}",
                "repeated keys": f"{facts['repeated_keys']:,}",
            },
        ),
        _table("Members", _counts(facts["members"])),
        _table("Picture formats", _counts(facts["formats"])),
        _percentiles("Shorter side, px", facts["shorter_side_px"]),
        _table("Width / height", _bars(facts["aspect_ratio"])) if stored["known"] else None,
        _percentiles("Captions", {name: caption[name] for name in ("characters", "words", "tokens")}),
        _percentiles("Texts per JSON list", caption["texts_per_json_list"]),
    ]
    return [table for table in made if table is not None]


def _table(title: str, rows: dict[str, str]) -> Table | None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if not rows:
        return None
    table = Table(title, "", box=SIMPLE_HEAD)
    for label, value in rows.items():
        table.add_row(str(label), value)
    return whole_words(table)


def _percentiles(title: str, columns: dict[str, dict[str, float]]) -> Table | None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    known = {name: values for name, values in columns.items() if values.get("known", 1) and values}
    if not known:
        return None
    table = Table(title, *known, box=SIMPLE_HEAD)
    for row in next(iter(known.values())):
        cells = (values[row] for values in known.values())
        table.add_row(row, *(f"{cell:.1%}" if row.startswith("share") else f"{cell:,}" for cell in cells))
    return whole_words(table)


def _counts(counts: dict[str, int]) -> dict[str, str]:
    return {name: f"{count:,}" for name, count in counts.items()}


def _bars(counts: dict[Any, int]) -> dict[str, str]:
    most = max(counts.values())
    return {
        str(name): f"{'█' * round(30 * count / most):30} {count:,}" for name, count in counts.items() if count
    }


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="t2i data inspect", description="What is in shards.")
    made.add_argument("shards", nargs="+", help="paths or URLs, braces allowed: data/{00000..00009}.tar")
    made.add_argument("--sheet", help="PNG with some samples and their captions")
    made.add_argument("--samples", type=int, default=64, help="on the sheet")
    made.add_argument("--seed", type=int, default=0, help="which samples are on the sheet")
    made.add_argument(
        "--text",
        metavar="NAME",
        help="count the tokens of captions for this text encoder, and the captions that it would cut: minilm, clip, "
        "clip_with_projection, "
        "open_clip, t5, learned, ldm_bert, with text.key=value as in the training command",
    )
    made.add_argument(
        "--parts",
        metavar="FOLDER",
        help="keep there what is found of each shard, and do not look at those again that are there",
    )
    made.add_argument("--json", help="all figures, and the first 100 samples with each flaw, by name")
    made.add_argument("--fast", action="store_true", help="read the pictures' headers, do not decode them")
    return made
