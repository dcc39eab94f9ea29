"""The memory, seconds and bytes of converting Stable Diffusion 1 at its full size. Writes 13 GB, and deletes them."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from t2i.interop import clip
from t2i.interop.clip import ClipConfig, ClipText
from t2i.interop.convert import Conversion, write
from t2i.interop.diffusers_config import backbone, read_unet
from t2i.interop.parts import CodecPart, DenoiserPart, Parts, codec_shapes, denoiser_shapes
from t2i.interop.scheduler import SAMPLING, SCHEDULE
from t2i.interop.weights import Weight, Weights

UNET_BYTES = 859_520_964 * 4  # the largest component
ALL_PARAMETERS = 859_520_964 + 83_653_863 + 123_060_480


def random_weights(shapes: dict[str, tuple[int, ...]]) -> Weights:
    return {
        name: Weight(shape, torch.float32, lambda shape=shape: torch.randn(shape))
        for name, shape in shapes.items()
    }


def stable_diffusion_1() -> Parts:
    levels = {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    }
    unet = read_unet(levels, "unet")
    codec = {"backbone": backbone(128, [1, 2, 4, 4], 2, 4, [False] * 4, True), "codec": {"name": "kl"}}
    text = ClipConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
    return Parts(
        "random numbers",
        CodecPart(codec, random_weights(codec_shapes(codec)), 0.18215),
        DenoiserPart(
            unet, random_weights(denoiser_shapes(unet, 4, 768)), dict(SCHEDULE), "eps", dict(SAMPLING), 512
        ),
        ClipText(text, random_weights(clip.shapes(text)), clip.tokenizer_files(77), 77),
    )


def convert(*arguments: str) -> tuple[float, int]:
    """Seconds, and the peak resident memory in bytes, of `t2i convert` in a process of its own."""
    measured = (
        "import resource, sys; from t2i_cli.main import main; sys.argv = ['t2i', 'convert', *sys.argv[1:]]; main();"
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    start = time.perf_counter()
    command = [sys.executable, "-c", measured, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(result.stdout.split("PEAK")[1]) * 1024


@pytest.mark.slow
def test_a_full_size_conversion_streams(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 16e9:
        pytest.skip("needs 16 GB of free disk")
    try:
        source, run, single = tmp_path / "sd1", tmp_path / "run", tmp_path / "sd1.safetensors"
        write(Conversion(stable_diffusion_1(), source, "diffusers", "fp32"))
        figures = {}
        for name, arguments in {
            "diffusers -> t2i": (source, run),
            "t2i -> compvis": (run, single),
            "compvis -> diffusers fp16": (single, tmp_path / "half", "--to", "diffusers", "--dtype", "fp16"),
        }.items():
            seconds, peak = convert(*map(str, arguments))
            figures[name] = {"seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 2)}
            # All resident memory, the libraries' included; of the weights one tensor at a time is there.
            assert peak < 1.2 * UNET_BYTES
            assert peak < 2e9
        print(json.dumps(figures | {"single_file_gb": round(single.stat().st_size / 1e9, 3)}, indent=2))
        # "EMA only, fp32" is 4.2 GB for Stable Diffusion 1: the weights, and a header of less than a megabyte.
        assert 0 < single.stat().st_size - 4 * ALL_PARAMETERS < 1e6
        half = sum(path.stat().st_size for path in (tmp_path / "half").rglob("*.safetensors"))
        assert math.isclose(half, 2 * ALL_PARAMETERS, rel_tol=1e-3)
    finally:
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 1.2 * UNET_BYTES
