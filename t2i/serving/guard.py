"""Who may ask a server, and what a page of it may load."""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The page's library would fetch fonts and scripts from elsewhere.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Stands before an ASGI application. Refuses

    - where there is a token: who does not bring it, as `Authorization: Bearer TOKEN`, or once as `?token=TOKEN` in the
      page's address, which sets a cookie;
    - without one, requests that name another host than this machine: a page from elsewhere whose name was made to point
      here (DNS rebinding);
    - requests that a page from another origin sends;
    - bodies longer than `max_bytes`.

    cookie: its name; browsers send it to all ports of a host, so that each server needs one of its own
    """

    def __init__(self, app: App, token: str | None, max_bytes: int, cookie: str = "t2i_token") -> None:
        self.app, self.token, self.max_bytes, self.cookie = app, token, max_bytes, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        refused = self.refusal(headers, given)
        if refused is not None and scope["type"] == "http":
            await _answer(send, *refused)
        if refused is not None:
            return
        seen, refused_late = 0, False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            # As if the client had gone: no library that reads the body goes on after this.
            return {"type": "http.disconnect"} if seen > self.max_bytes else message

        async def with_policy(message: MutableMapping[str, Any]) -> None:
            nonlocal refused_late
            if seen > self.max_bytes and scope["type"] == "http":
                if not refused_late:
                    refused_late = True
                    await _answer(
                        send, 413, f"The body is too long; allowed: at most {self.max_bytes:,} bytes."
                    )
                return
            if message["type"] == "http.response.start":
                added = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                if self.token and given:
                    cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                    added.append((b"set-cookie", cookie.encode()))
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self.app(scope, counted, with_policy)

    def refusal(self, headers: dict[str, str], given: str) -> tuple[int, str] | None:
        """(status, sentence), None for a request that may come in. given: a token in the address"""
        host = headers.get("host", "")
        if self.token is None:
            if not is_loopback(_hostname(host)):
                return 403, f"Host is {host!r}; allowed: this machine's own names, such as 127.0.0.1."
        elif not any(
            hmac.compare_digest(each.encode(), self.token.encode())
            for each in _tokens(headers, given, self.cookie)
        ):
            return (
                401,
                "The token is missing or wrong; allowed: Authorization: Bearer TOKEN, or ?token=TOKEN.",
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, f"Origin is {origin!r}; allowed: pages of this server."
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return 413, f"The body has {length} bytes; allowed: at most {self.max_bytes:,}."
        return None


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _tokens(headers: dict[str, str], given: str, name: str) -> list[str]:
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        cookie = None
    return [given, bearer if kind.lower() == "bearer" else "", cookie.value if cookie else ""]


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
