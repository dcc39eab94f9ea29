"""Codes of pictures drawn one after the other, given the text (2012.09841, 2102.12092, 2206.10789)."""

from t2i.families.family import Family

FAMILY = Family(
    package=__name__,
    config="config:Config",
    stages={"ar": "stage:Stage", "parti": "stage:Stage", "ar_sr": "stage:Stage"},
    generator="generator:Generator",
    plan="plan:planned_networks",
    builds_on={"codec": "token_codec"},
    low=("ar", "parti"),
)
