"""Image codecs, continuous (KL) and discrete (VQ, FSQ), trained with a perceptual and a patch-adversarial loss
(2012.09841, 2112.10752)."""

from t2i.families.family import Family

FAMILY = Family(
    package=__name__,
    config="config:Config",
    stages={"autoencoder": "stage:Stage"},
    codec="codec:from_checkpoint",
    token_codec="codec:from_checkpoint",
    plan="plan:planned_networks",
    formats="formats:FORMATS",
)
