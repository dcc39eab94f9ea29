import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from data_configs import data_config
from data_samples import good_members

from t2i.config import DataConfig


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[[str, Mapping[str, Mapping[str, bytes]]], Path]:
    """write_tar("00000.tar", {key: {extension: bytes}}) -> its path."""

    def write(name: str, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w") as archive:
            for key, members in samples.items():
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def shard(write_tar) -> Callable[..., Path]:
    """shard(3, samples=4): 00003.tar with the keys 000030000 ... 000030003."""

    def write(number: int, samples: int, first: int = 0) -> Path:
        content = {f"{number:05d}{i:04d}": good_members(100 * number + i) for i in range(first, samples)}
        return write_tar(f"{number:05d}.tar", content)

    return write


@pytest.fixture
def make_data(write_tar) -> Callable[..., DataConfig]:
    """make_data([4, 3], num_workers=2) -> shards of 4 and of 3 good samples, numbered throughout."""

    def make(shard_sizes: list[int], **options) -> DataConfig:
        paths, number = [], 0
        for shard, size in enumerate(shard_sizes):
            samples = {f"{shard:05d}{row:04d}": good_members(number + row) for row in range(size)}
            paths.append(str(write_tar(f"{shard:05d}.tar", samples)))
            number += size
        return data_config(shards=paths, **options)

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real shards of ../shared/data are not there")
    return folder
