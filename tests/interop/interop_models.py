"""Small models of each architecture with random weights, as diffusers, transformers and CompVis save them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEVELS = {
    # Block types with and without attention, heads for all levels, quick_gelu, padding by the end token.
    "sd1": {
        "unet": {
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "cross_attention_dim": 64,
        },
        "text": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "projection_dim": 64},
        "prediction_type": "epsilon",
    },
    # Linear projections, heads of one width, gelu, v-prediction.
    "sd2": {
        "unet": {
            "block_out_channels": (64, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 2,
            "attention_head_dim": (1, 2),
            "cross_attention_dim": 128,
            "use_linear_projection": True,
        },
        "text": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "projection_dim": 128,
            "hidden_act": "gelu",
        },
        "prediction_type": "v_prediction",
    },
}


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """With random biases and norms too, so that a wrong name shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def small_autoencoder() -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
    )
    return randomised(vae, 2)


def clip_tokenizer(pad_token: str) -> Any:
    """CLIP's true vocabulary, which open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    theirs = SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {specials.get(token, token): i for token, i in theirs.encoder.items()}
    merges = list(theirs.bpe_ranks)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def save_pipeline(folder: Path, kind: str, **scheduler: Any) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    channels = scheduler.pop("in_channels", 4)
    values: Any = LEVELS[kind]
    torch.manual_seed(0)
    text = CLIPTextConfig(num_hidden_layers=2, vocab_size=49408, **values["text"])
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    noise |= {"prediction_type": values["prediction_type"], "set_alpha_to_one": False, "steps_offset": 1}
    pipeline = StableDiffusionPipeline(
        vae=small_autoencoder(),
        text_encoder=randomised(CLIPTextModel(text), 3),
        tokenizer=clip_tokenizer("<|endoftext|>" if kind == "sd1" else "!"),
        unet=randomised(UNet2DConditionModel(sample_size=8, in_channels=channels, **values["unet"]), 4),
        scheduler=DDIMScheduler(**(noise | scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def generator_of(run: Path) -> Any:
    """What `t2i sample` draws with."""
    from t2i import families
    from t2i.training import checkpoint, run_folder

    loaded = checkpoint.load(run_folder.weights_file(run))
    return families.get("latent_diffusion").load_generator()(loaded, "cpu")


def set_sampling(generator: Any, **options: Any) -> None:
    """As sampling.key=value does."""
    generator.sampling = dataclasses.replace(generator.sampling, **options)


def all_weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Of every .safetensors file in a folder, by its place; text models without their optional prefix."""
    from safetensors.torch import load_file

    return {
        str(path.relative_to(folder)): {
            name.removeprefix("text_model."): value for name, value in load_file(path).items()
        }
        for path in sorted(folder.rglob("*.safetensors"))
    }


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit for bit, with the same names."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
