"""Servers on this machine that hold shards, one of them badly."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `folder` with ranges. `trouble`: part of a path -> what goes wrong there: "404", "403", "hang" (no
    answer), "drop" (the connection ends in the middle, each time), "drop_once" (only the first time), "503_twice" (of
    each path), "no_ranges"."""

    folder: Path
    asked: list[str]
    trouble: dict[str, str]
    seen: set[str]
    stopped: threading.Event

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        trouble = next((what for part, what in self.trouble.items() if part in path), "")
        file = self.folder / path.lstrip("/")
        if trouble == "hang":
            self.stopped.wait(30)
            return
        if trouble in ("404", "403") or not file.is_file():
            self.send_error(int(trouble or 404))
            return
        if trouble == "503_twice" and self.asked.count(f"{self.command} {path}") <= 2:
            self.send_error(503)
            return
        content = file.read_bytes()
        start, stop = 0, len(content)
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranged and trouble != "no_ranges":
            start, stop = int(ranged[1]), min(len(content), int(ranged[2] or len(content)) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        if trouble != "no_ranges":
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not body:
            return
        part = content[start:stop]
        if trouble == "drop" or (trouble == "drop_once" and path not in self.seen):
            self.seen.add(path)
            part = part[: len(part) // 2]
        self.wfile.write(part)
        if len(part) < stop - start:
            self.wfile.flush()
            time.sleep(0.05)
            self.connection.close()


@contextmanager
def web_server(folder: Path) -> Iterator[tuple[str, type[Handler]]]:
    """Its URL, and the handler: what was asked, and what is to go wrong."""

    class Own(Handler):
        asked: list[str] = []  # noqa: RUF012
        trouble: dict[str, str] = {}  # noqa: RUF012
        seen: set[str] = set()  # noqa: RUF012
        stopped = threading.Event()

    Own.folder = folder
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", Own
    finally:
        Own.stopped.set()
        server.shutdown()
        server.server_close()
