"""Runs as jobs of SLURM: the script that sbatch takes, and what of the cluster's configuration goes into it."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from t2i.errors import UserError
from t2i.launch import outcome
from t2i.schema import check

NAMED = ("partition", "account", "time", "constraint")  # options that have a key of their own
OWN = {
    "array",
    "cpus-per-task",
    "gpus-per-node",
    "job-name",
    "nodes",
    "ntasks-per-node",
    "open-mode",
    "output",
}
OWN |= {"requeue", "no-requeue", "signal", "wait", *NAMED}
SBATCH_TIMEOUT_S = 120


@dataclass(frozen=True)
class SlurmConfig:
    """What a cluster's SLURM wants to be told: cluster.slurm, whose defaults are in conf/launch/slurm.yaml.

    partition, account, time, constraint: as sbatch has them; null leaves them to the cluster
    signal_s: so long before its time is over a job saves, stops and is put into the queue again
    setup: lines of the script before the run, such as "module load cuda"
    srun: further words for srun, such as "--container-image=IMAGE" (enroot and pyxis)
    run_in: words before the command of each process, such as "apptainer exec --nv IMAGE"
    sbatch: further #SBATCH keys with their values, such as {qos: high}; '' where there is none, as for exclusive
    """

    partition: str | None
    account: str | None
    time: str | None
    constraint: str | None
    signal_s: int
    setup: list[str]
    srun: str | None
    run_in: str | None
    sbatch: dict[str, str | int]

    def __post_init__(self) -> None:
        check(
            1 <= self.signal_s < 2**16, "cluster.slurm.signal_s", self.signal_s, "1 to 65535, as SLURM has it"
        )
        for key, value in (self.named() | self.sbatch).items():
            check("\n" not in str(value), f"cluster.slurm.{key}", value, "one line")
        for key, value in self.named().items():
            check(str(value).strip() != "", f"cluster.slurm.{key}", value, "text, or null")
        for key in ("srun", "run_in"):
            check(_are_words(getattr(self, key)), f"cluster.slurm.{key}", getattr(self, key), "closed quotes")
        if self.time is not None:
            time_s, allowed = (
                seconds_of(self.time),
                f"more than the {self.signal_s} s of cluster.slurm.signal_s",
            )
            check(time_s > self.signal_s, "cluster.slurm.time", self.time, allowed)
        for key in self.sbatch:
            name = f"cluster.slurm.sbatch.{key}"
            check(
                re.fullmatch(r"[a-z][a-z-]*", key) is not None, name, key, "an option of sbatch, without --"
            )
            # sbatch takes the beginning of an option for the whole.
            own = any(each.startswith(key) for each in OWN)
            check(not own, name, key, "options that t2i does not set itself")

    def named(self) -> dict[str, str | int]:
        """Of the options that have a key of their own, those that are given."""
        given = {key: getattr(self, key) for key in NAMED}
        return {key: value for key, value in given.items() if value is not None}


def seconds_of(time: str) -> float:
    """Of a limit as sbatch has it: minutes, minutes:seconds, hours:minutes:seconds, or days-hours and what of these
    follows. Raises ConfigError."""
    if time.lower() in ("0", "infinite", "unlimited"):
        return math.inf
    allowed = "null, MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS"
    check(
        re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time) is not None,
        "cluster.slurm.time",
        time,
        allowed,
    )
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


def _are_words(text: str | None) -> bool:
    try:
        shlex.split(text or "")
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Machines:
    """nodes of the job; processes on each, one per GPU; cores for each; gpus: whether it needs them"""

    nodes: int
    processes: int
    cores: int
    gpus: bool


@dataclass(frozen=True)
class Task:
    """One run. folder: its run folder, absolute; arguments: of `t2i train`"""

    folder: Path
    arguments: Sequence[str]


def log_in(folder: Path, tasks: int) -> str:
    """What the processes of a job say, as sbatch has it: %j stands for its number, %A_%a for those of an array's tasks,
    and %% for % in the folder's name. Raises ConfigError for what no name of a log can have."""
    ok = not {"\n", "\\"} & set(str(folder))
    check(ok, "the folder of the log", str(folder), "names without line breaks and \\")
    return f"{str(folder).replace('%', '%%')}/{'%A_%a' if tasks > 1 else '%j'}.log"


def script(
    name: str, tasks: Sequence[Task], machines: Machines, slurm: SlurmConfig, cwd: Path, log: str
) -> str:
    """For sbatch: several tasks are an array. First start and every restart run the same lines.

    cwd: where the processes run; log: file of what they say, with sbatch's %j or %A_%a
    """
    lines = _head(name, len(tasks), machines, slurm, cwd, log, f"USR1@{slurm.signal_s}")
    lines.append('case "${SLURM_ARRAY_TASK_ID:-0}" in')
    for number, task in enumerate(tasks):
        lines.append(f"{number})")
        lines.append(f"    run={shlex.quote(str(task.folder))}")
        lines.append(f"    arguments=({shlex.join(task.arguments)})")
        lines.append("    ;;")
    command = f"{_command(slurm)} train"
    return "\n".join(lines) + REST.format(
        variable=outcome.VARIABLE, srun=_srun(machines, slurm), command=command
    )


def shared_script(
    name: str,
    parts: int,
    arguments: Sequence[str],
    machines: Machines,
    slurm: SlurmConfig,
    cwd: Path,
    log: str,
) -> str:
    """For sbatch: an array of so many parts of a command whose processes share among them what it makes. A part that is
    started again, as it is when its time is over, leaves out what is there. One part is the whole job.

    arguments: of `t2i`
    """
    lines = _head(name, parts, machines, slurm, cwd, log, f"B:USR1@{slurm.signal_s}")
    command = f"{_command(slurm)} {shlex.join(arguments)}"
    return "\n".join(lines) + SHARED.format(srun=_srun(machines, slurm), parts=parts, command=command)


def _head(
    name: str, tasks: int, machines: Machines, slurm: SlurmConfig, cwd: Path, log: str, signal: str
) -> list[str]:
    options: dict[str, object] = {
        "job-name": name,
        "nodes": machines.nodes,
        "ntasks-per-node": machines.processes,
        "cpus-per-task": machines.cores,
        "output": log,
        "open-mode": "append",
        "signal": signal,
    }
    if machines.gpus:
        options["gpus-per-node"] = machines.processes
    if tasks > 1:
        options["array"] = f"0-{tasks - 1}"
    options |= slurm.named() | slurm.sbatch
    return [
        "#!/bin/bash",
        *(f"#SBATCH --{key}{_option(value)}" for key, value in options.items()),
        *("#SBATCH --requeue", "", JOB, f"cd {shlex.quote(str(cwd))} || exit 1"),
        *slurm.setup,
        "set +eu +o pipefail  # what the lines above may have chosen",
    ]


def _srun(machines: Machines, slurm: SlurmConfig) -> str:
    more = shlex.split(slurm.srun or "")
    return shlex.join(["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={machines.cores}", *more])


def _command(slurm: SlurmConfig) -> str:
    return shlex.join([*shlex.split(slurm.run_in or ""), sys.executable, "-m", "t2i_cli.main"])


# The last part of an array has the array's own number as its SLURM_JOB_ID, by which all parts would be meant.
JOB = "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
SHARED = """
# The time is nearly over, or the job is pre-empted: what is not there then is for the next start.
trap 'echo "to be started again"; scontrol requeue "$job"' USR1
# Each process is one of all in the array.
{srun} bash -c '
    export WORLD_SIZE=$(({parts} * SLURM_NTASKS)) RANK=$((${{SLURM_ARRAY_TASK_ID:-0}} * SLURM_NTASKS + SLURM_PROCID))
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS
    trap "" USR1
    exec "$@"
' _ {command} &
wait $! || wait $!  # the first one ends with the signal, too
"""

REST = """
esac
# Where the processes of the run find one another.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export {variable}="$run/.outcome"
newest() {{ ls -d "$run"/checkpoints/step_*/complete.json 2>/dev/null | sort -V | tail -n 1; }}
mkdir -p "$run"
rm -f "${variable}"
before=$(newest)
trap '' USR1  # it is meant for the processes, which save and stop
{srun} {command} "${{arguments[@]}}"
status=$?
failed=$(grep -m 1 '^failed ' "${variable}" 2>/dev/null)
if [ $status -eq 0 ] && ! grep -q '^stopped ' "${variable}" 2>/dev/null; then exit 0; fi
# Started again: what was stopped; what failed after it had come further; and once, what ended without saying why.
if [ $status -eq 0 ] || [ "$(newest)" != "$before" ] || [ -z "$failed" -a "${{SLURM_RESTART_COUNT:-0}}" -eq 0 ]; then
    echo "to be started again (${{failed:-exit state $status}})"
    scontrol requeue "$job" && exit 0
fi
echo "${{failed:-exit state $status}}"
exit 1
"""


def submit(script: Path, after: str | None = None) -> str:
    """The number of the job. after: the number of one that has to end well before it; where that fails, this one ends
    too. Raises UserError with what sbatch said."""
    waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *waits, str(script)],
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=SBATCH_TIMEOUT_S,
        )
    except FileNotFoundError as error:
        raise UserError(
            "launch=slurm needs sbatch, which is not on this machine; allowed: a login node of the cluster, or "
            "--dry-run, which prints the script."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"sbatch did not answer within {SBATCH_TIMEOUT_S} s.") from error
    if done.returncode:
        said = re.sub(r"(?m)^sbatch: (error|fatal): ", "", done.stderr)
        lines = list(filter(None, map(str.strip, said.splitlines())))
        raise UserError(
            f"sbatch refused {script}: {'; '.join(lines) or f'exit state {done.returncode}, without a word'}"
        )
    answer = next(reversed(done.stdout.split()), "").partition(";")[0]  # the cluster's name may follow
    if not answer.isdecimal():
        raise UserError(
            f"sbatch said {done.stdout.strip()!r} of {script}; allowed: the job's number, as with --parsable. Whether "
            "it was submitted, squeue tells."
        )
    return answer


def _option(value: object) -> str:
    """With its value as sbatch reads it, where a backslash is one within quotation marks too."""
    text = str(value).replace("\\", "\\\\")
    quoted = shlex.quote(text) if re.search(r"[\s#'\"]", text) else text
    return f"={quoted}" if text else ""
