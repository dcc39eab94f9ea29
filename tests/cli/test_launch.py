"""`t2i train ... launch=slurm` and `t2i jobs`, with programs in the place of SLURM's."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from two_nodes import TWO_NODES

RUN = ("experiment=autoencoder/tiny_kl", "trainer.precision=bf16-mixed")
SLURM = (*RUN, "trainer.accelerator=gpu", "cluster=a100x64", "launch=slurm")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts shell scripts first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(**scripts: str) -> None:
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(stat.S_IRWXU)

    return put


def test_a_dry_run_prints_the_script_and_leaves_nothing(t2i, shapes_overrides):
    outcome = t2i("train", *SLURM, *shapes_overrides, "name=a", "--dry-run", "cluster.slurm.partition=gpu")
    assert outcome.code == 0, outcome
    assert outcome.out.startswith("#!/bin/bash\n#SBATCH --job-name=t2i-autoencoder\n#SBATCH --nodes=8\n")
    assert "#SBATCH --ntasks-per-node=8\n" in outcome.out
    assert "#SBATCH --partition=gpu\n" in outcome.out
    (line,) = (line for line in outcome.out.splitlines() if "arguments=(" in line)
    assert line.endswith("name=a resume=auto)")
    assert list(Path().iterdir()) == []


def test_a_submission_names_job_script_and_log_and_makes_the_folder(t2i, shapes_overrides, programs):
    programs(sbatch='[ "$1" = --parsable ] && cat "$2" > got && echo "4711;cluster"')
    outcome = t2i("train", *SLURM, *shapes_overrides, "name=a")
    assert outcome.code == 0, outcome
    here = Path.cwd()
    assert outcome.out.splitlines() == [
        f"Job 4711: {here}/runs/autoencoder/a, log {here}/runs/slurm/a/4711.log",
        f"Script: {here}/runs/slurm/a/job.sh. `t2i jobs` shows how it goes on.",
    ]
    assert Path("got").read_text() == Path("runs/slurm/a/job.sh").read_text()
    again = t2i("train", *SLURM, *shapes_overrides, "name=a")  # another run, as without launch=slurm
    assert "runs/autoencoder/a-2" in again.out
    assert "name=a-2 resume=auto" in Path("got").read_text()


@pytest.fixture
def composed(monkeypatch) -> list[str]:
    """The last override of each job of a sweep that Hydra composes."""
    seen, compose = [], ConfigLoaderImpl.load_sweep_config

    def counted(self, config, overrides):
        seen.append(overrides[-1])
        return compose(self, config, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    return seen


def test_a_sweep_on_this_machine_composes_all_its_jobs_first_and_each_once(
    t2i, shapes_overrides, composed, monkeypatch
):
    trained = []
    monkeypatch.setattr(
        "t2i_cli.train.train", lambda values, _: trained.append((values["seed"], len(composed)))
    )
    for i in range(2):  # nothing is kept for the next sweep
        composed.clear()
        assert t2i("train", "-m", "stage=autoencoder", *shapes_overrides, f"seed={i},7,7").code == 0
        assert composed == [f"seed={i}", "seed=7"]
        assert trained == [(i, 2), (7, 2), (7, 2)]
        trained.clear()


def test_a_sweep_is_one_submission(t2i, shapes_overrides, programs, composed):
    """Each job is composed once."""
    programs(sbatch='cat "$2" >> got; echo 7')
    outcome = t2i("train", "-m", *SLURM, *shapes_overrides, "name=s", "seed=0,1,2")
    assert outcome.code == 0, outcome
    said = [line.split(",")[0] for line in outcome.out.splitlines() if line.startswith("Job")]
    assert said == [f"Job 7_{i}: {Path.cwd()}/runs/autoencoder/s-{i}" for i in range(3)]
    text = Path("got").read_text()
    assert text.count("#SBATCH --array=0-2") == 1
    assert [f"seed={i} name=s-{i} resume=auto" in text for i in range(3)] == [True] * 3
    assert composed == ["seed=0", "seed=1", "seed=2"]


def test_of_a_sweep_nothing_is_submitted_where_one_job_cannot_be_composed(t2i, programs):
    programs(sbatch="touch submitted; echo 7")
    typed = ("stage=ldm", "cluster=h100x8", "launch=slurm", "experiment=sd-v1/256,sd-v1/521")
    assert "experiment is 'sd-v1/521'; allowed: " in t2i("train", "-m", *typed).sentence
    assert not Path("submitted").exists()


def test_a_sweep_over_names_keeps_them(t2i, shapes_overrides, programs):
    programs(sbatch="echo 7")
    outcome = t2i("train", "-m", *SLURM, *shapes_overrides, "name=a,b%j")
    said = [line for line in outcome.out.splitlines() if line.startswith("Job")]
    here = Path.cwd()
    assert said == [
        f"Job 7_{i}: {here}/runs/autoencoder/{name}, log {here}/runs/slurm/a/7_{i}.log"
        for i, name in enumerate(("a", "b%j"))
    ]
    both = t2i("train", "-m", *SLURM, *shapes_overrides, "name=c,d", "seed=0,1", "--dry-run").out
    assert [f"name={name} resume=auto" in both for name in ("c-0", "c-1", "d-2", "d-3")] == [True] * 4


@pytest.mark.parametrize("program", ["exit 0", "kill -INT $PPID; sleep 5"])
def test_folders_of_what_was_not_submitted_are_removed(t2i, shapes_overrides, programs, program):
    programs(sbatch=program)
    assert t2i("train", "-m", *SLURM, *shapes_overrides, "name=s", "seed=0,1").code
    assert list(Path("runs/autoencoder").iterdir()) == []


def test_a_job_that_builds_on_a_codec_that_is_not_there_is_refused(t2i):
    words = ("stage=ldm", "text=learned", "cluster=a100x8", "launch=slurm", "--dry-run", "data=shards")
    more = ("data.shards=a.tar", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed")
    assert "builds on a codec, and there is none in runs/autoencoder" in t2i("train", *words, *more).sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((*RUN, "launch=slurm"), "launch=slurm needs cluster=NAME"),
        ((*RUN, "--dry-run"), "launch is 'local'; allowed: slurm, with --dry-run."),
        ((*RUN, "launch=ray"), "launch/ray does not exist; allowed for launch: local, slurm."),
        ((*RUN, "cluster=a100x64"), "cluster is 'that of 8 nodes'; allowed: that of 1 node, launch=slurm"),
        ((*SLURM, "cluster.slurm.partitions=x"), "partitions is not a known key"),
        ((*SLURM, "cluster.slurm=null"), "cluster.slurm is null; allowed: a mapping, or left out."),
        ((*SLURM, "cluster.gpus_per_node=0"), "cluster.gpus_per_node is 0; allowed: 1 or more."),
        ((*SLURM, "cluster.memory_gib=0.00001"), "does not fit into the 1e-05 GiB of cluster.memory_gib"),
        ((*SLURM, "trainer.batch_size=0"), "trainer.batch_size is 0"),
        (SLURM, "launch=slurm needs sbatch, which is not on this machine"),
        ((*RUN, "resume=auto"), "resume is 'auto'; allowed: that with name=NAME"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_before_anything_is_submitted(
    t2i, shapes_overrides, programs, monkeypatch, tmp_path, arguments, sentence
):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert sentence in t2i("train", *arguments, *shapes_overrides).sentence
    assert list(Path().rglob("config.yaml")) == []
    assert list(Path("runs/autoencoder").glob("*")) == []


def test_a_refused_submission_leaves_the_latest_run_as_it_was(t2i, shapes_overrides, programs):
    programs(sbatch="echo sbatch: error: no >&2; exit 1")
    trained = Path("runs/autoencoder/trained")
    trained.mkdir(parents=True)
    (trained / "metrics.csv").touch()
    Path("runs/autoencoder/latest").symlink_to("trained")
    assert "sbatch refused" in t2i("train", "-m", *SLURM, *shapes_overrides, "seed=0,1").sentence
    assert Path("runs/autoencoder/latest").readlink() == Path("trained")
    assert {path.name for path in trained.parent.iterdir()} == {"trained", "latest"}


def test_jobs_are_listed_and_cancelled(t2i, programs):
    assert "No run in runs has a job" in t2i("jobs").out
    for name, job in (("a", "7"), ("b", "8_0"), ("c", "9")):
        folder = Path("runs/ldm") / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "slurm.json").write_text(json.dumps({"job": job, "script": "s", "log": "l"}))
    Path("runs/ldm/latest").symlink_to("a")
    Path("runs/ldm/a/metrics.csv").write_text("images,images_per_second,loss\n10,1.5,0.3\n12000,2.5,0.25\n")
    Path("runs/ldm/a/checkpoints/step_000100.ckpt").touch()
    programs(
        squeue="echo '7|RUNNING|n[1-2]'; echo '8_0|PENDING|(Resources)'; echo '10|RUNNING|n3'",
        sacct="exit 1",
        scancel='echo "$@" > cancelled',
    )
    lines = [" ".join(line.split()) for line in t2i("jobs").out.splitlines()]
    assert lines[1:] == [
        "ldm/a 7 RUNNING on n[1-2] 12,000 2.5 0.2500 step_000100, 0 min ago",
        "ldm/b 8_0 PENDING (Resources) - - - -",
        "ldm/c 9 ended, not complete - - - -",
    ]
    assert t2i("jobs", "cancel", "runs/ldm/b").out == "Job 8_0 of runs/ldm/b is cancelled.\n"
    assert Path("cancelled").read_text() == "8_0\n"
    assert "runs/ldm/x has no job" in t2i("jobs", "cancel", "runs/ldm/x").sentence
    for state, said in {
        "COMPLETED": "has ended before: COMPLETED.",
        "CANCELLED by 1000": "has ended before: CANCELLED by 1000.",
        "COMPLETING": "is cancelled.",
        "REQUEUED": "is cancelled.",
    }.items():
        programs(squeue="exit 0", sacct=f"echo '9|{state}'", scancel='echo "$@" >> cancelled')
        assert t2i("jobs", "cancel", "runs/ldm/c").out == f"Job 9 of runs/ldm/c {said}\n"
    assert Path("cancelled").read_text() == "8_0\n9\n9\n"
    programs(squeue="echo no controller >&2; exit 1")
    assert t2i("jobs").sentence == "t2i jobs: squeue refused: no controller"


def test_answers_and_files_that_cannot_be_read(t2i, programs):
    for name in ("a", "b"):
        (Path("runs/ldm") / name).mkdir(parents=True)
        (Path("runs/ldm") / name / "slurm.json").write_text(f'{{"job": "7_{name}"}}')
    Path("runs/ldm/a/metrics.csv").write_bytes(b"images,loss\n\xff,1\n" + b"12,0.5\n" * 20_000 + b"\0,0.25")
    Path("runs/ldm/b/metrics.csv").write_bytes(b"images,loss\n1," + b"9" * 200_000 + b"\n")
    Path("runs/ldm/c").mkdir()
    Path("runs/ldm/c/slurm.json").write_bytes(b"\xff[")
    programs(
        squeue="printf '7_a|NODE_FAIL|\\xff|x\\n7_[2-5%%2]|PENDING|(Resources)\\n'",
        sacct="echo '7_b|TIMEOUT'",
    )
    rows = [line.split() for line in t2i("jobs").out.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["ldm/a", "7_a", "NODE_FAIL"], ["ldm/b", "7_b", "TIMEOUT"]]
    assert rows[0][5] == "0.2500"
    for program in ("squeue", "sacct"):
        programs(squeue="exit 0", sacct="exit 0")
        programs(**{program: "echo rubbish"})
        assert f"{program} said 'rubbish'; allowed: lines with " in t2i("jobs").sentence
    programs(squeue="exit 2")
    assert t2i("jobs").sentence == "t2i jobs: squeue refused: exit state 2, without a word"


def test_one_that_cannot_be_cancelled_keeps_no_other(t2i, programs):
    for name in "ab":
        (Path("runs/ldm") / name).mkdir(parents=True)
        (Path("runs/ldm") / name / "slurm.json").write_text(f'{{"job": "{name}"}}')
    programs(
        squeue="exit 0",
        sacct="exit 0",
        scancel='[ "$1" = a ] && { echo no such job >&2; exit 1; }; echo "$1" >> cancelled',
    )
    outcome = t2i("jobs", "cancel", "runs/ldm/a", "runs/ldm/b")
    assert outcome.out == "Job b of runs/ldm/b is cancelled.\n"
    assert outcome.sentence == "t2i jobs: job a of runs/ldm/a: scancel refused: no such job"
    assert "runs/ldm/x has no job" in t2i("jobs", "cancel", "runs/ldm/b", "runs/ldm/x").sentence
    assert Path("cancelled").read_text() == "b\n"


def test_a_data_job_is_an_array_whose_processes_share_the_shards(t2i, programs):
    words = ("data", "score", "a b/{000..099}.tar", "--batch-size", "8", "cluster=a100x64")
    outcome = t2i(*words, "launch=slurm", "--dry-run", "cluster.slurm.partition=gpu")
    assert outcome.code == 0, outcome
    for line in ("--array=0-7", "--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in outcome.out
    assert "-m t2i_cli.main data score 'a b/{000..099}.tar' --batch-size 8 &\n" in outcome.out
    assert list(Path().iterdir()) == []
    # As the processes of the fourth part would see it.
    programs(srun='shift 2; SLURM_NTASKS=8 SLURM_PROCID=5 SLURM_LOCALID=5 exec "${@:1:4}" env')
    text = outcome.out.replace(f"cd {Path.cwd()}", "cd .")
    environment = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True)
    seen = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert (seen["RANK"], seen["WORLD_SIZE"], seen["LOCAL_RANK"], seen["LOCAL_WORLD_SIZE"]) == (
        "29",
        "64",
        "5",
        "8",
    )

    alone = t2i("data", "filter", "x.tar", "out", "cluster=a100x64", "launch=slurm", "--dry-run").out
    assert "--array" not in alone
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=48\n" in alone
    assert "needs cluster=NAME" in t2i("data", "index", "x.tar", "launch=slurm").sentence


def test_a_value_that_reads_like_the_job_s_stays(t2i):
    words = ("--prompt", "launch=slurm", "--checkpoint", "runs/ldm/a b", "cluster=a100x64", "launch=slurm")
    said = t2i("sample", *words, "--dry-run").out
    assert "sample --prompt launch=slurm --checkpoint 'runs/ldm/a b' &\n" in said
    words = ("cluster.tar", "--json", "launch=x.json", "--parts=p", "cluster=a100x64", "launch=slurm")
    said = t2i("data", "inspect", *words, "--dry-run").out
    assert "data inspect cluster.tar --json launch=x.json --parts=p &\n" in said
    assert (
        "--dry-run is True; allowed: only with launch=slurm"
        in t2i("data", "index", "x.tar", "--dry-run").sentence
    )


def test_drawing_is_an_array_whose_processes_share_the_pictures(t2i):
    words = ("sample", "--prompt", "a red circle", "--checkpoint", "runs/ldm/a", "sampling.steps=4")
    outcome = t2i(*words, "cluster=a100x64", "launch=slurm", "--dry-run", "cluster.slurm.partition=gpu")
    assert outcome.code == 0, outcome
    for line in ("--array=0-7", "--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in outcome.out
    command = "-m t2i_cli.main sample --prompt 'a red circle' --checkpoint runs/ldm/a sampling.steps=4"
    assert f"{command} &\n" in outcome.out
    assert list(Path().iterdir()) == []
    assert "no trained run" in t2i(*words[:3], "cluster=a100x64", "launch=slurm", "--dry-run").sentence
    assert "needs cluster=NAME" in t2i(*words, "launch=slurm").sentence
    assert "--dry-run" in t2i(*words, "--dry-run").sentence


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (("download", "table.parquet", "out"), False),
        (("index", "a/{000..099}.tar"), True),
        (("dedup", "a/{000..099}.tar", "kept.arrow"), True),
        (("inspect", "a/{000..099}.tar", "--json", "facts.json"), True),
    ],
)
def test_what_is_about_all_shards_is_a_second_job(t2i, programs, words, completed):
    launch = ("cluster=a100x64", "launch=slurm")
    scripts = t2i("data", *words, *launch, "--dry-run").out.split("#!/bin/bash\n")[1:]
    assert list(Path().iterdir()) == []
    assert len(scripts) == 1 + completed
    assert "#SBATCH --array=0-7\n" in scripts[0]  # a process for each node
    for script in scripts:
        assert "#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=48\n" in script
        assert "--gpus" not in script
    programs(sbatch='echo "$@" >> submitted; echo 7$(wc -l < submitted)', scancel='echo "$@" >> cancelled')
    said = t2i("data", *words, *launch).out
    submitted = Path("submitted").read_text().splitlines()
    assert len(submitted) == 1 + completed
    assert said.startswith("Job 71: 8 processes, log ")
    if not completed:
        return
    assert "--dependency=afterok:71 --kill-on-invalid-dep=yes" in submitted[1]
    assert "Job 72, after it" in said
    parts, whole = (Path(line.split()[-1]).read_text() for line in submitted)
    assert whole.splitlines()[-1] == parts.splitlines()[-1]  # the same command
    assert "WORLD_SIZE=$((8 * SLURM_NTASKS))" in parts
    assert "WORLD_SIZE=$((1 * SLURM_NTASKS))" in whole
    assert ("--parts" in whole) is (words[0] == "inspect")
    programs(sbatch='[[ "$*" == *afterok* ]] && { echo no such job >&2; exit 1; }; echo 73')
    assert "sbatch refused" in t2i("data", *words, *launch).sentence
    assert Path("cancelled").read_text() == "73\n"


CLUSTER = f"{TWO_NODES}cpu_cores_per_node: 3\nslurm: {{partition: big}}\n"


@pytest.mark.parametrize("verb", [("train", *RUN), ("data", "index", "x.tar")], ids=["train", "data"])
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (("memory_gib: 8.0\n", ""), "cluster.memory_gib is missing; it needs a value."),
        (("nodes: 2", "nodes: two"), "cluster.nodes is 'two'; allowed: a whole number."),
        (("nodes: 2", "nods: 2"), "cluster.nods is not a known key; did you mean cluster.nodes?"),
        (("gpu: none", "gpu: [none"), "cluster/ours.yaml, line "),
        (
            (CLUSTER, ""),
            "cluster/ours.yaml is {}; allowed: a mapping with the keys cpu_cores_per_node, gpu, ",
        ),
        (
            (CLUSTER, "- gpu"),
            "cluster/ours.yaml is ['gpu']; allowed: a mapping with the keys cpu_cores_per_node, ",
        ),
        (("{partition: big}", "[5]"), "cluster/ours.yaml is [5]; allowed: a mapping with the keys account, "),
        (("{partition: big}", "5"), "cluster.slurm is 5; allowed: a mapping."),
        (
            ("{partition: big}", "{setup: module load x}"),
            "cluster.slurm.setup is 'module load x'; allowed: a list.",
        ),
        (
            ("{partition: big}", "{time: 24:00:00}"),
            "cluster.slurm.time is 86400; allowed: text in quotation marks",
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_cluster_file_that_is_wrong_is_one_sentence(t2i, shapes_overrides, verb, wrong, sentence):
    Path("conf/cluster").mkdir(parents=True)
    Path("conf/cluster/ours.yaml").write_text(CLUSTER.replace(*wrong))
    data = shapes_overrides if verb[0] == "train" else ()  # else the emoji are made first
    outcome = t2i(*verb, *data, "--config-dir", "conf", "cluster=ours", "launch=slurm", "--dry-run")
    assert sentence in outcome.sentence


def test_a_data_job_on_a_cluster_of_ones_own(t2i, programs):
    Path("conf/cluster").mkdir(parents=True)
    Path("conf/cluster/ours.yaml").write_text(CLUSTER)
    words = ("data", "index", "x.tar", "--config-dir", "conf", "cluster=ours", "launch=slurm")
    said = t2i(*words, "--dry-run").out
    assert "#SBATCH --partition=big\n" in said
    assert "#SBATCH --cpus-per-task=3\n" in said
    assert "--config-dir" not in said  # it was about the cluster
    nowhere = t2i("data", "index", "x.tar", "--config-dir", "none", "cluster=ours", "launch=slurm").sentence
    assert "--config-dir is 'none'; allowed: an existing folder." in nowhere
    programs(sbatch="printf 'sbatch: error: no such thing\nsbatch: fatal: nor that\n' >&2; exit 1")
    refused = t2i(*words).sentence
    assert refused.startswith("t2i data index: sbatch refused ")
    assert refused.endswith(": no such thing; nor that")
