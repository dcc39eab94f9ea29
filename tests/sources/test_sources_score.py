"""Scores of `t2i data score` are right, made once, shared out, and null where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import timm
import torch
from score_files import (
    CPU,
    SIZES,
    chain,
    encoded,
    features,
    linear_head,
    picture,
    scored,
    shard,
    tar_of,
    tiny_reference,
    tiny_weights,
    without_activations,
)
from torch import nn

from t2i.errors import CheckpointError, ConfigError, DataError
from t2i.launch.ranks import Rank
from t2i_cli.data import score as verb
from t2i_pipelines.scoring import score as module
from t2i_pipelines.scoring.heads import for_watermark_detector
from t2i_pipelines.scoring.scorer import ScorerFiles, load_scorer


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def reference(weights):
    return tiny_reference(weights)


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
    with pytest.raises(CheckpointError, match=r"is not LAION.s watermark_model_v1\.pt"):
        scored(ScorerFiles(watermark=linear_head(tmp_path / "other.pt")), path)


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
    again = scored(files, path)
    assert (again.skipped, again.nulls) == (1, report.nulls)
    other = scored(
        ScorerFiles("ViT-tiny-quickgelu", str(weights), aesthetic=linear_head(tmp_path / "b.pth", seed=7)),
        path,
    )
    assert (other.scored, other.nulls) == (1, report.nulls)  # captions too, whose similarity stays


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

    written = []

    def stops(table, file):
        written.append(table)
        if len(written) == 2:
            file.write(b"half")
            raise KeyboardInterrupt
        real(table, file)

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


def test_places_and_flags_that_are_refused(tmp_path, weights):
    one, two = shard(tmp_path / "a/00000.tar", samples=1), shard(tmp_path / "b/00000.tar", samples=1)
    clip = ("ViT-tiny-quickgelu", str(weights))
    similarity = ScorerFiles(*clip, similarity=True)
    with pytest.raises(
        ConfigError,
        match=r"a/00000\.tar and .*b/00000\.tar would both have .*out/00000\.scores\.parquet; name one",
    ):
        scored(similarity, one, two, out=tmp_path / "out")
    with pytest.raises(
        ConfigError,
        match=r"What is made of s3://b/0\.tar cannot be written beside it; name a folder with --out",
    ):
        scored(similarity, "s3://b/0.tar")  # type: ignore[arg-type]
    (tmp_path / "no.tar").write_bytes(b"no tar file" * 100)
    report = scored(similarity, tmp_path / "no.tar", one, tmp_path / "absent.tar")
    assert [Path(url).name for url in report.unreadable] == ["no.tar", "absent.tar"]
    assert report.scored == 1
    with pytest.raises(DataError, match="None of 1 shard can be read"):
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
    assert "Scored 2 samples of 1 shard on" in said
    verb.run(arguments)
    assert "1 of 1 shard had their scores" in capsys.readouterr().out


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
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [f"--log-dir={tmp_path / 'logs'}", "--no-python", "t2i"]
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
