"""What becomes of a picture file on its way into a shard."""

from __future__ import annotations

import hashlib
import io
import json
import zlib

import numpy as np
import pytest
from picture_server import encoded
from PIL import Image

from t2i.data.decode import BadSample, decode_image
from t2i_pipelines.pictures import prepare


def test_reduced_to_the_shorter_side_and_never_enlarged(tmp_path):
    picture = prepare(encoded(size=(300, 200)), "k", 64)
    image = Image.open(io.BytesIO(picture.image or b""))
    assert (image.format, image.size) == ("JPEG", (96, 64))
    assert (picture.width, picture.height, picture.original_width, picture.original_height) == (
        96,
        64,
        300,
        200,
    )
    reference = Image.open(io.BytesIO(encoded(size=(300, 200)))).resize((96, 64), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(reference, dtype=int))
    assert difference.mean() < 2
    assert picture.sha256 == hashlib.sha256(encoded(size=(300, 200))).hexdigest()  # of what was downloaded
    for size in ((300, 64), (10, 20)):
        small = prepare(encoded("PNG", size), "k", 64)
        assert (small.image, small.extension, small.width, small.height) == (None, "png", *size)


def test_exif_is_told_and_turns_the_picture():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769)[0x829A] = 0.5
    data = encoded(size=(32, 16), exif=exif)
    picture = prepare(data, "k")
    assert (picture.image, picture.width, picture.height) == (None, 16, 32)
    told = json.loads(picture.exif or "")
    assert (told["Image Make"], told["Image Orientation"], told["EXIF ExposureTime"]) == ("Maker", "6", "0.5")
    turned = Image.open(io.BytesIO(prepare(data, "k", 8).image or b""))
    assert turned.size == (8, 16)
    assert turned.getexif().get(0x0112) is None


def test_pictures_that_are_refused():
    bomb = encoded("PNG", (8, 8))
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bomb[24:29]
    large = bomb[:12] + header + zlib.crc32(header).to_bytes(4, "big") + bomb[33:]
    with pytest.raises(BadSample, match="bomb"):
        prepare(large, "k")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(BadSample, match="not a picture in a known format"):  # Pillow would start Ghostscript
        prepare(postscript, "k")


def test_what_pillow_has_to_say_of_a_picture_that_it_reads_is_not_shown(recwarn):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "PNG", exif=b"II*\0\xff\xff\xff\xff" + bytes(10))
    assert prepare(buffer.getvalue(), "a").width == 20
    assert decode_image(buffer.getvalue(), "a")[1] == (10, 20)
    assert not recwarn.list
