"""Networks whose features tell sets of pictures apart, from local weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from t2i.errors import CheckpointError
from t2i.evaluation.clip import Clip, load_clip
from t2i.evaluation.resizing import ResizeName, resized
from t2i.schema import check
from t2i.weight_file import read_weights, reason_of, sha256

KINDS = ("inception", "dinov2", "clip", "efficientnet")
GET = {
    "inception": "allowed: inception=FILE, a local copy of pt_inception-2015-12-05-6726825d.pth (a release of "
    "github.com/mseitzer/pytorch-fid, 91 MB), or torch-fidelity's copy of it.",
    "dinov2": "allowed: dinov2=DIR, a folder of transformers such as `hf download facebook/dinov2-large` makes, or the "
    "name of one that is in the hub's cache.",
    "clip": "allowed: clip=DIR, a folder of transformers or open_clip such as `hf download "
    "openai/clip-vit-large-patch14` makes, or clip=ARCHITECTURE:FILE of open_clip.",
}
# torch.hub's way of naming files: the first digits of the sha256 of what was published.
NAMED_BY_HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
EFFICIENTNET_PX = DINOV2_PX = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Extractor:
    """Pictures to vectors.

    kind: one of KINDS; title: what it is, for people
    width: of the vectors
    resize: how pictures come to the network's size, as `resized` has it; "published": as the model says
    sha256: of what decides the features: weights, and the configuration beside them
    distance: what the Fréchet distance over these features is called
    """

    kind: str
    title: str
    width: int
    resize: str
    sha256: str
    distance: str
    _compute: Callable[[Tensor], Tensor] = field(repr=False)
    clip: Clip | None = field(default=None, repr=False)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 on the CPU -> (B, width) float32 on the CPU."""
        return self._compute(pictures).float().cpu()


def load(spec: str, resize: ResizeName, device: torch.device) -> Extractor:
    """
    spec: "inception=FILE", "dinov2=DIR", "clip=DIR", "clip=ARCHITECTURE:FILE" or "efficientnet"
    resize: of inception alone, for which the field has several; the others have one
    Raises ConfigError for another spec, CheckpointError for weights that are missing, do not fit, or are not those that
    their name says.
    """
    kind, _, place = spec.partition("=")
    check(kind in KINDS, "--features", spec, "inception=FILE, dinov2=DIR, clip=DIR or efficientnet")
    if kind == "efficientnet":
        check(not place, "--features", spec, "efficientnet alone: its weights come in a package")
        return _efficientnet(device)
    if not place:
        raise CheckpointError(f"--features {kind} names no weights; {GET[kind]}")
    return {"inception": _inception, "dinov2": _dinov2, "clip": _clip}[kind](place, resize, device)


def check_published(path: Path) -> str:
    """The file's sha256. Raises CheckpointError where its name has that of another: the file is cut short, or no copy
    of what was published."""
    found = sha256(path)
    named = NAMED_BY_HASH.search(path.name)
    if named and not found.startswith(named[1]):
        raise CheckpointError(
            f"{path} has the sha256 {found[:8]}..., its name says {named[1]}: it is not the published file; fetch it "
            "again, or give weights of your own another name."
        )
    return found


def _inception(place: str, resize: ResizeName, device: torch.device) -> Extractor:
    from t2i.nn.inception import SIZE_PX, WIDTH, Inception

    path = Path(place)
    if not path.is_file():
        raise CheckpointError(f"--features inception: {path} does not exist; {GET['inception']}")
    digest = check_published(path)
    weights = read_weights(path)
    network = Inception()
    own = network.state_dict()
    for name, value in own.items():
        counted = name.endswith("num_batches_tracked")  # which older files have not
        if name in weights and weights[name].shape == value.shape:
            continue
        if not (counted and name not in weights):
            found = tuple(weights[name].shape) if name in weights else "missing"
            raise CheckpointError(f"{path}: {name} is {found}; Inception needs shape {tuple(value.shape)}.")
    network.load_state_dict({name: weights.get(name, value) for name, value in own.items()})
    network.to(device)
    return Extractor(
        "inception",
        "Inception v3 (2015-12-05)",
        WIDTH,
        resize,
        digest,
        "FID",
        lambda pictures: network(resized(pictures, SIZE_PX, resize).to(device)),
    )


def _dinov2(place: str, resize: ResizeName, device: torch.device) -> Extractor:
    """The normalised state of the class token, as in Stein et al., 2306.04675."""
    from transformers import Dinov2Model

    from t2i.text.pretrained import quiet

    try:
        with quiet():
            loaded: Any = Dinov2Model.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # whatever the reader of a folder raises
        raise CheckpointError(
            f"--features dinov2={place} cannot be loaded ({reason_of(error)}); {GET['dinov2']}"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"--features dinov2={place} is not a whole DINOv2: it lacks {missing[0]}.")
    model = model.eval().requires_grad_(False).to(device)

    def compute(pictures: Tensor) -> Tensor:
        return model(_imagenet(resized(pictures, DINOV2_PX, "clean")).to(device)).pooler_output

    digest = _digest(model)
    width = model.config.hidden_size
    title = f"DINOv2, width {width}, {model.config.num_hidden_layers} layers"
    return Extractor("dinov2", title, width, "clean", digest, "FD over DINOv2", compute)


def _clip(place: str, resize: ResizeName, device: torch.device) -> Extractor:
    name, colon, file = place.partition(":")
    name, weights = (name, file) if colon and not Path(place).exists() else (place, None)
    if not Path(weights or name).exists():
        raise CheckpointError(f"--features clip: {weights or name} does not exist; {GET['clip']}")
    if weights is not None:
        check_published(Path(weights))
    clip = load_clip(name, weights, device, with_text=True, flag="--features clip")

    def compute(pictures: Tensor) -> Tensor:
        from PIL import Image

        images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
        return clip.image_features(torch.stack([clip.preprocess(image) for image in images]).to(device))

    title = f"CLIP {Path(name).name}"
    return Extractor("clip", title, clip.width, "published", clip.sha256, "FD over CLIP", compute, clip)


def _efficientnet(device: torch.device) -> Extractor:
    from t2i.nn.efficientnet import EfficientNetLite0

    network = EfficientNetLite0().to(device)

    def compute(pictures: Tensor) -> Tensor:
        return network.pooled((resized(pictures, EFFICIENTNET_PX, "clean") / 127.5 - 1).to(device))

    title = "EfficientNet-Lite0 of ImageNet"
    return Extractor("efficientnet", title, 1280, "clean", _digest(network), "FD over EfficientNet", compute)


def _imagenet(pixels: Tensor) -> Tensor:
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels / 255 - mean) / std


def _digest(network: nn.Module) -> str:
    from t2i.data.encoded import weights_hash

    return weights_hash(network.state_dict().items())


def clip_scores(clip: Clip, features: Tensor, captions: Sequence[str], device: torch.device) -> Tensor:
    """(N,) the CLIP score of each picture (Hessel et al., 2104.08718, without their factor 2.5): the cosine of picture
    and caption, not below 0, times 100.

    features: (N, width) of length 1
    """
    texts = [
        clip.text_features(captions[start : start + 64], device).cpu()
        for start in range(0, len(captions), 64)
    ]
    return 100 * (normalize(features, dim=-1) * torch.cat(texts)).sum(-1).clamp_min(0)
