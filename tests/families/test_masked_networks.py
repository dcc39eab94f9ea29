"""The masked transformers against BERT of transformers, published sizes and what they have to ignore."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from t2i.families.masked.config import MaskGITConfig, MuseConfig
from t2i.families.masked.maskgit import Bert, MaskGIT
from t2i.families.masked.muse import Muse

SMALL = MaskGITConfig("maskgit", width=24, depth=2, heads=3, dropout=0.0)
MUSE = MuseConfig(
    width=24, depth=2, heads=3, positions="rotary", norm="rms", bias=False, qk_norm=True, dropout=0.0
)


def test_maskgit_has_as_many_parameters_as_the_published_one():
    """1,024 codes, 1,000 classes and the mask; 16 x 16 positions."""
    with torch.device("meta"):
        network = Bert(MaskGITConfig("maskgit"), 1024 + 1000 + 1, 256)
    assert sum(p.numel() for p in network.parameters()) == 172_456_425


def test_maskgit_is_bert(float64):
    torch.manual_seed(0)
    own = Bert(SMALL, 13, 10).eval()
    config = BertConfig(
        vocab_size=13,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=10,
        layer_norm_eps=1e-12,
    )
    bert = BertForMaskedLM(config).eval().double()
    for p in bert.parameters():
        torch.nn.init.normal_(p)
    names = {
        "norm": "bert.embeddings.LayerNorm",
        "head.0": "cls.predictions.transform.dense",
        "head.2": "cls.predictions.transform.LayerNorm",
    }
    parts = {
        "to_q": "attention.self.query",
        "to_k": "attention.self.key",
        "to_v": "attention.self.value",
        "to_out": "attention.output.dense",
        "norm_attention": "attention.output.LayerNorm",
        "mlp.0": "intermediate.dense",
        "mlp.2": "output.dense",
        "norm_mlp": "output.LayerNorm",
    }
    for i in range(2):
        names |= {f"blocks.{i}.{part}": f"bert.encoder.layer.{i}.{other}" for part, other in parts.items()}
    theirs = bert.state_dict()
    theirs["bert.embeddings.token_type_embeddings.weight"].zero_()
    state = {"bias": theirs["cls.predictions.bias"]}
    for name in own.state_dict():
        module, _, last = name.rpartition(".")
        if module == "embeddings":
            state[name] = theirs[f"bert.embeddings.{last.removesuffix('s')}_embeddings.weight"]
        elif module:
            state[name] = theirs[f"{names[module]}.{last}"]
    own.load_state_dict(state)
    tokens = torch.randint(13, (2, 10))
    torch.testing.assert_close(own(tokens), bert(input_ids=tokens).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [MaskGIT, Muse])
def test_padding_of_the_caption_changes_nothing_and_its_words_do(kind, float64):
    torch.manual_seed(0)
    network = kind(SMALL if kind is MaskGIT else MUSE, 11, (3, 4), 8).eval()
    tokens, context = torch.randint(12, (2, 3, 4)), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    logits = network(tokens, context, mask)
    assert logits.shape == (2, 12, 11)  # no logit of the mask
    other = torch.where(mask[..., None], context, torch.randn_like(context))
    torch.testing.assert_close(network(tokens, other, mask), logits)
    assert not torch.allclose(network(tokens, context + 1, mask), logits)


def test_positions_matter_and_rotary_ones_take_other_shapes(float64):
    torch.manual_seed(0)
    network = Muse(MUSE, 11, (3, 4), 8).eval()
    context, mask = torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    tokens = torch.randint(11, (1, 2, 6))
    logits = network(tokens, context, mask)
    assert logits.shape == (1, 12, 11)
    turned = network(tokens.flip(1, 2), context, mask).flip(1)  # seen from behind: other distances
    assert not torch.allclose(turned, logits)
    learned = Muse(dataclasses.replace(MUSE, positions="learned"), 11, (3, 4), 8)
    assert learned.places.positions.weight.shape == (12, 24)
