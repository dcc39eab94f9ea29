"""One train step of ours against the same step around diffusers' networks, on the same weights, by the processor's
time of one thread (which other jobs on the machine lengthen least), in turns.

    python benchmarks/train.py unet [--width 128] [--batch 4] [--latent 32] [--compiled]
    python benchmarks/train.py autoencoder [--width 128] [--batch 2] [--size 64]
    python benchmarks/train.py memory --width 320 --batch 16 --latent 64

unet: Stable Diffusion 1's UNet (width 320; 128 makes it 142 million parameters) against UNet2DConditionModel: forward
pass, squared error, backward pass, AdamW. Untuned: torch's default layout and AdamW; as they come: what `t2i train`
builds against diffusers' untuned; tuned alike: channels_last and fused AdamW for both; compiled: these, by
torch.compile, ours a block at a time as trainer.compile does, theirs whole.
autoencoder: the f8 KL autoencoder against AutoencoderKL with our losses and discriminator, each in our one backward
pass, and ours against theirs in latent-diffusion's order: the reconstruction is made anew for each of two turns.
memory: the most that activations and gradients of the UNet take at a time, counted on tensors that hold no data, with
activation checkpointing (theirs: enable_gradient_checkpointing) and without.
Before anything is timed, results and gradients are compared in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from train_step import built, run_config

from t2i.adversarial.losses import hinge_discriminator_loss, hinge_generator_loss
from t2i.config import to_dict
from t2i.families.autoencoder.codec import KLCodec, Reconstruction
from t2i.families.autoencoder.losses import adaptive_weight
from t2i.families.autoencoder.stage import Stage
from t2i.families.latent_diffusion.unet import UNet
from t2i.families.latent_diffusion.unet_config import UNetConfig
from t2i.interfaces import Batch
from t2i.interop.diffusers_config import write_codec, write_unet
from t2i.interop.diffusers_out import codec_attention_matrix
from t2i.interop.names import diffusers_codec, diffusers_unet
from t2i.nn.blocks import blocks_of
from t2i.planning.count import LiveBytes, pretended
from t2i.training.blocks import prepare

EXACT = 1e-9  # relative error that two orders of the same sums may have in float64
CONTEXT, TOKENS = 768, 77

Step = Callable[[], None]


def relative_error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    pairs = [(a.detach(), b.detach()) for a, b in zip(actual, expected, strict=True)]
    error = sum((a - b).square().sum() for a, b in pairs)
    return (error / sum(b.square().sum() for _, b in pairs)).sqrt().item()


def compare(ways: dict[str, Step], rounds: int) -> float:
    """Prints the median seconds of both ways' steps; -> the median over the rounds of the first's time by the second's.
    The first round, which makes the optimizer's state and compiles, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name in reversed(ways) if turn % 2 else ways:
            began = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - began)
    ours, theirs = (values[1:] for values in seconds.values())
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    said = ", ".join(f"{name} {statistics.median(values[1:]):.2f} s" for name, values in seconds.items())
    print(f"  {said}: {ratio:.2f}x (rounds {min(ours) / max(theirs):.2f} to {max(ours) / min(theirs):.2f})")
    return ratio


# The UNet.


def unet_config(width: int) -> UNetConfig:
    return UNetConfig(
        width, (1, 2, 4, 4), 2, (1, 2, 4), num_heads=8, context_dim=CONTEXT, use_linear_in_transformer=False
    )


def unets(width: int) -> tuple[UNet, nn.Module]:
    """Ours with the weights of theirs, of which none is zero throughout."""
    config = unet_config(width)
    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_config(write_unet(to_dict(config), 256, 8))
    with torch.device("meta"):
        ours = UNet(config)
    names = diffusers_unet(ours.state_dict(), config.num_res_blocks)
    weights = theirs.state_dict()
    ours.load_state_dict({name: weights[names[name]].clone() for name in names}, assign=True)
    return ours.train(), theirs.train()


def unet_batch(batch: int, latent: int) -> tuple[Tensor, ...]:
    """Noisy latents, times, text and what is to be predicted."""
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, batch, 4, latent, latent, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator).float()
    return x, t, torch.randn(batch, TOKENS, CONTEXT, generator=generator), target


def predicted(unet: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return unet(x, t, context) if isinstance(unet, UNet) else unet(x, t, context, return_dict=False)[0]


def unet_step(unet: nn.Module, given: tuple[Tensor, ...], tuned: bool) -> Step:
    """tuned: channels_last and fused AdamW"""
    if tuned:
        unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=tuned or None)
    x, t, context, target = given

    def step() -> None:
        optimizer.zero_grad()
        (predicted(unet, x, t, context) - target).square().mean().backward()
        optimizer.step()

    return step


def check_unets(width: int) -> None:
    ours, theirs = (unet.double() for unet in unets(width))
    x, t, context, target = (value.double() for value in unet_batch(1, 16))
    given = (x, t.float(), context)  # times as diffusers embeds them
    names = diffusers_unet(ours.state_dict(), ours.config.num_res_blocks)
    outs = [predicted(unet, *given) for unet in (ours, theirs)]
    for out in outs:
        (out - target).square().mean().backward()
    of_theirs = dict(theirs.named_parameters())
    pairs = [(p.grad, of_theirs[names[name]].grad) for name, p in ours.named_parameters()]
    errors = relative_error(outs[:1], outs[1:]), relative_error(*zip(*pairs, strict=True))
    assert max(errors) < EXACT, errors
    print(f"  float64: relative error of the result {errors[0]:.0e}, of the gradient {errors[1]:.0e}")


def compiled(unet: nn.Module) -> nn.Module:
    if isinstance(unet, UNet):
        prepare(blocks_of(unet), activation_checkpointing=False, compiled=True)
    else:
        unet.compile()
    return unet


def time_unets(options: argparse.Namespace) -> None:
    check_unets(options.width)
    given = unet_batch(options.batch, options.latent)
    # Which of the two are tuned, and whether they are compiled.
    kinds = {"untuned": (False, False), "as they come": (True, False), "tuned alike": (True, True)}
    for kind, tuned in kinds.items():
        print(kind)
        steps = (unet_step(unet, given, each) for unet, each in zip(unets(options.width), tuned, strict=True))
        compare(dict(zip(("t2i", "diffusers"), steps, strict=True)), options.rounds)
    if options.compiled:
        print("compiled")
        steps = (unet_step(compiled(unet), given, True) for unet in unets(options.width))
        compare(dict(zip(("t2i", "diffusers"), steps, strict=True)), options.rounds)


# The autoencoder.


class TheirCodec(nn.Module):
    """AutoencoderKL in the place of `KLCodec` in our stage."""

    logit_laplace = False

    def __init__(self, vae: AutoencoderKL, ours: KLCodec) -> None:
        super().__init__()
        self.vae, self.kl_weight, self.noise = vae, ours.kl_weight, ours.noise

    @property
    def last_layer(self) -> Tensor:
        return self.vae.decoder.conv_out.weight

    def reconstruct(self, image: Tensor, noise: Tensor, images_seen: int = 0) -> Reconstruction:
        posterior = self.vae.encode(image, return_dict=False)[0]
        kl = posterior.kl().mean() / image[0].numel()
        decoded = self.vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
        distance = (decoded - image).abs().mean()
        return Reconstruction(decoded, distance, self.kl_weight * kl, {"kl": kl.detach()})


def autoencoders(options: argparse.Namespace) -> tuple[Stage, Stage]:
    """Ours, and one with diffusers' network of the same weights in our stage."""
    shape = [f"backbone.base_channels={options.width}", f"resolution.size_px={options.size}"]
    config = run_config(
        ["stage=autoencoder", "backbone=ldm_f8", "adversarial.start_images=0", *shape], options.batch
    )
    ours, theirs = built(config), built(config)
    assert isinstance(ours, Stage)
    assert isinstance(theirs, Stage)
    codec = ours.codec
    assert isinstance(codec, KLCodec)
    entries = {key: to_dict(getattr(config.model, key)) for key in ("codec", "backbone")}
    vae = AutoencoderKL.from_config(write_codec(entries, 1.0, options.size))
    weights = {name: value.clone() for name, value in codec.state_dict().items() if name != "latent_scale"}
    names = diffusers_codec(weights, len(entries["backbone"]["channel_mult"]))
    matrices = {
        names[name]: value.flatten(1) if codec_attention_matrix(name) else value
        for name, value in weights.items()
    }
    vae.load_state_dict(matrices)
    theirs.codec = TheirCodec(vae, codec)  # type: ignore[assignment]
    return ours.train(), theirs.train()


def pictures(options: argparse.Namespace) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = 2 * torch.rand(options.batch, 3, options.size, options.size, generator=generator) - 1
    row = torch.zeros(options.batch, 2, dtype=torch.int64)
    names = [str(i) for i in range(options.batch)]
    position = torch.arange(options.batch)
    return Batch(image, names, names, row, row, [{}] * options.batch, position)


def one_pass(stage: Stage, batch: Batch) -> Step:
    """Both networks learn from one backward pass."""
    stage.to(memory_format=torch.channels_last)
    (turn,) = stage.turns()
    optimizer = turn.build_optimizer()

    def step() -> None:
        optimizer.zero_grad()
        stage.losses(turn.name, batch, stage.randomness(batch))["loss"].backward()
        optimizer.step()

    return step


def two_turns(stage: Stage, batch: Batch) -> Step:
    """latent-diffusion's `training_step`, called for each of two optimizers."""
    stage.to(memory_format=torch.channels_last)
    (turn,) = stage.turns()
    optimizers = [dataclasses.replace(turn, groups=[group]).build_optimizer() for group in turn.groups]
    discriminator, image, config = stage.discriminator, batch.image, stage.model_config
    assert discriminator is not None

    def reconstruction() -> Reconstruction:
        noise = stage.codec.noise(stage.randomness(batch), *image.shape[2:])
        return stage.codec.reconstruct(image, noise)

    def step() -> None:
        optimizers[0].zero_grad()
        made = reconstruction()
        fidelity = (made.image - image).abs().mean()
        for network in stage.perceptual:
            fidelity = fidelity + config.perceptual.weight * network(made.image, image).mean()
        adversarial = hinge_generator_loss(discriminator(made.image))
        weight = config.adversarial.weight * adaptive_weight(fidelity, adversarial, stage.codec.last_layer)
        (fidelity + made.regularizer + weight * adversarial).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        made = reconstruction()
        hinge_discriminator_loss(discriminator(image), discriminator(made.image.detach())).backward()
        optimizers[1].step()

    return step


def check_autoencoders(options: argparse.Namespace) -> None:
    stages = [stage.double() for stage in autoencoders(options)]
    for stage in stages:
        for network in stage.perceptual:
            network.double()
    batch = pictures(options).to("cpu", torch.float64)
    losses = [stage.losses("codec", batch, stage.randomness(batch))["loss"] for stage in stages]
    for loss in losses:
        loss.backward()
    # Of convolutions and norms; the sums over a network do not depend on what its weights are called.
    sums = [torch.stack([p.grad.square().sum() for p in stage.parameters()]).sum() for stage in stages]
    errors = relative_error(losses[:1], losses[1:]), relative_error(sums[:1], sums[1:])
    assert max(errors) < EXACT, errors
    print(f"  float64: relative error of the loss {errors[0]:.0e}, of the gradient's norm {errors[1]:.0e}")


def time_autoencoders(options: argparse.Namespace) -> None:
    check_autoencoders(options)
    batch = pictures(options)
    for name, theirs in (("the same step", one_pass), ("latent-diffusion's order", two_turns)):
        print(name)
        one, other = autoencoders(options)
        compare({"t2i": one_pass(one, batch), "diffusers": theirs(other, batch)}, options.rounds)


# Memory.


class OneStep(nn.Module):
    """A forward and a backward pass; bytes that they make, weights left out."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with LiveBytes([*self.parameters(), *self.buffers(), x, t, context]) as counted:
            loss = predicted(self.unet, x, t, context).square().mean()
            self.kept = counted.live
            loss.backward()
        self.peak = counted.peak
        return loss


def count_memory(options: argparse.Namespace) -> None:
    config = unet_config(options.width)
    shapes = (options.batch, 4, options.latent, options.latent), (options.batch, TOKENS, CONTEXT)
    for checkpointing in (False, True):
        print("with checkpointing" if checkpointing else "without checkpointing")
        with torch.device("meta"):
            ours = UNet(config)
            theirs = UNet2DConditionModel.from_config(write_unet(to_dict(config), 256, 8))
        if checkpointing:
            prepare(blocks_of(ours), activation_checkpointing=True, compiled=False)
            theirs.enable_gradient_checkpointing()
        peaks = []
        for name, unet in (("t2i", ours), ("diffusers", theirs)):
            step = OneStep(unet.train().to(memory_format=torch.channels_last))
            with pretended(step, "cpu") as state:
                given = torch.empty(shapes[0]), torch.empty(options.batch), torch.empty(shapes[1])
                torch.func.functional_call(step, state, given)
            print(
                f"  {name}: at most {step.peak / 2**20:,.0f} MiB, {step.kept / 2**20:,.0f} MiB after the forward pass"
            )
            peaks.append(step.peak)
        print(f"  {peaks[0] / peaks[1]:.3f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("unet", "autoencoder", "memory"))
    parser.add_argument("--width", type=int, default=128, help="channels of the first level")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--latent", type=int, default=32, help="side of the UNet's latents")
    parser.add_argument("--size", type=int, default=64, help="side of the autoencoder's pictures, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="time the compiled UNets too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"unet": time_unets, "autoencoder": time_autoencoders, "memory": count_memory}[options.what](options)


if __name__ == "__main__":
    main()
