"""What an engine is asked for, and what it answers: data only, alike for every engine."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from rondo.modeling.exits_recurrent import ExitRule
from rondo_govern.efforts import Effort
from rondo_govern.governor import Grant

Reason = Literal["stop", "length", "time", "shutdown", "cancelled", "error"]
# Or it was allowed, and never begun.
Ending = Reason | Literal["untaken"]


class Refused(ValueError):
    """A request that can never be served: what is wrong with it, in one sentence.

    Attributes:
        param: The field of the request that is wrong, or None.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class Busy(Exception):
    """The queue is full.

    Attributes:
        retry_after: Seconds after which asking again makes sense.
    """

    def __init__(self, retry_after: float):
        super().__init__(f"the queue is full: ask again in {math.ceil(retry_after)} seconds")
        self.retry_after = retry_after


class Closed(Exception):
    """The engine takes no more requests: it shuts down, or it has failed."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the best token.
        top_p: Nucleus, in 0..1; 1 takes all.
        top_k: How many of the best are drawn from; 0 takes all.
        seed: Seed of the draws, and of a `normal` initial state.
        repetition_penalty: Divides the odds of tokens that the text has already; 1 is none.
        logprobs: How many of the best tokens are told beside the chosen one; None tells none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    repetition_penalty: float = 1.0
    logprobs: int | None = None


@dataclass(frozen=True)
class Ask:
    """One text to continue.

    Attributes:
        id: Its name, unlike all others in flight.
        prompt: Tokens, at least one.
        num_recurrences: Depth r asked for; with an exit, the cap. None leaves it to the policy.
        effort: Depth asked for in OpenAI's words, where no number is given.
        exit: When a token leaves the loop before r, or None.
        max_new_tokens: Most tokens to generate.
        sampling: How they are chosen.
        stop: Strings before which the text ends.
        key: Name of the key that asks, empty where none is asked for.
        risks: Risk classes that the request names.
    """

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    num_recurrences: int | None = None
    effort: Effort | None = None
    exit: ExitRule | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    key: str = ""
    risks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Token:
    """A token that was generated.

    Attributes:
        token: Its number.
        text: Text that is certain now. A token may complete no character, or what may become a
            stop string: then it is empty, and a later one has more.
        recurrences: Iterations the token took.
        logprob: Natural logarithm of its probability before temperature and nucleus, if asked for.
        top: The best tokens with theirs, best first, if asked for.
    """

    token: int
    text: str
    recurrences: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Receipt:
    """What an answer took.

    Attributes:
        asked: Depth asked for, None if none was, or an effort.
        allowed: Depth r that the policy allowed: no token took more.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Those of them whose keys and values were there already.
        depths: How many generated tokens took how many iterations.
        iterations: Iterations of all tokens that were read, those of the prompt too.
        flops: FLOPs executed.
        queued: Seconds before the engine took it up.
        first_token: Seconds from then to the first token, None if there was none.
        seconds: Seconds from asking to the end.
        exit: When a token left the loop before `allowed`, or None.
        tokens: The generated tokens.
        grant: What a governor gave, None where there is none.
    """

    asked: int | None
    allowed: int
    prompt_tokens: int
    cached_tokens: int = 0
    depths: Mapping[int, int] = field(default_factory=dict)
    iterations: int = 0
    flops: float = 0.0
    queued: float = 0.0
    first_token: float | None = None
    seconds: float = 0.0
    exit: ExitRule | None = None
    tokens: tuple[int, ...] = ()
    grant: Grant | None = None

    @property
    def new_tokens(self) -> int:
        """Tokens generated, one that ended the text included."""
        return sum(self.depths.values())


@dataclass(frozen=True)
class Finished:
    """The end of an answer, and the last event of every request that was taken.

    Attributes:
        reason: stop (the text ended, or a stop string came), length, time (the server's limit),
            shutdown, cancelled, error.
        text: Text that was held back until now.
        receipt: What it took.
    """

    reason: Reason
    text: str
    receipt: Receipt


Event = Token | Finished
Deliver = Callable[[Event], None]


@dataclass(frozen=True)
class Load:
    """How busy an engine is.

    Attributes:
        waiting: Requests in the queue.
        left_over: Those of them that the last tick had no room for.
        running: Requests in flight.
        pages: Pages of keys and values that are held, by requests or by cached prefixes.
        cached_pages: Those held by cached prefixes only.
        total_pages: Pages that there are.
        ticks: Ticks so far.
        core_tokens: Tokens times iterations so far.
    """

    waiting: int = 0
    left_over: int = 0
    running: int = 0
    pages: int = 0
    cached_pages: int = 0
    total_pages: int = 0
    ticks: int = 0
    core_tokens: int = 0
