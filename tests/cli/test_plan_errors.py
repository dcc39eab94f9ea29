"""`t2i plan` prints a whole plan; a wrong one ends with 2 and one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2i import families

TINY = ("plan", "experiment=latent_diffusion/tiny_unet_eps", "trainer.precision=bf16-mixed")
PLANNED = (*TINY, "cluster=a100x8")

CASES = {
    "no cluster": (TINY, ("cluster is not given", "a100x8", "h100x64")),
    "unknown cluster": ((*TINY, "cluster=b200"), ("cluster/b200", "a100x64")),
    "unknown key of the cluster": ((*PLANNED, "cluster.gpus=4"), ("cluster.gpus",)),
    "added key of the cluster": ((*PLANNED, "+cluster.gpus=4"), ("cluster.gpus", "not a known key")),
    "impossible cluster": ((*PLANNED, "cluster.nodes=0"), ("cluster.nodes", "0", "1 or more")),
    "wrong type": ((*PLANNED, "cluster.memory_gib=much"), ("cluster.memory_gib", "'much'", "a number")),
    "unknown experiment": (
        ("plan", "experiment=sd", "cluster=a100x8"),
        ("experiment", "'sd'", "tiny_unet_eps"),
    ),
    "no stage": (("plan", "cluster=a100x8"), ("stage", "autoencoder", "ldm")),
    "wrong key of the run": ((*PLANNED, "trainer.batch_size=0"), ("trainer.batch_size", "0", "1 or more")),
    "unknown key of the run": ((*PLANNED, "trainer.foo=1"), ("trainer.foo", "not a known key")),
    "unknown autoencoder": (
        (*PLANNED, "--autoencoder", "autoencoder/kl"),
        ("experiment", "'autoencoder/kl'", "autoencoder/kl_f8"),
    ),
    "a run that is no autoencoder": (
        (*PLANNED, "--autoencoder", "latent_diffusion/tiny_dit_flow"),
        ("--autoencoder", "tiny_dit_flow", "stage autoencoder"),
    ),
    "an autoencoder for an autoencoder": (
        ("plan", "experiment=autoencoder/tiny_kl", "cluster=a100x8", "--autoencoder", "autoencoder/kl_f8"),
        ("--autoencoder", "'autoencoder/kl_f8'", "nothing"),
    ),
    "a low run for one that has none": (
        (*PLANNED, "--low", "masked/tiny_masked"),
        ("--low", "'masked/tiny_masked'", "nothing"),
    ),
    "a low run of another family": (
        ("plan", "stage=masked_sr", "cluster=a100x8", "--low", "autoregressive/tiny_ar"),
        ("--low", "'autoregressive/tiny_ar'", "stage masked"),
    ),
    "an unknown low run": (
        ("plan", "stage=masked_sr", "cluster=a100x8", "--low", "masked/huge"),
        ("experiment", "'masked/huge'", "masked/tiny_masked"),
    ),
    "what an autoencoder cannot read": (
        ("plan", "experiment=autoencoder/tiny_kl", "cluster=a100x8", "--cached", "latents"),
        ("--cached", "'latents'", "none"),
    ),
    "more steps than codes": (
        ("plan", "stage=masked", "cluster=a100x8", "resolution.size_px=32", "sampling.steps=65"),
        ("sampling.steps", "65", "at most 64, the codes of a picture"),
    ),
    "the codes of one resolution": (
        ("plan", "stage=masked_sr", "cluster=a100x8", "--cached", "codes"),
        ("--cached", "'codes'", "codes, low_codes, or none of them"),
    ),
    "size of the model": (
        (*PLANNED, "resolution.size_px=40"),
        ("resolution.size_px", "40", "multiples of 16"),
    ),
    "MFU above 1": ((*PLANNED, "--mfu", "25"), ("--mfu", "25", "up to 1")),
    "no rate": (
        (*PLANNED, "--images-per-second-per-gpu", "0"),
        ("--images-per-second-per-gpu", "more than 0"),
    ),
    "cached text that learns": ((*PLANNED, "--cached", "latents,text"), ("--cached", "'text'", "trained")),
    "sweep of something": ((*PLANNED, "--sweep", "gpus=8"), ("--sweep", "'gpus=8'", "nodes=")),
    "sweep of nothing": ((*PLANNED, "--sweep", "nodes=1,x"), ("--sweep", "nodes=1,x")),
    "sweep of too much": ((*PLANNED, "--sweep", f"nodes={10**20}"), ("--sweep", "1,000,000")),
    "a folder that is not there": (
        (*PLANNED, "--sweep", "nodes=1", "--out", "no/a.png"),
        ("--out", "no/a.png"),
    ),
    "not key=value": ((*PLANNED, "nonsense"), ("'nonsense'", "key=value")),
    "unknown flag": ((*PLANNED, "--colour=red"), ("'--colour=red'", "flag")),
    "own configuration absent": ((*PLANNED, "--config-dir", "nowhere"), ("--config-dir", "nowhere")),
}


@pytest.mark.parametrize(("arguments", "words"), CASES.values(), ids=CASES)
def test_one_sentence(t2i, arguments, words):
    sentence = t2i(*arguments).sentence
    assert sentence.startswith("t2i plan: ")
    for word in words:
        assert word in sentence
    assert list(Path().iterdir()) == []


def test_a_whole_plan(t2i):
    """It reads no data and writes no file; warnings come last."""
    result = t2i(*PLANNED, "--mfu", "0.5")
    assert (result.code, result.err) == (0, "")
    for word in (
        "denoiser",
        "SHARD_GRAD_OP",
        "activations, checkpointed",
        "8 x A100 80 GB",
        "50.0%",
        "export",
    ):
        assert word in result.out
    assert result.out.splitlines()[-1].startswith("Warning: The loaders give")
    assert list(Path().iterdir()) == []


def test_a_family_without_a_foreign_form_has_no_export(t2i):
    result = t2i("plan", "stage=ar", "text=learned", "cluster=h100x8")
    assert (result.code, result.err) == (0, "")
    assert "export" not in result.out


def test_a_cluster_says_of_slurm_what_it_wants(t2i):
    """The other keys of slurm: have defaults, as with launch=slurm."""
    result = t2i(*TINY, "cluster=a100x8", "+cluster.slurm.account=lab", "launch=local")
    assert (result.code, result.err) == (0, "")


def test_shards_need_not_be_named(t2i):
    result = t2i("plan", "stage=ldm", "text=learned", "data=shards", "cluster=a100x8", "data.num_workers=64")
    assert (result.code, result.err) == (0, "")


def test_the_run_at_a_lower_resolution_is_planned_too(t2i):
    result = t2i("plan", "stage=masked_sr", "text=learned", "cluster=h100x64")
    assert (result.code, result.err) == (0, "")
    assert "planned as stage=masked; --low names" in result.out
    drawn = result.out[result.out.index("Drawing") :]
    for name in ("low transformer", "low text encoder"):
        assert name in drawn
    assert "codes and low_codes" in result.out


def test_a_sweep_draws_its_curve(t2i):
    result = t2i(*PLANNED, "--sweep", "nodes=4,1", "--out", "curve.png")
    assert (result.code, result.err) == (0, "")
    rows = [line.split()[:2] for line in result.out.splitlines()]
    assert [row for row in rows if row and row[0].isdecimal()] == [["1", "8"], ["4", "32"]]
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_cluster_of_ones_own(t2i):
    Path("mine/cluster").mkdir(parents=True)
    Path("mine/cluster/attic.yaml").write_text(
        "{gpu: Old, peak_bf16_tflops: 1.0, memory_gib: 2.0, gpus_per_node: 2, nodes: 1, "
        "node_bandwidth_gbps: 10.0, usd_per_gpu_hour: 0.0, cpu_cores_per_node: 4, mfu: 0.1}"
    )
    result = t2i(*TINY, "cluster=attic", "cluster.nodes=3", "--config-dir", "mine")
    assert result.code == 0
    assert "6 x Old in 3 nodes" in result.out


CONF = Path(__file__).parents[2] / "conf" / "experiment"
FULL_SIZE = [
    path.relative_to(CONF).with_suffix("").as_posix()
    for path in sorted(CONF.glob("*/*.yaml"))
    if not path.stem.startswith("tiny")
]


@pytest.mark.parametrize("family", families.names())
def test_every_family_has_a_plan(t2i, family):
    experiment = min(path.stem for path in (CONF / family).glob("tiny*.yaml"))
    result = t2i("plan", f"experiment={family}/{experiment}", "cluster=a100x8")
    assert (result.code, result.err) == (0, "")
    assert "GPU-hours" in result.out
    made_ahead = "latents" in result.out or "codes" in result.out
    assert made_ahead == (families.get(family).builds_on != {})


@pytest.mark.slow
@pytest.mark.parametrize("experiment", FULL_SIZE)
def test_full_size_experiments(t2i, experiment):
    result = t2i("plan", f"experiment={experiment}", "cluster=a100x64")
    assert (result.code, result.err) == (0, "")
    assert "GPU-hours" in result.out
