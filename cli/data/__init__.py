"""`t2i data JOB ...`: finds the job's file and calls it, as cli/main.py does for verbs."""

from __future__ import annotations

import importlib

from t2i.errors import ConfigError

from ..arguments import add_launch, launch_of

JOBS = {
    "make": "an embedded source: t2i data make emoji|shapes",
    "pack": "pictures of your own to shards: t2i data pack FOLDER|TABLE OUT",
    "download": "a table of URLs to shards: t2i data download TABLE OUT",
    "filter": "keep what a preset or an expression says: t2i data filter SHARDS|TABLE OUT",
    "dedup": "find pictures that are nearly the same: t2i data dedup SHARDS OUT",
    "score": "aesthetic, watermark, NSFW and CLIP columns: t2i data score SHARDS",
    "encode": "latents and text features ahead of training: t2i data encode stage=ldm data=... OUT",
    "inspect": "what is in shards, as a table and a contact sheet: t2i data inspect SHARDS",
    "index": "where each sample lies, for an instant start: t2i data index SHARDS",
}


def run(arguments: list[str]) -> None:
    """Calls the job that the first argument names with the others. Raises ConfigError where there is none."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: t2i data JOB ...    (t2i data JOB --help says more)\n")
        for job, text in JOBS.items():
            print(f"  {job:8} {text}")
        print(
            "\nWith cluster=NAME launch=slurm [--config-dir DIR] [--dry-run] it is a job of SLURM (docs/clusters.md)."
        )
        return
    if arguments[0] not in JOBS:
        raise ConfigError(f"{arguments[0]!r} is not a job; allowed: {', '.join(JOBS)}.")
    module = importlib.import_module(f"t2i_cli.data.{arguments[0]}")
    parser = module.parser()
    add_launch(parser)
    launch, words = launch_of(parser, arguments[1:])
    if launch is None:
        module.run(words)
        return
    from ..submit import submit_data

    submit_data(arguments[0], words, launch)
