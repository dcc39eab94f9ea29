"""The SLURM that these tests share; where there can be none, they are skipped with the reason."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from lab import CLUSTER, LAB, Slurm, needs


@pytest.fixture(scope="package")
def slurm(tmp_path_factory: pytest.TempPathFactory, shapes_overrides: list[str]) -> Iterator[Slurm]:
    if needs:
        pytest.skip(f"a SLURM for tests needs {needs}, not found here")
    lab = tmp_path_factory.mktemp("lab")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "conf" / "cluster").mkdir(parents=True)
    (folder / "conf" / "cluster" / "lab.yaml").write_text(CLUSTER)
    before = dict(os.environ)
    subprocess.run([LAB, "start", lab], check=True, timeout=60)
    os.environ["SLURM_CONF"] = str(lab / "slurm.conf")
    try:
        yield Slurm(folder, shapes_overrides)
    finally:
        subprocess.run(["scancel", "--user=root"], check=False, timeout=60)
        subprocess.run([LAB, "stop", lab], check=True, timeout=60)
        os.environ.clear()
        os.environ.update(before)
