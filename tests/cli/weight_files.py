"""Weights files as runs leave them, without a run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from t2i_cli.composition import composed_run


def composed(*overrides: str) -> dict:
    return composed_run(["data=shapes", *overrides])


def write(path: Path, weights: dict[str, torch.Tensor], config: dict, extra: dict | None = None) -> str:
    save_file(weights, path, metadata={"t2i": json.dumps({"config": config, "extra": extra or {}})})
    return str(path)
