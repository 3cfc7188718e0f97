"""The gateway before a vLLM without a model: depths that are given, and what is taken note of."""

import asyncio
import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from fake_engine import until
from fake_server import chunks_of, error_of, shape_of_a_model
from fake_vllm import PROMPT, FakeVllm, listening
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from rondo.errors import UserError
from rondo.flops import costs_of
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo_govern.audit.log import AuditError
from rondo_govern.audit.reading import read, verify
from rondo_govern.audit.records import digest_of
from rondo_govern.keys import Keys, add_secret, text_of
from rondo_govern.rules import Denied
from rondo_serve.config import GatewayConfig
from rondo_serve.gateway.app import client_of, make_app
from rondo_serve.gateway.bodies import ChatOnward
from rondo_serve.gateway.passage import Cut, Passage
from rondo_serve.gateway.service import Gateway
from rondo_serve.governed import govern, sheets_of
from rondo_serve.policy import Limits

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
POLICY = """
version: 1
default_tier: basic
tiers:
  basic: {floor: 1, default: 2, cap: 4, price: 10}
  pro: {floor: 2, default: 4, cap: 8, price: 30}
  small: {default: 2, cap: 4, quotas: [{window: 31d, tokens: 700}]}
risks:
  high: {floor: 6}
  unsure: {floor: 3, escalation: {rule: kl, threshold: 0.1}}
keys:
  acme: {tenant: Acme}
  bank: {tier: pro}
  clinic: {tier: pro, risks: [high]}
  shop: {tier: small}
overload: [{waiting: 1, keep: 0.5}]
"""
NAMES = ("acme", "bank", "clinic", "shop")
with torch.device("meta"):
    COSTS = costs_of(RecurrentForCausalLM(shape_of_a_model()))


@dataclass
class House:
    """A gateway with its vLLM, keys and log."""

    vllm: FakeVllm
    gateway: Gateway
    client: TestClient
    secrets: dict[str, str]
    log: Path

    def post(self, body: Any, key: str = "acme", path: str = CHAT, **headers: str) -> Any:
        told = {"authorization": f"Bearer {self.secrets[key]}"} | headers
        content = body if isinstance(body, bytes) else json.dumps(body)
        return self.client.post(path, content=content, headers=told)

    @property
    def depth(self) -> int:
        """What vLLM was told last."""
        return self.vllm.bodies[-1]["vllm_xargs"]["num_recurrences"]

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in read(self.log) if record["kind"] == kind]

    def holds(self) -> list[int]:
        """What the ledger holds for requests in flight, by key."""
        governor = self.gateway.governance.governor
        standings = [one for key in NAMES for one in governor.standing(key)[1]]
        return [one.held_tokens for one in standings]

    def settled(self) -> list[dict[str, Any]]:
        """The records of ends, once it is seen that each answer has exactly one."""
        verdict = verify(self.log)
        assert not verdict.findings, verdict
        taken = [record["id"] for record in self.records("taken")]
        ended = self.records("ended")
        assert sorted(taken) == sorted(record["id"] for record in ended)
        assert len(set(taken)) == len(taken)
        assert self.holds() == [0]
        assert self.gateway.load().running == 0
        return ended


def keys_of() -> tuple[str, dict[str, str]]:
    keys, secrets = Keys({}), {}
    for name in NAMES:
        keys, secrets[name] = add_secret(
            keys, name, f"noise-{name}", ("generate", "metrics"), "2026-01-01"
        )
    return text_of(keys), secrets


@contextlib.contextmanager
def house_of(
    folder: Path, vllm: FakeVllm | None = None, url: str = "", **told: Any
) -> Iterator[House]:
    vllm = vllm or FakeVllm()
    keys, secrets = keys_of()
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "keys.yaml").write_text(keys)
    (folder / "model").mkdir(exist_ok=True)
    config = GatewayConfig(
        **{
            "upstream": url or "http://vllm.invalid",
            "model": str(folder / "model"),
            "name": "tiny",
            "policy": str(folder / "policy.yaml"),
            "keys": str(folder / "keys.yaml"),
            "audit": str(folder / "audit.jsonl"),
        }
        | told
    )
    limits = Limits(4, 8)
    sheets = sheets_of(config, limits, shape_of_a_model())
    governance = govern(config, limits, COSTS, sheets, {"dtype": "auto", "device": "vllm"})
    transport = {} if url else {"transport": httpx.ASGITransport(vllm.app())}
    client = client_of(config.upstream, vllm.key, **transport)
    gateway = Gateway(config, governance, COSTS, 256, client)
    app = make_app(gateway)
    caller = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
    house = House(vllm, gateway, caller, secrets, folder / "audit.jsonl")
    yield house
    governance.governor.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with house_of(tmp_path) as found:
        yield found


def flops_of(depth: int, prompt: int, new: int) -> float:
    return (prompt + new - 1) * COSTS.generation_flops(depth, prompt, new)


# ---- depth


@pytest.mark.parametrize(
    ("key", "asked", "depth", "adjusted"),
    [
        ("acme", {}, 2, None),
        ("acme", {"num_recurrences": 3}, 3, None),
        ("acme", {"num_recurrences": 64}, 4, "cap"),
        ("acme", {"reasoning_effort": "high"}, 4, None),
        ("acme", {"vllm_xargs": {"num_recurrences": 3}}, 3, None),
        ("acme", {"vllm_xargs": {"num_recurrences": 64}}, 4, "cap"),
        ("bank", {"num_recurrences": 1}, 2, "floor"),
        ("bank", {"vllm_xargs": {"num_recurrences": 1}}, 2, "floor"),
        ("bank", {"metadata": {"risk": "high"}}, 6, "risk"),
        ("clinic", {"num_recurrences": 1}, 6, "floor,risk"),
        # No exits behind vLLM: all the depth that is allowed.
        ("bank", {"num_recurrences": 3, "metadata": {"risk": "unsure"}}, 8, "escalation"),
    ],
)
def test_a_request_runs_at_the_depth_that_policy_gives(
    house: House, key: str, asked: dict[str, Any], depth: int, adjusted: str | None
) -> None:
    answer = house.post(HELLO | asked, key)
    assert answer.status_code == 200, answer.text
    assert house.depth == depth
    assert answer.json()["recurrence"]["allowed"] == depth
    assert answer.headers["x-rondo-recurrences-allowed"] == str(depth)
    assert answer.headers.get("x-rondo-adjusted") == adjusted
    assert "num_recurrences" not in house.vllm.bodies[-1]


def test_a_header_names_a_risk_class(house: House) -> None:
    house.post(HELLO | {"num_recurrences": 1}, "bank", **{"x-rondo-risk": "high"})
    assert house.depth == 6


SMUGGLED = [
    b'{"messages": [], "num_recurrences": 6, "num_recurrences": 1}',
    b'{"messages": [], "vllm_xargs": {"num_recurrences": 1}, "vllm_xargs": {}}',
    b'{"messages": [], "vllm_xargs": {"num_recurrences": 7, "num_recurrences": 1}}',
    b'{"messages": [], "vllm\\u005fxargs": {"num\\u005frecurrences": 1}}',
    b'{"messages": [], "extra_body": {"vllm_xargs": {"num_recurrences": 1}}}',
    b'{"messages": [], "n": 3, "num_recurrences": 1}',
    b'{"messages": [], "kv_transfer_params": {"num_recurrences": 1}}',
    b'{"messages": [{"vllm_xargs": {"num_recurrences": 1}, "num_recurrences": 1}]}',
    b'{"messages": [], "metadata": {"risk": ""}, "num_recurrences": 1}',
]


@pytest.mark.parametrize("body", SMUGGLED)
def test_no_body_gets_below_the_floor(house: House, body: bytes) -> None:
    assert house.post(body, "clinic").status_code == 200
    assert house.depth == 6
    assert set(house.vllm.bodies[-1]["vllm_xargs"]) == {"num_recurrences"}


REFUSED = [
    ({"num_recurrences": "1"}, "num_recurrences"),
    ({"num_recurrences": 0}, "num_recurrences"),
    ({"num_recurrences": True}, "num_recurrences"),
    ({"num_recurrences": 2.0}, "num_recurrences"),
    ({"num_recurrences": 2, "vllm_xargs": {"num_recurrences": 3}}, "num_recurrences"),
    ({"num_recurrences": 2, "reasoning_effort": "low"}, "reasoning_effort"),
    ({"vllm_xargs": {"num_recurrences": "2"}}, "vllm_xargs.num_recurrences"),
    ({"vllm_xargs": {"num_recurrences": True}}, "vllm_xargs.num_recurrences"),
    ({"vllm_xargs": [1]}, "vllm_xargs"),
    ({"exit": {"rule": "kl"}}, "exit"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"use_beam_search": "yes"}, "use_beam_search"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"best_of": 2}, "best_of"),
    ({"n": 3, "best_of": 4}, "best_of"),
    ({"n": "3"}, "n"),
    ({"n": 129}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2000}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"stream": "true"}, "stream"),
    ({"temperature": "0"}, "temperature"),
    ({"metadata": {"risk": ["high"]}}, "metadata.risk"),
    ({"metadata": {"risk": "odd"}}, "risk"),
]


@pytest.mark.parametrize(("asked", "param"), REFUSED)
def test_what_cannot_be_granted_is_refused_before_vllm(
    house: House, asked: dict[str, Any], param: str
) -> None:
    error = error_of(house.post(HELLO | asked), 400)
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert house.vllm.bodies == []
    assert [record["key"] for record in house.records("refused")] == ["acme"]
    assert house.settled() == []


def test_an_exit_is_refused_in_one_sentence(house: House) -> None:
    error = error_of(house.post(HELLO | {"exit": {"rule": "kl"}}), 400)
    assert error["message"] == "exits are not there behind vLLM: leave exit"


def test_all_else_goes_on_as_it_came(house: House) -> None:
    told = {
        "model": "tiny",
        "temperature": 0,
        "stop": ["\n"],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"a": None},
        "min_p": 0.25,
        "model_dump": {"b": [1, 2.5, "\u2028\U0001f600"]},
        "most": 3,
        "vllm_xargs": {"other": "x"},
    }
    house.post(HELLO | told | {"max_completion_tokens": 7, "request_id": "mine"})
    sent = house.vllm.bodies[-1]
    assert sent.pop("vllm_xargs") == {"other": "x", "num_recurrences": 2}
    assert (sent.pop("max_tokens"), sent.pop("return_token_ids")) == (7, True)
    assert sent == HELLO | {name: told[name] for name in told if name != "vllm_xargs"}


def test_the_servers_tokens_are_given_where_the_request_does_not_say(house: House) -> None:
    for asked in ({}, {"max_tokens": None}):
        house.post(HELLO | asked)
        assert house.vllm.bodies[-1]["max_tokens"] == 256
    house.gateway.context = 100
    # vLLM reads no such word here, so it says nothing; and it refuses more than its context.
    house.post({"prompt": "a", "max_completion_tokens": 1}, path=COMPLETE)
    assert house.vllm.bodies[-1]["max_tokens"] == 100


words = st.sampled_from(
    ["num_recurrences", "vllm_xargs", "risk", "extra_body", "metadata", "n", "stream"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from(["1", "low", "", "high"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
bodies = st.dictionaries(
    words | st.sampled_from(["reasoning_effort", "exit", "best_of", "use_beam_search", "stop"]),
    json_values,
    max_size=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=bodies)
def test_whatever_a_body_says_vllm_is_told_a_depth_within_the_policy(
    house: House, asked: dict[str, Any]
) -> None:
    before = len(house.vllm.bodies)
    answer = house.post(HELLO | asked, "clinic")
    assert answer.status_code in (200, 400, 403), answer.text
    for body in house.vllm.bodies[before:]:
        assert body["vllm_xargs"]["num_recurrences"] in (6, 7, 8)
        assert not {"use_beam_search", "num_recurrences", "exit"} & set(body)
    assert house.gateway.load().running == 0


def test_without_a_policy_the_model_bounds_the_depth(tmp_path: Path) -> None:
    with house_of(tmp_path, policy=None, keys=None, audit=None) as house:
        for asked, depth in (({}, 4), ({"num_recurrences": 8}, 8)):
            answer = house.client.post(CHAT, json=HELLO | asked)
            assert (answer.status_code, house.depth) == (200, depth)
            assert "return_token_ids" not in house.vllm.bodies[-1]
        error_of(house.client.post(CHAT, json=HELLO | {"num_recurrences": 9}), 400)
        # Where a request has several answers, numbers of tokens tell how many are whose.
        answer = house.client.post(CHAT, json=HELLO | {"n": 2}).json()
        assert house.vllm.bodies[-1]["return_token_ids"]
        assert [one["recurrence"]["by_depth"] for one in answer["choices"]] == [{"4": 4}, {"4": 3}]


# ---- overload and quotas


def test_depth_gives_way_when_requests_wait_but_no_floor_does(tmp_path: Path) -> None:
    vllm = FakeVllm(first_pause=30)
    with listening(vllm.app()) as url:
        with house_of(tmp_path, vllm, url, max_running=2, max_queue=2) as house:
            with listening(make_app(house.gateway)) as own:
                asyncio.run(crowded(house, own))
            assert house.gateway.load().running == 0
        ended = house.settled()
    assert [record["allowed"] for record in ended] == [8, 8, 8, 6]
    assert [record["adjusted"] for record in ended][3] == ["overload"]
    assert {record["reason"] for record in ended} == {"cancelled"}
    refused = house.records("refused")
    assert [(one["code"], one["status"]) for one in refused] == [("rate_limit_exceeded", 429)]


async def crowded(house: House, url: str) -> None:
    """Four requests that are not answered, and a fifth that finds no room."""
    body = HELLO | {"num_recurrences": 8}
    bank = {"authorization": f"Bearer {house.secrets['clinic']}"}
    async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
        waiting = []
        for count in range(1, 5):
            waiting.append(asyncio.create_task(client.post(CHAT, json=body, headers=bank)))
            while len(house.vllm.bodies) < count:
                await asyncio.sleep(0.01)
        assert (house.gateway.load().running, house.gateway.load().waiting) == (2, 2)
        answer = await client.post(CHAT, json=body, headers=bank)
        assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
        assert answer.headers["retry-after"] == "1"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        while house.gateway.load().running:
            await asyncio.sleep(0.01)


def test_a_quota_counts_what_was_spent_and_refuses_what_may_be_more(house: House) -> None:
    answer = house.post({"prompt": [1, 2, 3], "max_tokens": 3}, "shop", COMPLETE)
    assert answer.status_code == 200
    usage = {"authorization": f"Bearer {house.secrets['shop']}"}
    (quota,) = house.client.get("/v1/usage", headers=usage).json()["quotas"]
    assert quota["tokens"] == {"limit": 700, "spent": 6, "held": 0}
    # 20 of prompt at most, and 256 new ones, three times.
    error = error_of(house.post({"prompt": "a", "n": 3}, "shop", COMPLETE), 403)
    assert error["code"] == "quota_too_small"
    assert len(house.vllm.bodies) == 1
    assert [record["reason"] for record in house.settled()] == ["length"]
    (quota,) = house.client.get("/v1/usage", headers=usage).json()["quotas"]
    assert quota["tokens"] == {"limit": 700, "spent": 6, "held": 0}


def test_who_leaves_before_vllm_has_told_anything_has_spent_what_was_held(tmp_path: Path) -> None:
    vllm = FakeVllm(first_pause=30)
    with listening(vllm.app()) as url, house_of(tmp_path, vllm, url) as house:
        with listening(make_app(house.gateway)) as own:
            bodies = [{"prompt": "a", "max_tokens": 1, "stream": each} for each in (False, True)]
            for body in bodies:
                leave(house, own, body, "shop")
        (standing,) = house.gateway.governance.governor.standing("shop")[1]
        ended = house.settled()
    assert [record["reason"] for record in ended] == ["cancelled"] * 2
    assert [record["unmetered"] for record in ended] == [True, True]
    # The price is of what was told, the quota of what may have been computed.
    assert [Decimal(record["price"]) for record in ended] == [0, 0]
    most = [len(json.dumps(body, separators=(",", ":"))) for body in bodies]
    assert standing.tokens == sum(most) + 2


def leave(house: House, url: str, body: dict[str, Any], key: str) -> None:
    """Ask, and go away once vLLM has been asked."""
    before, told = len(house.vllm.bodies), {"authorization": f"Bearer {house.secrets[key]}"}

    async def go() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
            asking = asyncio.create_task(client.post(COMPLETE, json=body, headers=told))
            while len(house.vllm.bodies) == before:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(go())
    assert until(lambda: house.gateway.load().running == 0)
    assert until(lambda: house.vllm.left > before)


@pytest.mark.parametrize(
    ("path", "body", "bound"),
    [
        (
            COMPLETE,
            b'{"prompt": "\\u00e9\\ud83d\\ude00", "n": 1}',
            2 + 4 + len('{"prompt":"","n":1}'),
        ),
        (COMPLETE, b'{"prompt": [1, 2, 3]}', len('{"prompt":[1,2,3]}')),
        (CHAT, b'{"messages": []}', 256 + len('{"messages":[]}')),
        (CHAT, b'{"messages": [], "tools": [{}]}', 1000),
        (COMPLETE, b'{"prompt": "%s"}' % (b"a" * 2000), 1000),
    ],
)
def test_a_prompt_has_no_more_tokens_than_bytes(
    house: House, path: str, body: bytes, bound: int
) -> None:
    house.gateway.context = 1000
    house.post(body, path=path)
    assert [record["prompt_tokens"] for record in house.records("taken")] == [bound]


# ---- metering


def test_an_answer_is_metered_as_it_is_counted_by_hand(house: House) -> None:
    answer = house.post(HELLO | {"num_recurrences": 3, "seed": 5, "max_tokens": 9}, "bank")
    told = answer.json()["recurrence"]
    # The prompt's three tokens and all but the last of four are read.
    assert told == {
        "asked": 3,
        "allowed": 3,
        "mean": 3.0,
        "max": 3,
        "by_depth": {"3": 4},
        "iterations": 3 * (3 + 3),
        "flops": flops_of(3, 3, 4),
        "floor": 2,
        "tenant": "bank",
        "tier": "pro",
        "risks": [],
        "adjusted": [],
        "price": "0.00054",
    }
    (taken,), (ended,) = house.records("taken"), house.settled()
    assert taken["prompt_tokens"] == 256
    assert taken["reserved_tokens"] == 256 + 9
    assert taken["sampling"]["seed"] == ended["seed"] == 5
    assert ended["iterations"] == 18
    assert ended["prompt_sha256"] == digest_of(PROMPT)
    assert ended["output_sha256"] == digest_of([40, 41, 42, 43])
    assert (ended["prompt_tokens"], ended["new_tokens"]) == (3, 4)
    assert ended["flops"] == told["flops"]
    assert (ended["reason"], ended["price"]) == ("stop", "0.00054")
    assert ended["id"] == f"{answer.json()['id']}-0" == f"{answer.headers['x-request-id']}-0"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hides", [False, True])
def test_several_answers_are_metered_each(house: House, stream: bool, hides: bool) -> None:
    house.vllm.hides = hides
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "num_recurrences": 3}
    answer = house.post(body | {"stream": stream}, path=COMPLETE)
    assert answer.status_code == 200
    ended = house.settled()
    by_id = {record["id"][-1]: record for record in ended}
    counts = [(one["prompt_tokens"], one["new_tokens"]) for _, one in sorted(by_id.items())]
    if hides and not stream:
        # Only sums are told: seven tokens of prompts, ten new ones.
        assert counts == [(3, 3), (3, 3), (3, 2), (3, 2)]
    else:
        assert counts == [(3, 4), (3, 3), (4, 2), (4, 1)]
        assert [by_id[at]["flops"] for at in "0123"] == [flops_of(3, *one) for one in counts]
    hashes = {record["output_sha256"] for record in ended}
    assert (hashes == {None}) if hides else len(hashes) == 4
    totals = house.gateway.governance.governor.totals()["Acme", "basic"]
    assert totals.answers == 4
    assert totals.new_tokens == 10
    assert totals.iterations == sum(record["iterations"] for record in ended)


def test_the_log_keeps_tokens_where_the_operator_wants_them(tmp_path: Path) -> None:
    with house_of(tmp_path, audit_texts=True) as house:
        house.post(HELLO)
        (ended,) = house.settled()
    assert (ended["prompt"], ended["output"]) == (PROMPT, [40, 41, 42, 43])


def test_metrics_count_what_vllm_did(house: House) -> None:
    house.post(HELLO)
    house.post(HELLO | {"n": 1.5})
    told = {"authorization": f"Bearer {house.secrets['acme']}"}
    text = house.client.get("/metrics", headers=told).text
    assert 'rondo_tenant_iterations_total{tenant="Acme",tier="basic"} 12.0' in text
    assert 'rondo_requests_total{outcome="stop"} 1.0' in text
    assert 'rondo_requests_total{outcome="refused"} 1.0' in text
    error_of(house.client.get("/metrics"), 401)


# ---- streams


def asked_of(include: bool, continuous: bool) -> dict[str, Any]:
    options = {"include_usage": include, "continuous_usage_stats": continuous}
    return {"stream": True, "stream_options": options}


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_a_stream_tells_what_was_asked_for_and_no_more(house: House, path: str) -> None:
    body = HELLO if path == CHAT else {"prompt": "hello"}
    answer = house.post(body | {"stream": True}, path=path)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert ": keep-alive\n\n" in answer.text
    chunks = chunks_of(answer.text)
    assert {answer.headers["x-request-id"]} == {chunk["id"] for chunk in chunks}
    assert not any("usage" in chunk or "prompt_token_ids" in chunk for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert not any({"token_ids", "prompt_token_ids"} & set(choice) for choice in choices)
    said = [one["delta"].get("content", "") if path == CHAT else one["text"] for one in choices]
    assert "".join(said) == "Two and two."
    assert choices[-1]["recurrence"]["by_depth"] == {"2": 4}
    house.post(body | asked_of(True, False), path=path)
    (ended, _) = house.settled()
    assert (ended["reason"], ended["iterations"]) == ("stop", 12)
    assert ended["output_sha256"] == digest_of([40, 41, 42, 43])


def test_a_stream_ends_with_usage_and_recurrence_where_it_is_asked_for(house: House) -> None:
    *chunks, last = chunks_of(house.post(HELLO | asked_of(True, False)).text)
    assert not any("usage" in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert last["recurrence"]["iterations"] == 12
    chunks = chunks_of(house.post(HELLO | asked_of(True, True)).text)
    assert all("usage" in chunk for chunk in chunks)
    asked = HELLO | asked_of(False, True) | {"return_token_ids": True}
    chunks = chunks_of(house.post(asked).text)
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[0]["prompt_token_ids"] == PROMPT
    assert chunks[1]["choices"][0]["token_ids"] == [40]


def test_texts_pass_whatever_their_characters_are(tmp_path: Path) -> None:
    words = ("a\u2028b", "\x85\x0b", "\n\n", "\U0001f600")
    with house_of(tmp_path, FakeVllm(words=words)) as house:
        chunks = chunks_of(house.post({"prompt": "a", "stream": True}, path=COMPLETE).text)
        said = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
        assert "".join(said) == "".join(words)
        whole = house.post({"prompt": "a"}, path=COMPLETE).json()
        assert whole["choices"][0]["text"] == "".join(words)


# ---- endings


def test_what_vllm_refuses_is_passed_on_and_costs_nothing(tmp_path: Path) -> None:
    with house_of(tmp_path, FakeVllm(status=404)) as house:
        for stream in (False, True):
            answer = house.post(HELLO | {"stream": stream})
            assert answer.status_code == 404
            assert answer.json()["error"]["message"] == "this is what vLLM says"
        assert [record["reason"] for record in house.settled()] == ["untaken"] * 2
        assert house.gateway.governance.governor.totals() == {}


@pytest.mark.parametrize(
    ("told", "wrong"),
    [({"key": "right"}, "RONDO_UPSTREAM_KEY"), ({"status": 302}, "check the address")],
)
def test_what_is_the_operators_mistake_is_not_told_as_the_clients(
    tmp_path: Path, told: dict[str, Any], wrong: str
) -> None:
    with house_of(tmp_path, FakeVllm(**told)) as house:
        house.gateway.client.headers["authorization"] = "Bearer wrong"
        assert wrong in error_of(house.post(HELLO), 502)["message"]
        assert [record["reason"] for record in house.settled()] == ["untaken"]
    # Nobody is sent elsewhere with a prompt.
    assert len(house.vllm.bodies) == 1


def test_a_vllm_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with listening(FakeVllm().app()) as url:
        pass
    with house_of(tmp_path, url=url) as house:
        error = error_of(house.post(HELLO), 502)
        assert error["code"] == "upstream_unreachable"
        assert "\n" not in error["message"]
        assert [record["reason"] for record in house.settled()] == ["untaken"]
        error_of(house.client.get("/readyz"), 503)
        assert house.client.get("/healthz").status_code == 200


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"usage": {}, "choices": []}', b"\xff"])
def test_an_answer_that_is_none_is_an_error(tmp_path: Path, raw: bytes) -> None:
    with house_of(tmp_path, FakeVllm(raw=raw)) as house:
        error_of(house.post(HELLO), 502)
        assert [record["reason"] for record in house.settled()] == ["error"]


@pytest.mark.parametrize("breaks", ["line", "error"])
def test_a_stream_that_breaks_off_counts_what_was_told(tmp_path: Path, breaks: str) -> None:
    vllm = FakeVllm(breaks=breaks, pause=0.01)
    with listening(vllm.app()) as url, house_of(tmp_path, vllm, url) as house:
        *_, last = chunks_of(house.post(HELLO | {"stream": True}).text)
        assert last["error"]["message"]
        (ended,) = house.settled()
    assert (ended["reason"], ended["new_tokens"], ended["iterations"]) == ("error", 2, 8)
    assert ended["flops"] == flops_of(2, 3, 2)


def test_an_answer_that_has_ended_does_not_end_again(tmp_path: Path) -> None:
    with house_of(tmp_path, FakeVllm(breaks="error", break_at=1)) as house:
        body = {"prompt": "a", "n": 2, "max_tokens": 2, "stream": True}
        chunks = chunks_of(house.post(body, path=COMPLETE).text)
        told = [chunk["error"]["message"] for chunk in chunks if "error" in chunk]
        assert told == ["the engine died"]
        found = {record["id"][-1]: record for record in house.settled()}
    assert [found[at]["reason"] for at in "01"] == ["error", "stop"]
    assert [found[at]["new_tokens"] for at in "01"] == [1, 1]


def test_a_client_that_leaves_a_stream_stops_vllm(tmp_path: Path) -> None:
    vllm = FakeVllm(endless=True, pause=0.01)
    with listening(vllm.app()) as url, house_of(tmp_path, vllm, url) as house:
        with (
            listening(make_app(house.gateway)) as own,
            openai.OpenAI(base_url=f"{own}/v1", api_key=house.secrets["acme"]) as client,
            client.completions.create(
                model="tiny", prompt="a", stream=True, max_tokens=1000
            ) as stream,
        ):
            for _, _ in zip(range(3), stream, strict=False):
                pass
        assert until(lambda: vllm.left == 1)
        assert until(lambda: not house.gateway.load().running)
        (ended,) = house.settled()
    assert ended["reason"] == "cancelled"
    assert 3 <= ended["new_tokens"] < 1000
    assert ended["flops"] == flops_of(2, 3, ended["new_tokens"])
    assert "unmetered" not in ended


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_cut_off(tmp_path: Path, stream: bool) -> None:
    vllm = FakeVllm(first_pause=30)
    with (
        listening(vllm.app()) as url,
        house_of(tmp_path, vllm, url, max_seconds=0.2) as house,
    ):
        answer = house.post(HELLO | {"stream": stream})
        if stream:
            (told,) = chunks_of(answer.text)
            assert told["error"]["code"] == "timeout"
        else:
            assert error_of(answer, 504)["code"] == "timeout"
        assert until(lambda: vllm.left == 1)
        assert [record["reason"] for record in house.settled()] == ["time"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_shutdown_waits_and_then_cuts_off(tmp_path: Path, stream: bool) -> None:
    vllm = FakeVllm(first_pause=30)
    with listening(vllm.app()) as url, house_of(tmp_path, vllm, url) as house:
        with listening(make_app(house.gateway)) as own:
            asyncio.run(shut(house, own, stream))
        assert [record["reason"] for record in house.settled()] == ["shutdown"]


async def shut(house: House, url: str, stream: bool) -> None:
    told = {"authorization": f"Bearer {house.secrets['acme']}"}
    body = HELLO | {"stream": stream}
    async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
        asking = asyncio.create_task(client.post(CHAT, json=body, headers=told))
        while not house.vllm.bodies:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(house.gateway.close, 0.05)
        answer = await asking
        if stream:
            assert chunks_of(answer.text)[-1]["error"]["code"] == "closed"
        else:
            assert error_of(answer, 503)["code"] == "closed"
        late = await client.post(CHAT, json=body, headers=told)
        assert error_of(late, 503)["code"] == "closed"
        error_of(await client.get("/readyz"), 503)


def test_what_is_cut_off_is_not_cut_off_again(house: House) -> None:
    async def go() -> str:
        loop = asyncio.get_running_loop()
        passage = Passage("a", ChatOnward(), [], house.gateway._books, loop.time() + 60, print)

        def twice() -> None:
            passage.cut("shutdown")
            # When the first one has come into effect, and nobody has noticed.
            loop.call_soon(passage.cut, "cancelled")

        loop.call_soon(twice)
        loop.set_exception_handler(lambda loop, context: pytest.fail(str(context)))
        with pytest.raises(Cut):
            await passage.within(asyncio.sleep(30))
        return passage.why

    assert asyncio.run(go()) == "shutdown"


def test_streams_use_a_connection_again(tmp_path: Path) -> None:
    vllm = FakeVllm()
    with listening(vllm.app()) as url, house_of(tmp_path, vllm, url) as house, house.client:
        for _ in range(3):
            chunks_of(house.post(HELLO | {"stream": True}).text)
        house.client.portal.call(house.gateway.client.aclose)
    assert len(set(vllm.ports)) == 1


def test_a_shutdown_ends_at_once_where_nothing_runs(house: House) -> None:
    house.post(HELLO)
    house.post(HELLO | {"stream": True, "n": 2})
    since = time.monotonic()
    house.gateway.close(20)
    assert time.monotonic() - since < 10


def test_an_answer_ends_once_its_record_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with house_of(tmp_path, audit_fsync="each") as house:
        governor, seen = house.gateway.governance.governor, []
        kept = governor.durable

        def durable() -> None:
            seen.append(len(house.records("ended")))
            kept()

        monkeypatch.setattr(governor, "durable", durable)
        house.post(HELLO)
        assert seen == [1]
        house.post(HELLO | asked_of(True, False) | {"n": 2})
        assert seen == [1, 2, 3]


def test_a_log_that_cannot_be_written_lets_nothing_through(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(kind: str, **fields: Any) -> int:
        raise AuditError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(house.gateway.governance.governor.log, "append", full)
        assert error_of(house.post(HELLO), 503)["code"] == "no_audit"
    assert house.vllm.bodies == []
    assert house.settled() == []


# ---- who asks


@contextlib.contextmanager
def logged() -> Iterator[io.StringIO]:
    """What all loggers write."""
    text, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(text), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield text
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def test_a_key_is_needed_and_goes_no_further(tmp_path: Path) -> None:
    with logged() as text, house_of(tmp_path, FakeVllm(key="upstream-secret")) as house:
        error_of(house.client.post(CHAT, json=HELLO), 401)
        wrong = {"authorization": "Bearer rondo-acme.1.other"}
        error_of(house.client.post(CHAT, json=HELLO, headers=wrong), 401)
        assert house.vllm.bodies == []
        own = {"cookie": "a=b", "x-data-parallel-rank": "3", "x-request-id": "mine"}
        assert house.post(HELLO, **own).status_code == 200
        house.post(HELLO | {"n": "x"})
    (headers,) = house.vllm.headers
    assert headers["authorization"] == "Bearer upstream-secret"
    assert "cookie" not in headers
    assert "x-data-parallel-rank" not in headers
    written = text.getvalue() + house.log.read_text()
    assert '"outcome": ["stop"]' in written
    for secret in house.secrets.values():
        assert secret not in written + str(house.vllm.headers)
    assert "upstream-secret" not in written


def test_models_are_told_with_the_depths_of_who_asks(house: House) -> None:
    for key, depths in (("acme", (1, 2, 4)), ("bank", (2, 4, 8))):
        told = {"authorization": f"Bearer {house.secrets[key]}"}
        (model,) = house.client.get("/v1/models", headers=told).json()["data"]
        found = model["recurrence"]
        assert (found["min"], found["default"], found["max"]) == depths
        assert model["max_model_len"] == 256
    error_of(house.client.get("/v1/models"), 401)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/responses"), ("POST", "/tokenize"), ("GET", "/v1/load")]
)
def test_no_other_path_leads_to_vllm(house: House, method: str, path: str) -> None:
    told = {"authorization": f"Bearer {house.secrets['acme']}"}
    error_of(house.client.request(method, path, headers=told), 404)
    assert path not in house.client.get("/openapi.json").json()["paths"]


def test_a_body_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with house_of(tmp_path, max_body=100) as house:
        error_of(house.post(HELLO | {"user": "a" * 100}), 413)


def test_the_official_client_works_unmodified(tmp_path: Path) -> None:
    vllm = FakeVllm()
    with listening(vllm.app()) as url, house_of(tmp_path, vllm, url) as house:
        with (
            listening(make_app(house.gateway)) as own,
            openai.OpenAI(
                base_url=f"{own}/v1", api_key=house.secrets["bank"], max_retries=0
            ) as client,
        ):
            use(client)
        house.settled()


def use(client: openai.OpenAI) -> None:
    hello = HELLO["messages"]
    answer = client.chat.completions.create(
        model="tiny", messages=hello, extra_body={"num_recurrences": 3}
    )
    assert answer.choices[0].message.content == "Two and two."
    assert answer.recurrence["allowed"] == 3
    with client.chat.completions.stream(model="tiny", messages=hello) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Two and two."
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(model="tiny", prompt="a", stream=True, stream_options=options)
    )
    assert chunks[-1].usage.completion_tokens == 4
    assert chunks[-1].recurrence["allowed"] == 4
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="leave exit"):
        client.chat.completions.create(
            model="tiny", messages=hello, extra_body={"exit": {"rule": "kl"}}
        )


# ---- settings


@pytest.mark.parametrize(
    "upstream",
    ["vllm:8000", "ftp://vllm", "http://", "http://a:b@vllm", "http://vllm/v1", "http://vllm:x"],
)
def test_an_upstream_must_be_an_address(upstream: str) -> None:
    with pytest.raises(UserError, match="must be an address alone"):
        GatewayConfig(upstream=upstream, model="m")


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="beyond --max-new-tokens 5"):
        GatewayConfig(upstream="http://vllm", model="m", max_new_tokens=5)
    assert GatewayConfig(upstream="http://vllm:8000/", model="m").upstream == "http://vllm:8000"


def test_a_denial_is_no_crash(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(want: Any) -> Any:
        raise Denied("nobody is served", 403, "closed_shop")

    monkeypatch.setattr(house.gateway.governance.governor.rules, "give", denied)
    assert error_of(house.post(HELLO), 403)["code"] == "closed_shop"
