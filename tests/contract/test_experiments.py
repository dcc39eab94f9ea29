"""Every file in conf/experiment/ composes and builds; the small ones train, resume exactly and draw."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from experiment_networks import FOLDER, networks
from PIL import Image
from safetensors.torch import load_file

from t2i import families
from t2i.config import parse_run, run_to_dict
from t2i.errors import ConfigError
from t2i.families.codec_run import newest_codec
from t2i.generation.text_to_image import draw
from t2i.interfaces import SampleRequest
from t2i.training import checkpoint, run_folder, state_folder
from t2i.training.pictures import save_png

EXPERIMENTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
SMALL = [name for name in EXPERIMENTS if "/tiny_" in name]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_composes_and_builds(name, compose_run):
    config = compose_run(f"experiment={name}")
    assert config.family in families.names()
    trained = [network for network in networks(config) if network.trained]
    count = sum(network.parameters for network in trained)
    assert count > 0
    assert any(network.hidden for network in trained) == config.model.takes_muon
    assert (count < 2_000_000) == (
        name in SMALL or "/small_" in name
    )  # small_*: for trials, too long for tests
    # One that takes over the optimizer of another recipe has an end of its own.
    assert config.optimizer.warmup_images <= config.trainer.num_images / 2


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_config_yaml_says_composes_the_same_run(name, compose_run, tmp_path):
    config = compose_run(f"experiment={name}")
    run_folder.write_config(tmp_path, run_to_dict(config))
    assert parse_run(run_folder.read_config(tmp_path), type(config.model)) == config


@pytest.mark.parametrize("name", ["autoencoder/tiny_vq", "sd-v1/512-v1-3"])
def test_arguments_come_before_the_experiment_and_that_before_the_stage(name, compose_run):
    config = compose_run(f"experiment={name}", "ema=none", "trainer.batch_size=3")
    assert config.ema is None
    assert config.trainer.batch_size == 3
    own = compose_run(f"experiment={name}")
    assert own.ema is not None
    assert own.resolution.size_px == {"autoencoder/tiny_vq": 32, "sd-v1/512-v1-3": 512}[name]


@pytest.fixture(scope="module")
def runs_dir(compose_run, train, tmp_path_factory):
    """Holds trained autoencoders for the generators to build on."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("tiny_vq", "tiny_kl"):
        train(compose_run(f"experiment=autoencoder/{name}", "trainer.num_images=16", f"runs_dir={folder}"))
    return folder


def trained(runs_dir: Path, part: str) -> Path | None:
    """The run that has a part which others build on."""
    return newest_codec(str(runs_dir), part)[0]


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without what is never the same twice."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")}
            for row in csv.DictReader(file)
        ]


def assert_same(one: object, other: object, path: str = "") -> None:
    """Bit for bit, through dictionaries and lists."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    else:
        assert one == other, path


@pytest.mark.parametrize("text", [[], ["text=minilm"]], ids=["own text", "minilm"])
@pytest.mark.parametrize("name", SMALL)
def test_a_plan_reads_the_features_that_the_stage_names(name, text, compose_run, runs_dir):
    """What `t2i plan --cached` leaves out is what `t2i data encode` makes."""
    config = compose_run(f"experiment={name}", f"runs_dir={runs_dir}")
    if config.model.text_encoder() is not None:
        config = compose_run(f"experiment={name}", f"runs_dir={runs_dir}", *text)
    stage = families.get(config.family).load_stage(config.stage)(config)
    features, planned = stage.features(), networks(config)
    assert any(turn.hidden for turn in stage.turns()) == config.model.takes_muon
    assert {network.cached_as for network in planned} - {None} == features.keys()
    assert not [network.name for network in planned if network.trained and network.cached_as]


@pytest.mark.parametrize("name", SMALL)
def test_trains_resumes_exactly_and_draws(name, compose_run, train, runs_dir, tmp_path):
    """Four steps at once equal two, found again by resume=latest, and two more."""
    arguments = [f"experiment={name}", "trainer.num_images=32", "trainer.checkpoint_every_images=16"]
    if (
        compose_run(f"experiment={name}").ema is not None
    ):  # an average that is not all but the weights themselves
        arguments += ["ema.half_life_images=32", "ema.rampup_ratio=null"]
    family = families.get(compose_run(f"experiment={name}").family)
    arguments += [f"builds_on.{key}={trained(runs_dir, part)}" for key, part in family.builds_on.items()]
    result = train(compose_run(*arguments, f"runs_dir={tmp_path / 'whole'}"))
    whole = result.folder
    assert result.complete
    assert result.images_seen == 32
    assert [path.name for path in run_folder.checkpoints(whole)] == ["step_0000002", "step_0000004"]
    assert [row["step"] for row in rows(whole)] == ["1", "2", "3", "4"]

    # What does not learn is in each checkpoint, and on the disk once.
    states = [load_file(each / state_folder.WEIGHTS) for each in run_folder.checkpoints(whole)]
    frozen = [each / state_folder.FROZEN for each in run_folder.checkpoints(whole)]
    assert [path.is_file() for path in frozen] == [bool(family.builds_on)] * 2
    if family.builds_on:
        assert frozen[0].samefile(frozen[1])
        assert load_file(frozen[0]).keys().isdisjoint(states[0])

    cut = tmp_path / "cut" / whole.parent.name / "stopped"
    gone = shutil.ignore_patterns("step_0000004", run_folder.FINAL_WEIGHTS, "samples")
    shutil.copytree(whole, cut, ignore=gone)
    resumed = train(compose_run(*arguments, f"runs_dir={tmp_path / 'cut'}", "resume=latest"))
    assert resumed.folder == cut
    assert rows(cut) == rows(whole)
    saved = [state_folder.read(folder / "checkpoints" / "step_0000004") for folder in (whole, cut)]
    for part in ("state_dict", "optimizer_states", "ema"):
        assert_same(saved[0].get(part), saved[1].get(part), part)
    assert_same(*(load_file(folder / run_folder.FINAL_WEIGHTS) for folder in (whole, cut)))
    pictures = [sorted((folder / "samples").iterdir()) for folder in (whole, cut)]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]] != []

    if family.generator is not None:
        loaded = checkpoint.load(run_folder.weights_file(cut))
        generator = families.get(loaded.config["family"]).load_generator()(loaded, "cpu")
        request = SampleRequest(
            prompts=["a red circle", "a blue star"],
            seeds=[0, 1],
            height_px=32,
            width_px=48,
        )
        has = {field.name for field in dataclasses.fields(generator.sampling)}
        quick = {key: value for key, value in {"steps": 2, "guidance_scale": 2.0}.items() if key in has}
        generator.sampling = dataclasses.replace(generator.sampling, **quick)
        try:
            images = draw(generator, request, batch_size=2, progress=lambda done: None)
        except ConfigError:  # of a model that draws one size alone
            request = dataclasses.replace(request, width_px=32)
            images = draw(generator, request, batch_size=2, progress=lambda done: None)
        assert images.shape == (2, 3, 32, request.width_px)
        assert images.isfinite().all()
        for i, image in enumerate(images):
            save_png(image, tmp_path / f"{i}.png")
            with Image.open(tmp_path / f"{i}.png") as picture:
                assert picture.size == (request.width_px, 32)


def test_a_text_transformer_learns_with_the_unet(compose_run, train, runs_dir, tmp_path):
    """LDM-1.45B's joint training, small: the text transformer moves, is saved, and is read back to draw with."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", "star", "a", "blue"]
    vocabulary += [f"[unused{i}]" for i in range(30_522 - len(vocabulary))]  # as many as BERT's
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    config = compose_run(
        *("experiment=latent_diffusion/tiny_unet_eps", "text=ldm_bert", f"text.model={tmp_path}"),
        *("text.width=32", "text.depth=1", "text.heads=1", "text.max_tokens=16", "trainer.num_images=64"),
        *(f"builds_on.codec={trained(runs_dir, 'codec')}", f"runs_dir={tmp_path}"),
    )
    folder = train(config).folder
    first, last = (
        "model.text.transformer.attn_layers.layers.0.1.to_q.weight",
        "model.text.transformer.norm.bias",
    )
    weights = load_file(folder / run_folder.FINAL_WEIGHTS)
    assert weights[first].shape == (64, 32)
    assert weights[last].abs().max() > 0  # starts at zero
    loaded = checkpoint.load(run_folder.weights_file(folder))
    generator = families.get(loaded.config["family"]).load_generator()(loaded, "cpu")
    read_back = generator.model.text.encoder.state_dict()  # behind the cache
    assert torch.equal(read_back[last.removeprefix("model.text.")], weights[last])
