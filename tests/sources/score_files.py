"""Small pictures, shards and random weights for the tests of scores."""

from __future__ import annotations

import io
import json
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import nn

from t2i.launch.ranks import Rank
from t2i_pipelines.scoring.score import score_shards
from t2i_pipelines.scoring.scorer import ScorerFiles, load_scorer

WIDTH = 24
TINY = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    "quick_gelu": True,
}
CPU = torch.device("cpu")
ALONE = Rank()
SIZES = ((48, 40), (31, 97), (32, 32), (200, 121), (35, 64), (90, 33))


def tiny_weights(folder: Path) -> Path:
    """A small random CLIP in the file that open_clip reads, for the architecture ViT-tiny-quickgelu."""
    for architecture, config in (("ViT-tiny-quickgelu", TINY), ("ViT-tiny-other", {**TINY, "embed_dim": 8})):
        (folder / f"{architecture}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{architecture}.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-tiny-quickgelu").state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


def tiny_reference(weights: Path):
    """(model, transform) as a user of open_clip has them."""
    model, _, transform = open_clip.create_model_and_transforms("ViT-tiny-quickgelu", pretrained=str(weights))
    return model.eval(), transform


def picture(size, seed=0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, samples=6, seed=0) -> Path:
    members = []
    for i in range(samples):
        members += [
            (f"{i:04d}.png", encoded(picture(SIZES[i % len(SIZES)], seed + i))),
            (f"{i:04d}.txt", f"picture number {i} of {seed}".encode()),
        ]
    return tar_of(path, members)


def linear_head(path: Path, width=WIDTH, seed=1) -> Path:
    torch.manual_seed(seed)
    torch.save(nn.Linear(width, 1).state_dict(), path)
    return path


def chain(numbers, widths, prefix="layers.") -> OrderedDict[str, torch.Tensor]:
    state = OrderedDict()
    for number, inputs, outputs in zip(numbers, widths, widths[1:], strict=False):
        state[f"{prefix}{number}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        state[f"{prefix}{number}.bias"] = torch.randn(outputs)
    return state


# Written out from the published code; the widths are the published ones but for the first.
def without_activations(s, x):
    for n in (0, 2, 4, 6, 7):
        x = x @ s[f"layers.{n}.weight"].T + s[f"layers.{n}.bias"]
    return x


def scored(
    files: ScorerFiles, *shards: Path, out=None, rank=ALONE, batch_size=4, progress=lambda share: None
):
    scorer = load_scorer(files, CPU)
    return score_shards([str(each) for each in shards], out, scorer, batch_size, 2, rank, progress)


def features(reference, images) -> torch.Tensor:
    model, transform = reference
    with torch.no_grad():
        found = model.encode_image(torch.stack([transform(image) for image in images]))
    return found / found.norm(dim=-1, keepdim=True)
