"""Stable Diffusion 1 on one device: t2i's train step and pictures, and diffusers' pipeline. Weights are random, and at
toy size the networks are small; what is computed is the same."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from t2i import families
from t2i.config import RunConfig, run_to_dict, to_dict
from t2i.families.latent_diffusion.config import Config
from t2i.families.latent_diffusion.stage import Stage
from t2i.interfaces import Batch, SampleRequest
from t2i.interop import clip
from t2i.interop.diffusers_config import write_codec, write_unet
from t2i.interop.run_out import write_files
from t2i.interop.scheduler import write_scheduler
from t2i.nn.precision import mixed
from t2i.planning.fits import bytes_of_batch
from t2i.planning.model import Model, build_model
from t2i.planning.peaks import mfu_per_rate
from t2i.training.blocks import prepare
from t2i.training.checkpoint import save_final
from t2i.training.data import ShardData
from t2i.training.fit import build_trainer, set_up, with_precision
from t2i_cli.composition import composed_run
from t2i_cli.train import typed_run

WARM_UP, TIMED = 4, 10  # steps
WAYS = ("eager", "cudnn.benchmark", "compiled")  # of training
GIB = 2**30
PROMPT = "a lighthouse on a cliff above the sea, painted in oil"
WORDS = "red blue old small photo painting house river dog street light above beside garden window"
TOY_UNET = ["denoiser.model_channels=32", "denoiser.channel_mult=[1,2]", "denoiser.num_res_blocks=1"]
TOY_UNET += ["denoiser.attention_resolutions=[1,2]", "trainer.accelerator=cpu"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """One point of a sweep. way: one of WAYS; peak_gib, mfu: None on a CPU; planned_gib: what `t2i plan` says"""

    size_px: int
    way: str
    batch: int
    images_per_second: float
    mfu: float | None
    peak_gib: float | None
    planned_gib: float


class Subject:
    """The networks, in a folder of their own.

    toy: small ones, on the CPU
    """

    def __init__(self, folder: Path, toy: bool) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        self.folder, self.toy, self.compiled = folder, toy, False
        torch._dynamo.config.disable = toy  # a CPU would compile for minutes
        self.device = torch.device("cpu" if toy else "cuda")
        self.clip = clip.ClipConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        if toy:
            self.clip = clip.ClipConfig(64, 64, 1, 1)
        self.codec_config = typed_run(
            composed_run(
                ["experiment=autoencoder/kl_f8", "data.shards=unread.tar", "perceptual=none"]
                + ["backbone.base_channels=32"] * toy
            )
        )
        self.write_text_encoder(folder / "clip")
        self.write_codec(folder / "codec.safetensors")
        self.config = self.config_at(64 if toy else 256)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stage = Stage(self.config)

    def config_at(self, size_px: int) -> RunConfig:
        """Latents are read, as `data.encoded` has it; captions are not."""
        given = ["experiment=sd-v1/256", f"resolution.size_px={size_px}", "data.shards=unread.tar"]
        given += [f"data.encoded={self.folder}", f"builds_on.codec={self.folder}/codec.safetensors"]
        given += [f"text.model={self.folder}/clip", "trainer.devices=1", "trainer.num_nodes=1"]
        given += ["trainer.precision=auto", "sampling.guidance_scale=7.5"]
        given += [f"sampling.steps={2 if self.toy else 50}", *(TOY_UNET if self.toy else [])]
        return with_precision(set_up(typed_run(composed_run(given))), resumed=None)

    def write_text_encoder(self, folder: Path) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        CLIPTextModel(CLIPTextConfig(**dataclasses.asdict(self.clip))).save_pretrained(folder)
        write_files(folder, clip.tokenizer_files(self.clip.max_position_embeddings))

    def write_codec(self, path: Path) -> None:
        model = self.codec_config.model
        codec = families.get("autoencoder").load_stage("autoencoder")(self.codec_config).codec
        header = {"config": run_to_dict(self.codec_config), "extra": {}, "images_seen": 0}
        assert model is not None
        save_final({f"codec.{name}": value for name, value in codec.state_dict().items()}, header, path)

    @cache  # noqa: B019  # there is one subject
    def plan(self, size_px: int) -> tuple[Model, float | None]:
        """What `t2i plan` counts, and the MFU of one picture per second on this GPU."""
        config, builds_on = self.config_at(size_px), {"codec": run_to_dict(self.codec_config)}
        model = build_model(config, builds_on, self.device.type)
        if self.device.type == "cpu":
            return model, None
        return model, mfu_per_rate(config, builds_on, torch.cuda.get_device_name())

    # Training.

    def train(self, size_px: int, batches: list[int], way: str, found: Callable[[Trained], None]) -> None:
        """One fit with batches of growing size, each timed; ends where one does not fit into memory. way: one of WAYS;
        once compiled, the networks stay so"""
        self.free()
        config = self.config_at(size_px)
        newly = way == "compiled" and not self.compiled
        self.compiled = self.compiled or newly
        torch.backends.cudnn.benchmark = way == "cudnn.benchmark"
        switched = dataclasses.replace(config.trainer, compile=newly)
        self.stage.config = dataclasses.replace(config, model=self.stage.model_config, trainer=switched)
        torch._dynamo.reset()  # kernels of another size would be made for any size
        planned, rate = self.plan(size_px)

        def timed(batch: int, seconds: float) -> None:
            images = batch * TIMED / seconds
            peak = torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else None
            mfu = None if rate is None else rate * images
            plan = bytes_of_batch(config, planned, batch) / GIB
            found(Trained(size_px, way, batch, images, mfu, peak, plan))

        data = ReadyBatches(config, batches, self.stage)
        trainer = build_trainer(config, self.stage, logger=False, callbacks=[Timer(batches, timed)])
        try:
            trainer.fit(self.stage, data)
        except torch.OutOfMemoryError:
            pass  # the batches before have been timed
        finally:
            torch.backends.cudnn.benchmark = False
            del trainer, data
            self.stage.config = dataclasses.replace(self.stage.config, trainer=config.trainer)
            self.free()

    def free(self) -> None:
        """Gives the device's memory back."""
        self.stage.zero_grad()
        self.stage.all_turns = []
        self.stage.trainer = None  # with the optimizer
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Pictures.

    def time_t2i(self, batch: int, size_px: int, compiled: bool = False) -> float:
        """Seconds a picture. compiled: as with `t2i sample --compile`"""
        model = self.stage.model.to(self.device).eval()
        if compiled and not self.compiled:
            prepare(self.stage.blocks(), activation_checkpointing=False, compiled=True)
            self.compiled = True
        model.text.to(self.device)
        sampling = self.config.model.sampling  # type: ignore[union-attr]

        def draw(steps: int) -> None:
            request = SampleRequest([PROMPT] * batch, range(batch), size_px, size_px)
            with mixed(self.config.trainer.precision, self.device):
                model.generate(request, dataclasses.replace(sampling, steps=steps)).float().cpu()

        return self.per_picture(draw, batch, sampling.steps)

    def time_diffusers(self, batches: list[int], size_px: int, compiled: bool) -> dict[int, float]:
        """The same by batch, of diffusers' pipeline."""
        torch._dynamo.reset()
        pipeline, sampling = self.pipeline(size_px, compiled), self.config.model.sampling  # type: ignore[union-attr]

        def drawing(batch: int) -> Callable[[int], None]:
            return lambda steps: pipeline(
                [PROMPT] * batch,
                height=size_px,
                width=size_px,
                num_inference_steps=steps,
                guidance_scale=sampling.guidance_scale,
                output_type="np",
            )

        return {batch: self.per_picture(drawing(batch), batch, sampling.steps) for batch in batches}

    def pipeline(self, size_px: int, compiled: bool) -> Any:
        """diffusers' StableDiffusionPipeline. compiled: as its documentation has it: channels_last, and the UNet
        compiled"""
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from diffusers.utils import logging as diffusers_logging
        from transformers import CLIPTextModel, CLIPTokenizer

        diffusers_logging.set_verbosity_error()
        model = self.config.model
        assert isinstance(model, Config)
        widths = {"in_channels": 4, "out_channels": 4, "context_dim": self.clip.hidden_size}
        entries = {key: to_dict(getattr(self.codec_config.model, key)) for key in ("codec", "backbone")}
        with self.device:
            unet = UNet2DConditionModel.from_config(write_unet(to_dict(model.denoiser) | widths, size_px, 8))
            vae = AutoencoderKL.from_config(write_codec(entries, 0.18215, size_px))
        schedule = write_scheduler(
            to_dict(model.schedule), model.objective.prediction, to_dict(model.sampling)
        )
        pipeline = StableDiffusionPipeline(
            vae,
            CLIPTextModel.from_pretrained(self.folder / "clip"),
            CLIPTokenizer.from_pretrained(self.folder / "clip"),
            unet,
            DDIMScheduler.from_config(schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(self.device, torch.float32 if self.toy else torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        if compiled:
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.unet = torch.compile(pipeline.unet, fullgraph=not self.toy)
        return pipeline

    def per_picture(self, draw: Callable[[int], None], batch: int, steps: int) -> float:
        """draw: brings pictures to the host in so many steps"""
        draw(2)
        seconds = []
        for _ in range(3 if batch == 1 else 1):
            began = time.perf_counter()
            draw(steps)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds) / batch


class ReadyBatches(ShardData):
    """Batches that are there already: so many of each size. Captions never come again, and are encoded."""

    def __init__(self, config: RunConfig, batches: list[int], stage: Stage) -> None:
        super().__init__(config)
        self.batches = batches
        codec, size = stage.model.codec, config.resolution.size_px
        self.latent = (2 * codec.latent_channels, size // codec.downsampling, size // codec.downsampling)
        self.numbers = itertools.count()

    def train_dataloader(self) -> ReadyBatches:
        return self

    def __iter__(self) -> Iterator[Batch]:
        for size in self.batches:
            moments = torch.randn(size, *self.latent)
            for _ in range(WARM_UP + TIMED):
                yield self.batch(moments)

    def batch(self, moments: torch.Tensor) -> Batch:
        size = len(moments)
        numbers = list(itertools.islice(self.numbers, size))
        captions = [f"{WORDS} {n}" for n in numbers]
        rows, empty = torch.zeros(size, 2, dtype=torch.int64), torch.empty(size, 3, 0, 0)
        metadata: list[dict[str, Any]] = [{}] * size
        made = Batch(empty, captions, captions, rows, rows, metadata, torch.tensor(numbers))
        made.features = {"moments": moments}
        return made.pin_memory() if torch.cuda.is_available() else made


class Timer(Callback):
    """Seconds of TIMED steps of each size, after WARM_UP that are left out. Ends the fit after the last."""

    def __init__(self, batches: list[int], found: Callable[[int, float], None]) -> None:
        self.batches, self.found = batches, found
        self.done = 0
        self.began = 0.0

    def on_train_batch_end(
        self, trainer: Any, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.done += 1
        turn, step = divmod(self.done - 1, WARM_UP + TIMED)
        if step + 1 == WARM_UP:
            if stage.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()
        if step + 1 == WARM_UP + TIMED:
            if stage.device.type == "cuda":
                torch.cuda.synchronize()
            self.found(len(batch), time.perf_counter() - self.began)
            trainer.should_stop = turn + 1 == len(self.batches)
