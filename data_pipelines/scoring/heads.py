"""Published networks that score pictures: LAION's heads on CLIP features, and its watermark detector.

Which head a file holds is seen by the names of its weights; the layers' widths are those of the file. Sources:
github.com/LAION-AI/aesthetic-predictor (README.md), christophschuhmann/improved-aesthetic-predictor
(simple_inference.py, and its `-reluMSE` weights), LAION-AI/CLIP-based-NSFW-Detector (src/models.py) and
LAION-AI/LAION-5B-WatermarkDetection (inference.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision import transforms

from t2i.errors import CheckpointError
from t2i.weight_file import read_weights

for_watermark_detector = transforms.Compose(
    [
        transforms.Resize((256, 256)),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


@dataclass(frozen=True)
class Head:
    """How a file's linear layers are used.

    layers: their names, in order
    relus: so many of the first layers are followed by a ReLU
    standardized: the features are brought to mean 0 and variance 1 first, by the file's `norm`
    sigmoid: it stands at the end
    """

    name: str
    layers: tuple[str, ...]
    relus: int = 0
    standardized: bool = False
    sigmoid: bool = False


def _numbered(*numbers: int) -> tuple[str, ...]:
    return tuple(f"layers.{number}." for number in numbers)


# The numbers count the dropouts and activations between the layers, so that they tell the published heads apart.
HEADS = (
    Head("linear", ("",)),  # sa_0_4_vit_*_linear.pth
    Head("MLP without activations", _numbered(0, 2, 4, 6, 7)),  # *-linearMSE.pth
    Head("MLP with ReLU", _numbered(0, 3, 6, 9, 11), relus=4),  # *-reluMSE.pth
    Head("H/14 NSFW", _numbered(0, 3, 6, 9, 12, 15, 16), relus=5),  # h14_nsfw.pth; its output is not squashed
    Head("L/14 NSFW", ("linear_1.", "linear_2.", "linear_3.", "linear_4."), 3, True, True),
    Head("B/32 NSFW", ("linear_1.", "linear_2.", "linear_3."), 2, True, True),
)


class Standardize(nn.Module):
    """Of autokeras, whose heads these are."""

    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("variance", variance.float())

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / (self.variance.sqrt() + 1e-10)


def load_head(file: Path, width: int) -> tuple[str, nn.Sequential]:
    """The name of a head and the head: (B, width) float32 CLIP image features of length 1 -> (B, 1).

    Raises CheckpointError where the file cannot be read without running code of it, is none of HEADS, or was made
    for features of another width.
    """
    state = read_weights(file)
    for head in HEADS:
        names = {f"{layer}{part}" for layer in head.layers for part in ("weight", "bias")}
        if head.standardized:
            names |= {"norm.mean", "norm.variance"}
        if names == set(state):
            break
    else:
        known = "; ".join(f"{head.name}: {', '.join(head.layers)}" for head in HEADS[1:])
        raise CheckpointError(
            f"{file} holds {', '.join(sorted(state)[:6])}, ...; allowed: weight and bias of one linear layer, or of "
            f"the layers of a published head ({known})."
        )
    modules: list[nn.Module] = []
    if head.standardized:
        modules.append(Standardize(state["norm.mean"].flatten(), state["norm.variance"].flatten()))
    inputs = width
    for number, layer in enumerate(head.layers):
        weight, bias = state[f"{layer}weight"].float(), state[f"{layer}bias"].float()
        last = number == len(head.layers) - 1
        if weight.ndim != 2 or weight.shape[1] != inputs or (last and weight.shape[0] != 1):
            wanted = f"({1 if last else 'any'}, {inputs})"
            raise CheckpointError(
                f"{file}: {layer}weight is {tuple(weight.shape)}; allowed: {wanted}; CLIP's features are {width} wide."
            )
        linear = nn.Linear(*weight.shape[::-1])
        linear.load_state_dict({"weight": weight, "bias": bias})
        modules += [linear, nn.ReLU()] if number < head.relus else [linear]
        inputs = weight.shape[0]
    if head.sigmoid:
        modules.append(nn.Sigmoid())
    return head.name, nn.Sequential(*modules).eval().requires_grad_(False)


def load_watermark_detector(file: Path) -> nn.Module:
    """EfficientNet-B3 with a head of its own, not a head on CLIP: (B, 3, 256, 256) pictures, squashed to that size
    and normalised as ImageNet's, to (B, 2) logits of watermark and none. Raises CheckpointError."""
    import timm

    model: Any = timm.create_model("efficientnet_b3", pretrained=False, num_classes=2)
    model.classifier = nn.Sequential(
        nn.Linear(model.num_features, 625),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(625, 256),
        nn.ReLU(),
        nn.Linear(256, 2),
    )
    state, wanted = read_weights(file), model.state_dict()
    for key in sorted(state.keys() | wanted.keys()):
        found, allowed = (tuple(each[key].shape) if key in each else "absent" for each in (state, wanted))
        if found != allowed:
            raise CheckpointError(
                f"{file} is not LAION's watermark_model_v1.pt: {key} is {found}; allowed: {allowed}."
            )
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
