"""What stands before the app: no more requests than there may be, no strangers, no idle readers."""

import asyncio
import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rondo_serve.api.calls import Gate
from rondo_serve.api.errors import ApiError
from rondo_serve.config import ListenConfig

# Time that a client has to take what it is sent, a slice of a body at a time.
SECONDS = 60.0
SLICE = 64_000


class Unread(Exception):
    """A client does not take what it is sent."""


class Guard:
    """Answers itself what must not reach the app.

    Any body is read as JSON whatever its type, so a browser would let any page of any site post
    one without asking: pages of other origins are refused unless the operator named them. A page
    may also come from a name that its owner then points at this machine, and is of the same origin
    for its browser: a server that only this machine reaches answers to its own names only.

    Args:
        app: What it guards.
        gate: Counts the requests that are held.
        most: Most of them at once.
        host: Where the server listens.
        origins: Origins whose pages may ask.
    """

    def __init__(self, app: ASGIApp, gate: Gate, most: int, host: str, origins: tuple[str, ...]):
        self._app = app
        self._gate = gate
        self._most = most
        self._is_local = is_local(host)
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif (error := self._refusal(scope)) is not None:
            await error.response()(scope, receive, send)
        else:
            # Only what asks for text costs: whether the server lives can be asked at any time.
            held = int(scope["method"] == "POST")
            self._gate.held += held
            try:
                await self._app(scope, receive, patient(send))
            except Unread:
                # An answer that is not complete makes the server drop the connection.
                return
            finally:
                self._gate.held -= held

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Return why a request is not passed on."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host"), headers.get("origin")
        if not self._is_own(host):
            message = (
                f"this server listens on loopback only and is not called {str(host)[:200]!r}: ask "
                "localhost or 127.0.0.1, or start it with --cors-origins and the origin that "
                "clients call, as https://name.example"
            )
            return ApiError(403, message, code="host_not_allowed")
        if not self._may(origin, host):
            message = "pages of other origins may not ask here: start with --cors-origins"
            return ApiError(403, message, code="origin_not_allowed")
        if scope["method"] == "POST" and self._gate.held >= self._most:
            message = f"the server holds its {self._most} requests: ask again"
            return ApiError(503, message, code="overloaded", headers={"retry-after": "1"})
        return None

    def _is_own(self, host: str | None) -> bool:
        # No browser leaves it out.
        if not self._is_local or host is None or "*" in self._origins:
            return True
        try:
            return is_local(urlsplit(f"//{host}").hostname or "") or any(
                urlsplit(origin).netloc == host for origin in self._origins
            )
        except ValueError:
            return False

    def _may(self, origin: str | None, host: str | None) -> bool:
        if origin is None or "*" in self._origins or origin in self._origins:
            return True
        try:
            return urlsplit(origin).netloc == host
        except ValueError:
            return False


def guard(app: FastAPI, gate: Gate, config: ListenConfig) -> None:
    """Let nothing reach an app but by a guard."""
    app.add_middleware(
        Guard,
        gate=gate,
        most=config.max_connections,
        host=config.host,
        origins=config.cors_origins,
    )
    # What is added last comes first: pages can read what the guard answers.
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[
                "x-request-id",
                "x-rondo-recurrences-allowed",
                "x-rondo-adjusted",
                "retry-after",
            ],
        )


def is_local(host: str) -> bool:
    """Return whether a name or an address is of this machine alone, whoever answers for names."""
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def patient(send: Send) -> Send:
    """Return what sends in slices, so that a body waits for its reader, and waits only so long."""

    async def sent(message: Message) -> None:
        """Send a message.

        Raises:
            Unread: It was not taken.
        """
        for part in slices(message):
            try:
                async with asyncio.timeout(SECONDS):
                    await send(part)
            except TimeoutError as error:
                raise Unread from error

    return sent


def slices(message: Message) -> Iterator[Message]:
    """Yield a message, one of a long body as several."""
    body = message.get("body", b"")
    if len(body) <= SLICE:
        yield message
        return
    open_ended = bool(message.get("more_body"))
    for start in range(0, len(body), SLICE):
        more = open_ended or start + SLICE < len(body)
        yield {**message, "body": body[start : start + SLICE], "more_body": more}
