"""Grants requests as `rondo serve` does, and has vLLM answer them."""

import asyncio
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic_core import from_json
from starlette.types import Receive, Scope, Send

from rondo.flops import Costs
from rondo_govern.governor import Want
from rondo_govern.rules import Denied
from rondo_serve.api import log
from rondo_serve.api.access import key_of, limits_of, risks_of
from rondo_serve.api.app import headers_of, note_refusal
from rondo_serve.api.asks import MOST_ANSWERS
from rondo_serve.api.calls import Gate
from rondo_serve.api.errors import ApiError, closed, of_engine
from rondo_serve.api.metrics import Metrics
from rondo_serve.api.reading import read
from rondo_serve.api.replies import Depths, dumped
from rondo_serve.config import GatewayConfig
from rondo_serve.gateway.answers import Answer, Books
from rondo_serve.gateway.bodies import (
    SAMPLING,
    ChatOnward,
    TextOnward,
    check,
    depth_of,
    onward,
    prompt_bound,
)
from rondo_serve.gateway.passage import BROKEN, Passage
from rondo_serve.governed import Governance
from rondo_serve.policy import Allowed
from rondo_serve.requests import Busy, Load, Refused

KEY = "RONDO_UPSTREAM_KEY"
# Seconds after which asking again makes sense where the queue is full.
RETRY = 1.0
# Seconds that vLLM has to answer what costs nothing.
ASKING_SECONDS = 10.0
UNREACHED = (httpx.ConnectError, httpx.ConnectTimeout)
KINDS = {"chat/completions": ("chatcmpl", ChatOnward), "completions": ("cmpl", TextOnward)}


class Stream(StreamingResponse):
    """A stream that ends its passage however it ends, also where it never began."""

    def __init__(self, passage: Passage, answer: httpx.Response, headers: dict[str, str]):
        super().__init__(
            passage.events(answer),
            media_type="text/event-stream",
            headers=headers | {"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._passage, self._answer = passage, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            async with self._passage.watched(receive):
                await self.stream_response(send)
        finally:
            self._passage.end("cancelled")
            await self._answer.aclose()


@dataclass(eq=False)
class Gateway:
    """What the routes share, and what a server closes at its end.

    Attributes:
        config: Its settings.
        governance: What it is governed by.
        costs: What the model costs.
        context: Tokens of a prompt and its answer at most.
        client: Asks vLLM.
        gate: Whether requests are taken.
    """

    config: GatewayConfig
    governance: Governance
    costs: Costs
    context: int
    client: httpx.AsyncClient
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self, self.governance)
        self._books = Books(self.governance, self.costs, self.metrics, self.config.audit_texts)
        self._worker = ThreadPoolExecutor(1, "bodies")
        self._passages: set[Passage] = set()
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- what a server and its metrics ask for

    def load(self) -> Load:
        """Return how busy vLLM is believed to be."""
        flying = sum(passage.left for passage in self._passages)
        running = min(flying, self.config.max_running)
        left_over = flying - running
        return Load(waiting=left_over, left_over=left_over, running=running)

    def close(self, grace: float) -> None:
        """Take nothing more, wait `grace` seconds for what runs, and cut the rest off."""
        self.gate.closing.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._passages, grace)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for passage in list(self._passages):
            passage.cut("shutdown")

    # ---- requests for text

    async def answer(self, request: Request, path: str) -> Response:
        """Answer a request for text.

        Raises:
            ApiError: It cannot be answered.
        """
        key, (kind, shape) = None, KINDS[path]
        try:
            if self.gate.closing.is_set():
                raise closed()
            key = key_of(self.governance, request.headers, "generate")
            told = await read(request, shape, self.config.max_body, self._worker)
            risks = risks_of(request.headers, told.metadata)
            passage = self._admitted(kind, told, key, risks)
        except ApiError as error:
            self._refuse(key, error.status, error.code)
            raise
        return await self._carried(request, passage, path)

    def _admitted(self, kind: str, told: ChatOnward, key: str, risks: frozenset[str]) -> Passage:
        """Return a request that is granted what it asks for.

        Raises:
            ApiError: It is not, or cannot be.
        """
        if self.gate.closing.is_set():
            raise closed()
        check(told)
        depth, default = depth_of(told), min(self.config.default_new_tokens, self.context)
        new = told.most or default
        if new > self.config.max_new_tokens:
            message = f"{new} new tokens are beyond the {self.config.max_new_tokens} given here"
            raise ApiError(400, f"{message}: ask for fewer", "max_tokens")
        answers, room = told.num_prompts * (told.n or 1), self._room
        if answers > (most := min(MOST_ANSWERS, room)):
            message = f"{answers} answers are asked for at once, and {most} are given at most"
            raise ApiError(400, f"{message}: send several requests", "n")
        load = self.load()
        if load.running + load.waiting + answers > room:
            raise of_engine(Busy(RETRY))
        name = f"{kind}-{uuid.uuid4().hex}"
        facts = {
            # Not known before vLLM tells them: the end's record has it.
            "prompt_sha256": None,
            "exit": None,
            "stop": [told.stop] if isinstance(told.stop, str) else told.stop or [],
            "sampling": {name: getattr(told, name) for name in SAMPLING},
        }
        wants = [
            Want(
                id=f"{name}-{index}",
                prompt_tokens=prompt_bound(told, self.context),
                new_tokens=new,
                key=key,
                risks=risks,
                num_recurrences=depth,
                effort=told.reasoning_effort,
                waiting=load.waiting,
                facts=facts,
            )
            for index in range(answers)
        ]
        self._loop = asyncio.get_running_loop()
        until = self._loop.time() + self.config.max_seconds
        found = self._granted(wants)
        passage = Passage(name, told, found, self._books, until, self._over)
        self._passages.add(passage)
        return passage

    @property
    def _room(self) -> int:
        """Answers that are taken at once."""
        return self.config.max_running + self.config.max_queue

    def _granted(self, wants: list[Want]) -> list[Answer]:
        """Return answers that are granted, all or none.

        Raises:
            ApiError: They are not.
        """
        try:
            grants = self.governance.governor.grant(wants)
        except (Refused, Denied) as error:
            raise of_engine(error) from error
        return [Answer(grant) for grant in grants]

    async def _carried(self, request: Request, passage: Passage, path: str) -> Response:
        """Carry a request to vLLM, and its answer back.

        Raises:
            ApiError: There is none.
        """
        told, grant = passage.told, passage.answers[0].grant
        depth, new = grant.decision.depth, grant.want.new_tokens
        logged = self.governance.governor.log is not None
        body = onward(told, depth, new, logged or len(passage.answers) > 1)
        headers = {"x-request-id": passage.id} | headers_of([Allowed(depth, grant=grant)])
        # By this vLLM calls its answer as the log does.
        own = {"x-request-id": passage.id.partition("-")[2], "content-type": "application/json"}
        asked = self.client.build_request("POST", f"/v1/{path}", content=body, headers=own)
        answer = stream = None
        try:
            async with passage.watched(request.receive):
                answer = await passage.within(self.client.send(asked, stream=True))
                if answer.status_code == 200 and told.stream:
                    stream = Stream(passage, answer, headers)
                    return stream
                raw = await passage.within(answer.aread())
            if answer.status_code != 200:
                return self._refused(passage, answer, raw)
            whole = passage.whole(raw)
            await self._books.kept()
            return JSONResponse(whole, headers=headers)
        except UNREACHED as error:
            self._turned_away(passage, 502, "upstream_unreachable")
            raise unreachable(error) from error
        except BROKEN as error:
            raise passage.failed(error) from error
        finally:
            if stream is None:
                passage.end("error")
                if answer is not None:
                    await answer.aclose()

    def _refused(self, passage: Passage, answer: httpx.Response, raw: bytes) -> Response:
        """Return what vLLM says of a request that it does not take.

        Raises:
            ApiError: It is not the client's to hear.
        """
        ours = answer.status_code < 400 or answer.status_code in (401, 403)
        self._turned_away(passage, 502 if ours else answer.status_code, "upstream_refused")
        if answer.status_code in (401, 403):
            message = f"vLLM does not take this gateway's key: the operator must set {KEY}"
            raise ApiError(502, message, code="upstream_refused")
        if answer.status_code < 400:
            message = f"vLLM answered {answer.status_code}: the operator must check the address"
            raise ApiError(502, message, code="upstream_refused")
        return Response(raw, answer.status_code, media_type=answer.headers.get("content-type"))

    # ---- what else is asked

    async def fetch(self, path: str, status: int) -> bytes:
        """Return what vLLM answers to a question that costs nothing.

        Raises:
            ApiError: With `status`: it does not answer.
        """
        try:
            answer = await self.client.get(path, timeout=ASKING_SECONDS)
        except httpx.HTTPError as error:
            raise unreachable(error, status) from error
        if answer.status_code != 200:
            message = f"vLLM answered {answer.status_code}: ask again later"
            raise ApiError(status, message, code="upstream_refused")
        return answer.content

    async def models(self, request: Request) -> dict[str, Any]:
        """Return vLLM's models, with the depths that who asks is given.

        Raises:
            ApiError: There is no key, it does not hold, or vLLM does not answer.
        """
        limits = limits_of(self.governance, request.headers)
        depths = Depths(
            default=limits.default,
            min=limits.floor,
            max=limits.cap,
            efforts=dict(limits.depths),
            calibrated={},
            gate=False,
        )
        body = from_json(await self.fetch("/v1/models", 502))
        for model in body["data"]:
            model["recurrence"] = dumped(depths)
        return body

    # ---- notes

    def _over(self, passage: Passage) -> None:
        """Take note that all answers of a request have ended."""
        with self._changed:
            self._passages.discard(passage)
            self._changed.notify_all()
        if passage.answers[0].ended != "untaken":
            log.write(passage.line | {"model": self.config.model_name})

    def _turned_away(self, passage: Passage, status: int, code: str) -> None:
        """Take note of a request that was granted, and that vLLM did not take."""
        passage.end("untaken")
        self._refuse(passage.answers[0].grant.seat.key, status, code)

    def _refuse(self, key: str | None, status: int, code: str | None) -> None:
        note_refusal(self.governance, self.metrics, self.config.model_name, key, status, code)


def unreachable(error: Exception, status: int = 502) -> ApiError:
    """Return what is said where vLLM does not answer."""
    reason = str(error) or type(error).__name__
    message = f"vLLM cannot be reached: {reason[:200]}; ask again later"
    return ApiError(status, message, code="upstream_unreachable")
