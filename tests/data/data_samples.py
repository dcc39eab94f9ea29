"""Small samples made on the spot."""

import io
import json

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def good_members(number: int, height: int = 12, width: int = 16) -> dict[str, bytes]:
    """A sample whose picture, caption and JSON all name it."""
    metadata = {"id": number, "original_width": 10 * width, "original_height": 10 * height}
    return {
        "png": encode(noise(number, height, width)),
        "txt": f"sample {number}".encode(),
        "json": json.dumps(metadata).encode(),
    }
