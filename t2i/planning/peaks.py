"""What GPUs can do at most, and what share of it a run reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i.config import RunConfig
from t2i.planning.model import flops_per_image

# TFLOP/s in bf16, dense, by NVIDIA's data sheets; keys are words of torch's name of the device, the first that fit.
PEAK_BF16_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 149.7,
}


def peak_bf16_flops(gpu: str) -> float | None:
    """FLOP/s of the GPU that torch names so; None where it is not known, or is a slice of one (MIG)."""
    words = set(gpu.replace("-", " ").split())
    found = (peak * 1e12 for name, peak in PEAK_BF16_TFLOPS.items() if words.issuperset(name.split()))
    return None if "MIG" in words else next(found, None)


def mfu_per_rate(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]], gpu: str) -> float | None:
    """Model FLOPs utilisation (2204.02311, appendix B) of one picture per second on such a GPU: the FLOPs that a plan
    counts, over the peak in bf16, whatever trainer.precision is. None where the peak is not known. Raises ConfigError
    where there is no plan.

    builds_on: as in `t2i.planning.model.build_model`
    """
    peak = peak_bf16_flops(gpu)
    return None if peak is None else flops_per_image(config, builds_on) / peak
