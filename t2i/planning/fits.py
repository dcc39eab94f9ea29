"""What of a run fits into the memory of the GPU that it did not fit into."""

from __future__ import annotations

from t2i.config import RunConfig
from t2i.planning.memory import memory
from t2i.planning.model import Model
from t2i.planning.plan import GIB, USABLE_MEMORY


def bytes_of_batch(config: RunConfig, model: Model, images_at_a_time: int) -> int:
    """What one GPU takes with micro-batches of so many pictures, as `t2i train` runs it."""
    encoded = all(part.encoded is not None for part in config.data.parts().values())
    gpus = config.trainer.processes
    encoding = model.frozen_peak_per_image(model.cacheable if encoded else ())
    planned = memory(
        model.trained(),
        model.activations,
        encoding,
        images_at_a_time,
        config.trainer.strategy,
        config.trainer.activation_checkpointing,
        gpus,
        config.trainer.devices,
        accumulates=images_at_a_time < config.trainer.images_per_process,
    )
    return planned.total


def what_fits(config: RunConfig, model: Model, total_bytes: int) -> str:
    """A sentence with the plan's figure for the batch of `config`, and the largest that would fit.

    total_bytes: of the GPU; a part is left for what no plan counts
    """
    trainer, usable = config.trainer, USABLE_MEMORY * total_bytes
    batch, size = trainer.images_per_process, trainer.images_at_a_time
    parts = batch // size
    planned = bytes_of_batch(config, model, size) / GIB
    largest = max((n for n in range(size + 1) if bytes_of_batch(config, model, n) <= usable), default=None)
    said = f"the plan counts {planned:.1f} GiB, where {usable / GIB:.1f} are usable"
    if largest is None:
        least = bytes_of_batch(config, model, 0) / GIB
        return (
            f"{said}, and {least:.1f} before any picture: only a smaller model, or a larger GPU, would fit."
        )
    if largest == 0:
        return f"{said}, and not one picture would fit: a smaller resolution or model would."
    if trainer.global_batch_size is not None:
        if largest == size:
            less = max(1, size // 2)
            said += ", so that it should fit: does something else run on this GPU?"
            return f"{said} Else try trainer.batch_size={less}."
        return f"{said}: trainer.batch_size={largest} would fit; a step keeps its pictures."
    more = next(
        n for n in range(parts, batch + 1) if batch % n == 0 and batch // n <= max(1, min(largest, size // 2))
    )
    if largest == size:
        return (
            f"{said}, so that it should fit: does something else run on this GPU? Else try "
            f"trainer.micro_batches={more}."
        )
    return f"{said}: trainer.micro_batches={more} would fit, or at most trainer.batch_size={largest * parts}."
