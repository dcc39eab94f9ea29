"""Masked modelling of a codec's codes and their parallel decoding (MaskGIT, 2202.04200; Muse, 2301.00704)."""

from t2i.families.family import Family

FAMILY = Family(
    package=__name__,
    config="config:Config",
    stages={"masked": "stage:Stage", "masked_sr": "stage:Stage"},
    generator="generator:Generator",
    plan="plan:planned_networks",
    builds_on={"codec": "token_codec"},
    low=("masked",),
    formats="formats:FORMATS",
)
