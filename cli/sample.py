"""`t2i sample`: draws pictures for prompts with a trained model."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, get_args

from t2i.diffusion.config import SamplerName
from t2i.schema import check

from .arguments import parse_with_overrides
from .generators import load_generator

MAX_PX = 16_384
MAX_NUMBER = 1_000_000  # of pictures per prompt, and of steps
MAX_SEED = 2**64 - 1  # of torch.Generator


def run(arguments: list[str]) -> None:
    """Parses, loads, draws, writes PNGs and says where."""
    options, overrides = parse_with_overrides(parser(), arguments)
    check(options.checkpoint != "", "--checkpoint", "", "a run folder or a file of weights")
    image_is_there = options.image is None or Path(options.image).is_file()
    check(image_is_there, "--image", options.image, "a picture file that exists")
    check_numbers(options)
    for flag, texts in {"--prompt": options.prompt, "--negative-prompt": [options.negative_prompt]}.items():
        for text in texts:
            check(is_unicode(text), flag, text, "text in UTF-8")
    # Heavy imports only now: a wrong flag is reported at once.
    from t2i.generation.text_to_image import check_folder, read_image
    from t2i.interfaces import SampleRequest
    from t2i.schema import to_dict
    from t2i.text.tokens import token_counter

    from .console import console, draw_files_with_bar

    check_folder(Path(options.out))
    path, generator, text = load_generator(
        options.checkpoint, options.runs_dir, options.device, [*sampling_flags(options), *overrides]
    )
    count = options.num_images
    size_px = options.height or generator.default_size_px, options.width or generator.default_size_px
    recipe: dict[str, Any] = {"checkpoint": str(path), "sampling": to_dict(generator.sampling)}
    image = None
    if options.image is not None:
        recipe["image"] = options.image
        image = read_image(Path(options.image), size_px).expand(len(options.prompt) * count, -1, -1, -1)
    request = SampleRequest(
        prompts=[prompt for prompt in options.prompt for _ in range(count)],
        seeds=[options.seed + i for _ in options.prompt for i in range(count)],
        height_px=size_px[0],
        width_px=size_px[1],
        negative_prompt=options.negative_prompt,
        image=image,
        strength=0.8 if options.strength is None else options.strength,
    )
    given = [
        *(("--prompt", prompt) for prompt in options.prompt),
        ("--negative-prompt", options.negative_prompt),
    ]
    if text is not None:
        counter = token_counter(text)
        for flag, words in given:
            if cut := counter.cut(words):
                console.print(
                    f"{flag} has {counter.count(words)} tokens, of which the text encoder takes {counter.max_tokens}: "
                    f"{cut!r} is left out.",
                )
    console.print(f"Drawing with {path}")
    draw_files_with_bar(generator, request, options.batch_size, Path(options.out), recipe)


def check_numbers(options: argparse.Namespace) -> None:
    """Raises ConfigError that names the first flag whose number is not to be had."""
    most = {"steps": MAX_NUMBER, "num_images": MAX_NUMBER, "batch_size": MAX_NUMBER}
    for name, limit in (most | {"height": MAX_PX, "width": MAX_PX}).items():
        value = getattr(options, name)
        ok = value is None or 1 <= value <= limit
        check(
            ok,
            "--" + name.replace("_", "-"),
            value,
            f"1 to {limit:,}" if value and value > limit else "1 or more",
        )
    last = MAX_SEED - options.num_images + 1
    check(0 <= options.seed <= last, "--seed", options.seed, f"0 to {last}")
    scale = options.guidance_scale
    check(scale is None or 0 <= scale < math.inf, "--guidance-scale", scale, "0 or more, finite")
    strength = options.strength
    check(strength is None or options.image is not None, "--strength", strength, "only with --image")
    check(strength is None or 0 < strength <= 1, "--strength", strength, "above 0, at most 1")


def sampling_flags(options: argparse.Namespace) -> list[str]:
    """The flags that stand for the family's own options, as key=value."""
    given = {name: getattr(options, name) for name in ("steps", "sampler", "guidance_scale")}
    return [f"sampling.{name}={value}" for name, value in given.items() if value is not None]


def is_unicode(text: str) -> bool:
    """False for what was typed in another encoding: Python then has surrogates in the place of its bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parser() -> argparse.ArgumentParser:
    """The flags. What is not given is taken from the checkpoint's own configuration."""
    made = argparse.ArgumentParser(
        prog="t2i sample",
        description="Draw pictures for prompts.",
        epilog="Trailing key=value change the run's config.",
    )
    made.add_argument("--prompt", action="append", required=True, help="may be given several times")
    made.add_argument("--negative-prompt", default="", help="what guidance moves away from")
    made.add_argument("--image", metavar="FILE", help="start from this picture, resized and cut to fit")
    made.add_argument("--strength", type=float, help="how far from --image, above 0 to 1; default: 0.8")
    made.add_argument("--checkpoint", metavar="RUN|FILE", help="default: the newest run that draws")
    made.add_argument("--steps", type=int, help="denoiser calls per picture: sampling.steps")
    made.add_argument(
        "--sampler", metavar="NAME", help=f"sampling.sampler: {', '.join(get_args(SamplerName))}"
    )
    made.add_argument("--guidance-scale", type=float, help="sampling.guidance_scale; 1: no guidance")
    made.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    made.add_argument("--num-images", type=int, default=4, help="per prompt")
    made.add_argument("--batch-size", type=int, default=16, help="pictures drawn at a time")
    made.add_argument("--height", type=int, help="in pixels; default: what the model was trained at")
    made.add_argument("--width", type=int, help="in pixels")
    made.add_argument("--out", default="samples", metavar="DIR", help="folder for the PNGs")
    made.add_argument("--runs-dir", default="runs", help="where the newest run is looked for")
    made.add_argument("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    return made
