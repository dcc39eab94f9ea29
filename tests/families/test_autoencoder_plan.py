"""What a plan of an autoencoder counts against what a training step computes and keeps."""

from __future__ import annotations

import pytest
import torch
from codec_parts import LARGER, TINY, VQ, first_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from t2i import families
from t2i.families.autoencoder.codec import build_codec
from t2i.interfaces import Batch
from t2i.planning.model import Model, build_model
from t2i.planning.plan import checkpoints

BATCH = 2


class Counter(TorchDispatchMode):
    """FLOPs of all that is computed within this context. (torch's own cannot follow torch.autograd.grad.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def trained_for_real(config, start=None) -> float:
    """FLOPs per picture of a step's losses and gradients, once the discriminator learns."""
    stage = families.get(config.family).load_stage(config.stage)(config, start)
    stage.images_seen, size_px = 1_000_000, config.resolution.size_px
    batch = Batch(
        image=torch.rand(BATCH, 3, size_px, size_px, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        caption=[""] * BATCH,
        key=["a", "b"],
        original_size=torch.full((BATCH, 2), size_px),
        crop=torch.zeros(BATCH, 2, dtype=torch.int64),
        metadata=[{}] * BATCH,
        position=torch.arange(BATCH),
    )
    with Counter() as counter:
        stage.losses("codec", batch, stage.randomness(batch))["loss"].backward()
    return counter.total / BATCH


def total(model: Model) -> int:
    return sum(part.flops.total for part in model.parts)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adversarial.r1_weight=1.0"],
        ["adversarial.start_images=null"],
        ["adversarial.adaptive=false"],
    ],
)
@pytest.mark.parametrize("name", ["tiny_kl", "tiny_vq"])
def test_flops_of_a_step(name, overrides, compose_run):
    config = compose_run(f"experiment=autoencoder/{name}", *overrides)
    assert total(build_model(config, {})) == pytest.approx(trained_for_real(config), rel=0.03)


def test_a_codebook_that_is_drawn_from_is_counted(compose_run):
    """Its sums over all codes, and its parameters beside those of the encoder and the decoder."""
    arguments = ("codec=gumbel", "codec.num_codes=512", "backbone=patch", "adversarial.start_images=null")
    config = compose_run("stage=autoencoder", "data=shapes", 'resolution="32"', "perceptual=none", *arguments)
    model = build_model(config, {})
    assert [part.name for part in model.parts] == ["encoder", "codebook", "decoder"]
    assert total(model) == pytest.approx(trained_for_real(config), rel=0.03)
    assert sum(part.parameters for part in model.parts) == sum(
        p.numel() for p in build_codec(config.model).parameters()
    )


@pytest.mark.parametrize("part", [("trained=decoder",), LARGER])
def test_a_part_that_is_trained_alone(part, compose_run):
    config = compose_run(*TINY, *VQ, "adversarial.start_images=0", *part)
    model = build_model(config, {})
    assert total(model) == pytest.approx(trained_for_real(config, first_run(compose_run, *VQ)), rel=0.03)
    learns = {part.name: part.trained for part in model.parts}
    assert learns.pop(config.model.trained)
    assert learns.pop("discriminator")
    assert not any(learns[name] for name in learns if name != "decoder" or part == LARGER)


@pytest.mark.parametrize("start_images", ["null", "0"])
def test_flops_of_the_perceptual_network(start_images, compose_run):
    """It sees two pictures, and its backward pass goes on through one. The adaptive weight takes that once more, which
    a plan leaves out."""
    overrides = ("perceptual=efficientnet_lite0", f"adversarial.start_images={start_images}")
    config = compose_run("experiment=autoencoder/tiny_kl", *overrides)
    model = build_model(config, {})
    again = model.parts[-1].flops.backward if start_images == "0" else 0
    assert total(model) + again == pytest.approx(trained_for_real(config), rel=0.03)


def test_networks_of_the_published_autoencoder(compose_run):
    """Without VGG's weights, which are not read."""
    config = compose_run("experiment=autoencoder/kl_f8", "ema=sd", "perceptual.weights=nowhere.pth")
    model = build_model(config, {})
    counted = {part.name: (part.parameters, part.trained) for part in model.parts}
    assert counted == {
        "encoder": (34_163_664, True),
        "decoder": (49_490_199, True),
        "discriminator": (2_765_633, True),
        "perceptual network": (14_716_160, False),  # VGG16's convolutions (14,714,688) and LPIPS' heads
    }
    trained, codec = 34_163_664 + 49_490_199 + 2_765_633, 34_163_664 + 49_490_199
    assert model.trained().averaged == codec
    files = checkpoints(model)
    assert (files.training, files.weights) == (4 * (3 * trained + codec), 4 * codec)
    assert files.export == files.weights
