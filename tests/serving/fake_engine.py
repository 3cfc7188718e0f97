"""An engine without a model: answers from a script, at once or slowly, busy or failing if asked."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rondo_serve.policy import Allowed, Limits
from rondo_serve.requests import (
    Ask,
    Busy,
    Closed,
    Deliver,
    Finished,
    Load,
    Reason,
    Receipt,
    Refused,
    Token,
)


@dataclass
class Script:
    """What a fake engine does.

    Attributes:
        words: Texts of the tokens it answers with; cut at max_new_tokens, repeated when `endless`.
        endless: Go on until max_new_tokens.
        pause: Seconds before each token.
        reason: How an answer ends.
        tokens: Numbers of the tokens, those from 40 on unless given.
        end: Text that is held back until the end.
        busy_after: Asks that are taken before the queue is full.
        refusal: Why no ask is taken.
        failure: Why the engine is dead.
    """

    words: tuple[str, ...] = ("Two", " and", " two", ".")
    endless: bool = False
    pause: float = 0.0
    reason: Reason = "stop"
    tokens: tuple[int, ...] = ()
    end: str = "!"
    busy_after: int | None = None
    refusal: Refused | None = None
    failure: str | None = None


@dataclass
class FakeEngine:
    """The engine's interface over a script. A token's iterations go 1, 2, .., r, 1, .."""

    policy: Limits
    script: Script = field(default_factory=Script)
    asked: list[Ask] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    ended: dict[str, Reason] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._cut = threading.Event()

    def start(self) -> None:
        """There is nothing to start."""

    def submit_all(self, asks: Sequence[Ask], delivers: Sequence[Deliver]) -> list[Allowed]:
        if self._closed.is_set() or self.script.failure:
            raise Closed("closed")
        if self.script.refusal is not None:
            raise self.script.refusal
        most = self.script.busy_after
        if most is not None and len(self.asked) + len(asks) > most:
            raise Busy(2.5)
        allowed = self.policy.allow(asks, self.load())
        for ask, deliver, given in zip(asks, delivers, allowed, strict=True):
            self.asked.append(ask)
            stop = self._stops[ask.id] = threading.Event()
            thread = threading.Thread(target=self._answer, args=(ask, given, deliver, stop))
            thread.start()
            self._threads.append(thread)
        return allowed

    def cancel(self, id: str) -> None:
        if id in self._stops and id not in self.ended:
            self.cancelled.append(id)
            self._stops[id].set()

    def close(self, grace: float) -> None:
        self._closed.set()
        if grace:
            for thread in self._threads:
                thread.join(grace)
        self._cut.set()
        for thread in self._threads:
            thread.join(5)

    @property
    def failure(self) -> str | None:
        return self.script.failure

    def load(self) -> Load:
        running = len(self._stops) - len(self.ended)
        return Load(
            waiting=1,
            left_over=1,
            running=running,
            pages=3,
            cached_pages=1,
            total_pages=12,
            ticks=7,
        )

    def _answer(self, ask: Ask, allowed: Allowed, deliver: Deliver, stop: threading.Event) -> None:
        depths: dict[int, int] = {}
        reason = self.script.reason
        for number in range(ask.max_new_tokens):
            if number >= len(self.script.words) and not self.script.endless:
                break
            stop.wait(self.script.pause)
            if stop.is_set() or self._cut.is_set():
                reason = "cancelled" if stop.is_set() else "shutdown"
                break
            depth = number % allowed.depth + 1
            depths[depth] = depths.get(depth, 0) + 1
            deliver(self._token(ask, number, depth))
        else:
            reason = "length"
        receipt = Receipt(
            asked=ask.num_recurrences,
            allowed=allowed.depth,
            prompt_tokens=len(ask.prompt),
            cached_tokens=1,
            depths=depths,
            iterations=len(ask.prompt) * allowed.depth + sum(d * n for d, n in depths.items()),
            flops=1e6,
            queued=0.01,
            first_token=0.02 if depths else None,
            seconds=0.1,
            exit=allowed.exit,
            grant=allowed.grant,
        )
        self.policy.spent(ask, reason, receipt)
        self.ended[ask.id] = reason
        deliver(Finished(reason, self.script.end if reason == "stop" else "", receipt))

    def _token(self, ask: Ask, number: int, depth: int) -> Token:
        text = self.script.words[number % len(self.script.words)]
        told = ask.sampling.logprobs
        top = tuple((40 + i, -1.0 - i) for i in range(told or 0))
        token = self.script.tokens[number] if self.script.tokens else 40 + number
        return Token(token, text, depth, None if told is None else -0.5, top)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Wait for something to become true."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return True
        waiting.wait(0.01)
    return False
