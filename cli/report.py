"""`t2i report`: the newest autoencoder and ldm runs as one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t2i.errors import UserError
from t2i.schema import check


def run(arguments: list[str]) -> None:
    """Finds the runs, draws, judges, writes."""
    parser = argparse.ArgumentParser(prog="t2i report", description="Gather the newest runs into one page.")
    parser.add_argument("--runs-dir", default="runs", help="where the runs are")
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="folder of report.html and report.json"
    )
    parser.add_argument("--checkpoint", metavar="RUN", help="the ldm run to report on; default: the newest")
    options = parser.parse_args(arguments)

    import torch
    from torch import Tensor

    from t2i import families
    from t2i.evaluation.report import write_report
    from t2i.interfaces import SampleRequest
    from t2i.training import checkpoint, run_folder

    from .console import console, draw_with_bar

    last = Path(options.checkpoint) if options.checkpoint else run_folder.newest_run(options.runs_dir, "ldm")
    if last is None:
        raise UserError(f"{options.runs_dir}/ldm holds no trained run to report on.")
    config = run_folder.read_config(last)
    check(config.get("stage") == "ldm", "--checkpoint", str(last), "a run of stage=ldm")
    runs = [last]
    while earlier := run_folder.read_config(runs[0])["init_from"]:
        runs.insert(0, Path(earlier))
    autoencoder = Path(config["builds_on"]["codec"])

    def reconstruct(folder: Path, images: Tensor) -> Tensor:
        loaded = checkpoint.load(run_folder.weights_file(folder))
        codec: Any = families.get(loaded.config["family"]).load_codec()(loaded.config).eval()
        checkpoint.load_into(codec, loaded.weights, loaded.path, prefix="codec.")
        with torch.inference_mode():
            return torch.cat([codec.decode(codec.encode(part)) for part in images.split(32)])

    def draw_prompts(folder: Path, prompts: list[str]) -> Tensor:
        loaded = checkpoint.load(run_folder.weights_file(folder))
        generator = families.get(loaded.config["family"]).load_generator()(loaded, None)
        request = SampleRequest.of_size(prompts, generator.default_size_px)
        console.print(f"Drawing {len(prompts)} prompts with {folder}")
        return draw_with_bar(generator, request, batch_size=64)

    page = write_report(Path(options.out), autoencoder, runs, reconstruct, draw_prompts)
    for line in (page.parent / "report.json").read_text().splitlines():
        console.print(line)
    console.print(f"The report is {page}")
