"""What the families' generators have in common: a model, with a checkpoint's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from t2i.config import Precision
from t2i.interfaces import Progress, SampleRequest, TextToImage
from t2i.nn.blocks import blocks_of
from t2i.nn.precision import chosen, freezes_in_bf16, mixed
from t2i.text.cache import CachedTextEncoder
from t2i.training.blocks import prepare
from t2i.training.checkpoint import LoadedCheckpoint, load_into


class ModelGenerator:
    """A `t2i.interfaces.Generator` over a checkpoint's averaged weights.

    model: as the checkpoint's configuration describes it; sampling: the configuration's entry of that name
    device: None takes a GPU where there is one, which then computes in the precision that the run was trained in
    """

    def __init__(
        self,
        model: TextToImage,
        size_px: int,
        sampling: Any,
        checkpoint: LoadedCheckpoint,
        device: torch.device | str | None,
    ) -> None:
        self.default_size_px, self.sampling = size_px, sampling
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # A CPU computes in single precision, whatever the run did.
        is_cpu = self.device.type == "cpu"
        precision: Precision = checkpoint.config["trainer"]["precision"]
        self.precision: Precision = "32-true" if is_cpu else chosen(precision, self.device)
        self.model = model.eval()
        load_into(self.model, checkpoint.weights, checkpoint.path, prefix="model.")
        self.model.to(self.device)
        if isinstance(self.model.text, nn.Module):  # it has learned with the model, and does no more
            encoder = self.model.text
            encoder.trainable = False
            del self.model.text
            self.model.text = CachedTextEncoder(encoder)
            self.model.text.to(self.device)
        else:
            in_bf16 = freezes_in_bf16(self.precision, self.device)
            self.model.text.to(self.device, torch.bfloat16 if in_bf16 else None)

    def compile(self) -> None:
        """Has torch compile the model's blocks, each when it is first called."""
        prepare([block for network in self.model.children() for block in blocks_of(network)], False, True)

    def check(self, request: SampleRequest, sampling: Any) -> None:
        """See `t2i.interfaces.Generator`."""
        self.model.check(request, sampling)

    def generate(self, request: SampleRequest, progress: Progress | None = None) -> Tensor:
        """See `t2i.interfaces.Generator`."""
        with mixed(self.precision, self.device):
            return self.model.generate(request, self.sampling, progress).float().cpu()

    def invert(self, request: SampleRequest, progress: Progress | None = None) -> Tensor:
        """See `t2i.interfaces.Generator`."""
        with mixed(self.precision, self.device):
            return self.model.invert(request, self.sampling, progress).float().cpu()
