"""What `t2i plan` says of drawing a picture: against closed forms, and against what drawing really calls."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from t2i import families
from t2i.codes.embedding import FromVectors
from t2i.families.autoregressive.drawing import draw_codes
from t2i.interfaces import TextFeatures
from t2i.planning.config import ClusterConfig
from t2i.planning.count import num_parameters
from t2i.planning.drawing import Calls, counted_calls

CLUSTER = ClusterConfig("X", 100.0, 80.0, 1, 1, 1.0, 1.0, 1, 0.5, memory_gb_per_s=1000.0)


@pytest.fixture
def planned(compose_run):
    """(experiment, overrides) -> the run and its planned networks by name, over a codec of 16 codes and f4."""

    def planned(experiment: str, *overrides: str):
        from t2i_cli.composition import composed_run

        config = compose_run(f"experiment={experiment}", *overrides)
        codec = composed_run(["experiment=autoencoder/tiny_vq", "codec.num_codes=16"], None)
        found = families.get(config.family).load_plan()(config, {"codec": codec})
        return config.model, {network.name: network for network in found}

    return planned


def from_vectors(dim: int) -> int:
    """FLOPs of what all 16 codes' 4 numbers in the codebook give."""
    return 2 * 16 * (4 + dim) * dim


@pytest.mark.parametrize(
    ("guidance", "conditioning", "low"),
    [(1.0, "prefix", 0), (3.0, "prefix", 0), (3.0, "cross", 0), (1.0, "prefix", 4)],
)
def test_autoregressive_drawing(planned, guidance, conditioning, low):
    """One call for the text, `low` codes at a lower resolution and the start, then with a cache one for each code but
    the last."""
    overrides = [f"sampling.guidance_scale={guidance}", f"transformer.conditioning={conditioning}"]
    if low:
        overrides += ["stage=ar_sr", "low.num_codes=16", "low.side=2"]
    model, networks = planned("autoregressive/tiny_ar", "resolution.size_px=16", *overrides)
    network = networks["transformer"]
    transformer, rows, cross = network.module, 1 if guidance == 1 else 2, conditioning == "cross"
    first, following = counted_calls(network)
    shape, (height, width) = model.transformer, transformer.grid
    words, steps, text_dim = model.text.max_tokens, height * width, network.inputs(1)["tokens"].shape[2]
    depth, dim = shape.depth, shape.width
    own = depth * (4 + 2 * shape.mlp_ratio + 2 * cross) * dim**2  # weights that each slot goes through
    of_text = 2 * depth * text_dim * dim if cross else text_dim * dim
    head, pairs = 16 * dim, 4 * depth * dim  # pairs: both products of attention
    slots = (1 if cross else words + 1) + low
    context = words * cross
    prefill = 2 * (slots * own + words * of_text + head) + pairs * slots * (slots + context)
    vectors = 2 * from_vectors(dim)  # on the way in and out, once for all
    assert (first.count, first.flops) == (1, (rows * prefill + vectors,) * 2)
    each = [2 * (own + head) + pairs * (slots + i + context) for i in range(1, steps)]
    assert (following.count, following.flops) == (steps - 1, (rows * each[0], rows * each[-1]))
    assert following.total_flops == rows * sum(each)
    # The keys and values of the text, the start and all codes but the last, in 16 bits.
    assert following.cache_bytes == 2 * 2 * depth * rows * (words + low + 1 + steps - 1) * dim
    # Drawing calls nothing else of the transformer.
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        seen = torch.ones(1, words, dtype=torch.bool)
        text = TextFeatures(torch.empty(1, words, text_dim), torch.empty(1, 8), seen)
        codes = torch.zeros(1, 2, 2, dtype=torch.int64) if low else None
        negative, drawn = text if rows == 2 else None, [torch.Generator()]
        draw_codes(transformer, text, negative, (height, width), drawn, model.sampling, low=codes)
    assert counter.get_total_flops() == first.total_flops + following.total_flops


def test_masked_drawing(planned):
    """All codes in each of so many steps, with and without the prompt; what is made of the text, and the codes' tables,
    in the first one."""
    model, networks = planned("masked/tiny_masked", "sampling.steps=7", "sampling.guidance_scale=2.5")
    first, following = counted_calls(networks["transformer"])
    transformer, config = networks["transformer"].module, model.transformer
    layers = []
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, _, out: layers.append(2 * m.in_features * out.numel()))
    with torch.device("meta"), torch.no_grad():
        given = networks["transformer"].inputs(2)
        transformer(**given)
    codes, words = given["tokens"][0].numel(), model.text.max_tokens
    pairs = 4 * 2 * config.depth * config.width * codes * (codes + words)
    kept = 2 * 2 * words * config.width * config.depth  # keys and values
    of_text = 2 * 2 * words * given["context"].shape[2] * config.width + 2 * kept * config.width
    vectors = 2 * from_vectors(config.width)
    assert (first.count, following.count) == (1, 6)
    assert first.flops[0] == first.flops[1] == sum(layers) + pairs + vectors
    assert following.flops[0] == following.flops[1] == sum(layers) + pairs - of_text
    assert (first.cache_bytes, following.cached, following.cache_bytes) == (0, (kept, kept), 2 * kept)
    only_first = [transformer.text, *(m for m in transformer.modules() if isinstance(m, FromVectors))]
    for block in transformer.blocks:
        attention = block.cross_attention
        only_first += [attention.to_k, attention.to_v, attention.norm_k]
    assert first.weights == num_parameters(transformer)
    assert following.weights == num_parameters(transformer) - num_parameters(*only_first)
    (decoder,) = counted_calls(networks["codec decoder"])
    (text,) = counted_calls(networks["text encoder"])
    assert (decoder.count, text.count) == (1, 1)


def test_seconds_by_hand():
    """100 TFLOP/s and 1,000 GB/s: the first calls wait for memory, the last ones for arithmetic."""
    calls = Calls("x", count=3, weights=10**9, flops=(10**11, 5 * 10**11), cached=(0, 10**9))
    assert calls.total_flops == 9 * 10**11
    assert calls.seconds(CLUSTER) == pytest.approx(2e-3 + 3e-3 + 5e-3)
    arithmetic = dataclasses.replace(CLUSTER, memory_gb_per_s=None)
    assert calls.seconds(arithmetic) == pytest.approx(9e-3)


@pytest.mark.slow
def test_parti_waits_for_memory_and_muse_for_arithmetic(compose_run):
    """On a TPU v4 (275 TFLOP/s, 1,200 GB/s), in closed form; published 6.4 and 0.5 s (2301.00704, table 3)."""
    from t2i_cli.composition import composed_run

    tpu = dataclasses.replace(CLUSTER, peak_bf16_tflops=275.0, memory_gb_per_s=1200.0)

    def calls(experiment: str, codec: str) -> list[Calls]:
        config = compose_run(f"experiment={experiment}", "data.shards=x.tar")
        values = composed_run([f"experiment=autoencoder/{codec}", "codec.num_codes=8192"], None)
        transformer = families.get(config.family).load_plan()(config, {"codec": values})[0]
        return counted_calls(transformer)

    _, following = calls("parti/3b", "vit_vqgan")
    weights = 36 * 14 * 2048**2 + 8192 * 2048  # self-attention 4, the other attention 2, the MLP 8
    cached = 2 * 36 * 2 * 2048 * (128 + 1 + 512.0)  # on average, for 1,024 codes and 128 words
    expected = 1023 * 2 * (weights + cached) / 1200e9
    assert following.seconds(tpu) == pytest.approx(expected, rel=2e-3)
    assert 0.5 < following.seconds(tpu) / 6.4 < 1

    muse = calls("muse/256", "vqgan_f16_1024")
    config = compose_run("experiment=muse/256", "data.shards=x.tar")
    layers, codes, words = config.model.transformer.depth, 256, config.model.text.max_tokens
    each = layers * codes * 14 * 2048**2 + codes * 8192 * 2048
    of_text = layers * words * 2 * 2048**2 + words * 4096 * 2048  # once
    pairs = 4 * layers * 2048 * codes * (codes + words)
    seconds = sum(each.seconds(tpu) for each in muse)
    assert seconds == pytest.approx(2 * (24 * (2 * each + pairs) + 2 * of_text) / 275e12, rel=2e-3)
    assert 0.5 < seconds / 0.5 < 1
