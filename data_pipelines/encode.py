"""Features ahead of training: each shard of pictures gets a shard of what training makes of its samples (see
`t2i.data.encoded` for the format)."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t2i.config import Precision
from t2i.data import encoded
from t2i.data.decode import BadSample
from t2i.data.encoded import EMPTY_CAPTION, FLIP, RECORD, Made, Record
from t2i.data.index import SUFFIX, ShardIndex
from t2i.data.reader import Sample, SampleReader, Wanted, preparation
from t2i.data.sources import Limits
from t2i.data_config import DataConfig
from t2i.errors import DataError
from t2i.files import written_whole
from t2i.interfaces import Feature, FeatureOf
from t2i.launch.ranks import Rank
from t2i.nn.precision import mixed

from .places import first_same

LEFT_OUT = ".left_out.json"  # beside an encoded shard: how many samples of the other are not in it, by cause
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Report:
    """encoded: samples; shards: written now; skipped: shards that were there; bad: samples that these lack, by cause"""

    encoded: int = 0
    shards: int = 0
    skipped: int = 0
    bad: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Encoder:
    """features: by name, their modules moved to `device` here; dtype: of what is kept; batch_size: pictures at a time;
    flip: mirrored pictures too; precision: the run's, in which a GPU computes"""

    features: Mapping[str, Feature]
    device: torch.device
    dtype: Literal["fp16", "fp32"]
    batch_size: int
    flip: bool
    precision: Precision = "32-true"

    def __post_init__(self) -> None:
        for feature in self.features.values():
            feature.module.to(self.device).eval()

    def record(self, data: DataConfig, size_px: tuple[int, int]) -> Record:
        return Record(
            preparation=preparation(data, size_px),
            features={
                name: Made(each.of, each.tensors, encoded.feature_hash(each), each.made_by)
                for name, each in self.features.items()
            },
            flip=self.flip,
            dtype=str(DTYPES[self.dtype]).removeprefix("torch."),
        )

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Pictures of one shape and their captions -> the tensors of each sample by name."""
        image = (
            torch.stack([sample.picture for sample in samples]).to(self.device).float().div_(127.5).sub_(1.0)
        )
        made: dict[str, Tensor] = {}
        for feature in self._of("image"):
            made |= self._make(feature, image)
            if self.flip:
                made |= {name + FLIP: value for name, value in self._make(feature, image.flip(-1)).items()}
        kept = self._kept(made, f"sample {samples[0].key}")
        captions = [list(sample.captions) for sample in samples]
        texts = self.of_captions([caption for each in captions for caption in each])
        return [
            {
                "size": torch.tensor([*sample.original_size, *sample.crop]),
                "bytes": torch.tensor(sample.picture_bytes),
                **{name: value[i].contiguous() for name, value in kept.items()},
                **{stored: texts[stored] for caption in own for stored in self._names(caption).values()},
            }
            for i, (sample, own) in enumerate(zip(samples, captions, strict=True))
        ]

    def of_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of captions by the names that they are stored under."""
        stored: dict[str, Tensor] = {}
        distinct = list(dict.fromkeys(captions))
        for some in (distinct[i : i + self.batch_size] for i in range(0, len(distinct), self.batch_size)):
            made: dict[str, Tensor] = {}
            for feature in self._of("caption"):
                made |= self._make(feature, some)
            kept = self._kept(made, f"caption {some[0][:40]!r}")
            for i, caption in enumerate(some):
                stored |= {name: kept[made_as][i] for made_as, name in self._names(caption).items()}
        return stored

    def _make(self, feature: Feature, given: Any) -> Mapping[str, Tensor]:
        with mixed(self.precision, self.device):
            return feature.make(given)

    def _of(self, kind: FeatureOf) -> list[Feature]:
        return [feature for feature in self.features.values() if feature.of == kind]

    def _names(self, caption: str) -> dict[str, str]:
        """What the tensors of a caption are stored under, by name."""
        prefix = encoded.caption_hash(caption)
        return {name: f"{prefix}.{name}" for feature in self._of("caption") for name in feature.tensors}

    def _kept(self, tensors: Mapping[str, Tensor], first: str) -> dict[str, Tensor]:
        """On the CPU, the floating ones as `dtype`."""
        dtype = DTYPES[self.dtype]
        kept = {name: x.to("cpu", dtype if x.is_floating_point() else None) for name, x in tensors.items()}
        for name, value in kept.items():
            if not value.isfinite().all():
                raise DataError(f"{name} of {first} or after it do not fit {self.dtype}; allowed: fp32.")
        return kept


def encode(
    encoder: Encoder,
    data: DataConfig,
    size_px: tuple[int, int],
    min_original_px: int,
    out: Path,
    rank: Rank,
    progress: Callable[[int, int], None],
) -> Report:
    """Writes one encoded shard for each shard of `data`, those that are there already excepted.

    rank: which of the processes this is; each takes its own shards, and none waits for another
    progress: called with samples done and samples to do, of this process
    Raises DataError where `out` holds what other weights or settings made.
    """
    data = dataclasses.replace(data, encoded=None, crop="center", cache_mib=0)
    reader = SampleReader(data, size_px, min_original_px if data.filter_by_size else 0, allow_pipes=True)
    names = [encoded.shard_name(reader.shards.url(shard)) for shard in range(len(reader.shards))]
    if same := first_same(names):
        one, other = (reader.shards.url(shard) for shard in same)
        raise DataError(
            f"{one} and {other} would both be encoded as {names[same[1]]}, by folder and name; encode one at a time."
        )
    _write_record(encoder, encoder.record(data, size_px), out)
    own = range(rank.rank, len(names), rank.world)
    todo = [shard for shard in own if not (out / names[shard]).exists()]
    report = Report(skipped=len(own) - len(todo))
    for shard in sorted(set(own) - set(todo)):
        report.bad.update(_left_out(out / names[shard]))
    total = int(reader.shards.sizes[todo].sum())
    done = 0
    with torch.inference_mode():
        for shard, reads in itertools.groupby(
            _read(reader, todo, encoder.batch_size), lambda read: read.shard
        ):
            path = out / names[shard]
            bad = Counter[str]()
            with (
                written_whole(path) as unfinished,
                written_whole(_beside(path, LEFT_OUT)) as unfinished_causes,
                written_whole(_beside(path, SUFFIX)) as unfinished_index,
            ):  # the tar comes last
                with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as tar:
                    for read in reads:
                        features = encoder(read.samples) if read.samples else []
                        for sample, tensors in zip(read.samples, features, strict=True):
                            _add(tar, f"{sample.key_in_shard}.safetensors", save(tensors))
                        report.encoded += len(read.samples)
                        bad.update(read.bad)
                        done += len(read.samples) + read.bad.total()
                        progress(done, total)
                unfinished_index.write_bytes(ShardIndex.scan(unfinished).to_bytes())
                unfinished_causes.write_text(json.dumps(bad))
            report.shards += 1
            report.bad.update(bad)
    return report


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name.removesuffix(".tar") + suffix)


def _left_out(path: Path) -> Counter[str]:
    """What an earlier start left out of a shard, by cause. Older versions did not write it down."""
    try:
        return Counter(json.loads(_beside(path, LEFT_OUT).read_text()))
    except (OSError, ValueError):
        return Counter()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _write_record(encoder: Encoder, record: Record, out: Path) -> None:
    """Every process writes the same; the first that comes later than a record checks it."""
    if (out / RECORD).exists():
        there, here = _facts(Record.read(str(out), Limits())), _facts(record)
        for name in there | here:
            old, new = there.get(name), here.get(name)
            if old != new:
                raise DataError(
                    f"{out} holds features of {name}={old}, this command makes {name}={new}; name another folder, or "
                    "remove it."
                )
        return
    for name, content in (
        (EMPTY_CAPTION, save(encoder.of_captions([""]))),
        (RECORD, record.to_json().encode()),
    ):
        with written_whole(out / name) as unfinished:
            unfinished.write_bytes(content)


def _facts(record: Record) -> dict[str, object]:
    """What a record says; of each feature the hash of the weights that make it."""
    hashes = {name: made.hash[:12] for name, made in record.features.items()}
    return {name: value for name, value in vars(record).items() if name != "features"} | hashes


@dataclass(frozen=True)
class _Read:
    """Samples of one shard and one shape, and how many could not be read, by cause."""

    shard: int
    samples: list[Sample]
    bad: Counter[str]


class _Chunks(Dataset[_Read]):
    """Decoded samples by (shard, their indices)."""

    def __init__(self, reader: SampleReader) -> None:
        self.reader = reader

    def __getitem__(self, chunk: tuple[int, list[int]]) -> _Read:
        shard, indices = chunk
        answers = self.reader.read([Wanted(index) for index in indices])
        bad = Counter(answer.cause for answer in answers if isinstance(answer, BadSample))
        return _Read(shard, [answer for answer in answers if isinstance(answer, Sample)], bad)


def _read(reader: SampleReader, shards: Sequence[int], batch_size: int) -> Iterator[_Read]:
    """Shard by shard, pictures of one shape together, decoded by data.num_workers processes."""
    chunks: list[tuple[int, list[int]]] = []
    for shard in shards:
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in range(int(reader.starts[shard]), int(reader.starts[shard + 1])):
            by_shape[reader.shape(index)].append(index)
        for same in by_shape.values():
            chunks += [(shard, same[i : i + batch_size]) for i in range(0, len(same), batch_size)]
    # An item of the dataset is a chunk, which nothing batches.
    yield from DataLoader(
        _Chunks(reader),
        sampler=chunks,
        batch_size=None,
        num_workers=reader.data.num_workers,
    )
