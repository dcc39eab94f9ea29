"""What a network takes, found by running it on tensors that hold no data: parameters, FLOPs, saved activations.

FLOPs are 2 x multiply-adds of convolutions, matrix products and attention, as torch's counter has them; norms,
activations and the optimizer are not counted (they cost time by memory traffic, not by arithmetic).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from t2i.nn.blocks import blocks_of, run_again

Inputs = Callable[[int], dict[str, Tensor]]  # batch size -> keyword arguments, on the current default device
INPUTS, BETWEEN = "inputs", "between"  # of and between blocks: what checkpointing keeps


@dataclass(frozen=True)
class Flops:
    """Of one picture."""

    forward: int
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Activations:
    """Bytes kept from the forward for the backward pass, parameters left out; per process.

    fixed: whatever the batch: the 16-bit copies of the weights that autocast keeps
    per_image: plainly
    per_image_checkpointed: where each block keeps its inputs only and is run again (1604.06174), with what the
        largest block then keeps; which those are, see t2i.training.blocks.prepare
    """

    fixed: int
    per_image: int
    per_image_checkpointed: int


def num_parameters(*modules: nn.Module) -> int:
    """Of all of them together."""
    return sum(p.numel() for module in modules for p in module.parameters())


def flops(forward: Callable[[], Tensor], with_backward: bool) -> Flops:
    """forward: runs a network on the meta device. Attention is made of plain products there, so that every kernel
    of it is counted alike, and masks change nothing."""
    with FlopCounterMode(display=False) as forward_count, torch.set_grad_enabled(with_backward):
        out = forward()
    if not with_backward:
        return Flops(forward_count.get_total_flops())
    with FlopCounterMode(display=False) as backward_count:
        out.sum().backward()
    return Flops(forward_count.get_total_flops(), backward_count.get_total_flops())


def activations(
    network: nn.Module, inputs: Inputs, precision: str, device: str = "cuda", compiled: bool = False
) -> Activations:
    """What training `network` (on the meta device) keeps: the straight line through two batch sizes.

    precision: Lightning's name
    device: "cuda" follows CUDA's autocast and memory-efficient attention, with no GPU needed; "cpu" the CPU's
    compiled: blocks are; what else that changes is not counted
    """
    again = blocks_of(network) if compiled else run_again(blocks_of(network))
    again = [block for block in again if next(block.buffers(), None) is None]
    two, four = (_saved(network, again, inputs, batch, precision, device) for batch in (2, 4))
    per_image = {part: (four[part] - two[part]) // 2 for part in four}
    saved = [part for part in four if part != INPUTS]
    in_blocks = [per_image[part] for part in four if isinstance(part, int)]
    return Activations(
        fixed=sum(two[part] - 2 * per_image[part] for part in saved),
        per_image=sum(per_image[part] for part in saved),
        per_image_checkpointed=per_image[INPUTS] + per_image[BETWEEN] + max(in_blocks, default=0),
    )


def peak_bytes_per_image(network: nn.Module, inputs: Inputs, precision: str, device: str) -> int:
    """The most that is alive at a time while `network` (on the meta device) runs without gradients, its weights
    left out: of one picture."""

    def peak(batch: int) -> int:
        live = LiveBytes()
        with pretended(network, device) as state, torch.no_grad(), _as_trained(device, precision), live:
            torch.func.functional_call(network, state, kwargs=inputs(batch))
        return live.peak

    return (peak(4) - peak(2)) // 2


@contextmanager
def pretended(network: nn.Module, device: str) -> Iterator[dict[str, Tensor]]:
    """Within this context new tensors pretend to be on `device`; so do the network's state that it gives."""
    with FakeTensorMode(), torch.device(device):
        state: dict[str, Tensor] = {
            name: torch.empty_strided(b.shape, b.stride(), dtype=b.dtype)
            for name, b in network.named_buffers()
        }
        for name, p in network.named_parameters():
            fake = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype)
            state[name] = fake.requires_grad_(p.requires_grad)
        yield state


def _saved(
    network: nn.Module, blocks: Sequence[nn.Module], inputs: Inputs, batch: int, precision: str, device: str
) -> dict[int | str, int]:
    """Bytes of distinct storages that autograd saves in one forward pass, by the number of the block that saves
    them."""
    with pretended(network, device) as state:
        tracker = _SavedBytes(state)
        handles = [
            handle
            for i, block in enumerate(blocks)
            for handle in (
                block.register_forward_pre_hook(tracker.entering(i), with_kwargs=True),
                block.register_forward_hook(tracker.leaving),
            )
        ]
        hooks = torch.autograd.graph.saved_tensors_hooks(tracker.pack, lambda tensor: tensor)
        try:
            with hooks, _as_trained(device, precision):
                torch.func.functional_call(network, state, kwargs=inputs(batch))
        finally:
            for handle in handles:
                handle.remove()
    return tracker.bytes()


class _SavedBytes:
    """Hooks that sort what is saved by the block that saves it; None: between the blocks."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = {_storage(value) for value in state.values()}
        self.block: int | None = None
        # By storage. The tensors are kept, so that no storage takes the place of one that was freed.
        self.saved: dict[int, tuple[int | None, Tensor]] = {}
        self.block_inputs: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self.state:
            self.saved.setdefault(storage, (self.block, tensor))
        return tensor

    def entering(self, block: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.block = block
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor):
                    self.block_inputs[_storage(value)] = value

        return hook

    def leaving(self, *_: Any) -> None:
        self.block = None

    def bytes(self) -> dict[int | str, int]:
        sizes: dict[int | str, int] = {INPUTS: sum(map(_size, self.block_inputs.values())), BETWEEN: 0}
        for block, tensor in self.saved.values():
            part = BETWEEN if block is None else block
            sizes[part] = sizes.get(part, 0) + _size(tensor)
        return sizes


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class LiveBytes(TorchDispatchMode):
    """peak: the most bytes that the storages made within this context take at a time; live: those of now.

    given: tensors from before, of which views are made
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, num_bytes: int) -> None:
        self.live -= num_bytes


@contextmanager
def _as_trained(device: str, precision: str) -> Iterator[None]:
    """The attention of `device`, and torch.autocast also for a CUDA that is not there (where it turns itself
    off)."""
    with _EfficientAttention(device):
        if precision == "32-true":
            yield
            return
        dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            context = torch.autocast(device, dtype=dtype)
        with context:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)
            yield


class _EfficientAttention(TorchFunctionMode):
    """Gives tensors that only pretend to be on a GPU the attention that a GPU would choose."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention or self.device == "cpu":
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        if torch.is_autocast_enabled(self.device):
            q, k, v = (x.to(torch.get_autocast_dtype(self.device)) for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, compute_log_sumexp=True)[
            0
        ]
