"""From events to what a client reads: whole bodies, and the chunks of a stream."""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from rondo.modeling.exits_recurrent import ExitRule
from rondo_serve.api.calls import Call
from rondo_serve.api.errors import ApiError
from rondo_serve.api.replies import (
    AnswerMessage,
    CachedTokens,
    ChatChoice,
    ChatChunk,
    ChatLogprob,
    ChatLogprobs,
    ChatPiece,
    ChatReply,
    CompletionReply,
    Delta,
    ExitReply,
    FinishReason,
    RecurrenceReply,
    TextChoice,
    TextLogprobs,
    TokenReply,
    TopLogprob,
    Usage,
    dumped,
)
from rondo_serve.requests import Ask, Finished, Receipt, Token

Kind = Literal["chat", "text"]
# JSON has no infinity: what other servers say of a token that cannot come.
LEAST_LOGPROB = -9999.0
# A comment now and then keeps proxies from taking a queue for a dead line.
PAUSE = 15.0


@dataclass
class Written:
    """What there is of an answer.

    Attributes:
        tokens: Its tokens.
        end: Its end.
        offset: Characters that were streamed.
    """

    tokens: list[Token] = field(default_factory=list)
    end: Finished | None = None
    offset: int = 0


@dataclass(frozen=True)
class Teller:
    """Tells the events of a call.

    Attributes:
        call: The call.
        kind: Whose shape is told: of conversations or of completions.
        tokenizer: Turns tokens to text, for their probabilities.
        model: The model's name.
        tokens: Tell each token's depth in a whole body too.
        usage: End a stream with what was used.
        n: Answers to each prompt.
        created: Seconds since 1970.
    """

    call: Call
    kind: Kind
    tokenizer: Any
    model: str
    tokens: bool = False
    usage: bool = False
    n: int = 1
    created: int = field(default_factory=lambda: int(time.time()))

    async def body(self) -> dict[str, Any]:
        """Return the whole body, once all answers have ended.

        Raises:
            ApiError: An answer failed.
        """
        written = [Written() for _ in self.call.asks]
        async for batch in self.call.events():
            for index, event in batch:
                if isinstance(event, Token):
                    written[index].tokens.append(event)
                else:
                    written[index].end = event
        if any(one.end is not None and one.end.reason == "error" for one in written):
            raise failed()
        choices = [self._choice(index, one) for index, one in enumerate(written)]
        reply = ChatReply if self.kind == "chat" else CompletionReply
        return dumped(
            reply(
                **self._head(),
                choices=choices,
                usage=self._usage(),
                recurrence=summed(self.call.asks, self._receipts()),
            )
        )

    async def chunks(self) -> AsyncIterator[str]:
        """Yield the server-sent events of a stream."""
        written = [Written() for _ in self.call.asks]
        if self.kind == "chat":
            for index in range(len(written)):
                yield self._event([self._piece(index, [], Delta(role="assistant", content=""))])
        async for batch in self.call.events(PAUSE):
            if not batch:
                yield ": the answer is still to come\n\n"
            for index in sorted({index for index, _ in batch}):
                events = [event for at, event in batch if at == index]
                if tokens := [event for event in events if isinstance(event, Token)]:
                    text = "".join(token.text for token in tokens)
                    yield self._event([self._next(index, written[index], tokens, text)])
                if isinstance(end := events[-1], Finished):
                    if end.reason == "error":
                        yield f"data: {json.dumps(failed().body)}\n\n"
                    else:
                        written[index].end = end
                        yield self._event([self._next(index, written[index], [], end.text)])
        if self.usage:
            asks = self.call.asks
            yield self._event([], usage=self._usage(), recurrence=summed(asks, self._receipts()))
        yield "data: [DONE]\n\n"

    # ---- parts of a reply

    def _head(self) -> dict[str, Any]:
        name = self.call.asks[0].id.rpartition("-")[0]
        kind = {"chat": "chat.completion", "text": "text_completion"}[self.kind]
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def _event(self, choices: Sequence[BaseModel], **more: Any) -> str:
        head = self._head()
        reply: type[BaseModel] = CompletionReply
        if self.kind == "chat":
            reply = ChatChunk
            head["object"] = "chat.completion.chunk"
        told = reply(**head, choices=choices, **more).model_dump_json(exclude_unset=True)
        return f"data: {told}\n\n"

    def _choice(self, index: int, one: Written) -> BaseModel:
        """Return a whole answer."""
        assert one.end is not None
        text = "".join(token.text for token in one.tokens) + one.end.text
        told = self._ended(index, one.end)
        if self.tokens:
            told["tokens"] = shown(one.tokens)
        if self.kind == "text":
            return TextChoice(text=text, logprobs=self._text_logprobs(one.tokens, 0), **told)
        message = AnswerMessage(role="assistant", content=text, refusal=None)
        return ChatChoice(message=message, logprobs=self._chat_logprobs(one.tokens), **told)

    def _next(self, index: int, one: Written, tokens: list[Token], text: str) -> BaseModel:
        """Return a piece of an answer: tokens, or the end."""
        if self.kind == "chat":
            delta = Delta(content=text) if text or tokens else Delta()
            return self._piece(index, tokens, delta, one.end)
        told = self._told(index, tokens, one.end)
        logprobs = self._text_logprobs(tokens, one.offset)
        one.offset += len(text)
        return TextChoice(text=text, logprobs=logprobs, **told)

    def _piece(
        self, index: int, tokens: list[Token], delta: Delta, end: Finished | None = None
    ) -> BaseModel:
        told = self._told(index, tokens, end)
        return ChatPiece(delta=delta, logprobs=self._chat_logprobs(tokens), **told)

    def _told(self, index: int, tokens: list[Token], end: Finished | None) -> dict[str, Any]:
        if end is not None:
            return self._ended(index, end)
        told: dict[str, Any] = {"index": index, "finish_reason": None}
        if tokens:
            told["recurrences"] = [token.recurrences for token in tokens]
            told["tokens"] = shown(tokens)
        return told

    def _ended(self, index: int, end: Finished) -> dict[str, Any]:
        ask = self.call.asks[index]
        depth = recurrence_of([end.receipt], ask.exit)
        depth["seed"] = ask.sampling.seed
        if end.reason in ("time", "shutdown", "cancelled"):
            depth["ended_by"] = end.reason
        reason: FinishReason = "stop" if end.reason == "stop" else "length"
        return {"index": index, "finish_reason": reason, "recurrence": RecurrenceReply(**depth)}

    def _receipts(self) -> list[Receipt]:
        return [self.call.finished[index].receipt for index in sorted(self.call.finished)]

    def _usage(self) -> Usage:
        receipts = self._receipts()
        # A prompt counts once however many answers it has, as OpenAI counts it.
        first = receipts[:: self.n]
        read = sum(receipt.prompt_tokens for receipt in first)
        cached = sum(receipt.cached_tokens for receipt in first)
        new = sum(receipt.new_tokens for receipt in receipts)
        return Usage(
            prompt_tokens=read,
            completion_tokens=new,
            total_tokens=read + new,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )

    # ---- probabilities

    def _chat_logprobs(self, tokens: list[Token]) -> ChatLogprobs | None:
        told = [token for token in tokens if token.logprob is not None]
        if not told:
            return None
        content = [
            ChatLogprob(
                **self._logprob(token.token, token.logprob),
                top_logprobs=[TopLogprob(**self._logprob(*one)) for one in token.top],
            )
            for token in told
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _logprob(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        # A token that is a part of a character has no text of its own.
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": finite(logprob), "bytes": whole}

    def _text_logprobs(self, tokens: list[Token], offset: int) -> TextLogprobs | None:
        told = [token for token in tokens if token.logprob is not None]
        if not told:
            return None
        offsets = []
        for token in told:
            offsets.append(offset)
            offset += len(token.text)
        return TextLogprobs(
            tokens=[self.tokenizer.decode([token.token]) for token in told],
            token_logprobs=[finite(token.logprob) for token in told],
            top_logprobs=[
                {self.tokenizer.decode([other]): finite(logprob) for other, logprob in token.top}
                for token in told
            ],
            text_offset=offsets,
        )


def finite(logprob: float | None) -> float:
    """Return a logarithm that JSON can hold."""
    return LEAST_LOGPROB if logprob is None or not logprob > LEAST_LOGPROB else logprob


def shown(tokens: Iterable[Token]) -> list[TokenReply]:
    """Return tokens with their depths."""
    return [TokenReply(text=token.text, recurrences=token.recurrences) for token in tokens]


def failed() -> ApiError:
    """Return the answer to a request that the engine failed at."""
    return ApiError(500, "the engine failed at this answer: the server's log tells why")


def summed(asks: Sequence[Ask], receipts: Sequence[Receipt]) -> RecurrenceReply:
    """Return the depth that all answers of a call took."""
    return RecurrenceReply(**recurrence_of(receipts, asks[0].exit))


def recurrence_of(receipts: Sequence[Receipt], rule: ExitRule | None) -> dict[str, Any]:
    """Return the fields of `RecurrenceReply` that receipts tell."""
    depths = sum((Counter(receipt.depths) for receipt in receipts), Counter())
    total = sum(depth * count for depth, count in depths.items())
    told: dict[str, Any] = {
        "asked": receipts[0].asked,
        "allowed": max(receipt.allowed for receipt in receipts),
        "mean": total / max(1, depths.total()),
        "max": max(depths, default=0),
        "by_depth": {str(depth): depths[depth] for depth in sorted(depths)},
        "iterations": sum(receipt.iterations for receipt in receipts),
        "flops": sum(receipt.flops for receipt in receipts),
    }
    if rule is not None:
        told["exit"] = ExitReply(
            rule=rule.criterion,
            threshold=rule.threshold,
            min_recurrences=rule.min_recurrences,
            check_every=rule.check_every,
        )
    return told
