"""Blocks of the models of codes against torch's decoder layer, and rotary positions against transformers' attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2i.nn.transformer import Cache, TokenAttention, TokenBlock, rotary_2d
from t2i.nn.transformer_config import TransformerConfig

pytestmark = pytest.mark.usefixtures("float64")

WIDTH, HEADS, TOKENS, WORDS = 32, 2, 6, 5


def shape(**changes) -> TransformerConfig:
    common = {"positions": "learned", "norm": "layer", "bias": True, "qk_norm": False, "dropout": 0.0}
    return TransformerConfig(**({"width": WIDTH, "depth": 1, "heads": HEADS} | common | changes))


def with_own_weights(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def torchs(block: TokenBlock) -> nn.TransformerDecoderLayer:
    """torch's layer with the block's weights."""
    layer = nn.TransformerDecoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "norm_1": "norm1",
        "norm_cross": "norm2",
        "norm_2": "norm3",
        "mlp.0": "linear1",
        "mlp.2": "linear2",
    }
    names |= {"attention.to_out": "self_attn.out_proj", "cross_attention.to_out": "multihead_attn.out_proj"}
    own, found = block.state_dict(), {}
    for kind in ("weight", "bias"):
        found |= {f"{theirs}.{kind}": own[f"{ours}.{kind}"] for ours, theirs in names.items()}
        for ours, theirs in (("attention", "self_attn"), ("cross_attention", "multihead_attn")):
            parts = [own[f"{ours}.to_{part}.{kind}"] for part in "qkv"]
            found[f"{theirs}.in_proj_{kind}"] = torch.cat(parts)
    layer.load_state_dict(found)
    return layer.eval()


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True], ids=["masked", "causal"])
def test_a_block_is_torchs_decoder_layer(causal):
    """All at once, and where tokens come in order with what is kept of those before."""
    block = with_own_weights(TokenBlock(shape(), WIDTH))
    x, context = torch.randn(2, TOKENS, WIDTH), torch.randn(2, WORDS, WIDTH)
    seen = torch.arange(WORDS) < torch.tensor([[3], [5]])
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1) if causal else None
    expected = torchs(block)(x, context, tgt_mask=later, memory_key_padding_mask=~seen)
    torch.testing.assert_close(block(x, context, seen, causal=causal), expected, rtol=1e-12, atol=1e-12)
    if causal:
        cache = Cache(TOKENS)
        parts = [block(each, context, seen, causal=True, cache=cache) for each in x.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True], ids=["masked", "causal"])
def test_rotary_positions_and_normalised_queries_are_those_of_transformers(causal):
    """Qwen3's attention, with the angles of a grid of 2 x 3: the first half of the pairs by the row, the others by the
    column (2403.13298)."""
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    attention = with_own_weights(TokenAttention(shape(positions="rotary", bias=False, qk_norm=True)))
    head_dim = WIDTH // HEADS
    described = Qwen3Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=head_dim,
        num_hidden_layers=1,
        attention_bias=False,
        attn_implementation="sdpa",  # of which the softmax is in float64
    )
    theirs = Qwen3Attention(described, 0).eval()
    # Its own norms round to float32.
    theirs.q_norm, theirs.k_norm = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
    names = {"norm_q": "q_norm", "norm_k": "k_norm", "to_out": "o_proj"} | {
        f"to_{p}": f"{p}_proj" for p in "qkv"
    }
    own = attention.state_dict()
    theirs.load_state_dict({f"{other}.weight": own[f"{name}.weight"] for name, other in names.items()})

    frequencies = torch.tensor([10_000 ** (-i / 4) for i in range(4)])
    places = [(row, column) for row in range(2) for column in range(3)]
    turned = torch.stack([torch.cat([row * frequencies, column * frequencies]) for row, column in places])
    angles = turned.repeat(1, 2)[None]  # numbers i and i + head_dim / 2 are one pair
    later = torch.full((TOKENS, TOKENS), -torch.inf).triu(1) if causal else torch.zeros(TOKENS, TOKENS)
    x = torch.randn(2, TOKENS, WIDTH)
    expected, _ = theirs(x, (angles.cos(), angles.sin()), later[None, None])
    own_angles = rotary_2d(2, 3, head_dim)
    found = attention(x, causal=causal, rotation=(own_angles, own_angles))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(attention(x, causal=causal), expected)
