"""Training from features that were computed before is training on the pictures themselves."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset as wds
from PIL import Image
from safetensors.torch import load

from t2i import families
from t2i.data.encoded import Record
from t2i.data.sources import Limits
from t2i.errors import ConfigError, DataError
from t2i.interfaces import Feature
from t2i.launch.ranks import Rank
from t2i.training.data import loader_from
from t2i.training.fit import fresh_start
from t2i_pipelines.encode import Encoder, Report, encode
from t2i_pipelines.shard_writer import png_sample, write_shards

# With v, the loss of the first step depends on the latents even where the network puts out zeros.
UNET = ["experiment=latent_diffusion/tiny_unet_v", "text=minilm", "text.max_tokens=16"]
ENOUGH = ["trainer.num_images=16", "trainer.log_every_steps=1", "resolution.text_dropout=0.3"]


ONE = Rank()


@pytest.fixture(scope="module")
def runs_dir(compose_run, train, tmp_path_factory) -> Path:
    """With a small autoencoder."""
    folder = tmp_path_factory.mktemp("runs")
    train(compose_run("experiment=autoencoder/tiny_kl", "trainer.num_images=16", f"runs_dir={folder}"))
    return folder


@pytest.fixture
def run_of(compose_run, runs_dir) -> Callable:
    def run_of(*overrides: str):
        return compose_run(*UNET, *ENOUGH, f"runs_dir={runs_dir}", *overrides)

    return run_of


def encode_for(config, out: Path, dtype="fp32", rank=ONE, text=True) -> Report:
    stage = families.get(config.family).load_stage(config.stage)(*fresh_start(config))
    features = {name: feature for name, feature in stage.features().items() if text or name != "text"}
    encoder = Encoder(
        features, torch.device("cpu"), dtype, config.trainer.batch_size, config.data.horizontal_flip
    )
    size = (config.resolution.size_px,) * 2
    return encode(encoder, config.data, size, 0, out, rank, lambda done, total: None)


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "options", [[], ["data.horizontal_flip=true"], ["data.num_workers=2"]], ids=["plain", "flip", "workers"]
)
def test_training_from_the_cache_is_training_online(run_of, train, tmp_path, options):
    online = run_of("name=online", *options)
    for dtype in ("fp32", "fp16"):
        report = encode_for(online, tmp_path / dtype, dtype)
        assert (report.encoded, report.bad) == (64, {})
    wanted = losses(train(online).folder)
    exact = losses(train(run_of("name=fp32", *options, f"data.encoded={tmp_path / 'fp32'}")).folder)
    half = losses(train(run_of("name=fp16", *options, f"data.encoded={tmp_path / 'fp16'}")).folder)
    assert exact == wanted  # every step, to the last bit
    assert half[0] == pytest.approx(wanted[0], rel=1e-3)
    assert half != wanted


def test_codes_are_kept_in_small_integers_and_train_the_same(compose_run, train, tmp_path):
    """Those of another codec are refused."""
    train(compose_run("experiment=autoencoder/tiny_vq", "trainer.num_images=16", f"runs_dir={tmp_path}"))
    typed = ("experiment=autoregressive/tiny_ar", "text=minilm", "text.max_tokens=16", *ENOUGH)
    online = compose_run(*typed, f"runs_dir={tmp_path}", "name=online")
    encode_for(online, tmp_path / "cache")
    assert Record.read(str(tmp_path / "cache"), Limits()).features.keys() == {"codes", "text"}
    shard = Path(online.data.shards[0])
    (kept, *_) = wds.WebDataset(str(tmp_path / "cache" / shard.parent.name / shard.name), shardshuffle=False)
    codes = load(kept["safetensors"])["codes"]
    assert (codes.dtype, codes.shape) == (torch.uint8, (8, 8))
    wanted = losses(train(online).folder)
    ahead = (*typed, f"runs_dir={tmp_path}", f"data.encoded={tmp_path / 'cache'}")
    assert losses(train(compose_run(*ahead, "name=ahead")).folder) == wanted
    train(
        compose_run(
            "experiment=autoencoder/tiny_vq", "trainer.num_images=8", f"runs_dir={tmp_path / 'other'}"
        )
    )
    with pytest.raises(
        DataError, match=r"holds codes made by .* \(hash \w{12}\), this run makes them by weights"
    ):
        train(compose_run(*ahead, f"builds_on.codec={tmp_path / 'other/autoencoder/latest'}"))


def test_latents_alone(run_of, train, tmp_path):
    encode_for(run_of(), tmp_path / "cache", text=False)
    assert Record.read(str(tmp_path / "cache"), Limits()).features.keys() == {"latents"}
    wanted = losses(train(run_of("name=again")).folder)
    assert losses(train(run_of("name=alone", f"data.encoded={tmp_path / 'cache'}")).folder) == wanted


def test_what_lies_in_a_shard_is_what_the_codec_and_the_text_encoder_say(run_of, tmp_path):
    config = run_of("data.horizontal_flip=true")
    encode_for(config, tmp_path / "cache")
    stage = families.get(config.family).load_stage(config.stage)(*fresh_start(config))
    latents, text = (stage.features()[name].make for name in ("latents", "text"))
    (picture, *_) = wds.WebDataset(config.data.shards[0], shardshuffle=False).decode("torchrgb")
    name = f"{Path(config.data.shards[0]).parent.name}/{Path(config.data.shards[0]).name}"
    (kept, *_) = wds.WebDataset(str(tmp_path / "cache" / name), shardshuffle=False)
    assert kept["__key__"] == picture["__key__"]
    tensors = load(kept["safetensors"])
    image = (picture["png"] * 2 - 1)[None]
    with torch.no_grad():
        for entry, pixels in (("moments", image), ("moments_flip", image.flip(-1))):
            torch.testing.assert_close(tensors[entry], latents(pixels)["moments"][0], rtol=1e-4, atol=1e-5)
        features = text([picture["txt"]])
    by_suffix = {name.partition(".")[2]: value for name, value in tensors.items() if "." in name}
    torch.testing.assert_close(by_suffix["tokens"], features["tokens"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_suffix["pooled"], features["pooled"][0], rtol=1e-4, atol=1e-4)
    assert by_suffix["mask"].bool().tolist() == features["mask"][0].bool().tolist()


def test_aspect_ratio_buckets(run_of, train, tmp_path):
    options = ["data.bucket_step_px=8", "data.max_aspect=3"]
    online = run_of("name=buckets", *options)
    encode_for(online, tmp_path / "cache")
    wanted = losses(train(online).folder)
    assert losses(train(run_of("name=kept", *options, f"data.encoded={tmp_path / 'cache'}")).folder) == wanted


def test_processes_share_the_work_and_a_restart_goes_on(run_of, shapes_shards, tmp_path):
    picture = Image.new("RGB", (32, 32), "green")
    write_shards((png_sample(picture, f"scene {i}", {}) for i in range(20)), tmp_path / "many", 5)
    config = run_of(f"data.shards='{tmp_path / 'many'}/{{00000..00003}}.tar'")
    out = tmp_path / "cache"
    first = encode_for(config, out, rank=Rank(0, 2))
    assert (first.encoded, first.shards, first.skipped) == (10, 2, 0)
    second = encode_for(config, out, rank=Rank(1, 2))
    assert (second.encoded, second.shards) == (10, 2)
    before = {path.name: path.read_bytes() for path in out.rglob("*.tar")}
    (out / "many/00002.tar").unlink()
    again = encode_for(config, out)
    assert (again.encoded, again.skipped) == (5, 3)
    assert {path.name: path.read_bytes() for path in out.rglob("*.tar")} == before
    assert not [path for path in out.rglob(".*") if path.is_file()]


def test_other_weights_are_refused_by_name(run_of, compose_run, train, tmp_path, runs_dir):
    encode_for(run_of(), tmp_path / "cache")
    record = json.loads((tmp_path / "cache" / "encoded.json").read_text())
    made_by = record["features"]["latents"]["made_by"]
    assert made_by.startswith(str(runs_dir / "autoencoder"))
    other = tmp_path / "other"
    train(
        compose_run("experiment=autoencoder/tiny_kl", "trainer.num_images=16", "seed=3", f"runs_dir={other}")
    )
    cached = f"data.encoded={tmp_path / 'cache'}"
    with pytest.raises(DataError, match=f"holds latents made by {made_by} .*hash .*encode again"):
        train(run_of(f"runs_dir={other}", cached))
    record["features"]["text"]["hash"] = "0" * 64
    (tmp_path / "cache" / "encoded.json").write_text(json.dumps(record))
    with pytest.raises(
        DataError, match=r"holds text made by minilm .*this run makes them by weights with hash"
    ):
        train(run_of(cached))
    with pytest.raises(DataError, match="holds features of text=000000000000, this command makes text="):
        encode_for(run_of(), tmp_path / "cache")


def test_other_settings_are_refused_by_name(run_of, train, tmp_path):
    encode_for(run_of(), tmp_path / "cache")
    cached = f"data.encoded={tmp_path / 'cache'}"
    with pytest.raises(DataError, match=r"was made with size_px=\(32, 32\), this run has size_px=\(64, 64\)"):
        train(run_of(cached, "resolution.size_px=64"))
    with pytest.raises(DataError, match="holds no mirrored pictures"):
        train(run_of(cached, "data.horizontal_flip=true"))
    with pytest.raises(ConfigError, match=r"data\.crop is 'random'; allowed: center where data\.encoded"):
        run_of(cached, "data.crop=random")
    with pytest.raises(DataError, match=r"which `t2i data encode` has not made"):
        train(run_of(f"data.encoded={tmp_path / 'nothing'}"))


def test_a_stage_on_pictures_refuses_them(compose_run, train, run_of, tmp_path):
    encode_for(run_of(), tmp_path / "cache")
    config = compose_run(
        "experiment=autoencoder/tiny_kl", f"data.encoded={tmp_path / 'cache'}", f"runs_dir={tmp_path}"
    )
    with pytest.raises(ConfigError, match="allowed: null for stage=autoencoder"):
        train(config)


def test_a_sample_that_was_not_encoded_is_counted(run_of, train, tmp_path):
    """Captions that changed, or samples that came later, since."""
    config = run_of()
    encode_for(config, tmp_path / "cache")
    folder = tmp_path / "cache" / Path(config.data.shards[0]).parent.name
    (folder / Path(config.data.shards[0]).name).unlink()
    (folder / Path(config.data.shards[0]).name.replace(".tar", ".index.npz")).unlink()
    with pytest.raises(DataError, match="a bad sample cannot be replaced"):
        train(run_of(f"data.encoded={tmp_path / 'cache'}"))


def test_features_of_other_pictures_under_the_same_keys_count(run_of, train, tmp_path):
    """As where shards were packed anew into the same folder, and what was encoded of the old ones is still there."""

    def write(colour: str, path: Path, captions: list[str]) -> None:
        pictures = [Image.new("RGB", (32, 32), colour)] * len(captions)
        made = (png_sample(picture, text, {}) for picture, text in zip(pictures, captions, strict=True))
        write_shards(made, path, len(captions))

    shards, cache = tmp_path / "shards", tmp_path / "cache"
    config = run_of(f"data.shards={shards}/00000.tar")
    write("green", shards, ["a scene"] * 8)
    encode_for(config, cache, text=False)
    (shards / "00000.tar").unlink()
    write("green", shards, ["other words"] * 8)
    cached = run_of(f"data.shards={shards}/00000.tar", f"data.encoded={cache}", "name=again")
    assert len(losses(train(cached).folder)) == 2  # the same pictures, and the captions are not encoded
    (shards / "00000.tar").unlink()
    write("#012345", shards, ["a scene"] * 8)
    with pytest.raises(DataError, match="damaged: "):
        train(dataclasses.replace(cached, name="other"))


def test_the_command(shapes_overrides, runs_dir, tmp_path):
    arguments = [*shapes_overrides, *UNET, f"runs_dir={runs_dir}"]
    command = [sys.executable, "-m", "t2i_cli.main", "data", "encode", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "64 samples are encoded in 1 shard in" in done.stdout
    assert f"data.encoded={tmp_path / 'out'}" in done.stdout
    done = subprocess.run(
        [*command, "--dtype", "fp32"], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "holds features of dtype=float16, this command makes dtype=float32" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["experiment=autoencoder/tiny_kl"], "stage is 'autoencoder'; allowed: a stage with a frozen"),
        (
            ["experiment=gan_int_cls/tiny_r1", "--features", "latents"],
            "--features is 'latents'; allowed: text for",
        ),
    ],
)
def test_what_a_stage_does_not_make_by_frozen_weights_is_refused(shapes_overrides, tmp_path, arguments, said):
    from t2i_cli.data.encode import run

    with pytest.raises(ConfigError, match=said):
        run([str(tmp_path / "out"), *arguments, *shapes_overrides])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gan_int_cls/tiny_r1", "pixel_diffusion/tiny_linear_x0_classifier"])
def test_text_alone_beside_pictures(compose_run, train, tmp_path, name):
    """What a stage reads of its pictures, mirrored and all, it reads still; the captions' features do not depend on the
    size."""
    options = [f"experiment={name}", "text=minilm", "text.max_tokens=16", "trainer.num_images=16"]
    options += ["resolution.text_dropout=0.3", "data.horizontal_flip=true", "trainer.log_every_steps=1"]

    def rows(*overrides: str) -> list[dict[str, str]]:
        folder = train(compose_run(*options, f"runs_dir={tmp_path}", *overrides)).folder
        with (folder / "metrics.csv").open(newline="") as file:
            timed = ("images_per_second", "seconds", "data_wait")
            return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]

    report = encode_for(compose_run(*options), tmp_path / "cache")
    assert (report.encoded, report.bad) == (64, {})
    cached = f"data.encoded={tmp_path / 'cache'}"
    assert rows("name=kept", cached) == rows("name=online")
    small = compose_run(*options, cached, "resolution.size_px=16")
    assert next(iter(loader_from(small))).image.shape[2:] == (16, 16)


def test_a_folder_that_an_older_version_encoded(run_of, train, tmp_path):
    """Its record had a key for each of the two features that there were; what is missing is encoded into it."""
    encode_for(run_of(), tmp_path / "cache")
    place = tmp_path / "cache/encoded.json"
    record = json.loads(place.read_text())
    features = record.pop("features")
    made_by = {"autoencoder": features["latents"]["made_by"], "text encoder": features["text"]["made_by"]}
    hashes = {"autoencoder": features["latents"]["hash"], "text": features["text"]["hash"]}
    place.write_text(json.dumps(record | hashes | {"made_by": made_by}))
    wanted = losses(train(run_of("name=new")).folder)
    assert losses(train(run_of("name=old", f"data.encoded={tmp_path / 'cache'}")).folder) == wanted
    again = encode_for(run_of(), tmp_path / "cache")
    assert (again.shards, again.skipped) == (0, 1)


@dataclasses.dataclass
class Codes:
    """Features of another kind than those of today's families."""

    def image(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        codes = (image.mean(1)[:, ::4, ::4] * 100).long()
        return {"codes": codes, "embedding": image.flatten(1)[:, :5]}

    def caption(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return {"length": torch.tensor([[len(caption)] for caption in captions])}


def test_features_of_any_kind_and_name_come_back_in_the_batch(run_of, tmp_path):
    config = run_of("data.horizontal_flip=true", "resolution.text_dropout=0.3", "data.cache_mib=1")
    made = Codes()
    of_image = Feature("image", ("codes", "embedding"), made.image, torch.nn.Identity(), dict, (), "codes")
    of_caption = Feature("caption", ("length",), made.caption, torch.nn.Identity(), dict, (), "counting")
    encoder = Encoder({"image": of_image, "counts": of_caption}, torch.device("cpu"), "fp32", 8, True)
    encode(encoder, config.data, (32, 32), 0, tmp_path / "cache", ONE, lambda done, total: None)
    data = dataclasses.replace(config.data, encoded=str(tmp_path / "cache"))
    loaders = loader_from(dataclasses.replace(config, data=data)), loader_from(config)
    for kept, read, _ in zip(*loaders, range(20), strict=False):
        assert kept.image.shape == (len(kept), 3, 0, 0)
        for name, value in (made.image(read.image) | made.caption(read.caption)).items():
            torch.testing.assert_close(kept.features[name], value, rtol=0, atol=0)
        assert kept.features.keys() == {"codes", "embedding", "length"}


def test_a_shard_above_the_working_folder_is_encoded_within_the_named_one(run_of, tmp_path, monkeypatch):
    """It was once written beside the folder, over the pictures themselves."""
    config = run_of()
    monkeypatch.chdir(Path(config.data.shards[0]).parent)
    before = Path(config.data.shards[0]).read_bytes()
    (tmp_path / "shards/deep").mkdir(parents=True)
    (tmp_path / "shards/00000.tar").write_bytes(before)
    monkeypatch.chdir(tmp_path / "shards/deep")
    data = dataclasses.replace(config.data, shards=["../00000.tar"])
    encode_for(dataclasses.replace(config, data=data), tmp_path / "shards/cache")
    assert (tmp_path / "shards/00000.tar").read_bytes() == before
    assert {path.name for path in (tmp_path / "shards/cache/shards").iterdir()} == {
        "00000.tar",
        "00000.index.npz",
        "00000.left_out.json",
    }


def test_keys_of_any_length_are_encoded_and_what_was_left_out_is_said_again(run_of, tmp_path):
    config = run_of()
    long = "ä" * 130
    with tarfile.open(tmp_path / "long.tar", "w") as new, tarfile.open(config.data.shards[0]) as old:
        for i, member in enumerate(old.getmembers()[:6]):
            content = old.extractfile(member).read() if i < 3 else b"no picture, no caption"
            member.name = f"{long}{i // 3}.{member.name.partition('.')[2]}"
            member.size, member.pax_headers = len(content), {}
            new.addfile(member, io.BytesIO(content))
    data = dataclasses.replace(config.data, shards=[str(tmp_path / "long.tar")])
    for encoded, skipped in ((1, 0), (0, 1)):
        report = encode_for(dataclasses.replace(config, data=data), tmp_path / "cache")
        assert (report.encoded, report.skipped, report.bad.total()) == (encoded, skipped, 1)
    next((tmp_path / "cache").rglob("*.left_out.json")).unlink()  # as older versions
    assert not encode_for(dataclasses.replace(config, data=data), tmp_path / "cache").bad


def test_where_nothing_can_be_written(run_of, tmp_path, monkeypatch):
    """What is finished stays, and a second call goes on."""
    config = run_of()
    shards = [tmp_path / f"in/{i}.tar" for i in range(2)]
    shards[0].parent.mkdir()
    for shard in shards:
        shard.write_bytes(Path(config.data.shards[0]).read_bytes())
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=[*map(str, shards)]))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        encode_for(config, tmp_path / "file/deep")
    (tmp_path / "cache/in/1.index.npz").mkdir(parents=True)  # in the way of the second
    with pytest.raises(IsADirectoryError, match=r"1\.index\.npz"):
        encode_for(config, tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache/in").iterdir()} == {
        "0.tar",
        "0.index.npz",
        "0.left_out.json",
        "1.index.npz",
    }
    (tmp_path / "cache/in/1.index.npz").rmdir()
    report = encode_for(config, tmp_path / "cache")
    assert (report.shards, report.skipped) == (1, 1)
    assert len(list((tmp_path / "cache/in").iterdir())) == 6
