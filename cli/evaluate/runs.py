"""Runs that are measured: what they draw, or give back, and what that took."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.errors import ConfigError, UserError
from t2i.few import first_few
from t2i.schema import check

from .options import bar, plain_data, statistics_of

if TYPE_CHECKING:
    from t2i.config import TextConfig
    from t2i.evaluation.cost import Cost
    from t2i.evaluation.features import Extractor
    from t2i.evaluation.measure import Figure
    from t2i.evaluation.pictures import Item, Pictures
    from t2i.evaluation.prompts import Judge
    from t2i.evaluation.suites import Prompt
    from t2i.interfaces import Generator

SHAPES = "shapes"
HELDOUT = "heldout"
LAST_SEED = 2**63 - 1  # of the first picture: torch.Generator takes twice as many


@dataclass(frozen=True)
class Measured:
    """figures: of one run; about: what it is and what it took"""

    figures: list[Figure]
    about: dict[str, Any]


def add_prompts(made: argparse.ArgumentParser) -> None:
    """The flags that say what a run draws."""
    made.add_argument(
        "--prompts",
        default=HELDOUT,
        metavar="NAME|FILE",
        help="heldout: captions that the run was not trained on; shapes: the compositional suite; a .json of COCO's "
        "captions, a .jsonl of objects with prompt, a .tsv like PartiPrompts, a .txt; default: heldout",
    )
    made.add_argument("--count", type=int, help="of prompts; default: all, of shapes 64 of each category")
    made.add_argument(
        "--reference", metavar="FOLDER|SHARDS", help="real pictures; default: the run's held-out ones"
    )
    made.add_argument("--reference-count", type=int, help="take the first so many of them; default: all")
    made.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="keep those of the reference here, and take them from here",
    )
    made.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")


def check_prompts(options: argparse.Namespace) -> None:
    """Raises ConfigError. Imports no torch."""
    check(options.count is None or options.count >= 2, "--count", options.count, "2 or more")
    most = options.reference_count
    check(most is None or most >= 2, "--reference-count", most, "2 or more")
    known = options.prompts in (HELDOUT, SHAPES) or Path(options.prompts).is_file()
    check(known, "--prompts", options.prompts, f"{HELDOUT}, {SHAPES} or a file that exists")
    check(options.reference != "", "--reference", "", "a folder of pictures, or shards")
    check(0 <= options.seed <= LAST_SEED, "--seed", options.seed, f"0 to {LAST_SEED}")


def check_places(key: str, places: Sequence[str], allowed: str) -> None:
    """Raises ConfigError for what is not there. Imports no torch."""
    for place in places:  # an empty one would be this folder
        check(place != "" and Path(place).exists(), key, place, allowed)


def each_once(places: Sequence[str]) -> list[str]:
    """Each weights' first name: a run that is named twice, such as by latest, is measured once."""
    from t2i.training import run_folder

    found: dict[Path, str] = {}
    for place in places:
        found.setdefault(run_folder.weights_file(place).resolve(), place)
    return list(found.values())


def check_measured(failed: Sequence[tuple[str, str]], count: int, what: str) -> None:
    """Raises UserError where of so many runs or points some could not be measured. failed: which, and why; a reason
    that many have is said once"""
    if failed:
        of_reason: dict[str, list[str]] = {}
        for which, reason in failed:
            of_reason.setdefault(reason, []).append(which)
        said = [f"{', '.join(first_few(names))}: {reason}" for reason, names in of_reason.items()]
        raise UserError(f"{len(failed)} of {count} {what} are not measured: {' '.join(first_few(said))}")


def prompts_of(options: argparse.Namespace, config: dict[str, Any]) -> list[Prompt]:
    """Those that --prompts names, for a run with this configuration."""
    from t2i.evaluation.suites import CATEGORIES, Prompt, read_suite

    if options.prompts == SHAPES:
        from t2i_pipelines.sources.shapes import composition

        count = 64 * len(CATEGORIES) if options.count is None else options.count
        each, more = divmod(count, len(CATEGORIES))  # of the first categories one more
        left = {category: each + (i < more) for i, category in enumerate(CATEGORIES)}
        prompts = []
        for category, text, scene in composition(each + 1):
            left[category] -= 1
            if left[category] >= 0:
                prompts.append(Prompt(text, category, {"scene": scene.to_json(), "category": category}))
        return prompts
    if options.prompts != HELDOUT:
        return read_suite(Path(options.prompts), options.count)
    heldout = reference_of(None, config, options.count)
    return [Prompt(item.caption, "", item.metadata) for item in heldout.read()]


def config_of(place: str) -> dict[str, Any]:
    """The configuration of a run or of one of its checkpoints."""
    from t2i.training import checkpoint, run_folder

    folder = run_folder.run_of(place)
    if folder is not None:
        return run_folder.read_config(folder)
    return checkpoint.load(run_folder.weights_file(place)).config


def reference_of(
    place: str | None, config: dict[str, Any], limit: int | None, size_px: int | None = None
) -> Pictures:
    """Real pictures: those at `place`, or the run's held-out ones. size_px: None: the run's"""
    from t2i.config import DataConfig, parse
    from t2i.evaluation.pictures import reference, shards_pictures

    size = (size_px or config["resolution"]["size_px"],) * 2
    if place is not None:
        return reference(place, size, plain_data(), limit)
    data = parse(DataConfig, config["data"], "data.")
    if not data.heldout_shards:
        raise ConfigError("The run has no data.heldout_shards; --reference and --prompts name others.")
    return shards_pictures(data.heldout_shards, size, data, limit, name="the run's held-out pictures")


def measure_generator(
    place: str,
    options: argparse.Namespace,
    extractors: Sequence[Extractor],
    overrides: Sequence[str] = (),
    protocol: dict[str, Any] | None = None,
) -> Measured:
    """Draws with a run or one of its checkpoints, and measures that.

    overrides: sampling.key=value; protocol: configuration of the run whose held-out data is meant, where not its own
    """
    from t2i.evaluation.attributes import Attributes
    from t2i.evaluation.cost import Cost
    from t2i.evaluation.features import clip_scores
    from t2i.evaluation.measure import check_enough, figures, score_figures
    from t2i.evaluation.runs import prompts_hash
    from t2i.evaluation.statistics import collect
    from t2i.schema import to_dict
    from t2i.training import run_folder

    from ..console import console
    from ..generators import load
    from ..report import draws
    from .options import device_of

    device = device_of(options)
    loaded = load(run_folder.weights_file(place), device, list(overrides))
    generator, text, config = loaded.generator, loaded.text, loaded.config
    protocol = protocol or config
    prompts = prompts_of(options, protocol)
    if options.count is not None and len(prompts) < options.count:
        console.print(
            f"--count is {options.count:,}; --prompts {options.prompts} has {len(prompts):,}: all are drawn."
        )
    for extractor in extractors:
        check_enough(extractor, len(prompts), f"--prompts {options.prompts}", options.force)
    real = reference_of(options.reference, protocol, options.reference_count, generator.default_size_px)
    known = statistics_of(real, extractors, options)
    cost = Cost(device)
    pictures = drawn(generator, prompts, options, cost, str(place))
    judge = judge_of(protocol, prompts[0].metadata, generator.default_size_px)
    attributes = Attributes(judge) if judge else None
    with bar(f"pictures of {place}", len(prompts)) as progress:
        look = attributes.look if attributes else (lambda items: None)
        found = collect(pictures, extractors, options.batch_size, progress, look)
    made: list[Figure] = []
    for extractor, features, statistics in zip(extractors, found, known, strict=True):
        made += figures(extractor, features, statistics, options.rounds)
        if extractor.clip is not None:
            scores = clip_scores(extractor.clip, features, [prompt.text for prompt in prompts], device)
            categories = [prompt.category for prompt in prompts]
            made += score_figures("CLIP score", scores, categories, extractor.title)
    made += attributes.figures() if attributes else []
    trained = sum(size for name, size in loaded.sizes.items() if draws(name))
    folder = run_folder.run_of(place)
    about = {
        "run": str(place),
        "type": config["family"],
        "stage": config["stage"],
        "size_px": config["resolution"]["size_px"],
        "parameters": trained,
        "text_encoder": None if text is None else text.model or text.name,
        "text_encoder_parameters": encoder_parameters(text),
        "training_images": _images_seen(loaded.path, folder),
        "sampling": to_dict(generator.sampling),
        "prompts": options.prompts,
        "prompts_hash": prompts_hash([prompt.text for prompt in prompts]),
        "seconds_per_picture": cost.seconds_per_picture,
        "memory_gib": cost.memory_gib,
        "device": str(device),
        "reference": [each.about for each in known],
        "left_out": known[0].left_out,
    }
    return Measured(made, about)


def drawn(
    generator: Generator, prompts: Sequence[Prompt], options: argparse.Namespace, cost: Cost, name: str
) -> Pictures:
    """What a generator draws, one picture per prompt, a batch at a time."""
    from t2i.evaluation.pictures import Item, Pictures
    from t2i.generation.text_to_image import batches, check_all_finite, finite_pictures
    from t2i.interfaces import SampleRequest
    from t2i.training.pictures import to_uint8

    size, count = generator.default_size_px, len(prompts)
    request = SampleRequest(
        [prompt.text for prompt in prompts], range(options.seed, options.seed + count), size, size
    )

    def read() -> Iterator[Item]:
        place = 0
        for part in batches(request, options.batch_size):
            with cost.drawing(len(part.prompts)):
                images = generator.generate(part)
            check_all_finite(part, finite_pictures(images).tolist(), generator.sampling)
            for image in to_uint8(images):
                prompt = prompts[place]
                place += 1
                yield Item(image, prompt.text, dict(prompt.metadata))

    return Pictures(name, count, (size, size), "", read)


def judge_of(config: dict[str, Any], sample: Mapping[str, Any], size: int) -> Judge | None:
    """What tells whether pictures show what was asked; None where nothing does.

    config: of the run whose data is meant; sample: the JSON of one of the pictures or prompts
    """
    from t2i.evaluation.prompts import check_scenes, judge_for
    from t2i.evaluation.runs import Run

    if "scene" in sample:
        return check_scenes
    if "attributes" not in sample:
        return None
    run = Run(Path("the run"), config, "")
    return judge_for(partial(run.train, size), run.heldout(size))


def encoder_parameters(text: TextConfig | None) -> int | None:
    """Of the text encoder."""
    import torch

    from t2i.text.architecture import build_architecture

    if text is None:
        return None
    with torch.device("meta"):
        return sum(p.numel() for p in build_architecture(text).network.parameters())


def _images_seen(weights: Path, folder: Path | None) -> int | None:
    """That the weights were trained on."""
    from t2i.training import checkpoint, run_folder

    if weights.is_dir():
        return run_folder.images_of(weights) or None
    found = checkpoint.images_seen(weights)
    return (
        found if found is not None or folder is None else run_folder.read_summary(folder).get("images_seen")
    )
