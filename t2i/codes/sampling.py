"""Drawing a code from a network's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i.codes.config import CodeSampling
from t2i.nn.precision import widened
from t2i.nn.transfer import placed


def filtered(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """(..., K) with -inf for codes that are not among the top_k most likely, or not among the fewest most likely ones
    that together have probability top_p. Codes as likely as the last one that stays, stay."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered = logits.sort(descending=True).values
        probability = ordered.softmax(-1)
        # One goes where those before it already have top_p together: never the first.
        goes = probability.cumsum(-1) - probability >= top_p
        least = ordered.masked_fill(goes, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def probabilities(logits: Tensor, sampling: CodeSampling) -> Tensor:
    """(..., K) of each code, at a temperature above 0."""
    logits = widened(logits)
    below = logits - logits.amax(-1, keepdim=True)  # divided by little, the largest stays finite
    temperature = max(sampling.temperature, torch.finfo(below.dtype).tiny)
    return filtered(below / temperature, sampling.top_k, sampling.top_p).softmax(-1)


def drawn(logits: Tensor, uniform: Tensor, sampling: CodeSampling) -> Tensor:
    """logits: (B, K) guided; uniform: (B,) in [0, 1) -> (B,) int64: in each row the code at which the cumulative
    distribution passes the row's own number."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    cumulative = probabilities(logits, sampling).cumsum(-1)
    whole = cumulative[:, -1:]
    passed = (cumulative <= uniform.to(cumulative)[:, None] * whole).sum(-1)
    return torch.minimum(passed, (cumulative < whole).sum(-1))  # however the product was rounded


def raced(logits: Tensor, exponential: Tensor, sampling: CodeSampling) -> Tensor:
    """logits: (..., K) guided; exponential: (..., K) float32, of mean 1 -> (...) int64: in each row the code with the
    most probability over its own number, as torch.multinomial draws from the generator that gave these."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return (probabilities(logits, sampling).float() / placed(exponential, logits.device)).argmax(-1)
