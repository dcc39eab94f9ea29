"""CLIP's text transformer (Radford et al., arXiv:2103.00020); the encoder of Stable Diffusion 1."""

from __future__ import annotations

from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from t2i.interfaces import TextFeatures
from t2i.nn.transfer import placed
from t2i.text.frozen import FrozenTextEncoder, check_max_tokens, mask_up_to_end
from t2i.text.pretrained import check_vocabulary, load_pretrained, tokenize


class ClipTextEncoder(FrozenTextEncoder):
    """tokens: the last hidden states after the final layer norm, those of the padding included, as Stable
    Diffusion 1 conditions on them (arXiv:2112.10752); pooled: the state at the end token, not projected.

    model: a directory with weights and tokenizer, or a hub id
    Raises ConfigError, or CheckpointError where weights or vocabulary are missing.
    """

    def __init__(self, model: str | None, max_tokens: int, allow_download: bool = False) -> None:
        tokenizer, transformer = load_pretrained(model, "clip", CLIPTextModel, CLIPTokenizer, allow_download)
        check_vocabulary(model, tokenizer.vocab_size, transformer.config.vocab_size)
        check_max_tokens(max_tokens, transformer.config.max_position_embeddings, str(model))
        width = transformer.config.hidden_size
        super().__init__(width, width, max_tokens)
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.freeze()

    def encode(self, captions: list[str]) -> TextFeatures:
        ids = placed(tokenize(self.tokenizer, captions, self.max_tokens).input_ids, self.device)
        states = self.transformer(input_ids=ids)  # no attention mask: it is causal, and SD 1 gave none
        mask = mask_up_to_end(ids, self.tokenizer.eos_token_id)
        return TextFeatures(states.last_hidden_state, states.pooler_output, mask)
