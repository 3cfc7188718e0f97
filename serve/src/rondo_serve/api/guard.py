"""What stands before the app: no more connections than there may be, no pages of strangers."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rondo_serve.api.calls import Gate
from rondo_serve.api.errors import ApiError


class Guard:
    """Answers itself what must not reach the app.

    Any body is read as JSON whatever its type, so a browser would let any page of any site post
    one without asking: pages of other origins are refused unless the operator named them.

    Args:
        app: What it guards.
        gate: Counts the requests that are held.
        most: Most of them at once.
        origins: Origins whose pages may ask.
    """

    def __init__(self, app: ASGIApp, gate: Gate, most: int, origins: tuple[str, ...]):
        self._app = app
        self._gate = gate
        self._most = most
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._gate.held >= self._most:
            message = f"the server holds its {self._most} connections: ask again"
            error = ApiError(503, message, code="overloaded", headers={"retry-after": "1"})
            await error.response()(scope, receive, send)
        elif not self._may(Headers(scope=scope)):
            message = "pages of other origins may not ask here: start with --cors-origins"
            error = ApiError(403, message, code="origin_not_allowed")
            await error.response()(scope, receive, send)
        else:
            self._gate.held += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._gate.held -= 1

    def _may(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return True
        try:
            return urlsplit(origin).netloc == headers.get("host")
        except ValueError:
            return False
