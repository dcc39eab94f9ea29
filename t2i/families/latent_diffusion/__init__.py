"""Text-conditioned diffusion of a codec's latents (2112.10752)."""

from t2i.families.family import Family

FAMILY = Family(
    package=__name__,
    config="config:Config",
    stages={"ldm": "stage:Stage"},
    generator="generator:Generator",
    plan="plan:planned_networks",
    builds_on={"codec": "codec"},
    formats="formats:FORMATS",
)
