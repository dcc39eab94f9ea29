"""Whether a codec can be written as others have it."""

from __future__ import annotations

from t2i.interop.dalle_out import check_dalle
from t2i.interop.gumbel import check_gumbel
from t2i.interop.parts import Parts, formats_of


def check_codec(parts: Parts, to: str) -> None:
    """Raises ConfigError where the codec has no form in what is written.

    to: "diffusers", "compvis", or "a pipeline" that it becomes part of
    """
    config = parts.codec.config
    formats_of("codec").from_run(config)
    if config["backbone"]["name"] == "dvae":
        check_dalle(parts, to)
    elif config["codec"]["name"] == "gumbel":
        check_gumbel(parts, to)
