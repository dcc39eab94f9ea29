"""T5's encoder (Raffel et al., arXiv:1910.10683), as Imagen and PixArt condition on it."""

from __future__ import annotations

from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from t2i.interfaces import TextFeatures
from t2i.nn.precision import without_float16
from t2i.nn.transfer import placed
from t2i.text.frozen import FrozenTextEncoder, added_mask
from t2i.text.pretrained import check_vocabulary, load_pretrained, tokenize

ROUNDING = 128  # the published embeddings have their rows rounded up to a multiple of this


class T5TextEncoder(FrozenTextEncoder):
    """tokens: the last hidden states after the final norm, where attention sees no padding; pooled: their mean over
    the caption (T5 has no state of its own for that); mask: the caption and its end token.

    model: a directory with weights and tokenizer.json, or a hub id; a tokenizer that is only there as spiece.model
        needs the packages sentencepiece and protobuf
    Raises ConfigError, or CheckpointError where weights or vocabulary are missing.
    """

    def __init__(self, model: str | None, max_tokens: int, allow_download: bool = False) -> None:
        tokenizer, transformer = load_pretrained(model, "t5", T5EncoderModel, T5Tokenizer, allow_download)
        check_vocabulary(model, len(tokenizer), transformer.config.vocab_size, spare=ROUNDING - 1)
        width = transformer.config.d_model
        super().__init__(width, width, max_tokens)
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.freeze()

    def encode(self, captions: list[str]) -> TextFeatures:
        tokens = tokenize(self.tokenizer, captions, self.max_tokens)
        ids, mask = (placed(each, self.device) for each in (tokens.input_ids, tokens.attention_mask))
        added = added_mask(mask, self.dtype)
        with without_float16(self.device):  # which its largest states do not fit into
            states = self.transformer(input_ids=ids, attention_mask=added).last_hidden_state
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return TextFeatures(states, pooled, mask.bool())
