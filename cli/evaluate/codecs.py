"""Codecs that are measured: what they give back of real pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from t2i.few import plural

from .options import bar, statistics_of
from .runs import Measured, judge_of, reference_of

if TYPE_CHECKING:
    from t2i.evaluation.features import Extractor


def measure_codec(place: str, options: argparse.Namespace, extractors: Sequence[Extractor]) -> Measured:
    """rFID, PSNR, SSIM, with --lpips LPIPS, where there are codes their use, and where it can be told how many pictures
    still show what their captions say, over the reference's."""
    import dataclasses

    import torch

    from t2i import families
    from t2i.evaluation.attributes import Attributes
    from t2i.evaluation.distances import Manifolds
    from t2i.evaluation.measure import Figure, figures, mean_figure
    from t2i.evaluation.pictures import Item, Pictures, batches, stacked
    from t2i.evaluation.reconstruction import codebook_use, psnr, ssim
    from t2i.evaluation.statistics import collect
    from t2i.interfaces import TokenCodec
    from t2i.nn.perceptual import build_perceptual
    from t2i.training import checkpoint, run_folder
    from t2i.training.pictures import to_uint8

    from .options import device_of

    device = device_of(options)
    loaded = checkpoint.load(run_folder.weights_file(place))
    config = loaded.config
    codec = families.get(config.get("family")).load_codec()(config).eval()
    checkpoint.load_into(codec, loaded.weights, loaded.path, prefix="codec.")
    codec.to(device)
    lpips = build_perceptual("lpips_vgg", options.lpips) if options.lpips else None
    if lpips is not None:
        lpips.to(device)
    real = reference_of(options.reference, config, options.reference_count)
    known = statistics_of(real, extractors, options)
    values: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("PSNR in dB", "SSIM", *(["LPIPS"] if lpips is not None else []))
    }
    tokens = codec.tokens if isinstance(codec, TokenCodec) else None
    counts = torch.zeros(codec.num_codes if isinstance(codec, TokenCodec) else 0, dtype=torch.int64)

    def read() -> Iterator[Item]:
        for items in batches(real, options.batch_size):
            image = (stacked(items).float() / 127.5 - 1).to(device)
            decoded = codec.decode(codec.encode(image)).clamp(-1, 1)
            values["PSNR in dB"].append(psnr(image, decoded).cpu())
            values["SSIM"].append(ssim(image, decoded).cpu())
            if lpips is not None:
                values["LPIPS"].append(lpips(image, decoded).cpu())
            if tokens is not None:
                counts.add_(torch.bincount(tokens(image).flatten().cpu(), minlength=len(counts)))
            for item, picture in zip(items, to_uint8(decoded), strict=True):
                yield Item(picture, item.caption, item.metadata)

    first = next((item.metadata for item in real.read()), {})
    judge = judge_of(config, first, config["resolution"]["size_px"])
    attributes = Attributes(judge) if judge else None

    pictures = Pictures(str(place), real.count, real.size_px, "", read)
    with bar(f"pictures through {place}", real.count) as progress, torch.inference_mode():
        look = attributes.look if attributes else (lambda items: None)
        found = collect(pictures, extractors, options.batch_size, progress, look)
    made = [  # of what is new, or missing, nothing can be asked of pictures that are given back
        dataclasses.replace(figure, name=f"r{figure.name}")
        for extractor, features, statistics in zip(extractors, found, known, strict=True)
        for figure in figures(extractor, features, statistics, options.rounds)
        if figure.name not in Manifolds.__annotations__
    ]
    made += [mean_figure(name, torch.cat(parts), "pairs of pictures") for name, parts in values.items()]
    if tokens is not None:
        for name, value in zip(("codebook usage", "codebook perplexity"), codebook_use(counts), strict=True):
            made.append(Figure(name, value, None, len(found[0]), plural(len(counts), "code")))
    made += attributes.figures() if attributes else []
    about: dict[str, Any] = {
        "run": str(place),
        "type": config["family"],
        "size_px": config["resolution"]["size_px"],
        "parameters": sum(p.numel() for p in codec.parameters()),
        "reference": [each.about for each in known],
        "left_out": known[0].left_out,
    }
    return Measured(made, about)
