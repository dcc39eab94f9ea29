"""A codec that has seen a few pictures, and a stage that trains a part of it for a few steps."""

from __future__ import annotations

from pathlib import Path

import torch

from t2i.config import run_to_dict
from t2i.families.autoencoder.stage import Stage
from t2i.families.masked.model import model_of
from t2i.interfaces import Batch
from t2i.training.checkpoint import LoadedCheckpoint, save_final
from t2i.training.randomness import Randomness

TINY = (
    *("stage=autoencoder", "resolution='32'", "backbone=ldm_small", "backbone.resolution_px=32"),
    *("backbone.base_channels=16", "perceptual=none", "adversarial=none"),
)
VQ = ("codec=vq", "codec.num_codes=64")
LARGER = (
    *("resolution.size_px=64", "trained=upsampler", "upsampler.factor=2"),
    *("upsampler.channels=8", "upsampler.blocks=2"),
)


def images(size_px: int = 32, count: int = 4) -> torch.Tensor:
    """With edges, which a codec learns."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return noise.repeat_interleave(size_px // 8, 2).repeat_interleave(size_px // 8, 3)


def batch(image: torch.Tensor) -> Batch:
    names = [""] * len(image)
    zeros = torch.zeros(len(image), 2, dtype=torch.int64)
    return Batch(image, names, names, zeros, zeros, [{}] * len(image), torch.arange(len(image)))


def first_run(compose_run, *overrides: str) -> LoadedCheckpoint:
    """The codec."""
    config = compose_run(*TINY, *overrides)
    torch.manual_seed(0)
    stage = Stage(config)
    stage.codec.train().reconstruct(images())
    stage.codec.latent_scale.fill_(0.7)
    return checkpoint_of(stage, "first")


def checkpoint_of(stage: Stage, name: str) -> LoadedCheckpoint:
    weights = {key: value.clone() for key, value in stage.state_dict().items()}
    return LoadedCheckpoint(name, weights, run_to_dict(stage.config), {})  # type: ignore[arg-type]


def steps(stage: Stage, count: int) -> list[float]:
    """The losses on the way."""
    stage.train()
    (turn,) = stage.turns()
    optimizer = torch.optim.Adam([p for group in turn.groups for p in group], lr=3e-3)
    given, found = batch(images(stage.config.resolution.size_px)), []
    for _ in range(count):
        loss = stage.losses("codec", given, Randomness(0, given.position, torch.float32))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def saved_codec(stage: Stage, place: Path) -> str:
    """The file that a run of it would have written."""
    save_final(stage.inference_weights(), {"config": run_to_dict(stage.config), "extra": {}}, place)
    return str(place)


def saved_masked_model(compose_run, codec: LoadedCheckpoint, place: Path) -> LoadedCheckpoint:
    """One that draws codes of this codec, untrained, and its file."""
    run, extra = (
        compose_run("experiment=masked/tiny_masked", "builds_on.codec=first"),
        {"codec": codec.config},
    )
    torch.manual_seed(0)
    model = model_of(run, extra)
    model.codec.load_state_dict({name.removeprefix("codec."): v for name, v in codec.weights.items()})
    weights = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    save_final(weights, {"config": run_to_dict(run), "extra": extra}, place)
    return LoadedCheckpoint(place, weights, run_to_dict(run), extra)
