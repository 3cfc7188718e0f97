"""vLLM 0.32's HTTP side without a model: answers from a script, and keeps what it was sent.

Shapes are those of its `entrypoints/openai`: usage in each chunk where that is asked for, numbers
of tokens likewise, keys that are not set left out of chunks and null in whole bodies.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fake_engine import until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from rondo_serve import serve

WORDS = ("Two", " and", " two", ".")
PROMPT = [1, 72, 105]


@dataclass
class FakeVllm:
    """What it does, and what it was asked.

    Attributes:
        words: Texts of the tokens; token i has the number 40 + i.
        endless: Go on until max_tokens.
        pause: Seconds before each token.
        first_pause: Seconds before the first one, and before a whole answer.
        key: Key that it asks for.
        status: Status of every answer to a request for text.
        hides: Leave out the numbers of tokens, as where a reasoning is not told.
        breaks: How a stream ends early: "line" cuts the connection, "error" tells one.
        break_at: Tokens before that.
        raw: Body of a whole answer, in place of a right one.
        cap: Deepest that it runs.
        bodies: What it was sent.
        headers: Likewise.
        ports: From where.
        left: Requests whose client left.
    """

    words: tuple[str, ...] = WORDS
    endless: bool = False
    pause: float = 0.0
    first_pause: float = 0.0
    key: str | None = None
    status: int = 200
    hides: bool = False
    breaks: str = ""
    break_at: int = 2
    raw: bytes | None = None
    cap: int = 8
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    left: int = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.text, methods=["POST"]),
                Route("/v1/completions", self.text, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", lambda request: Response(status_code=self.status)),
            ]
        )

    async def models(self, request: Request) -> Response:
        card = {"id": "tiny", "object": "model", "created": 1, "owned_by": "vllm"}
        return JSONResponse({"object": "list", "data": [card | {"max_model_len": 256}]})

    async def text(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        self.ports.append(request.client.port if request.client else 0)
        # As Starlette reads it: of a key that comes twice, the last.
        body = json.loads(await request.body())
        self.bodies.append(body)
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        if self.status in (301, 302, 307):
            return RedirectResponse("http://elsewhere.invalid/", self.status)
        if self.status != 200:
            return error_of("this is what vLLM says", self.status)
        depth = (body.get("vllm_xargs") or {}).get("num_recurrences")
        if type(depth) is not int or not 1 <= depth <= self.cap:
            return error_of(f"num_recurrences must be a whole number between 1 and {self.cap}", 400)
        if body.get("stream_options") and not body.get("stream"):
            return error_of("Stream options can only be defined when `stream=True`.", 400)
        kind = "chatcmpl" if request.url.path.endswith("chat/completions") else "cmpl"
        said = Said(self, body, f"{kind}-{request.headers['x-request-id']}", kind == "chatcmpl")
        if body.get("stream"):
            return StreamingResponse(self.noticed(said.chunks()), media_type="text/event-stream")
        try:
            if await gone(request, self.first_pause):
                self.left += 1
                return Response()
        except asyncio.CancelledError:
            self.left += 1
            raise
        if self.raw is not None:
            return Response(self.raw, media_type="application/json")
        return JSONResponse(said.whole())

    async def noticed(self, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        done = False
        try:
            async for chunk in chunks:
                yield chunk
            done = True
        finally:
            self.left += not done


async def gone(request: Request, seconds: float) -> bool:
    """Whether the client leaves within some time."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await left()
            return True
    return False


def error_of(message: str, status: int) -> JSONResponse:
    told = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return JSONResponse({"error": told}, status)


@dataclass
class Said:
    """One response."""

    vllm: FakeVllm
    body: dict[str, Any]
    id: str
    chat: bool

    def __post_init__(self) -> None:
        prompt = self.body.get("prompt")
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        self.n = self.body.get("n") or 1
        self.prompts = len(prompt) if several else 1
        most = self.body["max_tokens"]
        count = most if self.vllm.endless else min(most, len(self.vllm.words))
        words = self.vllm.words
        # The further back a choice, the shorter: sums and means show as what they are.
        self.texts = [
            [words[at % len(words)] for at in range(max(1, count - index))]
            for index in range(self.n * self.prompts)
        ]
        self.ids = bool(self.body.get("return_token_ids")) and not self.vllm.hides

    def prompt_of(self, index: int) -> list[int]:
        """The prompts of a request have different lengths."""
        return PROMPT + [7] * (index // self.n)

    def reason_of(self, index: int) -> str:
        return "length" if len(self.texts[index]) >= self.body["max_tokens"] else "stop"

    def usage(self, prompt: int, new: int) -> dict[str, int]:
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    @property
    def total(self) -> dict[str, int]:
        read = sum(len(self.prompt_of(index)) for index in range(0, len(self.texts), self.n))
        return self.usage(read, sum(map(len, self.texts)))

    @property
    def head(self) -> dict[str, Any]:
        return {"id": self.id, "created": 1, "model": "tiny"}

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, words in enumerate(self.texts):
            ids = [40 + at for at in range(len(words))] if self.ids else None
            one: dict[str, Any] = {"index": index, "logprobs": None, "token_ids": ids}
            one |= {"finish_reason": self.reason_of(index), "stop_reason": None}
            if self.chat:
                one["message"] = {"role": "assistant", "content": "".join(words), "refusal": None}
            else:
                one["text"] = "".join(words)
                one["prompt_token_ids"] = self.prompt_of(index) if self.ids else None
            choices.append(one)
        kind = "chat.completion" if self.chat else "text_completion"
        body = self.head | {"object": kind, "choices": choices, "usage": self.total}
        if self.chat:
            body["prompt_token_ids"] = PROMPT if self.ids else None
        return body | {"system_fingerprint": None, "kv_transfer_params": None}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        # As pydantic writes it: what is no ASCII goes out as it is.
        told = self.head | {"object": kind, "choices": choices} | more
        return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"

    async def chunks(self) -> AsyncIterator[str]:
        options = self.body.get("stream_options") or {}
        continuous = options.get("include_usage") and options.get("continuous_usage_stats")
        await asyncio.sleep(self.vllm.first_pause)

        def counted(index: int, new: int) -> dict[str, Any]:
            read = len(self.prompt_of(index))
            return {"usage": self.usage(read, new)} if continuous else {}

        yield ": keep-alive\n\n"
        for index in range(len(self.texts) if self.chat else 0):
            begin = {"index": index, "delta": {"role": "assistant", "content": ""}}
            ids = {"prompt_token_ids": PROMPT} if self.ids else {}
            yield self.chunk([begin | {"finish_reason": None}], **ids, **counted(index, 0))
        for at in range(max(map(len, self.texts))):
            await asyncio.sleep(self.vllm.pause)
            if at == self.vllm.break_at and self.vllm.breaks == "line":
                raise ConnectionResetError
            if at == self.vllm.break_at and self.vllm.breaks == "error":
                yield f"data: {error_of('the engine died', 500).body.decode()}\n\n"
                break
            for index, words in enumerate(self.texts):
                if at < len(words):
                    last = at + 1 == len(words)
                    reason = self.reason_of(index) if last else None
                    one: dict[str, Any] = {"index": index, "finish_reason": reason}
                    one |= {"delta": {"content": words[at]}} if self.chat else {"text": words[at]}
                    if self.ids:
                        one["token_ids"] = [40 + at]
                    if self.ids and not self.chat and not at:
                        one["prompt_token_ids"] = self.prompt_of(index)
                    yield self.chunk([one], **counted(index, at + 1))
        else:
            if options.get("include_usage"):
                yield self.chunk([], usage=self.total)
        yield "data: [DONE]\n\n"


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an app on a free port of loopback."""
    with serve.bound("127.0.0.1", 0) as listener:
        settings = uvicorn.Config(app, log_config=None, log_level="critical", lifespan="off")
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
