"""The app over a fake engine: what the tests of the HTTP side share."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fake_engine import FakeEngine, Script, until
from starlette.testclient import TestClient

from conftest import byte_tokenizer, family_config
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo_serve import serve
from rondo_serve.api.app import make_app
from rondo_serve.api.replies import ErrorReply
from rondo_serve.config import ServeConfig
from rondo_serve.governed import Governance
from rondo_serve.policy import Limits

POLICY = Limits(default=4, cap=8)
TOLD = {"threshold": 0.05, "min_recurrences": 2, "check_every": 1, "loss": 1.0}
RULES = {"kl": {"0.5%": TOLD | {"criterion": "kl"}}}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
TEXT = {"prompt": "hello"}
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
OWN = "http://localhost"
ANSWER = "Two and two.!"


def shape_of_a_model() -> RecurrentConfig:
    return RecurrentConfig(
        base_config=family_config("llama"),
        num_prelude_layers=2,
        num_core_layers=2,
        num_coda_layers=2,
        max_recurrences=8,
        exit_rules=RULES,
    )


def app_of(script: Script | None = None, **settings: Any) -> Any:
    """An app over a fake engine, which lies at `app.state.service.engine`."""
    config = ServeConfig(**({"model": "somewhere/tiny"} | settings))
    engine = FakeEngine(POLICY, script or Script())
    return make_app(engine, byte_tokenizer(), shape_of_a_model(), Governance.plain(POLICY), config)


def client_of(script: Script | None = None, **settings: Any) -> TestClient:
    app = app_of(script, **settings)
    client = TestClient(app, base_url=OWN, raise_server_exceptions=False)
    client.engine = app.state.service.engine  # type: ignore[attr-defined]
    return client


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an app on a free port of loopback."""
    with serve.bound("127.0.0.1", 0) as listener:
        settings = uvicorn.Config(app, log_config=None, log_level="error", lifespan="off")
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert until(lambda: server.started)
        host, port = listener.getsockname()
        try:
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join(10)
            app.state.service.engine.close(0.0)


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which must end as OpenAI's do."""
    events = [event for event in text.split("\n\n") if event and not event.startswith(":")]
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, whose shape is checked."""
    assert response.status_code == status, response.text
    return ErrorReply.model_validate(response.json()).error.model_dump()
