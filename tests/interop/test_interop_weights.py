"""Reading weights without loading them, and writing them one at a time, with safetensors and torch as the oracles."""

from __future__ import annotations

import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2i.errors import CheckpointError
from t2i.interop.convert import Options, prepare
from t2i.interop.reading import SAFETENSORS_DTYPES, read_pickle, read_safetensors, read_weights
from t2i.interop.weights import fit, in_memory, stacked, stored
from t2i.interop.writing import write_safetensors

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
DTYPES = st.sampled_from(sorted(SAFETENSORS_DTYPES.values(), key=str))
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = math.prod(shape)
    return (torch.arange(count) * 37 % 251 - 100).to(dtype).reshape(shape)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        NAMES.filter(lambda n: n != "__metadata__"), st.tuples(SHAPES, DTYPES), min_size=1, max_size=6
    )
)
def test_safetensors_reads_what_is_written_and_the_other_way(tmp_path, entries):
    tensors = {name: numbers(*entry) for name, entry in entries.items()}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"t2i": "ü"})
    weights, metadata = read_safetensors(tmp_path / "theirs.safetensors")
    assert metadata == {"t2i": "ü"}
    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(weights[name].read(), tensor)
        assert (weights[name].shape, weights[name].dtype) == (tuple(tensor.shape), tensor.dtype)
    write_safetensors(tmp_path / "ours.safetensors", weights, torch.float32, metadata, lambda _: None)
    save_file(
        {n: t.float() if t.is_floating_point() and t.ndim else t for n, t in tensors.items()},
        tmp_path / "theirs.safetensors",
        metadata={"t2i": "ü"},
    )
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_the_file_of_a_model_is_byte_for_byte_that_of_safetensors(tmp_path):
    tensors = {f"layer.{i}.{kind}": torch.randn(i + 1, 3) for i in range(12) for kind in ("weight", "bias")}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    weights = {name: in_memory(value) for name, value in tensors.items()}
    write_safetensors(tmp_path / "ours.safetensors", weights, torch.float32, {"format": "pt"}, lambda _: None)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("zip_format", [True, False])
def test_pickles_are_read_as_torch_reads_them(tmp_path, zip_format):
    base = torch.randn(6, 8)
    saved = {
        "whole": base,
        "transposed": base.t(),
        "rows": base[2:4],
        "every_other": base[:, ::2],
        "expanded": base[:1].expand(5, 8),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(1.5),
        "half": base.half(),
        "count": torch.arange(4),
        "empty": torch.empty(0, 3),
        "inner": {"deep": base + 1},
        "epoch": 3,
    }
    path = tmp_path / "saved.ckpt"
    torch.save(saved, path, _use_new_zipfile_serialization=zip_format)
    read = read_pickle(path)
    assert read["epoch"] == 3
    for name, value in saved.items():
        if isinstance(value, torch.Tensor):
            actual = read[name].read()
            assert torch.equal(actual, value.detach()), name
            assert actual.dtype == value.dtype
    assert torch.equal(read["inner"]["deep"].read(), base + 1)
    assert "epoch" not in read_weights(path)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    """Whoever changes the file after the header was read sees the new numbers."""
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(4)}, path)
    weight = read_safetensors(path)[0]["w"]
    data = path.read_bytes()
    path.write_bytes(data[:-16] + torch.ones(4).numpy().tobytes())
    assert torch.equal(weight.read(), torch.ones(4))
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        weight.read()


def test_rows_stacks_and_shapes():
    tensor = torch.randn(6, 4)
    weight = in_memory(tensor)
    parts = [weight.rows(i, i + 2) for i in (0, 2, 4)]
    assert [part.shape for part in parts] == [(2, 4)] * 3
    assert torch.equal(stacked(parts).read(), tensor)
    assert stacked(parts).shape == (6, 4)
    assert torch.equal(weight.reshaped(6, 4, 1, 1).read()[..., 0, 0], tensor)
    assert weight.nbytes(torch.float16) == 48


@pytest.mark.parametrize(
    ("dtype", "values", "words"),
    [
        (torch.float16, [1.0, 70_000.0], "w has numbers up to 7e+04, too large for float16"),
        (torch.float16, [1.0, -70_000.0], "too large for float16"),
        (torch.bfloat16, [1.0, 3e38], None),
        (torch.bfloat16, [1.0, 3.4e38], "too large for bfloat16; allowed: --dtype fp32."),
    ],
)
def test_no_number_becomes_infinite(tmp_path, dtype, values, words):
    weights = {"w": in_memory(torch.tensor(values))}
    path = tmp_path / "x.safetensors"
    if words is None:
        write_safetensors(path, weights, dtype, {}, lambda _: None)
        assert torch.equal(load_file(path)["w"], torch.tensor(values).to(dtype))
    else:
        with pytest.raises(CheckpointError) as raised:
            write_safetensors(path, weights, dtype, {}, lambda _: None)
        assert words in str(raised.value)


def test_progress_adds_up_to_what_is_written(tmp_path):
    weights = {name: in_memory(torch.randn(5, 3)) for name in "abc"} | {"s": in_memory(torch.tensor(1.0))}
    done: list[int] = []
    write_safetensors(tmp_path / "x.safetensors", weights, torch.float16, {}, done.append)
    assert sorted(done) == [4, 30, 30, 30]


def test_fit_names_what_does_not():
    found = {name: in_memory(torch.zeros(2)) for name in ("a", "b", "c", "d", "e")}
    wanted = dict.fromkeys("vwxyz", (2,))
    with pytest.raises(CheckpointError) as raised:
        fit(found, wanted, Path("f"), "UNet")
    assert "5 weights [v, w, x, ...] are missing, 5 weights [a, b, c, ...] are unknown" in str(raised.value)
    with pytest.raises(CheckpointError, match=r"a has shape \(2,\); allowed: \(3,\)"):
        fit({"a": found["a"]}, {"a": (3,)}, Path("f"), "UNet")
    with pytest.raises(CheckpointError, match="a in f is stored as int8; allowed: float32"):
        fit({"a": in_memory(torch.zeros(2, dtype=torch.int8))}, {"a": (2,)}, Path("f"), "UNet")


def test_a_stride_that_repeats_one_number_is_not_believed_before_it_fits(tmp_path):
    """A tiny file can name a tensor of any size; it is compared with the model, not allocated."""
    path = tmp_path / "bomb.ckpt"
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path)
    weight = read_pickle(path)["w"]
    assert weight.shape == (10**6, 10**6)
    with pytest.raises(CheckpointError, match="shape"):
        fit({"w": weight}, {"w": (4,)}, path, "UNet")


def test_stored_reads_with_a_stride(tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(torch.arange(12, dtype=torch.float32).numpy().tobytes())
    weight = stored(path, 4, torch.float32, (2, 3), (1, 2))
    assert torch.equal(weight.read(), torch.tensor([[1.0, 3, 5], [2, 4, 6]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".old.ckpt"])
def test_numbers_that_are_not_finite_are_named_when_they_are_read(tmp_path, dtype, bad, suffix):
    path = tmp_path / f"x{suffix}"
    tensors = {"a": torch.zeros(3, 2, dtype=dtype), "b": torch.zeros(3, 2, dtype=dtype)}
    tensors["b"][1, 1] = bad
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=suffix == ".ckpt")
    read = read_weights(path)
    assert torch.equal(read["a"].read(), tensors["a"])
    for weight in (read["b"], read["b"].rows(1, 2), read["b"].reshaped(6)):
        with pytest.raises(CheckpointError, match=r"b in .*x.* has 1 numbers of 6 that are not finite"):
            weight.read()


def test_whole_numbers_are_finite(tmp_path):
    save_file({"n": torch.arange(3)}, tmp_path / "x.safetensors")
    assert torch.equal(read_weights(tmp_path / "x.safetensors")["n"].read(), torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("name", ["betas", "scale_factor"])
def test_schedule_and_scale_are_floating_numbers(pipeline_single, tmp_path, name, dtype):
    weights = load_file(pipeline_single)
    value = {"betas": torch.linspace(0.0001, 0.02, 500), "scale_factor": torch.tensor(1.0)}[name]
    save_file(weights | {name: value.to(dtype)}, tmp_path / "other.safetensors")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        CheckpointError, match=rf"{name} in .*other\.safetensors is stored as {kind}; allowed: float32"
    ):
        prepare(tmp_path / "other.safetensors", tmp_path / "x", Options(prediction="eps"))


def test_the_scale_of_a_run_is_a_floating_number(sd1_run, tmp_path):
    with safe_open(sd1_run / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = load_file(sd1_run / "model.safetensors")
    weights["model.codec.latent_scale"] = torch.tensor(True)
    save_file(weights, tmp_path / "ours.safetensors", metadata)
    with pytest.raises(
        CheckpointError, match=r"latent_scale in .*ours\.safetensors is stored as bool; allowed: float"
    ):
        prepare(tmp_path / "ours.safetensors", tmp_path / "x", Options())
