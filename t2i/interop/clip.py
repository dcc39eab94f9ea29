"""CLIP's text transformer in the formats that carry it: transformers' folder, and OpenCLIP's names.

Weights are kept under transformers' names without their prefix `text_model.`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from t2i.config import check, parse
from t2i.interop.weights import Weight, Weights, renamed, stacked

Shapes = dict[str, tuple[int, ...]]

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
END = "<|endoftext|>"
PROJECTION = "text_projection.weight"


@dataclass(frozen=True)
class ClipConfig:
    """The shape of the transformer, with the names and the defaults of transformers' config.json."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    projection_dim: int = 512
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        limits = {
            "hidden_size": 16_384,
            "intermediate_size": 65_536,
            "num_hidden_layers": 256,
            "num_attention_heads": 256,
            "max_position_embeddings": 65_536,
            "vocab_size": 2_000_000,
            "projection_dim": 16_384,
        }
        for name, most in limits.items():
            value = getattr(self, name)
            check(1 <= value <= most, f"text_encoder.{name}", value, f"1 to {most:,}")
        width, heads = self.hidden_size, self.num_attention_heads
        check(width % heads == 0, "text_encoder.hidden_size", width, f"a multiple of its {heads} heads")
        eps = self.layer_norm_eps
        check(0 < eps < 1, "text_encoder.layer_norm_eps", eps, "above 0 and below 1")


@dataclass
class ClipText:
    """tokenizer: the tokenizer's files, by name
    max_tokens: what captions are padded to
    projection: (projection_dim, hidden_size), of CLIPTextModelWithProjection"""

    config: ClipConfig
    weights: Weights
    tokenizer: dict[str, bytes]
    max_tokens: int
    projection: Weight | None = None

    @property
    def token_dim(self) -> int:
        return self.config.hidden_size

    @property
    def pooled_dim(self) -> int:
        return self.config.hidden_size if self.projection is None else self.config.projection_dim

    @property
    def saved_weights(self) -> Weights:
        """By transformers' whole names."""
        weights = renamed(self.weights, "text_model.")
        return weights if self.projection is None else weights | {PROJECTION: self.projection}


def parse_config(values: Mapping[str, Any]) -> ClipConfig:
    """What transformers' config.json says of the text model; entries without meaning here are left out."""
    known = ClipConfig.__dataclass_fields__
    return parse(ClipConfig, {k: v for k, v in values.items() if k in known}, "text_encoder.")


def config_json(text: ClipText) -> dict[str, Any]:
    """transformers' config.json."""
    kind = "CLIPTextModel" if text.projection is None else "CLIPTextModelWithProjection"
    fixed = {
        "architectures": [kind],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "dtype": "float32",
    }
    return fixed | {name: getattr(text.config, name) for name in ClipConfig.__dataclass_fields__}


def shapes(config: ClipConfig) -> Shapes:
    """The weights that transformers' CLIPTextModel has, by their names without `text_model.`."""
    width, hidden = config.hidden_size, config.intermediate_size

    def linear(name: str, rows: int, columns: int) -> Shapes:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    wanted: Shapes = {
        "embeddings.token_embedding.weight": (config.vocab_size, width),
        "embeddings.position_embedding.weight": (config.max_position_embeddings, width),
    }
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            wanted |= linear(f"{layer}.self_attn.{projection}", width, width)
        wanted |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
        wanted |= linear(f"{layer}.mlp.fc1", hidden, width) | linear(f"{layer}.mlp.fc2", width, hidden)
    return wanted | norm("final_layer_norm")


def without_prefix(weights: Weights) -> Weights:
    """transformers' text weights by their bare names; position_ids, which older versions saved, and what a whole CLIP
    has beside its text half, left out."""
    others = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    bare = {
        n.removeprefix("text_model."): weight for n, weight in weights.items() if not n.startswith(others)
    }
    return {name: weight for name, weight in bare.items() if not name.endswith("position_ids")}


def infer_config(weights: Weights) -> dict[str, Any]:
    """ClipConfig's values as far as shapes tell them; heads are 64 wide in every published text model."""
    tokens, positions = (weights.get(f"embeddings.{kind}_embedding.weight") for kind in ("token", "position"))
    first = weights.get("encoder.layers.0.mlp.fc1.weight")
    layers = {match[1] for name in weights if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    if (
        tokens is None
        or positions is None
        or first is None
        or not all(len(w.shape) == 2 for w in (tokens, positions, first))
    ):
        return {}
    width = tokens.shape[1]
    return {
        "hidden_size": width,
        "intermediate_size": first.shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions.shape[0],
        "vocab_size": tokens.shape[0],
        "projection_dim": width,
    }


OPEN_CLIP = (
    ("token_embedding.weight", "embeddings.token_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final.", "final_layer_norm."),
    ("transformer.resblocks.", "encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.", ".self_attn."),
)


def from_open_clip(weights: Weights) -> Weights:
    """OpenCLIP's text tower (`token_embedding.weight`, `transformer.resblocks.0.attn.in_proj_weight`, ...) under
    transformers' names; the stacked projections of queries, keys and values are taken apart."""
    result: Weights = {}
    for name, weight in weights.items():
        for theirs, ours in OPEN_CLIP:
            name = name.replace(theirs, ours)
        if match := re.fullmatch(r"(.+\.self_attn)\.in_proj_(weight|bias)", name):
            width = weight.shape[0] // 3
            for i, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                result[f"{match[1]}.{projection}.{match[2]}"] = weight.rows(i * width, (i + 1) * width)
        else:
            result[name] = weight
    return result


def to_open_clip(weights: Weights) -> Weights:
    """The inverse of `from_open_clip`."""
    result: Weights = {}
    for name, weight in weights.items():
        if match := re.fullmatch(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)", name):
            if match[2] != "q":
                continue
            parts: list[Weight] = [weights[f"{match[1]}.{p}_proj.{match[3]}"] for p in "qkv"]
            name, weight = f"{match[1]}.in_proj_{match[3]}", stacked(parts)
        for theirs, ours in OPEN_CLIP:
            name = name.replace(ours, theirs)
        result[name] = weight
    return result


def tokenizer_files(max_tokens: int, pad_token: str = END) -> dict[str, bytes]:
    """CLIP's byte-pair vocabulary, which ships with open_clip, in the files that transformers reads.

    pad_token: the end token in Stable Diffusion 1; "!", whose id is the 0 that OpenCLIP pads with, in Stable
        Diffusion 2. (A "!" in a caption then becomes that token too, as with the published tokenizer.)
    """
    from open_clip.tokenizer import SimpleTokenizer

    clip = SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": END}
    vocabulary = {specials.get(token, token): i for token, i in clip.encoder.items()}
    merges = "".join(f"{first} {second}\n" for first, second in clip.bpe_ranks)
    tokens = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = tokens | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": max_tokens,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(),
        "merges.txt": f"#version: 0.2\n{merges}".encode(),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(tokens),
    }


def vocabulary_of(tokenizer_json: bytes) -> dict[str, bytes]:
    """vocab.json and merges.txt, which transformers' CLIPTokenizer needs before version 5, out of tokenizer.json;
    nothing where that holds no byte-pair vocabulary."""
    values = json.loads(tokenizer_json)
    model, added = values.get("model"), values.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(vocabulary := model.get("vocab"), dict):
        return {}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or []]
    if not all(
        isinstance(m, list) and len(m) == 2 and all(isinstance(half, str) for half in m) for m in merges
    ):
        return {}
    entries = [each for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    tokens = {
        each["content"]: each["id"]
        for each in entries
        if isinstance(each.get("content"), str) and "id" in each
    }
    lines = "".join(f"{first} {second}\n" for first, second in merges)
    return {
        "vocab.json": json.dumps(vocabulary | tokens, ensure_ascii=False).encode(),
        "merges.txt": f"#version: 0.2\n{lines}".encode(),
    }


def with_max_tokens(tokenizer: Mapping[str, bytes], max_tokens: int) -> dict[str, bytes]:
    """The files with `model_max_length` set: it is what diffusers pads captions to. A class to import, which some
    readers can be told to obey, is left out."""
    settings = json.loads(tokenizer.get("tokenizer_config.json", b"{}"))
    settings.pop("auto_map", None)
    return {**tokenizer, "tokenizer_config.json": _json(settings | {"model_max_length": max_tokens})}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
