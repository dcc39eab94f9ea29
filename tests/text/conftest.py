from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A small CLIPTextModel, and its projection, with random weights and CLIP's true vocabulary, which open_clip
    ships."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    theirs = SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {specials.get(token, token): i for token, i in theirs.encoder.items()}
    folder = tmp_path_factory.mktemp("clip")
    CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks)).save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=49408,
        projection_dim=24,
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def open_clip_weights(tmp_path_factory) -> tuple[str, Path]:
    """(architecture, weights): a small CLIP with random weights, saved as open_clip saves its own."""
    import json

    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
    }
    (folder / "t2i-test-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "t2i-test-tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("t2i-test-tiny")
    save_file(model.state_dict(), folder / "weights.safetensors")
    torch.save(model.state_dict(), folder / "weights.pt")
    return "t2i-test-tiny", folder / "weights.safetensors"


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    """A small T5 encoder of version 1.1 with random weights, and a vocabulary of letters and a few words."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        "▁a",
        "▁photo",
        "▁of",
        "▁cat",
        "▁red",
        "▁cube",
        *map(chr, range(33, 127)),
    ]
    vocabulary = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = T5Tokenizer(vocab=vocabulary)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer) + 28,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder
