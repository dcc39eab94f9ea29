"""CLIP's text transformer (Radford et al., arXiv:2103.00020); the encoder of Stable Diffusion 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
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

    model_class: Any = CLIPTextModel

    def __init__(self, model: str | None, max_tokens: int, allow_download: bool = False) -> None:
        tokenizer, transformer = load_pretrained(
            model, "clip", self.model_class, CLIPTokenizer, allow_download
        )
        check_vocabulary(model, tokenizer.vocab_size, transformer.config.vocab_size)
        check_max_tokens(max_tokens, transformer.config.max_position_embeddings, str(model))
        super().__init__(transformer.config.hidden_size, self.pooled_width(transformer.config), max_tokens)
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.freeze()

    @staticmethod
    def pooled_width(config: Any) -> int:
        """For transformers' configuration of the model."""
        return config.hidden_size

    def encode(self, captions: list[str]) -> TextFeatures:
        ids = placed(tokenize(self.tokenizer, captions, self.max_tokens).input_ids, self.device)
        return TextFeatures(*self.read(ids), mask_up_to_end(ids, self.tokenizer.eos_token_id))

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) int64 -> the tokens (B, L, D) and the pooled vector (B, P)."""
        states = self.transformer(input_ids=ids)  # no attention mask: it is causal, and SD 1 gave none
        return states.last_hidden_state, states.pooler_output


class ClipWithProjectionTextEncoder(ClipTextEncoder):
    """tokens: the states of the last layer but one, before any further norm; pooled: CLIP's text embedding, projected,
    not normalised; both as aMUSEd conditions on them (2401.01808, section 3.2). Arguments and errors as above.
    """

    model_class = CLIPTextModelWithProjection

    @staticmethod
    def pooled_width(config: Any) -> int:
        return config.projection_dim

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.transformer(input_ids=ids, output_hidden_states=True)
        return states.hidden_states[-2], states.text_embeds


class LastButOne(nn.Module):
    """The tokens of `ClipWithProjectionTextEncoder` from token ids: (B, L) int64 -> (B, L, D)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, output_hidden_states=True).hidden_states[-2]
