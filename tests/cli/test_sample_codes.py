"""`t2i sample` with models of codes: options of drawing, reranking by CLIP, and pictures that are edited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from weight_files import composed, write

from t2i.config import parse_run
from t2i.families.autoregressive import config as ar_config
from t2i.families.autoregressive import model as autoregressive
from t2i.families.masked import config as masked_config
from t2i.families.masked import model as masked

MODELS = {
    "ar": ("autoregressive/tiny_ar", ar_config.Config, autoregressive.model_of),
    "parti": ("autoregressive/tiny_parti", ar_config.Config, autoregressive.model_of),
    "masked": ("masked/tiny_masked", masked_config.Config, masked.model_of),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """(model) -> a file of random weights, of pictures of 32 px and codes of 4 px."""

    def weights(name: str) -> str:
        experiment, config, model_of = MODELS[name]
        codec = composed("experiment=autoencoder/tiny_fsq")
        values = composed(f"experiment={experiment}")
        torch.manual_seed(0)
        model = model_of(parse_run(values, config), {"codec": codec})
        for parameter in model.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        state = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
        return write(tmp_path_factory.mktemp(name) / "model.safetensors", state, values, {"codec": codec})

    return weights


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def drawn(t2i, out: str, *arguments: str) -> list[Path]:
    """In the order of the seeds."""
    done = t2i("sample", "--prompt", "a star", "--device", "cpu", "--out", out, *arguments)
    assert done.code == 0, done
    return sorted(path for path in Path(out).glob("*.png") if path.stem != "grid")


@pytest.mark.parametrize("name", MODELS)
def test_options_of_drawing(t2i, weights, name: str) -> None:
    one = ("--checkpoint", weights(name), "--num-images", "1")
    typed = ("sampling.temperature=0.9", "sampling.guidance_scale=2")
    options = {
        "typed": (*typed, "sampling.top_k=70"),
        "hotter": ("sampling.temperature=3", "sampling.guidance_scale=2", "sampling.top_k=70"),
        "unguided": ("sampling.temperature=0.9", "sampling.guidance_scale=1", "sampling.top_k=70"),
        "likeliest": (*typed, "sampling.top_k=1"),
        "cold": ("sampling.temperature=0", "sampling.guidance_scale=2"),
    }
    found = {out: pixels(drawn(t2i, out, *one, *more)[0]).tobytes() for out, more in options.items()}
    assert found["likeliest"] == found["cold"]
    assert len(set(found.values())) == 4
    too_many = t2i("sample", "--prompt", "a star", *one, "sampling.top_k=100").sentence
    assert "sampling.top_k is 100; allowed: at most 75, the number of codes" in too_many


def test_reranked_by_clip(t2i, weights, small_clip: Path) -> None:
    """The candidate of which transformers' CLIP says the most."""
    from transformers import CLIPModel, CLIPProcessor

    model = ("--checkpoint", weights("ar"), "sampling.temperature=1", "--batch-size", "16")
    every = [pixels(path) for path in drawn(t2i, "every", *model, "--num-images", "32")]
    (best,) = drawn(t2i, "best", *model, "--num-images", "1", "--rerank", "32", "--clip", str(small_clip))
    processor = CLIPProcessor.from_pretrained(small_clip)
    pictures = [Image.fromarray(each) for each in every]
    inputs = processor(text=["a star"], images=pictures, return_tensors="pt", padding=True)
    with torch.inference_mode():
        said = CLIPModel.from_pretrained(small_clip).eval()(**inputs).logits_per_text[0]
    assert len({each.tobytes() for each in every}) == 32
    kept = next(i for i, each in enumerate(every) if (each == pixels(best)).all())
    assert said[kept].item() == pytest.approx(said.max().item(), abs=1e-3)
    assert said.std() > 0.01


def test_a_picture_is_edited(t2i, weights) -> None:
    """With a mask, beyond its sides, and without a mask a share of its codes: what is kept is kept to the byte."""
    before = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(before).save("a.png")
    marked = np.zeros((32, 32), dtype=np.uint8)
    marked[9:22, 8:24] = 255
    Image.fromarray(marked).save("m.png")
    start = ("--checkpoint", weights("masked"), "--num-images", "1", "--image", "a.png")

    (inside,) = map(pixels, drawn(t2i, "inside", *start, "--mask", "m.png"))
    assert (inside[marked == 0] == before[marked == 0]).all()
    assert (inside[marked > 0] != before[marked > 0]).mean() > 0.9

    (beyond,) = map(pixels, drawn(t2i, "beyond", *start, "--extend", "left=8,top=16"))
    assert beyond.shape == (48, 40, 3)
    assert (beyond[16:, 8:] == before).all()
    said = t2i("sample", "--prompt", "x", *start, "--extend", "left=6").sentence
    assert "width is 38; allowed: multiples of 4, the pixels of a code along a side" in said

    free = {
        strength: pixels(drawn(t2i, f"free{strength}", *start, "--strength", strength)[0])
        for strength in ("0.25", "1.0")
    }
    (anew,) = map(pixels, drawn(t2i, "anew", *start[:4]))
    assert (free["1.0"] == anew).all()
    assert (free["0.25"] != anew).any()
