"""What is typed after `t2i sample`, and what of it a recipe or a file of prompts says."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from t2i.config import Precision, check
from t2i.diffusion.config import SamplerName
from t2i.errors import ConfigError, UserError, shortened
from t2i.generation.prompts import MAX_PX, MAX_SEED, Line
from t2i.schema import MAX_NUMBER, check_number, check_scale, is_unicode

from . import sample_edit, sample_video
from .arguments import Parser, add_launch
from .generators import CODEC

NUM_IMAGES = 4
LAYOUTS = ("geneval", "parti")
# Flags that stand for the family's own options.
SAMPLING = ("steps", "sampler", "guidance_scale")


def check_flags(options: argparse.Namespace) -> None:
    """Raises ConfigError that names the first flag whose value is not to be had."""
    check(options.checkpoint != "", "--checkpoint", "", "a run folder or a file of weights")
    check(options.out != "", "--out", "", "a folder")
    sources = [name for name in ("prompts_file", "recipe") if getattr(options, name) is not None]
    check(len(sources) < 2, "--recipe", options.recipe, "without --prompts-file")
    if options.prompts_file is not None:
        check(not options.prompt, "--prompt", options.prompt, "without --prompts-file")
    if not sources and not options.prompt:
        raise ConfigError("--prompt is not given; allowed: --prompt, --prompts-file or --recipe.")
    needs_file = options.layout is None or options.prompts_file is not None
    check(needs_file, "--layout", options.layout, "only with --prompts-file")
    ending = {"geneval": ".jsonl", "parti": ".tsv"}.get(options.layout, "")
    ok = options.layout is None or Path(options.prompts_file).suffix == ending
    check(ok, "--prompts-file", options.prompts_file, f"a file {ending} with --layout {options.layout}")
    sample_edit.check_flags(options)
    sample_video.check_flags(options)
    allowed = "a folder with a CLIP, with --rerank alone"
    check((options.clip is None) == (options.rerank is None), "--clip", options.clip, allowed)
    check(options.rerank is None or options.video is None, "--rerank", options.rerank, "without --video")
    _check_numbers(options)
    texts = [("--prompt", text) for text in options.prompt or ()]
    if options.negative_prompt is not None:
        texts.append(("--negative-prompt", options.negative_prompt))
    for flag, text in texts:
        check(is_unicode(text), flag, text, "text in UTF-8")


def _check_numbers(options: argparse.Namespace) -> None:
    most = {"steps": MAX_NUMBER, "rerank": MAX_NUMBER, "num_images": MAX_NUMBER, "batch_size": MAX_NUMBER}
    for name, limit in (most | {"height": MAX_PX, "width": MAX_PX}).items():
        check_number("--" + name.replace("_", "-"), getattr(options, name), limit)
    last = MAX_SEED - (options.num_images or _images(options)) + 1
    ok = options.seed is None or 0 <= options.seed <= last
    check(ok, "--seed", options.seed, f"0 to {last}")
    if options.guidance_scale is not None:
        check_scale("--guidance-scale", options.guidance_scale)


def as_overrides(options: argparse.Namespace) -> list[str]:
    """The flags that stand for the family's own options, and the codec of --recipe, as key=value."""
    given = {f"sampling.{name}": getattr(options, name) for name in SAMPLING}
    given["builds_on.codec"] = options.codec
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def filled(line: Line, options: argparse.Namespace) -> Line:
    """The line with what the flags say where it says nothing."""
    given = {name: getattr(options, name) for name in ("seed", "num_images", "height", "width")}
    given = {"seed": 0, "num_images": _images(options)} | {k: v for k, v in given.items() if v is not None}
    given["negative_prompt"] = options.negative_prompt or ""
    own = {name: getattr(line, name) for name in given}
    return dataclasses.replace(line, **given | {k: v for k, v in own.items() if v is not None})


def _images(options: argparse.Namespace) -> int:
    """Of each prompt where nothing says how many: one to vary, and one of each prompt to go between."""
    between_prompts = options.interpolate is not None and len(options.prompt or ()) > 1
    return 1 if between_prompts or options.variations is not None else NUM_IMAGES


def take_recipes(options: argparse.Namespace, overrides: Sequence[str]) -> list[Line]:
    """Of --recipe: a line for each of its pictures. What the recipe says of all of them is put into the options that
    are not given; what is given changes it. Taken are the entries named here, checked as flags are, and no others.
    Raises UserError."""
    from t2i.generation import recipes

    path = Path(options.recipe)
    found = recipes.read(path)
    first = found[0]
    sample_video.check_recipe(first, path)
    if any(CODEC.match(each) for each in overrides):
        first.pop("codec", None)
    kinds: dict[str, Any] = {
        "checkpoint": str,
        "codec": str,
        "precision": str,
        "compile": bool,
        "rerank": int,
        "clip": str,
        **sample_edit.RECIPE,
    }
    for name, kind in kinds.items():
        value = _entry(first, name, kind, path)
        if value is None or getattr(options, name):
            continue
        setattr(options, name, value)
        flag = {"checkpoint": "--checkpoint", "codec": "builds_on.codec="}.get(name)
        if flag is not None and not Path(value).exists():
            raise UserError(f"The recipe in {path} names {value}, which is not here: name it by {flag}.")
    kept = {name for name in ("image", "mask", "clip") if getattr(options, name) == first.get(name)}
    recipes.check_files(first, *sorted(kept))
    options.num_images = options.num_images or 1
    typed = {each.partition("=")[0] for each in [*as_overrides(options), *overrides]}
    lines = []
    for each in found:
        sampling = _entry(each, "sampling", dict, path) or {}
        own = {
            "prompt": _entry(each, "prompt", str, path),
            "seed": _entry(each, "seed", int, path),
            "height": _entry(each, "height_px", int, path),
            "width": _entry(each, "width_px", int, path),
            "negative_prompt": _entry(each, "negative_prompt", str, path),
        }
        own |= {name: None for name in own if name != "prompt" and getattr(options, name) is not None}
        own["between"] = sample_edit.check_between(_entry(each, "between", dict, path), path)
        own["sampling"] = {k: v for k, v in sampling.items() if f"sampling.{k}" not in typed}
        for prompt in options.prompt or [own["prompt"]]:
            check(prompt is not None, f"prompt in {path}", None, "text")
            lines.append(Line(**own | {"prompt": prompt}))
    check_flags(argparse.Namespace(**vars(options) | {"prompt": [line.prompt for line in lines]}))
    return lines


def check_same_kind(lines: Sequence[Line], options: argparse.Namespace, path: Path, sampling: Any) -> None:
    """Raises ConfigError where --recipe is of a model with other options of sampling than that of `path`."""
    own = {field.name for field in dataclasses.fields(sampling)}
    others = [f"sampling.{key}" for key in sorted({key for line in lines for key in line.sampling} - own)]
    if options.recipe is not None and others:
        raise ConfigError(
            f"{options.recipe} was drawn by another kind of model than {path}, which has no "
            f"{shortened(', '.join(others))}; allowed: --checkpoint with one of its kind."
        )


def _entry(recipe: dict[str, Any], name: str, kind: type, path: Path) -> Any:
    value = recipe.get(name)
    number = kind is float and isinstance(value, int)
    ok = value is None or ((isinstance(value, kind) or number) and (kind is bool or value is not True))
    words: dict[Any, str] = {str: "text", dict: "a mapping", int: "a whole number", bool: "true or false"}
    check(ok, f"{name} in {path}", value, words.get(kind, "a number"))
    return value


def parser() -> argparse.ArgumentParser:
    """The flags. What is not given is taken from the recipe, and else from the checkpoint's own configuration."""
    made = Parser(
        prog="t2i sample",
        description="Draw pictures for prompts. What lies in --out under the same recipe is not drawn again; under "
        "torchrun or srun each process draws its own share.",
        epilog="Trailing key=value change the run's config; builds_on.codec=RUN draws with a codec of the same codes.",
    )
    made.add_argument("--prompt", action="append", help="may be given several times")
    made.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="one prompt a line; .jsonl: objects with prompt and optionally seed, num_images, height, width, "
        "negative_prompt and sampling; .tsv: a table with the column Prompt",
    )
    made.add_argument(
        "--recipe", metavar="PNG", help="make a picture, or those of grid.png, again; flags change it"
    )
    made.add_argument("--negative-prompt", help="what guidance moves away from")
    sample_edit.add_flags(made)
    sample_video.add_flags(made)
    made.add_argument("--checkpoint", metavar="RUN|FILE", help="default: the newest run that draws")
    made.add_argument("--steps", type=int, help="denoiser calls per picture: sampling.steps")
    made.add_argument(
        "--sampler", metavar="NAME", help=f"sampling.sampler: {', '.join(get_args(SamplerName))}"
    )
    made.add_argument("--guidance-scale", type=float, help="sampling.guidance_scale; 1: no guidance")
    made.add_argument(
        "--seed", type=int, help="of each prompt's first picture, the next ones count up; default: 0"
    )
    made.add_argument(
        "--num-images",
        type=int,
        help=f"per prompt; default: {NUM_IMAGES}, or 1 with --variations and between prompts with --interpolate",
    )
    made.add_argument(
        "--rerank",
        type=int,
        metavar="COUNT",
        help="draw so many for each picture, keep the best by CLIP score",
    )
    made.add_argument("--clip", metavar="DIR", help="with --rerank: a CLIP of open_clip or transformers")
    made.add_argument(
        "--batch-size",
        type=int,
        help="pictures drawn at a time; default: 16 on a CPU, by free memory on a GPU; halved where memory "
        "does not do",
    )
    made.add_argument("--height", type=int, help="in pixels; default: what the model was trained at")
    made.add_argument("--width", type=int, help="in pixels")
    made.add_argument(
        "--precision", choices=[*get_args(Precision)], help="default: what the run was trained in; on a GPU"
    )
    made.add_argument("--compile", action="store_true", help="have torch compile the networks' blocks")
    made.add_argument("--out", default="samples", metavar="DIR", help="folder for the PNGs")
    made.add_argument(
        "--layout", choices=LAYOUTS, help="name files as the scorers of GenEval and PartiPrompts want"
    )
    add_launch(made)
    made.add_argument("--runs-dir", default="runs", help="where the newest run is looked for")
    made.add_argument("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    made.set_defaults(codec=None)  # of --recipe
    return made
