"""A machine that answers nothing: it takes the time that answers would, and tells a governor.

A slot computes so many FLOPs a second, whoever else is served; who finds no slot waits in a queue.
"""

import heapq
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from rondo_govern.efforts import Effort
from rondo_govern.governor import Governor, Grant, Spent, Want
from rondo_govern.rules import Decision, Denied

MIDNIGHT = datetime(2026, 11, 30, tzinfo=UTC).timestamp()
SLOTS, SLOT_FLOPS, QUEUE = 4, 4e9, 64

# SmolLM2-135M with its layers split 12, 6, 12, as `rondo.flops.costs_of` counts it.
PRELUDE_CODA, CORE, HEAD = 2 * 42_467_328, 21_233_664, 28_311_552
WIDTH, PRELUDE_CODA_LAYERS, CORE_LAYERS = 576, 24, 6


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        at: Seconds since midnight.
        patience: Seconds after which an answer is of no use, and whoever asked goes away.
        ask: Depth that is asked for, as a number or an effort.
        sure_after: Iterations after which each token of the answer is sure of itself.
    """

    id: str
    key: str
    at: float
    patience: float
    prompt_tokens: int
    ask: int | Effort | None
    risks: frozenset[str]
    sure_after: Sequence[int]

    def want(self, waiting: int) -> Want:
        """Return what policy, quotas and log are told of it."""
        return Want(
            id=self.id,
            prompt_tokens=self.prompt_tokens,
            new_tokens=len(self.sure_after),
            key=self.key,
            risks=self.risks,
            num_recurrences=self.ask if isinstance(self.ask, int) else None,
            effort=self.ask if isinstance(self.ask, str) else None,
            waiting=waiting,
            # There are no texts whose hashes could be told.
            facts={"prompt_sha256": None, "exit": None, "sampling": {"seed": 0}, "stop": []},
        )


@dataclass(frozen=True)
class Outcome:
    """How a request ended: why, and how many of its tokens took how many iterations."""

    request: Request
    reason: str
    depths: Mapping[int, int]


# ---- what an answer costs


def flops_of(iterations: int, length: int, answers: bool) -> int:
    """Return the FLOPs of a token that takes so many iterations and attends to so many tokens."""
    weights = PRELUDE_CODA + iterations * CORE + answers * HEAD
    layers = PRELUDE_CODA_LAYERS + iterations * CORE_LAYERS
    return 2 * weights + 4 * WIDTH * length * layers


def bound(decision: Decision, want: Want) -> float:
    """Return the most FLOPs that a request can take."""
    most = want.prompt_tokens + want.new_tokens
    return float(most * flops_of(decision.depth, most, answers=True))


def steps_of(request: Request, decision: Decision) -> Iterator[tuple[int, int]]:
    """Yield iterations and FLOPs, token by token: those of the prompt, then those of the answer.

    The prompt's last token and all but the last of the answer are what the answer is read from.
    """
    for length in range(1, request.prompt_tokens):
        yield decision.depth, flops_of(decision.depth, length, answers=False)
    for token, sure_after in enumerate(request.sure_after):
        iterations = decision.depth
        if decision.escalation is not None:
            iterations = min(max(sure_after, decision.floor), decision.depth)
        yield iterations, flops_of(iterations, request.prompt_tokens + token, answers=True)


def work(request: Request, decision: Decision, seconds: float) -> tuple[float, Spent]:
    """Answer a request on a slot, for so many seconds at most; return those it took."""
    total, ends, took = 0, [], []
    for iterations, flops in steps_of(request, decision):
        total += flops
        ends.append(total)
        took.append(iterations)
    count = bisect_right(ends, seconds * SLOT_FLOPS)
    spent = Spent(
        reason="length" if count == len(ends) else "cancelled",
        depths=Counter(took[request.prompt_tokens - 1 : count]),
        iterations=sum(took[:count]),
        prompt_tokens=request.prompt_tokens,
        flops=float(ends[count - 1]) if count else 0.0,
    )
    return min(seconds, total / SLOT_FLOPS), spent


# ---- the machine


class Clock:
    """Seconds since 1970, in the simulation."""

    def __init__(self) -> None:
        self.now = MIDNIGHT

    def __call__(self) -> float:
        """Return them."""
        return self.now


class Machine:
    """Slots and a queue.

    Args:
        governor: What stands in front of it.
        clock: Its time, which events set.
    """

    def __init__(self, governor: Governor, clock: Clock):
        self.outcomes: list[Outcome] = []
        self._governor, self._clock = governor, clock
        # Moment, number and what happens then: of two at the same moment the older one comes first.
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0
        self._waiting: deque[tuple[Request, Grant]] = deque()
        self._free = SLOTS

    def run(self, requests: Iterable[Request]) -> list[Outcome]:
        """Let time pass until all have ended."""
        for request in requests:
            self._at(MIDNIGHT + request.at, lambda request=request: self._ask(request))
        while self._events:
            self._clock.now, _, happen = heapq.heappop(self._events)
            happen()
        return self.outcomes

    def _at(self, moment: float, happen: Callable[[], None]) -> None:
        self._scheduled += 1
        heapq.heappush(self._events, (moment, self._scheduled, happen))

    def _ask(self, request: Request) -> None:
        try:
            (grant,) = self._governor.grant([request.want(len(self._waiting))])
        except Denied as denied:
            self._refuse(request, denied.code, denied.status)
            return
        if self._free:
            self._free -= 1
            self._begin(request, grant)
        elif len(self._waiting) < QUEUE:
            one = (request, grant)
            self._waiting.append(one)
            self._at(self._clock.now + request.patience, lambda: self._leave(one))
        else:
            self._governor.settle(grant, Spent("untaken", prompt_tokens=request.prompt_tokens))
            self._refuse(request, "busy", 429)

    def _refuse(self, request: Request, code: str, status: int) -> None:
        self._governor.refuse(request.key, code, status)
        self.outcomes.append(Outcome(request, code, {}))

    def _begin(self, request: Request, grant: Grant) -> None:
        # No less than nothing, where the difference is rounded.
        queued = max(0.0, self._clock.now - MIDNIGHT - request.at)
        seconds, spent = work(request, grant.decision, request.patience - queued)
        self._at(self._clock.now + seconds, lambda: self._end(request, grant, spent, queued))

    def _end(self, request: Request, grant: Grant, spent: Spent, queued: float) -> None:
        self._settle(request, grant, spent, queued)
        if self._waiting:
            self._begin(*self._waiting.popleft())
        else:
            self._free += 1

    def _leave(self, one: tuple[Request, Grant]) -> None:
        if one in self._waiting:
            self._waiting.remove(one)
            spent = Spent("cancelled", prompt_tokens=one[0].prompt_tokens)
            self._settle(*one, spent, one[0].patience)

    def _settle(self, request: Request, grant: Grant, spent: Spent, queued: float) -> None:
        seconds = self._clock.now - MIDNIGHT - request.at
        facts = {"seed": 0, "output_sha256": None}
        facts |= {"queued": round(queued, 3), "seconds": round(seconds, 3)}
        self._governor.settle(grant, replace(spent, facts=facts))
        self.outcomes.append(Outcome(request, spent.reason, spent.depths))
