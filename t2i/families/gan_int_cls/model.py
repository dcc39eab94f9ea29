"""Both networks and the text encoder as one model."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i.config import check
from t2i.families.gan_int_cls.config import Config, SamplingConfig
from t2i.families.gan_int_cls.networks import Discriminator, GeneratorNetwork
from t2i.interfaces import Progress, SampleRequest, TextToImage
from t2i.nn.between import asked_noise, asked_text
from t2i.text import text_encoder_for_training


class GanIntCls(TextToImage):
    """The frozen text encoder's weights are not part of the state dict: it is loaded from where the configuration
    says."""

    def __init__(self, config: Config, size_px: int) -> None:
        super().__init__()
        self.size_px = size_px
        self.text = text_encoder_for_training(config.text)
        self.generator, self.discriminator = build_networks(config, self.text.pooled_dim, size_px)

    def check(self, request: SampleRequest, sampling: SamplingConfig) -> None:
        """Raises ConfigError for all but pictures of the trained size, from a prompt alone."""
        for key, value in (("height", request.height_px), ("width", request.width_px)):
            check(
                value == self.size_px, key, value, f"{self.size_px}, the size that this model was trained at"
            )
        check(not request.negative_prompt, "negative_prompt", request.negative_prompt, "none with this model")
        check(request.image is None, "image", "a picture to start from", "none with this model")
        check(not request.tile, "tile", request.tile, "none with this model")

    @torch.no_grad()
    def generate(
        self, request: SampleRequest, sampling: SamplingConfig, progress: Progress | None = None
    ) -> Tensor:
        """-> (N, 3, height_px, width_px) in [-1, 1], NaN where the numbers were not finite, on the model's device; see
        `t2i.interfaces.Generator`."""
        self.check(request, sampling)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        noise = asked_noise(request, generators, (self.generator.noise_dim,))
        pooled = asked_text(self.text, request).pooled
        image = self.generator(sampling.noise_scale * noise.to(pooled), pooled)
        if progress is not None:
            progress(1, 1)
        return torch.where(image.isfinite(), image, torch.nan)


def build_networks(config: Config, pooled_dim: int, size_px: int) -> tuple[GeneratorNetwork, Discriminator]:
    """For captions that are vectors of `pooled_dim` numbers. Raises ConfigError for a size that they cannot have."""
    generator = GeneratorNetwork(config.generator, pooled_dim, size_px)
    discriminator = Discriminator(config.discriminator, pooled_dim, size_px)
    layout = torch.channels_last  # a tenth faster
    return generator.to(memory_format=layout), discriminator.to(memory_format=layout)
