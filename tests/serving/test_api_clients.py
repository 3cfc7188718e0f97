"""Clients that leave, are slow or too many, and a server that is told to stop."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fake_engine import Script, until
from fake_server import CHAT, COMPLETE, HELLO, TEXT, app_of, chunks_of, client_of, error_of, served

from rondo.errors import UserError
from rondo_serve import serve
from rondo_serve.api import reading
from rondo_serve.config import ServeConfig

# ---- clients that leave, and those that are too many


@pytest.mark.parametrize("stream", [False, True])
def test_when_a_client_leaves_its_asks_are_cancelled(stream: bool) -> None:
    app = app_of(Script(endless=True, pause=0.01))
    engine = app.state.service.engine
    with served(app) as url:
        asked = HELLO | {"n": 2, "stream": stream, "max_tokens": 200}
        with pytest.raises(httpx.ReadTimeout):
            leave(url, asked)
        assert until(lambda: len(engine.ended) == 2)
        assert set(engine.ended.values()) == {"cancelled"}
        assert until(lambda: app.state.service.gate.held == 0)


def leave(url: str, asked: dict[str, Any]) -> None:
    """Ask, and go away while the answer is on its way."""
    with httpx.Client(timeout=0.3) as client:
        if not asked["stream"]:
            client.post(url + CHAT, json=asked)
        with client.stream("POST", url + CHAT, json=asked) as response:
            next(response.iter_text())
            raise httpx.ReadTimeout("it goes")


def test_a_client_that_left_before_the_first_byte_is_cancelled_too() -> None:
    app = app_of(Script(endless=True, pause=0.01))
    engine = app.state.service.engine

    async def go() -> None:
        sent = json.dumps(HELLO | {"stream": True, "max_tokens": 200}).encode()
        messages = [{"type": "http.request", "body": sent, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            await asyncio.sleep(0.01)

        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "headers": [],
            "query_string": b"",
            "asgi": {"spec_version": "2.3"},
        }
        await app(scope, receive, send)

    asyncio.run(go())
    assert until(lambda: list(engine.ended.values()) == ["cancelled"])


# More than sockets hold, so that a server that sends it to nobody gets stuck.
FLOOD = Script(words=("x" * 100_000,), endless=True)


@contextmanager
def unread(url: str) -> Iterator[None]:
    """A stream that is asked for and never read."""
    with socket.create_connection(address_of(url)) as slow:
        raw = json.dumps(TEXT | {"stream": True, "max_tokens": 250}).encode()
        head = f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n\r\n"
        slow.sendall(head.encode() + raw)
        yield


def test_a_reader_that_does_not_read_holds_nobody_up() -> None:
    app = app_of(FLOOD)
    engine = app.state.service.engine
    with served(app) as url, unread(url):
        # The engine is through although nothing was read, and others are answered meanwhile.
        assert until(lambda: list(engine.ended.values()) == ["length"])
        assert app.state.service.gate.held == 1
        assert httpx.get(url + "/healthz").status_code == 200


def test_a_client_that_sends_too_much_can_read_the_answer() -> None:
    with served(app_of(max_body=100_000)) as url, socket.create_connection(address_of(url)) as big:
        head = f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 700000\r\n\r\n"
        big.sendall(head.encode())
        for _ in range(7):
            big.sendall(b"a" * 100_000)
            time.sleep(0.02)
        assert big.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SECONDS", 0.1)
    with served(app_of()) as url, socket.create_connection(address_of(url)) as slow:
        head = f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n"
        slow.sendall(head.encode() + b'{"prompt"')
        slow.settimeout(5)
        answer = b""
        while chunk := slow.recv(10_000):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"error"' in answer


def address_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def test_too_many_connections_are_503() -> None:
    app = app_of(Script(endless=True, pause=0.01), max_connections=1)
    with served(app) as url, httpx.Client() as client:
        asked = HELLO | {"stream": True, "max_tokens": 200}
        with client.stream("POST", url + CHAT, json=asked) as response:
            assert response.status_code == 200
            refused = httpx.get(url + "/healthz")
            error_of(refused, 503)
            assert refused.headers["retry-after"] == "1"
        assert until(lambda: app.state.service.gate.held == 0)
        assert httpx.get(url + "/healthz").status_code == 200


def test_pages_of_other_origins_are_refused_unless_named() -> None:
    stranger = {"origin": "https://stranger.example"}
    client = client_of()
    error_of(client.post(CHAT, json=HELLO, headers=stranger), 403)
    error_of(client.post(CHAT, json=HELLO, headers={"origin": "null"}), 403)
    own = client.post(CHAT, json=HELLO, headers={"origin": "http://localhost"})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    friendly = client_of(cors_origins=("https://stranger.example",))
    answered = friendly.post(CHAT, json=HELLO, headers=stranger)
    assert answered.headers["access-control-allow-origin"] == "https://stranger.example"
    before = stranger | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    assert friendly.options(CHAT, headers=before).status_code == 200
    assert client.options(CHAT, headers=before).status_code == 403


# ---- the process


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken: stop what holds it"):
            serve.bound("127.0.0.1", port)
    with pytest.raises(UserError, match="is no address of this machine"):
        serve.bound("192.0.2.1", 0)


def test_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"):
        serve.run(ServeConfig(model=str(tmp_path / "nothing"), port=0))


def test_the_operator_is_told_who_can_reach_the_server() -> None:
    config = ServeConfig(model="somewhere/tiny")
    with serve.bound("127.0.0.1", 0) as own, serve.bound("0.0.0.0", 0) as open_to_all:
        port = own.getsockname()[1]
        assert serve.told_of(own, config)[0] == f"serving tiny at http://127.0.0.1:{port}"
        assert not any("nothing is asked" in line for line in serve.told_of(own, config))
        assert any("nothing is asked" in line for line in serve.told_of(open_to_all, config))


@contextmanager
def shutting_down(script: Script, grace: float, last: int = 2) -> Iterator[SimpleNamespace]:
    """A server as `rondo serve` runs it, to which signals can be told."""
    app = app_of(script, grace_seconds=grace)
    gate, engine = app.state.service.gate, app.state.service.engine
    with serve.bound("127.0.0.1", 0) as listener:
        settings = uvicorn.Config(
            app, log_config=None, log_level="critical", timeout_graceful_shutdown=last
        )
        server = serve.Server(settings, engine, gate, grace)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert until(lambda: server.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield SimpleNamespace(server=server, thread=thread, url=url, engine=engine)
        server.should_exit = True
        thread.join(10)
        engine.close(0.0)


def test_a_shutdown_finishes_what_runs_and_takes_nothing_new() -> None:
    script = Script(words=("a",), endless=True, pause=0.02)
    with shutting_down(script, 20) as it, httpx.Client(timeout=20) as client:
        asked = TEXT | {"stream": True, "max_tokens": 40}
        with client.stream("POST", it.url + COMPLETE, json=asked) as response:
            received = response.iter_text()
            first = next(received)
            it.server.handle_exit(signal.SIGTERM, None)
            error_of(httpx.get(it.url + "/readyz"), 503)
            assert httpx.get(it.url + "/healthz").status_code == 200
            error_of(httpx.post(it.url + COMPLETE, json=TEXT), 503)
            chunks = chunks_of(first + "".join(received))
        it.thread.join(10)
        assert not it.thread.is_alive()
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "a" * 40


def test_a_second_interrupt_cuts_at_once() -> None:
    with shutting_down(FLOOD, grace=60, last=60) as it, unread(it.url):
        assert until(lambda: len(it.engine.ended) == 1)
        before = time.monotonic()
        it.server.handle_exit(signal.SIGINT, None)
        assert until(lambda: it.server.should_exit)
        it.server.handle_exit(signal.SIGINT, None)
        it.thread.join(20)
        assert not it.thread.is_alive()
        assert time.monotonic() - before < 20


def test_a_second_interrupt_cuts_off_what_runs() -> None:
    with shutting_down(Script(endless=True, pause=0.1), grace=60, last=60) as it, unread(it.url):
        assert until(lambda: len(it.engine.asked) == 1)
        it.server.handle_exit(signal.SIGINT, None)
        it.server.handle_exit(signal.SIGINT, None)
        assert until(lambda: list(it.engine.ended.values()) == ["shutdown"])
