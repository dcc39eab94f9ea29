"""Models that plans are made of, counted once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import pytest

from t2i.config import RunConfig
from t2i.planning.config import ClusterConfig
from t2i.planning.model import Model, build_model
from t2i_cli.plan import composed_run, planned_run

UNETS = {
    "sd1": ("text=clip",),
    "sd2": (
        "text=open_clip",
        "denoiser.num_heads=null",
        "denoiser.num_head_channels=64",
        "denoiser.use_linear_in_transformer=true",
    ),
}
Planned = tuple[RunConfig, ClusterConfig, Model]


@pytest.fixture(scope="session")
def planned() -> Callable[..., Planned]:
    """Stable Diffusion "sd1" or "sd2" at a size on the f8 autoencoder, batch 2048, on 8 A100."""

    @cache
    def counted(unet: str, size_px: int) -> Planned:
        config, cluster = planned_run(
            [
                "stage=ldm",
                "data=shards",
                f"resolution={size_px}",
                "denoiser=unet_sd1",
                "schedule=scaled_linear",
                "objective=eps",
                "optimizer.muon_scale=null",
                "mask_padding=false",
                "trainer.precision=bf16-mixed",
                "trainer.batch_size=2048",
                "cluster=a100x8",
                *UNETS[unet],
            ],
            None,
        )
        return config, cluster, build_model(config, {"codec": composed_run(["experiment=autoencoder/kl_f8"])})

    def planned(unet: str, size_px: int, num_images: int = 1_000_000) -> Planned:
        config, cluster, model = counted(unet, size_px)
        trainer = dataclasses.replace(config.trainer, num_images=num_images)
        return dataclasses.replace(config, trainer=trainer), cluster, model

    return planned
