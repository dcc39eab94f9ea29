"""Perceptual distances between pictures: LPIPS, and one from features that ship inside a package."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from t2i.errors import CheckpointError
from t2i.nn.efficientnet import EfficientNetLite0
from t2i.nn.precision import widened
from t2i.weight_file import read_weights

PerceptualName = Literal["lpips_vgg", "efficientnet_lite0", "none"]

_VGG_FILE = "vgg16-397923af.pth"
_HEADS = {"lpips": "weights/v0.1/vgg.pth", "torchmetrics": "functional/image/lpips_models/vgg.pth"}


def build_perceptual(
    name: PerceptualName, weights: str | Path | None = None, heads: str | Path | None = None
) -> nn.Module | None:
    """A frozen module (image, target), both (B, 3, H, W) in [-1, 1] -> distance (B,), 0 for equal pictures;
    None for "none".

    weights: local file of the network. None means torch.hub's cache for lpips_vgg (`vgg16-397923af.pth`) and
        the installed package for efficientnet_lite0
    heads: lpips_vgg only: local file of its linear heads; None means the installed `lpips` or `torchmetrics`
    Raises CheckpointError where a file is missing or does not fit. Nothing is downloaded.
    """
    if name == "none":
        return None
    if name == "efficientnet_lite0":
        return EfficientNetDistance(weights=weights)
    trunk = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / _VGG_FILE
    if not trunk.is_file():
        raise CheckpointError(
            f"LPIPS needs torchvision's VGG16 weights, and {trunk} does not exist; "
            f"allowed: a local copy of {_VGG_FILE}, as .pth or .safetensors."
        )
    distance = LPIPS()
    distance.load(trunk, _installed_heads() if heads is None else heads)
    return distance


def build_architecture(name: PerceptualName) -> nn.Module | None:
    """The same module with random weights, which can be counted where no weights are."""
    if name == "none":
        return None
    return LPIPS() if name == "lpips_vgg" else EfficientNetDistance(pretrained=False)


def _installed_heads() -> Path:
    for package, file in _HEADS.items():
        spec = importlib.util.find_spec(package)  # finds the folder; the package's code is not run
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / file).is_file():
                return Path(folder) / file
    raise CheckpointError("LPIPS needs its linear heads; `pip install lpips` brings them.")


def _unit(features: Tensor) -> Tensor:
    features = widened(features)  # 1e-10 is 0 in half precision
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


class LPIPS(nn.Module):
    """LPIPS v0.1 over VGG16 (Zhang et al., 1801.03924, equation 1), frozen; random until `load`."""

    mean: Tensor
    std: Tensor

    _TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    _WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for block, (channels, depth) in enumerate(zip(self._WIDTHS, (2, 2, 3, 3, 3), strict=True)):
            if block > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
        self.features = nn.Sequential(*layers)  # torchvision's numbering
        self.heads = nn.ParameterList(torch.empty(1, c, 1, 1) for c in self._WIDTHS)
        # ImageNet's mean and deviation for pictures in [-1, 1], rounded as LPIPS was trained.
        mean, std = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.requires_grad_(False)

    def load(self, weights: str | Path, heads: str | Path) -> None:
        """weights: file of torchvision's VGG16 state dict; heads: file of the `lpips` package's linear heads"""
        _load(self.features, read_weights(Path(weights)), "features.{}", weights)
        _load(self.heads, read_weights(Path(heads)), "lin{}.model.1.weight", heads)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        a, b = (image - self.mean) / self.std, (target - self.mean) / self.std
        distance = torch.zeros(len(image), device=image.device, dtype=image.dtype)
        heads = iter(self.heads)
        for i, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if i in self._TAPS:
                squared = (_unit(a) - _unit(b)).square() * next(heads)
                distance = distance + squared.sum(dim=1).mean(dim=(1, 2))
        return distance


def _load(module: nn.Module, source: dict[str, Tensor], pattern: str, path: str | Path) -> None:
    """Fills every entry `name` of `module` from source[pattern.format(name)]; other entries of `source`
    (VGG's classifier) are not looked at."""
    filled = {}
    for name, value in module.state_dict().items():
        key = pattern.format(name)
        if key not in source or source[key].shape != value.shape:
            found = tuple(source[key].shape) if key in source else "missing"
            raise CheckpointError(f"{path}: {key} is {found}; LPIPS needs shape {tuple(value.shape)}.")
        filled[name] = source[key]
    module.load_state_dict(filled)


class EfficientNetDistance(nn.Module):
    """Squared distance between unit-normalised maps of EfficientNet-Lite0, mean over positions and stages.

    Made like LPIPS, but over another network and without heads learned from people's judgements: it is not
    LPIPS, and its values cannot be compared with those.

    stages: which of the seven stages' maps are compared, counted from 0. The default costs about half of all
        seven and fits pictures of 32 px. Stage 0 belongs among them: without it, pixels fitted to the
        distance alone keep nine tenths of their error at the finest scale.
    weights, pretrained: as `EfficientNetLite0` has them
    """

    def __init__(
        self, stages: Sequence[int] = (0, 1, 2), weights: str | Path | None = None, pretrained: bool = True
    ) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.network = EfficientNetLite0(weights, pretrained)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        num_stages = max(self.stages) + 1
        a, b = self.network(image, num_stages), self.network(target, num_stages)
        distances = [(_unit(a[s]) - _unit(b[s])).square().sum(dim=1).mean(dim=(1, 2)) for s in self.stages]
        return torch.stack(distances).mean(dim=0)
