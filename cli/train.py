"""`t2i train`: Hydra composes the arguments, t2i.config validates, t2i.training trains."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from t2i.errors import ConfigError, SaidByFirst, UserError
from t2i.few import first_few, plural
from t2i.launch import outcome
from t2i.launch.ranks import is_first, is_launched, rank_of
from t2i.schema import check

from . import hub
from .arguments import Parser, parse_with_overrides
from .composition import check_own_cluster, checked, explained, launched, quoted, sentence
from .train_help import help_text

if TYPE_CHECKING:
    from t2i.config import RunConfig
    from t2i.training.drawn import Measure

LAUNCH = ("local", "slurm")
COMPLETION = {"-sc", "--shell-completion"}
NUM_DRAWN = 128  # pictures that are drawn and measured at a time while training


def run(arguments: list[str]) -> None:
    """Composes and trains; `--cfg job`, `--multirun`, `--config-dir` and `-sc` are Hydra's own."""
    if {"-h", "--help"} & set(arguments):
        print(help_text(), end="")
        return
    rank_of(os.environ)  # Lightning reads the same numbers while it is imported, and would say less
    flags = Parser(prog="t2i train", add_help=False, allow_abbrev=False)
    flags.add_argument("--config-dir", "-cd", nargs="?")
    flags.add_argument("--multirun", "-m", action="store_true")
    flags.add_argument("--dry-run", action="store_true")
    own, _ = flags.parse_known_args(arguments)
    check_own_cluster(arguments, own.config_dir)
    arguments = flags_last([each for each in arguments if each != "--dry-run"])
    of_hydra = Parser(prog="t2i train", parents=[get_args_parser()], add_help=False)
    parse_with_overrides(of_hydra, arguments)  # Hydra itself would print all of its flags
    typed = sys.argv
    program = (
        "t2i" if COMPLETION & set(arguments) else "t2i train"
    )  # the shell completes one word's arguments
    # Hydra reads sys.argv. Lightning starts further processes by running sys.argv again, so that the task
    # puts back what was typed.
    words = [quoted(argument, sweep=own.multirun) for argument in arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving with 1
    failed: list[Exception] = []
    to_submit: list[tuple[RunConfig, dict[str, Any], list[str]]] = []

    def task(composed: DictConfig) -> None:
        sys.argv = typed
        try:
            overrides = list(HydraConfig.get().overrides.task)
            values, (launch, cluster) = checked(composed, overrides), launched(composed)
            check(launch in LAUNCH, "launch", launch, " or ".join(LAUNCH))
            check(launch == "slurm" or not own.dry_run, "launch", launch, "slurm, with --dry-run")
            if launch == "slurm" and not outcome.in_job():
                to_submit.append((typed_run(values), cluster, overrides))
            else:
                train(values, cluster)
        except OmegaConfBaseException as error:
            failed.append(ConfigError(sentence(error)))
        except Exception as error:  # raised below, apart from what Hydra itself raises
            failed.append(error)

    try:
        # Of a sweep Hydra writes a multirun.yaml: the run folders say all of it.
        with explained(own.config_dir), composed_once(), tempfile.TemporaryDirectory() as beside:
            sys.argv = [program, *([f"hydra.sweep.dir={beside}"] if own.multirun else []), *words]
            hydra.main(version_base="1.3", config_path="pkg://t2i_conf", config_name="train")(task)()
    except ValueError as error:
        if "Only one of" in str(error):
            allowed = "one of --run, --multirun, --cfg, --info and --shell-completion"
            raise ConfigError(f"{' '.join(arguments)}: allowed is {allowed}.") from error
        if "Config group override" in str(error):
            raise ConfigError(f"{' '.join(arguments)}: a choice is a name, not a number.") from error
        raise ConfigError(sentence(error)) from error
    finally:
        sys.argv = typed
    if len(failed) > 1 and all(
        type(error) is not SaidByFirst and isinstance(error, UserError) for error in failed
    ):
        raise UserError(f"{len(failed)} runs failed: {'; '.join(first_few(list(map(str, failed))))}")
    if failed:
        raise failed[0]
    if to_submit:
        from .submit import submit

        submit(to_submit, own.config_dir, own.dry_run)


@contextmanager
def composed_once() -> Iterator[None]:
    """Within this context Hydra composes each job of a sweep once. It composes all of them before it runs the first, so
    that a wrong one is met before anything is trained, and would compose each again when its turn comes."""
    compose, made = ConfigLoaderImpl.load_sweep_config, dict[tuple[str, ...], DictConfig]()

    def once(self: ConfigLoaderImpl, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        job = tuple(sweep_overrides)
        if job not in made:
            made[job] = compose(self, master_config, sweep_overrides)
        return copy.deepcopy(made[job])  # what runs is changed by Hydra

    ConfigLoaderImpl.load_sweep_config = once  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_sweep_config = compose  # type: ignore[method-assign]


def flags_last(arguments: list[str]) -> list[str]:
    """Hydra's parser takes flags before or after all key=value, and not between them."""
    with_value = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
    with_value |= {"--config-dir", "-cd", "--experimental-rerun"}
    flags, overrides = list[str](), list[str]()
    for argument in arguments:
        before = flags[-1] if flags else ""
        is_value = before in with_value or (before in ("--info", "-i") and "=" not in argument)
        (flags if is_value or argument.startswith("-") else overrides).append(argument)
    return overrides + flags


def train(values: dict[str, Any], cluster: dict[str, Any]) -> None:
    """One run, on this machine or in the processes that were started for it, of the plain values that were composed.
    cluster: the machines, as composed; empty where they are not given"""
    from .embedded import with_embedded_data

    config = parsed_run(values)
    if config.resume is not None and not is_launched(os.environ):  # before data is made for it
        from t2i.training.run_folder import resumed

        resumed(config.runs_dir, config.stage, config.name, config.resume)
    config = with_embedded_data(config)
    if cluster:
        from .submit import cluster_of, on_cluster

        machines = cluster_of(cluster)
        allowed = "that of 1 node, launch=slurm, or torchrun or srun on all of them"
        alone = not is_launched(os.environ)
        check(machines.nodes == 1 or not alone, "cluster", f"that of {machines.nodes} nodes", allowed)
        config = on_cluster(config, machines)
    # Heavy imports only now: a wrong key is reported at once.
    import torch

    from t2i import families
    from t2i.training.fit import fit
    from t2i.training.loggers import sync_command

    from .console import console, say_what_is_logged

    say_what_is_logged()
    try:
        stage_class = families.get(config.family).load_stage(config.stage)
        result = fit(config, stage_class, console, mfu_per_rate(config), drawn_measure(config))
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory(config)) from error
    rate = f"{plural(result.images_seen, 'image')}, {result.seconds:.0f} s of training"
    if result.complete:
        console.print(f"Done: {result.folder} ({rate}).")
    else:
        console.print(
            f"Stopped and saved: {result.folder} ({rate}). To go on: the same command with resume=latest"
        )
        if is_first(os.environ):
            outcome.tell(outcome.STOPPED)
    if config.logger.wandb == "offline":
        console.print(f"To bring it to wandb: {sync_command(result.folder)}")


def drawn_measure(config: RunConfig) -> Measure | None:
    """Of trainer.evaluate_every_images: what is drawn while training, and measured. Raises ConfigError for a stage that
    draws nothing for prompts, and where nothing is held out."""
    every, key = config.trainer.evaluate_every_images, "trainer.evaluate_every_images"
    if not every:
        return None
    from t2i import families
    from t2i.data.reader import read_all
    from t2i.evaluation.drawn import DrawnFigures
    from t2i.training.drawn import Measure

    draws = families.get(config.family).generator is not None
    check(draws, key, every, f"0 for stage={config.stage}, which draws nothing for prompts")
    shards, data = config.data.heldout_shards, next(iter(config.data.parts().values()))
    check(bool(shards), key, every, "0 where data.heldout_shards is null")
    size = config.resolution.size_px
    heldout = read_all(data, shards, size, NUM_DRAWN, allow_pipes=True)
    check(
        len(heldout) >= 2,
        key,
        every,
        "0 where data.heldout_shards hold one picture, of which there is no distance",
    )
    return Measure(
        heldout, DrawnFigures(heldout, lambda: read_all(data, data.shards, size, allow_pipes=True))
    )


def mfu_per_rate(config: RunConfig) -> float | None:
    """Share of a GPU's peak FLOP/s that one picture per second on it means; None without a GPU whose peak is known, or
    where no plan counts the FLOPs."""
    import torch

    if not torch.cuda.is_available() or config.trainer.accelerator == "cpu" or not is_first(os.environ):
        return None
    from t2i.planning import peaks

    try:
        return peaks.mfu_per_rate(config, built_on(config), torch.cuda.get_device_name())
    except UserError:
        return None


def out_of_memory(config: RunConfig) -> str:
    """What the plan says of this batch on this GPU, and what would fit."""
    import torch

    from t2i.nn.precision import chosen
    from t2i.planning.fits import what_fits
    from t2i.planning.model import build_model

    precision = chosen(config.trainer.precision, torch.device("cuda"))
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision=precision))
    size, batch = config.resolution.size_px, config.trainer.batch_size
    total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    said = (
        f"The GPU's {total_bytes / 2**30:.1f} GiB are not enough for trainer.batch_size={batch} at {size} px with "
        f"trainer.precision={config.trainer.precision}"
    )
    try:
        model = build_model(config, built_on(config))
    except UserError:
        return f"{said}; try trainer.batch_size={max(1, batch // 2)}, or trainer.precision=bf16-mixed."
    return f"{said}; {what_fits(config, model, total_bytes)}"


def built_on(config: RunConfig) -> dict[str, Any]:
    """What this run builds on, as `t2i.families.family.Family.plan` takes it. Raises CheckpointError for a run that is
    not there."""
    from t2i import families
    from t2i.config import run_to_dict
    from t2i.families.codec_run import latest_codec, load_codec_run, low_run

    found: dict[str, Any] = {}
    places = run_to_dict(config).get("builds_on") or {}
    if (low := places.get("low")) is not None:
        _, _, found["low"] = low_run(config, low, None)
    for key in families.get(config.family).builds_on:
        if (place := places.get(key)) is None:
            continue
        if place == "latest":
            place, _ = latest_codec(config)
        found[key] = load_codec_run(str(place)).config
    return found


def typed_run(values: dict[str, Any]) -> RunConfig:
    """The typed configuration, its embedded data in place, of what was composed. Raises ConfigError."""
    from .embedded import with_embedded_data

    return with_embedded_data(parsed_run(values))


def parsed_run(values: dict[str, Any]) -> RunConfig:
    """The typed configuration of what was composed. Raises ConfigError."""
    from t2i import families
    from t2i.config import parse_run

    config = parse_run(values, families.get(values["family"]).load_config())
    if (text := config.model.text_encoder()) and text.allow_download:
        hub.allow()
    return config
