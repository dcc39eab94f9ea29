"""`t2i ...` in this process, as a person would type it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from weight_files import composed, write

from t2i_cli.main import main


@dataclass(frozen=True)
class Outcome:
    """Exit code, and what was written."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line on stderr of a command that a person has to mend."""
        assert self.code == 2, self
        assert "Traceback" not in self.out + self.err, self.err
        (line,) = self.err.splitlines()
        return line


T2I = Callable[..., Outcome]


@pytest.fixture
def t2i(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[T2I]:
    """Runs `t2i *arguments` in an empty folder, with an empty cache of embedded data."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("T2I_TRACEBACK", raising=False)
    environment = dict(os.environ)
    loggers = [logging.getLogger(name) for name in (None, "t2i", "lightning.pytorch")]
    before = [(logger.level, logger.handlers, logger.propagate) for logger in loggers]

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["t2i", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        written = capsys.readouterr()
        return Outcome(code, written.out, written.err)

    yield run
    # The command line owns its process: what it set would reach the tests after this one.
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.level, logger.handlers, logger.propagate = level, handlers, propagate


@pytest.fixture(scope="session")
def ldm_file(tmp_path_factory) -> str:
    """A latent diffusion model at its random start, as its final weights file."""
    from t2i.config import parse_run
    from t2i.families.latent_diffusion.config import Config
    from t2i.families.latent_diffusion.stage import build_model

    codec = composed("stage=autoencoder", "backbone.width=32", "backbone.depth=1")
    values = composed(
        "stage=ldm", "text=learned", "denoiser.width=32", "denoiser.depth=1", "sampling.steps=2"
    )
    torch.manual_seed(0)
    model = build_model(parse_run(values, Config).model, codec)
    weights = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    return write(tmp_path_factory.mktemp("ldm") / "ldm.safetensors", weights, values, {"codec": codec})
