"""Models over codes, as ratios of medians in one run: by the processor's time of one thread, which other jobs on the
machine lengthen least; the two sides take turns and have the same weights, and what they compute is compared first.

    python benchmarks/tokens.py [--rounds 5]

sampling    256 codes drawn with keys and values kept, against a pass over all codes before each
train step  against transformers' ImageGPT, and aMUSEd's U-ViT against diffusers': loss, gradients and AdamW; and the
            whole step as each trains, with clipped gradients and averaged weights, ours as `t2i train` takes it,
            theirs as diffusers' own script for aMUSEd does
masked      256 codes drawn in 8 steps, against one after the other, by transformers of one size
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UVit2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers.models.imagegpt.configuration_imagegpt import ImageGPTConfig
from transformers.models.imagegpt.modeling_imagegpt import ImageGPTForCausalImageModeling

from t2i.codes.config import CodeSampling
from t2i.codes.embedding import take_vectors
from t2i.codes.masked import decode
from t2i.codes.sampling import drawn
from t2i.config import EMAConfig, OptimizerConfig
from t2i.families.autoregressive.config import NetworkConfig
from t2i.families.autoregressive.drawing import draw_codes
from t2i.families.autoregressive.network import CodeTransformer
from t2i.families.masked.config import MuseConfig, UVitConfig
from t2i.families.masked.muse import Muse
from t2i.families.masked.uvit import UVit
from t2i.interfaces import TextFeatures
from t2i.training.ema import EMA
from t2i.training.finite import any_not_finite
from t2i.training.step import Turn, clip

CODES, CODE_DIM, GRID, BATCH, CAPTION = 512, 8, (16, 16), 4, 8
WIDTH, DEPTH, HEADS = 256, 8, 8

SHAPE: dict[str, Any] = {  # of ours, as transformers' ImageGPT is
    "width": WIDTH,
    "depth": DEPTH,
    "heads": HEADS,
    "positions": "learned",
    "norm": "rms",
    "bias": True,
    "qk_norm": False,
    "dropout": 0.0,
    "activation": "quick_gelu",
}


def medians(rounds: int, *sides: Callable[[], object]) -> list[float]:
    """Seconds of the processor that each takes, in turns, after one turn that does not count."""
    seconds: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, own in zip(sides, seconds, strict=True):
            began = time.process_time()
            side()
            if number:
                own.append(time.process_time() - began)
    return [statistics.median(own) for own in seconds]


def transformer(max_tokens: int, code_vectors: bool = False) -> CodeTransformer:
    config = NetworkConfig(**SHAPE, code_vectors=code_vectors)
    made = CodeTransformer(config, CODES, GRID, WIDTH, max_tokens, code_dim=CODE_DIM)
    nn.init.normal_(made.head.weight, std=0.1)
    take_vectors(made, torch.randn(CODES, CODE_DIM))
    return made


def generators(seeds: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sampling(rounds: int, code_vectors: bool) -> tuple[float, float]:
    """code_vectors: codes are known by their vectors too, as the recipes have it"""
    network = transformer(CAPTION, code_vectors).eval()
    mask = torch.ones(1, CAPTION, dtype=torch.bool)
    text = TextFeatures(torch.randn(1, CAPTION, WIDTH), torch.zeros(1, WIDTH), mask)
    options = CodeSampling(temperature=1.0, top_k=None, top_p=1.0, guidance_scale=1.0)
    seeds, number = range(1), GRID[0] * GRID[1]

    def kept() -> Tensor:
        return draw_codes(network, text, None, GRID, generators(seeds), options)[0].flatten(1)

    def afresh() -> Tensor:
        each = [torch.rand(number, generator=generator) for generator in generators(seeds)]
        codes = torch.zeros(1, 0, dtype=torch.int64)
        for uniform in torch.stack(each, 1):
            logits = network(codes, text.tokens, text.mask)[:, -1]
            codes = torch.cat([codes, drawn(logits, uniform, options)[:, None]], 1)
        return codes

    with torch.no_grad():
        same = (kept() == afresh()).double().mean().item()
        assert same > 0.95, same  # a code drawn on the edge between two is one or the other by rounding
        first, second = medians(rounds, kept, afresh)
    return first, second


def train_step(rounds: int) -> tuple[float, float]:
    described = ImageGPTConfig(
        vocab_size=CODES + 1,
        n_positions=GRID[0] * GRID[1],
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=HEADS,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    theirs, ours = ImageGPTForCausalImageModeling(described), transformer(0)
    ours.load_state_dict(renamed(theirs.state_dict()), strict=False)
    codes = torch.randint(CODES, (BATCH, GRID[0] * GRID[1]))
    given = torch.cat([torch.full((BATCH, 1), CODES), codes[:, :-1]], 1)
    nothing = torch.zeros(BATCH, 0, WIDTH), torch.zeros(BATCH, 0, dtype=torch.bool)

    def loss_of_ours() -> Tensor:
        return ours.losses(codes, *nothing)["codes"]

    def loss_of_theirs() -> Tensor:
        return F.cross_entropy(theirs(input_ids=given).logits.flatten(0, 1), codes.flatten())

    torch.testing.assert_close(loss_of_ours(), loss_of_theirs(), rtol=1e-4, atol=1e-4)

    first, second = medians(rounds, step(ours, loss_of_ours), step(theirs, loss_of_theirs))
    return first, second


def step(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def take() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return take


def whole_step_of_ours(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    turn = Turn("", [list(network.parameters())], OptimizerConfig(1e-4, warmup_images=0))
    optimizer = turn.build_optimizer()
    averages = EMA(dict(network.named_parameters()), EMAConfig(half_life_images=50_000, rampup_ratio=None))

    def take() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.found_inf = any_not_finite(list(clip(turn, []).values()))  # type: ignore[attr-defined]
        optimizer.step()
        averages.update(BATCH, BATCH)

    return take


def whole_step_of_theirs(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    averages = EMAModel(network.parameters(), decay=0.9999)

    def take() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averages.step(network.parameters())

    return take


def uvit_steps(rounds: int) -> list[float]:
    """Seconds of ours and of theirs alike, and of both as each trains."""
    theirs = UVit2DModel(
        hidden_size=WIDTH,
        cond_embed_dim=WIDTH,
        encoder_hidden_size=WIDTH,
        vocab_size=CODES + 1,
        codebook_size=CODES,
        in_channels=192,
        block_out_channels=192,
        num_res_blocks=2,
        block_num_heads=6,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        intermediate_size=704,
    )
    config = UVitConfig("uvit", WIDTH, 4, HEADS, 704, 192, 2, 6, 192)
    ours = UVit(config, CODES, WIDTH, WIDTH, 16)
    ours.load_state_dict(theirs.state_dict())
    codes, tokens = torch.randint(CODES, (BATCH, *GRID)), torch.randint(CODES + 1, (BATCH, *GRID))
    context, pooled = torch.randn(BATCH, CAPTION, WIDTH), torch.randn(BATCH, WIDTH)
    told = torch.tensor([[256.0, 256.0, 0.0, 0.0, 6.0]]).expand(BATCH, -1)
    everything = torch.ones(BATCH, CAPTION, dtype=torch.bool)

    def loss_of_ours() -> Tensor:
        return F.cross_entropy(ours(tokens, context, everything, None, pooled).flatten(0, 1), codes.flatten())

    def loss_of_theirs() -> Tensor:
        return F.cross_entropy(theirs(tokens, context, pooled, told), codes)

    torch.testing.assert_close(loss_of_ours(), loss_of_theirs(), rtol=1e-4, atol=1e-4)
    return medians(
        rounds,
        step(ours, loss_of_ours),
        step(theirs, loss_of_theirs),
        whole_step_of_ours(ours, loss_of_ours),
        whole_step_of_theirs(theirs, loss_of_theirs),
    )


def masked(rounds: int) -> tuple[float, float]:
    """Of pictures without guidance: 8 passes over all codes, and as many passes over one as there are codes."""
    one_by_one = transformer(CAPTION).eval()
    config = MuseConfig(**SHAPE)
    together = Muse(config, CODES, GRID, WIDTH).eval()
    mask = torch.ones(BATCH, CAPTION, dtype=torch.bool)
    text = TextFeatures(torch.randn(BATCH, CAPTION, WIDTH), torch.zeros(BATCH, WIDTH), mask)
    options = CodeSampling(temperature=1.0, top_k=None, top_p=1.0, guidance_scale=1.0)
    hidden = torch.ones(BATCH, GRID[0] * GRID[1], dtype=torch.bool)

    def in_steps() -> Tensor:
        def predict(codes: Tensor, unknown: Tensor, share: float) -> Tensor:
            tokens = torch.where(unknown, CODES, codes).unflatten(1, GRID)
            return together(tokens, text.tokens, text.mask)

        of_each = generators(range(BATCH))
        return decode(predict, torch.zeros_like(hidden).long(), hidden, 8, of_each, options, 4.5)

    def in_order() -> Tensor:
        return draw_codes(one_by_one, text, None, GRID, generators(range(BATCH)), options)[0]

    with torch.no_grad():
        first, second = medians(rounds, in_steps, in_order)
    return first, second


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """ImageGPT's weights by our names."""
    table, named = theirs["transformer.wte.weight"], {"attn.c_proj": "attention.to_out"}
    found = {"embedding.weight": table[:-1], "start": table[-1], "head.weight": theirs["lm_head.weight"]}
    found |= {"position": theirs["transformer.wpe.weight"], "norm.weight": theirs["transformer.ln_f.weight"]}
    named |= {"mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2"}
    for i in range(DEPTH):
        block, own = f"transformer.h.{i}.", f"blocks.{i}."
        for norm in (1, 2):
            found[f"{own}norm_{norm}.weight"] = theirs[f"{block}ln_{norm}.weight"]
        for kind in ("weight", "bias"):
            q_k_v = theirs[f"{block}attn.c_attn.{kind}"].chunk(3, dim=-1)
            for name, part in zip("qkv", q_k_v, strict=True):
                found[f"{own}attention.to_{name}.{kind}"] = part.t()
            for name, other in named.items():
                found[f"{own}{other}.{kind}"] = theirs[f"{block}{name}.{kind}"].t()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for code_vectors in (False, True):
        kept, afresh = sampling(rounds, code_vectors)
        known = ", known by their vectors too" if code_vectors else ""
        print(
            f"sampling of {GRID[0] * GRID[1]} codes{known}: {kept:.2f} s, without what is kept {afresh:.2f} s: "
            f"{afresh / kept:.1f} times"
        )
    ours, theirs = train_step(rounds)
    print(f"train step: {ours:.2f} s, transformers' ImageGPT {theirs:.2f} s: {ours / theirs:.2f} times")
    ours, theirs, whole, whole_of_theirs = uvit_steps(rounds)
    print(f"train step: {ours:.2f} s, diffusers' UVit2DModel {theirs:.2f} s: {ours / theirs:.2f} times")
    print(f"as each trains: {whole:.2f} s, {whole_of_theirs:.2f} s: {whole / whole_of_theirs:.2f} times")
    steps, codes = masked(rounds)
    print(f"masked, 8 steps: {steps:.2f} s, code by code {codes:.2f} s: {codes / steps:.1f} times")


if __name__ == "__main__":
    main()
