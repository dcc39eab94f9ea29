"""Seconds of a step, and what follows from them: images per second, days, GPU-hours, money."""

from __future__ import annotations

from dataclasses import dataclass

from t2i.planning.config import ClusterConfig
from t2i.planning.traffic import Traffic

SECONDS_PER_HOUR, SECONDS_PER_DAY = 3_600, 86_400


@dataclass(frozen=True)
class Work:
    """What a run computes and sends.

    forward_flops, backward_flops: of the trained networks, per picture
    encoder_flops: of the frozen encoders, per picture; 0 where their outputs are cached
    global_batch: pictures per step, over all GPUs
    num_images: pictures of the whole run
    recomputed_flops: of the trained networks' second forward pass, where activations are checkpointed, per picture;
        they take time and count in no MFU
    """

    forward_flops: int
    backward_flops: int
    encoder_flops: int
    global_batch: int
    num_images: int
    recomputed_flops: int = 0

    @property
    def flops(self) -> int:
        """Per picture, each once."""
        return self.forward_flops + self.backward_flops + self.encoder_flops


@dataclass(frozen=True)
class Speed:
    """compute_s: of one step's pictures on one GPU
    communication_s: of one step between nodes; exposed_s: the part of it that computing does not hide
    ideal_images_per_second: of the same GPUs if communication took no time
    """

    num_gpus: int
    compute_s: float
    communication_s: float
    exposed_s: float
    images_per_second: float
    ideal_images_per_second: float
    days: float
    gpu_hours: float
    usd: float


def mfu_of(work: Work, cluster: ClusterConfig, images_per_second_per_gpu: float) -> float:
    """Model FLOPs utilisation (2204.02311, appendix B): the share of the peak that a measured rate means."""
    return images_per_second_per_gpu * work.flops / (cluster.peak_bf16_tflops * 1e12)


def sent_s(sent: Traffic, cluster: ClusterConfig) -> float:
    """Seconds that the links between nodes take for one step. Within a node they are taken to be fast enough to be
    hidden."""
    return sent.node * 8 / (cluster.node_bandwidth_gbps * 1e9)


def speed(work: Work, cluster: ClusterConfig, mfu: float, sent: Traffic) -> Speed:
    """The plan of a run at this share of the peak, communication apart. DistributedDataParallel sends gradients
    while the backward pass goes on, and FSDP gathers weights in the forward pass too: what takes longer than that is
    waited for."""
    n = cluster.num_gpus
    done = work.flops + work.recomputed_flops
    compute_s = work.global_batch / n * done / (cluster.peak_bf16_tflops * 1e12 * mfu)
    backward_s = compute_s * (work.backward_flops + work.recomputed_flops) / done
    communication_s = sent_s(sent, cluster)
    exposed_s = max(0.0, communication_s - (compute_s if sent.weights else backward_s))
    images_per_second = work.global_batch / (compute_s + exposed_s)
    seconds = work.num_images / images_per_second
    gpu_hours = seconds * n / SECONDS_PER_HOUR
    return Speed(
        num_gpus=n,
        compute_s=compute_s,
        communication_s=communication_s,
        exposed_s=exposed_s,
        images_per_second=images_per_second,
        ideal_images_per_second=work.global_batch / compute_s,
        days=seconds / SECONDS_PER_DAY,
        gpu_hours=gpu_hours,
        usd=gpu_hours * cluster.usd_per_gpu_hour,
    )
