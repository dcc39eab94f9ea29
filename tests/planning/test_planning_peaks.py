"""Peaks of GPUs by their names, and the share of it that a rate means."""

from __future__ import annotations

import pytest

from t2i.planning.config import Assumptions
from t2i.planning.model import build_model
from t2i.planning.peaks import mfu_per_rate, peak_bf16_flops
from t2i.planning.plan import work_of
from t2i_cli.plan import built_on, planned_run


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_peaks_of_gpus(name, tflops):
    assert peak_bf16_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name", ["Tesla T4", "NVIDIA A10", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H20"]
)
def test_what_is_not_known_has_none(name):
    assert peak_bf16_flops(name) is None


@pytest.mark.parametrize("encoded", [[], ["data.encoded=features"]], ids=["online", "encoded"])
def test_the_flops_are_the_plans(encoded):
    """What is read is not computed, and counts in neither."""
    config, _ = planned_run(
        ["experiment=latent_diffusion/tiny_unet_eps", "text=minilm", "cluster=a100x8", *encoded], None
    )
    builds_on = built_on(config, "autoencoder/tiny_kl", None)
    model = build_model(config, builds_on)
    cached = frozenset(model.cacheable) if encoded else frozenset()
    work = work_of(config, model, Assumptions(cached=cached))
    assert (work.encoder_flops == 0) == bool(encoded)
    assert mfu_per_rate(config, builds_on, "NVIDIA A100-SXM4-80GB") == work.flops / 312e12
    assert mfu_per_rate(config, builds_on, "NVIDIA A10") is None
