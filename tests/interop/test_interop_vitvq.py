"""ViT-VQGAN of enhancing-transformers comes in and goes out; its networks are written out here from the names of the
checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i import families
from t2i.errors import UserError
from t2i.interfaces import ImageCodec
from t2i.interop.compvis_shapes import Shapes
from t2i.interop.convert import Conversion, Options, prepare, write
from t2i.interop.parts import CodecPart, Parts, codec_shapes
from t2i.interop.vitvq import infer, read_vitvq
from t2i.interop.weights import Weight, in_memory
from t2i.training import checkpoint, run_folder

PATCH, SIDE, CODES, DIM = 4, 3, 20, 6


def shapes(patch: int, side: int, codes: int, dim: int, **parts: tuple[int, int, int]) -> dict[str, tuple]:
    """Of the checkpoint; parts: width, depth and heads of the encoder and of the decoder."""
    found: dict[str, tuple] = {"quantizer.embedding.weight": (codes, dim)}
    for part, (width, depth, heads) in parts.items():
        found[f"{part}.{part[:2]}_pos_embedding"] = (1, side**2, width)
        pairs = {"transformer.norm": ((width,), (width,))}
        for i in range(depth):
            pairs[f"transformer.layers.{i}.0.norm"] = pairs[f"transformer.layers.{i}.1.norm"] = (
                (width,),
                (width,),
            )
            found[f"{part}.transformer.layers.{i}.0.fn.to_qkv.weight"] = (3 * 64 * heads, width)
            pairs[f"transformer.layers.{i}.0.fn.to_out"] = ((width, 64 * heads), (width,))
            pairs[f"transformer.layers.{i}.1.fn.net.0"] = ((4 * width, width), (4 * width,))
            pairs[f"transformer.layers.{i}.1.fn.net.2"] = ((width, 4 * width), (width,))
        if part == "encoder":
            pairs["to_patch_embedding.0"] = ((width, 3, patch, patch), (width,))
            found |= {"pre_quant.weight": (dim, width), "pre_quant.bias": (dim,)}
        else:
            pairs["to_pixel.1"] = ((width, 3, patch, patch), (3,))
            found |= {"post_quant.weight": (width, dim), "post_quant.bias": (width,)}
        for name, (weight, bias) in pairs.items():
            found |= {f"{part}.{name}.weight": weight, f"{part}.{name}.bias": bias}
    return found


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wanted = shapes(PATCH, SIDE, CODES, DIM, encoder=(16, 2, 2), decoder=(24, 1, 3))
    made = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in wanted.items()}
    for name in ("encoder.en_pos_embedding", "pre_quant.weight"):
        made[name] *= 10  # so that codes differ
    return made


class Published:
    """The forward pass in float64."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = {name: value.double() for name, value in weights.items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def transformer(self, x: Tensor, part: str) -> Tensor:
        """(B, N, width), positions already added."""
        i = 0
        while f"{part}.transformer.layers.{i}.0.norm.weight" in self.w:
            layer = f"{part}.transformer.layers.{i}"
            qkv = self.linear(self.norm(x, f"{layer}.0.norm"), f"{layer}.0.fn.to_qkv")
            q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
            attention = torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v
            x = x + self.linear(attention.transpose(1, 2).flatten(2), f"{layer}.0.fn.to_out")
            hidden = torch.tanh(self.linear(self.norm(x, f"{layer}.1.norm"), f"{layer}.1.fn.net.0"))
            x = x + self.linear(hidden, f"{layer}.1.fn.net.2")
            i += 1
        return self.norm(x, f"{part}.transformer.norm")

    def tokens(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, N): the code of the largest cosine."""
        name = "encoder.to_patch_embedding.0"
        x = F.conv2d(image, self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride=PATCH)
        x = self.transformer(x.flatten(2).transpose(1, 2) + self.w["encoder.en_pos_embedding"], "encoder")
        return F.cosine_similarity(self.linear(x, "pre_quant")[:, :, None], self.codes, dim=-1).argmax(-1)

    @property
    def codes(self) -> Tensor:
        return self.w["quantizer.embedding.weight"]

    def picture(self, tokens: Tensor) -> Tensor:
        """(B, N) -> (B, 3, H, W), about [0, 1]."""
        x = self.linear(F.normalize(self.codes, dim=-1)[tokens], "post_quant")
        x = self.transformer(x + self.w["decoder.de_pos_embedding"], "decoder").transpose(1, 2)
        name = "decoder.to_pixel.1"
        x = x.unflatten(2, (SIDE, SIDE))
        return F.conv_transpose2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride=PATCH)


@torch.no_grad()
def test_tokens_and_pictures_are_those_of_the_original(weights, tmp_path, convert):
    theirs = Published(weights)
    image = torch.rand(5, 3, PATCH * SIDE, PATCH * SIDE, dtype=torch.float64) * 2 - 1
    expected = theirs.tokens((image + 1) / 2)
    assert len(expected.unique()) > 5
    tokens = torch.arange(2 * SIDE**2).view(2, -1)
    picture = 2 * theirs.picture(tokens) - 1

    torch.save({"state_dict": weights | {"loss.discriminator.x": torch.zeros(1)}}, tmp_path / "vitvq.ckpt")
    codec = codec_of(convert(tmp_path / "vitvq.ckpt", "run"))
    assert torch.equal(codec.tokens(image).flatten(1), expected)
    found = codec.decode_tokens(tokens.unflatten(1, (SIDE, SIDE)))
    torch.testing.assert_close(found, picture, rtol=1e-10, atol=1e-10)


def codec_of(run: Path) -> Any:
    """In float64."""
    loaded = checkpoint.load(run_folder.weights_file(run))
    codec: ImageCodec = families.get("autoencoder").load_codec()(loaded.config)
    checkpoint.load_into(codec, loaded.weights, loaded.path, prefix="codec.")
    return codec.eval().double()


def test_it_goes_out_as_it_came_in(weights, tmp_path, convert):
    """To the byte, codes of any length too."""
    save_file(weights, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    run = convert(tmp_path / "theirs.safetensors", "run")
    for source, name in ((run, "back"), (tmp_path / "theirs.safetensors", "straight")):
        out = convert(source, f"{name}.safetensors", to="compvis")
        assert out.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    # Training goes on from averages of vectors of length 1.
    lengths = load_file(run / "model.safetensors")["codec.codebook.cluster_sum"].double().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(CODES, dtype=torch.float64), rtol=0, atol=1e-6)


def run_with(weights: dict[str, Tensor], folder: Path, **changed: dict[str, Any]) -> Path:
    """A run with other entries of codec and backbone, on random weights where the file's have another shape."""
    config = infer(Shapes({name: in_memory(value) for name, value in weights.items()}, Path()))
    for entry, values in changed.items():
        if "name" in values:
            config[entry] = {}
        for key, value in values.items():
            both = isinstance(value, dict)
            config[entry][key] = {**config[entry][key], **value} if both else value
    read = read_vitvq({name: in_memory(value) for name, value in weights.items()}, Path()).weights
    taken = {
        name: read[name] if name in read and read[name].shape == shape else in_memory(torch.randn(shape))
        for name, shape in codec_shapes(config).items()
    }
    write(Conversion(Parts("a test's", CodecPart(config, taken, 1.0)), folder, "t2i", "fp32"))
    return folder


@torch.no_grad()
def test_a_codec_that_was_trained_on_pictures_from_minus_one_to_one(weights, tmp_path, convert):
    for name in ("encoder.to_patch_embedding.0", "decoder.to_pixel.1"):  # which float32 sums exactly
        for each in (f"{name}.weight", f"{name}.bias"):
            weights[each] = (weights[each] * 256).round() / 256
    run = run_with(weights, tmp_path / "run", backbone={"unit_range": False})
    codec, out = codec_of(run), convert(run, "out.safetensors")
    theirs = Published(load_file(out))
    image = torch.rand(5, 3, PATCH * SIDE, PATCH * SIDE, dtype=torch.float64) * 2 - 1
    tokens = codec.tokens(image)
    assert len(tokens.unique()) > 5
    assert torch.equal(theirs.tokens((image + 1) / 2), tokens.flatten(1))
    picture = 2 * theirs.picture(tokens.flatten(1)) - 1
    torch.testing.assert_close(codec.decode_tokens(tokens), picture, rtol=1e-10, atol=1e-10)
    again = convert(convert(out, "again"), "again.safetensors")
    assert again.read_bytes() == out.read_bytes()


OTHERS: dict[str, dict[str, Any]] = {
    "backbone.encoder.activation is 'gelu'; allowed: tanh": {"backbone": {"encoder": {"activation": "gelu"}}},
    "backbone.decoder.head_dim is 32; allowed: 64": {"backbone": {"decoder": {"head_dim": 32}}},
    "backbone.encoder.num_heads is 1; allowed: 2 or more": {
        "backbone": {"encoder": {"num_heads": 1, "width": 64}}
    },
    "codec.normalize is False; allowed: true": {"codec": {"normalize": False}},
    "codec.name is 'kl'; allowed: vq": {"codec": {"name": "kl"}},
    "codec.code_dim is 3; allowed: 6, as backbone.latent_channels": {"codec": {"code_dim": 3}},
}


@pytest.mark.parametrize("sentence", OTHERS)
def test_what_the_file_could_not_say_is_refused(sentence, weights, tmp_path):
    run = run_with(weights, tmp_path / "run", **OTHERS[sentence])
    with pytest.raises(UserError) as raised:
        prepare(run, tmp_path / "out.safetensors", Options())
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_it_has_no_other_form(weights, tmp_path, sd1_single):
    run = run_with(weights, tmp_path / "run")
    for source, options in ((run, Options()), (sd1_single, Options(vae=str(run)))):
        with pytest.raises(UserError, match=r"backbone.name is 'vit'; allowed: ldm \(vit by itself goes"):
            prepare(source, tmp_path / "out", options)


@pytest.mark.parametrize(("width", "depth", "heads"), [(512, 8, 8), (768, 12, 12)], ids=["small", "base"])
def test_the_published_ones_are_taken_whole(width, depth, heads):
    """imagenet_vitvq_small and _base."""
    sizes = (width, depth, heads)
    names = shapes(8, 32, 8192, 32, encoder=sizes, decoder=sizes)
    read = read_vitvq(
        {name: Weight(shape, torch.float32, torch.empty) for name, shape in names.items()}, Path()
    )
    backbone = read.config["backbone"]
    layer = 12 * width**2 + 10 * width  # without biases of queries, keys and values
    both = 2 * (depth * layer + 1024 * width + 2 * width + 3 * 64 * width) + width + 3
    assert sum(weight.nbytes(torch.int8) for weight in read.weights.values()) == (
        both + 8192 * 32 + 2 * 32 * width + 32 + width
    )
    assert (backbone["resolution_px"], backbone["encoder"]["num_heads"]) == (256, heads)


def test_what_does_not_fit_is_one_sentence(weights, tmp_path):
    def refused(**changed: Tensor | None) -> str:
        values = weights | {name.replace("__", "."): value for name, value in changed.items()}
        torch.save({n: v for n, v in values.items() if v is not None}, tmp_path / "other.pt")
        with pytest.raises(UserError) as raised:
            prepare(tmp_path / "other.pt", tmp_path / "out", Options())
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "1 weight [pre_quant.bias] is missing" in refused(pre_quant__bias=None)
    assert "has 8 positions; allowed: the square" in refused(encoder__en_pos_embedding=torch.zeros(1, 8, 16))
    wide = {"encoder__transformer__layers__0__1__fn__net__0__weight": torch.zeros(60, 16)}
    assert "net.0.weight has shape (60, 16); allowed: (64, 16)" in refused(**wide)
