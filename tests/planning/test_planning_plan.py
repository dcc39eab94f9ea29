"""What follows from counts and a speed: closed forms, and what a plan warns of."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
from rich.console import Console

from t2i.errors import ConfigError
from t2i.planning.config import Assumptions, ClusterConfig
from t2i.planning.count import Activations, Flops
from t2i.planning.memory import Trained
from t2i.planning.model import Model, Part
from t2i.planning.picture import draw_scaling
from t2i.planning.plan import make_plan, sweep
from t2i.planning.speed import Work, sent_s, speed
from t2i.planning.traffic import traffic
from t2i.text.cache import MAX_BYTES
from t2i_cli.plan import planned_run
from t2i_cli.plan_tables import BYTES, TIME, measure, memory_table, run_table, sweep_table, table

CLUSTER = ClusterConfig(
    gpu="A",
    peak_bf16_tflops=100.0,
    memory_gib=80.0,
    gpus_per_node=8,
    nodes=4,
    node_bandwidth_gbps=80.0,
    usd_per_gpu_hour=2.0,
    cpu_cores_per_node=32,
    mfu=0.5,
)
# Half of a peak of 100 TFLOP/s: a picture takes 0.04 s on a GPU, 0.02 s of it in the backward pass.
WORK = Work(
    forward_flops=500 * 10**9,
    backward_flops=10**12,
    encoder_flops=500 * 10**9,
    global_batch=320,
    num_images=3_200_000,
)
DENOISER = Part(
    "denoiser",
    250_000_000,
    trained=True,
    flops=Flops(500 * 10**9, 10**12),
    activations=Activations(fixed=500_000_000, per_image=2**30, per_image_checkpointed=2**27),
    averaged=250_000_000,
    gathered=500_000_000,
    in_blocks=500_000_000,
    largest_block=20_000_000,
)
CODEC = (
    Part(
        "codec encoder",
        30_000_000,
        False,
        Flops(400 * 10**9),
        peak_per_image=2**26,
        cached_as="latents",
        saved=True,
    ),
    Part("codec decoder", 50_000_000, False, None, cached_as="latents", saved=True),
)
TEXT = Part("text encoder", 100_000_000, False, Flops(100 * 10**9), peak_per_image=2**20, cached_as="text")
LEARNED = Part("text encoder", 100_000_000, True, Flops(100 * 10**9, 200 * 10**9))
MODEL = Model((DENOISER, *CODEC, TEXT))
LEARNS_TO_READ = Model((DENOISER, *CODEC, LEARNED))


@pytest.fixture(scope="module")
def config():
    found, _ = planned_run(
        ["stage=ldm", "data=shards", "resolution=256", "cluster=a100x8", "data.num_workers=8"], None
    )
    trainer = dataclasses.replace(
        found.trainer,
        batch_size=40,
        devices=8,
        num_nodes=1,
        num_images=3_200_000,
        precision="bf16-mixed",
    )
    return dataclasses.replace(found, trainer=trainer)


TRAINED = Trained(250_000_000, 0, 0, 0, 500_000_000, 400_000_000, 2 * 10**6)
SENT = traffic(TRAINED, "ddp", CLUSTER)


def test_a_ring_sends_all_but_one_part_twice():
    """31/32 of 1 GB twice, at 10 GB/s."""
    assert sent_s(SENT, CLUSTER) == pytest.approx(2 * 31 / 32 / 10)
    alone = dataclasses.replace(CLUSTER, nodes=1)
    assert sent_s(traffic(TRAINED, "ddp", alone), alone) == 0


def test_time_and_money():
    """10 pictures per GPU at 0.04 s; the all-reduce hides behind the backward pass."""
    planned = speed(WORK, CLUSTER, 0.5, SENT)
    assert planned.compute_s == pytest.approx(0.4)
    assert planned.exposed_s == 0
    assert planned.images_per_second == pytest.approx(800) == planned.ideal_images_per_second
    assert planned.days == pytest.approx(4_000 / 86_400)
    assert planned.gpu_hours == pytest.approx(4_000 * 32 / 3_600)
    assert planned.usd == pytest.approx(2 * planned.gpu_hours)


def test_communication_is_waited_for_once_the_backward_pass_is_over():
    """At 4 pictures per GPU that pass takes 0.08 s and the all-reduce nearly 0.2 s."""
    planned = speed(dataclasses.replace(WORK, global_batch=128), CLUSTER, 0.5, SENT)
    assert planned.exposed_s == pytest.approx(2 * 31 / 320 - 0.08)
    assert planned.images_per_second == pytest.approx(128 / (0.16 + planned.exposed_s))


def test_the_global_batch_stays_whatever_the_cluster(config):
    plans = sweep(config, MODEL, CLUSTER, Assumptions(), [1, 4])
    assert [plan.work.global_batch for plan in plans] == [320, 320]
    assert [plan.images_per_gpu for plan in plans] == [40, 10]
    assert [plan.cluster.num_gpus for plan in plans] == [8, 32]


def test_activations_are_those_of_a_micro_batch(config):
    """The step takes as long; what is kept for the backward pass, and frozen networks at work, are of one part."""
    in_parts = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, micro_batches=4))
    smaller = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, batch_size=10))
    plan, whole, small = (make_plan(c, MODEL, CLUSTER, Assumptions()) for c in (in_parts, config, smaller))
    assert (plan.images_per_gpu, plan.images_at_a_time) == (whole.images_per_gpu, small.images_per_gpu)
    assert plan.speed == whole.speed
    for way, memory in plan.memory.items():  # FSDP adds up whole gradients until the last part
        gradients = small.memory[way].gradients if way[0] == "ddp" else 4 * 250_000_000
        assert memory == dataclasses.replace(small.memory[way], gradients=gradients) != whole.memory[way]
    console = Console(width=200, file=io.StringIO())
    console.print(memory_table(plan))
    assert "GiB with 10 pictures per GPU, 3 at a time" in console.file.getvalue()


def test_checkpointed_activations_take_less_memory_and_a_forward_pass_more(config):
    trainer = dataclasses.replace(config.trainer, activation_checkpointing=True)
    again, once = (
        make_plan(c, MODEL, CLUSTER, Assumptions())
        for c in (dataclasses.replace(config, trainer=trainer), config)
    )
    more = again.speed.compute_s / once.speed.compute_s
    assert more == pytest.approx(1 + once.work.forward_flops / once.work.flops)
    assert (again.work.flops, again.mfu) == (once.work.flops, once.mfu)
    small = dataclasses.replace(CLUSTER, nodes=1, memory_gib=24.0)
    plain, checkpointed = (
        warned(dataclasses.replace(config, trainer=t), small) for t in (config.trainer, trainer)
    )
    assert "DDP does not fit" in plain
    assert "does not fit" not in checkpointed


def test_a_global_batch_needs_no_arithmetic(config):
    """Parts follow from the pictures that a GPU takes at a time, whatever the cluster."""
    trainer = dataclasses.replace(config.trainer, batch_size=10, global_batch_size=320)
    plan, more = sweep(dataclasses.replace(config, trainer=trainer), MODEL, CLUSTER, Assumptions(), [1, 8])
    assert (plan.work.global_batch, plan.images_per_gpu, plan.images_at_a_time) == (320, 40, 10)
    assert (more.work.global_batch, more.images_per_gpu, more.images_at_a_time) == (320, 5, 5)


def test_cached_encoders_cost_no_time_and_no_memory_but_that_of_what_is_saved(config):
    online = make_plan(config, MODEL, CLUSTER, Assumptions())
    cached = make_plan(config, MODEL, CLUSTER, Assumptions(cached=frozenset({"latents", "text"})))
    assert online.work.flops - cached.work.flops == 500 * 10**9
    assert cached.speed.days < online.speed.days
    assert cached.memory["ddp", False].frozen == 4 * sum(part.parameters for part in CODEC)
    assert cached.memory["ddp", False].encoding == 0


def test_features_of_captions_that_are_kept_take_memory_of_the_host(config):
    """Each process, one per GPU, keeps what `CachedTextEncoder` keeps at most; none where they are read or learned."""
    node = CLUSTER.gpus_per_node * MAX_BYTES
    online = make_plan(config, MODEL, CLUSTER, Assumptions())
    assert online.text_bytes_per_node == node == 8 * 2 * 2**30
    assert make_plan(config, MODEL, CLUSTER, Assumptions(cached=frozenset({"text"}))).text_bytes_per_node == 0
    assert make_plan(config, LEARNS_TO_READ, CLUSTER, Assumptions()).text_bytes_per_node == 0
    console = Console(width=160, file=io.StringIO())
    console.print(run_table(online, config))
    assert "up to 16 GiB per node for features of captions" in console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "units", "said"),
    [
        (0, TIME, "0 s"),
        (1.7e-5, TIME, "17.0 µs"),
        (0.01234, TIME, "12.3 ms"),
        (0.338, TIME, "0.338 s"),
        (59, TIME, "0.983 min"),
        (80_000, TIME, "0.926 days"),
        (86_400_000, TIME, "1,000 days"),
        (1e-9, TIME, "0.00100 µs"),
        (24_200, BYTES, "24.2 kB"),
        (11.77e12, BYTES, "11.8 TB"),
    ],
)
def test_units_are_those_that_fit(value, units, said):
    assert measure(value, units) == said


def test_a_tiny_run_takes_some_time_and_money(config):
    tiny = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, num_images=320))
    plan, console = (
        make_plan(tiny, MODEL, CLUSTER, Assumptions()),
        Console(width=160, file=io.StringIO()),
    )
    console.print(run_table(plan, tiny))
    console.print(sweep_table([plan]))
    text = console.file.getvalue()
    assert "0.400 s" in text  # 1 step of 320 pictures at 800 a second
    assert "<0.01" in text
    assert "0.00 " not in text


def test_no_digit_is_cut_off_where_the_terminal_is_narrow():
    console = Console(width=12, file=io.StringIO(), soft_wrap=True)
    console.print(table(("one two", "USD"), [("a sweep", "124,727,000"), ("longest-word", "9")]))
    assert {"one", "two", "USD", "124,727,000", "longest-word"} <= set(console.file.getvalue().split())


def test_files(config):
    """float32: weights, two moments, the average, and the codec; without optimizer; averaged, with text encoder."""
    files = make_plan(config, MODEL, CLUSTER, Assumptions()).checkpoints
    assert files.training == 4 * (4 * 250_000_000 + 80_000_000)
    assert files.weights == 4 * (250_000_000 + 80_000_000)
    assert files.export == 4 * (250_000_000 + 80_000_000 + 100_000_000)


def test_data(config):
    plan = make_plan(config, MODEL, CLUSTER, Assumptions(bytes_per_pixel=0.5))
    assert plan.total_bytes == 3_200_000 * 256 * 256 / 2
    assert plan.bytes_per_second_per_node == pytest.approx(200 * 256 * 256 / 2)


def warned(config, cluster=CLUSTER, assumed=None, model=MODEL) -> str:
    return " ".join(make_plan(config, model, cluster, assumed or Assumptions()).warnings)


def test_a_good_plan_warns_of_nothing(config):
    assert warned(config) == ""


def test_batches_that_do_not_divide(config):
    said = warned(config, dataclasses.replace(CLUSTER, nodes=3))
    for word in ("320", "24 GPUs", "20 or 32 GPUs", "336"):
        assert word in said


def test_more_gpus_than_pictures(config):
    small = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, batch_size=1))
    assert "of 8 does not divide over 32 GPUs; 8 GPUs would do" in warned(small)


def test_what_does_not_fit(config):
    """40 GiB of activations and 4.5 GB of state, with 0.9 * 24 GiB usable."""
    said = warned(config, dataclasses.replace(CLUSTER, nodes=1, memory_gib=24.0))
    for word in (
        "DDP does not fit",
        "21.6",
        "40.0 of them for activations",
        "DDP with checkpointing",
        "GPUs or more)",
    ):
        assert word in said
    assert "FSDP full_shard," not in said  # the activations are not sharded
    at_most = int(said.partition("at most ")[2].split()[0])
    fitting = dataclasses.replace(CLUSTER, nodes=math.ceil(320 / at_most / 8), memory_gib=24.0)
    assert "does not fit" not in warned(config, fitting)


def test_nothing_fits(config):
    assert "nothing planned here fits" in warned(config, dataclasses.replace(CLUSTER, memory_gib=0.5))


def test_loaders_that_cannot_keep_up(config):
    slow = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
    assumed = Assumptions(images_per_second_per_core=20.0)  # 8 processes: 160 images/s, and 200 are needed
    said = warned(slow, assumed=assumed)
    for word in ("160 images/s", "200", "raise data.num_workers"):
        assert word in said
    said = warned(config, assumed=Assumptions(images_per_second_per_core=5.0))  # all 32 cores at work
    assert "cache latents" in said
    assert warned(config, assumed=assumed) == ""


def test_precision_of_the_peak(config):
    exact = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision="32-true"))
    assert "--mfu" in warned(exact)


def test_a_text_encoder_that_learns_cannot_be_cached(config):
    with pytest.raises(ConfigError, match=r"--cached.*trained"):
        make_plan(config, LEARNS_TO_READ, CLUSTER, Assumptions(cached=frozenset({"text"})))


def test_a_text_encoder_that_learns_is_work_of_the_backward_pass(config):
    work = make_plan(config, LEARNS_TO_READ, CLUSTER, Assumptions()).work
    assert (work.forward_flops, work.backward_flops) == (600 * 10**9, 1_200 * 10**9)
    assert work.encoder_flops == 400 * 10**9


def test_the_picture_of_a_sweep(config, tmp_path):
    from PIL import Image

    plans = sweep(config, MODEL, CLUSTER, Assumptions(), [1, 2, 8])
    draw_scaling([plan.speed for plan in plans], "title", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (900, 380)
        assert len(picture.convert("RGB").getcolors(10**6)) > 10  # lines, not an empty page


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nodes", 0),
        ("gpus_per_node", 0),
        ("cpu_cores_per_node", 0),
        ("peak_bf16_tflops", 0.0),
        ("memory_gib", math.inf),
        ("node_bandwidth_gbps", -1.0),
        ("usd_per_gpu_hour", -1.0),
        ("mfu", 1.5),
        ("mfu", math.nan),
    ],
)
def test_impossible_clusters(key, value):
    with pytest.raises(ConfigError, match=rf"cluster\.{key} is .*allowed"):
        dataclasses.replace(CLUSTER, **{key: value})
