"""`t2i report`: runs that draw for prompts, of whatever family, on one page, side by side."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.few import plural
from t2i.schema import check

from .arguments import Parser
from .newest import newest_that_draws

if TYPE_CHECKING:
    from t2i.evaluation.runs import Origin


def run(arguments: list[str]) -> None:
    """Finds the runs, draws, judges, writes."""
    options = parser().parse_args(arguments)
    # Heavy imports only now: a wrong flag is reported at once.
    import torch
    from torch import Tensor

    from t2i import families
    from t2i.evaluation.comparison import NOT_THE_SAME, comparison, same_prompts
    from t2i.evaluation.report import Families, write_report
    from t2i.evaluation.runs import LEFT_OUT
    from t2i.interfaces import SampleRequest
    from t2i.training import checkpoint, run_folder

    from .console import console, draw_with_bar, print_table

    asked = origins(options.checkpoint or [newest_that_draws(options.runs_dir)])
    for one in (one for each in asked for one in each.ladder()):
        for place in one.left_out:
            console.print(f"{one.folder} began with or builds on {place}, {LEFT_OUT}.")

    def codec_of(folder: Path) -> tuple[Any, checkpoint.LoadedCheckpoint]:
        loaded = checkpoint.load(run_folder.weights_file(folder))
        return families.get(loaded.config["family"]).load_codec()(loaded.config).eval(), loaded

    def reconstruct(folder: Path, images: Tensor) -> Tensor:
        codec, loaded = codec_of(folder)
        checkpoint.load_into(codec, loaded.weights, loaded.path, prefix="codec.")
        with torch.inference_mode():
            return torch.cat([codec.decode(codec.encode(part)) for part in images.split(32)])

    def num_parameters(folder: Path) -> int:
        if folder in {one.codec for each in asked for one in each.ladder()}:
            return sum(parameter.numel() for parameter in codec_of(folder)[0].parameters())
        weights = checkpoint.load(run_folder.weights_file(folder)).weights
        return sum(value.numel() for name, value in weights.items() if is_trained(name))

    def draw(folder: Path, prompts: list[str]) -> Tensor:
        loaded = checkpoint.load(run_folder.weights_file(folder))
        generator = families.get(loaded.config["family"]).load_generator()(loaded, None)
        request = SampleRequest.of_size(prompts, generator.default_size_px)
        console.print(f"Drawing {plural(len(prompts), 'prompt')} with {folder}")
        return draw_with_bar(generator, request, batch_size=64)

    def commands(origin: Origin, prompt: str) -> list[str]:
        return next_commands(origin, prompt, asked, options.runs_dir)

    page = write_report(Path(options.out), asked, Families(draw, reconstruct, num_parameters, commands))
    figures = json.loads((page.parent / "report.json").read_text())
    brief = {key: value for key, value in figures.items() if key not in ("codecs", "runs")}
    for line in json.dumps(brief, indent=2).splitlines():
        console.print(line)
    print_table(comparison(figures["runs"]))
    if not same_prompts(figures["runs"]):
        console.print(NOT_THE_SAME)
    console.print(f"The report is {page}")


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="t2i report",
        description="What runs draw for held-out prompts, how often that is right, and how they compare.",
    )
    made.add_argument("--runs-dir", default="runs", help="where the newest run is looked for")
    made.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="folder of report.html and report.json"
    )
    made.add_argument(
        "--checkpoint",
        action="append",
        metavar="RUN",
        help="may be given several times, to compare runs of any stages; default: the newest run that draws",
    )
    return made


def origins(places: Iterable[str | Path]) -> list[Origin]:
    """The runs that were asked for, with what they continue and build on. Raises ConfigError for one that draws nothing
    for prompts, CheckpointError for what is no run folder."""
    from t2i import families
    from t2i.evaluation.runs import Origin
    from t2i.training import run_folder

    stages = families.stages_with("generator")
    spelled: dict[Path, Path] = {}  # one run under several names, such as latest, is one

    def once(folder: Path | None) -> Path | None:
        return None if folder is None else spelled.setdefault(folder.resolve(), folder)

    def origin(folder: Path, config: dict[str, Any]) -> Origin:
        record = families.get(config.get("family"))
        config = record.load_config().upgraded(config)
        built_on = config.get("builds_on") or {}
        place, low_place = (built_on.get(key) for key in ("codec", "low"))
        codec = once(run_folder.run_of(place)) if place else None
        began_with = config.get("init_from")
        continues, low = before(began_with), before(low_place)
        named = ((began_with, continues), (place, codec), (low_place, low))
        left_out = tuple(place for place, found in named if place and not found)
        return Origin(folder, continues, codec, left_out, low)

    def before(place: str | None) -> Origin | None:
        """A run that another continues or builds on; None for one that draws nothing, or has no held-out pictures."""
        folder = once(run_folder.run_of(place)) if place else None
        if folder is None:
            return None
        config = run_folder.read_config(folder)
        shown = config.get("stage") in stages and config["data"].get("heldout_shards")
        return origin(folder, config) if shown else None

    found: dict[Path, Origin] = {}
    for place in places:
        config = run_folder.read_config(Path(place))
        allowed = f"a run of stage {', '.join(stages)}"
        check(config.get("stage") in stages, "--checkpoint", str(place), allowed)
        folder = once(Path(place))
        assert folder is not None
        found.setdefault(folder, origin(folder, config))
    return list(found.values())


def is_trained(name: str) -> bool:
    """Whether a weight in a run's file is a parameter that the run trained: neither of what it builds on, a copy of the
    codebook's vectors included, nor what batch norm counts."""
    *modules, last = name.split(".")
    counted = last in ("running_mean", "running_var", "num_batches_tracked")
    copied = modules[-1:] == ["of_vectors"] and last == "vectors"
    return {"codec", "low"}.isdisjoint(modules) and not counted and not copied


def draws(name: str) -> bool:
    """The same, where what the run at a lower resolution trained counts too: no picture is drawn without it."""
    return is_trained(name.replace("model.low.", "model.", 1))


def next_commands(origin: Origin, prompt: str, asked: list[Origin], runs_dir: str) -> list[str]:
    """What to type after a report on this run."""
    from t2i import families
    from t2i.training import run_folder

    config = run_folder.read_config(origin.folder)
    stage = config["stage"]
    lines = [shlex.join(["t2i", "sample", "--checkpoint", str(origin.folder), "--prompt", prompt])]
    shown = {run_folder.read_config(one.folder)["stage"] for each in asked for one in each.ladder()}
    others = [each for each in families.stages_with("generator") if each not in shown]
    other, _ = run_folder.newest_finished(runs_dir, others)
    if other is not None:
        runs = [*(one.folder for one in asked), other]
        lines.append(
            shlex.join(["t2i", "report", *(word for run in runs for word in ("--checkpoint", str(run)))])
        )
    if (size := larger_size(config)) is not None:
        init_from, source = shlex.quote(f"init_from={origin.folder}"), config["data"]["source"]
        lines.append(f"t2i train stage={stage} resolution={size} {init_from} data={source}")
    earlier = (origin.codec, origin.low.folder if origin.low else None)
    before = [run_folder.read_config(folder)["stage"] for folder in earlier if folder is not None]
    own = "data=shards data.shards='path/to/{00000..00004}.tar'"
    return lines + [f"t2i train stage={each} {own}" for each in (*before, stage)]


def larger_size(saved: dict[str, Any]) -> int | None:
    """The next size at which the stage's own recipe goes on from runs at a lower one; None where there is none, and for
    a run on other data or of another recipe, whose command is not known."""
    import dataclasses

    from t2i import families
    from t2i.config import parse_run

    from .composition import composed_run
    from .train_help import groups

    stage, size = saved["stage"], saved["resolution"]["size_px"]
    sizes = [int(each) for each in groups()["resolution"]]
    larger = min((each for each in sizes if each > size), default=None)
    known = stage in groups()["stage"] and size in sizes
    if saved["data"].get("source") is None or not known or larger is None:
        return None
    config_class = families.get(saved["family"]).load_config()
    usual, own = (
        parse_run(values, config_class).model
        for values in (composed_run([f"stage={stage}", f"resolution={size}"]), saved)
    )
    names = {each.name for each in dataclasses.fields(config_class)} - {"builds_on", "sampling"}
    is_usual = all(getattr(usual, name) == getattr(own, name) for name in names)
    goes_on = composed_run([f"stage={stage}", f"resolution={larger}"])["init_from"] == "lower"
    return larger if is_usual and goes_on else None
