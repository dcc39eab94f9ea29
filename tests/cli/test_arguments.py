"""Command lines that ask for a job of SLURM: what is the job's and what is the command's."""

import argparse
import shlex

import pytest

from t2i.errors import ConfigError
from t2i_cli.arguments import Launch, add_launch, launch_of

SLURM = ("cluster=a100x64", "launch=slurm")


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--prompt")
    made.add_argument("--compile", action="store_true")
    made.add_argument("-n", "--count")
    add_launch(made)
    return made


@pytest.mark.parametrize(
    ("line", "others"),
    [
        ("--prompt launch=slurm", "--prompt launch=slurm"),
        ("--prompt=launch=slurm", "--prompt=launch=slurm"),
        ("--pro launch=slurm", "--pro launch=slurm"),
        ("--prompt cluster=a100x64 steps=4", "--prompt cluster=a100x64 steps=4"),
        ("--prompt 'launch=a rocket, --dry-run'", "--prompt 'launch=a rocket, --dry-run'"),
        ("--prompt 'a = b'", "--prompt 'a = b'"),
        ("--prompt ''", "--prompt ''"),
        ("-n launch=slurm", "-n launch=slurm"),
        ("--unknown x", "--unknown x"),
        ("--compile cluster.slurm.time=1 x", "--compile x"),
        ("cluster.tar launch cluster", "cluster.tar launch cluster"),
        ("shards/cluster=a.tar mylaunch=slurm", "shards/cluster=a.tar mylaunch=slurm"),
        ("--launch x", "--launch x"),
        ("--launch=slurm x", "--launch=slurm x"),
        ("x -- launch=slurm --dry-run", "x -- launch=slurm --dry-run"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_a_flag_s_value_is_not_the_job_s(parser, line, others, first):
    words = shlex.split(line)
    if "--" in words and not first:
        return  # all that comes after is the command's
    launch, rest = launch_of(parser, [*SLURM, *words] if first else [*words, *SLURM])
    given = ["cluster.slurm.time=1"] if "cluster.slurm.time=1" in words else []
    assert launch is not None
    assert sorted(launch.words) == sorted([*SLURM, *given])
    assert rest == shlex.split(others)
    assert (launch.dry_run, launch.config_dir) == (False, None)


@pytest.mark.parametrize(
    "flags", ["--dry-run --config-dir my/conf", "--dry -cd my/conf", "--config-dir=my/conf --dry-run"]
)
def test_flags_of_the_job(parser, flags):
    launch, rest = launch_of(parser, ["--prompt", "x", *shlex.split(flags), *SLURM, "steps=4"])
    assert launch == Launch(list(SLURM), True, "my/conf")
    assert rest == ["--prompt", "x", "steps=4"]
    with pytest.raises(ConfigError, match="--dry-run is True; allowed: only with launch=slurm"):
        launch_of(parser, ["--dry-run", "x"])
    with pytest.raises(ConfigError, match="--config-dir is 'a'; allowed: only with launch=slurm"):
        launch_of(parser, ["x", "-cd", "a"])
    assert launch_of(parser, ["x", "steps=4"]) == (None, ["x", "steps=4"])
