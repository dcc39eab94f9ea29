"""What UNets have in common."""

from __future__ import annotations

from torch import Tensor, nn

from t2i.nn.residual import ResidualBlock


class MapAttention(nn.Module):
    """Attention of the positions of a feature map to one another and to the text: what a `Stack` gives the text to.
    forward: x (B, C, h, w), context (B, L, context_dim) or None, context_mask (B, L) bool or None -> (B, C, h, w)."""


class Stack(nn.Sequential):
    """Layers in sequence, each given what it takes beside x: the time embedding, or the text."""

    def forward(  # type: ignore[override]
        self, x: Tensor, time: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> Tensor:
        """x: (B, C, h, w), time: (B, time_dim), context and context_mask as the UNet takes them."""
        for layer in self:
            if isinstance(layer, ResidualBlock):
                x = layer(x, time)
            elif isinstance(layer, MapAttention):
                x = layer(x, context, context_mask)
            else:
                x = layer(x)
        return x


def time_network(model_channels: int) -> nn.Sequential:
    """(B, model_channels) -> (B, 4 model_channels)."""
    width = 4 * model_channels
    return nn.Sequential(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))


def hidden_matrices(unet: nn.Module) -> list[nn.Parameter]:
    """The weights between hidden layers, which Muon may step: those of convolutions, attention and MLPs, without
    embeddings, input and output."""
    return [
        p
        for name, p in unet.named_parameters()
        if "_block" in name and "emb_layers" not in name and "input_blocks.0." not in name and p.ndim >= 2
    ]
