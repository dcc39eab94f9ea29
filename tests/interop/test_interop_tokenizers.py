"""Published tokenizers: VQGAN and GumbelVQ of taming-transformers and aMUSEd's VQModel."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_models import randomised, relative_error
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d

from t2i import families
from t2i.errors import CheckpointError, ConfigError
from t2i.interfaces import TokenCodec
from t2i.interop.convert import Options, prepare
from t2i.interop.diffusers_config import read_codec
from t2i.interop.names import diffusers_codec
from t2i.interop.parts import codec_shapes
from t2i.training import checkpoint, run_folder


def levels(*widths: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 2,
    }


VQGAN: dict[str, Any] = levels(32, 32, 64)
VQGAN["down_block_types"] = (*VQGAN["down_block_types"][:2], "AttnDownEncoderBlock2D")
VQGAN["up_block_types"] = ("AttnUpDecoderBlock2D", *VQGAN["up_block_types"][1:])
VQGAN |= {"latent_channels": 16, "vq_embed_dim": 12, "num_vq_embeddings": 64, "scaling_factor": 1.0}
# amused/amused-256/vqvae/config.json
AMUSED = levels(128, 256, 256, 512, 768) | {
    "latent_channels": 64,
    "num_vq_embeddings": 8192,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
}


def small(**values: Any) -> Any:
    """A VQModel of diffusers with random weights."""
    from diffusers import VQModel

    torch.manual_seed(0)
    model = randomised(VQModel(**values), 5)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def in_taming_names(model: Any) -> dict[str, Tensor]:
    """The weights of a VQModel as taming-transformers names and shapes them."""
    ends = {
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "resnets": "block",
        "attentions": "attn",
    }
    ends |= {"downsamplers.0": "downsample", "upsamplers.0": "upsample"}
    ends |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    middle = {"resnets.0": "block_1", "resnets.1": "block_2", "attentions.0": "attn_1"}
    count = len(model.config.block_out_channels)
    weights = {}
    for name, value in model.state_dict().items():
        matrix = re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight$", name)
        for theirs, ours in middle.items():
            name = name.replace(f"mid_block.{theirs}", f"mid.{ours}")
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{count - 1 - int(found[1])}", name)
        for theirs, ours in ends.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        weights[name] = value[:, :, None, None] if matrix else value
    return weights


def codec_of(run: Path) -> TokenCodec:
    loaded = checkpoint.load(run_folder.weights_file(run))
    codec = families.get("autoencoder").load_codec()(loaded.config)
    checkpoint.load_into(codec, loaded.weights, loaded.path, prefix="codec.")
    assert isinstance(codec, TokenCodec)
    return codec.eval().double()


@torch.no_grad()
def check_equals(codec: TokenCodec, model: Any) -> None:
    """Tokens of pictures, and pictures of any tokens."""
    model.double()
    image = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    latent = model.encode(image).latents
    _, _, (_, _, indices) = model.quantize(latent)
    assert torch.equal(codec.tokens(image).flatten(), indices)
    tokens = torch.randint(codec.num_codes, (2, 2, 3))
    quantized = model.quantize.get_codebook_entry(tokens.flatten(), (2, 2, 3, latent.shape[1]))
    expected = model.decoder(model.post_quant_conv(quantized))
    assert relative_error(codec.decode_tokens(tokens), expected) < 1e-12


@pytest.mark.parametrize("kind", ["lightning", "bare", "safetensors"])
def test_a_taming_checkpoint_equals_diffusers(tmp_path, convert, kind):
    from safetensors.torch import save_file

    model = small(**VQGAN)
    weights = in_taming_names(model)
    assert {
        "encoder.down.2.attn.1.q.weight",
        "decoder.up.2.upsample.conv.bias",
        "decoder.mid.attn_1.k.weight",
    } <= (weights.keys())
    source = tmp_path / {"lightning": "last.ckpt", "bare": "vqgan.pt", "safetensors": "v.safetensors"}[kind]
    if kind == "lightning":
        losses = {
            "loss.discriminator.main.0.weight": torch.rand(4),
            "loss.perceptual_loss.lin0.weight": torch.rand(1),
        }
        torch.save({"state_dict": weights | losses, "epoch": 3, "callbacks": {}}, source)
    elif kind == "bare":
        torch.save(weights, source)
    else:
        save_file(weights, source)
    check_equals(codec_of(convert(source, "run")), model)


def test_a_taming_checkpoint_that_lacks_a_weight_or_has_other_widths(tmp_path):
    weights = in_taming_names(small(**VQGAN))
    quant = weights.pop("quant_conv.weight")
    torch.save(weights, tmp_path / "lacks.pt")
    with pytest.raises(CheckpointError, match=r"1 weight \[quant_conv.weight\] is missing"):
        prepare(tmp_path / "lacks.pt", tmp_path / "out", Options())
    torch.save(weights | {"quant_conv.weight": quant[:, :8]}, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError, match=r"quant_conv.weight has shape \(12, 8, 1, 1\); allowed: \(12, 16, 1, 1\)"
    ):
        prepare(tmp_path / "other.pt", tmp_path / "out", Options())


GUMBEL: dict[str, Any] = VQGAN | {"vq_embed_dim": 16}


def as_gumbel(model: Any) -> dict[str, Tensor]:
    """A VQModel's networks around the quantiser of taming's GumbelVQ, with its names."""
    weights = in_taming_names(model)
    codes, width = weights.pop("quantize.embedding.weight").shape
    generator = torch.Generator().manual_seed(7)
    wanted = {"embed.weight": (codes, width), "proj.weight": (codes, width, 1, 1), "proj.bias": (codes,)}
    return weights | {
        f"quantize.{name}": torch.randn(shape, generator=generator) for name, shape in wanted.items()
    }


@torch.no_grad()
def test_a_gumbel_checkpoint_equals_its_layers(tmp_path, convert):
    model = small(**GUMBEL)
    weights = as_gumbel(model)
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(1)}}, tmp_path / "last.ckpt")
    prepared = prepare(tmp_path / "last.ckpt", tmp_path / "out", Options())
    codec = codec_of(convert(tmp_path / "last.ckpt", "run"))
    model.double()
    embed, proj, bias = (
        weights[f"quantize.{n}"].double() for n in ("embed.weight", "proj.weight", "proj.bias")
    )
    image = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    logits = torch.nn.functional.conv2d(model.quant_conv(model.encoder(image)), proj, bias)
    assert torch.equal(codec.tokens(image), logits.argmax(dim=1))
    read = {name: weight.read().double() for name, weight in prepared.parts.codec.weights.items()}
    codec.load_state_dict(read, strict=False)  # before the folded layer was rounded to float32
    assert relative_error(codec.moments(image), logits) < 1e-12
    tokens = torch.randint(codec.num_codes, (2, 2, 3))
    expected = model.decoder(model.post_quant_conv(embed[tokens].movedim(-1, 1)))
    assert relative_error(codec.decode_tokens(tokens), expected) < 1e-12


@torch.no_grad()
def test_a_gumbel_codec_goes_out_by_itself_as_taming_has_it(tmp_path, convert):
    """And comes in again as it was; what has no place for its codebook is a sentence."""
    torch.save(as_gumbel(small(**GUMBEL)), tmp_path / "last.ckpt")
    run = convert(tmp_path / "last.ckpt", "run")
    out = load_file(convert(run, "out.safetensors"))
    own = load_file(run / "model.safetensors")
    expected = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name: value.shape for name, value in out.items()} == {n: v.shape for n, v in expected.items()}
    features = torch.randn(2, 16, 3, 4)
    logits = conv2d(
        conv2d(features, out["quant_conv.weight"], out["quant_conv.bias"]),
        out["quantize.proj.weight"],
        out["quantize.proj.bias"],
    )
    plain = conv2d(features, own["codec.quant_conv.weight"], own["codec.quant_conv.bias"])
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)
    back = load_file(convert(tmp_path / "out.safetensors", "back") / "model.safetensors")
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], value) for name, value in own.items())
    for options in (Options(), Options(to="diffusers")):
        with pytest.raises(ConfigError, match=r"codec.name is 'gumbel'; allowed: kl, vq \(gumbel by itself"):
            prepare(run, tmp_path / "folder", options)


def test_the_published_gumbel_vqgan_is_taken_whole():
    """vqgan_gumbel_f8: diffusers' networks of these sizes, and a convolution of 256 channels to 8,192 logits."""
    from diffusers import VQModel

    from t2i.interop.compvis_shapes import infer_codec
    from t2i.interop.gumbel import gumbel_weights
    from t2i.interop.weights import Weight

    values = levels(128, 128, 256, 512) | {"latent_channels": 256, "num_vq_embeddings": 8192}
    values["down_block_types"] = (*values["down_block_types"][:3], "AttnDownEncoderBlock2D")
    values["up_block_types"] = ("AttnUpDecoderBlock2D", *values["up_block_types"][1:])
    with torch.device("meta"):
        theirs = in_taming_names(VQModel(**values))
    theirs["quantize.embed.weight"] = theirs.pop("quantize.embedding.weight")
    shapes = {name: tuple(value.shape) for name, value in theirs.items()}
    shapes |= {"quantize.proj.weight": (8192, 256, 1, 1), "quantize.proj.bias": (8192,)}
    weights = {name: Weight(shape, torch.float32, torch.empty) for name, shape in shapes.items()}
    config = infer_codec(weights, Path())
    assert config["backbone"]["attention_resolutions"] == [32]
    ours = gumbel_weights(config, weights, Path())
    count, folded = (sum(w.nbytes(torch.int8) for w in each.values()) for each in (weights, ours))
    assert count - folded == 256 * 256 + 256  # two convolutions that follow each other are one


def test_of_a_class_conditional_transformer_the_first_stage_is_taken(tmp_path, convert):
    """taming's Net2NetTransformer, cin_transformer among them."""
    model = small(**VQGAN)
    weights = {f"first_stage_model.{name}": value for name, value in in_taming_names(model).items()}
    gpt = {"transformer.tok_emb.weight": torch.zeros(64, 8), "transformer.pos_emb": torch.zeros(1, 4, 8)}
    torch.save({"state_dict": weights | gpt}, tmp_path / "cin.ckpt")
    parts = prepare(tmp_path / "cin.ckpt", tmp_path / "out", Options()).parts
    assert "a Net2NetTransformer of taming-transformers, which draws codes for a class" in parts.notes[-1]
    check_equals(codec_of(convert(tmp_path / "cin.ckpt", "run")), model)
    torch.save({"state_dict": gpt}, tmp_path / "gpt.ckpt")
    with pytest.raises(
        CheckpointError, match="for a class, or for nothing, not for a text: it has no counterpart here"
    ):
        prepare(tmp_path / "gpt.ckpt", tmp_path / "out", Options())


def test_a_gumbel_checkpoint_that_does_not_fit(tmp_path):
    weights = as_gumbel(small(**GUMBEL))
    torch.save(weights | {"quantize.proj.weight": torch.zeros(64, 12, 1, 1)}, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError, match=r"proj.weight has shape \(64, 12, 1, 1\); allowed: \(64, 16, 1, 1"
    ):
        prepare(tmp_path / "other.pt", tmp_path / "out", Options())
    torch.save(weights, tmp_path / "good.pt")
    with pytest.raises(ConfigError, match=r"codec.name is 'gumbel'; allowed: kl, vq"):
        prepare(tmp_path / "good.pt", tmp_path / "out", Options(to="diffusers"))


def test_the_tokenizer_of_amused_equals_diffusers(tmp_path, convert):
    narrow = {"latent_channels": 8, "vq_embed_dim": 8, "num_vq_embeddings": 64}
    model = small(**AMUSED | levels(32, 64, 64, 128, 192) | narrow)
    assert not any("attentions" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "vqvae")
    run = convert(tmp_path / "vqvae", "run")
    check_equals(codec_of(run), model)
    back = type(model).from_pretrained(convert(run, "back")).state_dict()
    assert all(torch.equal(back[name], value.float()) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "back/config.json").read_text())["mid_block_add_attention"] is False


def test_the_published_tokenizer_of_amused_is_taken_whole():
    from diffusers import VQModel

    with torch.device("meta"):
        theirs = VQModel(**AMUSED)
    values = {"_class_name": "VQModel"} | {
        key: list(value) if isinstance(value, tuple) else value for key, value in theirs.config.items()
    }
    config, _ = read_codec(values, "config.json")
    ours = codec_shapes(config)
    names = diffusers_codec(ours, 5)
    expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert {names[name]: shape for name, shape in ours.items()} == expected


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        ({"name": "fsq", "levels": [8, 5]}, "codec.name is 'fsq'; allowed: kl, vq"),
        ({"name": "vq", "num_codes": 8, "normalize": True}, "codec.normalize is True; allowed: false"),
    ],
)
def test_codes_without_a_foreign_form_are_refused(codec, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        families.get("autoencoder").load_formats().from_run({"backbone": {"name": "ldm"}, "codec": codec})
