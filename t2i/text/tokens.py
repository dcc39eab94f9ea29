"""How many tokens a text has for an encoder, which reads no more than `text.max_tokens` of them."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from t2i.config import TextConfig


@dataclass(frozen=True)
class TokenCounter:
    """Of one encoder.

    count: text -> its tokens, those included that mark its ends
    max_tokens: that the encoder takes; what is beyond is cut
    """

    count: Callable[[str], int]
    max_tokens: int

    def cut(self, text: str) -> str:
        """The end of `text` that the encoder does not read, from the first word on that it does not read in full;
        "" where it reads all."""
        if self.count(text) <= self.max_tokens:
            return ""
        words = text.split()
        read = bisect.bisect_right(
            range(1, len(words)), self.max_tokens, key=lambda n: self.count(" ".join(words[:n]))
        )
        return " ".join(words[read:])


def token_counter(config: TextConfig) -> TokenCounter:
    """Of the encoder that `config.name` names, by its own tokenizer; its weights need not be there. Raises ConfigError
    or CheckpointError as `build_text_encoder` does."""
    return TokenCounter(_count(config), config.max_tokens)


def _count(config: TextConfig) -> Callable[[str], int]:
    if config.name == "open_clip":
        from t2i.text.byte_pairs import clip_tokenizer
        from t2i.text.open_clip import check_architecture

        check_architecture(config.model, config.max_tokens)
        simple = clip_tokenizer()
        return lambda text: len(simple.encode(text)) + 2
    if config.name == "learned":
        from t2i.text.learned import words_of

        return lambda text: len(words_of(text)) + 1
    if config.name in ("minilm", "ldm_bert"):
        from t2i.text import ldm_bert, minilm

        bert = minilm.read_tokenizer() if config.name == "minilm" else ldm_bert.read_tokenizer(config.model)
        bert.no_truncation()
        bert.no_padding()
        return lambda text: len(bert.encode(text))
    from t2i.text.pretrained import check_vocabulary, load_part

    # transformers makes a tokenizer of next to nothing where a folder has none: the model's own config tells.
    if config.name in ("clip", "clip_with_projection"):
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        clip = load_part(config.model, "clip", CLIPTokenizer, config.allow_download)
        rows = load_part(config.model, "clip", CLIPTextConfig, config.allow_download).vocab_size
        check_vocabulary(config.model, clip.vocab_size, rows)
        return lambda text: len(clip(text, verbose=False).input_ids)
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    from t2i.text.t5 import ROUNDING

    t5 = load_part(config.model, "t5", T5Tokenizer, config.allow_download)
    rows = load_part(config.model, "t5", T5Config, config.allow_download).vocab_size
    check_vocabulary(config.model, len(t5), rows, spare=ROUNDING - 1)
    return lambda text: len(t5(text, verbose=False).input_ids)
