"""Loading a text model and its tokenizer through transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from t2i.errors import CheckpointError
from t2i.weight_file import explain


def load_pretrained(
    model: str | None, name: str, model_class: Any, tokenizer_class: Any, allow_download: bool
) -> tuple[Any, Any]:
    """(tokenizer, float32 model) from a directory or a hub id. A hub id that was fetched before is taken from the
    hub's cache; the network is asked only where `allow_download` is true. safetensors come first; a pickle is
    read with weights_only.

    name: of the encoder, for messages
    Raises ConfigError where `model` is None, CheckpointError where weights are missing or do not fit.
    """
    tokenizer = load_part(model, name, tokenizer_class, allow_download)
    with _loading(model, name):
        transformer, report = model_class.from_pretrained(
            model,
            local_files_only=_is_local(model, allow_download),
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise CheckpointError(
            f"text.model {model!r} is not a {name.upper()} text model: it lacks {missing[0]}."
        )
    return tokenizer, transformer


def load_part(model: str | None, name: str, part_class: Any, allow_download: bool) -> Any:
    """The tokenizer or the configuration alone, with the errors of `load_pretrained`."""
    with _loading(model, name):
        return part_class.from_pretrained(model, local_files_only=_is_local(model, allow_download))


def _is_local(model: str | None, allow_download: bool) -> bool:
    return not allow_download or Path(str(model)).is_dir()


@contextmanager
def _loading(model: str | None, name: str) -> Iterator[None]:
    assert model is not None  # TextConfig holds it
    try:
        with quiet():
            yield
    except Exception as error:  # damaged files lead the readers astray in every way there is
        if Path(model).is_dir():
            explain(Path(model))
        reason = " ".join(str(error).split("\n\n")[0].split()).rstrip(".")
        raise CheckpointError(
            f"text.model {model!r} cannot be loaded ({reason}); allowed: a directory with a {name.upper()} text "
            "model and its tokenizer, or a hub id with text.allow_download=true."
        ) from error


def check_vocabulary(model: str | None, tokens: int, rows: int, spare: int = 0) -> None:
    """Raises CheckpointError unless the weights have as many rows as the tokenizer has tokens, or up to `spare`
    more."""
    if not 0 <= rows - tokens <= spare:
        raise CheckpointError(
            f"text.model {model!r} has {tokens} tokens in its tokenizer and {rows} in its weights; allowed: the "
            "same vocabulary in both."
        )


def tokenize(tokenizer: Any, captions: list[str], max_tokens: int) -> Any:
    """transformers' BatchEncoding of tensors (B, max_tokens), padded and cut to that."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bar and table of keys; what matters of that table is checked."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(verbosity)
