"""A server of pictures on this machine on which all goes wrong that goes wrong on the web, and downloads from it."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import re
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from aiohttp import web
from PIL import Image

from t2i_pipelines.downloading.download import DownloadOptions, Report, download
from t2i_pipelines.downloading.fetch import FetchLimits
from t2i_pipelines.tables import open_table


def encoded(kind: str = "JPEG", size: tuple[int, int] = (24, 16), seed: int = 0, **options) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size).save(buffer, kind, **options)
    return buffer.getvalue()


class Server:
    """What a URL's path says is what happens; `calls` counts the requests, `released` lets /wait/ go on."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.address, self.port = address, port
        self.calls: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.pictures: dict[str, bytes] = {}
        self.released = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.started = threading.Event()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        self.started.wait()

    def serve(self) -> None:
        app = web.Application()
        app.router.add_get("/{what}/{rest:.*}", self.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, self.address, self.port)
        self.loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self.started.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())

    def stop(self) -> None:
        self.released.set()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def url(self, path: str) -> str:
        return f"http://{self.address}:{self.port}/{path}"

    async def answer(self, request):
        self.calls[request.path.lstrip("/")] += 1
        self.agents.add(request.headers["User-Agent"])
        what, rest = request.match_info["what"], request.match_info["rest"]
        count = self.calls[request.path.lstrip("/")]
        if what == "status":
            return web.Response(status=int(rest))
        if what == "later" and count == 1:  # /later/503 fails once
            return web.Response(status=int(rest), headers={"Retry-After": "0"})
        if what == "busy":
            return web.Response(status=429, headers={"Retry-After": "3600"})
        if what == "loop":
            raise web.HTTPFound(f"/loop/{int(rest) + 1}")
        if what == "moved":
            raise web.HTTPFound("/ok/1" if rest == "here" else rest)
        if what == "hang":
            await asyncio.sleep(60)
        if what == "wait":
            while not self.released.is_set():
                await asyncio.sleep(0.01)
        if what == "endless":
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(bytes(1 << 16))
        if what == "zipped":
            headers = {"Content-Encoding": "gzip"}
            plain = bytes(50 << 20)
            return web.Response(
                body=b"not gzip" if rest == "badly" else gzip.compress(plain), headers=headers
            )
        if what == "cut":
            response = web.StreamResponse(headers={"Content-Length": "10000"})
            await response.prepare(request)
            await response.write(encoded()[:200])
            request.transport.close()
            return response
        if what == "half":
            return web.Response(body=encoded(size=(256, 256))[:-400])
        if what == "robots":
            return web.Response(body=encoded(), headers={"X-Robots-Tag": rest})
        if what == "html":
            return web.Response(text="<html>gone</html>", content_type="text/html")
        if what == "large":
            return web.Response(body=bytes(3 << 20))
        if what in self.pictures:
            return web.Response(body=self.pictures[what])
        kind = {"png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}.get(what, "JPEG")
        return web.Response(body=encoded(kind, seed=int(rest or 0)))


class CountingServer(Server):
    """Counts how many requests wait at once."""

    def __init__(self) -> None:
        self.waiting = self.busiest = 0
        super().__init__()

    async def answer(self, request):
        self.waiting += 1
        self.busiest = max(self.busiest, self.waiting)
        await asyncio.sleep(0.01)
        self.waiting -= 1
        return await super().answer(request)


def table_of(server: Server, folder: Path, paths: list[str | None], **columns: list) -> Path:
    urls = [path if path is None or re.match(r"\w+:", path) else server.url(path) for path in paths]
    captions = columns.pop("caption", [f"picture {i}" for i in range(len(paths))])
    path = folder / "table.parquet"
    pq.write_table(pa.table({"url": urls, "caption": pa.array(captions, pa.string()), **columns}), path)
    return path


def downloaded(table: Path, out: Path, report: Report | None = None, **options) -> Report:
    limits = FetchLimits(
        options.pop("timeout_s", 5.0), options.pop("max_mib", 2.0), options.pop("retries", 1)
    )
    chosen = DownloadOptions(**{"decoders": 0, "limits": limits, "allow_private_addresses": True, **options})
    opened = open_table(str(table), out / ".table")
    return download(opened, out, chosen, "url", "caption", lambda done: None, report)


def read(folder: Path) -> list[dict]:
    return list(wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False))


def rows(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def files(folder: Path) -> dict[str, bytes]:
    """Of each shard, without the times in its statistics."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    for name in found:
        if name.endswith(".json"):
            stats = json.loads(found[name])
            for key in ("duration", "start_time", "end_time"):
                del stats[key]
            found[name] = json.dumps(stats).encode()
    return found
