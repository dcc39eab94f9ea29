"""DALL-E's discrete VAE comes in: its encoder is transformers' FlavaImageCodebook, its decoder is written out here from
the names of the published checkpoint."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interop_models import randomised, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i import families
from t2i.errors import UserError
from t2i.interop.convert import Options, prepare
from t2i.training import checkpoint, run_folder

WIDTH, START, NUM_CODES = 8, 6, 20


@pytest.fixture
def flava() -> Any:
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    torch.manual_seed(0)
    return randomised(
        FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=WIDTH, vocab_size=NUM_CODES)), 5
    )


def encoder_weights(flava: Any) -> dict[str, Tensor]:
    """As the package dall_e names them."""
    return {
        name.replace(".group.", ".")
        .replace(".path.", ".")
        .replace(".weight", ".w")
        .replace(".bias", ".b"): value
        for name, value in flava.state_dict().items()
    }


def decoder_weights() -> dict[str, Tensor]:
    """Random, as the package dall_e names and shapes them."""
    generator = torch.Generator().manual_seed(6)
    weights = {}

    def layer(name: str, before: int, after: int, kernel: int) -> None:
        weights[f"blocks.{name}.w"] = 0.1 * torch.randn(after, before, kernel, kernel, generator=generator)
        weights[f"blocks.{name}.b"] = 0.1 * torch.randn(after, generator=generator)

    layer("input", NUM_CODES, START, 1)
    before = START
    for group, after in enumerate((8 * WIDTH, 4 * WIDTH, 2 * WIDTH, WIDTH), start=1):
        for block in (1, 2):
            place = f"group_{group}.block_{block}"
            if block == 1:
                layer(f"{place}.id_path", before, after, 1)
            widths = (before, after // 4, after // 4, after // 4, after)
            for i, kernel in enumerate((1, 3, 3, 3)):
                layer(f"{place}.res_path.conv_{i + 1}", widths[i], widths[i + 1], kernel)
            before = after
    layer("output.conv", WIDTH, 6, 1)
    return weights


def decoded(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """(B, h, w) -> the picture (B, 3, 8h, 8w) in [0, 1], as dall_e's notebook draws it."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = weights[f"blocks.{name}.w"].double()
        return F.conv2d(x, weight, weights[f"blocks.{name}.b"].double(), padding=weight.shape[-1] // 2)

    x = conv(F.one_hot(tokens, NUM_CODES).movedim(-1, 1).double(), "input")
    for group in (1, 2, 3, 4):
        for block in ("block_1", "block_2"):
            place = f"group_{group}.{block}"
            h = x
            for i in (1, 2, 3, 4):
                h = conv(h.relu(), f"{place}.res_path.conv_{i}")
            x = (conv(x, f"{place}.id_path") if block == "block_1" else x) + h / 64
        if group < 4:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = conv(x.relu(), "output.conv")
    return ((torch.sigmoid(x[:, :3]) - 0.1) / 0.8).clamp(0, 1)


def save(folder: Path, kind: str, flava: Any) -> None:
    """The codec in one of its forms."""
    folder.mkdir()
    if kind == "state dicts":
        torch.save(encoder_weights(flava), folder / "encoder.pt")
        torch.save(decoder_weights(), folder / "decoder.pt")
        return
    save_file(decoder_weights(), folder / "decoder.safetensors")
    if kind == "safetensors":
        save_file(encoder_weights(flava), folder / "encoder.safetensors")
    else:
        flava.save_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["state dicts", "safetensors", "flava"])
def test_tokens_and_pictures_are_those_of_the_original(tmp_path, convert, flava, kind):
    save(tmp_path / "dalle", kind, flava)
    loaded = checkpoint.load(run_folder.weights_file(convert(tmp_path / "dalle", "run")))
    codec = families.get("autoencoder").load_codec()(loaded.config)
    checkpoint.load_into(codec, loaded.weights, loaded.path, prefix="codec.")
    codec.eval().double()
    image = torch.rand(2, 3, 32, 48, dtype=torch.float64) * 2 - 1
    logits = flava.double()(0.8 * (image + 1) / 2 + 0.1)
    assert relative_error(codec.moments(image), logits) < 1e-12
    assert torch.equal(codec.tokens(image), logits.argmax(dim=1))
    tokens = torch.randint(NUM_CODES, (2, 3, 4))
    picture = (codec.decode_tokens(tokens).clamp(-1, 1) + 1) / 2
    assert (picture - decoded(decoder_weights(), tokens)).abs().max() < 1e-12


def refused(source: Path, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        prepare(source, source.parent / "out", Options(**options))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_published_pickles_are_refused(tmp_path, monkeypatch):
    """encoder.pkl and decoder.pkl are pickled modules: to read them is to run what they name."""
    package, module = types.ModuleType("dall_e"), types.ModuleType("dall_e.encoder")
    monkeypatch.setitem(sys.modules, "dall_e", package)
    monkeypatch.setitem(sys.modules, "dall_e.encoder", module)
    module.Encoder = type("Encoder", (nn.Linear,), {"__module__": "dall_e.encoder"})
    folder = tmp_path / "dalle"
    folder.mkdir()
    torch.save(module.Encoder(2, 2), folder / "encoder.pkl")
    for source in (folder, folder / "encoder.pkl"):
        words = refused(source)
        assert (
            "encoder.pkl cannot be read without running code that it names (dall_e.encoder.Encoder)" in words
        )
        assert "torch.save(dall_e.load_model('" in words
        assert "encoder.pt')" in words


def test_what_does_not_fit_is_named(tmp_path, flava):
    folder = tmp_path / "dalle"
    save(folder, "state dicts", flava)
    weights = decoder_weights()
    torch.save({n: w for n, w in weights.items() if n != "blocks.output.conv.b"}, folder / "decoder.pt")
    assert (
        "decoder.pt does not fit the decoder that it describes: 1 weight [blocks.output.conv.bias] is missing"
        in (refused(folder))
    )
    torch.save(weights | {"blocks.input.w": torch.zeros(START, NUM_CODES + 1, 1, 1)}, folder / "decoder.pt")
    assert "blocks.input.weight has shape (6, 21, 1, 1); allowed: (6, 20, 1, 1)" in refused(folder)
    (folder / "decoder.pt").rename(folder / "d.pt")
    assert refused(folder).endswith(
        "has no decoder of DALL-E's discrete VAE; allowed: decoder.safetensors, decoder.pt."
    )
    assert "is one half of DALL-E's discrete VAE; give the folder" in refused(folder / "encoder.pt")


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 7), ("num_blocks_per_group", True), ("vocab_size", "20")]
)
def test_a_configuration_says_what_its_weights_have(tmp_path, flava, key, value):
    save(tmp_path / "dalle", "flava", flava)
    path = tmp_path / "dalle/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    sentence = refused(tmp_path / "dalle")
    assert f"{path}: {key} is {value!r}; allowed: " in sentence
    assert ", as its weights have" in sentence


def test_it_goes_out_as_it_came_in(tmp_path, convert, flava):
    """To the bit: transformers loads the encoder, and the decoder has dall_e's names."""
    save(tmp_path / "dalle", "state dicts", flava)
    run = convert(tmp_path / "dalle", "run")
    out = convert(run, "out")
    loaded, information = type(flava).from_pretrained(out, output_loading_info=True)
    assert not any(information.values())
    assert loaded.config.hidden_size == WIDTH
    same(loaded.state_dict(), flava.state_dict())
    same(load_file(out / "decoder.safetensors"), decoder_weights())
    same(load_file(convert(out, "back") / "model.safetensors"), load_file(run / "model.safetensors"))
    assert "library_name: transformers" in (out / "README.md").read_text()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_where_it_has_no_form(tmp_path, convert, flava, sd1_single):
    save(tmp_path / "dalle", "state dicts", flava)
    allowed = "backbone.name is 'dvae'; allowed: ldm (dvae by itself goes into a folder"
    with pytest.raises(UserError) as raised:
        convert(tmp_path / "dalle", "out.safetensors", to="compvis")
    assert allowed in str(raised.value)
    assert allowed in refused(sd1_single, vae=str(tmp_path / "dalle"))
