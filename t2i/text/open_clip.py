"""OpenCLIP's text transformer (Cherti et al., arXiv:2212.07143): Stable Diffusion 2's encoder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import open_clip
from open_clip.model import _build_text_tower
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from t2i.errors import CheckpointError, ConfigError
from t2i.interfaces import TextFeatures
from t2i.nn.transfer import placed
from t2i.text.byte_pairs import clip_tokenizer
from t2i.text.frozen import FrozenTextEncoder, check_max_tokens, mask_up_to_end
from t2i.weight_file import named_by_content


class OpenClipTextEncoder(FrozenTextEncoder):
    """tokens: the states of the last layer but one, after the final layer norm and with those of the padding,
    as Stable Diffusion 2 conditions on them; pooled: CLIP's text embedding, projected, not normalised.

    model: architecture name ("ViT-H-14")
    weights: local file (.safetensors, or .pt read with weights_only), or the tag of published weights
        ("laion2b_s32b_b79k"), which is fetched only where `allow_download` is true
    Raises ConfigError, or CheckpointError where the weights are missing or do not fit.
    """

    def __init__(
        self, model: str | None, weights: str | None, max_tokens: int, allow_download: bool = False
    ) -> None:
        check_architecture(model, max_tokens)
        if weights is None or not (allow_download or Path(weights).is_file()):
            raise CheckpointError(
                f"text.weights is {weights!r}; allowed for open_clip: an existing file, or a tag of "
                "published weights with text.allow_download=true."
            )
        try:
            with (
                named_by_content(Path(weights)) if Path(weights).is_file() else nullcontext(weights) as named
            ):
                clip = open_clip.create_model(
                    model, pretrained=str(named), force_custom_text=True, weights_only=True
                )
        except CheckpointError:
            raise
        except Exception as error:  # whatever the readers of four file formats raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"text.weights {weights!r} do not load into {model}: {reason}.") from error
        tower = _shortened(clip.text, max_tokens)
        super().__init__(tower.width, pooled_width(tower), max_tokens)
        self.tokenizer = clip_tokenizer(max_tokens)
        self.tower = tower
        self.freeze()

    def encode(self, captions: list[str]) -> TextFeatures:
        ids = placed(self.tokenizer(captions), self.device)
        tokens, pooled = read(self.tower, ids)
        return TextFeatures(tokens, pooled, mask_up_to_end(ids, self.tokenizer.eot_token_id))


class PenultimateStates(nn.Module):
    """The tokens of `OpenClipTextEncoder` from token ids: (B, L) int64 -> (B, L, D)."""

    def __init__(self, tower: TextTransformer) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor) -> Tensor:
        return read(self.tower, input_ids)[0]


def read(tower: TextTransformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) token ids -> the normalised states of the last layer but one, (B, L, D), and the embedding (B, P)."""
    states = tower.forward_intermediates(
        ids,
        indices=[len(tower.transformer.resblocks) - 2],
        normalize_intermediates=True,
        output_fmt="NLC",
    )
    return states["text_intermediates"][0], states["text_features"]


def build_tower(model: str | None, max_tokens: int) -> TextTransformer:
    """The text transformer with random weights. Raises ConfigError where there is none of this name."""
    check_architecture(model, max_tokens)
    config = open_clip.get_model_config(model)
    quick_gelu = config.get("quick_gelu", False)
    tower = _build_text_tower(config["embed_dim"], config["text_cfg"], quick_gelu)
    return _shortened(tower.requires_grad_(False), max_tokens)


def pooled_width(tower: TextTransformer) -> int:
    return tower.width if tower.text_projection is None else tower.output_dim


def check_architecture(model: str | None, max_tokens: int) -> None:
    """Raises ConfigError unless `model` names one of the package's CLIPs with so many positions."""
    if model is None or model not in open_clip.list_models():
        raise ConfigError(
            f"text.model is {model!r}; allowed for open_clip: an architecture of open_clip.list_models()."
        )
    text = open_clip.get_model_config(model)["text_cfg"]
    if "hf_model_name" in text or "hf_tokenizer_name" in text:
        raise ConfigError(f"text.model {model} has a text model of its own; allowed: CLIP's transformer.")
    check_max_tokens(max_tokens, text.get("context_length", 77), model)


def _shortened(tower: TextTransformer, max_tokens: int) -> TextTransformer:
    if tower.attn_mask is not None:
        tower.attn_mask = tower.attn_mask[:max_tokens, :max_tokens].clone()
    return tower
