"""Whether a codec can be written as others have it."""

from __future__ import annotations

from t2i.interop.dalle_out import check_dalle
from t2i.interop.gumbel import check_gumbel
from t2i.interop.parts import Parts, formats_of
from t2i.interop.vitvq import check_vitvq


def check_codec(parts: Parts, to: str) -> None:
    """Raises ConfigError where the codec has no form in what is written.

    to: "diffusers", "compvis", or "a pipeline" that it becomes part of
    """
    formats_of("codec").from_run(parts.codec.config)
    if parts.codec.is_dvae:
        check_dalle(parts, to)
    elif parts.codec.is_vit:
        check_vitvq(parts, to)
    elif parts.codec.config["codec"]["name"] == "gumbel":
        check_gumbel(parts, to)
