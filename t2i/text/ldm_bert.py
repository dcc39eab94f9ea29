"""The text transformer that LDM-1.45B trains together with its UNet (2112.10752, section 4.3.1).

Same parameter names as CompVis' `BERTEmbedder`, which wraps x-transformers: published weights load as they are, once
the prefix `cond_stage_model.` is cut and the unused `transformer.to_logits` left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, nn

from t2i.errors import CheckpointError
from t2i.interfaces import TextFeatures
from t2i.nn.transfer import placed

VOCABULARY = 30_522  # of bert-base-uncased
HEAD_DIM = 64  # x-transformers' default, whatever the width


class Attention(nn.Module):
    """Self-attention over all tokens, those of the padding too: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * HEAD_DIM, bias=False)
        self.to_k = nn.Linear(dim, heads * HEAD_DIM, bias=False)
        self.to_v = nn.Linear(dim, heads * HEAD_DIM, bias=False)
        self.to_out = nn.Linear(heads * HEAD_DIM, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """(B, L, dim) -> (B, L, dim), four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # x-transformers has a dropout, here 0, between the two: the identity keeps its place in the names.
        hidden = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU())
        self.net = nn.Sequential(hidden, nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PositionEmbedding(nn.Module):
    """Learned vectors of the positions."""

    def __init__(self, max_tokens: int, dim: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_tokens, dim)
        nn.init.normal_(self.emb.weight, std=0.02)


class AttentionLayers(nn.Module):
    """`depth` times attention and feed-forward, each pre-normalised and residual: (B, L, dim) -> the same."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(nn.ModuleList([nn.LayerNorm(dim), Attention(dim, heads)]))
            self.layers.append(nn.ModuleList([nn.LayerNorm(dim), FeedForward(dim)]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            x = x + layer[1](layer[0](x))
        return x


class LDMBertTransformer(nn.Module):
    """Token ids to token states, normalised."""

    def __init__(self, max_tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.pos_emb = PositionEmbedding(max_tokens, width)
        self.attn_layers = AttentionLayers(width, depth, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64, L <= max_tokens -> (B, L, width)."""
        x = self.token_emb(input_ids) + self.pos_emb.emb.weight[: input_ids.shape[1]]
        return self.norm(self.attn_layers(x))


class LDMBertTextEncoder(nn.Module):
    """tokens: (B, max_tokens, width), those of the padding included, as LDM conditions on them; pooled: (B, width),
    their mean over the caption. Learns with the model; only its tokenizer is fixed.

    model: a directory with BERT's tokenizer.json or vocab.txt; None takes the same vocabulary from MiniLM's package
    Raises CheckpointError where the vocabulary is missing or another one.
    """

    trainable = True

    def __init__(self, model: str | None, max_tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.token_dim = self.pooled_dim = width
        self.tokenizer = read_tokenizer(model)
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.enable_padding(length=max_tokens)
        self.transformer = LDMBertTransformer(max_tokens, width, depth, heads)

    def forward(self, captions: Sequence[str]) -> TextFeatures:
        encodings = self.tokenizer.encode_batch(list(captions))
        device = self.transformer.norm.weight.device
        ids = placed(torch.tensor([encoding.ids for encoding in encodings]), device)
        mask = placed(torch.tensor([encoding.attention_mask for encoding in encodings]), device)
        tokens = self.transformer(ids)
        pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return TextFeatures(tokens, pooled, mask.bool())


def read_tokenizer(model: str | None) -> Tokenizer:
    """bert-base-uncased's, from `model` or from MiniLM's package."""
    if model is None:
        from t2i.text.minilm import model_folder

        folder = model_folder()
    else:
        folder = Path(model)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            wordpiece = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
            tokenizer = Tokenizer.from_str(wordpiece.to_str())
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"text.model {model!r} has no tokenizer that can be read ({error}); allowed for ldm_bert: a directory "
            "with BERT's tokenizer.json or vocab.txt, or null."
        ) from error
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise CheckpointError(
            f"text.model {model!r} has {tokenizer.get_vocab_size():,} tokens; allowed for ldm_bert: the "
            f"{VOCABULARY:,} of bert-base-uncased."
        )
    return tokenizer
