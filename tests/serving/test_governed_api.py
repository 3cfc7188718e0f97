"""Keys, policy and audit log as clients and operators of the HTTP API see them."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest
from engines import serve, small
from fake_engine import until
from fake_server import CHAT, COMPLETE, HELLO, OWN, TEXT, chunks_of, error_of, served
from governing import SHEET, Served, Site, bearer, engine_of, heard_of, served_of
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from conftest import byte_tokenizer
from rondo.cli import main
from rondo.errors import UserError
from rondo_serve.api.app import make_app
from rondo_serve.api.replies import ChatReply, UsageReply
from rondo_serve.requests import Ask

QUOTA = {"quotas": [{"window": "1d", "tokens": 100}]}
LIMITED = {"tiers": SHEET["tiers"] | {"bronze": SHEET["tiers"]["bronze"] | QUOTA}}
READING = ("/v1/models", "/v1/models/tiny", "/v1/usage")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def secrets(site: Site) -> dict[str, str]:
    found = {name: site.key(name) for name in ("acme", "press", "clinic")}
    return found | {"operator": site.key("operator", "metrics")}


@pytest.fixture
def there(site: Site, secrets: dict[str, str]) -> Iterator[Served]:
    """A server with policy, keys and log."""
    with served_of(site) as found:
        yield found


def chat(there: Served, secret: str = "", told: dict[str, str] | None = None, **body: Any) -> Any:
    headers = (bearer(secret) if secret else {}) | (told or {})
    return there.client.post(CHAT, json=HELLO | body, headers=headers)


def metrics(there: Served, secret: str) -> dict[tuple[str, ...], float]:
    """Values by name and labels, which are in the order of their names."""
    text = there.client.get("/metrics", headers=bearer(secret)).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ---- keys


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Basic YWNtZTphY21l", "missing_api_key"),
        ("Bearer none", "invalid_api_key"),
        ("Bearer rondo-acme.1.guessed", "invalid_api_key"),
        ("Bearer rondo-nobody.1.noise0-acme", "invalid_api_key"),
        ("Bearer rondo-acme.1.noise0-acm\u00e9", "invalid_api_key"),
        ("Bearer rondo-old.1.noise4-old", "expired"),
        ("Bearer rondo-gone.1.noise5-gone", "revoked"),
    ],
)
def test_who_has_no_key_that_holds_is_told_so_and_reaches_nothing(
    site: Site, secrets: dict[str, str], header: str | None, code: str
) -> None:
    site.key("old", expires="2026-01-01")
    site.key("gone")
    site.revoke("gone")
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    with served_of(site) as there:
        asked = [there.client.post(path, json=HELLO, headers=headers) for path in (CHAT, COMPLETE)]
        asked += [there.client.get(path, headers=headers) for path in (*READING, "/metrics")]
        for response in asked:
            error = error_of(response, 401)
            assert (error["code"], error["type"]) == (code, "authentication_error")
            assert response.headers["www-authenticate"] == "Bearer"
        assert there.engine.asked == []
        assert [there.client.get(path).status_code for path in ("/healthz", "/readyz")] == [200] * 2
    # Anyone could fill the disk with it.
    assert [record["kind"] for record in site.records()] == ["opened"]


def test_a_key_may_do_what_its_scopes_say(there: Served, secrets: dict[str, str]) -> None:
    error = error_of(chat(there, secrets["operator"]), 403)
    assert error["code"] == "scope"
    assert error["message"].startswith(
        "key operator has the scope metrics, and this needs generate"
    )
    metric = there.client.get("/metrics", headers=bearer(secrets["acme"]))
    assert error_of(metric, 403)["code"] == "scope"
    assert there.client.get("/metrics", headers=bearer(secrets["operator"])).status_code == 200
    for path in READING:
        assert there.client.get(path, headers=bearer(secrets["operator"])).status_code == 200
    assert chat(there, secrets["acme"], {"authorization": f"bearer  {secrets['acme']}"}).is_success


def test_a_key_is_revoked_and_changed_over_while_the_server_runs(
    there: Served, secrets: dict[str, str]
) -> None:
    site, old = there.site, secrets["acme"]
    new = site.key("acme")
    assert [chat(there, secret).status_code for secret in (old, new)] == [200, 200]
    site.revoke("acme", 1)
    assert error_of(chat(there, old), 401)["code"] == "revoked"
    assert chat(there, new).json()["recurrence"]["tenant"] == "acme-corp"
    with heard_of("rondo_serve.governed") as told:
        (site.folder / "keys.yaml").write_text("acme: 3\n")
        assert [chat(there, new).status_code for _ in range(3)] == [200] * 3
    assert len(told) == 1
    assert "the one before stays in force" in told[0]
    # The log tells when other keys took effect.
    assert len(site.records("keys")) == 2
    assert metrics(there, secrets["operator"])["rondo_file_refused", "keys"] == 1


# ---- depth


def test_a_depth_is_clamped_and_the_answer_says_so(there: Served, secrets: dict[str, str]) -> None:
    response = chat(there, secrets["acme"], {"x-rondo-risk": "high"}, num_recurrences=40)
    assert response.headers["x-rondo-recurrences-allowed"] == "8"
    assert response.headers["x-rondo-adjusted"] == "cap"
    body = response.json()
    ChatReply.model_validate(body)
    for told in (body["recurrence"], body["choices"][0]["recurrence"]):
        own = {"asked": 40, "allowed": 8, "floor": 3, "tenant": "acme-corp", "tier": "gold"}
        assert told | own | {"risks": ["high"], "adjusted": ["cap"]} == told
        assert Decimal(told["price"]) == Decimal("0.25") * told["iterations"] / 10**6
    plain = chat(there, secrets["acme"])
    assert plain.json()["recurrence"]["adjusted"] == []
    assert "x-rondo-adjusted" not in plain.headers


@pytest.mark.parametrize(
    ("key", "header", "metadata", "asked", "found"),
    [
        ("press", None, None, 1, (1, 1, [], [])),
        ("press", None, None, None, (2, 1, [], [])),
        ("press", "high", None, 1, (3, 3, ["high"], ["risk"])),
        ("press", None, {"risk": "high", "else": 1}, 1, (3, 3, ["high"], ["risk"])),
        ("press", "casual", {"risk": " high ,casual"}, 1, (3, 3, ["casual", "high"], ["risk"])),
        ("press", "casual", "high", 1, (1, 1, ["casual"], [])),
        ("clinic", None, None, 1, (3, 3, ["high"], ["floor", "risk"])),
        # What a request names only adds to what the key is.
        ("clinic", "casual", None, 1, (3, 3, ["casual", "high"], ["floor", "risk"])),
        ("clinic", "medical", None, 7, (7, 6, ["high", "medical"], [])),
        ("acme", None, None, 1, (2, 2, [], ["floor"])),
        ("press", None, None, 9, (4, 1, [], ["cap"])),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_class_comes_by_key_header_or_metadata_and_no_request_lowers_its_floor(
    there: Served,
    secrets: dict[str, str],
    key: str,
    header: str | None,
    metadata: Any,
    asked: int | None,
    found: tuple[int, int, list[str], list[str]],
    stream: bool,
) -> None:
    headers = {"x-rondo-risk": header} if header else {}
    more: dict[str, Any] = {} if asked is None else {"num_recurrences": asked}
    if stream:
        more |= {"stream": True, "stream_options": {"include_usage": True}}
    response = chat(there, secrets[key], headers, metadata=metadata, **more)
    told = (chunks_of(response.text)[-1] if stream else response.json())["recurrence"]
    assert (told["allowed"], told["floor"], told["risks"], told["adjusted"]) == found
    assert response.headers["x-rondo-recurrences-allowed"] == str(found[0])
    assert response.headers.get("x-rondo-adjusted", "") == ",".join(found[3])


def test_a_class_that_a_proxy_adds_counts_beside_the_clients(
    there: Served, secrets: dict[str, str]
) -> None:
    headers = [("authorization", f"Bearer {secrets['press']}")]
    headers += [("x-rondo-risk", "casual"), ("x-rondo-risk", "high")]
    body = HELLO | {"num_recurrences": 1}
    told = there.client.post(CHAT, json=body, headers=headers).json()["recurrence"]
    assert (told["floor"], told["risks"]) == (3, ["casual", "high"])


@pytest.mark.parametrize(
    ("header", "metadata", "status", "code", "message"),
    [
        ("hihg", None, 400, "unknown_risk", "there is no risk class 'hihg': there are casual, "),
        (None, {"risk": "x" * 999}, 400, "unknown_risk", f"there is no risk class '{'x' * 100}'"),
        ("medical", None, 403, "risk_beyond_tier", "risk class medical needs 6 iterations, and "),
        (None, {"risk": ["high"]}, 400, "invalid_value", "metadata.risk must be the name of a "),
    ],
)
def test_a_class_that_cannot_be_is_refused(
    there: Served,
    secrets: dict[str, str],
    header: str | None,
    metadata: Any,
    status: int,
    code: str,
    message: str,
) -> None:
    headers = {"x-rondo-risk": header} if header else {}
    error = error_of(chat(there, secrets["press"], headers, metadata=metadata), status)
    assert error["code"] == code
    assert error["message"].startswith(message)
    (refused,) = there.site.records("refused")
    assert (refused["tenant"], refused["code"], refused["status"]) == ("acme-corp", code, status)
    found = metrics(there, secrets["operator"])
    assert found["rondo_tenant_refused_total", code, "acme-corp"] == 1


def test_without_a_policy_there_is_no_class_and_bounds_are_the_servers(site: Site) -> None:
    secret = site.key("acme")
    with served_of(site, policy=None) as there:
        error = error_of(chat(there, secret, {"x-rondo-risk": "high"}), 400)
        assert error["message"].startswith("there is no policy here, and no risk class")
        assert error["param"] == "risk"
        error = error_of(chat(there, secret, num_recurrences=9), 400)
        assert error["message"] == "num_recurrences must lie between 1 and 8 here, got 9"
        told = chat(there, secret, num_recurrences=3).json()["recurrence"]
        assert told["allowed"] == 3
        assert set(told).isdisjoint({"floor", "tier", "tenant", "price", "adjusted"})
    # The log knows whose it was.
    (ended,) = site.records("ended")
    assert (ended["key"], ended["policy_sha256"], ended["price"]) == ("acme", None, "0")


def test_an_effort_is_what_the_tier_says(site: Site, secrets: dict[str, str]) -> None:
    site.rule(tiers=SHEET["tiers"] | {"gold": {"default": 4, "cap": 8, "efforts": {"low": 3}}})
    with served_of(site) as there:
        for key, effort, depth in (
            ("acme", "low", 3), ("acme", "max", 8), ("press", "low", 1), ("press", "max", 4),
        ):  # fmt: skip
            told = chat(there, secrets[key], reasoning_effort=effort).json()["recurrence"]
            assert (told["allowed"], told["effort"]) == (depth, effort)
        models = there.client.get("/v1/models", headers=bearer(secrets["acme"])).json()
        depths = models["data"][0]["recurrence"]
        assert (depths["default"], depths["min"], depths["max"]) == (4, 1, 8)
        assert depths["efforts"]["low"] == 3
        one = there.client.get("/v1/models/tiny", headers=bearer(secrets["press"])).json()
        assert (one["recurrence"]["default"], one["recurrence"]["max"]) == (2, 4)


def test_under_overload_the_answer_says_that_its_depth_gave_way(
    site: Site, secrets: dict[str, str]
) -> None:
    # One waits at all times.
    site.rule(overload=[{"waiting": 1, "keep": 0.5}])
    with served_of(site) as there:
        response = chat(there, secrets["acme"], num_recurrences=8)
        assert response.headers["x-rondo-adjusted"] == "overload"
        assert response.json()["recurrence"]["allowed"] == 4
        assert metrics(there, secrets["operator"])["rondo_adjusted_requests_total", "overload"] == 1


# ---- quotas


def test_a_quota_that_is_spent_is_told_with_when_to_come_again(
    site: Site, secrets: dict[str, str]
) -> None:
    site.rule(**LIMITED)
    with served_of(site) as there:
        # Each holds 6 + 30, and takes 6 + 4.
        for _ in range(7):
            assert chat(there, secrets["press"], max_tokens=30).is_success
        response = chat(there, secrets["press"], max_tokens=30)
        error = error_of(response, 429)
        assert (error["code"], error["type"]) == ("quota_exceeded", "rate_limit_error")
        assert error["message"].startswith("this request may take 36 tokens, and key press has 30 ")
        assert 0 < int(response.headers["retry-after"]) <= 86_400
        # Fewer tokens still fit, and other keys have their own.
        assert chat(there, secrets["press"], max_tokens=5).is_success
        assert chat(there, secrets["acme"], max_tokens=200).is_success
        error = error_of(chat(there, secrets["press"], max_tokens=200), 403)
        assert error["code"] == "quota_too_small"
        usage = there.client.get("/v1/usage", headers=bearer(secrets["press"])).json()
        UsageReply.model_validate(usage)
        assert (usage["key"], usage["tenant"], usage["tier"]) == ("press", "acme-corp", "bronze")
        (quota,) = usage["quotas"]
        assert quota["tokens"] == {"limit": 100, "spent": 80, "held": 0}
        assert quota["window"] == "1d"
        assert quota["flops"] is None
        empty = there.client.get("/v1/usage", headers=bearer(secrets["acme"])).json()
        assert empty["quotas"] == []
    assert [one["code"] for one in site.records("refused")] == ["quota_exceeded", "quota_too_small"]


def test_the_answers_of_a_request_are_allowed_together_or_not_at_all(
    site: Site, secrets: dict[str, str]
) -> None:
    site.rule(**LIMITED)
    with served_of(site) as there:
        # Each would fit by itself.
        error = error_of(chat(there, secrets["press"], n=3, max_tokens=40), 403)
        assert error["code"] == "quota_too_small"
        assert there.engine.asked == []
        usage = there.client.get("/v1/usage", headers=bearer(secrets["press"])).json()
        assert usage["quotas"][0]["tokens"]["held"] == 0
    assert site.records("taken") == []
    assert [one["code"] for one in site.records("refused")] == ["quota_too_small"]


# ---- figures


def test_metrics_are_the_sums_of_what_answers_said(there: Served, secrets: dict[str, str]) -> None:
    said: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key in ("acme", "press", "clinic", "acme", "press"):
        for depth in (1, 3):
            body = chat(there, secrets[key], num_recurrences=depth, n=2, max_tokens=3).json()
            tenant = body["recurrence"]["tenant"], body["recurrence"]["tier"]
            said.setdefault(tenant, []).append(body)
    error_of(chat(there, secrets["press"], {"x-rondo-risk": "medical"}), 403)
    found = metrics(there, secrets["operator"])
    for (tenant, tier), bodies in said.items():
        for name in ("iterations", "flops", "price"):
            total = sum(Decimal(str(body["recurrence"][name])) for body in bodies)
            assert found[f"rondo_tenant_{name}_total", tenant, tier] == pytest.approx(float(total))
        new = sum(body["usage"]["completion_tokens"] for body in bodies)
        assert found["rondo_tenant_new_tokens_total", tenant, tier] == new
        assert found["rondo_tenant_answers_total", tenant, tier] == 2 * len(bodies)
    assert len(said) == 3
    assert found["rondo_tenant_refused_total", "risk_beyond_tier", "acme-corp"] == 1
    assert found["rondo_audit_records_total",] == len(there.site.records())


def test_an_answer_of_a_real_engine_tells_what_its_record_does(site: Site) -> None:
    site.rule(keys={})
    engine, governance = engine_of(site)
    app = make_app(
        engine, byte_tokenizer(), small().config, governance, site.config(max_context=64)
    )
    engine.start()
    with TestClient(app, base_url=OWN) as client:
        asked = TEXT | {
            "max_tokens": 7,
            "num_recurrences": 3,
            "exit": {"rule": "entropy", "threshold": 5.4},
        }
        bodies = [client.post(COMPLETE, json=asked | {"seed": seed}).json() for seed in range(3)]
    engine.close(0.0)
    governance.governor.close()
    for body, ended in zip(bodies, site.records("ended"), strict=True):
        told = body["recurrence"]
        assert ended["id"] == f"{body['id']}-0"
        assert told["by_depth"] == ended["depths"]
        for name in ("asked", "allowed", "floor", "tier", "iterations", "flops", "price", "exit"):
            assert told[name] == ended[name], name
        assert body["choices"][0]["recurrence"]["seed"] == ended["seed"]
        assert body["usage"]["completion_tokens"] == ended["new_tokens"]
    assert sum(body["recurrence"]["iterations"] for body in bodies) == engine.load().core_tokens


# ---- a policy that changes


def test_another_policy_takes_effect_and_an_invalid_one_does_not(
    there: Served, secrets: dict[str, str]
) -> None:
    def depth() -> int:
        return chat(there, secrets["acme"]).json()["recurrence"]["allowed"]

    assert depth() == 4
    there.site.rule(tiers=SHEET["tiers"] | {"gold": {"default": 6, "cap": 8}})
    assert depth() == 6
    found = metrics(there, secrets["operator"])
    assert found["rondo_file_reloads_total", "policy"] == 1
    assert found["rondo_file_refused", "policy"] == 0
    with heard_of("rondo_serve.governed") as told:
        # The model does not go so deep, so it would fail at requests.
        there.site.rule(tiers=SHEET["tiers"] | {"gold": {"default": 7, "cap": 9}})
        assert [depth() for _ in range(3)] == [6, 6, 6]
    assert len(told) == 1
    assert "tier gold goes up to 9 iterations, beyond the cap of 8" in told[0]
    assert metrics(there, secrets["operator"])["rondo_file_refused", "policy"] == 1
    there.site.rule()
    assert depth() == 4
    found = metrics(there, secrets["operator"])
    assert found["rondo_file_reloads_total", "policy"] == 2
    assert found["rondo_file_refused", "policy"] == 0
    kinds = [record["kind"] for record in there.site.records() if record["kind"] != "ended"]
    takens = ["taken"] * 3
    assert kinds == ["opened", "taken", "policy", "taken", *takens, "policy", "taken"]


# ---- the log


def test_the_log_keeps_hashes_and_neither_secrets_nor_texts(
    there: Served, secrets: dict[str, str]
) -> None:
    message = [{"role": "user", "content": "the quick brown fox"}]
    assert chat(there, secrets["acme"], messages=message, user="somebody").is_success
    error_of(chat(there, "rondo-acme.1.mistyped", messages=message), 401)
    raw = there.site.log.read_text()
    taken, ended = there.site.records("taken")[0], there.site.records("ended")[0]
    assert set(taken).isdisjoint({"prompt", "output"})
    assert "output" not in ended
    for secret in (*secrets.values(), "noise0", "mistyped", "fox", "Two", "somebody"):
        assert secret not in raw
    (ask,) = there.engine.asked
    assert json.dumps(ask.prompt, separators=(",", ":"))[1:-1] not in raw


def test_the_log_keeps_tokens_where_it_is_asked_for(site: Site, secrets: dict[str, str]) -> None:
    with served_of(site, audit_texts=True) as there:
        assert chat(there, secrets["acme"]).is_success
        assert site.records("taken")[0]["prompt"] == list(there.engine.asked[0].prompt)
        assert site.records("ended")[0]["output"] == []


@contextmanager
def blocked(there: Served, call: str, failing: Any) -> Iterator[None]:
    """Have a call of the system fail, or wait, at the log's file."""
    log, plain = there.governance.governor.log, getattr(os, call)
    assert log is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os, call, lambda file, *of: (failing if file == log._file else plain)(file, *of)
        )
        yield


def test_while_the_disk_is_full_nothing_is_answered(there: Served, secrets: dict[str, str]) -> None:
    def full(file: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert chat(there, secrets["acme"]).is_success
    with heard_of("rondo_serve.governed") as told, blocked(there, "write", full):
        for stream in (False, True):
            response = chat(there, secrets["acme"], stream=stream)
            error = error_of(response, 503)
            assert (error["code"], error["type"]) == ("no_audit", "server_error")
            assert error["message"].startswith("nothing is answered while the audit log cannot ")
            assert str(there.site.folder) not in response.text
            assert response.headers["retry-after"] == "5"
    # The operator is told why.
    full_told = "a refusal could not be recorded: cannot write to "
    assert [line.startswith(full_told) for line in told] == [True] * 2
    assert all(line.endswith("No space left on device") for line in told)
    assert len(there.engine.asked) == 1
    assert chat(there, secrets["acme"]).is_success
    kinds = [record["kind"] for record in there.site.records()]
    assert kinds == ["opened", "taken", "ended", "taken", "ended"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_record_the_disk_refuses_does_not_end(
    site: Site, secrets: dict[str, str], stream: bool
) -> None:
    def broken(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with served_of(site, audit_fsync="each") as there:
        with blocked(there, "fsync", broken):
            response = chat(there, secrets["acme"], stream=stream)
        # What is streamed has begun before.
        assert response.status_code == (200 if stream else 503)
        text = response.text.replace("data: [DONE]", "").strip().rpartition("data: ")[2]
        assert json.loads(text)["error"]["code"] == "no_audit"
        assert '"finish_reason":"stop"' not in response.text
        # Nor does any other begin, whether or not the disk recovers, and balancers are told.
        assert error_of(chat(there, secrets["acme"]), 503)["code"] == "no_audit"
        assert error_of(there.client.get("/readyz"), 503)["code"] == "no_audit"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fsync", "waits"), [("each", True), ("interval", False), ("off", False)])
def test_an_answer_ends_once_its_record_is_on_the_disk_where_each_must_be(
    site: Site, secrets: dict[str, str], fsync: str, waits: bool, stream: bool
) -> None:
    free, plain = threading.Event(), os.fsync

    def slow(file: int) -> None:
        assert free.wait(20)
        plain(file)

    with (
        served_of(site, audit_fsync=fsync, audit_seconds=0.001) as there,
        blocked(there, "fsync", slow),
        ThreadPoolExecutor(1) as one,
    ):
        try:
            coming = one.submit(chat, there, secrets["acme"], stream=stream)
            assert until(lambda: bool(there.engine.ended))
            if waits:
                with pytest.raises(TimeoutError):
                    coming.result(0.3)
                assert site.records()[-1]["kind"] == "ended"
            else:
                assert coming.result(20).is_success
        finally:
            free.set()
        response = coming.result(20)
        assert response.is_success
        assert "Two" in response.text


# ---- clients


@contextmanager
def client_of(url: str, secret: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0) as client:
        yield client


def test_the_official_client_needs_nothing_but_its_key(
    there: Served, secrets: dict[str, str]
) -> None:
    more = {"extra_headers": {"x-rondo-risk": "medical"}, "metadata": {"risk": "casual"}}
    text: dict[str, Any] = {"model": "tiny", "prompt": "a"}
    with served(there.app) as url:
        with client_of(url, secrets["clinic"]) as client:
            answer = client.chat.completions.create(
                model="tiny", messages=HELLO["messages"], reasoning_effort="low", **more
            )
            assert answer.recurrence["risks"] == ["casual", "high", "medical"]
            assert (answer.recurrence["floor"], answer.recurrence["allowed"]) == (6, 6)
            stream = client.completions.create(**text, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == "Two and two.!"
            with pytest.raises(openai.BadRequestError, match="there is no risk class 'none'"):
                client.completions.create(**text, extra_headers={"x-rondo-risk": "none"})
        for secret, kind, told in (
            ("none", openai.AuthenticationError, "the API key is not valid"),
            (secrets["operator"], openai.PermissionDeniedError, "needs generate"),
        ):
            with client_of(url, secret) as client, pytest.raises(kind, match=told):
                client.completions.create(**text)


def test_the_document_tells_of_keys_and_bounds_no_depth_that_a_policy_clamps(
    there: Served,
) -> None:
    document = there.client.get("/openapi.json").json()
    for path, method in ((CHAT, "post"), ("/v1/models", "get"), ("/v1/usage", "get")):
        assert {"401", "403"} <= set(document["paths"][path][method]["responses"])
    assert "429" in document["paths"][CHAT]["post"]["responses"]
    headers = document["paths"][CHAT]["post"]["responses"]["200"]["headers"]
    assert {"x-rondo-adjusted", "x-rondo-recurrences-allowed"} <= set(headers)
    depth = document["components"]["schemas"]["ChatBody"]["properties"]["num_recurrences"]
    (whole,) = [one for one in depth["anyOf"] if one["type"] == "integer"]
    assert (whole["minimum"], whole["maximum"]) == (1, 2**31 - 1)


# ---- the start


def test_a_policy_that_gives_nobody_a_tier_is_refused_at_the_start(site: Site) -> None:
    site.rule(default_tier=None, keys={})
    told = "names no default_tier, and without --keys nobody has another"
    with pytest.raises(UserError, match=told), served_of(site):
        pass
    # With keys, some may be of a tier.
    site.rule(default_tier=None, keys={"acme": {"tier": "gold"}})
    secret, other = site.key("acme"), site.key("other")
    with served_of(site) as there:
        assert chat(there, secret).is_success
        assert error_of(chat(there, other), 403)["code"] == "no_tier"
        for path in ("/v1/models", "/v1/usage"):
            error = error_of(there.client.get(path, headers=bearer(other)), 403)
            assert error["message"].startswith("key 'other' is of no tier")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"tiers": {"gold": {"default": 4, "cap": 9}}},
            "tier gold goes up to 9 iterations, beyond",
        ),
        ({"tiers": {}}, "does not fit"),
        (
            {"risks": SHEET["risks"] | {"unsure": {"escalation": {"rule": "gate"}}}},
            "escalates by the gate, and the model has none",
        ),
    ],
)
def test_a_policy_that_the_model_cannot_keep_is_refused_at_the_start(
    site: Site, changes: dict[str, Any], told: str
) -> None:
    site.rule(**({"default_tier": "gold", "keys": {}} | changes))
    with pytest.raises(UserError, match=told) as caught, served_of(site):
        pass
    assert "\n" not in str(caught.value)
    assert not site.log.exists()


@pytest.mark.parametrize(
    "words", [("num-recurrences", "3"), ("min-recurrences", "2"), ("efforts", "low", "2")]
)
def test_what_the_policy_says_cannot_be_said_beside_it(
    site: Site, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    policy = str(site.folder / "policy.yaml")
    flag, *values = words
    assert main(["serve", str(site.folder), "--policy", policy, f"--{flag}", *values]) == 2
    told = capsys.readouterr().err.strip()
    assert told.endswith(f"--policy says what --{flag} would: leave --{flag}")
    assert "\n" not in told


def test_a_log_among_the_models_files_is_refused(site: Site) -> None:
    inside = str(site.folder / "tiny" / "audit.jsonl")
    with (
        pytest.raises(UserError, match="lies in the model's own directory"),
        served_of(site, audit=inside),
    ):
        pass
    assert [path.name for path in (site.folder / "tiny").iterdir()] == ["config.json"]


def test_texts_are_kept_in_a_log_only(site: Site) -> None:
    with pytest.raises(UserError, match="--audit-texts keeps texts in a log: give --audit"):
        site.config(audit=None, audit_texts=True)


def test_tenants_do_not_share_prefixes(site: Site) -> None:
    engine, governance = engine_of(site, prefix_cache=True)
    prompt = tuple(range(10, 50))
    heard = {}
    for name, key in (("first", "acme"), ("again", "acme"), ("other", "clinic")):
        ask = Ask(name, prompt, 2, 4, key=key)
        heard[name] = serve(engine, [(0, ask)])[name].end.receipt
    governance.governor.close()
    cached = [heard[name].cached_tokens for name in ("first", "again", "other")]
    assert cached[0] == cached[2] == 0
    assert cached[1] > 16
