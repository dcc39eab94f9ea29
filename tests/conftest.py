"""Fixtures that several packages share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Three processes of pytest share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from t2i.config import RunConfig
    from t2i.training.fit import FitResult

# A shell starts what runs in its background with Ctrl-C ignored, and processes hand that on: tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
hypothesis.settings.register_profile("without_clock", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("without_clock")
# A process of pytest holds so much that looking through it at each turn takes 7% of the time.
gc.set_threshold(100_000, 50, 100)

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped, with the reason, where there is none. Those of a SLURM, which mostly wait,
    come first, so that the others fill their time."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is written to the cache of whoever runs the tests."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ |= {"XDG_CACHE_HOME": str(cache), "WANDB_CACHE_DIR": str(cache / "wandb")}


@pytest.fixture(scope="session")
def shapes_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of drawn scenes as shards: 64 to train on, 8 + 4 held out, 32 px."""
    from t2i_pipelines.sources import shapes

    folder = tmp_path_factory.mktemp("shapes") / "shards"
    shapes.build(folder, num_train=64, num_heldout_one=8, num_heldout_two=4, size_px=32)
    return folder


@pytest.fixture
def float64() -> Iterator[None]:
    """Weights and inputs are made in float64. What float32 rounds differs from processor to processor (vector length,
    number of threads, the library's choice of kernel): no tolerance fitted on one holds on all."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def shared_data() -> Path:
    """The real captioned shards beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("../shared/data is absent: the real captioned shards do not come with the repository")
    return SHARED_DATA


@pytest.fixture(scope="session")
def shapes_overrides(shapes_shards: Path) -> list[str]:
    """What is typed after `t2i train` to train on `shapes_shards`."""
    train, heldout = (sorted(shapes_shards.glob(f"{part}/*.tar")) for part in ("train", "heldout"))
    return [
        "data.source=null",
        f"data.shards=[{','.join(map(str, train))}]",
        f"data.heldout_shards=[{','.join(map(str, heldout))}]",
    ]


@pytest.fixture(scope="session")
def compose_run(shapes_overrides: list[str]) -> Callable[..., RunConfig]:
    """What `t2i train` makes of its arguments, on `shapes_shards`."""
    from hydra import compose, initialize_config_module

    from t2i_cli.composition import checked
    from t2i_cli.train import typed_run

    def compose_run(*overrides: str) -> RunConfig:
        with initialize_config_module("t2i_conf", version_base="1.3"):
            composed = compose("train", overrides=[*shapes_overrides, "logger.tensorboard=false", *overrides])
        return typed_run(checked(composed, list(overrides)))

    return compose_run


@pytest.fixture(scope="session")
def train() -> Callable[[RunConfig], FitResult]:
    """Trains in this process, silently."""
    import logging

    from rich.console import Console

    from t2i import families
    from t2i.training.fit import fit

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    def train(config: RunConfig) -> FitResult:
        return fit(config, families.get(config.family).load_stage(config.stage), Console(quiet=True))

    return train


@pytest.fixture(scope="session")
def tiny_kl(compose_run, train, tmp_path_factory) -> Path:
    """A run of a codec of latents to build on, hardly trained."""
    return _tiny_codec("tiny_kl", compose_run, train, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_vq(compose_run, train, tmp_path_factory) -> Path:
    """The same of codes."""
    return _tiny_codec("tiny_vq", compose_run, train, tmp_path_factory)


def _tiny_codec(name: str, compose_run, train, tmp_path_factory) -> Path:
    runs_dir = tmp_path_factory.mktemp(name)
    return train(
        compose_run(f"experiment=autoencoder/{name}", "trainer.num_images=16", f"runs_dir={runs_dir}")
    ).folder


@pytest.fixture(scope="session")
def compose_small(compose_run, tiny_vq) -> Callable[..., RunConfig]:
    """A small experiment with more arguments, on `tiny_vq` where it builds on a codec."""
    from t2i import families

    def compose_small(name: str, *more: str) -> RunConfig:
        arguments = [f"experiment={name}", *more]
        builds_on = families.get(compose_run(*arguments).family).builds_on
        return compose_run(*arguments, *(f"builds_on.{key}={tiny_vq}" for key in builds_on))

    return compose_small


@pytest.fixture(scope="session")
def super_resolution(compose_small, train, tmp_path_factory) -> dict[str, list[str]]:
    """By stage what `compose_small` takes, on `tiny_vq` and a run at 16 px."""
    folder = tmp_path_factory.mktemp("low")
    found = {}
    for stage, experiment, own in (
        ("masked_sr", "masked/tiny_masked", ["low.depth=1"]),
        ("ar_sr", "autoregressive/tiny_ar", []),
    ):
        few = ("resolution.size_px=16", "trainer.num_images=16", f"runs_dir={folder}")
        low = train(compose_small(experiment, *few)).folder
        codes = ["low.num_codes=64", "low.side=4", *own]
        found[stage] = [experiment, f"stage={stage}", f"builds_on.low={low}", *codes]
    return found


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights, as transformers saves one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from t2i.interop import clip
    from t2i.interop.run_out import write_files

    folder = tmp_path_factory.mktemp("clip")
    write_files(folder, clip.tokenizer_files(77))
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=width | {"vocab_size": 49408, "eos_token_id": 49407},
        vision_config=width | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config)
    for projection in (model.visual_projection, model.text_projection):
        torch.nn.init.orthogonal_(projection.weight)
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder
