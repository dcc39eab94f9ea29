from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interop_models import save_pipeline

from t2i.interop.convert import Options, prepare, write


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def pipeline_folder(
    request: pytest.FixtureRequest, sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small Stable Diffusion 1 or 2 as diffusers saves it."""
    if request.param == "sd1":
        return sd1_folder
    folder = tmp_path_factory.mktemp("diffusers") / request.param
    save_pipeline(folder, request.param)
    return folder


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "sd1"
    save_pipeline(folder, "sd1")
    return folder


@pytest.fixture(scope="session")
def sd1_run(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a run of ours. Not to be changed."""
    run = tmp_path_factory.mktemp("run") / "sd1"
    write(prepare(sd1_folder, run, Options()))
    return run


@pytest.fixture(scope="session")
def sd1_single(sd1_run: Path) -> Path:
    """The same as one file with CompVis' names."""
    single = sd1_run.with_name("sd1.safetensors")
    write(prepare(sd1_run, single, Options()))
    return single


@pytest.fixture(scope="session")
def pipeline_single(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Stable Diffusion 1 or 2 as one file with CompVis' names."""
    run = tmp_path_factory.mktemp("single") / "run"
    write(prepare(pipeline_folder, run, Options()))
    write(prepare(run, run.with_name("single.safetensors"), Options()))
    return run.with_name("single.safetensors")


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Path]:
    """Converts into a name in tmp_path, and gives that."""

    def convert(source: Path, name: str, **options: Any) -> Path:
        write(prepare(source, tmp_path / name, Options(**options)))
        return tmp_path / name

    return convert
