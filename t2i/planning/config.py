"""The machines of a run, which are the group conf/cluster/, and what a plan takes for granted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from t2i.config import check
from t2i.launch.slurm import SlurmConfig


@dataclass(frozen=True)
class ClusterConfig:
    """Nodes of equal GPUs.

    gpu: its name, for people; "none" for machines without
    peak_bf16_tflops: of one GPU, dense, in TFLOP/s
    memory_gib: of one GPU
    node_bandwidth_gbps: gigabits per second that a node can send to others while it receives as many, over all
        its network ports
    usd_per_gpu_hour: what is paid, or would be
    cpu_cores_per_node: physical cores, which decode pictures
    mfu: share of peak_bf16_tflops that training is taken to reach where nothing was measured
    slurm: what its SLURM wants to be told, where it has one
    memory_gb_per_s: how many 10^9 bytes a second one GPU reads of its memory; null where it is not known
    """

    gpu: str
    peak_bf16_tflops: float
    memory_gib: float
    gpus_per_node: int
    nodes: int
    node_bandwidth_gbps: float
    usd_per_gpu_hour: float
    cpu_cores_per_node: int
    mfu: float
    slurm: SlurmConfig | None = None
    memory_gb_per_s: float | None = None

    def __post_init__(self) -> None:
        for key in ("gpus_per_node", "nodes", "cpu_cores_per_node"):
            check(getattr(self, key) >= 1, f"cluster.{key}", getattr(self, key), "1 or more")
        for key in ("peak_bf16_tflops", "memory_gib", "node_bandwidth_gbps"):
            value = getattr(self, key)
            check(0 < value < math.inf, f"cluster.{key}", value, "more than 0")
        rate = self.memory_gb_per_s
        ok = rate is None or 0 < rate < math.inf
        check(ok, "cluster.memory_gb_per_s", rate, "more than 0, or null")
        cost = self.usd_per_gpu_hour
        check(0 <= cost < math.inf, "cluster.usd_per_gpu_hour", cost, "0 or more")
        check(0 < self.mfu <= 1, "cluster.mfu", self.mfu, "more than 0, up to 1")

    @property
    def has_gpus(self) -> bool:
        return self.gpu != "none"

    @property
    def num_gpus(self) -> int:
        """Over all nodes."""
        return self.gpus_per_node * self.nodes


@dataclass(frozen=True)
class Assumptions:
    """What no network tells.

    mfu: share of the peak; None takes the cluster's
    images_per_second_per_gpu: measured on one GPU, in place of mfu
    cached: the features of `t2i data encode` that are read, not computed
    bytes_per_pixel: of stored JPEGs (LAION-400M at 256 px: 10 TB for 413 million pictures and captions, 0.37)
    images_per_second_per_core: decoded and resized by one core (Pillow, 768 x 512 JPEG: 101)
    """

    mfu: float | None = None
    images_per_second_per_gpu: float | None = None
    cached: frozenset[str] = frozenset()
    bytes_per_pixel: float = 0.37
    images_per_second_per_core: float = 100.0

    def __post_init__(self) -> None:
        check(self.mfu is None or 0 < self.mfu <= 1, "--mfu", self.mfu, "more than 0, up to 1")
        for name in ("images_per_second_per_gpu", "bytes_per_pixel", "images_per_second_per_core"):
            value = getattr(self, name)
            ok = value is None or 0 < value < math.inf
            check(ok, "--" + name.replace("_", "-"), value, "more than 0")
