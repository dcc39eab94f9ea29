"""The Inception network of the Fréchet inception distance (Heusel et al., 1706.08500): TensorFlow's of 2015-12-05, in
the names of torchvision's Inception v3, as pytorch-fid and torch-fidelity have it.

It differs from torchvision's in its average pools, which do not count the padding, in the last block's pool, which is
a maximum, and in 1,008 classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception as blocks

WIDTH = 2048
SIZE_PX = 299
NUM_CLASSES = 1008


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _A(blocks.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), five, three, self.branch_pool(_average(x))]


class _C(blocks.InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), seven, double, self.branch_pool(_average(x))]


class _E(blocks.InceptionE):
    def _pool(self, x: Tensor) -> Tensor:
        return _average(x)

    def _forward(self, x: Tensor) -> list[Tensor]:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            *(self.branch3x3_2a(three), self.branch3x3_2b(three)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(self._pool(x)),
        ]


class _LastE(_E):
    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)


class Inception(nn.Module):
    """Random until weights are loaded, which have the names of `pt_inception-2015-12-05-6726825d.pth`."""

    def __init__(self) -> None:
        super().__init__()
        made: Any = [_A, blocks.InceptionB, _C, blocks.InceptionD, _E]
        network = blocks.Inception3(
            NUM_CLASSES, aux_logits=False, inception_blocks=[blocks.BasicConv2d, *made, nn.Identity],
            init_weights=False,
        )  # fmt: skip
        network.Mixed_7c = _LastE(2048)
        network.dropout = nn.Identity()
        for name, module in network.named_children():
            self.add_module(name, module)
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 299, 299), pixels in 0..255 -> (B, 2048), averaged over positions."""
        x = (pixels - 128) / 128
        for name, module in self.named_children():
            if name != "fc":
                x = module(x)
        return torch.flatten(x, 1)
