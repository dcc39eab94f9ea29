"""How the processes of a run share its work: DistributedDataParallel, or FSDP2 (torch's fully_shard)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.utils import _sync_module_states

from t2i.config import Precision, TrainerConfig
from t2i.launch.watch import patience_s
from t2i.training.divided import is_divided, put
from t2i.training.stage import BaseStage

BUCKET_BYTES = 250 * 2**20  # of the buffers that are sent together


class ShardedStrategy(DDPStrategy):
    """Each process keeps its share of trained weights, gradients, moments and averages; frozen networks are whole.

    `fully_shard` is put on the blocks, which are gathered one at a time, and on the stage, whose own weights (those
    beside the blocks) are gathered for the whole of a call of `losses`. Of Lightning's DDPStrategy that is all that
    differs: it starts, joins and ends the processes.
    """

    def __init__(self, config: TrainerConfig) -> None:
        super().__init__(timeout=timedelta(seconds=patience_s(config.deadline_s)))
        self.config = config
        self.reduces = True  # gradients, in the backward pass in progress

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """So that a checkpoint is read into what is divided already."""
        return True

    def configure_ddp(self) -> None:
        stage = self.model
        assert isinstance(stage, BaseStage)
        _sync_module_states(stage, _get_default_group(), BUCKET_BYTES, src=0, params_and_buffers_to_ignore=())
        mesh = mesh_of(self.config, self.root_device)
        divide(stage, stage.blocks_to_gather(), mesh, self.config)
        for name in ("losses", "draw", "after_training"):
            register_fsdp_forward_method(stage, name)
        for parameter in stage.parameters():
            if parameter.requires_grad and not is_divided(parameter):
                parameter.register_post_accumulate_grad_hook(self._averaged)

    def _averaged(self, parameter: torch.Tensor) -> None:
        """The gradient of what is not divided, over all processes."""
        if self.reduces and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.config.processes

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None
        if buffers := list(self.model.buffers()):  # as DDP does before each forward pass
            dist._broadcast_coalesced(_get_default_group(), buffers, BUCKET_BYTES, 0)
        return super().training_step(*args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within this context gradients are added up in each process, whole."""
        stage = self.model
        assert isinstance(stage, FSDPModule)
        self._reduce(stage, False)
        try:
            yield
        finally:
            self._reduce(stage, True)

    def _reduce(self, stage: FSDPModule, reduces: bool) -> None:
        self.reduces = reduces
        stage.set_requires_gradient_sync(reduces)
        stage.set_is_last_backward(reduces)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        saved = checkpoint["state_dict"]
        for name, target in self.model.state_dict().items():
            put(saved[name], target)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Each process writes its share."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def teardown(self) -> None:
        """Lightning's would move what is divided to the host."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def mesh_of(config: TrainerConfig, device: torch.device) -> DeviceMesh:
    """The processes, in one row that shares all, or with hybrid_shard in one row for each machine."""
    if config.strategy == "hybrid_shard" and config.num_nodes > 1:
        shape, names = (config.num_nodes, config.devices), ("replicate", "shard")
        return init_device_mesh(device.type, shape, mesh_dim_names=names)
    return init_device_mesh(device.type, (config.processes,), mesh_dim_names=("shard",))


def divide(module: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, config: TrainerConfig) -> None:
    """Puts `fully_shard` on some blocks of a module and on the module, in place. Its trained parameters are DTensors
    then."""
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": gathered_in(config.precision),
        # A single number has no rows.
        "ignored_params": {p for p in module.parameters() if not p.requires_grad or p.ndim == 0},
    }
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # rows of channels_last have no order of their own
    for block in with_forward(blocks):
        if any(p not in options["ignored_params"] for p in block.parameters()):
            fully_shard(block, reshard_after_forward=config.strategy != "shard_grad_op", **options)
    fully_shard(module, reshard_after_forward=False, **options)


def with_forward(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Without mere containers, of which the members are called."""
    return [block for block in blocks if type(block).forward is not nn.Module.forward]


def gathered_in(precision: Precision) -> MixedPrecisionPolicy:
    """With bf16-mixed matrices are gathered in bfloat16, to which autocast would round them before each product, and
    vectors, which norms take in float32, as they are; gradients are summed in float32. Inputs stay what autocast makes
    of them. A torch that cannot tell one from the other (before 2.15) gathers all as it is."""
    if (
        precision != "bf16-mixed"
        or "param_dtype_override_fn" not in MixedPrecisionPolicy.__dataclass_fields__
    ):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        torch.bfloat16,
        torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda parameter: parameter.dtype if parameter.ndim < 2 else None,
    )
