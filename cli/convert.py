"""`t2i convert`: published models in, trained models out."""

from __future__ import annotations

import argparse
from pathlib import Path

from t2i.schema import check

from .arguments import Parser


def run(arguments: list[str]) -> None:
    """Parses, checks, converts under a progress bar, and says what was assumed."""
    options = parser().parse_args(arguments)
    for name, given in {"SOURCE": options.source, "OUT": options.out}.items():
        check(given != "", name, given, "the name of a folder or of a file")
    # Heavy imports only now: a wrong flag is reported at once.
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    from t2i.interop.convert import Options, prepare, write

    from .console import console, progress_bar

    chosen = Options(options.to, options.dtype, options.ema, options.prediction, options.text, options.vae)
    conversion = prepare(Path(options.source), Path(options.out), chosen)
    console.print(f"Reading {options.source}: {conversion.parts.kind}")
    for note in conversion.parts.notes:
        console.print(note)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with progress_bar(*columns) as bar:
        task = bar.add_task("weights", total=conversion.num_bytes)
        write(conversion, lambda done: bar.advance(task, done))
    gigabytes = conversion.num_bytes / 1e9
    console.print(
        f"Wrote {options.out}: {conversion.to}, {conversion.dtype}, {gigabytes:.2f} GB of weights",
    )


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = Parser(
        prog="t2i convert",
        description="Convert a model. In: a diffusers directory (Stable Diffusion 1 and 2, LDM text-to-image, "
        "aMUSEd), a CompVis or Stability .ckpt or .safetensors, a VQGAN or GumbelVQ of taming-transformers, a "
        "ViT-VQGAN of enhancing-transformers, diffusers' AutoencoderKL or VQModel, DALL-E's discrete VAE (a folder "
        "with encoder.pt and decoder.pt), or a t2i run. Out: a t2i run, a diffusers directory (of DALL-E's "
        "discrete VAE one of transformers' FlavaImageCodebook and the decoder), or one .safetensors with CompVis' "
        "names (of a ViT-VQGAN those of enhancing-transformers).",
    )
    made.add_argument("source", metavar="SOURCE", help="folder or file")
    made.add_argument("out", metavar="OUT", help="a name that is free: a folder, or a .safetensors file")
    made.add_argument(
        "--to",
        choices=("t2i", "diffusers", "compvis"),
        help="default: compvis where OUT ends in .safetensors; else t2i for foreign sources, diffusers for t2i's own",
    )
    made.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of what is written")
    made.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take averaged weights where there are any (the default)",
    )
    made.add_argument(
        "--prediction",
        choices=("eps", "v"),
        help="what the UNet of a single file predicts, as the file does not say; default: eps",
    )
    made.add_argument(
        "--text",
        metavar="DIR|FILE",
        help="CLIP text model, where SOURCE has none, or a t2i run names one that is not here",
    )
    made.add_argument("--vae", metavar="DIR|FILE", help="autoencoder, where SOURCE has none, or in its place")
    return made
