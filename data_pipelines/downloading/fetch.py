"""Pictures over HTTP: each with a deadline, a limit of its size and a bounded number of attempts."""

from __future__ import annotations

import asyncio
import email.utils
import random
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from t2i import __version__

from ..optional import need
from .addresses import PrivateAddress, public_socket

if TYPE_CHECKING:
    import aiohttp

AGENT = "t2i"  # what a site names to address this program alone in X-Robots-Tag
USER_AGENT = f"{AGENT}/{__version__} (downloads pictures to train on; honours X-Robots-Tag)"
FORBIDDING = frozenset({"noai", "noimageai", "noindex", "noimageindex"})  # img2dataset's
ROBOTS_WITH_VALUES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
MAX_REDIRECTS = 5
KEEP_ALIVE_S = 1.0  # with a host for each picture, longer would pile up idle connections


@dataclass(frozen=True)
class FetchLimits:
    """timeout_s: for one picture, all attempts and the pauses between them included; max_mib: of one picture;
    retries: further attempts after one that failed in a way that may pass"""

    timeout_s: float = 10.0
    max_mib: float = 20.0
    retries: int = 2


class FetchError(Exception):
    """No picture came.

    cause: "url", "private_address", "timeout", "connection", "tls", "http_404" and other statuses, "redirects",
        "robots", "too_large"
    may_pass: another attempt may fare better, not before `after_s` seconds where the server said so
    """

    def __init__(self, cause: str, detail: str, may_pass: bool = False, after_s: float | None = None) -> None:
        super().__init__(f"{cause}: {' '.join(detail.split())}")
        self.cause = cause
        self.may_pass = may_pass
        self.after_s = after_s


def open_session(connections: int, allow_private_addresses: bool) -> aiohttp.ClientSession:
    """For `connections` requests at once, each with the deadline that `fetch` sets. Needs a running loop.

    allow_private_addresses: connect to this machine and to private networks too, where a URL, a name's address or a
        redirect leads there
    """
    aiohttp = need("aiohttp", "data")
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=connections,
            keepalive_timeout=KEEP_ALIVE_S,
            socket_factory=None if allow_private_addresses else public_socket,
        ),
        timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        # Pictures are compressed already; what is compressed again all the same counts by its size when unpacked.
        headers={"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"},
    )


async def fetch(session: aiohttp.ClientSession, url: str | None, limits: FetchLimits) -> bytes:
    """The body of `url`. Tries again after connection errors, 429 and 5xx, with growing pauses or the one that the
    server asks for, as long as the deadline leaves time. Raises FetchError."""
    url = (url or "").strip()  # as browsers do
    if not url.lower().startswith(("http://", "https://")):
        raise FetchError("url", "neither http:// nor https://" if url else "there is none")
    loop = asyncio.get_running_loop()
    last = ""
    try:
        async with asyncio.timeout(limits.timeout_s) as deadline:
            for attempt in range(limits.retries + 1):
                try:
                    return await _attempt(session, url, int(limits.max_mib * (1 << 20)))
                except FetchError as error:
                    pause_s = max(error.after_s or 0.0, 0.5 * 2**attempt * random.uniform(0.5, 1.5))
                    too_late = loop.time() + pause_s >= (deadline.when() or 0.0)
                    if not error.may_pass or attempt == limits.retries or too_late:
                        raise
                    last = f" (before, {error})"
                await asyncio.sleep(pause_s)
    except TimeoutError as error:
        raise FetchError("timeout", f"no answer within {limits.timeout_s:g} s{last}") from error
    raise AssertionError("the last attempt returns or raises")


async def _attempt(session: aiohttp.ClientSession, url: str, max_bytes: int) -> bytes:
    aiohttp = need("aiohttp", "data")
    try:
        async with session.get(url, max_redirects=MAX_REDIRECTS) as response:
            status = response.status
            if status != 200:
                may_pass = status == 429 or status >= 500
                wait_s = retry_after_s(response.headers.get("Retry-After")) if may_pass else None
                raise FetchError(f"http_{status}", response.reason or "no reason given", may_pass, wait_s)
            if forbids(response.headers.getall("X-Robots-Tag", [])):
                raise FetchError("robots", "X-Robots-Tag forbids the use of the picture")
            if (response.content_length or 0) > max_bytes:
                raise FetchError("too_large", f"{response.content_length} bytes, allowed: {max_bytes}")
            body = bytearray()
            async for part in response.content.iter_any():
                body += part
                if len(body) > max_bytes:
                    raise FetchError("too_large", f"more than {max_bytes} bytes")
            return bytes(body)
    except aiohttp.TooManyRedirects as error:
        raise FetchError("redirects", f"more than {MAX_REDIRECTS}") from error
    except (
        aiohttp.InvalidURL,
        aiohttp.NonHttpUrlClientError,
        ValueError,
    ) as error:  # of the table, or one that it redirects to
        raise FetchError("url", f"not a URL of a picture: {error}") from error
    except aiohttp.ClientSSLError as error:
        raise FetchError("tls", str(error)) from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        reason = getattr(error, "os_error", None)
        if isinstance(reason, PrivateAddress):
            raise FetchError("private_address", str(error)) from error
        no_such_host = isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME
        raise FetchError("connection", str(error) or type(error).__name__, not no_such_host) from error
    except aiohttp.ClientError as error:  # an answer that is not HTTP
        raise FetchError("connection", f"{type(error).__name__}: {error}") from error


def retry_after_s(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or a date. None where it says neither."""
    if header is None:
        return None
    if header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def forbids(headers: Iterable[str]) -> bool:
    """Whether X-Robots-Tag headers forbid the use for training, to all or to this program.

    `noai, noindex` is for all; `otherbot: noai` for the program it names alone, with what follows it in the header.
    """
    for header in headers:
        agent = ""
        for part in header.lower().split(","):
            name, colon, rest = (text.strip() for text in part.partition(":"))
            if colon and name not in ROBOTS_WITH_VALUES:
                agent, name = name, rest
            if name in FORBIDDING and agent in ("", "*", AGENT):
                return True
    return False
