"""One request on its way to vLLM and back: watched, counted, and settled however it ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from pydantic_core import from_json, to_json
from starlette.types import Receive

from rondo_serve.api.answers import summed
from rondo_serve.api.errors import ApiError, closed
from rondo_serve.api.replies import dumped
from rondo_serve.gateway.answers import REASONS, Answer, Books
from rondo_serve.gateway.bodies import ChatOnward
from rondo_serve.requests import Ending, Reason

T = TypeVar("T")
DATA, DONE = b"data: ", b"data: [DONE]"
IDS = ("prompt_token_ids", "token_ids")


class Cut(Exception):
    """A request may not go on."""


# What ends a request: its own limits, the line, or an answer that is none of vLLM's.
BROKEN = (Cut, httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(eq=False)
class Passage:
    """A request on its way.

    Attributes:
        id: What the answer is called.
        told: What was asked.
        answers: One for each prompt and choice, in vLLM's order.
        books: Where they are settled.
        until: When it is cut off, by the loop's clock.
        over: Called once all answers have ended.
        why: What cuts it off.
    """

    id: str
    told: ChatOnward
    answers: Sequence[Answer]
    books: Books
    until: float
    over: Callable[["Passage"], None]
    why: Reason = "time"
    _limit: asyncio.Timeout | None = field(default=None, init=False)

    @property
    def left(self) -> int:
        """Answers that have not ended."""
        return sum(answer.ended is None for answer in self.answers)

    @property
    def line(self) -> dict[str, Any]:
        """What the log says of it, without what was said."""
        receipts = [answer.receipt(self.books.costs) for answer in self.answers]
        want, decision = self.answers[0].grant.want, self.answers[0].grant.decision
        return {
            "id": self.id,
            "asked": want.num_recurrences or want.effort,
            "allowed": decision.depth,
            "prompt_tokens": sum(receipt.prompt_tokens for receipt in receipts),
            "new_tokens": sum(receipt.new_tokens for receipt in receipts),
            "flops": sum(receipt.flops for receipt in receipts),
            "seconds": round(max(receipt.seconds for receipt in receipts), 4),
            "outcome": sorted({str(answer.ended) for answer in self.answers}),
        }

    def end(self, ending: Ending) -> None:
        """Settle all answers that have not ended."""
        if self.left:
            for answer in self.answers:
                self.books.settle(answer, ending)
            self.over(self)

    def cut(self, why: Reason) -> None:
        """Let it go on no more, for the first reason that there is."""
        now = asyncio.get_running_loop().time()
        if self.until <= now:
            return
        self.why, self.until = why, now
        if self._limit is not None:
            self._limit.reschedule(now)

    async def within(self, waiting: Awaitable[T]) -> T:
        """Wait for something as long as the request may go on.

        Raises:
            Cut: It may not.
        """
        try:
            async with asyncio.timeout_at(self.until) as self._limit:
                return await waiting
        except TimeoutError:
            raise Cut from None
        finally:
            self._limit = None

    @contextlib.asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncIterator[None]:
        """Cut it off when the client leaves."""

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.cut("cancelled")

        leaving = asyncio.create_task(left())
        try:
            yield
        finally:
            leaving.cancel()

    def failed(self, error: Exception) -> ApiError:
        """Settle what is left after an error, and return what is said of it."""
        if not isinstance(error, Cut):
            self.end("error")
            reason = str(error) or type(error).__name__
            return ApiError(502, f"vLLM broke off: {reason[:200]}", code="upstream_failed")
        self.end(self.why)
        if self.why == "shutdown":
            return closed()
        message = "the answer took longer than this server waits: ask for fewer tokens"
        return ApiError(504, message, code="timeout")

    # ---- a whole body

    def whole(self, raw: bytes) -> dict[str, Any]:
        """Return the body that is told, of the one that vLLM answered with.

        Raises:
            ValueError: It is none.
        """
        body = from_json(raw)
        usage, choices = body["usage"], body["choices"]
        if len(choices) != len(self.answers):
            raise ValueError(f"{len(choices)} answers came for {len(self.answers)}")
        count = len(choices)
        share, prompts = divmod(usage["completion_tokens"], count), self.told.num_prompts
        for index, (answer, choice) in enumerate(zip(self.answers, choices, strict=True)):
            self._take_ids(answer, body, choice)
            # Of several whose tokens are hidden only the sum is known.
            new = len(answer.tokens) or share[0] + (index < share[1])
            prompt = answer.prompt
            answer.hear(usage["prompt_tokens"] // prompts if prompt is None else len(prompt), new)
            self._finish(answer, choice)
        self._strip(body, choices)
        return body | {"recurrence": self._recurrence(self.answers)}

    # ---- a stream

    async def events(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """Yield the server-sent events of the answer as they come."""
        error = None
        try:
            async for event in self._until_done(response):
                if not event.startswith(DATA):
                    yield event + b"\n\n"
                    continue
                left, told = self.left, self._chunk(from_json(event[len(DATA) :]))
                if self.left < left:
                    await self.books.kept()
                if told is not None:
                    yield DATA + to_json(told) + b"\n\n"
        except BROKEN as found:
            error = self.failed(found)
        except ApiError as found:
            error = found
        if error is not None:
            yield DATA + to_json(error.body) + b"\n\n"
        self.end("error")
        yield DONE + b"\n\n"

    async def _until_done(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """Yield events up to the last one.

        Raises:
            Cut: The request may not go on.
            ValueError: There is no last one.
        """
        parts, rest, done = response.aiter_bytes(), b"", False
        # To the end of the response, or its connection could not be used again.
        while (part := await self.within(anext(parts, None))) is not None:
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                done = done or event == DONE
                if not done:
                    yield event
        if not done:
            raise ValueError("the stream has no end")

    def _chunk(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """Take note of a chunk, and return what is told of it, None if nothing is."""
        if "error" in chunk:
            self.end("error")
            return chunk
        usage, asked = chunk.get("usage"), self.told.stream_options
        for choice in chunk["choices"]:
            answer = self.answers[choice["index"]]
            self._take_ids(answer, chunk, choice)
            if usage is not None:
                answer.hear(usage["prompt_tokens"], usage["completion_tokens"])
            if choice.get("finish_reason"):
                self._finish(answer, choice)
        if not chunk["choices"]:
            if not (asked and asked.include_usage):
                return None
            chunk["recurrence"] = self._recurrence(self.answers)
        elif not (asked and asked.include_usage and asked.continuous_usage_stats):
            chunk.pop("usage", None)
        self._strip(chunk, chunk["choices"])
        return chunk

    # ---- parts of both

    def _take_ids(self, answer: Answer, body: dict[str, Any], choice: dict[str, Any]) -> None:
        """Take the numbers of tokens, which stand in the body for chats, else in the choice."""
        prompt = body.get("prompt_token_ids") or choice.get("prompt_token_ids")
        answer.prompt = prompt or answer.prompt
        answer.tokens += choice.get("token_ids") or []

    def _finish(self, answer: Answer, choice: dict[str, Any]) -> None:
        self.books.settle(answer, REASONS.get(choice["finish_reason"], "stop"))
        choice["recurrence"] = self._recurrence([answer])
        if not self.left:
            self.over(self)

    def _recurrence(self, answers: Sequence[Answer]) -> dict[str, Any]:
        receipts = [answer.receipt(self.books.costs) for answer in answers]
        return dumped(summed(answers[0].grant.want.effort, receipts))

    def _strip(self, body: dict[str, Any], choices: Sequence[dict[str, Any]]) -> None:
        """Leave out what the client did not ask for."""
        if not self.told.return_token_ids:
            for part in (body, *choices):
                for name in IDS:
                    part.pop(name, None)
