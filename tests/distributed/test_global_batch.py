"""One command is the same training on 1 and on 2 processes, in one part and in several, by DDP and FSDP:
trainer.global_batch_size=8 as 1 x 8, 2 x 4 and 2 x 2 x 2, each small experiment, in float64."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import as_torchrun
import pytest

from t2i import families
from t2i.interfaces import Batch

FOLDER = Path(__file__).parents[2] / "conf" / "experiment"
SMALL = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("tiny_*.yaml"))
SHARED = [
    *("trainer.precision=64-true", "trainer.num_images=32", "trainer.global_batch_size=8"),
    *("trainer.accelerator=cpu", "optimizer.warmup_images=0", "name=run"),
]
WAYS = {
    f"{strategy} 2 x {parts}": [
        "trainer.devices=2",
        f"trainer.batch_size={size}",
        f"trainer.strategy={strategy}",
    ]
    for strategy in ("ddp", "full_shard", "shard_grad_op")
    for size, parts in ((4, "4"), (2, "2 x 2"))
}


# What is defined on the pictures that are looked at together: one process trains the same in as many micro-batches, of
# the pictures that all processes look at together, or of those that each of them looks at.
OVER_ALL = {
    "autoencoder/tiny_kl": "the adaptive weight is that of a micro-batch over all processes",
    "autoencoder/tiny_vq": "a codebook learns in each forward pass, from its micro-batch over all processes",
    "autoencoder/tiny_fsq": "the perplexity that is logged is that of a micro-batch's codes over all processes",
}
OF_A_PROCESS = {
    "gan_int_cls/tiny_published": "wrong captions and batch norm's statistics are those of a process's micro-batch",
    "gan_int_cls/tiny_r1": "wrong captions and batch norm's statistics are those of a process's micro-batch",
    "pixel_diffusion/tiny_linear_x0_classifier": "a process's micro-batch tells its captions from one another",
}
# Kinds that the small experiments have not. Of codecs: in a transformer's code no two places are alike: of codes that
# are the same vector rounding would choose one.
VIT = ["experiment=autoencoder/tiny_kl", "~backbone.depth", "~backbone.width", "backbone=vit"]
COSINE = ["codec=vq", "codec.num_codes=32", "codec.normalize=true", "codec.entropy_weight=0.1"]
CODECS = {
    "vq by cosine, entropy loss": [*VIT, *COSINE, "codec.entropy_temperature=1", "ema=short"],
    "lfq, R1": [*VIT, "codec=lfq", "codec.entropy_temperature=1", "adversarial=maskgit"],
    "gumbel, DALL-E's networks": [
        *("experiment=autoencoder/tiny_kl", "~backbone.depth", "backbone=dvae"),
        *("codec=gumbel", "codec.num_codes=32"),
    ],
    "lfq, DALL-E's networks": [
        *("experiment=autoencoder/tiny_kl", "~backbone.depth", "backbone=dvae", "codec=lfq"),
    ],
    "fsq, DALL-E's networks": [
        *("experiment=autoencoder/tiny_kl", "~backbone.depth", "backbone=dvae", "codec=fsq"),
    ],
    "fsq, ViT": [*VIT, "codec=fsq"],
    "gumbel, ViT": [*VIT, "codec=gumbel", "codec.num_codes=32"],
    "gumbel, patches": ["experiment=autoencoder/tiny_kl", "codec=gumbel", "codec.num_codes=32"],
}
AR, MASKED = "experiment=autoregressive/tiny_ar", "experiment=masked/tiny_masked"
MODELS_OF_CODES = {
    "MaskGIT": [MASKED, "transformer=maskgit", "transformer.dropout=0.0"],
    "U-ViT": [
        *(MASKED, "transformer=uvit", "transformer.hidden=64", "transformer.channels=16"),
        *("transformer.conv_blocks=1", "transformer.conv_heads=2", "transformer.embedding_dim=16"),
    ],
    "DALL-E": [
        AR,
        "text=minilm",
        "text.max_tokens=8",
        "transformer.conditioning=words",
        "transformer.attention=axial",
    ],
    "palette": [AR, "builds_on=null", "palette=16", "transformer.code_vectors=false"],
}
OTHERS = CODECS | MODELS_OF_CODES
OVER_ALL |= dict.fromkeys(CODECS, "codebook, entropies and adaptive weight are those of a micro-batch")
NO_MEANS = (
    "images_per_second",
    "data_wait",
    "psnr_db",
)  # over pictures: a clock's, and a logarithm of a mean


def losses(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value and name not in NO_MEANS}
            for row in csv.DictReader(file)
        ]


def worker(
    rank: int, ports: list[int], arguments: dict[str, list[str]], shards: list[str], folder: str
) -> None:
    """Trains each of the `arguments`, and writes the losses of each."""
    found = {}
    for port, (name, overrides) in zip(ports, arguments.items(), strict=True):
        runs_dir = f"runs_dir={folder}/{name.replace('/', '_').replace(' ', '')}"
        typed = [*shards, "logger.tensorboard=false", *SHARED, *overrides, runs_dir]
        found[name] = losses(as_torchrun.train(rank, port, typed))
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(found))


def arguments_of(name: str, compose_run, tiny_vq: Path) -> list[str]:
    typed = OTHERS.get(name, [f"experiment={name}"])
    builds_on = () if "builds_on=null" in typed else families.get(compose_run(*typed).family).builds_on
    return [*typed, *(f"builds_on.{key}={tiny_vq}" for key in builds_on)]


@pytest.fixture(scope="module")
def of_two(
    compose_run, tiny_vq, shapes_overrides, tmp_path_factory
) -> Callable[[str], dict[str, list[dict[str, float]]]]:
    @cache
    def of_two(name: str) -> dict[str, list[dict[str, float]]]:
        """By way."""
        folder = tmp_path_factory.mktemp("two")
        asked = {way: [*arguments_of(name, compose_run, tiny_vq), *WAYS[way]] for way in WAYS}
        ports = as_torchrun.free_ports(len(asked))
        as_torchrun.together(worker, (ports, asked, shapes_overrides, str(folder)))
        return json.loads((folder / "losses.json").read_text())

    return of_two


def as_dealt(batch: Batch, parts: int) -> list[Batch]:
    """In micro-batches as two processes have them, which take every second picture each: first those of the one."""
    return split(batch.rows([*range(0, len(batch), 2), *range(1, len(batch), 2)]), parts)


split = Batch.split


@pytest.fixture(scope="module")
def of_one(
    compose_run, train, tiny_vq, tmp_path_factory
) -> Callable[[str, int, bool], list[dict[str, float]]]:
    @cache
    def of_one(name: str, batch_size: int, dealt: bool) -> list[dict[str, float]]:
        """batch_size: of a micro-batch; dealt: as to two processes"""
        typed = [*SHARED, f"trainer.batch_size={batch_size}", f"runs_dir={tmp_path_factory.mktemp('one')}"]
        with pytest.MonkeyPatch.context() as patch:
            if dealt:
                patch.setattr(Batch, "split", as_dealt)
            return losses(train(compose_run(*arguments_of(name, compose_run, tiny_vq), *typed)).folder)

    return of_one


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*SMALL, *OTHERS])
def test_the_same_losses(name, way, of_one, of_two):
    of_a_process = 4 if way.endswith("2 x 4") else 2
    together = of_a_process if name in OF_A_PROCESS else 2 * of_a_process if name in OVER_ALL else 8
    one = of_one(name, together, name in OF_A_PROCESS)
    assert [row["images"] for row in one] == [8, 16, 24, 32]
    for expected, row in zip(one, of_two(name)[way], strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-12)
