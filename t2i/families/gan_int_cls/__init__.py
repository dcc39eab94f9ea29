"""GAN-INT-CLS (Reed et al. 2016, 1605.05396): a text-conditioned generator against a matching-aware discriminator."""

from t2i.families.family import Family

FAMILY = Family(
    package=__name__,
    config="config:Config",
    stages={"gan_int_cls": "stage:Stage"},
    generator="generator:Generator",
    plan="plan:planned_networks",
)
