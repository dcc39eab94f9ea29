"""KL and VQ autoencoders on real captioned shards, before and after the discriminator joins.

    .venv/bin/python benchmarks/autoencoder.py ../shared/data/clipart ../shared/data/emoji

Holds 500 pictures out, trains each codec on the rest with `t2i train`, and prints PSNR, the distance between
EfficientNet-Lite0 features (the `efficientnet_lite0` perceptual distance, not LPIPS) and the codebook's use, on the
held-out pictures. Writes one grid per codec: originals, before, after.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.reader import read_all
from t2i.families.autoencoder.codec import Codec, DiscreteCodec, from_checkpoint
from t2i.nn.perceptual import build_perceptual
from t2i.training.checkpoint import load, load_into
from t2i.training.pictures import grid, save_png
from t2i.training.run_folder import checkpoints

NUM_HELDOUT = 500
SIZE_PX = 64


def split(sources: list[Path], folder: Path) -> None:
    """train.tar and heldout.tar, of the samples of all shards in `sources`."""
    members: dict[tuple[str, str], list[tuple[tarfile.TarFile, tarfile.TarInfo]]] = defaultdict(list)
    for source in sources:
        for path in sorted(source.glob("*.tar")):
            archive = tarfile.open(path)  # noqa: SIM115
            for member in archive:
                members[source.name, member.name.split(".")[0]].append((archive, member))
    keys = sorted(members)
    heldout = set(random.Random(0).sample(keys, NUM_HELDOUT))
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("heldout", heldout), ("train", set(keys) - heldout)):
        with tarfile.open(folder / f"{name}.tar", "w") as written:
            for key in sorted(chosen):
                for archive, member in members[key]:
                    content = archive.extractfile(member)
                    member.name = f"{key[0]}-{member.name}"
                    written.addfile(member, content)
        print(f"{name}: {len(chosen)} pictures")


def codec_at(path: Path) -> Codec:
    """The codec in a checkpoint."""
    loaded = load(path)
    codec = from_checkpoint(loaded.config).eval()
    load_into(codec, loaded.weights, path, prefix="codec.")
    return codec


@torch.no_grad()
def measure(codec: Codec, images: Tensor) -> tuple[Tensor, str]:
    """Reconstructions, and a row of the table."""
    distance = build_perceptual("efficientnet_lite0")
    assert distance is not None
    decoded = torch.cat([codec.reconstruct(part).image.clamp(-1, 1) for part in images.split(50)])
    mse = (decoded - images).square().flatten(1).mean(1)
    psnr = (10 * torch.log10(4 / mse.clamp_min(1e-8))).mean()
    far = torch.cat([distance(a, b) for a, b in zip(decoded.split(50), images.split(50), strict=True)]).mean()
    usage = "-"
    if isinstance(codec, DiscreteCodec):
        latents = [codec.quant_conv(codec.encoder(part)) for part in images.split(50)]
        used = torch.cat([codec.codebook(latent).indices.flatten() for latent in latents]).unique()
        usage = f"{len(used) / codec.num_codes:.1%}"
    return decoded, f"{psnr:.2f} dB | {far:.4f} | {usage}"


def main() -> None:
    """Splits, trains, measures, prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Path, help="folders of shards")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_autoencoder"))
    parser.add_argument("--images", type=int, default=24_000, help="pictures seen by each codec")
    options = parser.parse_args()
    split(options.sources, options.out)
    data = DataConfig(
        source=None,
        shards=[str(options.out / "heldout.tar")],
        caption_keys=["txt", "json:caption"],
        filter_by_size=False,
        num_workers=0,
        cache_mib=0,
    )
    images = read_all(data, [str(options.out / "heldout.tar")], SIZE_PX).image
    half = options.images // 2
    rows = []
    for codec in ("kl", "vq"):
        command = [str(Path(sys.executable).with_name("t2i")), "train", "stage=autoencoder", f"codec={codec}"]
        command += ["data=shards", f"data.shards={options.out}/train.tar", "data.filter_by_size=false"]
        command += [f"runs_dir={options.out}", f"name={codec}", "data.cache_mib=1024", "data.num_workers=0"]
        command += [f"adversarial.start_images={half}", f"trainer.num_images={options.images}"]
        command += [f"trainer.checkpoint_every_images={half}", "trainer.keep_checkpoints=3"]
        subprocess.run(command, check=True)
        saved = checkpoints(options.out / "autoencoder" / codec)
        before, row_before = measure(codec_at(saved[0]), images)
        after, row_after = measure(codec_at(saved[-1]), images)
        rows += [f"| {codec}, before the GAN | {row_before} |", f"| {codec}, after | {row_after} |"]
        save_png(grid(torch.cat([images[:16], before[:16], after[:16]]), 16), options.out / f"{codec}.png")
    print("| codec | PSNR | feature distance | codes used |\n|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
