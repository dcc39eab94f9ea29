"""The script that sbatch gets, and what is refused before."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from t2i.errors import ConfigError, UserError
from t2i.launch import outcome, slurm
from t2i.launch.slurm import Machines, SlurmConfig, Task, script, shared_script
from t2i.schema import parse

DEFAULT = {
    **dict.fromkeys(("partition", "account", "time", "constraint", "srun", "run_in")),
    "signal_s": 120,
    "setup": [],
    "sbatch": {},
}
ONE = Task(Path("/runs/ldm/a b"), ["stage=ldm", "name='a b'", "data.shards=x/{00000..00004}.tar"])
MACHINES = Machines(nodes=8, processes=8, cores=6, gpus=True)


def configured(**values) -> SlurmConfig:
    return SlurmConfig(**{**DEFAULT, **values})


def made(tasks=(ONE,), config=None, machines=MACHINES) -> str:
    return script("t2i-ldm", tasks, machines, config or configured(), Path("/home/me"), "/runs/%j.log")


def options(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_what_sbatch_is_told():
    said = options(made())
    assert said == {
        "job-name": "t2i-ldm",
        "nodes": "8",
        "ntasks-per-node": "8",
        "cpus-per-task": "6",
        "gpus-per-node": "8",
        "output": "/runs/%j.log",
        "open-mode": "append",
        "signal": "USR1@120",
        "requeue": "",
    }
    config = configured(
        partition="gpu",
        account="me",
        time="24:00:00",
        constraint="a100&ib",
        signal_s=60,
        sbatch={"qos": "high", "comment": "it's"},
    )
    said = options(made([ONE, ONE, ONE], config, Machines(1, 2, 3, gpus=False)))
    assert "gpus-per-node" not in said
    assert (said["array"], said["signal"], said["constraint"]) == ("0-2", "USR1@60", "a100&ib")
    assert (said["partition"], said["account"], said["time"], said["qos"]) == (
        "gpu",
        "me",
        "24:00:00",
        "high",
    )


def test_the_processes_get_the_words_that_were_typed(tmp_path):
    """The script under bash, with programs in the place of SLURM's; in a container, too."""
    for name, text in {
        "srun": 'for word in "$@"; do printf "%s\\n" "$word"; done',
        "scontrol": "echo n1; echo n2",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    config = configured(
        setup=["export MORE='a module'"], srun="--container-image='my image'", run_in="apptainer exec x"
    )
    tasks = [ONE, Task(tmp_path / "run", ["stage=ldm", 'prompt=$HOME `ls` "it\'s"'])]
    text = script("t2i-ldm", tasks, MACHINES, config, tmp_path, "/runs/%A_%a.log")
    (tmp_path / "job.sh").write_text(text)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash", tmp_path / "job.sh"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.splitlines()
    assert words[:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=6", "--container-image=my image"]
    assert words[3:6] == ["apptainer", "exec", "x"]
    assert words[-5:] == ["-m", "t2i_cli.main", "train", "stage=ldm", 'prompt=$HOME `ls` "it\'s"']


@pytest.mark.parametrize(
    ("status", "said", "restarts", "comes_further", "again"),
    [
        (0, "", 0, False, None),
        (0, "stopped", 0, False, True),
        (1, "", 0, False, True),  # killed, or its machine died
        (1, "", 1, False, False),  # and again, without a step
        (1, "", 7, True, True),
        (1, "failed process 1 on n2: no such shard", 0, False, False),
        (1, "failed process 1 on n2: no such shard", 3, True, True),
    ],
)
def test_what_is_started_again(tmp_path, status, said, restarts, comes_further, again):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step_0000100").mkdir()
    (run / "checkpoints" / "step_0000100" / "complete.json").touch()
    further = (
        f"mkdir {run}/checkpoints/step_10000000; touch {run}/checkpoints/step_10000000/complete.json"
        if comes_further
        else ":"
    )
    for name, text in {
        "srun": f'{further}; [ -n "{said}" ] && echo "{said} " >> "$T2I_OUTCOME"; exit {status}',
        "scontrol": f'[ "$1" = requeue ] && echo "$2" > {tmp_path}/again; echo n1',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    (run / ".outcome").write_text("failed of an earlier start\n")
    text = made([Task(run, [])], configured(setup=["set -euo pipefail"])).replace(
        "cd /home/me", f"cd {tmp_path}"
    )
    (tmp_path / "job.sh").write_text(text)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(["bash", tmp_path / "job.sh"], env=environment, capture_output=True, text=True)
    assert (tmp_path / "again").exists() is bool(again)
    if again:
        assert (tmp_path / "again").read_text() == "7\n"
    assert done.returncode == (1 if again is False else 0), done.stdout + done.stderr
    if again is False and said:
        assert said in done.stdout.splitlines()[-1]  # the last line of the log says why


def test_a_part_of_an_array_is_put_back_alone_when_its_time_is_over(tmp_path):
    """Its number is that of the array where it is the last one."""
    for name, text in {"srun": "kill -USR1 $PPID; sleep 0.3; exit 3", "scontrol": "echo $@ >> told"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    text = shared_script("t2i-sample", 2, ["sample"], MACHINES, configured(), tmp_path, "/runs/%A_%a.log")
    assert options(text)["signal"] == "B:USR1@120"  # to this script, not to the processes
    (tmp_path / "job.sh").write_text(text)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", tmp_path / "job.sh"], env=environment, capture_output=True, text=True)
    assert (tmp_path / "told").read_text() == "requeue 7_1\n"
    assert (done.returncode, done.stdout) == (3, "to be started again\n")  # srun was waited for


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"partitions": "x"},
            "cluster.slurm.partitions is not a known key; did you mean cluster.slurm.partition?",
        ),
        (
            {"sbatch": {"nodes": 3}},
            "cluster.slurm.sbatch.nodes is 'nodes'; allowed: options that t2i does not set",
        ),
        ({"sbatch": {"--qos": "x"}}, "an option of sbatch, without --"),
        ({"partition": "a\nb"}, "allowed: one line"),
        ({"signal_s": 0}, "1 to 65535"),
        ({"signal_s": 65536}, "1 to 65535"),
        ({"partition": " "}, "cluster.slurm.partition is ' '; allowed: text, or null."),
        ({"time": "tomorrow"}, "cluster.slurm.time is 'tomorrow'; allowed: null, MINUTES, "),
        ({"time": "2"}, "cluster.slurm.time is '2'; allowed: more than the 120 s of cluster.slurm.signal_s."),
        ({"srun": "--comment='a"}, 'cluster.slurm.srun is "--comment=\'a"; allowed: closed quotes.'),
        ({"run_in": 'in "a'}, "allowed: closed quotes"),
        (
            {"sbatch": {"ntasks": 3}},
            "allowed: options that t2i does not set",
        ),  # --ntasks-per-node's beginning
        ({"sbatch": {"wait": ""}}, "allowed: options that t2i does not set"),
    ],
)
def test_configuration_that_is_refused(values, sentence):
    with pytest.raises(ConfigError) as raised:
        parse(SlurmConfig, DEFAULT | values, "cluster.slurm.")
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("10:30", 630),
        ("24:00:00", 86_400),
        ("2-3", 183_600),
        ("2-3:04", 183_840),
        ("2-3:04:05", 183_845),
        ("0", float("inf")),
        ("UNLIMITED", float("inf")),
    ],
)
def test_limits_as_sbatch_reads_them(time, seconds):
    assert slurm.seconds_of(time) == seconds


def test_options_without_a_value_and_percent_signs_in_a_folder():
    config = configured(sbatch={"exclusive": "", "comment": r"a\b"})
    text = script("t2i-ldm", [ONE], MACHINES, config, Path("/"), slurm.log_in(Path("/runs/50%j"), 1))
    assert "#SBATCH --exclusive\n" in text
    assert options(text)["output"] == "/runs/50%%j/%j.log"
    assert options(text)["comment"] == r"a\\b"  # which sbatch 22.05 reads so within quotation marks, too
    for name in ("a\nb", r"a\b"):
        with pytest.raises(ConfigError, match="names without line breaks"):
            slurm.log_in(Path("/runs") / name, 2)


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("echo hello", "sbatch said 'hello' of .*; allowed: the job's number"),
        ("exit 0", "sbatch said '' of "),
        ("exit 3", "sbatch refused .*: exit state 3, without a word"),
        ("printf '\\xff' >&2; exit 1", r"sbatch refused .*: \\xff"),
    ],
)
def test_an_sbatch_that_does_not_answer_as_it_should(tmp_path, monkeypatch, program, sentence):
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\n{program}\n")
    (tmp_path / "sbatch").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=sentence):
        slurm.submit(tmp_path / "job.sh")
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho Welcome!\necho '77;here'\n")
    assert slurm.submit(tmp_path / "job.sh") == "77"


def test_sbatch_that_is_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="launch=slurm needs sbatch, which is not on this machine"):
        slurm.submit(tmp_path / "job.sh")


def test_what_a_job_cannot_be_told_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(outcome.VARIABLE, str(tmp_path / "run" / ".outcome"))
    outcome.tell(outcome.FAILED, "no such folder")
    (tmp_path / "run").mkdir()
    outcome.tell(outcome.FAILED, "no such shard")
    assert (tmp_path / "run" / ".outcome").read_text() == "failed no such shard\n"
