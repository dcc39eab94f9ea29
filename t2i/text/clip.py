"""CLIP's text transformer (Radford et al., arXiv:2103.00020); the encoder of Stable Diffusion 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from t2i.errors import CheckpointError, ConfigError
from t2i.interfaces import TextFeatures
from t2i.text.frozen import FrozenTextEncoder, check_max_tokens, mask_up_to_end


class ClipTextEncoder(FrozenTextEncoder):
    """tokens: the last hidden states after the final layer norm, those of the padding included, as Stable
    Diffusion 1 conditions on them (arXiv:2112.10752); pooled: the state at the end token, not projected.

    model: a directory with weights and tokenizer, or a hub id. A hub id that was fetched before is taken from
        the hub's cache; the network is asked only where `allow_download` is true.
    Raises ConfigError, or CheckpointError where weights or vocabulary are missing.
    """

    def __init__(self, model: str | None, max_tokens: int = 77, allow_download: bool = False) -> None:
        if model is None:
            raise ConfigError("text.model is not set; allowed for clip: a local directory or a hub id.")
        local = not allow_download or Path(model).is_dir()
        try:
            with _quiet():
                tokenizer = CLIPTokenizer.from_pretrained(model, local_files_only=local)
                loaded: Any = CLIPTextModel.from_pretrained(
                    model, local_files_only=local, dtype=torch.float32, output_loading_info=True
                )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"text.model {model!r} cannot be loaded ({reason}); allowed: a directory with a CLIP text "
                "model and its tokenizer, or a hub id with text.allow_download=true."
            ) from error
        transformer, report = loaded
        missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if missing:
            raise CheckpointError(f"text.model {model!r} is not a CLIP text model: it lacks {missing[0]}.")
        if tokenizer.vocab_size != transformer.config.vocab_size:
            raise CheckpointError(
                f"text.model {model!r} has {tokenizer.vocab_size} tokens in its tokenizer and "
                f"{transformer.config.vocab_size} in its weights; allowed: the same vocabulary in both."
            )
        check_max_tokens(max_tokens, transformer.config.max_position_embeddings, model)
        width = transformer.config.hidden_size
        super().__init__(width, width, max_tokens)
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.freeze()

    def encode(self, captions: list[str]) -> TextFeatures:
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids = tokens.input_ids.to(self.device)
        states = self.transformer(input_ids=ids)  # no attention mask: it is causal, and SD 1 gave none
        mask = mask_up_to_end(ids, self.tokenizer.eos_token_id)
        return TextFeatures(states.last_hidden_state, states.pooler_output, mask)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and table of keys; what matters of that table is checked."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(verbosity)
