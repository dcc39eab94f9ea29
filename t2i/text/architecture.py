"""The network of a text encoder without its weights and without its tokenizer: what a plan and a test of shapes need.

On the meta device (`with torch.device("meta")`) it takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i.config import TextConfig, check
from t2i.errors import ConfigError

# Of the published config.json files.
CLIP_VIT_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
CLIP_VIT_B = CLIP_VIT_L | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "projection_dim": 512,
}
CLIP = {
    "openai/clip-vit-base-patch16": CLIP_VIT_B,
    "openai/clip-vit-base-patch32": CLIP_VIT_B,
    "openai/clip-vit-large-patch14": CLIP_VIT_L,
    "openai/clip-vit-large-patch14-336": CLIP_VIT_L,
}
T5 = {
    f"google/t5-v1_1-{size}": {
        "d_model": width,
        "d_ff": hidden,
        "num_layers": depth,
        "num_heads": heads,
        "d_kv": 64,
        "vocab_size": 32_128,
        "feed_forward_proj": "gated-gelu",
    }
    for size, width, hidden, depth, heads in (
        ("small", 512, 1024, 8, 6),
        ("base", 768, 2048, 12, 12),
        ("large", 1024, 2816, 24, 16),
        ("xl", 2048, 5120, 24, 32),
        ("xxl", 4096, 10_240, 24, 64),
    )
}
MINILM: dict[str, Any] = {  # all-MiniLM-L6-v2
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}


@dataclass(frozen=True)
class Architecture:
    """network: (B, L) int64 token ids, L = text.max_tokens, -> (B, L, token_dim) token states; random weights
    token_dim, pooled_dim, trainable: as the encoder of `t2i.interfaces` has them
    """

    network: nn.Module
    token_dim: int
    pooled_dim: int
    trainable: bool = False


class LastStates(nn.Module):
    """A transformers model, of which only the last hidden states are wanted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


def build_architecture(config: TextConfig) -> Architecture:
    """The text network that `config` names, on torch's default device. A local directory's config.json says its
    shape, for hub ids a table of published ones. Raises ConfigError where neither does."""
    if config.name == "clip":
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

        clip = _configured(CLIPTextConfig, config.model, CLIP, "clip")
        return _transformers(CLIPTextModel(clip), clip.hidden_size)
    if config.name == "clip_with_projection":
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

        from t2i.text.clip import LastButOne

        clip = _configured(CLIPTextConfig, config.model, CLIP, config.name)
        network = LastButOne(CLIPTextModelWithProjection(clip).requires_grad_(False))
        return Architecture(network, clip.hidden_size, clip.projection_dim)
    if config.name == "t5":
        from transformers.models.t5.configuration_t5 import T5Config
        from transformers.models.t5.modeling_t5 import T5EncoderModel

        t5 = _configured(T5Config, config.model, T5, "t5")
        return _transformers(T5EncoderModel(t5), t5.d_model)
    if config.name == "minilm":
        from transformers.models.bert.configuration_bert import BertConfig
        from transformers.models.bert.modeling_bert import BertModel

        return _transformers(BertModel(BertConfig(**MINILM), add_pooling_layer=False), MINILM["hidden_size"])
    if config.name == "open_clip":
        from t2i.text.open_clip import PenultimateStates, build_tower, pooled_width

        tower = build_tower(config.model, config.max_tokens)
        return Architecture(PenultimateStates(tower), tower.width, pooled_width(tower))
    if config.name == "ldm_bert":
        from t2i.text.ldm_bert import LDMBertTransformer

        bert = LDMBertTransformer(config.max_tokens, *config.shape)
        return Architecture(bert, config.shape[0], config.shape[0], trainable=True)
    from t2i.text.learned import LearnedTextEncoder

    learned = LearnedTextEncoder(config.max_tokens, *config.shape)
    return Architecture(LearnedStates(learned), config.shape[0], config.shape[0], trainable=True)


class LearnedStates(nn.Module):
    """The learned encoder over rows of its word table, without the spelling of words."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.encoder.embedding.word(input_ids) + self.encoder.position[: input_ids.shape[1]]
        mask = torch.ones(input_ids.shape, dtype=torch.bool, device=x.device)
        return self.encoder.transform(x, mask)


def _transformers(model: nn.Module, width: int) -> Architecture:
    return Architecture(LastStates(model.requires_grad_(False)), width, width)


def _configured(cls: Any, model: str | None, published: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    """A transformers configuration from a directory's config.json or from the table."""
    if model is not None and Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():  # transformers would take its defaults
            raise ConfigError(f"text.model {model!r} has no config.json.")
        try:
            return cls.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"text.model {model!r} has a config.json that cannot be read ({reason})."
            ) from error
    allowed = f"for {name}: a local directory with config.json, or {', '.join(published)}"
    check(model in published, "text.model", model, allowed)
    assert model is not None
    return cls(**published[model])
