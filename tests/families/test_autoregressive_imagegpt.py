"""ImageGPT over a palette, beside transformers' own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.imagegpt.configuration_imagegpt import ImageGPTConfig
from transformers.models.imagegpt.modeling_imagegpt import ImageGPTForCausalImageModeling

from t2i.families.autoregressive.config import NetworkConfig
from t2i.families.autoregressive.network import CodeTransformer
from t2i.families.autoregressive.palette import PaletteCodec
from t2i.text.architecture import build_architecture

COLOURS, GRID = 12, (3, 4)


def published(name: str, compose_run) -> NetworkConfig:
    return compose_run(f"experiment={name}").model.transformer


def count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "expected"), [("small", 76_682_240), ("medium", 455_489_536), ("large", 1_362_914_304)]
)
def test_published_sizes(name, expected, compose_run):
    """The start is row 513 of their vocabulary; what comes before it, the text, is ours."""
    with torch.device("meta"):
        network = CodeTransformer(published(f"imagegpt/{name}", compose_run), 512, (32, 32), 384, 24)
    assert count(network) - count(network.text) == expected


def test_the_transformer_of_vqgan(compose_run):
    """Theirs has a class, one of the codes' rows, where ours has captions and a start."""
    with torch.device("meta"):
        network = CodeTransformer(published("vqgan/imagenet", compose_run), 16_384, (16, 16), 384, 24)
    assert count(network) - count(network.text) - network.start.numel() == 1_410_640_896


@pytest.mark.parametrize(
    ("name", "published_millions", "ours"),
    [
        ("350m", 334, 390_564_864),
        ("750m", 748, 793_684_992),
        ("3b", 3_000, 3_103_610_880),
        ("20b", 20_000, 20_596_027_392),
    ],
)
def test_sizes_of_parti(name, published_millions, ours, compose_run):
    """Theirs as 2206.10789's table 1 has them, which leaves open what it counts; ours with all tables and positions."""
    config = compose_run(f"experiment=parti/{name}").model
    with torch.device("meta"):
        text = build_architecture(config.text)
        network = CodeTransformer(config.transformer, 8192, (32, 32), text.token_dim, config.text.max_tokens)
    assert count(network) + count(text.network) == ours
    assert ours / (published_millions * 1e6) < 1.18


def theirs(depth: int, heads: int) -> ImageGPTForCausalImageModeling:
    config = ImageGPTConfig(
        vocab_size=COLOURS + 1, n_positions=math.prod(GRID), n_embd=2 * heads, n_layer=depth, n_head=heads
    )
    torch.manual_seed(0)
    model = ImageGPTForCausalImageModeling(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def renamed(weights: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """transformers' weights by our names."""
    table = weights["transformer.wte.weight"]
    found = {
        "embedding.weight": table[:-1],
        "start": table[-1],
        "position": weights["transformer.wpe.weight"],
        "norm.weight": weights["transformer.ln_f.weight"],
        "head.weight": weights["lm_head.weight"],
    }
    for i in range(depth):
        theirs, ours = f"transformer.h.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            parts = weights[f"{theirs}attn.c_attn.{kind}"].chunk(3, dim=-1)
            named = dict(zip(("attention.to_q", "attention.to_k", "attention.to_v"), parts, strict=True))
            named["attention.to_out"] = weights[f"{theirs}attn.c_proj.{kind}"]
            named["mlp.0"] = weights[f"{theirs}mlp.c_fc.{kind}"]
            named["mlp.2"] = weights[f"{theirs}mlp.c_proj.{kind}"]
            found |= {f"{ours}{name}.{kind}": value.t() for name, value in named.items()}
        found[f"{ours}norm_1.weight"] = weights[f"{theirs}ln_1.weight"]
        found[f"{ours}norm_2.weight"] = weights[f"{theirs}ln_2.weight"]
    return found


@pytest.mark.parametrize(("name", "depth", "heads"), [("small", 24, 8), ("medium", 36, 8), ("large", 48, 16)])
def test_the_logits_are_those_of_transformers(name, depth, heads, compose_run, float64):
    """As deep as published and with as many heads, but narrow. Without a caption: of no slots."""
    model = theirs(depth, heads)
    config = dataclasses.replace(published(f"imagegpt/{name}", compose_run), width=2 * heads)
    ours = CodeTransformer(config, COLOURS, GRID, text_dim=4, max_tokens=0)
    missing, unexpected = ours.load_state_dict(renamed(model.state_dict(), depth), strict=False)
    assert (unexpected, [name for name in missing if not name.startswith("text.")]) == ([], [])
    codes = torch.randint(COLOURS, (2, math.prod(GRID) - 1))
    with torch.no_grad():
        start = torch.full((2, 1), COLOURS)
        expected = model(input_ids=torch.cat([start, codes], 1)).logits
        found = ours(codes, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_a_palette_is_the_means_of_its_pixels(float64):
    """Pixels in as many tight clumps as there are colours: each colour is the mean of one."""
    torch.manual_seed(0)
    centres = torch.tensor([[-0.8, 0.0, 0.6], [0.5, 0.5, -0.5], [0.9, -0.9, 0.9]])
    own = torch.randint(3, (4, 8, 8))
    image = (centres[own] + 0.01 * torch.randn(4, 8, 8, 3)).movedim(-1, 1)
    codec = PaletteCodec(3).double()
    codec.fit([image[:2], image[2:]])
    codes = codec.tokens(image)
    for code in range(3):
        pixels = image.movedim(1, -1)[codes == code]
        if len(pixels):
            torch.testing.assert_close(codec.colours[code], pixels.mean(0), atol=1e-12, rtol=0)
    nearest = torch.cdist(image.movedim(1, -1).flatten(0, 2), codec.colours).argmin(1)
    assert torch.equal(codes.flatten(), nearest)
    assert torch.equal(codec.tokens(codec.decode_tokens(codes)), codes)


def test_trains_and_draws_without_a_codec(compose_run, train, tmp_path):
    """The palette is saved with the run, and differs from where it began."""
    config = compose_run(
        *("experiment=autoregressive/tiny_ar", "builds_on=null", "palette=8", "trainer.num_images=8"),
        *("resolution.size_px=16", f"runs_dir={tmp_path}"),
    )
    folder = train(config).folder
    colours = load_file(folder / "model.safetensors")["model.codec.colours"]
    assert len(colours.unique(dim=0)) == 8
    assert len(list((folder / "samples").iterdir())) > 0
