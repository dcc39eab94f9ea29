"""The text transformer that LDM text-to-image trained with its UNet, in CompVis' names and in diffusers'.

Weights are kept under CompVis' names (`transformer.attn_layers.layers.0.1.to_q.weight`), which are ours too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t2i.config import check
from t2i.errors import CheckpointError
from t2i.interop.weights import Weights
from t2i.text.ldm_bert import HEAD_DIM, VOCABULARY, LDMBertTransformer

Shapes = dict[str, tuple[int, ...]]

ENDS = {
    "transformer.token_emb.weight": "model.embed_tokens.weight",
    "transformer.pos_emb.emb.weight": "model.embed_positions.weight",
    "transformer.norm.weight": "model.layer_norm.weight",
    "transformer.norm.bias": "model.layer_norm.bias",
}
# CompVis counts attention and feed-forward as layers of their own: 2 i and 2 i + 1.
ATTENTION = {
    "0": "self_attn_layer_norm",
    "1.to_q": "self_attn.q_proj",
    "1.to_k": "self_attn.k_proj",
    "1.to_v": "self_attn.v_proj",
    "1.to_out": "self_attn.out_proj",
}
FEED_FORWARD = {"0": "final_layer_norm", "1.net.0.0": "fc1", "1.net.2": "fc2"}


EXPANSION = 4  # of the feed-forward layers, x-transformers' default
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json")


@dataclass(frozen=True)
class LDMBertConfig:
    """The entries of the configuration's text of the same names."""

    width: int
    depth: int
    heads: int
    max_tokens: int

    def __post_init__(self) -> None:
        limits = {"width": 16_384, "depth": 256, "heads": 256, "max_tokens": 65_536}
        for name, most in limits.items():
            value = getattr(self, name)
            check(type(value) is int and 1 <= value <= most, f"text.{name}", value, f"1 to {most:,}")


@dataclass
class LDMBertText:
    """tokenizer: the files of BERT's tokenizer, by name; none where the vocabulary in MiniLM's package is meant"""

    config: LDMBertConfig
    weights: Weights
    tokenizer: dict[str, bytes]

    @property
    def token_dim(self) -> int:
        return self.config.width

    @property
    def saved_weights(self) -> Weights:
        return self.weights

    @property
    def max_tokens(self) -> int:
        return self.config.max_tokens


def parse_config(values: Mapping[str, Any], place: str) -> LDMBertConfig:
    """diffusers' LDMBertConfig. Raises ConfigError where it is none that ours can be."""
    width = values.get("d_model", 1280)
    fixed = {
        "vocab_size": VOCABULARY,
        "head_dim": HEAD_DIM,
        "activation_function": "gelu",
        "encoder_ffn_dim": EXPANSION * width if type(width) is int else None,
    }
    for key, allowed in fixed.items():
        check(values.get(key, allowed) == allowed, f"{place}: {key}", values.get(key), str(allowed))
    return LDMBertConfig(
        width=width,
        depth=values.get("encoder_layers", 32),
        heads=values.get("encoder_attention_heads", 8),
        max_tokens=values.get("max_position_embeddings", 77),
    )


def infer_config(weights: Weights, path: Path) -> LDMBertConfig:
    """The configuration from the shapes of weights under CompVis' names."""
    names = ["token_emb.weight", "pos_emb.emb.weight", "attn_layers.layers.0.1.to_q.weight"]
    shapes = [weights[f"transformer.{n}"].shape for n in names if f"transformer.{n}" in weights]
    if len(shapes) != 3 or not all(len(shape) == 2 for shape in shapes):
        raise CheckpointError(f"{path} lacks weights of the text encoder: transformer.{', '.join(names)}.")
    layers = {
        match[1] for n in weights if (match := re.match(r"transformer\.attn_layers\.layers\.(\d+)\.", n))
    }
    tokens, positions, queries = shapes
    return LDMBertConfig(tokens[1], len(layers) // 2, queries[0] // HEAD_DIM, positions[0])


def shapes(config: LDMBertConfig) -> Shapes:
    """The weights by CompVis' names; the layer that turns states into words again, unused, left out."""
    with torch.device("meta"):
        network = LDMBertTransformer(config.max_tokens, config.width, config.depth, config.heads)
    return {f"transformer.{name}": tuple(value.shape) for name, value in network.state_dict().items()}


def diffusers_name(name: str) -> str:
    """CompVis' name -> that of diffusers' LDMBertModel."""
    if name in ENDS:
        return ENDS[name]
    match = re.fullmatch(r"transformer\.attn_layers\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match is not None, name
    layer, kind = divmod(int(match[1]), 2)
    return f"model.layers.{layer}.{(FEED_FORWARD if kind else ATTENTION)[match[2]]}.{match[3]}"
