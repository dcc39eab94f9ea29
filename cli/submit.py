"""`t2i train ... launch=slurm`: the runs of a command as one job, or one array."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.errors import ConfigError, UserError
from t2i.few import plural
from t2i.schema import check, parse

if TYPE_CHECKING:
    from t2i.config import RunConfig
    from t2i.launch.slurm import SlurmConfig
    from t2i.planning.config import ClusterConfig

    from .arguments import Launch

# Jobs of `t2i data` whose processes share the shards among them: a process for each GPU, or for each node, where it
# has processes of its own.
PER_GPU, PER_NODE = {"encode", "score"}, {"download", "dedup", "inspect", "index"}
# After the parts the same command, alone: it finds what they made, and decides what is about all shards.
COMPLETED = {"dedup", "inspect", "index"}
JOB = "slurm.json"  # in a run folder
GIB = 2**30


def submit(
    runs: list[tuple[RunConfig, dict[str, Any], list[str]]], config_dir: str | None, dry_run: bool
) -> None:
    """Prints the job's number, script and log; with dry_run the script alone, and nothing is submitted.

    runs: of each its configuration, the composed cluster, and the key=value that made them
    Raises UserError.
    """
    from t2i.launch import slurm
    from t2i.training import run_folder

    from .console import console

    first, values, _ = runs[0]
    cluster, options = _with_slurm(values)
    for config, each, _ in runs:
        check(each == values, "cluster", "several in one sweep", "one")
        _check_fits(on_cluster(config, cluster), cluster)
    began = time.strftime("%Y-%m-%d_%H-%M-%S")
    given = [config.name for config, _, _ in runs]
    place = Path(first.runs_dir).absolute() / "slurm" / (first.name or began)
    log = slurm.log_in(place, len(runs))
    machines = slurm.Machines(
        cluster.nodes,
        cluster.gpus_per_node,
        max(1, cluster.cpu_cores_per_node // cluster.gpus_per_node),
        cluster.has_gpus and any(config.trainer.accelerator != "cpu" for config, _, _ in runs),
    )
    flags = ["--config-dir", str(Path(config_dir).absolute())] if config_dir else []
    tasks = list[slurm.Task]()
    stages = {(config.runs_dir, config.stage) for config, _, _ in runs}
    latest = {Path(*each).absolute(): run_folder.latest_of(*each) for each in stages}
    try:
        for number, (config, _, overrides) in enumerate(runs):
            own = config.name or began
            name = own if given.count(config.name) == 1 else f"{own}-{number}"
            folder, more = _folder(config, name, dry_run)
            words = [each for each in overrides if each.partition("=")[0] not in ("name", "resume")]
            tasks.append(slurm.Task(folder, [*flags, *words, *more]))
        text = slurm.script(f"t2i-{first.stage}", tasks, machines, options, Path.cwd(), log)
        if dry_run:
            print(text, end="")
            return
        path, job = _submitted(text, place)
    except BaseException:  # Ctrl-C's too
        for task in () if dry_run else tasks:
            run_folder.remove_unused(task.folder, latest[task.folder.parent])
        raise
    for number, task in enumerate(tasks):
        one = f"{job}_{number}" if len(tasks) > 1 else job
        at = str(place / f"{one}.log")
        (task.folder / JOB).write_text(json.dumps({"job": one, "script": str(path), "log": at}) + "\n")
        console.print(f"Job {one}: {task.folder}, log {at}")
    console.print(f"Script: {path}. `t2i jobs` shows how it goes on.")


def submit_data(job: str, arguments: list[str], launch: Launch) -> None:
    """`t2i data JOB ... cluster=NAME launch=slurm`: a job whose processes share the shards among them is an array with
    a part for each node; any other is one process on one node. What has to be said of all shards together is a second
    job, which begins when all parts have ended well.

    arguments: that came after it, without what `launch` has
    Raises UserError.
    """
    from t2i.launch import queue, slurm

    from .composition import cluster_of_overrides
    from .console import console

    cluster, options = _with_slurm(cluster_of_overrides(launch.words, launch.config_dir))
    parts = cluster.nodes if job in PER_GPU | PER_NODE else 1
    processes = cluster.gpus_per_node if job in PER_GPU else 1
    cores = max(1, cluster.cpu_cores_per_node // processes)
    machines = slurm.Machines(1, processes, cores, gpus=job in PER_GPU and cluster.has_gpus)
    place = Path("runs").absolute() / "slurm" / f"data-{job}-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    has_parts = any(each.partition("=")[0] == "--parts" for each in arguments)
    if job == "inspect" and parts > 1 and not has_parts:
        arguments = [*arguments, "--parts", str(place / "parts")]

    def text(parts: int) -> str:
        log = slurm.log_in(place, parts)
        return slurm.shared_script(
            f"t2i-{job}", parts, ["data", job, *arguments], machines, options, Path.cwd(), log
        )

    completed = parts > 1 and job in COMPLETED
    if launch.dry_run:
        print(text(parts), end="")
        if completed:
            print("\n# After all parts of it: sbatch --dependency=afterok:JOB")
            print(text(1), end="")
        return
    path, number = _submitted(text(parts), place)
    named = f"{number}_%a" if parts > 1 else number
    console.print(
        f"Job {number}: {plural(parts * processes, 'process', 'processes')}, log {place}/{named}.log"
    )
    if completed:
        try:
            _, last = _submitted(text(1), place, "completes.sh", number)
        except UserError:
            queue.cancel(number)
            raise
        console.print(f"Job {last}, after it: what is about all shards, log {place}/{last}.log")
    console.print(f"Script: {path}")


def submit_shared(command: Sequence[str], arguments: Sequence[str], launch: Launch) -> None:
    """`t2i sample ... cluster=NAME launch=slurm`, and sweeps: an array with a part for each node, in which a process
    for each GPU takes its share.

    command: such as sample; arguments: that came after it, without what `launch` has
    Raises UserError.
    """
    from t2i.launch import slurm

    from .composition import cluster_of_overrides
    from .console import console

    cluster, own = _with_slurm(cluster_of_overrides(launch.words, launch.config_dir))
    parts, processes = cluster.nodes, cluster.gpus_per_node
    cores = max(1, cluster.cpu_cores_per_node // processes)
    machines = slurm.Machines(1, processes, cores, cluster.has_gpus)
    name = command[-1]
    place = Path("runs").absolute() / "slurm" / f"{name}-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    log = slurm.log_in(place, parts)
    text = slurm.shared_script(f"t2i-{name}", parts, [*command, *arguments], machines, own, Path.cwd(), log)
    if launch.dry_run:
        print(text, end="")
        return
    path, number = _submitted(text, place)
    console.print(f"Job {number}: {plural(parts * processes, 'process', 'processes')}, log {log}")
    console.print(f"Script: {path}")


def _with_slurm(values: dict[str, Any]) -> tuple[ClusterConfig, SlurmConfig]:
    """The cluster, and what its SLURM wants to be told. Raises ConfigError where none is given."""
    if not values:
        raise ConfigError("launch=slurm needs cluster=NAME, which says what machines there are.")
    cluster = cluster_of(values)
    if cluster.slurm is None:  # set so: launch=slurm has its defaults
        raise ConfigError("cluster.slurm is null; allowed: a mapping, or left out.")
    return cluster, cluster.slurm


def _submitted(text: str, place: Path, name: str = "job.sh", after: str | None = None) -> tuple[Path, str]:
    """The script, written into a folder, and its job's number. after: a job that has to end well before it. Raises
    UserError."""
    from t2i.launch import slurm

    place.mkdir(parents=True, exist_ok=True)
    path = place / name
    path.write_text(text)
    return path, slurm.submit(path, after)


def cluster_of(values: dict[str, Any]) -> ClusterConfig:
    """Raises ConfigError."""
    from t2i.planning.config import ClusterConfig

    limit = (values.get("slurm") or {}).get("time") if isinstance(values.get("slurm"), dict) else None
    allowed = 'text in quotation marks, such as "24:00:00", which YAML takes for a number without them'
    check(not isinstance(limit, int), "cluster.slurm.time", limit, allowed)
    return parse(ClusterConfig, values, "cluster.")


def on_cluster(config: RunConfig, cluster: ClusterConfig) -> RunConfig:
    """The run on all of the cluster's GPUs."""
    import dataclasses

    trainer = dataclasses.replace(config.trainer, devices=cluster.gpus_per_node, num_nodes=cluster.nodes)
    return dataclasses.replace(config, trainer=trainer)


def _check_fits(config: RunConfig, cluster: ClusterConfig) -> None:
    """Raises ConfigError where the plan says that the GPUs' memory is not enough."""
    if config.trainer.accelerator == "cpu" or not cluster.has_gpus:
        return
    from t2i.planning.fits import bytes_of_batch, what_fits
    from t2i.planning.model import build_model
    from t2i.planning.plan import USABLE_MEMORY

    from .train import built_on

    model = build_model(config, built_on(config))
    total_bytes = int(cluster.memory_gib * GIB)
    if bytes_of_batch(config, model, config.trainer.images_at_a_time) > USABLE_MEMORY * total_bytes:
        raise ConfigError(
            f"trainer.batch_size={config.trainer.batch_size} does not fit into the {cluster.memory_gib:g} GiB of "
            f"cluster.memory_gib: {what_fits(config, model, total_bytes)}"
        )


def _folder(config: RunConfig, name: str, dry_run: bool) -> tuple[Path, list[str]]:
    """A run's folder, absolute, and what its command says of it: the same folder at each start."""
    from t2i.training import run_folder

    from .composition import quoted

    if config.resume is not None and config.resume != "auto":
        folder = run_folder.resumed(config.runs_dir, config.stage, config.name, config.resume)
        assert folder is not None
        return folder.absolute(), [quoted(f"resume={folder.absolute()}")]
    if config.resume == "auto":
        folder = run_folder.named(config.runs_dir, config.stage, name)
        if not dry_run:
            folder.mkdir(parents=True, exist_ok=True)
    elif dry_run:
        folder = Path(config.runs_dir) / config.stage / name
    else:
        folder = run_folder.create(config.runs_dir, config.stage, name)
        run_folder.leave()
    return folder.absolute(), [quoted(f"name={folder.name}"), "resume=auto"]
