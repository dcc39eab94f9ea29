"""What a run takes on a cluster: the model's counts, a speed, and what follows from both."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from t2i.config import RunConfig, check
from t2i.few import plural
from t2i.planning.config import Assumptions, ClusterConfig
from t2i.planning.memory import FP32, STRATEGIES, Memory, Strategy, memory
from t2i.planning.model import Model
from t2i.planning.speed import Speed, Work, mfu_of, speed
from t2i.planning.traffic import Traffic, traffic
from t2i.text.cache import MAX_BYTES

GIB = 2**30
USABLE_MEMORY = 0.9  # the rest: CUDA's context, kernels' workspaces, fragmentation


@dataclass(frozen=True)
class Checkpoints:
    """Bytes. training: weights, moments, average and the frozen codec; weights: model.safetensors; export: the averaged
    weights with all frozen encoders in float32, as a diffusers directory has them."""

    training: int
    weights: int
    export: int


@dataclass(frozen=True)
class Plan:
    """traffic: by strategy; memory: by strategy and whether activations are checkpointed; ours: as configured
    images_per_gpu: per step, rounded up
    images_at_a_time: of these, in a micro-batch, rounded up
    bytes_per_second_per_node, total_bytes: read from shards
    loader_images_per_second_per_node: what the configured reader processes can decode
    text_bytes_per_node: of the host's memory, at most, for features of captions that are kept
    """

    cluster: ClusterConfig
    model: Model
    work: Work
    mfu: float
    speed: Speed
    traffic: dict[Strategy, Traffic]
    images_per_gpu: int
    images_at_a_time: int
    memory: dict[tuple[Strategy, bool], Memory]
    ours: Memory
    bytes_per_second_per_node: float
    total_bytes: float
    loader_images_per_second_per_node: float
    text_bytes_per_node: int
    checkpoints: Checkpoints
    warnings: list[str]


def global_batch(config: RunConfig) -> int:
    """Pictures per step over all processes, as configured; a cluster of another size keeps it."""
    return config.trainer.images_per_process * config.trainer.processes


def reader_processes(config: RunConfig, cluster: ClusterConfig) -> int:
    """Of a node. Where data.num_workers is 0 the training processes read, one per GPU."""
    return max(config.data.num_workers, 1) * cluster.gpus_per_node


def make_plan(config: RunConfig, model: Model, cluster: ClusterConfig, assumed: Assumptions) -> Plan:
    """The plan of a run whose devices and nodes are those of `cluster`."""
    for features in sorted(assumed.cached - model.cacheable):
        allowed = ", ".join([*sorted(model.cacheable), "none"])
        check(False, "--cached", features, f"{allowed}: what no trained network makes")
    of_pictures = model.cacheable - {"text"}
    ok = of_pictures <= assumed.cached or of_pictures.isdisjoint(assumed.cached)
    allowed = (
        f"all of {', '.join(sorted(of_pictures))}, or none of them: pictures are read for what is not there"
    )
    check(ok, "--cached", ",".join(sorted(assumed.cached)), allowed)
    work = work_of(config, model, assumed)
    mfu = assumed.mfu or cluster.mfu
    if assumed.images_per_second_per_gpu is not None:
        mfu = mfu_of(work, cluster, assumed.images_per_second_per_gpu)
    per_gpu = math.ceil(work.global_batch / cluster.num_gpus)
    micro_batches = config.trainer.parts(per_gpu)
    at_a_time = math.ceil(per_gpu / micro_batches)
    sent = {each: traffic(model.trained(), each, cluster, micro_batches) for each in STRATEGIES}
    expected = speed(work, cluster, mfu, sent[config.trainer.strategy])
    size_px, per_node = config.resolution.size_px, expected.images_per_second / cluster.nodes
    bytes_per_image = assumed.bytes_per_pixel * size_px**2
    memories: dict[tuple[Strategy, bool], Memory] = {
        (strategy, checkpointing): memory(
            model.trained(assumed.cached),
            model.activations,
            model.frozen_peak_per_image(assumed.cached),
            at_a_time,
            strategy,
            checkpointing,
            cluster.num_gpus,
            cluster.gpus_per_node,
            accumulates=at_a_time < per_gpu,
        )
        for strategy in STRATEGIES
        for checkpointing in (False, True)
    }
    text_online = any(part.cached_as == "text" for part in model.needed(assumed.cached))
    plan = Plan(
        cluster=cluster,
        model=model,
        work=work,
        mfu=mfu,
        speed=expected,
        traffic=sent,
        images_per_gpu=per_gpu,
        images_at_a_time=at_a_time,
        memory=memories,
        ours=memories[config.trainer.strategy, config.trainer.activation_checkpointing],
        bytes_per_second_per_node=per_node * bytes_per_image,
        total_bytes=work.num_images * bytes_per_image,
        loader_images_per_second_per_node=min(reader_processes(config, cluster), cluster.cpu_cores_per_node)
        * assumed.images_per_second_per_core,
        text_bytes_per_node=MAX_BYTES * cluster.gpus_per_node if text_online else 0,
        checkpoints=checkpoints(model),
        warnings=[],
    )
    return dataclasses.replace(plan, warnings=warnings(plan, config))


def work_of(config: RunConfig, model: Model, assumed: Assumptions) -> Work:
    """What the run computes and sends."""
    run = [part.flops for part in model.needed(assumed.cached) if part.flops is not None]
    through = [flops for flops in run if flops.backward]
    return Work(
        forward_flops=sum(flops.forward for flops in through),
        backward_flops=sum(flops.backward for flops in through),
        encoder_flops=sum(flops.forward for flops in run if not flops.backward),
        global_batch=global_batch(config),
        num_images=config.trainer.num_images,
        recomputed_flops=sum(flops.forward for flops in through) * config.trainer.activation_checkpointing,
    )


def checkpoints(model: Model) -> Checkpoints:
    """Sizes of the files that a run writes."""
    trained = model.trained()
    drawn_with = sum(part.parameters for part in model.parts if part.trained and part.inference)
    codec = sum(part.parameters for part in model.parts if part.saved)
    frozen = sum(part.parameters for part in model.parts if part.saved or part.cached_as is not None)
    return Checkpoints(
        training=FP32 * (trained.parameters + trained.moments + trained.averaged + codec),
        weights=FP32 * (drawn_with + codec),
        export=FP32 * (drawn_with + frozen),
    )


def warnings(plan: Plan, config: RunConfig) -> list[str]:
    """What will go wrong, one sentence each."""
    found = []
    batch, gpus = plan.work.global_batch, plan.cluster.num_gpus
    if batch % gpus:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        near = {max(n for n in divisors if n < gpus), min((n for n in divisors if n > gpus), default=batch)}
        key = "trainer.batch_size for a" if config.trainer.global_batch_size is None else "a"
        found.append(
            f"The global batch of {batch} does not divide over {gpus} GPUs; {' or '.join(map(str, sorted(near)))} "
            f"GPUs would do, or {key} global batch of {math.ceil(batch / gpus) * gpus}."
        )
    found += memory_warnings(plan, config)
    per_node = plan.speed.images_per_second / plan.cluster.nodes
    if per_node > plan.loader_images_per_second_per_node:
        cores, readers = plan.cluster.cpu_cores_per_node, reader_processes(config, plan.cluster)
        mend = (
            f"raise data.num_workers above {config.data.num_workers}"
            if readers < cores
            else "store smaller pictures or cache latents"
        )
        found.append(
            f"The loaders give about {plan.loader_images_per_second_per_node:,.0f} images/s per node, and "
            f"training takes {per_node:,.0f} ({cores} cores, {readers} reader processes): {mend}."
        )
    if config.trainer.precision == "32-true":
        found.append(
            "trainer.precision is 32-true, and the peak that the MFU is a share of is that of bf16: give --mfu or "
            "--images-per-second-per-gpu as measured."
        )
    return found


def usable_bytes(cluster: ClusterConfig) -> float:
    """Of one GPU's memory, for what is planned here."""
    return USABLE_MEMORY * cluster.memory_gib * GIB


def memory_warnings(plan: Plan, config: RunConfig) -> list[str]:
    """What does not fit, with the largest part of it and what would make it fit."""
    usable = usable_bytes(plan.cluster)
    checkpointing = config.trainer.activation_checkpointing
    strategy = config.trainer.strategy
    ours, way = plan.ours, name(strategy, checkpointing)
    if ours.total <= usable:
        return []
    part, size = max(vars(ours).items(), key=lambda item: item[1])
    fits = [name(*other) for other, m in plan.memory.items() if m.total <= usable]
    kept = plan.model.activations
    per_image = kept.per_image_checkpointed if checkpointing else kept.per_image
    at_most = int((usable - (ours.total - ours.activations)) // per_image)
    if at_most >= 1:
        gpus, parts = math.ceil(plan.work.global_batch / at_most), math.ceil(plan.images_per_gpu / at_most)
        derived = config.trainer.global_batch_size is not None
        key = f"trainer.batch_size={at_most}" if derived else f"trainer.micro_batches={parts} or more"
        fits.append(
            f"{way} with at most {plural(at_most, 'picture')} at a time on each GPU ({key}, or on "
            f"{plural(gpus, 'GPU')} or more)"
        )
    return [
        f"{way} does not fit: it takes {ours.total / GIB:.1f} GiB of the {usable / GIB:.1f} that are usable of "
        f"{plan.cluster.memory_gib:g}, {size / GIB:.1f} of them for {part}; "
        + (f"what would fit: {', '.join(fits)}." if fits else "nothing planned here fits.")
    ]


def name(strategy: Strategy, checkpointing: bool) -> str:
    """ "FSDP full_shard with checkpointing"."""
    label = "DDP" if strategy == "ddp" else f"FSDP {strategy}"
    return label + (" with checkpointing" if checkpointing else "")


def sweep(
    config: RunConfig, model: Model, cluster: ClusterConfig, assumed: Assumptions, nodes: list[int]
) -> list[Plan]:
    """The same run on clusters of several sizes."""
    sizes = [dataclasses.replace(cluster, nodes=count) for count in nodes]
    return [make_plan(config, model, size, assumed) for size in sizes]
