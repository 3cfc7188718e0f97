"""`rondo serve`: opens an engine, answers over HTTP until it is told to stop, and ends in order."""

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rondo.errors import UserError
from rondo.generation import shape_of
from rondo_serve.api.app import make_app
from rondo_serve.api.calls import Closes, Gate
from rondo_serve.config import ListenConfig, ServeConfig
from rondo_serve.engine.opening import limits_of, open_engine
from rondo_serve.governed import Governed, govern, ruling_of, sheets_of
from rondo_serve.governed import told as told_of_governance

# After the engine has ended, for readers that are slow to take what they were sent.
LAST_SECONDS = 5
# Time in which a connection must have sent the head of a request.
IDLE_SECONDS = 30.0
BACKLOG = 2048


class Server(uvicorn.Server):
    """A server that goes on answering while it shuts down, and refuses what is new.

    Args:
        config: uvicorn's settings.
        engine: Is closed at the first signal.
        gate: Is closed at the same time.
        grace: Seconds that running answers are given.
        told: What the operator is told once requests are taken.
        last: Seconds that readers are given once nothing is generated any more.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Closes,
        gate: Gate,
        grace: float,
        told: Sequence[str] = (),
        last: float = LAST_SECONDS,
    ):
        super().__init__(config)
        # Since when connections ask for nothing, and after which request.
        self._idle: dict[Any, tuple[Any, float]] = {}
        self._told = told
        self._engine = engine
        self._gate = gate
        self._grace = grace
        self._last = last

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        if self.started and self._told:
            print("\n".join(self._told), flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Drop connections that ask for nothing, each second, and tell whether to end."""
        if counter % 10 == 0:
            self._drop_idle(time.monotonic())
        return await super().on_tick(counter)

    def _drop_idle(self, now: float) -> None:
        found: dict[Any, tuple[Any, float]] = {}
        for connection in list(self.server_state.connections):
            if not isinstance(connection, H11Protocol):
                continue
            cycle = connection.cycle
            # One that is closing waits for a reader.
            if cycle is None or cycle.response_complete or connection.transport.is_closing():
                last, since = self._idle.get(connection, (cycle, now))
                found[connection] = (cycle, since if last is cycle else now)
                if now - found[connection][1] > IDLE_SECONDS:
                    connection.transport.abort()
        self._idle = found

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for readers, and cut off those that are left."""
        # Before uvicorn does, which cancels answers with a traceback for each.
        cut = asyncio.get_running_loop().call_later(self._last, self._cut)
        await super().shutdown(sockets)
        cut.cancel()
        self._cut()
        # The loop closes what was cut, and its answers end by themselves.
        if tasks := set(self.server_state.tasks):
            await asyncio.wait(tasks, timeout=1)

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down; a second Ctrl-C cuts off what runs."""
        if not self._gate.closing.is_set():
            self._gate.closing.set()
            threading.Thread(target=self._close, args=(self._grace,), daemon=True).start()
        elif sig == signal.SIGINT:
            threading.Thread(target=self._close, args=(0.0,), daemon=True).start()
            self.force_exit = True
            self.should_exit = True

    def _close(self, grace: float) -> None:
        try:
            self._engine.close(grace)
        finally:
            self.should_exit = True


def run(config: ServeConfig) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Raises:
        UserError: The model cannot be served so, or the address cannot be had.
    """
    # The model loads for long: what can be refused before is.
    shape = shape_of(config.model)
    sheets = sheets_of(config, limits_of(config, shape), shape)
    with bound(config.host, config.port) as listener:
        opened = open_engine(config)
        log_to_stderr()
        known = {
            "max_context": opened.engine.settings.max_context,
            "host": listener.getsockname()[0],
        }
        config = config.model_copy(update=known)
        engine, about = opened.engine, opened.about
        about |= {"weights": config.weights}
        governance = govern(config, opened.limits, engine.costs, sheets, about)
        texts = config.audit_texts
        engine.policy = Governed(governance.governor, ruling_of(shape), texts)
        app = make_app(engine, opened.tokenizer, opened.shape, governance, config)
        engine.start()
        told = [*opened.told, *told_of_governance(governance, config), *told_of(listener, config)]
        try:
            serve(app, engine, listener, config.grace_seconds, told)
        finally:
            governance.governor.close()


def serve(
    app: Any, engine: Closes, listener: socket.socket, grace: float, told: Sequence[str]
) -> None:
    """Answer on a socket until a signal comes, then end in order."""
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        # There is nothing to start or end with the app, and no websocket.
        lifespan="off",
        http="h11",
        ws="none",
        backlog=BACKLOG,
        timeout_graceful_shutdown=LAST_SECONDS + 5,
    )
    server = Server(settings, engine, app.state.service.gate, grace, told)
    try:
        server.run(sockets=[listener])
    finally:
        engine.close(0.0)


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    It listens at once, or two servers that load at the same time would both have the port: what
    connects before the model is there waits for it.

    Raises:
        UserError: The address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"--host {host} is no address of this machine: {error}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} is taken: stop what holds it or give --port"
        elif error.errno == errno.EACCES:
            message = f"port {port} needs rights that this user lacks: give --port 1024 or higher"
        else:
            message = f"--host {host} is no address of this machine: {error.strerror}"
        raise UserError(message) from error
    return listener


def told_of(listener: socket.socket, config: ListenConfig) -> list[str]:
    """Return what the operator is told of the address."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    lines = [f"serving {config.model_name} at http://{shown}:{port}"]
    if config.keys is None and not ipaddress.ip_address(host).is_loopback:
        lines.append("other machines can reach it, and nothing is asked of them")
    return [*lines, "Ctrl-C ends it; a second one cuts off what runs"]


def log_to_stderr() -> None:
    """Let the log's lines go to stderr as they are."""
    logger = logging.getLogger("rondo_serve")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
