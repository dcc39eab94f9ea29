"""A wrong `t2i convert` ends with 2 and one sentence, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


@pytest.fixture
def sources() -> None:
    """What people have lying about, in the folder that the command runs in."""
    Path("text.ckpt").write_text("not a checkpoint")
    Path("text.safetensors").write_text("not a checkpoint")
    Path("config.yaml").write_text("stage: ldm\nname: tomorrow.\n")
    Path("long.py").write_text(
        "\N{SNOWMAN}" * 1000 + "a."
    )  # 3 bytes each: the 512 that are looked at end within one
    torch.save({"state_dict": {"evil": Evil()}}, "evil.ckpt")
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, "other.ckpt")
    save_file({"layer.weight": torch.zeros(2)}, "other.safetensors")
    Path("empty").mkdir()
    Path("flux").mkdir()
    Path("flux/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    Path("taken").mkdir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent", "out"), ("absent", "does not exist")),
        (("", "out"), ("SOURCE is ''",)),
        (("other.ckpt", ""), ("OUT is ''",)),
        (("text.ckpt", "out"), ("text.ckpt is text; allowed: a file of weights (.safetensors,",)),
        (("text.safetensors", "out"), ("text.safetensors is text; allowed: ",)),
        (("config.yaml", "out"), ("config.yaml is text; allowed: ",)),
        (("long.py", "out"), ("long.py is text; allowed: ",)),
        (("flux", "flux/inside"), ("OUT is 'flux/inside'; allowed: a name outside of flux",)),
        (("flux", "empty/../flux/deep/in.safetensors"), ("allowed: a name outside of flux",)),
        (("other.ckpt", "empty/out", "--text", "empty"), ("allowed: a name outside of empty",)),
        (("evil.ckpt", "out"), ("evil.ckpt", "without running code")),
        (("other.ckpt", "out"), ("other.ckpt", "layer.weight", "of no model that is known")),
        (("other.safetensors", "out"), ("other.safetensors", "Stable Diffusion")),
        (("empty", "out"), ("empty", "model_index.json", "config.yaml")),
        (("flux", "out"), ("_class_name", "FluxPipeline", "StableDiffusionPipeline")),
        (("other.ckpt", "taken"), ("taken exists already",)),
        (("other.ckpt", "other.safetensors"), ("other.safetensors exists already",)),
    ],
    ids=str,
)
def test_one_sentence(t2i, sources, arguments, words):
    before = sorted(str(path) for path in Path().rglob("*"))
    sentence = t2i("convert", *arguments).sentence
    assert sentence.startswith("t2i convert: ")
    for word in words:
        assert word in sentence
    assert sorted(str(path) for path in Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "SOURCE"),
        (("a",), "OUT"),
        (("a", "b", "--to", "gguf"), "gguf"),
        (("a", "b", "--dtype", "fp8"), "fp8"),
        (("a", "b", "--prediction", "flow"), "flow"),
        (("a", "b", "--colour"), "--colour"),
    ],
    ids=str,
)
def test_argparse_names_the_flag(t2i, arguments, word):
    assert word in t2i("convert", *arguments).sentence


@pytest.fixture
def vqgan(t2i) -> dict[str, torch.Tensor]:
    """A small VQGAN in vqgan.ckpt, with taming's names."""
    from t2i.interop.diffusers_config import backbone
    from t2i.interop.names import compvis_codec
    from t2i.interop.parts import codec_shapes

    config = {
        "backbone": backbone(32, [1, 2], 1, 4, [False, False], True),
        "codec": {"name": "vq", "num_codes": 16},
    }
    names = compvis_codec(codec_shapes(config))
    weights = {names[ours]: torch.randn(shape) for ours, shape in codec_shapes(config).items()}
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(1)}}, "vqgan.ckpt")
    return weights


def test_a_conversion_says_what_it_did(t2i, vqgan):
    result = t2i("convert", "vqgan.ckpt", "run")
    assert (result.code, result.err) == (0, "")
    for words in (
        "an autoencoder of LDM or taming",
        "no EMA weights",
        "1 weight of the training losses",
        "Wrote run",
    ):
        assert words in result.out
    assert sorted(path.name for path in Path("run").iterdir()) == ["config.yaml", "model.safetensors"]
    assert t2i("convert", "run", "back.safetensors").code == 0
    back = load_file("back.safetensors")
    assert back.keys() == vqgan.keys()
    assert all(torch.equal(back[name], value) for name, value in vqgan.items())
    assert t2i("convert", "run", "vqmodel").code == 0
    assert Path("vqmodel/diffusion_pytorch_model.safetensors").is_file()
    assert sorted(path.name for path in Path().iterdir()) == [
        "back.safetensors",
        "run",
        "vqgan.ckpt",
        "vqmodel",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("vqgan.ckpt", "out.safetensors", "--to", "diffusers"),
            ("would be a folder", "without .safetensors"),
        ),
        (("vqgan.ckpt", "out", "--to", "compvis"), ("would be a single file", "ends in .safetensors")),
    ],
)
def test_the_name_of_the_outcome_has_to_fit(t2i, vqgan, arguments, words):
    sentence = t2i("convert", *arguments).sentence
    for word in words:
        assert word in sentence


def test_nothing_is_left_of_a_conversion_that_fails_half_way(t2i, vqgan):
    weights = {name: value * 1e6 for name, value in vqgan.items()}
    torch.save(weights, "large.ckpt")
    sentence = t2i("convert", "large.ckpt", "half", "--dtype", "fp16").sentence
    assert "too large for float16" in sentence
    assert "--dtype fp32 or bf16" in sentence
    assert sorted(path.name for path in Path().iterdir()) == ["large.ckpt", "vqgan.ckpt"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(t2i, vqgan, bad, dtype):
    vqgan["decoder.conv_in.weight"][0, 1, 2, 0] = bad
    torch.save({"state_dict": vqgan}, "bad.ckpt")
    before = sorted(Path().iterdir())
    for out in ("run", "out.safetensors"):
        sentence = t2i(
            "convert", "bad.ckpt", out, "--dtype", dtype, "--to", {"run": "t2i"}.get(out, "compvis")
        ).sentence
        assert "decoder.conv_in.weight in bad.ckpt has 1 numbers of" in sentence
        assert "not finite" in sentence
        assert sorted(Path().iterdir()) == before


def test_an_outcome_that_cannot_be_written(t2i, vqgan):
    Path("file").write_text("")
    assert "file/run cannot be written" in t2i("convert", "vqgan.ckpt", "file/run").sentence


def test_an_autoencoder_of_a_vqgan_is_what_ldm_builds_on(t2i, vqgan):
    """The converted run stands where a trained autoencoder would: as `autoencoder=RUN`."""
    from t2i import families
    from t2i.training import checkpoint, run_folder

    t2i("convert", "vqgan.ckpt", "run")
    loaded = checkpoint.load(run_folder.weights_file("run"))
    assert loaded.config["family"] == "autoencoder"
    codec = families.get("autoencoder").load_codec()(loaded.config)
    checkpoint.load_into(codec, loaded.weights, loaded.path, prefix="codec.")
    assert codec.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 8, 8)


def test_a_full_disk_leaves_nothing(t2i, vqgan, monkeypatch):
    from t2i.interop import writing

    def full(tensor, dtype, name):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "cast", full)
    for out in ("new/folder/run", "out.safetensors"):
        sentence = t2i("convert", "vqgan.ckpt", out).sentence
        assert f"{out} cannot be written: No space left on device" in sentence
        assert [path.name for path in Path().iterdir()] == ["vqgan.ckpt"]


def test_ctrl_c_leaves_nothing(t2i, vqgan, monkeypatch):
    from t2i.interop import writing

    def stop(tensor, dtype, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "cast", stop)
    result = t2i("convert", "vqgan.ckpt", "new/run")
    assert (result.code, result.err) == (130, "t2i convert: stopped by Ctrl-C.\n")
    assert [path.name for path in Path().iterdir()] == ["vqgan.ckpt"]
