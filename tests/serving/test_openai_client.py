"""The official client, unmodified, and plain curl against a real server."""

import json
import shutil
import subprocess
from collections.abc import Iterator

import openai
import pytest
from fake_engine import FakeEngine, Script, until
from fake_server import app_of, served

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, FakeEngine]]:
    app = app_of(Script(pause=0.002))
    with served(app) as url:
        yield url, app.state.service.engine


@pytest.fixture
def client(server: tuple[str, FakeEngine]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_the_client_chats_at_a_depth(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=USER, seed=3, extra_body={"num_recurrences": 3}
    )
    assert answer.choices[0].message.content == "Two and two.!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 4
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.recurrence["allowed"] == 3
    assert answer.choices[0].recurrence["seed"] == 3


@pytest.mark.parametrize(
    ("effort", "depth"), [("none", 1), ("low", 2), ("medium", 4), ("high", 8), ("max", 8)]
)
def test_the_clients_effort_is_a_depth(client: openai.OpenAI, effort: str, depth: int) -> None:
    answer = client.chat.completions.create(model="tiny", messages=USER, reasoning_effort=effort)
    assert answer.recurrence["allowed"] == depth


def test_an_exit_goes_in_the_extra_body(client: openai.OpenAI) -> None:
    extra = {"num_recurrences": 6, "exit": {"rule": "kl"}}
    answer = client.chat.completions.create(model="tiny", messages=USER, extra_body=extra)
    assert answer.recurrence["exit"]["rule"] == "kl"
    assert answer.recurrence["asked"] == 6


def test_the_client_streams_a_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=USER,
        stream=True,
        n=2,
        logprobs=True,
        top_logprobs=1,
        stream_options={"include_usage": True},
        extra_body={"num_recurrences": 2},
    )
    chunks = list(stream)
    texts = {0: "", 1: ""}
    depths: list[int] = []
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
        depths += getattr(choice, "recurrences", [])
    assert texts == {0: "Two and two.!", 1: "Two and two.!"}
    assert sorted(depths) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert chunks[-1].usage.completion_tokens == 8
    told = [c.logprobs.content[0].token for k in chunks for c in k.choices if c.logprobs]
    assert told


def test_the_clients_stream_helper_puts_an_answer_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=USER) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "Two and two.!"
    # What it sends back as history is taken.
    history = [*USER, answer.choices[0].message.model_dump(), *USER]
    again = client.chat.completions.create(model="tiny", messages=history)
    assert again.usage.prompt_tokens > 10


def test_the_client_completes_texts(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=2, logprobs=2, stop=["\n"], temperature=0
    )
    assert [choice.text for choice in answer.choices] == ["Two and"] * 2
    assert answer.choices[0].logprobs.tokens == ["F", "G"]
    stream = client.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Two and two.!"


def test_the_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").recurrence["max"] == 8


def test_the_client_raises_what_it_should(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=USER)
    with pytest.raises(openai.BadRequestError, match="did you mean num_recurrences") as caught:
        client.chat.completions.create(
            model="tiny", messages=USER, extra_body={"num_recurrance": 2}
        )
    assert caught.value.param == "num_recurrance"


def test_the_client_asks_again_where_the_queue_is_full() -> None:
    script = Script(busy_after=0)
    with served(app_of(script)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client, pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tiny", messages=USER)
        assert caught.value.response.headers["retry-after"] == "3"


def test_a_failure_within_a_stream_is_the_clients_error() -> None:
    with served(app_of(Script(reason="error"))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client, pytest.raises(openai.APIError, match="the engine failed"):
            list(client.chat.completions.create(model="tiny", messages=USER, stream=True))


def test_a_stream_that_the_client_closes_is_cancelled() -> None:
    app = app_of(Script(endless=True, pause=0.01))
    engine = app.state.service.engine
    with served(app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client, client.completions.create(model="tiny", prompt="a", stream=True) as stream:
            next(iter(stream))
        assert until(lambda: list(engine.ended.values()) == ["cancelled"])


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")


def curl(url: str, *words: str) -> str:
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "10", *words, url],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@needs_curl
def test_curl_needs_no_header(server: tuple[str, FakeEngine]) -> None:
    asked = {"model": "tiny", "messages": USER, "num_recurrences": 8}
    body = json.loads(curl(f"{server[0]}/v1/chat/completions", "-d", json.dumps(asked)))
    assert body["choices"][0]["message"]["content"] == "Two and two.!"
    assert body["recurrence"]["allowed"] == 8


@needs_curl
def test_curl_sees_tokens_as_they_come(server: tuple[str, FakeEngine]) -> None:
    asked = {"model": "tiny", "prompt": "hello", "stream": True}
    text = curl(f"{server[0]}/v1/completions", "--no-buffer", "-d", json.dumps(asked))
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["recurrences"][0] == 1


@needs_curl
def test_curl_reads_the_answer_to_a_body_that_is_too_large() -> None:
    with served(app_of(max_body=100_000)) as url:
        body = json.dumps({"prompt": "a" * 200_000})
        done = subprocess.run(
            ["curl", "--silent", "--show-error", "--data", "@-", f"{url}/v1/completions"],
            input=body,
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)["error"]["code"] == "body_too_large"
