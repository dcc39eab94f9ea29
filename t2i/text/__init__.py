"""Text encoders behind `t2i.interfaces.TextEncoder`; each module is imported only when it is asked for."""

from __future__ import annotations

from t2i.config import TextConfig
from t2i.interfaces import TextEncoder


def text_encoder_for_training(config: TextConfig) -> TextEncoder:
    """The same as a part of a model: one that learns with it is a module of the model; a frozen one stands behind a
    cache, which is no module, so that its weights enter no checkpoint: it is loaded from where `config` says."""
    encoder = build_text_encoder(config)
    if encoder.trainable:
        return encoder
    from t2i.text.cache import CachedTextEncoder

    return CachedTextEncoder(encoder)


def build_text_encoder(config: TextConfig) -> TextEncoder:
    """The encoder that `config.name` names. Raises ConfigError or CheckpointError, without waiting for a
    network, where its weights are not there and `config.allow_download` is false."""
    if config.name == "clip":
        from t2i.text.clip import ClipTextEncoder

        return ClipTextEncoder(config.model, config.max_tokens, config.allow_download)
    if config.name == "clip_with_projection":
        from t2i.text.clip import ClipWithProjectionTextEncoder

        return ClipWithProjectionTextEncoder(config.model, config.max_tokens, config.allow_download)
    if config.name == "open_clip":
        from t2i.text.open_clip import OpenClipTextEncoder

        return OpenClipTextEncoder(config.model, config.weights, config.max_tokens, config.allow_download)
    if config.name == "minilm":
        from t2i.text.minilm import MiniLMTextEncoder

        return MiniLMTextEncoder(config.max_tokens)
    if config.name == "t5":
        from t2i.text.t5 import T5TextEncoder

        return T5TextEncoder(config.model, config.max_tokens, config.allow_download)
    if config.name == "ldm_bert":
        from t2i.text.ldm_bert import LDMBertTextEncoder

        return LDMBertTextEncoder(config.model, config.max_tokens, *config.shape)
    from t2i.text.learned import LearnedTextEncoder

    return LearnedTextEncoder(config.max_tokens, *config.shape)
