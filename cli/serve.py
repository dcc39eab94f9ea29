"""`t2i serve`: a page and an HTTP API that draw with a trained model."""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2i.errors import UserError
from t2i.schema import check

from .arguments import Parser, parse_with_overrides

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from t2i.serving.gallery import Features

MAX_PX = 16_384


def run(arguments: list[str]) -> None:
    """Loads, listens, and draws what is asked for until Ctrl-C."""
    options, overrides = parse_with_overrides(parser(), arguments)
    check(options.checkpoint != "", "--checkpoint", "", "a run folder or a file of weights")
    check(options.out != "", "--out", "", "a folder")
    check(0 <= options.port <= 65_535, "--port", options.port, "0 to 65535; 0 takes any that is free")
    for flag, most in {
        "max_side": MAX_PX,
        "max_images": 1000,
        "max_waiting": 10_000,
        "batch_size": 1000,
    }.items():
        value = getattr(options, flag)
        check(1 <= value <= most, "--" + flag.replace("_", "-"), value, f"1 to {most:,}")
    ok = options.token is None or re.fullmatch(r"[A-Za-z0-9_.~-]+", options.token)
    check(bool(ok), "--token", options.token, "letters and digits of ASCII, and _ . ~ -")
    with listening(options.host, options.port) as taken:
        # Heavy imports only now: a wrong flag, or a port in use, is reported at once.
        serve(options, overrides, taken)


def serve(options: argparse.Namespace, overrides: list[str], taken: socket.socket) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would ask another machine at once
    try:
        import uvicorn

        from t2i.serving import api, page
    except ImportError as error:
        raise UserError(f"The page needs {error.name}: `pip install 't2i[serve]'` brings it.") from error
    from t2i.generation.batch_size import BatchSize
    from t2i.generation.names import check_folder
    from t2i.launch.ranks import ALONE
    from t2i.serving.gallery import NETWORKS
    from t2i.serving.guard import Guard, is_loopback
    from t2i.serving.service import Service, features_at_hand
    from t2i.serving.wanted import Limits
    from t2i.text.tokens import token_counter

    from .console import console
    from .generators import device_named, load, weights_path

    folder = Path(options.out)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = device_named(options.device, ALONE)
    features = features_at_hand() if options.clip is None else clip_features(options.clip, device)
    loaded = load(weights_path(options.checkpoint, options.runs_dir), device, overrides)
    limits = Limits(options.max_side, options.max_images, options.max_waiting)
    if features is None:
        console.print(f"The gallery is searched by words alone; by more with {NETWORKS}.")
    token = options.token
    if token is None and not is_loopback(options.host):
        token = secrets.token_urlsafe(16)
    recipe = {
        "checkpoint": str(loaded.path),
        "weights": loaded.weights,
        "precision": loaded.generator.precision,
    }
    batch_size = BatchSize(options.batch_size, device)
    tokens = None if loaded.text is None else token_counter(loaded.text)
    service = Service(loaded.generator, loaded.sampling, recipe, folder, limits, batch_size, features, tokens)
    host, port = taken.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/" + (f"?token={token}" if token else "")
    with tempfile.TemporaryDirectory(prefix="t2i-serve-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        app = Guard(page.mount(api.build(service), service), token, limits.max_bytes, f"t2i_token_{port}")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        console.print(f"Drawing with {loaded.path}; the pictures go to {folder}. Ctrl-C ends.")
        console.print(address)
        # The server stops by itself and then raises the signal again, which would end this process at once.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            server.run(sockets=[taken])
        finally:
            service.queue.close()


def clip_features(folder: str, device: torch.device) -> Features:
    """By which a text finds what pictures show. Raises CheckpointError, or ConfigError, for a folder without a CLIP."""
    import torch
    from PIL import Image

    from t2i.evaluation.clip import load_clip
    from t2i.serving.gallery import Features

    clip = load_clip(folder, None, device, with_text=True)

    def of_prompts(prompts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            return clip.text_features(prompts, device).cpu()

    def of_pictures(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return clip.features_of_drawn(images, device).cpu()

    side_px = clip.preprocess(Image.new("RGB", (8, 8))).shape[-1]
    return Features(of_prompts, of_pictures, side_px, f"clip {clip.sha256}", joint=True)


def listening(host: str, port: int) -> socket.socket:
    """A socket at that address. Raises UserError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--host is {host!r}; allowed: an address of this machine ({error.strerror})."
        ) from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise UserError(
            f"--port {port} of {host} cannot be had: {error.strerror}; --port 0 takes any that is free."
        ) from error
    return made


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="t2i serve",
        description="A page and an HTTP API that draw with a trained model.",
        epilog="Trailing key=value change the run's config.",
    )
    made.add_argument("--checkpoint", metavar="RUN|FILE", help="default: the newest run that draws")
    made.add_argument(
        "--out", default="samples", metavar="DIR", help="folder of the pictures, which the gallery shows"
    )
    made.add_argument(
        "--host", default="127.0.0.1", help="default: 127.0.0.1, which this machine alone reaches"
    )
    made.add_argument("--port", type=int, default=7860, help="0 takes any that is free")
    made.add_argument("--token", help="who asks has to bring it; made up where --host is reached by others")
    made.add_argument(
        "--batch-size", type=int, default=1, help="pictures drawn at a time, which show together"
    )
    made.add_argument("--max-side", type=int, default=1024, metavar="PX", help="of height and width")
    made.add_argument("--max-images", type=int, default=16, help="of one request")
    made.add_argument(
        "--max-waiting", type=int, default=64, help="requests; further ones are told to come later"
    )
    made.add_argument(
        "--clip",
        metavar="DIR",
        help="a CLIP of open_clip or transformers: the gallery is searched by what it shows",
    )
    made.add_argument("--runs-dir", default="runs", help="where the newest run is looked for")
    made.add_argument("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    return made
