"""The HTTP API, described in docs/serving.md: what is to be drawn in, how far it is and pictures out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from t2i.errors import ConfigError, UserError, system_sentence
from t2i.schema import check, parse, to_dict
from t2i.serving.gallery import Kept
from t2i.serving.queue import Job, QueueFull
from t2i.serving.service import Service
from t2i.serving.wanted import Wanted

RETRY_S = 5
MAX_LISTED = 1000


def build(service: Service) -> FastAPI:
    """The application, without its page."""
    app = FastAPI(title="t2i", openapi_url=None)  # no page of FastAPI's own, which loads from elsewhere

    @app.exception_handler(UserError)
    async def refuse(_: Request, error: UserError) -> Response:
        if isinstance(error, QueueFull):
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": str(RETRY_S)})
        said = str(error).encode(errors="backslashreplace").decode()  # JSON can spell what UTF-8 cannot
        return JSONResponse({"error": said}, 422)

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        """Its traceback goes to the server's log."""
        said = system_sentence(error) if isinstance(error, OSError) else f"A fault of the server: {error!r}."
        return JSONResponse({"error": said}, 500)

    @app.exception_handler(404)
    async def unknown(request: Request, _: Exception) -> Response:
        return JSONResponse({"error": f"There is nothing at {request.url.path}."}, 404)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return JSONResponse({"error": "The body is too long."}, 413)

    @app.post("/api/generate")
    async def generate(request: Request) -> Response:
        wanted = parse(Wanted, await body(request))
        job = await run_in_threadpool(service.ask, wanted)
        return JSONResponse(described(service, job), 202)

    @app.get("/api/jobs/{id}")
    async def look(id: str) -> Response:
        return answered(service, service.queue.get(id))

    @app.delete("/api/jobs/{id}")
    async def stop(id: str) -> Response:
        if (job := service.queue.get(id)) is not None:
            service.queue.stop(job)
        return answered(service, job)

    @app.get("/api/pictures/{name}")
    def picture(name: str) -> Response:
        return FileResponse(service.gallery.get(name).path, media_type="image/png")

    @app.get("/api/gallery")
    def gallery(text: str = "", like: str = "", limit: str = "100") -> Response:
        check(
            limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_LISTED,
            "limit",
            limit,
            f"1 to {MAX_LISTED}",
        )
        check(not (text and like), "like", like, "only without text")
        if like:
            found = service.gallery.like(service.gallery.get(like), int(limit))
        else:
            found = service.gallery.search(text, int(limit))
        return JSONResponse({"pictures": [listed(each) for each in found]})

    @app.get("/api/model")
    async def model() -> Response:
        return JSONResponse(
            {
                "checkpoint": service.recipe["checkpoint"],
                "size_px": service.generator.default_size_px,
                "sampling": to_dict(service.usual),
                "limits": to_dict(service.limits),
            }
        )

    known = [each for each in app.routes if isinstance(each, Route)]

    @app.api_route("/api/{rest:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    async def nothing(request: Request) -> Response:
        """Before the page, which answers all addresses that are left."""
        there = [each for each in known if each.matches(request.scope)[0] is Match.PARTIAL]
        if not there:
            return JSONResponse({"error": f"There is nothing at {request.url.path}."}, 404)
        allowed = ", ".join(sorted({method for each in there for method in each.methods or ()}))
        said = f"{request.method} {request.url.path} is not known; allowed: {allowed}."
        return JSONResponse({"error": said}, 405, {"Allow": allowed})

    return app


async def body(request: Request) -> dict[str, Any]:
    """Raises ConfigError for what is not a JSON object that is said to be one: a page from elsewhere can send other
    kinds of bodies without being asked, but not this one."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    check(kind == "application/json", "Content-Type", kind, "application/json")
    try:
        values = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The body is not JSON: {error}.") from error
    check(isinstance(values, dict), "The body", type(values).__name__, "a JSON object")
    return values


def answered(service: Service, job: Job | None) -> Response:
    if job is None:
        return JSONResponse({"error": "There is no such job, or it ended long ago."}, 404)
    return JSONResponse(described(service, job))


def described(service: Service, job: Job) -> dict[str, Any]:
    """A job as the API shows it."""
    return {
        "id": job.id,
        "state": job.state,
        "ahead": service.queue.ahead(job),
        "step": job.step,
        "steps": job.steps,
        "pictures": [address(path) for path in job.pictures],
        "error": job.error,
        "note": job.note,
    }


def listed(each: Kept) -> dict[str, Any]:
    return {"picture": address(each.path), "recipe": each.recipe}


def address(path: Path) -> str:
    """Of a picture, at this server."""
    return f"/api/pictures/{quote(path.name)}"
