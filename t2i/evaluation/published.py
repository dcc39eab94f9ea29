"""Figures that others published, to stand beside one's own: never measured here, and by protocols of their own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """fid: over Inception, on `data`; parameters, images, seconds: as they say, None where they do not; source: an
    arXiv number or a repository"""

    model: str
    type: str
    fid: float
    data: str
    source: str
    parameters: float | None = None
    images: float | None = None
    seconds: float | None = None


COCO = "COCO 256 px, zero-shot"
PUBLISHED = (
    Published("StackGAN", "GAN", 74.05, "COCO, trained on it", "1710.10916", 57.2e6),
    Published("LAFITE", "GAN", 8.12, "COCO, trained on it", "2111.13792", 37.5e6),
    Published("LAFITE", "GAN", 26.94, COCO, "2111.13792", 37.5e6),
    Published("StyleGAN-T", "GAN", 13.90, COCO, "2301.09515", images=250e6),
    Published("GigaGAN", "GAN", 9.09, COCO, "2303.05511", 1e9, seconds=0.13),
    Published("Parti", "autoregressive codes", 7.23, COCO, "2206.10789"),
    Published("Karlo (unCLIP), 50 steps", "unCLIP", 14.43, COCO, "kakaobrain/karlo", 3.3e9),
    Published("LDM-KL-8-G, 250 steps", "latent diffusion", 12.63, COCO, "2112.10752", 1.45e9),
    Published("GLIDE", "pixel diffusion", 12.24, COCO, "2112.10752", 6e9),
    Published("Imagen", "pixel diffusion", 7.27, COCO, "2205.11487"),
    Published("DeepFloyd IF-I-XL", "pixel diffusion", 6.66, COCO, "deep-floyd/IF", 4.3e9),
    Published("MaskGIT", "masked codes", 6.06, "ImageNet 256 px, by class", "2202.04200", 227e6),
    Published("ADM, guided", "pixel diffusion", 4.59, "ImageNet 256 px, by class", "2112.10752", 608e6),
    Published(
        "LDM-4-G, 250 steps", "latent diffusion", 3.60, "ImageNet 256 px, by class", "2112.10752", 400e6
    ),
)
