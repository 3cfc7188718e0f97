"""Clients that leave, are slow or too many, and a server that is told to stop."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
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
from rondo_serve.api import guard, reading
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
def unread(url: str, stream: bool = True) -> Iterator[socket.socket]:
    """An answer that is asked for and never read."""
    with socket.create_connection(address_of(url)) as slow:
        raw = json.dumps(TEXT | {"stream": stream, "max_tokens": 250}).encode()
        head = f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n\r\n"
        slow.sendall(head.encode() + raw)
        yield slow


def test_a_reader_that_does_not_read_holds_nobody_up() -> None:
    app = app_of(FLOOD)
    engine = app.state.service.engine
    with served(app) as url, unread(url):
        # The engine is through although nothing was read, and others are answered meanwhile.
        assert until(lambda: list(engine.ended.values()) == ["length"])
        assert app.state.service.gate.held == 1
        assert httpx.get(url + "/healthz").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_reader_that_takes_too_long_is_dropped(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(guard, "SECONDS", 0.3)
    app = app_of(FLOOD)
    service = app.state.service
    with served(app) as url, unread(url, stream) as slow:
        assert until(lambda: service.engine.ended)
        assert until(lambda: service.gate.held == 0)
        slow.settimeout(5)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while chunk := slow.recv(1_000_000):
                got += len(chunk)
        assert 0 < got < 100_000 * 250


def test_a_whole_answer_is_not_held_by_a_reader_that_is_slow() -> None:
    app = app_of()
    sent: list[int] = []

    async def go() -> None:
        asked = json.dumps(TEXT).encode()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": asked, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(len(message.get("body", b"")))

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "headers": [(b"host", b"localhost")],
            "query_string": b"",
            "asgi": {"spec_version": "2.3"},
        }
        await app(scope, receive, send)

    asyncio.run(go())
    assert max(sent) <= guard.SLICE


def test_slices_put_together_are_the_body() -> None:
    long = {"type": "http.response.body", "body": bytes(range(250)) * 1000, "more_body": False}
    parts = list(guard.slices(long))
    assert b"".join(part["body"] for part in parts) == long["body"]
    assert [part["more_body"] for part in parts] == [True, True, True, False]
    assert all(part["more_body"] for part in guard.slices(long | {"more_body": True}))


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


def test_too_many_requests_for_text_are_503_and_others_are_answered() -> None:
    app = app_of(Script(endless=True, pause=0.01), max_connections=1)
    with served(app) as url, httpx.Client() as client:
        asked = HELLO | {"stream": True, "max_tokens": 200}
        with client.stream("POST", url + CHAT, json=asked) as response:
            assert response.status_code == 200
            refused = httpx.post(url + COMPLETE, json=TEXT)
            error_of(refused, 503)
            assert refused.headers["retry-after"] == "1"
            assert httpx.get(url + "/healthz").status_code == 200
        assert until(lambda: app.state.service.gate.held == 0)
        last = httpx.post(url + COMPLETE, json=TEXT | {"max_tokens": 2})
        assert last.status_code == 200


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


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "a.localhost", "127.0.0.1:8000", "[::1]", "[::1]:8000"],
)
def test_a_server_on_loopback_answers_to_its_own_names(host: str) -> None:
    assert client_of().get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "stranger.example",
        "stranger.example:8000",
        "localhost.stranger.example",
        "[",
        "",
        "10.0.0.1",
    ],
)
def test_a_server_on_loopback_refuses_other_names(host: str) -> None:
    client = client_of()
    for method, path in [("GET", "/v1/models"), ("POST", CHAT), ("OPTIONS", CHAT), ("HEAD", "/")]:
        response = client.request(method, path, headers={"host": host})
        assert response.status_code == 403
        if method != "HEAD":
            error = error_of(response, 403)
            assert "start it with --cors-origins" in error["message"]
            assert error["code"] == "host_not_allowed"
    assert client.engine.asked == []


def test_a_server_answers_to_the_names_that_it_was_told() -> None:
    behind = client_of(cors_origins=("https://mine.example",))
    assert behind.get("/readyz", headers={"host": "mine.example"}).status_code == 200
    error_of(behind.get("/readyz", headers={"host": "other.example"}), 403)
    anyone = client_of(cors_origins=("*",))
    assert anyone.get("/readyz", headers={"host": "other.example"}).status_code == 200
    open_to_all = client_of(host="0.0.0.0")
    assert open_to_all.get("/readyz", headers={"host": "other.example"}).status_code == 200


def test_a_page_can_read_why_it_is_refused() -> None:
    origin = {"origin": "https://mine.example"}
    client = client_of(cors_origins=("https://mine.example",), max_connections=1)
    client.app.state.service.gate.held = 1  # type: ignore[attr-defined]
    response = client.post(CHAT, json=HELLO, headers=origin)
    error_of(response, 503)
    assert response.headers["access-control-allow-origin"] == origin["origin"]
    assert "x-request-id" in response.headers["access-control-expose-headers"]


# ---- the process


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken: stop what holds it"):
            serve.bound("127.0.0.1", port)
    # Two that are started at the same time have both not answered yet.
    with serve.bound("127.0.0.1", 0) as first, pytest.raises(UserError, match="is taken"):
        serve.bound("127.0.0.1", first.getsockname()[1])
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
            app, log_config=None, log_level="critical", timeout_graceful_shutdown=last + 5
        )
        server = serve.Server(settings, engine, gate, grace, last=last)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert until(lambda: server.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield SimpleNamespace(server=server, thread=thread, url=url, engine=engine)
        finally:
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


def test_a_connection_that_asks_for_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "IDLE_SECONDS", 0.5)
    script = Script(words=("a",), endless=True, pause=0.02)
    with shutting_down(script, grace=0) as it, socket.create_connection(address_of(it.url)) as idle:
        idle.sendall(b"GET /healthz HTTP/1.1\r\nhost: local")
        # What takes longer than that is not idle.
        asked = TEXT | {"max_tokens": 150}
        assert httpx.post(it.url + COMPLETE, json=asked, timeout=20).status_code == 200
        idle.settimeout(5)
        assert idle.recv(1000) == b""


SERVE = """
import sys
sys.path[:0] = {path!r}
from fake_engine import Script
from fake_server import app_of
from rondo_serve import serve
app = app_of(Script(words=("x" * 100_000,), endless=True, pause=0.01))
with serve.bound("127.0.0.1", 0) as listener:
    port = listener.getsockname()[1]
    serve.serve(app, app.state.service.engine, listener, {grace}, [f"http://127.0.0.1:{{port}}"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)])
def test_signals_end_the_process_without_a_traceback(signals: tuple[signal.Signals, ...]) -> None:
    grace = 60 if len(signals) > 1 else 0
    program = SERVE.format(path=[path for path in sys.path if path], grace=grace)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx.Client() as client, unread(url), unread(url, stream=False):
            asked = HELLO | {"stream": True, "max_tokens": 1000}
            with client.stream("POST", url + CHAT, json=asked) as response:
                next(response.iter_text())
                for number, sent in enumerate(signals):
                    process.send_signal(sent)
                    if number + 1 < len(signals):
                        assert until(lambda: httpx.get(url + "/readyz").status_code == 503)
                _, complaints = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in complaints, complaints
