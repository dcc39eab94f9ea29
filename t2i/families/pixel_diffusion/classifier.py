"""What guides a walk towards a caption: the gradient of a classifier of noisy pictures (2105.05233, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.diffusion.objectives import Prediction
from t2i.diffusion.schedules import per_sample
from t2i.families.pixel_diffusion.config import ClassifierConfig
from t2i.families.pixel_diffusion.unet import Encoder
from t2i.families.pixel_diffusion.unet_config import UNetConfig
from t2i.interfaces import TextFeatures
from t2i.nn.norm import group_norm
from t2i.nn.precision import widened, without_autocast
from t2i.nn.transfer import placed

MAX_LOGIT_SCALE = 100.0  # of CLIP (2103.00020, section 2.5)


class AttentionPool(nn.Module):
    """(B, C, h, w) -> (B, out_dim): attention of the mean to the mean and to all positions, as in CLIP's ResNets.

    size: h and w of the learned positions; others are met by interpolating these
    """

    def __init__(self, size: int, channels: int, heads: int, out_dim: int) -> None:
        super().__init__()
        self.size, self.heads = size, heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Linear(channels, 3 * channels)
        self.c_proj = nn.Linear(channels, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + self._positions(x.shape[2:])
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in self.qkv_proj(tokens.transpose(1, 2)).chunk(3, dim=-1)
        )
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        return self.c_proj(pooled.transpose(1, 2).flatten(1))

    def _positions(self, size: torch.Size) -> Tensor:
        if tuple(size) == (self.size, self.size):
            return self.positional_embedding
        mean, rest = self.positional_embedding.split((1, self.size**2), dim=1)
        rest = rest.view(1, -1, self.size, self.size)
        rest = F.interpolate(rest, tuple(size), mode="bilinear", align_corners=False)
        return torch.cat([mean, rest[0].flatten(1)], dim=1)


class NoisyEncoder(Encoder):
    """ADM's classifier: half a UNet and an attention pool. (B, 3, H, W) noisy pictures and (B,) times -> (B, out_dim),
    which are logits there."""

    def __init__(self, config: UNetConfig, size_px: int, out_dim: int) -> None:
        """size_px: height and width that it is trained at"""
        super().__init__(config, in_channels=3)
        channels = config.channels()[-1]
        pool = AttentionPool(size_px // config.downsampling, channels, config.heads(channels), out_dim)
        self.out = nn.Sequential(group_norm(channels), nn.SiLU(), pool)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, _ = self.encode(x, self.embedded(t, x.dtype))
        return self.last(h)


class NoisyMatcher(nn.Module):
    """How well captions fit noisy pictures: the scaled cosine of their embeddings (CLIP, 2103.00020), the picture's
    given the time too (GLIDE's noised CLIP)."""

    def __init__(self, config: ClassifierConfig, size_px: int, token_dim: int) -> None:
        super().__init__()
        self.encoder = NoisyEncoder(config.encoder, size_px, config.embed_dim)
        hidden = 4 * config.embed_dim
        self.words = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, hidden), nn.GELU())
        self.caption = nn.Linear(hidden, config.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed(self, x: Tensor, t: Tensor, context: Tensor, context_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, embed_dim) twice: of the pictures, of length 1, and of the captions, of the length of the scale."""
        mask = context_mask[..., None].to(x.dtype)
        words = (self.words(context) * mask).sum(1) / mask.sum(1).clamp(min=1)
        scale = self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        pictures, captions = self.encoder(x, t), widened(self.caption(words))
        return F.normalize(pictures, dim=1), scale * F.normalize(captions, dim=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """(B, B): how well picture i fits caption j.

        x: (B, 3, H, W) noisy, t: (B,) in [0, 1000); context: (B, L, token_dim); context_mask: (B, L) bool, True where
        the token is the caption's
        """
        pictures, captions = self.embed(x, t, context, context_mask)
        with without_autocast(x.device):  # logits of up to 100, of which 8 digits leave halves
            return pictures @ captions.T

    def loss(self, x: Tensor, t: Tensor, text: TextFeatures, captions: Sequence[str]) -> Tensor:
        """() cross-entropy of telling which caption of the batch a picture has, and which picture a caption has. Equal
        captions share the answer; pictures whose caption was dropped are left out."""
        rows = [i for i, caption in enumerate(captions) if caption]
        index = placed(torch.tensor(rows, dtype=torch.int64), x.device)
        logits = self(x, t, text.tokens, text.mask)[index][:, index]
        kept = [captions[i] for i in rows]
        equal = torch.tensor([[a == b for b in kept] for a in kept], dtype=torch.bool).view(
            len(rows), len(rows)
        )
        same = placed(equal, x.device).to(logits.dtype)
        answer = same / same.sum(1, keepdim=True)
        both = -(answer * logits.log_softmax(1)).sum() - (answer * logits.T.log_softmax(1)).sum()
        return both / (2 * max(len(rows), 1))

    def gradient(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """(B, 3, H, W): of each picture's fit with its caption, by the picture."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            pictures, captions = self.embed(x, t, text.tokens, text.mask)
            return torch.autograd.grad((pictures * captions).sum(), x)[0]


def towards(p: Prediction, gradient: Tensor, scale: float, alpha: Tensor, sigma: Tensor) -> Prediction:
    """What is predicted once log p(y | x_t), of which `gradient` is the gradient by x_t, is added `scale` times to the
    log density: eps - scale sigma gradient (2105.05233, algorithm 2), and the x_0 that goes with it.

    alpha, sigma: (B,)
    """
    alpha, sigma = per_sample(alpha, gradient), per_sample(sigma, gradient)
    shift = scale * sigma * gradient
    x0 = torch.where(alpha > 0, p.x0 + sigma / alpha * shift, p.x0)
    return Prediction(x0, p.eps - shift, p.objective, p.variance_share)
