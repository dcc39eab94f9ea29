"""Rules over metadata columns: the published recipes of Stable Diffusion, and one for each ready-made flag."""

from __future__ import annotations

from dataclasses import dataclass

from t2i.errors import ConfigError

# The same quantity under the names that LAION's tables, img2dataset's and ours give it. The first that a table has is
# found under all of them, whatever its case. In a table of LAION, WIDTH is the original width; in a shard's, where
# both stand, width is that of the picture in the tar.
ALIASES = (
    ("caption", "text"),
    ("original_width", "width"),
    ("original_height", "height"),
    ("aesthetic", "aesthetic_score"),
    ("language", "lang"),
)


@dataclass(frozen=True)
class Rule:
    """A condition that samples must meet.

    name: how reports call it
    expression: an SQL expression of type BOOLEAN over the columns; where it is NULL, the sample counts as unknown
    """

    name: str
    expression: str


def _number(column: str) -> str:
    """The column as a number, also where a table keeps numbers as text; NULL for what is none."""
    return f"TRY_CAST({column} AS DOUBLE)"


_WIDTH, _HEIGHT = _number("original_width"), _number("original_height")


def _minimum_size(side_px: int) -> Rule:
    return Rule(
        f"original size >= {side_px} x {side_px} px", f"{_WIDTH} >= {side_px} AND {_HEIGHT} >= {side_px}"
    )


# https://huggingface.co/CompVis/stable-diffusion, "Stable Diffusion Version 1": laion-high-resolution is "170M examples
# from LAION-5B with resolution >= 1024x1024"; laion-improved-aesthetics is "filtered to images with an original size
# >= 512x512, estimated aesthetics score > 5.0, and an estimated watermark probability < 0.5".
PRESETS: dict[str, tuple[Rule, ...]] = {
    "laion-high-resolution": (_minimum_size(1024),),
    "improved-aesthetics": (
        _minimum_size(512),
        Rule("aesthetic > 5.0", f"{_number('aesthetic')} > 5.0"),
        Rule("pwatermark < 0.5", f"{_number('pwatermark')} < 0.5"),
    ),
}

# What the flags --min-NAME and --max-NAME bound, both inclusive: expression, help.
QUANTITIES = {
    "punsafe": (_number("punsafe"), "probability of unsafe content"),
    "similarity": (_number("similarity"), "cosine of CLIP's picture and text"),
    "caption-length": ("LENGTH(caption)", "characters"),
    "aspect-ratio": (f"{_WIDTH} / NULLIF({_HEIGHT}, 0)", "original width by height"),
    "shorter-side-px": (
        f"CASE WHEN {_WIDTH} < {_HEIGHT} THEN {_WIDTH} WHEN {_HEIGHT} <= {_WIDTH} THEN {_HEIGHT} END",
        "of the original picture",
    ),
}


def preset(name: str) -> tuple[Rule, ...]:
    """Raises ConfigError where there is none of that name."""
    if name not in PRESETS:
        raise ConfigError(f"--preset is {name!r}; allowed: {', '.join(PRESETS)}.")
    return PRESETS[name]


def bound(quantity: str, minimum: float | None, maximum: float | None) -> list[Rule]:
    """The rules of --min-`quantity` and --max-`quantity`, where given."""
    expression = QUANTITIES[quantity][0]
    bounds = ((">=", minimum), ("<=", maximum))
    return [
        Rule(f"{quantity} {sign} {value:g}", f"({expression}) {sign} {value!r}")
        for sign, value in bounds
        if value is not None
    ]


def languages(codes: str) -> Rule:
    """codes: comma-separated, as the column has them ("en,de"), in any case"""
    wanted = [code.strip().lower() for code in codes.split(",") if code.strip()]
    if not wanted:
        raise ConfigError(f"--language is {codes!r}; allowed: codes such as en,de.")
    texts = ", ".join("'" + code.replace("'", "''") + "'" for code in wanted)
    return Rule(f"language in {', '.join(wanted)}", f"LOWER(language) IN ({texts})")
