"""Pictures of one Stable Diffusion 1 with the same weights, by t2i and by diffusers, on the CPU: the time with the
networks, the time without them, and memory. Weights are random, networks small unless asked. Interleaved, medians of
the processor's time on one thread, which hardly depends on what else runs.

Without: each network gives at once what it gave last, so that all else is what takes time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

PROMPTS = [
    "a lighthouse on a cliff above the sea",
    "two green bottles on a wall",
    "a red fox",
    "a cup of tea",
]
NEGATIVE = "blurry"
GUIDANCE = 7.5
# Of glibc: what was freed goes back to the system, so that the most that was in use is what is measured.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
# Side of the pictures, widths of the UNet and of the decoder.
SIZES = {
    "small": (128, (32, 64, 128, 128), (32, 64, 64, 64)),
    "sd1": (512, (320, 640, 1280, 1280), (128, 256, 512, 512)),
}


def save(folder: Path, size: str) -> None:
    """A pipeline as diffusers saves it, and what `t2i convert` makes of it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from t2i.interop import clip
    from t2i.interop.convert import Options, prepare, write
    from t2i.interop.run_out import write_files

    _, widths, codec_widths = SIZES[size]
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=2, vocab_size=49408
    )
    write_files(folder / "tokenizer", clip.tokenizer_files(77))
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8
    )
    vae = AutoencoderKL(
        block_out_channels=codec_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "theirs")
    write(prepare(folder / "theirs", folder / "ours", Options()))


class Networks:
    """Counts calls. still: whether each network gives what it gave last, and computes nothing"""

    def __init__(self) -> None:
        self.still = False
        self.calls: dict[str, int] = {}

    def watch(self, module: Any, method: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(module, method)
        last: list[Any] = [None]

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            if not self.still:
                last[0] = inner(*args, **kwargs)
            return last[0]

        setattr(module, method, watched)


def drawing_theirs(folder: Path, size_px: int, steps: int, networks: Networks) -> Callable[[list[str]], Any]:
    """Prompts to pictures, as arrays."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "theirs", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    networks.watch(pipeline.unet, "forward", "denoiser")
    networks.watch(pipeline.vae, "decode", "decoder")
    networks.watch(pipeline.text_encoder, "forward", "text")

    def draw(prompts: list[str]) -> Any:
        return pipeline(
            prompts,
            negative_prompt=[NEGATIVE] * len(prompts),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            height=size_px,
            width=size_px,
            generator=[torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))],
            output_type="np",
        ).images

    return draw


def drawing_ours(folder: Path, size_px: int, steps: int, networks: Networks) -> Callable[[list[str]], Any]:
    """The same."""
    from t2i import families
    from t2i.interfaces import SampleRequest
    from t2i.training import checkpoint, run_folder

    loaded = checkpoint.load(run_folder.weights_file(folder / "ours"))
    generator: Any = families.get(loaded.config["family"]).load_generator()(loaded, "cpu")
    del loaded
    options = {"steps": steps, "guidance_scale": GUIDANCE, "sampler": "ddim"}
    generator.sampling = dataclasses.replace(generator.sampling, **options)
    networks.watch(generator.model.denoiser, "forward", "denoiser")
    networks.watch(generator.model.codec, "decode", "decoder")
    networks.watch(generator.model.text.encoder, "forward", "text")

    def draw(prompts: list[str]) -> Any:
        request = SampleRequest(prompts, range(len(prompts)), size_px, size_px, NEGATIVE)
        return ((generator.generate(request) + 1) / 2).permute(0, 2, 3, 1).numpy()

    return draw


DRAWING = {"t2i": drawing_ours, "diffusers": drawing_theirs}


def peak_mib() -> int:
    """Most resident memory since `forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) // 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory(name: str, folder: Path, options: argparse.Namespace) -> None:
    """In a process of its own: prints MiB at the peak, above those with the networks loaded."""
    logging.disable()
    draw = DRAWING[name](folder, SIZES[options.size][0], 2, Networks())
    draw(PROMPTS[:1])
    forget_peak()
    before = peak_mib()
    draw((PROMPTS * options.batch_size)[: options.batch_size])
    print(json.dumps(peak_mib() - before))


@contextlib.contextmanager
def networks_saved(size: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        save(Path(place), size)
        yield Path(place)


def compare(folder: Path, options: argparse.Namespace) -> None:
    networks = {name: Networks() for name in DRAWING}
    size_px = SIZES[options.size][0]
    draw = {name: make(folder, size_px, options.steps, networks[name]) for name, make in DRAWING.items()}
    prompts = (PROMPTS * options.batch_size)[: options.batch_size]
    pictures = {name: each(prompts) for name, each in draw.items()}
    error = abs(pictures["t2i"] - pictures["diffusers"]).max()
    print(
        f"{len(prompts)} pictures of {size_px} px in {options.steps} steps; the largest difference: {error:.1e}"
    )
    for still, rounds in ((False, options.rounds), (True, 10 * options.rounds)):
        taken: dict[str, list[float]] = {name: [] for name in DRAWING}
        for _ in range(rounds):
            for name, each in draw.items():
                networks[name].still, networks[name].calls = still, {}
                began = time.process_time()
                each(prompts)
                taken[name].append(time.process_time() - began)
        medians = {name: statistics.median(values) for name, values in taken.items()}
        print("without the networks" if still else "with the networks")
        for name in DRAWING:
            print(f"  {name:10} {1000 * medians[name]:9.1f} ms   calls {networks[name].calls}")
        print(f"  ratio      {medians['t2i'] / medians['diffusers']:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    if options.memory_of:
        memory(options.memory_of[0], Path(options.memory_of[1]), options)
        return
    with networks_saved(options.size) as folder:
        compare(folder, options)
        found = {}
        for name in DRAWING:
            command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name, str(folder)]
            environment = os.environ | FREED_AT_ONCE
            ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[name] = int(ended.stdout)
        print(
            f"memory at the peak, above the networks: t2i {found['t2i']} MiB, diffusers {found['diffusers']} MiB, "
            f"ratio {found['t2i'] / found['diffusers']:.2f}"
        )


if __name__ == "__main__":
    main()
