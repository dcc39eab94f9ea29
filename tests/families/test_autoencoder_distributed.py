"""Two processes give what one gives: codebook, adaptive weight and the single backward pass under DDP."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from t2i.codes.fsq import FSQ
from t2i.codes.lfq import LFQ
from t2i.codes.quantizer import Quantizer
from t2i.codes.vq import Codebook
from t2i.families.autoencoder.discriminator import PatchDiscriminator
from t2i.families.autoencoder.losses import adaptive_weight, gan_losses


class TinyGan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 3, 3, padding=1)
        self.discriminator = PatchDiscriminator(base_channels=4, num_layers=2)

    def forward(self, image):
        fake = self.last(self.first(image).tanh())
        gan = gan_losses(self.discriminator, image, fake)
        reconstruction = (fake - image).abs().mean()
        weight = adaptive_weight(reconstruction, gan.generator, self.last.weight)
        return reconstruction + weight * gan.generator + gan.discriminator, weight


class Scaled(nn.Module):
    """The entropy of the mean over all pictures is no mean of that over each process's."""

    def __init__(self, codes: Quantizer) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, -0.2, 0.9]).view(3, 1, 1))
        self.codes = codes

    def forward(self, image):
        return self.codes(self.scale * image + 0.1).loss


def entropy_gradient(codes: Quantizer, image: torch.Tensor, world: int) -> torch.Tensor:
    scaled = Scaled(codes).double()
    together = nn.parallel.DistributedDataParallel(scaled) if world > 1 else scaled
    together(image).backward()
    return scaled.scale.grad


def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    images[2:] *= 3  # the ranks' halves differ, and so would their own adaptive weights
    return images, torch.randn(6, 4, 3, 4, 4, generator=generator, dtype=torch.float64)


def run(rank: int, world: int) -> dict:
    images, latents = data()
    mine = slice(rank * len(images) // world, (rank + 1) * len(images) // world)
    torch.manual_seed(0)
    gan = TinyGan().double()
    module = nn.parallel.DistributedDataParallel(gan) if world > 1 else gan
    loss, weight = module(images[mine])
    loss.backward()
    signs = entropy_gradient(LFQ(8, entropy_temperature=2.0), images[mine], world)
    of_codes = Codebook(8, 3, entropy_weight=0.1, entropy_temperature=2.0, restart_below=1e-9)
    of_codes.cluster_size.fill_(1.0)
    nearest = entropy_gradient(of_codes, images[mine], world)
    torch.manual_seed(rank)  # the codebooks start unequal: the first batch must make them equal
    book = Codebook(8, 3, restart_below=0.5, ema_decay=0.8).double()
    history = []
    for step, z in enumerate(latents):
        if step == 1:  # from here on both worlds have the same codes
            book.codes.copy_(torch.linspace(-2, 2, 24).view(8, 3))
            book.cluster_size.fill_(8.0)
            book.cluster_sum.copy_(8.0 * book.codes)
            book.restart_below = 1e-9
        if step == 4:
            book.restart_below = 0.5
        result = book(z[rank::world])  # as the stream deals pictures out
        scalars = FSQ([4, 3, 5])(z[rank::world])
        uses = (result.perplexity, result.usage, scalars.perplexity, scalars.usage)
        history.append((book.codes.clone(), *uses))
    return {
        "grads": {name: p.grad for name, p in gan.named_parameters()},
        "signs": signs,
        "nearest": nearest,
        "weight": weight,
        "history": history,
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(run(rank, 2), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = run(0, 1)
    assert first["weight"] == second["weight"]
    torch.testing.assert_close(first["weight"], alone["weight"])
    for name, grad in alone["grads"].items():
        torch.testing.assert_close(first["grads"][name], grad, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(first["grads"][name], second["grads"][name])
    for name in ("signs", "nearest"):
        torch.testing.assert_close(first[name], alone[name], rtol=1e-9, atol=1e-12)
    for (codes, *_), (twin, *_) in zip(first["history"], second["history"], strict=True):
        assert torch.equal(codes, twin)  # restarts included
    for ours, theirs in zip(first["history"], alone["history"], strict=True):
        torch.testing.assert_close(ours, theirs)  # equal statistics and restarts: both halves are one batch
