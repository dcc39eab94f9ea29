"""A wrong `t2i train` ends with 2 and one sentence, before any data is read or any run folder is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from weight_files import composed, write

OWN_SHARDS = ("data=shards", "data.shards=absent.tar")

# What is typed, and what the sentence has to say.
CASES = {
    "no stage": ((), ("stage", "autoencoder", "ldm")),
    "unknown stage": (("stage=cascade",), ("stage/cascade", "autoencoder", "ldm")),
    "unknown key": (
        ("stage=ldm", "trainer.max_steps=1"),
        ("trainer.max_steps", "not a known key", "batch_size", "num_images"),
    ),
    "nearly a key": (
        ("stage=ldm", "trainer.num_imags=1"),
        ("trainer.num_imags", "not a known key", "did you mean trainer.num_images?"),
    ),
    "key of a value": (("stage=ldm", "seed.x=1"), ("seed.x", "not a known key", "--cfg job")),
    "unknown key of the stage": (
        ("stage=autoencoder", "denoiser.width=8"),
        ("denoiser.width", "there is no denoiser;", "codec"),
    ),
    "added key": (("stage=ldm", "+trainer.batchsize=1"), ("trainer.batchsize", "trainer.batch_size?")),
    "added group": (("stage=autoencoder", "+text=learned"), ("text", "stage autoencoder")),
    "unknown resolution": (("stage=ldm", "resolution=100"), ("resolution/100", "32", "64", "512")),
    "unknown codec": (("stage=autoencoder", "codec=foo"), ("codec/foo", "kl", "vq")),
    "unknown family": (("stage=ldm", "family=gan"), ("family", "'gan'", "latent_diffusion")),
    "wrong type": (
        ("stage=ldm", "trainer.num_images=many"),
        ("trainer.num_images", "'many'", "whole number"),
    ),
    "a fraction": (("stage=ldm", "seed=1.5"), ("seed", "1.5", "whole number")),
    "a choice is a number": (("stage=ldm", "trainer=5"), ("trainer=5", "name")),
    "impossible number": (("stage=ldm", "trainer.batch_size=0"), ("trainer.batch_size", "0", "1 or more")),
    "impossible share": (
        ("stage=ldm", "resolution.text_dropout=1.5"),
        ("resolution.text_dropout", "1.5", "0 to 1"),
    ),
    "impossible word": (("stage=ldm", "trainer.precision=fp8"), ("trainer.precision", "'fp8'", "bf16-mixed")),
    "keys that do not fit": (("stage=ldm", "schedule=linear"), ("flow", "linear")),
    "own shards unnamed": (("stage=ldm", "data=shards"), ("data.shards",)),
    "own shards absent": (
        ("stage=autoencoder", *OWN_SHARDS),
        ("data.shards", "absent.tar", "does not exist"),
    ),
    "size of the autoencoder": (
        ("stage=autoencoder", *OWN_SHARDS, "resolution.size_px=50"),
        ("resolution.size_px", "50", "multiples of 4"),
    ),
    "no autoencoder": (
        ("stage=ldm", *OWN_SHARDS),
        ("stage=ldm", "t2i train stage=autoencoder", "builds_on.codec="),
    ),
    "autoencoder absent": (
        ("stage=ldm", *OWN_SHARDS, "builds_on.codec=runs/none"),
        ("runs/none", "does not exist"),
    ),
    "nothing to resume": (
        ("stage=autoencoder", *OWN_SHARDS, "resume=latest"),
        ("resume=latest", "runs/autoencoder"),
    ),
    "resume from no run": (
        ("stage=autoencoder", *OWN_SHARDS, "resume=nowhere"),
        ("resume", "'nowhere'", "latest, auto or the folder of a run"),
    ),
    "start from nothing": (
        ("stage=autoencoder", *OWN_SHARDS, "init_from=nowhere"),
        ("nowhere", "does not exist"),
    ),
    "a name too long for a file": (("stage=ldm", "name=" + "n" * 250), ("name", "240 bytes", "250")),
    "a name that leads elsewhere": (("stage=ldm", "name=../a"), ("name", "'../a'", "without /")),
    "the name of a link": (("stage=ldm", "name=Latest"), ("name", "'Latest'", "other names")),
    "a GPU where there is none": (
        ("stage=autoencoder", *OWN_SHARDS, "trainer.accelerator=gpu"),
        ("trainer.accelerator", "'gpu'", "auto or cpu", "no GPU"),
    ),
    "mistyped experiment": (
        ("stage=ldm", "experiment=sd-v1/521"),
        ("experiment", "'sd-v1/521'", "allowed: sd-v1/256, sd-v1/512-v1-1"),
    ),
    "mistyped folder of experiments": (
        ("stage=ldm", "experiment=sdv1/256"),
        ("experiment", "'sdv1/256'", "sd-v1/512-v1-1", "latent_diffusion/tiny_dit_flow"),
    ),
    "a key with dashes": (("stage=ldm", "--resume", "latest"), ("'--resume'", "a key has no dashes")),
    "a flag of another verb": (("stage=ldm", "--prompt", "a cat"), ("'--prompt'", "`t2i train --help`")),
    "mistyped flag": (("stage=ldm", "--multirum"), ("'--multirum'", "did you mean --multirun?")),
    "what a flag does not take": (("stage=ldm", "--cfg", "jobs"), ("--cfg", "'jobs'", "`t2i train --help`")),
    "a family is no experiment": (("stage=ldm", "experiment=sd-v1"), ("experiment", "'sd-v1'", "sd-v1/256")),
    "mistyped experiment, printed": (
        ("stage=ldm", "experiment=sd-v1/521", "--cfg", "job"),
        ("experiment", "'sd-v1/521'", "sd-v1/256"),
    ),
    "a precision of GPUs alone": (
        ("stage=autoencoder", *OWN_SHARDS, "trainer.precision=16-mixed"),
        ("trainer.precision", "'16-mixed'", "bf16-mixed", "on a CPU"),
    ),
    "two of Hydra's own commands": (
        ("stage=ldm", "--multirun", "--cfg", "job"),
        ("--multirun", "--cfg", "one of"),
    ),
    "no run to repeat": (("stage=ldm", "--experimental-rerun", "nowhere"), ("nowhere", "does not exist")),
    "not key=value": (("stage=ldm", "trainer"), ("trainer",)),
    "unreadable": (("stage=ldm", "trainer.batch_size=[1"), ("trainer.batch_size=[1", "key=value")),
    "unknown reference": (("stage=ldm", "name=${nobody}"), ("nobody",)),
    "nothing to start from": (("stage=ldm", "data=shapes", "init_from="), ("init_from", "''", "null")),
    "nothing to go on with": (("stage=ldm", "data=shapes", "resume="), ("resume", "''", "null")),
    "nothing to build on": (
        ("stage=ldm", "data=shapes", "builds_on.codec="),
        ("builds_on.codec", "''", "latest"),
    ),
    "a recipe that the stage does not read": (
        ("stage=autoencoder", "resolution.batch_size=7"),
        ("resolution.batch_size=7", "nothing in this run refers to it", "stage=autoencoder --cfg job"),
    ),
    "Muon where no matrix is between hidden layers": (
        ("stage=autoencoder", "optimizer.muon_scale=10"),
        ("optimizer.muon_scale is 10.0; allowed: null with stage=autoencoder, which AdamW alone trains.",),
    ),
    "Muon for a GAN": (
        ("stage=gan_int_cls", "optimizer.muon_scale=10"),
        ("optimizer.muon_scale is 10.0; allowed: null with stage=gan_int_cls, which AdamW alone trains.",),
    ),
    "a place for what ships as a package": (
        ("stage=ldm", "text.model=a/place"),
        ("text.model is 'a/place'; allowed: null for minilm.",),
    ),
    "weights of OpenCLIP for another encoder": (
        ("stage=ldm", "text=clip", "text.weights=laion2b"),
        ("text.weights is 'laion2b'; allowed: null for clip.",),
    ),
    "a weight of no perceptual loss": (
        ("stage=autoencoder", "perceptual=none", "perceptual.weight=1"),
        ("perceptual.weight is 1.0; allowed: 0 with perceptual.name=none.",),
    ),
    "weights for no perceptual loss": (
        ("stage=autoencoder", "perceptual=none", "perceptual.weights=vgg.pth"),
        ("perceptual.weights is 'vgg.pth'; allowed: null with perceptual.name=none.",),
    ),
    "channels of no upsampler": (
        ("stage=autoencoder", "upsampler.channels=16"),
        ("upsampler.channels=16 would change nothing: it counts with trained=upsampler.",),
    ),
    "a discriminator that there is not": (
        ("stage=autoencoder", "adversarial=none", "adversarial.r1_weight=1"),
        (
            "adversarial.r1_weight=1 would change nothing: it counts with adversarial.start_images, which is null.",
        ),
    ),
    "the temperature of no entropy": (
        ("stage=autoencoder", "codec=vq", "codec.entropy_temperature=1"),
        ("codec.entropy_temperature=1 would change nothing: it counts with codec.entropy_weight above 0.",),
    ),
    "words that nothing reads": (
        ("stage=ar", "transformer.vocabulary=40000"),
        (
            "transformer.vocabulary=40000 would change nothing: it counts with transformer.conditioning=words.",
        ),
    ),
    "the width of an encoder that is frozen": (
        ("experiment=autoregressive/tiny_ar", "text=minilm", "text.width=8"),
        ("text.width=8 would change nothing: it counts with text=learned or text=ldm_bert.",),
    ),
    "a text width without a UNet": (
        ("stage=pixel_diffusion", "text_width=8"),
        ("text_width=8 would change nothing: it counts with a UNet (denoiser.name=adm).",),
    ),
    "convolutions that there are not": (
        ("stage=ldm", "denoiser.refiner_depth=0", "denoiser.refiner_width=8"),
        ("denoiser.refiner_width=8 would change nothing: it counts with denoiser.refiner_depth above 0.",),
    ),
    "how often nothing is computed": (
        ("stage=gan_int_cls", "r1_weight=0", "r1_every=4"),
        ("r1_every=4 would change nothing: it counts with r1_weight above 0.",),
    ),
    "a recipe that another key replaced": (
        ("stage=ldm", "resolution.batch_size=7", "trainer.batch_size=3"),
        ("resolution.batch_size=7",),
    ),
    "own shards beside shapes": (
        ("stage=ldm", "data=shapes", "data.shards=mine.tar"),
        ("data.shards", "'mine.tar'", "data=shapes", "data=shards"),
    ),
    "own shards beside the default": (
        ("stage=autoencoder", "data.heldout_shards=[mine.tar]"),
        ("data.heldout_shards", "mine.tar", "data=emoji", "data=shards"),
    ),
    "a mixture beside shapes": (
        ("stage=ldm", "data=shapes", "+data.mixture.a={shards: a.tar}"),
        ("data.mixture", "a.tar", "data=mixture"),
    ),
    "folder of experiments absent": (("--config-dir=nowhere", "stage=ldm"), ("nowhere",)),
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr("t2i.training.fit.num_gpus", lambda: 0)


@pytest.mark.parametrize(("arguments", "words"), CASES.values(), ids=CASES)
def test_one_sentence(t2i, arguments, words):
    sentence = t2i("train", *arguments).sentence
    assert sentence.startswith("t2i train: ")
    for word in words:
        assert word in sentence
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("stage", ["ldm", "masked"])
def test_a_model_is_no_codec(t2i, shapes_overrides, ldm_file, stage):
    sentence = t2i(
        "train", f"stage={stage}", "resolution=32", *shapes_overrides, f"builds_on.codec={ldm_file}"
    ).sentence
    assert f"builds_on.codec is '{ldm_file}, of stage ldm'; allowed: a run of stage autoencoder" in sentence


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_more_gpus_than_there_are(t2i, monkeypatch, accelerator):
    monkeypatch.setattr("t2i.training.fit.num_gpus", lambda: 2)
    typed = ("stage=autoencoder", *OWN_SHARDS, "trainer.devices=3", f"trainer.accelerator={accelerator}")
    assert "trainer.devices is 3; allowed: 1 to 2" in t2i("train", *typed).sentence
    typed = (*typed[:-1], "trainer.accelerator=cpu")
    assert "absent.tar" in t2i("train", *typed).sentence  # the next thing that is wrong


def test_of_several_experiments_each_has_to_exist(t2i, monkeypatch):
    started = []
    monkeypatch.setattr("t2i_cli.train.train", lambda *given: started.append(given))
    sentence = t2i("train", "stage=ldm", "experiment=sd-v1/256,sd-v1/521", "--multirun").sentence
    assert "experiment is 'sd-v1/521'; allowed: " in sentence
    assert started == []


@pytest.mark.parametrize("flag", [("--config-dir=mine",), ("--config-dir", "mine"), ("-cd", "mine")])
def test_experiments_of_ones_own_are_among_the_choices(t2i, flag):
    own = Path("mine/experiment/trial")
    own.mkdir(parents=True)
    (own / "tiny.yaml").write_text("# @package _global_\nseed: 17\n")
    sentence = t2i("train", *flag, "stage=ldm", "experiment=tiny").sentence
    assert sentence.startswith("t2i train: experiment is 'tiny'; allowed: ")
    for word in ("trial/tiny", "sd-v1/256"):
        assert word in sentence
    assert [path.name for path in Path().iterdir()] == ["mine"]


def test_no_data_is_made_for_a_run_that_cannot_be_gone_on_with(t2i, tmp_path):
    assert "resume=latest found no run" in t2i("train", "stage=ldm", "resume=latest").sentence
    assert not (tmp_path / "cache").exists()


def test_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "t2i_cli.main", "train", "stage=ldm", "trainer.batch_size=0"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / "here").mkdir()
    result = subprocess.run(
        command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (2, "")
    (sentence,) = result.stderr.splitlines()
    assert "trainer.batch_size is 0" in sentence
    assert list((tmp_path / "here").iterdir()) == []


BROKEN = {
    "unfinished": (b"a: [b", ("broken.yaml, line", "YAML")),
    "said twice": (b"a: 1\na: 2\n", ("broken.yaml, line 2", "duplicate key a")),
    "a command": (b'a: !!python/object/apply:os.system ["touch here"]', ("broken.yaml, line 1", "os.system")),
    "no text": (b"\xff\xfe\x00", ("mine", "UTF-8")),
    "empty": (b"", ("experiment is {}", "# @package _global_")),
    "without its first line": (b"seed: 1\n", ("experiment is {'seed': 1}", "# @package _global_")),
}


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_broken_file_of_configuration(t2i, verb, content, words):
    own = Path("mine/experiment")
    own.mkdir(parents=True)
    (own / "broken.yaml").write_bytes(content)
    sentence = t2i(
        verb, "--config-dir=mine", "stage=ldm", "experiment=broken", *(["cluster=a100x8"] * (verb == "plan"))
    ).sentence
    for word in words:
        assert word in sentence
    assert list(Path().iterdir()) == [Path("mine")]


@pytest.mark.parametrize(
    ("stage", "place", "sentence"),
    [
        ("masked", "codec", ", of family autoencoder'; allowed: a run of family masked."),
        ("ldm", "codec", ", of family autoencoder'; allowed: a run of family latent_diffusion."),
        ("autoencoder", "model", ", of family masked'; allowed: a run of family autoencoder."),
    ],
)
def test_weights_of_another_family_are_not_gone_on_from(t2i, tmp_path, stage, place, sentence):
    """What they are is said, not what they lack."""
    kinds = {"codec": "experiment=autoencoder/tiny_fsq", "model": "experiment=masked/tiny_masked"}
    file = write(tmp_path / place, {"weight": torch.zeros(1)}, composed(kinds[place]))
    said = t2i("train", f"stage={stage}", "data=shapes", f"init_from={file}").sentence
    assert said == f"t2i train: init_from is '{file}{sentence}"
