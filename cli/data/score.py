"""`t2i data score`: aesthetic, watermark, NSFW and CLIP columns for shards that lack them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from t2i.few import first_few, plural
from t2i.schema import check_number

from ..arguments import Parser
from ..console import console, is_first_process, part_of, progress_bar


def run(arguments: list[str]) -> None:
    """Scores this process's part of the shards under a progress bar."""
    options = parser().parse_args(arguments)
    check_number("--batch-size", options.batch_size)
    import torch

    from t2i.data.sources import expand
    from t2i.launch.processes import own_device
    from t2i.launch.ranks import rank_of
    from t2i_pipelines.optional import need
    from t2i_pipelines.places import check_writable
    from t2i_pipelines.processes import cores
    from t2i_pipelines.scoring.score import SUFFIX, score_shards
    from t2i_pipelines.scoring.scorer import ScorerFiles, load_scorer

    need("pyarrow", "data")  # before anything is loaded
    urls, rank = list(dict.fromkeys(expand(options.shards, "SHARDS"))), rank_of(os.environ)
    if options.out is not None:
        check_writable(options.out / SUFFIX)
    device = own_device(rank)
    if device.type == "cuda":  # else each thread that prepares pictures would start threads of torch
        torch.set_num_threads(1)
    files = ScorerFiles(
        options.clip,
        options.clip_weights,
        options.aesthetic,
        options.nsfw,
        options.watermark,
        options.similarity,
    )
    scorer = load_scorer(files, device)
    for column, name in scorer.names.items():
        console.print(f"{column}: {name}")
    mine = len(urls[rank.rank :: rank.world])
    threads = max(1, cores() // rank.local_world)
    with progress_bar() as bar:
        task = bar.add_task("shards", total=mine)
        report = score_shards(
            urls,
            options.out,
            scorer,
            options.batch_size,
            threads,
            rank,
            lambda share: bar.advance(task, share),
        )
    part = part_of(rank)
    console.print(
        f"Scored {plural(report.samples, 'sample')} of {plural(report.scored, 'shard')} on {device}; "
        f"{report.skipped:,} of {plural(mine, 'shard')} had their scores{part}"
    )
    for cause, count in sorted(report.nulls.items()):
        _say(f"No score, {cause}: {count}{part}")
    for line in first_few([f"Unreadable shard {url}: {why}" for url, why in report.unreadable.items()]):
        _say(line)


def _say(line: str) -> None:
    """What went wrong is said by every process."""
    if is_first_process:
        console.print(line)
    else:
        print(line, file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="t2i data score",
        description="Scores from local weights, into 00000.scores.parquet beside each shard.",
    )
    made.add_argument("shards", nargs="+", help="paths or URLs, braces allowed: data/{00000..00009}.tar")
    made.add_argument(
        "--clip",
        help="folder of open_clip or transformers, or an architecture of open_clip. LAION's ViT-L/14 heads want "
        "OpenAI's weights: in open_clip that is ViT-L-14-quickgelu",
    )
    made.add_argument("--clip-weights", help="with an architecture: its .safetensors or .pt")
    made.add_argument(
        "--aesthetic", type=Path, help="sa_0_4_vit_l_14_linear.pth, sac+logos+ava1-l14-linearMSE.pth"
    )
    made.add_argument(
        "--nsfw",
        type=Path,
        help="clip_ViT-L-14_openai_binary_nsfw_head.pth, h14_nsfw.pth (not Keras' folders)",
    )
    made.add_argument("--watermark", type=Path, help="watermark_model_v1.pt; needs no --clip")
    made.add_argument("--similarity", action="store_true", help="of picture and caption, by --clip")
    made.add_argument("--out", type=Path, help="folder for the scores; without it, beside each shard")
    made.add_argument("--batch-size", type=int, default=64, help="pictures at a time")
    return made
