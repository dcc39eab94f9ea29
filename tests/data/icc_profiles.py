"""ICC profiles written by hand, by the standard's layout (ICC.1:2010)."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageCms

DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
D50 = (0.9642, 1.0, 0.8249)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def _numbers(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + _numbers(*values)


def _curve(parameters) -> bytes:
    kind = 0 if len(parameters) == 1 else 3
    return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + _numbers(*parameters)


def _profile(device: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes], version=4) -> bytes:
    text = "by hand".encode("utf-16-be")
    described = (
        b"mluc\0\0\0\0" + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", len(text), 28) + text
    )
    tags = {b"desc": described, b"wtpt": _xyz(D50), **tags}
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"", version << 24, device, space, connection)
    return head + bytes(12) + b"acsp" + bytes(28) + _numbers(*D50) + bytes(48) + body


def rgb_profile(primaries, curve=SRGB_CURVE) -> bytes:
    tags = {name + b"XYZ": _xyz(values) for name, values in zip((b"r", b"g", b"b"), primaries, strict=True)}
    return _profile(
        b"mntr", b"RGB ", b"XYZ ", tags | {name + b"TRC": _curve(curve) for name in (b"r", b"g", b"b")}
    )


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve((gamma,))})


def cmyk_profile() -> bytes:
    """A press whose cyan ink is printed in green: (1, 0, 0, 0) is sRGB (0, 128, 0); the others as usual."""
    inks = np.array([(0, 128, 0), (255, 0, 255), (255, 255, 0), (0, 0, 0)]) / 255
    corners = []
    for code in range(16):
        on = [code >> shift & 1 for shift in (3, 2, 1, 0)]
        light = np.ones(3)
        for ink, printed in zip(inks, on, strict=True):
            light = light * ink if printed else light
        corners.append(np.rint(light * 255))
    srgb = Image.fromarray(np.array(corners, np.uint8)[None])
    lab = ImageCms.createProfile("LAB")
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
    table = np.array(ImageCms.applyTransform(srgb, to_lab)).astype(np.uint8)
    table[..., 1:] = table[..., 1:].view(np.int8).astype(int) + 128  # Pillow's a and b are signed
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _numbers(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += ramp * 4 + table.tobytes() + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut}, version=2)


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
