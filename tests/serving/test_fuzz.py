"""The API fuzzed from its own OpenAPI document, over a real engine: no 5xx, no crash, no hang."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import schemathesis
from engines import make_engine, small
from fake_engine import until
from fake_server import CHAT, COMPLETE, HELLO, served, shape_of_a_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import checks

from conftest import byte_tokenizer
from rondo_serve.api.app import make_app
from rondo_serve.config import ServeConfig
from rondo_serve.engine.engine import Engine
from rondo_serve.governed import Governance
from rondo_serve.policy import Limits

# A schema cannot say that a prompt and its answer must fit into the context together.
BEYOND_A_SCHEMA = [checks.positive_data_acceptance]
PATHS = (CHAT, COMPLETE)
NAMES = st.sampled_from(
    ["prompt", "messages", "role", "content", "user", "n", "stop", "stream", "seed", "exit", "rule"]
) | st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
PACE = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Running:
    """A server on loopback, and its engine."""

    url: str
    engine: Engine


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """The app over a tiny model in a real engine, whose thread ticks."""
    shape, policy = shape_of_a_model(), Limits(default=4, cap=8)
    config = ServeConfig(
        model="somewhere/tiny", max_new_tokens=12, default_new_tokens=6, max_context=128
    )
    engine = make_engine(small(), policy, max_queue=8, max_context=128, prefix_cache=True)
    engine.start()
    with served(make_app(engine, byte_tokenizer(), shape, Governance.plain(policy), config)) as url:
        yield Running(url, engine)
    assert engine.failure is None


def test_nothing_that_is_sent_makes_the_server_fail(running: Running) -> None:
    document = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == 8
    for operation in operations:

        @PACE
        @given(case=operation.as_strategy())
        def holds(case: Any) -> None:
            start = time.monotonic()
            case.call_and_validate(excluded_checks=BEYOND_A_SCHEMA)
            assert time.monotonic() - start < 30

        holds()


@PACE
@given(body=st.binary() | JSON.map(json.dumps).map(str.encode), path=st.sampled_from(PATHS))
def test_no_body_at_all_makes_the_server_fail(running: Running, body: bytes, path: str) -> None:
    reply = httpx.post(running.url + path, content=body)
    assert reply.status_code in (200, 400)
    assert reply.status_code == 200 or reply.json()["error"]["message"]


def test_after_all_that_requests_are_answered_and_nothing_is_held(running: Running) -> None:
    assert until(lambda: not running.engine.load().running)
    found = running.engine.load()
    assert (found.running, found.waiting) == (0, 0)
    assert found.pages == found.cached_pages
    assert httpx.post(f"{running.url}{CHAT}", json=HELLO).status_code == 200
