"""What `t2i train --help` says: the command's forms, and every group of conf/ with its choices."""

from __future__ import annotations

import textwrap
from importlib import resources
from pathlib import Path

USAGE = """\
usage: t2i train stage=NAME [group=choice ...] [key=value ...]

Trains one stage into runs/STAGE/NAME. Ctrl-C saves and stops; the same command with resume=latest goes on.

  t2i train stage=autoencoder
  t2i train stage=ldm resolution=512 trainer.batch_size=8
  t2i train stage=ldm experiment=sd-v1/256 data=shards 'data.shards=PATH/{00000..00099}.tar'
  t2i train experiment=sd-v1/256 cluster=a100x64 launch=slurm      submits a job; --dry-run prints its script

Groups and their choices (a group that a stage does not have is refused):
"""
ENDING = """
keys:     t2i train stage=ldm --cfg job      prints every key with its value, and trains nothing
several:  t2i train -m stage=ldm seed=0,1,2  trains one run for each value
yours:    --config-dir DIR                   looks for further choices in DIR/GROUP/CHOICE.yaml
"""


def groups() -> dict[str, list[str]]:
    """The choices of each group of conf/, the stage's first and the experiments' last."""
    conf = Path(str(resources.files("t2i_conf") / "train.yaml")).parent
    found: dict[str, list[str]] = {}
    for path in sorted(conf.glob("*/**/*.yaml")):
        group, _, choice = path.relative_to(conf).with_suffix("").as_posix().partition("/")
        found.setdefault(group, []).append(choice)
    found["resolution"].sort(key=int)
    return dict(
        sorted(found.items(), key=lambda each: (each[0] != "stage", each[0] == "experiment", each[0]))
    )


def help_text() -> str:
    """All of it, 110 columns wide."""
    width = max(map(len, groups()))
    lines = [
        textwrap.fill(
            ", ".join(choices),
            110,
            initial_indent=f"  {group:{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_on_hyphens=False,
        )
        for group, choices in groups().items()
    ]
    return USAGE + "\n".join(lines) + "\n" + ENDING
