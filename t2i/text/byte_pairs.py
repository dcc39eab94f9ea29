"""CLIP's byte-pair encoding of words of any length."""

from __future__ import annotations

from open_clip.tokenizer import SimpleTokenizer
from tokenizers.models import BPE


class BytePairs:
    """What `SimpleTokenizer.bpe` is to a word: its tokens, joined by spaces.

    That one takes time by the square of a word's length, minutes for 50,000 letters without a space, as captions of the
    web have them, and keeps every word that it has met.
    """

    def __init__(self, tokenizer: SimpleTokenizer) -> None:
        self.special = {token: token for token in tokenizer.cache}  # it holds nothing else at first
        self.pairs = BPE(vocab=tokenizer.encoder, merges=list(tokenizer.bpe_ranks), end_of_word_suffix="</w>")

    def __call__(self, word: str) -> str:
        return self.special.get(word) or " ".join(token.value for token in self.pairs.tokenize(word))


def clip_tokenizer(max_tokens: int | None = None) -> SimpleTokenizer:
    """open_clip's own; max_tokens: of each text that it is called with."""
    return of_any_length(SimpleTokenizer(context_length=max_tokens))


def of_any_length(tokenizer: SimpleTokenizer) -> SimpleTokenizer:
    """The same tokenizer, new until now, in time by a text's length."""
    tokenizer.bpe = BytePairs(tokenizer)
    return tokenizer
