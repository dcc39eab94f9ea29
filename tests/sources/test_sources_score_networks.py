"""The networks of `t2i data score` against open_clip, transformers and the published heads used directly.

The weights are random and small; the files are laid out as the published ones.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as parquet
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from score_files import (
    CPU,
    SIZES,
    TINY,
    WIDTH,
    chain,
    encoded,
    linear_head,
    picture,
    scored,
    tar_of,
    tiny_reference,
    tiny_weights,
    without_activations,
)
from torch import nn
from torchvision import transforms

from t2i.errors import CheckpointError
from t2i.evaluation.clip import load_clip
from t2i_pipelines.scoring.heads import HEADS, for_watermark_detector, load_head
from t2i_pipelines.scoring.scorer import ScorerFiles


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def reference(weights):
    return tiny_reference(weights)


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_prepared_as_published(size, weights, reference):
    image = picture(size)
    ours = load_clip("ViT-tiny-quickgelu", str(weights), CPU, with_text=False).preprocess(image)
    torch.testing.assert_close(ours, reference[1](image), atol=1e-5, rtol=0)
    published = transforms.Compose(  # LAION-5B-WatermarkDetection
        [
            transforms.Resize((256, 256)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    torch.testing.assert_close(for_watermark_detector(image), published(image), atol=1e-5, rtol=0)


def with_relu(s, x):
    for n in (0, 3, 6, 9):
        x = torch.clamp(x @ s[f"layers.{n}.weight"].T + s[f"layers.{n}.bias"], min=0)
    return x @ s["layers.11.weight"].T + s["layers.11.bias"]


def h14(s, x):
    for n in (0, 3, 6, 9, 12):
        x = torch.clamp(x @ s[f"layers.{n}.weight"].T + s[f"layers.{n}.bias"], min=0)
    for n in (15, 16):
        x = x @ s[f"layers.{n}.weight"].T + s[f"layers.{n}.bias"]
    return x


def autokeras(layers):
    def forward(s, x):
        x = (x - s["norm.mean"]) / (torch.sqrt(s["norm.variance"]) + 1e-10)
        for n in range(1, layers + 1):
            x = x @ s[f"linear_{n}.weight"].T + s[f"linear_{n}.bias"]
            x = torch.clamp(x, min=0) if n < layers else 1 / (1 + torch.exp(-x))
        return x

    return forward


PUBLISHED = {
    "linear": ((), (WIDTH, 1), lambda s, x: x @ s["weight"].T + s["bias"]),
    "MLP without activations": ((0, 2, 4, 6, 7), (WIDTH, 1024, 128, 64, 16, 1), without_activations),
    "MLP with ReLU": ((0, 3, 6, 9, 11), (WIDTH, 1024, 128, 64, 16, 1), with_relu),
    "H/14 NSFW": ((0, 3, 6, 9, 12, 15, 16), (WIDTH, 1024, 2048, 1024, 256, 128, 16, 1), h14),
    "L/14 NSFW": ((1, 2, 3, 4), (WIDTH, 64, 512, 256, 1), autokeras(4)),
    "B/32 NSFW": ((1, 2, 3), (WIDTH, 32, 32, 1), autokeras(3)),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_heads_as_published(tmp_path, name, suffix):
    from safetensors.torch import save_file

    assert PUBLISHED.keys() == {head.name for head in HEADS}
    torch.manual_seed(3)
    numbers, widths, published = PUBLISHED[name]
    if name == "linear":
        state = nn.Linear(WIDTH, 1).state_dict()
    else:
        state = chain(numbers, widths, "linear_" if numbers[0] else "layers.")
    if numbers and numbers[0]:
        state |= {"norm.mean": torch.randn(WIDTH), "norm.variance": torch.rand(WIDTH) + 0.1}
    path = tmp_path / f"head{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(dict(state), path)
    found, head = load_head(path, WIDTH)
    assert found == name
    inputs = torch.nn.functional.normalize(torch.randn(7, WIDTH), dim=-1)
    torch.testing.assert_close(head(inputs), published(state, inputs), atol=1e-5, rtol=1e-5)


class Evil:
    def __reduce__(self):
        return (os.system, ("exit 3",))


def test_heads_that_are_refused(tmp_path):
    linear_head(tmp_path / "wide.pth", width=768)
    torch.save(chain((0, 1, 2), (WIDTH, 8, 8, 1)), tmp_path / "unknown.pth")
    torch.save(chain((0, 2, 4, 6, 7), (WIDTH, 8, 8, 8, 9, 2)), tmp_path / "two.pth")
    torch.save({"weight": torch.zeros(1, WIDTH), "bias": Evil()}, tmp_path / "code.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, words in (
        ("wide", r"weight is \(1, 768\); allowed: \(1, 24\)"),
        (
            "unknown",
            r"holds layers\.0\.bias.*; allowed: weight and bias of one linear layer, or of the layers of",
        ),
        ("two", r"layers\.7\.weight is \(2, 9\); allowed: \(1, 9\)"),
        ("code", "cannot be read as weights"),
        ("list", "is a list; allowed: a state dict"),
        ("text", "is text; allowed: a file of weights"),
        ("absent", "cannot be read: No such file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_head(tmp_path / f"{name}.pth", WIDTH)


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("transformers") / "clip"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=WIDTH,
        text_config={**shape, "eos_token_id": 49407},
        vision_config={**shape, "image_size": 32, "patch_size": 16},
    )
    CLIPModel(config).save_pretrained(folder)
    theirs = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): number for token, number in theirs.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)]
    CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split(" ")) for m in merges]).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": 32},
                "crop_size": {"height": 32, "width": 32},
                "resample": 3,
                "image_mean": [0.5, 0.4, 0.3],
                "image_std": [0.2, 0.3, 0.4],
            }
        )
    )
    return folder


def test_a_transformers_folder_as_transformers_uses_it(tmp_path, transformers_folder):
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    # Sizes whose margins are even: with odd ones transformers crops a pixel beside OpenAI.
    sizes = ((48, 32), (32, 64), (64, 128), (32, 32))
    members = []
    for i, size in enumerate(sizes):
        members += [(f"{i}.png", encoded(picture(size, i))), (f"{i}.txt", f"a picture, {i}".encode())]
    path = tar_of(tmp_path / "00000.tar", members)
    scored(ScorerFiles(str(transformers_folder), similarity=True), path)
    found = parquet.read_table(tmp_path / "00000.scores.parquet")["similarity"].to_numpy()

    model = CLIPModel.from_pretrained(transformers_folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(transformers_folder)
    tokenizer = CLIPTokenizer.from_pretrained(transformers_folder)
    pixels = processor([picture(s, i) for i, s in enumerate(sizes)], return_tensors="pt").pixel_values
    texts = tokenizer(
        [f"a picture, {i}" for i in range(4)], padding="max_length", max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(input_ids=texts.input_ids, pixel_values=pixels).logits_per_image
    np.testing.assert_allclose(found, logits.diag() / model.logit_scale.exp().item(), atol=1e-5)
    ours = load_clip(str(transformers_folder), None, CPU, with_text=False)
    for i, size in enumerate(sizes):
        torch.testing.assert_close(ours.preprocess(picture(size, i)), pixels[i], atol=1e-5, rtol=0)


def test_an_open_clip_folder_brings_its_own_preprocessing(tmp_path, weights):
    folder = tmp_path / "folder"
    folder.mkdir()
    preprocessing = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    config = {"model_cfg": TINY, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "open_clip_pytorch_model.bin").write_bytes(weights.read_bytes())
    clip = load_clip(str(folder), None, CPU, with_text=True)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image = picture((90, 40))
    torch.testing.assert_close(clip.preprocess(image), transform(image), atol=1e-5, rtol=0)
    assert clip.width == WIDTH
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.eval().encode_text(open_clip.tokenize(["x"])), dim=-1)
        torch.testing.assert_close(clip.text_features(["x"], CPU), expected, atol=1e-5, rtol=0)
