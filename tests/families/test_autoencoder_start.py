"""How good the patch backbone is before it has learned anything: docs/decisions.md says so."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from t2i.families.autoencoder.config import PatchBackboneConfig
from t2i.families.autoencoder.patch import PatchDecoder, PatchEncoder, initialise_from_pca
from t2i_pipelines.sources import shapes


def scenes(count: int, seed: int) -> Tensor:
    """(count, 3, 32, 32) in [-1, 1]: drawn scenes, one half with one object, one half with two."""
    rng = random.Random(seed)
    drawn = []
    for i in range(count):
        scene = (shapes.random_one, shapes.random_two)[i % 2](rng)
        drawn.append(np.asarray(shapes.render(scene, shapes.place(scene, rng), 32).convert("RGB")))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).double() / 127.5 - 1


@torch.no_grad()
def test_it_starts_at_32_db_on_unseen_shapes():
    config = PatchBackboneConfig("patch", patch_px=4, latent_channels=16, width=64, depth=2)
    encoder, decoder = PatchEncoder(config, 16).double(), PatchDecoder(config).double()
    initialise_from_pca(encoder, decoder, scenes(400, seed=0))
    unseen = scenes(200, seed=1)
    error = ((decoder(encoder(unseen)).clamp(-1, 1) - unseen) / 2).square().mean()
    assert 31.5 < -10 * error.log10() < 32.5
