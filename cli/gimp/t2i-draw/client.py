"""Asks a `t2i serve` to draw: docs/serving.md. Of the standard library alone, as GIMP's own Python has no more."""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

LOOK_S = 0.2  # between two looks at how far a job is


class Refused(Exception):
    """The server's own sentence, or that there is none."""


UNIT_PX = 64  # of height and width, which all of the field's models take


def size_for(model: Mapping[str, Any], width: int, height: int) -> tuple[int, int]:
    """(width, height) to draw a canvas at: its shorter side as long as the model's pictures, both whole units.

    model: the answer of GET /api/model
    """
    unit = min(UNIT_PX, model["size_px"])
    most = max(model["limits"]["max_side_px"] // unit * unit, unit)
    scale = model["size_px"] / min(width, height)
    return tuple(min(max(round(side * scale / unit), 1) * unit, most) for side in (width, height))


class Client:
    """address: of the server, such as http://127.0.0.1:7860; token: where it asks for one"""

    def __init__(self, address: str, token: str = "") -> None:
        self.address, self.token = address.rstrip("/"), token
        # No proxy: the server is this machine, or one that the person names.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def model(self) -> dict[str, Any]:
        """What the server draws with. Raises Refused."""
        return json.loads(self.ask("GET", "/api/model"))

    def draw(
        self,
        wanted: Mapping[str, Any],
        image: bytes | None = None,
        mask: bytes | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> list[bytes]:
        """PNG files. wanted: the body of POST /api/generate; image, mask: picture files; progress: called again and
        again with the share of steps that are done, from 0 to 1. Raises Refused."""
        files = {"image": image, "mask": mask}
        given = {key: base64.b64encode(file).decode() for key, file in files.items() if file is not None}
        job = json.loads(self.ask("POST", "/api/generate", {**wanted, **given}))
        try:
            while job["state"] in ("waiting", "drawing"):
                progress(job["step"] / job["steps"] if job["steps"] else 0.0)
                time.sleep(LOOK_S)
                job = json.loads(self.ask("GET", f"/api/jobs/{job['id']}"))
        except BaseException:  # the person gave up
            self.ask("DELETE", f"/api/jobs/{job['id']}")
            raise
        if job["state"] != "done":
            raise Refused(job["error"] or "It was stopped.")
        return [self.ask("GET", path) for path in job["pictures"]]

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.address + path, data, headers, method=method)
            with self.opener.open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(_sentence(error.read()) or f"{self.address} answers {error.code}.") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Refused(f"{self.address} cannot be reached: {reason}.") from error


def _sentence(body: bytes) -> str | None:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return None
