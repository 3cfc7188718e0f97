"""The HTTP API over an engine that follows a script."""

import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Script
from fake_server import (
    ANSWER,
    CHAT,
    COMPLETE,
    HELLO,
    OWN,
    TEXT,
    app_of,
    chunks_of,
    client_of,
    error_of,
)
from pydantic import ValidationError
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from conftest import byte_tokenizer
from rondo_serve.api import log, reading
from rondo_serve.api.bodies import ChatBody, CompletionBody
from rondo_serve.api.logprobs import Speller
from rondo_serve.api.page import Page, hashes
from rondo_serve.api.replies import ChatChunk, ChatReply, CompletionReply, ModelList
from rondo_serve.requests import Refused

# ---- answers


def test_a_chat_tells_text_usage_and_depth() -> None:
    response = client_of().post(CHAT, json=HELLO | {"num_recurrences": 3, "seed": 7})
    body = response.json()
    ChatReply.model_validate(body)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["recurrence"] == {
        "asked": 3,
        "allowed": 3,
        "mean": 1.75,
        "max": 3,
        "by_depth": {"1": 2, "2": 1, "3": 1},
        "iterations": 25,
        "flops": 1e6,
        "seed": 7,
    }
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 4,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert response.headers["x-rondo-recurrences-allowed"] == "3"
    assert "tokens" not in choice


def test_a_completion_of_several_prompts_has_n_choices_for_each_with_seeds_that_follow() -> None:
    client = client_of()
    body = client.post(COMPLETE, json={"prompt": ["a", "bc"], "n": 2, "seed": 5}).json()
    CompletionReply.model_validate(body)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["recurrence"]["seed"] for choice in body["choices"]] == [5, 6, 7, 8]
    assert [len(ask.prompt) for ask in client.engine.asked] == [1, 1, 2, 2]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 16
    assert body["recurrence"]["flops"] == 4e6
    assert "seed" not in body["recurrence"]


def test_many_prompts_are_taken_that_the_queue_can_hold() -> None:
    client = client_of(max_queue=5, max_running=4)
    assert client.post(COMPLETE, json={"prompt": ["a"] * 9}).status_code == 200
    error = error_of(client.post(COMPLETE, json={"prompt": ["a"] * 5, "n": 2}), 400)
    assert error["param"] == "prompt"
    assert error["message"].startswith("10 answers are asked for at once, and 9 are given")
    assert error_of(client_of(max_queue=0, max_running=1).post(CHAT, json=HELLO | {"n": 2}), 400)


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6]]])
def test_a_prompt_may_be_tokens(prompt: Any) -> None:
    client = client_of()
    assert client.post(COMPLETE, json={"prompt": prompt}).status_code == 200
    assert [ask.prompt for ask in client.engine.asked] == [(5, 6)]


def test_two_identical_prompts_count_twice_in_the_usage() -> None:
    body = client_of().post(COMPLETE, json={"prompt": ["ab", "ab"]}).json()
    assert body["usage"]["prompt_tokens"] == 4


def test_tokens_with_their_depth_are_told_where_they_are_asked_for() -> None:
    body = client_of().post(CHAT, json=HELLO | {"token_recurrences": True}).json()
    tokens = body["choices"][0]["tokens"]
    assert [token["recurrences"] for token in tokens] == [1, 2, 3, 4]
    assert "".join(token["text"] for token in tokens) + "!" == ANSWER


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_a_stream_adds_up_to_the_whole_answer(path: str) -> None:
    asked = (HELLO if path == CHAT else TEXT) | {
        "stream": True,
        "n": 2,
        "seed": 3,
        "stream_options": {"include_usage": True},
    }
    response = client_of().post(path, json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-rondo-recurrences-allowed"] == "4"
    *chunks, last = chunks_of(response.text)
    for chunk in [*chunks, last]:
        (ChatChunk if path == CHAT else CompletionReply).model_validate(chunk)
    for index in (0, 1):
        pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        texts = [p["delta"].get("content") or "" if path == CHAT else p["text"] for p in pieces]
        assert "".join(texts) == ANSWER
        assert [r for p in pieces for r in p.get("recurrences", [])] == [1, 2, 3, 4]
        told = [token["text"] for p in pieces for token in p.get("tokens", [])]
        assert "".join(told) + "!" == ANSWER
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["stop"]
        assert pieces[-1]["recurrence"]["by_depth"] == {"1": 1, "2": 1, "3": 1, "4": 1}
        assert pieces[-1]["recurrence"]["seed"] == 3 + index
    assert last["choices"] == []
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["usage"]["completion_tokens"] == 8
    assert last["recurrence"]["flops"] == 2e6
    if path == CHAT:
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_probabilities_are_told_as_openai_tells_them() -> None:
    client = client_of()
    body = client.post(CHAT, json=HELLO | {"logprobs": True, "top_logprobs": 2}).json()
    first = body["choices"][0]["logprobs"]["content"][0]
    assert first["token"] == "F"
    assert first["bytes"] == [70]
    assert first["logprob"] == -0.5
    assert [one["logprob"] for one in first["top_logprobs"]] == [-1.0, -2.0]
    told = client.post(COMPLETE, json=TEXT | {"logprobs": 1}).json()["choices"][0]["logprobs"]
    assert told["token_logprobs"] == [-0.5] * 4
    assert told["text_offset"] == [0, 3, 7, 11]
    assert told["top_logprobs"][0] == {"F": -1.0}
    streamed = client.post(COMPLETE, json=TEXT | {"logprobs": 1, "stream": True}).text
    pieces = [c["choices"][0]["logprobs"] for c in chunks_of(streamed)]
    assert [o for p in pieces if p for o in p["text_offset"]] == [0, 3, 7, 11]


# Of a vocabulary whose tokens 3 to 258 are bytes; 2 ends a text and is special.
EURO = tuple(3 + sorted(bytes_to_unicode().values()).index(c) for c in "\u00e2\u0124\u00ac")


def test_parts_of_characters_are_told_as_their_bytes() -> None:
    client = client_of(Script(words=("", "", "\u20ac"), tokens=EURO))
    body = client.post(CHAT, json=HELLO | {"logprobs": True}).json()
    told = body["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in told).decode() == "\u20ac"
    told = client.post(COMPLETE, json=TEXT | {"logprobs": 1}).json()["choices"][0]["logprobs"]
    assert told["tokens"] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    speller = Speller(client.app.state.service.asker.tokenizer)  # type: ignore[attr-defined]
    assert (speller.bytes(40), speller.name(40), speller.name(EURO[0])) == (
        [70],
        "F",
        "bytes:\\xe2",
    )


def test_parts_of_characters_of_sentencepiece_are_told_as_their_bytes() -> None:
    pieces = {"<unk>": 0, "<0xE2>": 1, "\u2581a": 2}
    inner = Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces], 0, byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    speller = Speller(PreTrainedTokenizerFast(tokenizer_object=inner))
    assert (speller.bytes(1), speller.name(1)) == ([0xE2], "bytes:\\xe2")


# Words, tokens, the text at the end, and which tokens the probabilities tell.
UNHEARD = {
    "a special token": (("a", ""), (40, 2), "", [40]),
    "a token that ends a text": (("a", ""), (40, 41), "", [40]),
    "one after text that was held back": (("a", "", ""), (40, 41, 42), "b", [40, 41]),
    "a special one after it": (("a", "", ""), (40, 41, 2), "b", [40, 41]),
    "tokens behind a stop string": (("a", "", ""), (40, 41, 42), "", [40]),
    "a token that has some text": (("a", "", "b"), (40, 41, 42), "", [40, 41, 42]),
}


@pytest.mark.parametrize(("words", "tokens", "end", "heard"), UNHEARD.values(), ids=UNHEARD)
def test_probabilities_are_told_of_tokens_that_are_in_the_text(
    words: tuple[str, ...], tokens: tuple[int, ...], end: str, heard: list[int]
) -> None:
    client = client_of(Script(words=words, tokens=tokens, end=end))
    asked = TEXT | {"logprobs": 0}
    whole = client.post(COMPLETE, json=asked).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == [byte_tokenizer().decode([token]) for token in heard]
    pieces = [
        chunk["choices"][0]["logprobs"]
        for chunk in chunks_of(client.post(COMPLETE, json=asked | {"stream": True}).text)
    ]
    for name, value in whole.items():
        assert [one for piece in pieces if piece for one in piece[name]] == value
    chat = client.post(CHAT, json=HELLO | {"logprobs": True}).json()["choices"][0]
    assert [one["token"] for one in chat["logprobs"]["content"]] == whole["tokens"]


@pytest.mark.parametrize(
    ("reason", "finish", "ended_by"),
    [("time", "length", "time"), ("shutdown", "length", "shutdown"), ("stop", "stop", None)],
)
def test_what_cut_an_answer_off_is_told(reason: Any, finish: str, ended_by: str | None) -> None:
    choice = client_of(Script(reason=reason)).post(CHAT, json=HELLO).json()["choices"][0]
    assert choice["finish_reason"] == finish
    assert choice["recurrence"].get("ended_by") == ended_by


def test_an_answer_that_reached_its_length_says_so() -> None:
    body = client_of().post(COMPLETE, json=TEXT | {"max_tokens": 2}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["text"] == "Two and"


# ---- what is asked of the engine


def test_fields_reach_the_engine() -> None:
    client = client_of()
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": 11,
        "stop": ["x", "yz"],
        "max_completion_tokens": 9,
        "max_tokens": 9,
        "repetition_penalty": 1.25,
        "logprobs": True,
        "reasoning_effort": "high",
        "exit": {"rule": "margin", "threshold": 0.5, "check_every": 2},
    }
    body = client.post(CHAT, json=HELLO | fields).json()
    (ask,) = client.engine.asked
    sampling = ask.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.seed, sampling.logprobs, sampling.repetition_penalty) == (11, 0, 1.25)
    assert (ask.stop, ask.max_new_tokens, ask.effort) == (("x", "yz"), 9, "high")
    rule = {"rule": "margin", "threshold": 0.5, "min_recurrences": 1, "check_every": 2}
    assert body["recurrence"]["exit"] == rule
    assert body["recurrence"]["allowed"] == 8
    assert body["recurrence"]["effort"] == body["choices"][0]["recurrence"]["effort"] == "high"
    assert "effort" not in client.post(CHAT, json=HELLO).json()["recurrence"]


def test_an_exit_without_threshold_is_the_calibrated_one() -> None:
    client = client_of()
    for exit in ({"rule": "kl"}, {"rule": "kl", "tolerance": "0.005"}):
        body = client.post(CHAT, json=HELLO | {"exit": exit}).json()
        told = {"rule": "kl", "threshold": 0.05, "min_recurrences": 2, "check_every": 1}
        assert body["recurrence"]["exit"] == told
    changed = {"rule": "kl", "min_recurrences": 3}
    body = client.post(CHAT, json=HELLO | {"exit": changed}).json()
    assert body["recurrence"]["exit"]["min_recurrences"] == 3


def test_a_seed_that_is_not_given_is_drawn_and_told() -> None:
    client = client_of()
    seeds = [
        client.post(CHAT, json=HELLO).json()["choices"][0]["recurrence"]["seed"] for _ in range(3)
    ]
    assert seeds == [ask.sampling.seed for ask in client.engine.asked]
    assert len(set(seeds)) == 3


def test_a_negative_seed_is_one_of_63_bits() -> None:
    client = client_of()
    body = client.post(CHAT, json=HELLO | {"seed": -1}).json()
    assert body["choices"][0]["recurrence"]["seed"] == 2**63 - 1
    assert client.engine.asked[0].sampling.seed == 2**63 - 1


@pytest.mark.parametrize(("sampled", "expected"), [(True, (0.6, 0.95, 20)), (False, (1.0, 1.0, 0))])
def test_sampling_starts_from_the_checkpoints_own(
    tmp_path: Path, sampled: bool, expected: tuple[float, float, int]
) -> None:
    stored = {"do_sample": sampled, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    stored["repetition_penalty"] = 1.1
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    client = client_of(model=str(tmp_path))
    client.post(CHAT, json=HELLO)
    sampling = client.engine.asked[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == expected
    assert sampling.repetition_penalty == 1.1


def test_content_may_be_text_parts_and_a_developer_is_a_system() -> None:
    client = client_of()
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    several = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    client.post(CHAT, json={"messages": several})
    (ask,) = client.engine.asked
    assert byte_tokenizer().decode(ask.prompt) == "Be brief.\nhello\n"


def test_fields_that_change_nothing_are_taken() -> None:
    ignored = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "stop": None,
    }
    assert client_of().post(CHAT, json=HELLO | ignored).status_code == 200


# ---- mistakes

UNSUPPORTED = [
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"functions": [{}]}, "functions"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format.type"),
    (CHAT, {"logit_bias": {"1": 5}}, "logit_bias"),
    (CHAT, {"presence_penalty": 0.5}, "presence_penalty"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities.1"),
    (CHAT, {"audio": {"voice": "x"}}, "audio"),
    (COMPLETE, {"frequency_penalty": -1}, "frequency_penalty"),
    (COMPLETE, {"best_of": 2}, "best_of"),
    (COMPLETE, {"suffix": "x"}, "suffix"),
    (COMPLETE, {"echo": True}, "echo"),
]


@pytest.mark.parametrize(("path", "field", "param"), UNSUPPORTED)
def test_what_would_change_the_answer_is_refused(
    path: str, field: dict[str, Any], param: str
) -> None:
    response = client_of().post(path, json=(HELLO if path == CHAT else TEXT) | field)
    error = error_of(response, 400)
    assert error["param"] == param
    assert error["message"] == f"{param} is not supported here: leave it"


WRONG = [
    ({"numrecurrences": 3}, "numrecurrences", "did you mean num_recurrences?"),
    ({"exit": {"rul": "kl"}}, "exit.rul", "did you mean rule?"),
    ({"exit": {"rule": "kll"}}, "exit.rule", "'kl'"),
    ({"exit": {"rule": "entropy"}}, "exit.rule", "no calibrated entropy exit"),
    ({"exit": {"rule": "kl", "tolerance": "2%"}}, "exit.tolerance", "0.5%"),
    ({"exit": {"rule": "kl", "tolerance": "x"}}, "exit.tolerance", "x"),
    ({"exit": {"rule": "kl", "tolerance": "1%", "threshold": 1}}, "exit.tolerance", "leave it"),
    ({"exit": {"rule": "gate", "threshold": 1}}, "exit.rule", "no exit gate"),
    ({"num_recurrences": 2, "reasoning_effort": "low"}, "reasoning_effort", "leave one"),
    ({"num_recurrences": 9}, "num_recurrences", "between 1 and 8"),
    ({"num_recurrences": "4"}, "num_recurrences", "valid integer"),
    ({"num_recurrences": True}, "num_recurrences", "valid integer"),
    ({"reasoning_effort": "hard"}, "reasoning_effort", "'low'"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
    ({"n": 9}, "n", "8 answers are given to a prompt at most"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"max_tokens": 5000}, "max_tokens", "1024"),
    ({"max_completion_tokens": 5000}, "max_completion_tokens", "max_completion_tokens 5000"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "leave one"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"repetition_penalty": 10.5}, "repetition_penalty", "less than or equal to 10"),
    ({"seed": -(2**63) - 1}, "seed", "greater than or equal to"),
    ({"max_tokens": 252}, "messages", "exceed the 256"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'user'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "tools are not supported"),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "messages.0",
        "tools are not supported",
    ),
    ({"messages": [HELLO["messages"][0]] * 2049}, "messages", "at most 2048 items"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0.type",
        "'text'",
    ),
]


@pytest.mark.parametrize(("field", "param", "told"), WRONG)
def test_a_mistake_is_told_with_its_field(field: dict[str, Any], param: str, told: str) -> None:
    client = client_of()
    error = error_of(client.post(CHAT, json=HELLO | field), 400)
    assert error["param"] == param
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"
    assert client.engine.asked == []


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("", "holds no token"),
        ([], "at least 1 item"),
        ([[]], "at least 1 item"),
        ([300], "there is no token 300"),
        ([-1], "greater than or equal to 0"),
        (["a", ""], "holds no token"),
        (["a"] * 129, "128 are given at most"),
        (None, "input should be"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(prompt: Any, told: str) -> None:
    assert told in error_of(client_of().post(COMPLETE, json={"prompt": prompt}), 400)["message"]


BAD_JSON = [
    b"",
    b"{",
    b"not json",
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "seed": 1e400}',
    b'{"prompt": "a", "seed": ' + b"9" * 400 + b"}",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": ' + b"[" * 150 + b"]" * 150 + b"}",
    b"[]",
    b'"text"',
    b"null",
]


@pytest.mark.parametrize("raw", BAD_JSON, ids=range(len(BAD_JSON)))
def test_a_body_that_is_no_json_is_told(raw: bytes) -> None:
    error_of(client_of().post(COMPLETE, content=raw), 400)


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "a/b"])
def test_a_body_is_json_whatever_its_type_says(kind: str) -> None:
    raw = json.dumps(HELLO).encode()
    response = client_of().post(CHAT, content=raw, headers={"content-type": kind})
    assert response.status_code == 200


USER = HELLO["messages"][0]
MANY: dict[str, Any] = {f"field{number}": 1 for number in range(10_000)}
HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": (COMPLETE, {"prompt": [-1] * 10_000}),
    "lists of tokens": (COMPLETE, {"prompt": [[-1]] * 10_000}),
    "texts": (COMPLETE, {"prompt": [0.5] * 10_000}),
    "stops": (COMPLETE, {"prompt": "a", "stop": [1] * 10_000}),
    "messages": (CHAT, {"messages": [{}] * 10_000}),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [{}] * 10_000}]}),
    "modalities": (CHAT, {"messages": [USER], "modalities": [1] * 10_000}),
    "fields": (CHAT, {"messages": [USER]} | MANY),
    "fields of a message": (CHAT, {"messages": [USER | MANY]}),
    "fields of an exit": (CHAT, {"messages": [USER], "exit": MANY}),
}


@pytest.mark.parametrize(("path", "asked"), HOSTILE.values(), ids=HOSTILE)
def test_a_body_of_many_mistakes_makes_few_errors(path: str, asked: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        (ChatBody if path == CHAT else CompletionBody).model_validate(asked)
    assert caught.value.error_count() < 10
    assert error_of(client_of().post(path, json=asked), 400)["message"]


def test_a_field_that_is_not_known_is_told_among_many() -> None:
    known = {name: None for name in ChatBody.model_fields} | HELLO
    error = error_of(client_of().post(CHAT, json=known | {"num_recurences": 1, "x": 2}), 400)
    assert error["message"] == "there is no field num_recurences: did you mean num_recurrences?"


def test_a_large_body_is_checked_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    checked = reading.checked

    def spy(raw: bytes, body: Any) -> Any:
        seen.append(threading.current_thread().name)
        return checked(raw, body)

    monkeypatch.setattr(reading, "checked", spy)
    client = client_of()
    client.post(COMPLETE, json=TEXT | {"user": "a" * 100})
    client.post(COMPLETE, json=TEXT | {"user": "a" * 100_000})
    assert [name.startswith("tokenizer") for name in seen] == [False, True]


def test_a_body_that_is_too_large_is_told_also_without_a_length() -> None:
    client = client_of(max_body=1000)
    large = {"prompt": "a" * 1000}
    error = error_of(client.post(COMPLETE, json=large), 413)
    assert "1000 bytes" in error["message"]

    def pieces() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 100

    error_of(client.post(COMPLETE, content=pieces()), 413)
    assert client.post(COMPLETE, json={"prompt": "a" * 200}).status_code == 200


def test_paths_methods_and_models_that_are_not_there() -> None:
    client = client_of()
    assert "/nope" in error_of(client.get("/nope"), 404)["message"]
    response = client.get(CHAT)
    assert "does not take GET" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    response = client.post(CHAT, json=HELLO | {"model": "other"})
    error = error_of(response, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert client.post(CHAT, json=HELLO | {"model": "tiny"}).status_code == 200


def test_a_chat_template_that_refuses_is_a_mistake_of_the_request() -> None:
    app = app_of()
    app.state.service.asker.tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    error = error_of(TestClient(app, base_url=OWN).post(CHAT, json=HELLO), 400)
    assert "only one turn" in error["message"]


# ---- an engine that says no


def test_a_full_queue_is_429_and_says_when() -> None:
    response = client_of(Script(busy_after=0)).post(CHAT, json=HELLO)
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert response.headers["retry-after"] == "3"


def test_where_one_of_several_is_not_taken_none_is(
    lines: list[dict[str, Any]],
) -> None:
    client = client_of(Script(busy_after=2, endless=True, pause=0.02))
    with client:
        error_of(client.post(CHAT, json=HELLO | {"n": 3}), 429)
        assert client.engine.asked == []
        # They count once, as what was not taken.
        counted = re.findall(r"rondo_requests_total\{(.*?)\} (\S+)", client.get("/metrics").text)
    assert counted == [('outcome="busy"', "1.0")]
    assert [line["outcome"] for line in lines] == [["busy"]]


def test_what_the_engine_refuses_is_400_with_its_field() -> None:
    script = Script(refusal=Refused("this needs more memory than there is", "max_tokens"))
    assert error_of(client_of(script).post(CHAT, json=HELLO), 400)["param"] == "max_tokens"


def test_a_failed_engine_is_not_ready() -> None:
    client = client_of(Script(failure="out of memory"))
    assert "out of memory" in error_of(client.get("/readyz"), 503)["message"]
    assert client.get("/healthz").json() == {"status": "ok"}
    response = client.post(CHAT, json=HELLO)
    error_of(response, 503)
    assert int(response.headers["retry-after"]) > 0


def test_an_answer_that_failed_is_500_and_an_event_in_a_stream() -> None:
    client = client_of(Script(reason="error"))
    assert error_of(client.post(CHAT, json=HELLO), 500)["type"] == "server_error"
    *_, last = chunks_of(client.post(CHAT, json=HELLO | {"stream": True}).text)
    assert last["error"]["type"] == "server_error"


def test_a_mistake_of_the_server_is_500_in_openais_shape() -> None:
    client = client_of()
    client.engine.load = lambda: 1 / 0
    error = error_of(client.get("/metrics"), 500)
    assert "division" not in error["message"]


# ---- operation


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(json.loads(record.getMessage()))  # type: ignore[method-assign]
    log.LOGGER.addHandler(handler)
    log.LOGGER.setLevel(logging.INFO)
    yield found
    log.LOGGER.removeHandler(handler)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_called_the_same_in_its_headers(stream: bool) -> None:
    response = client_of().post(CHAT, json=HELLO | {"stream": stream})
    assert response.headers["x-request-id"] in response.text


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/"])
def test_a_head_is_answered_where_probes_ask(path: str) -> None:
    client = client_of()
    response = client.head(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == client.get(path).headers["content-type"]


def test_models_tell_their_depths() -> None:
    body = client_of(name="mine").get("/v1/models").json()
    ModelList.model_validate(body)
    (model,) = body["data"]
    assert model["id"] == "mine"
    assert model["max_model_len"] == 256
    assert model["recurrence"] == {
        "default": 4,
        "min": 1,
        "max": 8,
        "efforts": {
            "none": 1,
            "minimal": 1,
            "low": 2,
            "medium": 4,
            "high": 8,
            "xhigh": 8,
            "max": 8,
        },
        "calibrated": {"kl": ["0.5%"]},
        "gate": False,
    }


def sample(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in\n{text}"
    return float(found[1])


def test_metrics_count_by_depth() -> None:
    client = client_of()
    client.post(CHAT, json=HELLO | {"n": 2})
    client.post(CHAT, json=HELLO | {"num_recurrences": 2})
    client.post(CHAT, json=HELLO | {"num_recurrences": 100})
    text = client.get("/metrics").text
    assert sample(text, 'rondo_requests_total{outcome="stop"}') == 3
    assert sample(text, 'rondo_requests_total{outcome="refused"}') == 1
    assert sample(text, 'rondo_token_recurrences_count{depth="4"}') == 8
    assert sample(text, 'rondo_token_recurrences_bucket{depth="2",le="1.0"}') == 2
    assert sample(text, 'rondo_token_recurrences_sum{depth="2"}') == 6
    assert sample(text, 'rondo_prompt_tokens_total{depth="4"}') == 12
    assert sample(text, 'rondo_cached_tokens_total{depth="4"}') == 2
    assert sample(text, 'rondo_generation_tokens_total{depth="2"}') == 4
    assert sample(text, 'rondo_executed_flops_total{depth="4"}') == 2e6
    first = sample(text, 'rondo_time_to_first_token_seconds_sum{depth="2"}')
    assert first == pytest.approx(0.03)
    assert sample(text, 'rondo_request_queue_time_seconds_count{depth="2"}') == 1
    assert sample(text, "rondo_num_requests_waiting") == 1
    assert sample(text, "rondo_kv_cache_usage_perc") == 0.25
    assert sample(text, "rondo_ticks_total") == 7
    # Two servers in one process do not share anything.
    assert "rondo_requests_total{" not in client_of().get("/metrics").text


def test_the_log_has_a_line_for_each_request_without_what_was_said(
    lines: list[dict[str, Any]],
) -> None:
    body = client_of().post(CHAT, json=HELLO | {"num_recurrences": 3, "n": 2}).json()
    (line,) = lines
    assert line["id"] == body["id"]
    assert (line["asked"], line["allowed"], line["mean"]) == (3, 3, 1.75)
    assert (line["prompt_tokens"], line["new_tokens"]) == (12, 8)
    assert (line["flops"], line["outcome"]) == (2e6, ["stop"])
    assert "hello" not in json.dumps(line)
    assert "Two" not in json.dumps(line)


def test_the_log_has_a_line_for_what_was_not_taken(lines: list[dict[str, Any]]) -> None:
    client_of().post(CHAT, json=HELLO | {"my secret": 1})
    assert (lines[0]["outcome"], lines[0]["status"]) == (["refused"], 400)
    assert "secret" not in json.dumps(lines)


def test_the_log_has_what_was_said_where_the_operator_wants_it(
    lines: list[dict[str, Any]],
) -> None:
    client_of(log_prompts=True).post(CHAT, json=HELLO)
    assert lines[0]["prompts"] == ["hello\n"]
    assert lines[0]["answers"] == [ANSWER]


def test_the_page_may_run_its_own_script_only(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    path.write_text("<style>a{}</style><script>1</script><script src='x'></script>")
    page = Page.of(path)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    # echo -n 1 | openssl dgst -sha256 -binary | base64
    assert "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='" in policy
    assert "unsafe" not in policy
    assert hashes("<p>", "style") == "'none'"


def test_the_page_of_the_package_is_served_with_its_policy() -> None:
    response = client_of().get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert len(re.findall("'sha256-", policy)) == 2
    assert "connect-src 'self'" in policy


def test_the_document_has_bodies_bounds_and_errors() -> None:
    document = client_of(max_new_tokens=100, default_new_tokens=50).get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    depth = schemas["ChatBody"]["properties"]["num_recurrences"]["anyOf"][0]
    assert (depth["minimum"], depth["maximum"]) == (1, 8)
    assert schemas["ChatBody"]["properties"]["max_tokens"]["anyOf"][0]["maximum"] == 100
    assert schemas["ChatBody"]["additionalProperties"] is False
    assert schemas["ChatBody"]["examples"]
    responses = document["paths"][CHAT]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "403", "404", "408", "413", "429", "500", "503"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    refs = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert refs <= set(schemas)
