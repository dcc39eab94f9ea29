"""Text-conditioned diffusion of pixels, without a codec (2006.11239, 2102.09672, 2105.05233)."""

from t2i.families.family import Family

FAMILY = Family(
    package=__name__,
    config="config:Config",
    stages={"pixel_diffusion": "stage:Stage"},
    generator="generator:Generator",
    plan="plan:planned_networks",
)
