"""From events to what a client reads: whole bodies, and the chunks of a stream."""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from pydantic import BaseModel

from rondo_govern.efforts import Effort
from rondo_serve.api.calls import Call
from rondo_serve.api.errors import ApiError
from rondo_serve.api.logprobs import Held, Speller, of_chat, of_text
from rondo_serve.api.replies import (
    AnswerMessage,
    CachedTokens,
    ChatChoice,
    ChatChunk,
    ChatPiece,
    ChatReply,
    CompletionReply,
    Delta,
    ExitReply,
    FinishReason,
    RecurrenceReply,
    TextChoice,
    TokenReply,
    Usage,
    dumped,
)
from rondo_serve.governed import told_of
from rondo_serve.requests import Finished, Receipt, Token

Kind = Literal["chat", "text"]
# A comment now and then keeps proxies from taking a queue for a dead line.
PAUSE = 15.0


@dataclass
class Written:
    """What there is of an answer.

    Attributes:
        tokens: Its tokens.
        end: Its end.
        offset: Characters that were streamed.
        held: Those whose probabilities are not told yet.
    """

    tokens: list[Token] = field(default_factory=list)
    end: Finished | None = None
    offset: int = 0
    held: Held = field(default_factory=Held)


@dataclass(frozen=True)
class Teller:
    """Tells the events of a call.

    Attributes:
        call: The call.
        kind: Whose shape is told: of conversations or of completions.
        speller: Turns tokens to text, for their probabilities.
        model: The model's name.
        tokens: Tell each token's depth in a whole body too.
        usage: End a stream with what was used.
        n: Answers to each prompt.
        created: Seconds since 1970.
    """

    call: Call
    kind: Kind
    speller: Speller
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
                recurrence=summed(self.call.asks[0].effort, self._receipts()),
            )
        )

    async def chunks(self) -> AsyncIterator[str]:
        """Yield the server-sent events of a stream."""
        try:
            async for chunk in self._chunks():
                yield chunk
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n"

    async def _chunks(self) -> AsyncIterator[str]:
        written = [Written() for _ in self.call.asks]
        if self.kind == "chat":
            for index in range(len(written)):
                told = self._told(index, [], None)
                begin = Delta(role="assistant", content="")
                yield self._event([ChatPiece(delta=begin, logprobs=None, **told)])
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
            depth = summed(self.call.asks[0].effort, self._receipts())
            yield self._event([], usage=self._usage(), recurrence=depth)
        yield "data: [DONE]\n\n"

    # ---- parts of a reply

    def _head(self) -> dict[str, Any]:
        kind = {"chat": "chat.completion", "text": "text_completion"}[self.kind]
        return {"id": self.call.id, "object": kind, "created": self.created, "model": self.model}

    def _event(self, choices: Sequence[BaseModel], **more: Any) -> str:
        head = self._head()
        reply: type[BaseModel] = CompletionReply
        if self.kind == "chat":
            reply = ChatChunk
            head["object"] = "chat.completion.chunk"
        head |= ({"usage": None} if self.usage else {}) | more
        told = reply(**head, choices=choices).model_dump_json(exclude_unset=True)
        return f"data: {told}\n\n"

    def _choice(self, index: int, one: Written) -> BaseModel:
        """Return a whole answer."""
        assert one.end is not None
        text = "".join(token.text for token in one.tokens) + one.end.text
        told = self._ended(index, one.end)
        if self.tokens:
            told["tokens"] = shown(one.tokens)
        tokens = one.held.push(one.tokens, self.speller.special, one.end)
        if self.kind == "text":
            return TextChoice(text=text, logprobs=of_text(tokens, 0, self.speller), **told)
        message = AnswerMessage(role="assistant", content=text, refusal=None)
        return ChatChoice(message=message, logprobs=of_chat(tokens, self.speller), **told)

    def _next(self, index: int, one: Written, tokens: list[Token], text: str) -> BaseModel:
        """Return a piece of an answer: tokens, or the end."""
        heard = one.held.push(tokens, self.speller.special, one.end)
        told = self._told(index, tokens, one.end)
        if self.kind == "chat":
            delta = Delta(content=text) if text or tokens else Delta()
            return ChatPiece(delta=delta, logprobs=of_chat(heard, self.speller), **told)
        logprobs = of_text(heard, one.offset, self.speller)
        one.offset += len(text)
        return TextChoice(text=text, logprobs=logprobs, **told)

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
        depth = recurrence_of(ask.effort, [end.receipt])
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


def shown(tokens: Iterable[Token]) -> list[TokenReply]:
    """Return tokens with their depths."""
    return [TokenReply(text=token.text, recurrences=token.recurrences) for token in tokens]


def failed() -> ApiError:
    """Return the answer to a request that the engine failed at."""
    return ApiError(500, "the engine failed at this answer: the server's log tells why")


def summed(effort: Effort | None, receipts: Sequence[Receipt]) -> RecurrenceReply:
    """Return the depth that all answers of a call took; see `recurrence_of`."""
    return RecurrenceReply(**recurrence_of(effort, receipts))


def recurrence_of(effort: Effort | None, receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Return the fields of `RecurrenceReply` that receipts tell.

    Args:
        effort: What was asked for in OpenAI's words.
        receipts: What its answers took.
    """
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
    if effort is not None:
        told["effort"] = effort
    told |= governed_of(receipts)
    if (rule := told_of(receipts[0].exit)) is not None:
        told["exit"] = ExitReply(**rule)
    return told


def governed_of(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Return what a policy made of a request, and its price; nothing where there is no policy."""
    grants = [(receipt, grant) for receipt in receipts if (grant := receipt.grant) is not None]
    if not grants or grants[0][1].policy is None:
        return {}
    first = grants[0][1]
    price = sum((grant.price_of(receipt.iterations) for receipt, grant in grants), Decimal(0))
    return {
        "floor": first.decision.floor,
        "tenant": first.seat.tenant,
        "tier": first.seat.tier,
        "risks": list(first.decision.risks),
        "adjusted": list(first.decision.adjusted),
        "price": format(price, "f"),
    }
