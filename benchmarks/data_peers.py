"""One contender of benchmarks/data.py in a process of its own: t2i, webdataset, datasets, litdata or streaming.

    python benchmarks/data_peers.py CONTENDER TASK '{"folder": ..., ...}'

prints one JSON line. Every contender delivers the same: batches of (B, 3, S, S) float32 in [-1, 1], B captions and B
parsed JSONs, shuffled; raw, the bytes of the picture, the caption and the JSON, sample after sample in one process.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # a peer's environment has no t2i; its decode.py needs none

from t2i.data.decode import decode_image, resize_and_crop

BATCH = 32
SHUFFLE_BUFFER = 1000  # samples, of those that shuffle with a buffer; what they recommend
SEED = 0
Decode = Callable[[Any], torch.Tensor]


class Usual:
    """JPEG or picture -> (3, S, S) uint8 as these libraries' documentation does it (torchvision's Resize and
    CenterCrop, whose default is the bilinear filter): full decode, resize, centre crop."""

    opens = False  # gets pictures where the library opens them

    def __init__(self, size_px: int) -> None:
        self.size_px = size_px

    def __call__(self, source: bytes | Image.Image) -> torch.Tensor:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
        image = image.convert("RGB")
        scale = self.size_px / min(image.size)
        width, height = (max(self.size_px, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size_px) // 2, (height - self.size_px) // 2
        image = image.crop((left, top, left + self.size_px, top + self.size_px))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Ours:
    """JPEG -> (3, S, S) uint8 as t2i does it."""

    opens = True

    def __init__(self, size_px: int) -> None:
        self.size_px = size_px, size_px

    def __call__(self, source: bytes) -> torch.Tensor:
        image, original = decode_image(source, "", self.size_px)
        return resize_and_crop(image, original, self.size_px)[0]


def collate(samples: Iterable[tuple[torch.Tensor, str, Any]]) -> tuple[torch.Tensor, list[str], list[Any]]:
    """The same lines as t2i's own."""
    pictures, captions, metadata = zip(*samples, strict=True)
    return torch.stack(pictures).float().div_(127.5).sub_(1.0), list(captions), list(metadata)


def tars(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.tar"))


def tar_samples(path: str) -> Iterator[dict[str, Any]]:
    """{"jpg": bytes, "txt": str, "json": str} of a shard; for conversions."""
    with tarfile.open(path) as archive:
        sample: dict[str, Any] = {}
        for member in archive:
            extension = member.name.rpartition(".")[2]
            data = archive.extractfile(member).read()  # type: ignore[union-attr]
            sample[extension] = data if extension == "jpg" else data.decode()
            if len(sample) == 3:
                yield sample
                sample = {}


class T2I:
    """folder: of the tar shards"""

    def __init__(self, folder: Path) -> None:
        from t2i.data import loader, stream
        from t2i.data_config import DataConfig

        self.loader, self.stream, self.config = loader, stream, DataConfig
        self.folder = folder

    def _data(self, workers: int) -> Any:
        return self.config(
            source=None,
            shards=tars(self.folder),
            caption_keys=["txt", "json:caption"],
            filter_by_size=True,
            num_workers=workers,
            cache_mib=0,
        )

    def batches(
        self, decode: Decode, size_px: int, workers: int, position: int = 0, min_original_px: int = 0
    ) -> Iterator[Any]:
        return iter(
            self.loader.build_loader(
                self._data(workers),
                size_px=size_px,
                batch_size=BATCH,
                text_dropout=0.1,
                min_original_px=min_original_px,
                seed=SEED,
                start_images=position,
            )
        )

    def raw(self) -> Iterator[Any]:
        """Every step of the loader but decoding and collating: slots, places, read-ahead, bytes."""
        stream = self.stream.build_stream(self._data(0), (256, 256), BATCH, 0, SEED)
        images = self.loader.CaptionedImages(self._data(0), stream, text_dropout=0.1, seed=SEED)
        (part,) = stream.parts
        for slots in self.stream.Positions(stream, 0, BATCH, 0, 1, None):
            images._prefetch(part, slots.epoch, slots.index)
            shards, places = part.reader.places(slots.index)
            for raw in part.reader.shards.read(list(zip(shards.tolist(), places.tolist(), strict=True))):
                yield raw.members["jpg"], raw.members["txt"], raw.members["json"]


class WebDataset:
    """webdataset with its shuffle buffer; to resume it can only skip what was read before."""

    def __init__(self, folder: Path) -> None:
        import webdataset

        self.wds, self.folder = webdataset, folder

    def _samples(self) -> Any:
        found = self.wds.WebDataset(tars(self.folder), shardshuffle=100, seed=SEED, nodesplitter=None)
        return found.shuffle(SHUFFLE_BUFFER)

    def batches(self, decode: Decode, size_px: int, workers: int, position: int = 0) -> Iterator[Any]:
        samples = self._samples()
        if position:
            samples = samples.slice(position, None)
        if decode.opens:  # type: ignore[attr-defined]
            samples = samples.to_tuple("jpg", "txt", "json").map_tuple(decode, bytes.decode, json.loads)
        else:
            samples = samples.decode("pil").to_tuple("jpg", "txt", "json").map_tuple(decode)
        samples = samples.batched(BATCH, collation_fn=collate)
        return iter(self.wds.WebLoader(samples, batch_size=None, num_workers=workers))

    def raw(self) -> Iterator[Any]:
        for sample in self._samples():
            yield sample["jpg"], sample["txt"], sample["json"]


class Datasets:
    """Hugging Face datasets, streaming from the same tar shards. JSON it parses in any case. Its state leaves out what
    is in the shuffle buffer: a resumed epoch lacks these samples, and near its end there are none left."""

    def __init__(self, folder: Path) -> None:
        import datasets

        self.datasets, self.folder = datasets, folder
        self.state = folder.with_name(f"{folder.name}-datasets.json")

    def _samples(self, opens: bool) -> Any:
        found = self.datasets.load_dataset(
            "webdataset", data_files={"train": tars(self.folder)}, split="train", streaming=True
        )
        if opens:
            found = found.cast_column("jpg", self.datasets.Image(decode=False))
        return found.shuffle(seed=SEED, buffer_size=SHUFFLE_BUFFER)

    def batches(self, decode: Decode, size_px: int, workers: int, position: int = 0) -> Iterator[Any]:
        samples = self._samples(decode.opens)  # type: ignore[attr-defined]
        if position:
            samples.load_state_dict(json.loads(self.state.read_text())[str(position)])

        def together(rows: list[dict[str, Any]]) -> Any:
            pictures = [row["jpg"]["bytes"] if decode.opens else row["jpg"] for row in rows]  # type: ignore[attr-defined]
            return collate(
                (decode(picture), row["txt"], row["json"])
                for picture, row in zip(pictures, rows, strict=True)
            )

        return iter(DataLoader(samples, BATCH, num_workers=workers, collate_fn=together))

    def raw(self) -> Iterator[Any]:
        for sample in self._samples(opens=True):
            yield sample["jpg"]["bytes"], sample["txt"], sample["json"]

    def save(self, positions: list[int]) -> None:
        samples = self._samples(opens=True)
        states = {}
        for count, _ in enumerate(samples, 1):
            if count in positions:
                states[count] = samples.state_dict()
        self.state.write_text(json.dumps(states))


class LitData:
    """litdata on its own chunks."""

    def __init__(self, folder: Path) -> None:
        import litdata

        class Samples(litdata.StreamingDataset):
            decode: Decode | None = None

            def __getitem__(self, index: Any) -> Any:
                sample = super().__getitem__(index)
                if self.decode is None:
                    return sample["jpg"], sample["txt"], sample["json"]
                return self.decode(sample["jpg"]), sample["txt"], json.loads(sample["json"])

        self.litdata, self.folder, self.dataset = litdata, folder, Samples
        self.chunks = folder.with_name(f"{folder.name}-litdata")
        self.state = folder.with_name(f"{folder.name}-litdata.json")

    def convert(self) -> None:
        self.litdata.optimize(
            tar_samples, tars(self.folder), str(self.chunks), num_workers=1, chunk_bytes="64MB"
        )

    def _loader(self, decode: Decode | None, workers: int) -> Any:
        samples = self.dataset(str(self.chunks), shuffle=True, seed=SEED)
        samples.decode = decode
        together = collate if decode is not None else list
        return self.litdata.StreamingDataLoader(
            samples, batch_size=BATCH, num_workers=workers, collate_fn=together
        )

    def batches(self, decode: Decode, size_px: int, workers: int, position: int = 0) -> Iterator[Any]:
        loader = self._loader(decode, workers)
        if position:
            loader.load_state_dict(json.loads(self.state.read_text())[str(position)])
        return iter(loader)

    def raw(self) -> Iterator[Any]:
        return iter(self.dataset(str(self.chunks), shuffle=True, seed=SEED))

    def save(self, positions: list[int]) -> None:
        loader = self._loader(None, 1)
        states = {}
        for count, _ in enumerate(loader, 1):
            if count * BATCH in positions:
                states[count * BATCH] = loader.state_dict()
        self.state.write_text(json.dumps(states))


class Streaming:
    """mosaicml-streaming on its own MDS shards."""

    def __init__(self, folder: Path) -> None:
        import streaming

        class Samples(streaming.StreamingDataset):
            decode: Decode | None = None

            def __getitem__(self, index: Any) -> Any:
                sample = super().__getitem__(index)
                if self.decode is None:
                    return sample["jpg"], sample["txt"], sample["json"]
                return self.decode(sample["jpg"]), sample["txt"], json.loads(sample["json"])

        streaming.base.util.clean_stale_shared_memory()
        self.streaming, self.folder, self.dataset = streaming, folder, Samples
        self.shards = folder.with_name(f"{folder.name}-streaming")

    def convert(self) -> None:
        columns = {"jpg": "bytes", "txt": "str", "json": "str"}
        with self.streaming.MDSWriter(out=str(self.shards), columns=columns, size_limit="64mb") as writer:
            for path in tars(self.folder):
                for sample in tar_samples(path):
                    writer.write(sample)

    def _samples(self, decode: Decode | None) -> Any:
        samples = self.dataset(local=str(self.shards), shuffle=True, shuffle_seed=SEED, batch_size=BATCH)
        samples.decode = decode
        return samples

    def batches(self, decode: Decode, size_px: int, workers: int, position: int = 0) -> Iterator[Any]:
        samples = self._samples(decode)
        loader = self.streaming.StreamingDataLoader(
            samples, batch_size=BATCH, num_workers=workers, collate_fn=collate
        )
        if position:
            loader.load_state_dict(samples.state_dict(position, from_beginning=True))
        return iter(loader)

    def raw(self) -> Iterator[Any]:
        return iter(self._samples(None))


CONTENDERS = {
    "t2i": T2I,
    "webdataset": WebDataset,
    "datasets": Datasets,
    "litdata": LitData,
    "streaming": Streaming,
}


def children() -> list[str]:
    """Identities of the processes that this one started."""
    return " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()


def cpu_s() -> float:
    """CPU seconds that this process and its readers have used."""
    found = 0
    for pid in ["self", *children()]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found += int(fields[11]) + int(fields[12])
    return found / os.sysconf("SC_CLK_TCK")


def rate(items: Iterator[Any], warm_up: int, count: int, batch: int = 1) -> dict[str, float]:
    """Samples per second, and CPU milliseconds per sample, of `count` samples after the first `warm_up`."""
    for _ in itertools.islice(items, warm_up // batch):
        pass
    used, began = cpu_s(), time.perf_counter()
    taken = batch * sum(1 for _ in itertools.islice(items, count // batch))
    took_s = time.perf_counter() - began
    if taken < count:
        raise SystemExit(f"only {taken} of {count} came")
    return {"per_s": taken / took_s, "cpu_ms": 1000 * (cpu_s() - used) / taken}


def resident_mib() -> float:
    """RSS of the readers."""
    found = 0.0
    for pid in children():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        found += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
    return found


def memory(batches: Iterator[Any], samples: int) -> list[tuple[int, float]]:
    """(samples read, RSS in MiB of the readers), 200 times in `samples` samples."""
    every = max(1, samples // BATCH // 200)
    return [
        (count * BATCH, resident_mib())
        for count, _ in enumerate(itertools.islice(batches, samples // BATCH - 1), 1)
        if count % every == 0
    ]


def main() -> None:
    """One task of one contender."""
    name, task, text = sys.argv[1:]
    options = json.loads(text)
    torch.set_num_threads(1)
    contender = CONTENDERS[name](Path(options["folder"]))
    answer: Any = None
    if task in ("convert", "save"):
        arguments = [options["positions"]] if task == "save" else []
        if hasattr(contender, task):
            getattr(contender, task)(*arguments)
    elif task == "raw":
        answer = rate(contender.raw(), options["warm_up"], options["count"])
    else:
        decode = (Ours if options["decode"] == "ours" else Usual)(options["size_px"])
        given = {key: options[key] for key in ("position", "min_original_px") if key in options}
        began = time.perf_counter()
        batches = contender.batches(decode, options["size_px"], options["workers"], **given)
        if task == "first":
            first = next(batches, None)
            answer = None if first is None else time.perf_counter() - began
        elif task == "decoded":
            answer = rate(batches, options["warm_up"], options["count"], BATCH)
        elif task == "memory":
            answer = memory(batches, options["samples"])
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
