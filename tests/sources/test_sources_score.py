"""Scores of `t2i data score` against open_clip, transformers and the published heads used directly.

The weights are random and, where they are not the true ones, small; the files are laid out as the published ones.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import timm
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import nn
from torchvision import transforms

from t2i.errors import CheckpointError, ConfigError, DataError
from t2i_cli.data import score as verb
from t2i_pipelines import score as module
from t2i_pipelines.score import Rank, rank_of, score_shards
from t2i_pipelines.score_clip import load_clip
from t2i_pipelines.score_heads import HEADS, for_watermark_detector, load_head
from t2i_pipelines.scorer import ScorerFiles, load_scorer

WIDTH = 24
TINY = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    "quick_gelu": True,
}
CPU = torch.device("cpu")
ALONE = Rank()
SIZES = ((48, 40), (31, 97), (32, 32), (200, 121), (35, 64), (90, 33))


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "ViT-tiny-quickgelu.json").write_text(json.dumps(TINY))
    (folder / "ViT-tiny-other.json").write_text(json.dumps({**TINY, "embed_dim": 8}))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(open_clip.create_model("ViT-tiny-quickgelu").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def reference(weights):
    """(model, transform) as a user of open_clip has them."""
    model, _, transform = open_clip.create_model_and_transforms("ViT-tiny-quickgelu", pretrained=str(weights))
    return model.eval(), transform


def picture(size, seed=0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, samples=6, seed=0) -> Path:
    members = []
    for i in range(samples):
        members += [
            (f"{i:04d}.png", encoded(picture(SIZES[i % len(SIZES)], seed + i))),
            (f"{i:04d}.txt", f"picture number {i} of {seed}".encode()),
        ]
    return tar_of(path, members)


def linear_head(path: Path, width=WIDTH, seed=1) -> Path:
    torch.manual_seed(seed)
    torch.save(nn.Linear(width, 1).state_dict(), path)
    return path


def scored(
    files: ScorerFiles, *shards: Path, out=None, rank=ALONE, batch_size=4, progress=lambda share: None
):
    scorer = load_scorer(files, CPU)
    return score_shards([str(each) for each in shards], out, scorer, batch_size, 2, rank, progress)


def features(reference, images) -> torch.Tensor:
    model, transform = reference
    with torch.no_grad():
        found = model.encode_image(torch.stack([transform(image) for image in images]))
    return found / found.norm(dim=-1, keepdim=True)


def test_aesthetic_and_similarity_as_open_clip_used_directly(tmp_path, weights, reference):
    head = linear_head(tmp_path / "sa_0_4_vit_l_14_linear.pth")
    path = shard(tmp_path / "00000.tar", samples=6)
    files = ScorerFiles("ViT-tiny-quickgelu", str(weights), aesthetic=head, similarity=True)
    done: list[float] = []
    report = scored(files, path, progress=done.append)
    assert (report.scored, report.samples, dict(report.nulls)) == (1, 6, {})
    assert sum(done) == pytest.approx(1)
    table = parquet.read_table(tmp_path / "00000.scores.parquet")
    assert table.schema.names == ["key", "aesthetic", "similarity"]
    assert table.schema.field("aesthetic").type == pa.float32()
    assert table["key"].to_pylist() == [f"{i:04d}" for i in range(6)]

    found = features(reference, [picture(SIZES[i], i) for i in range(6)])
    state = torch.load(head, weights_only=True)
    expected = found @ state["weight"][0] + state["bias"]
    np.testing.assert_allclose(table["aesthetic"].to_numpy(), expected, atol=1e-5)
    with torch.no_grad():
        texts = reference[0].encode_text(open_clip.tokenize([f"picture number {i} of 0" for i in range(6)]))
    cosine = torch.nn.functional.cosine_similarity(found, texts)
    np.testing.assert_allclose(table["similarity"].to_numpy(), cosine, atol=1e-5)
    assert np.ptp(table["similarity"].to_numpy()) > 1e-3  # the pictures are told apart


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_prepared_as_published(size, weights, reference):
    image = picture(size)
    ours = load_clip("ViT-tiny-quickgelu", str(weights), CPU, with_text=False).preprocess(image)
    torch.testing.assert_close(ours, reference[1](image), atol=1e-5, rtol=0)
    published = transforms.Compose(  # LAION-5B-WatermarkDetection
        [
            transforms.Resize((256, 256)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    torch.testing.assert_close(for_watermark_detector(image), published(image), atol=1e-5, rtol=0)


def chain(numbers, widths, prefix="layers.") -> OrderedDict[str, torch.Tensor]:
    state = OrderedDict()
    for number, inputs, outputs in zip(numbers, widths, widths[1:], strict=False):
        state[f"{prefix}{number}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        state[f"{prefix}{number}.bias"] = torch.randn(outputs)
    return state


# Written out from the published code; the widths are the published ones but for the first.
def without_activations(s, x):
    for n in (0, 2, 4, 6, 7):
        x = x @ s[f"layers.{n}.weight"].T + s[f"layers.{n}.bias"]
    return x


def with_relu(s, x):
    for n in (0, 3, 6, 9):
        x = torch.clamp(x @ s[f"layers.{n}.weight"].T + s[f"layers.{n}.bias"], min=0)
    return x @ s["layers.11.weight"].T + s["layers.11.bias"]


def h14(s, x):
    for n in (0, 3, 6, 9, 12):
        x = torch.clamp(x @ s[f"layers.{n}.weight"].T + s[f"layers.{n}.bias"], min=0)
    for n in (15, 16):
        x = x @ s[f"layers.{n}.weight"].T + s[f"layers.{n}.bias"]
    return x


def autokeras(layers):
    def forward(s, x):
        x = (x - s["norm.mean"]) / (torch.sqrt(s["norm.variance"]) + 1e-10)
        for n in range(1, layers + 1):
            x = x @ s[f"linear_{n}.weight"].T + s[f"linear_{n}.bias"]
            x = torch.clamp(x, min=0) if n < layers else 1 / (1 + torch.exp(-x))
        return x

    return forward


PUBLISHED = {
    "linear": ((), (WIDTH, 1), lambda s, x: x @ s["weight"].T + s["bias"]),
    "MLP without activations": ((0, 2, 4, 6, 7), (WIDTH, 1024, 128, 64, 16, 1), without_activations),
    "MLP with ReLU": ((0, 3, 6, 9, 11), (WIDTH, 1024, 128, 64, 16, 1), with_relu),
    "H/14 NSFW": ((0, 3, 6, 9, 12, 15, 16), (WIDTH, 1024, 2048, 1024, 256, 128, 16, 1), h14),
    "L/14 NSFW": ((1, 2, 3, 4), (WIDTH, 64, 512, 256, 1), autokeras(4)),
    "B/32 NSFW": ((1, 2, 3), (WIDTH, 32, 32, 1), autokeras(3)),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_heads_as_published(tmp_path, name, suffix):
    from safetensors.torch import save_file

    assert PUBLISHED.keys() == {head.name for head in HEADS}
    torch.manual_seed(3)
    numbers, widths, published = PUBLISHED[name]
    if name == "linear":
        state = nn.Linear(WIDTH, 1).state_dict()
    else:
        state = chain(numbers, widths, "linear_" if numbers[0] else "layers.")
    if numbers and numbers[0]:
        state |= {"norm.mean": torch.randn(WIDTH), "norm.variance": torch.rand(WIDTH) + 0.1}
    path = tmp_path / f"head{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(dict(state), path)
    found, head = load_head(path, WIDTH)
    assert found == name
    inputs = torch.nn.functional.normalize(torch.randn(7, WIDTH), dim=-1)
    torch.testing.assert_close(head(inputs), published(state, inputs), atol=1e-5, rtol=1e-5)


class Evil:
    def __reduce__(self):
        return (os.system, ("exit 3",))


def test_heads_that_are_refused(tmp_path):
    linear_head(tmp_path / "wide.pth", width=768)
    torch.save(chain((0, 1, 2), (WIDTH, 8, 8, 1)), tmp_path / "unknown.pth")
    torch.save(chain((0, 2, 4, 6, 7), (WIDTH, 8, 8, 8, 9, 2)), tmp_path / "two.pth")
    torch.save({"weight": torch.zeros(1, WIDTH), "bias": Evil()}, tmp_path / "code.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, words in (
        ("wide", r"weight is \(1, 768\); allowed: \(1, 24\)"),
        (
            "unknown",
            r"holds layers\.0\.bias.*; allowed: weight and bias of one linear layer, or of the layers of",
        ),
        ("two", r"layers\.7\.weight is \(2, 9\); allowed: \(1, 9\)"),
        ("code", "cannot be read as weights"),
        ("list", "is a list; allowed: a state dict"),
        ("text", "cannot be read as weights"),
        ("absent", "cannot be read as weights"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_head(tmp_path / f"{name}.pth", WIDTH)


def test_watermarks_as_published_without_clip(tmp_path):
    torch.manual_seed(0)
    published = timm.create_model("efficientnet_b3", pretrained=False, num_classes=2)
    published.classifier = nn.Sequential(
        nn.Linear(in_features=1536, out_features=625),
        nn.ReLU(),
        nn.Dropout(p=0.3),
        nn.Linear(in_features=625, out_features=256),
        nn.ReLU(),
        nn.Linear(in_features=256, out_features=2),
    )
    torch.save(published.state_dict(), tmp_path / "watermark_model_v1.pt")
    path = shard(tmp_path / "00000.tar", samples=3)
    report = scored(ScorerFiles(watermark=tmp_path / "watermark_model_v1.pt"), path)
    assert report.samples == 3
    batch = torch.stack([for_watermark_detector(picture(SIZES[i], i)) for i in range(3)])
    with torch.no_grad():
        expected = torch.softmax(published.eval()(batch), dim=1)[:, 0]
    found = parquet.read_table(tmp_path / "00000.scores.parquet")["pwatermark"].to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="is not LAION's watermark detector"):
        scored(ScorerFiles(watermark=linear_head(tmp_path / "other.pt")), path)


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("transformers") / "clip"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=WIDTH,
        text_config={**shape, "eos_token_id": 49407},
        vision_config={**shape, "image_size": 32, "patch_size": 16},
    )
    CLIPModel(config).save_pretrained(folder)
    theirs = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): number for token, number in theirs.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)]
    CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split(" ")) for m in merges]).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": 32},
                "crop_size": {"height": 32, "width": 32},
                "resample": 3,
                "image_mean": [0.5, 0.4, 0.3],
                "image_std": [0.2, 0.3, 0.4],
            }
        )
    )
    return folder


def test_a_transformers_folder_as_transformers_uses_it(tmp_path, transformers_folder):
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    # Sizes whose margins are even: with odd ones transformers crops a pixel beside OpenAI.
    sizes = ((48, 32), (32, 64), (64, 128), (32, 32))
    members = []
    for i, size in enumerate(sizes):
        members += [(f"{i}.png", encoded(picture(size, i))), (f"{i}.txt", f"a picture, {i}".encode())]
    path = tar_of(tmp_path / "00000.tar", members)
    scored(ScorerFiles(str(transformers_folder), similarity=True), path)
    found = parquet.read_table(tmp_path / "00000.scores.parquet")["similarity"].to_numpy()

    model = CLIPModel.from_pretrained(transformers_folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(transformers_folder)
    tokenizer = CLIPTokenizer.from_pretrained(transformers_folder)
    pixels = processor([picture(s, i) for i, s in enumerate(sizes)], return_tensors="pt").pixel_values
    texts = tokenizer(
        [f"a picture, {i}" for i in range(4)], padding="max_length", max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(input_ids=texts.input_ids, pixel_values=pixels).logits_per_image
    np.testing.assert_allclose(found, logits.diag() / model.logit_scale.exp().item(), atol=1e-5)
    ours = load_clip(str(transformers_folder), None, CPU, with_text=False)
    for i, size in enumerate(sizes):
        torch.testing.assert_close(ours.preprocess(picture(size, i)), pixels[i], atol=1e-5, rtol=0)


def test_an_open_clip_folder_brings_its_own_preprocessing(tmp_path, weights):
    folder = tmp_path / "folder"
    folder.mkdir()
    preprocessing = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    config = {"model_cfg": TINY, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "open_clip_pytorch_model.bin").write_bytes(weights.read_bytes())
    clip = load_clip(str(folder), None, CPU, with_text=True)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image = picture((90, 40))
    torch.testing.assert_close(clip.preprocess(image), transform(image), atol=1e-5, rtol=0)
    assert clip.width == WIDTH
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.eval().encode_text(open_clip.tokenize(["x"])), dim=-1)
        torch.testing.assert_close(clip.text_features(["x"], CPU), expected, atol=1e-5, rtol=0)


def test_samples_without_a_score_are_null_and_counted(tmp_path, weights):
    whole = encoded(picture((40, 40)))
    path = tar_of(
        tmp_path / "00000.tar",
        [
            ("good.png", whole),
            ("good.txt", b"good"),
            ("broken.png", whole[: len(whole) // 2]),
            ("broken.txt", b"broken"),
            ("mute.png", whole),
            ("none.txt", b"no picture"),
            ("json.png", whole),
            ("json.json", b'{"caption": "from the JSON"}'),
            ("good.png", encoded(picture((40, 40), 9))),
        ],
    )
    head = linear_head(tmp_path / "head.pth")
    files = ScorerFiles("ViT-tiny-quickgelu", str(weights), aesthetic=head, similarity=True)
    report = scored(files, path)
    table = parquet.read_table(tmp_path / "00000.scores.parquet")
    assert table["key"].to_pylist() == ["good", "broken", "mute", "none", "json"]
    assert [value is None for value in table["aesthetic"].to_pylist()] == [False, True, False, True, False]
    assert [value is None for value in table["similarity"].to_pylist()] == [False, True, True, True, False]
    assert dict(report.nulls) == {"image": 2, "caption": 1, "duplicate": 1}


def test_what_is_there_is_not_made_again(tmp_path, weights, monkeypatch):
    path = shard(tmp_path / "00000.tar", samples=3)
    file = tmp_path / "00000.scores.parquet"
    clip = ("ViT-tiny-quickgelu", str(weights))
    first = linear_head(tmp_path / "first.pth", seed=1)
    assert scored(ScorerFiles(*clip, aesthetic=first), path).scored == 1
    before = parquet.read_table(file)["aesthetic"]
    counted = []
    real = module._score
    monkeypatch.setattr(module, "_score", lambda *args: counted.append(list(args[3])) or real(*args))

    assert scored(ScorerFiles(*clip, aesthetic=first), path).skipped == 1
    assert counted == []
    # a further column: the first is kept
    scored(ScorerFiles(*clip, aesthetic=first, similarity=True), path)
    assert counted.pop() == ["similarity"]
    assert parquet.read_table(file)["aesthetic"].equals(before)
    # other weights
    scored(ScorerFiles(*clip, aesthetic=linear_head(tmp_path / "second.pth", seed=2)), path)
    assert counted.pop() == ["aesthetic"]
    assert not parquet.read_table(file)["aesthetic"].equals(before)
    assert parquet.read_table(file).column_names == ["key", "similarity", "aesthetic"]
    # another shard under the same name
    shard(path, samples=2, seed=5)
    scored(ScorerFiles(*clip, similarity=True), path)
    assert counted.pop() == ["similarity"]
    assert parquet.read_table(file).column_names == ["key", "similarity"]
    assert len(parquet.read_table(file)) == 2
    # a file that is not whole
    file.write_bytes(file.read_bytes()[:-9])
    assert scored(ScorerFiles(*clip, similarity=True), path).scored == 1
    assert len(parquet.read_table(file)) == 2


def test_a_stop_leaves_whole_files_only(tmp_path, weights, monkeypatch):
    paths = [shard(tmp_path / f"{i:05d}.tar", samples=2, seed=i) for i in range(3)]
    files = ScorerFiles("ViT-tiny-quickgelu", str(weights), similarity=True)
    real = parquet.write_table

    def stops(table, where):
        if "00001" in str(where):
            Path(where).write_bytes(b"half")
            raise KeyboardInterrupt
        real(table, where)

    monkeypatch.setattr(parquet, "write_table", stops)
    with pytest.raises(KeyboardInterrupt):
        scored(files, *paths)
    assert [path.name for path in sorted(tmp_path.glob("0*.parquet"))] == ["00000.scores.parquet"]
    monkeypatch.setattr(parquet, "write_table", real)
    report = scored(files, *paths)
    assert (report.skipped, report.scored) == (1, 2)
    assert not list(tmp_path.glob(".*"))


def test_processes_share_the_shards(tmp_path, weights):
    paths = [shard(tmp_path / f"in/{i:05d}.tar", samples=1 + i % 2, seed=i) for i in range(5)]
    files = ScorerFiles("ViT-tiny-quickgelu", str(weights), similarity=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    scored(files, *paths, out=whole)
    reports = [scored(files, *paths, out=parts, rank=Rank(rank, 3)) for rank in range(3)]
    assert [report.scored for report in reports] == [2, 2, 1]
    assert len(list(whole.iterdir())) == 5
    for file in whole.iterdir():
        ours, theirs = parquet.read_table(parts / file.name), parquet.read_table(file)
        assert ours["key"].equals(theirs["key"])
        np.testing.assert_allclose(ours["similarity"], theirs["similarity"], atol=1e-6)
    # more processes than shards: nothing to do is no error
    assert scored(files, paths[0], out=tmp_path / "one", rank=Rank(3, 4)).scored == 0


def test_the_rank_in_each_environment():
    srun = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
    }
    assert rank_of({}) == Rank(0, 1, 0)
    assert rank_of({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Rank(3, 4, 1)
    assert rank_of(srun) == Rank(5, 8, 1)
    assert rank_of({**srun, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == Rank(
        0, 2, 0
    )  # torchrun in a step
    # sbatch's own script: SLURM counts it as task 0 of 8, but there are no seven others
    assert rank_of({k: v for k, v in {**srun, "SLURM_PROCID": "0"}.items() if k != "SLURM_STEP_ID"}) == Rank()
    with pytest.raises(ConfigError, match="allowed: whole numbers"):
        rank_of({"RANK": "x", "WORLD_SIZE": "4"})


def test_places_and_flags_that_are_refused(tmp_path, weights):
    one, two = shard(tmp_path / "a/00000.tar", samples=1), shard(tmp_path / "b/00000.tar", samples=1)
    clip = ("ViT-tiny-quickgelu", str(weights))
    similarity = ScorerFiles(*clip, similarity=True)
    with pytest.raises(ConfigError, match="would both have their scores in"):
        scored(similarity, one, two, out=tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"cannot be written beside s3://b/0\.tar; name a folder with --out"
    ):
        scored(similarity, "s3://b/0.tar")  # type: ignore[arg-type]
    (tmp_path / "no.tar").write_bytes(b"no tar file" * 100)
    report = scored(similarity, tmp_path / "no.tar", one, tmp_path / "absent.tar")
    assert [Path(url).name for url in report.unreadable] == ["no.tar", "absent.tar"]
    assert report.scored == 1
    with pytest.raises(DataError, match="None of 1 shards can be read"):
        scored(similarity, tmp_path / "no.tar")
    for files, words in (
        (ScorerFiles(), "No score is asked for"),
        (ScorerFiles(similarity=True), "--clip is not set"),
        (ScorerFiles("ViT-of-mine", "x", similarity=True), "--clip is 'ViT-of-mine'; allowed: a folder"),
        (ScorerFiles(str(tmp_path), "x", similarity=True), "--clip-weights is allowed with"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_scorer(files, CPU)
    (tmp_path / "siglip").mkdir()
    (tmp_path / "siglip/config.json").write_text('{"model_type": "siglip"}')
    for files, words in (
        (
            ScorerFiles("ViT-tiny-other", None, similarity=True),
            "--clip-weights is None; allowed with --clip ViT-tiny-other",
        ),
        (
            ScorerFiles("ViT-tiny-other", str(weights), similarity=True),
            "--clip ViT-tiny-other cannot be loaded",
        ),
        (ScorerFiles(str(tmp_path), None, similarity=True), "holds neither"),
        (ScorerFiles(str(tmp_path / "siglip"), similarity=True), "holds a 'siglip' model; allowed: 'clip'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_scorer(files, CPU)


def test_remote_shards(tmp_path, weights):
    import fsspec

    path = shard(tmp_path / "00007.tar", samples=2)
    with fsspec.open("memory://score/00007.tar", "wb") as file:
        file.write(path.read_bytes())
    files = ScorerFiles("ViT-tiny-quickgelu", str(weights), similarity=True)
    assert scored(files, "memory://score/00007.tar", out=tmp_path / "out").samples == 2  # type: ignore[arg-type]
    assert scored(files, "memory://score/00007.tar", out=tmp_path / "out").skipped == 1  # type: ignore[arg-type]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["00007.scores.parquet"]


def test_the_command(tmp_path, weights, capsys):
    path = shard(tmp_path / "[a].tar", samples=2)
    head = linear_head(tmp_path / "head.pth")
    arguments = [
        str(path),
        "--clip",
        "ViT-tiny-quickgelu",
        "--clip-weights",
        str(weights),
        "--aesthetic",
        str(head),
    ]
    verb.run(arguments)
    said = capsys.readouterr().out
    assert "aesthetic: linear" in said
    assert "Scored 2 samples of 1 shards" in said
    verb.run(arguments)
    assert "1 of 1 shards had their scores" in capsys.readouterr().out


@pytest.mark.slow
def test_the_true_size_in_the_published_files(tmp_path):
    """ViT-L/14, and the published heads' shapes, in other processes, as torchrun starts them."""
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("ViT-L-14-quickgelu")
    torch.save(model.half().state_dict(), tmp_path / "clip.pt")  # OpenAI's are halves, too
    model = model.float().eval()
    state = chain((0, 2, 4, 6, 7), (768, 1024, 128, 64, 16, 1))
    torch.save(state, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    for i in range(2):
        shard(tmp_path / f"{i:05d}.tar", samples=2, seed=i)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", "t2i"]
    command += ["data", "score", f"{tmp_path}/{{00000..00001}}.tar", "--clip", "ViT-L-14-quickgelu"]
    command += ["--clip-weights", str(tmp_path / "clip.pt")]
    command += ["--aesthetic", str(tmp_path / "sac+logos+ava1-l14-linearMSE.pth")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, check=True, env=environment, timeout=600)
    for i in range(2):
        found = parquet.read_table(tmp_path / f"{i:05d}.scores.parquet")["aesthetic"].to_numpy()
        expected = without_activations(
            state, features((model, transform), [picture(SIZES[n], i + n) for n in range(2)])
        )
        np.testing.assert_allclose(found, expected.flatten(), atol=1e-3)
