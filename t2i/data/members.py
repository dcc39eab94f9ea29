"""Which members of a sample are its picture, its caption and its metadata, by their endings.

webdataset's convention is kept: a member's key goes up to the first dot of its name, its extension is the rest. So
`000.image.jpg` has the extension "image.jpg"; where a sample has no "jpg" (or "png", ...), that is its picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

# Pillow's name of a format: the endings of its files. The picture of a sample that has several is the first of these.
# All that Pillow decodes by itself, but for what cannot be told from other bytes (SPIDER, IMT), holds anything
# (IPTC) or starts another program (EPS: Ghostscript).
PICTURE_FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": ("jpg", "jpeg", "jfif", "jpe"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif", "avifs"),
    "MPO": ("mpo",),
    "JPEG2000": ("jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
    "PPM": ("ppm", "pgm", "pbm", "pnm", "pfm"),
    "TGA": ("tga", "icb", "vda", "vst"),
    "QOI": ("qoi",),
    "PSD": ("psd",),
    "DDS": ("dds",),
    "DIB": ("dib",),
    "ICO": ("ico",),
    "CUR": ("cur",),
    "ICNS": ("icns",),
    "PCX": ("pcx",),
    "DCX": ("dcx",),
    "SGI": ("sgi", "rgb", "rgba", "bw"),
    "SUN": ("ras",),
    "XBM": ("xbm",),
    "XPM": ("xpm",),
    "MSP": ("msp",),
    "IM": ("im",),
    "FITS": ("fits", "fit"),
    "FLI": ("fli", "flc"),
    "PCD": ("pcd",),
    "PIXAR": ("pxr",),
    "GBR": ("gbr",),
    "BLP": ("blp",),
    "FTEX": ("ftc", "ftu"),
}
PICTURE_ENDINGS = tuple(ending for endings in PICTURE_FORMATS.values() for ending in endings)
READ = "jpg, png, webp, gif, bmp, tif, avif and whatever else Pillow decodes by itself"  # in messages
# Pictures, too, but none that is read: they count by name instead of being taken for something else.
UNREAD = "heic heif hif jxl jxr wdp svg svgz eps ps pdf wmf emf psb exr hdr raw dng cr2 nef arw"
UNREAD_ENDINGS = tuple(UNREAD.split())
SAMPLE_ENDINGS = (*PICTURE_ENDINGS, *UNREAD_ENDINGS, "txt", "json")
# Of several members such as `000.image.png` and `000.mask.png` these names say which is meant.
MEANT = {"picture": "image", "unread": "image", "txt": "caption", "json": "metadata"}


@lru_cache(maxsize=4096)
def among(there: tuple[str, ...], endings: tuple[str, ...]) -> frozenset[str]:
    """The extensions of `there` that are meant by `endings` of any kind, one for each kind (see `member`); where
    nothing says which, all that may be meant. Pictures that are not read are meant where there is no other."""
    found: set[str] = set()
    for kind, of_kind in _by_kind(endings):
        if kind == "unread" and any(extension.rpartition(".")[2] in PICTURE_ENDINGS for extension in found):
            continue
        meant = member(there, of_kind)
        found |= {meant} if meant is not None else {e for e in there if e.rpartition(".")[2] in of_kind}
    return frozenset(found)


def _by_kind(endings: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Kinds and their endings, pictures that are not read last."""
    kinds: dict[str, tuple[str, ...]] = {}
    for ending in endings:
        kinds[_kind(ending)] = (*kinds.get(_kind(ending), ()), ending)
    return sorted(kinds.items(), key=lambda each: each[0] == "unread")


def _kind(ending: str) -> str:
    if ending in UNREAD_ENDINGS:
        return "unread"
    return "picture" if ending in PICTURE_ENDINGS else ending


def member(extensions: Iterable[str], endings: Sequence[str]) -> str | None:
    """The extension of the member that is meant by `endings`, which are of one kind: the first of them that is there,
    or else the only one that ends in one of them, or of several the one that is named so ("image.png"); None where
    none is, or nothing says which."""
    there = set(extensions)
    for ending in endings:
        if ending in there:
            return ending
    dotted = [extension for extension in there if extension.rpartition(".")[2] in endings]
    if len(dotted) > 1:
        meant = MEANT.get(_kind(endings[0]), "")
        dotted = [extension for extension in dotted if extension.rpartition(".")[0] == meant]
    return dotted[0] if len(dotted) == 1 else None
