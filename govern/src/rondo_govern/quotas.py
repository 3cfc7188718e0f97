"""Quotas: what a key may still spend, counted as it is spent.

A request is let in only if its worst case fits, and holds that much until it has ended. So what is
spent and held together is never more than a quota, whatever runs at the same time.
"""

import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rondo_govern.policy import LONGEST_WINDOW, Quota
from rondo_govern.rules import Denied

MINUTE = 60
# No window reaches further back, not even if the clock is set back by a day.
KEPT_SECONDS = LONGEST_WINDOW + 86_400


@dataclass(frozen=True)
class Standing:
    """How a key stands with a quota, in the window that is running.

    Attributes:
        quota: The quota.
        flops: FLOPs spent.
        tokens: Tokens spent.
        held_flops: FLOPs held by requests that have not ended.
        held_tokens: Tokens held by them.
        ends: When the window ends, in seconds since 1970.
    """

    quota: Quota
    flops: int
    tokens: int
    held_flops: int
    held_tokens: int
    ends: int


@dataclass(frozen=True)
class Hold:
    """What a request holds.

    Attributes:
        key: Whose it is.
        minute: When it was let in, in minutes since 1970.
        flops: FLOPs that it may take.
        tokens: Tokens that it may take.
    """

    key: str
    minute: int
    flops: int
    tokens: int


@dataclass
class Spending:
    """What a key spent or holds, minute by minute, as sums since the beginning.

    Windows are whole minutes, so what falls into one is the difference of two sums, also where a
    policy names the window only later: changing quotas forgets nothing. Numbers are whole, or
    differences would not be exact.

    Attributes:
        minutes: Those in which something was spent, in order, after one for all before.
        flops: FLOPs up to the end of each.
        tokens: Tokens up to the end of each.
    """

    minutes: list[int] = field(default_factory=lambda: [-1])
    flops: list[int] = field(default_factory=lambda: [0])
    tokens: list[int] = field(default_factory=lambda: [0])

    def add(self, minute: int, flops: int, tokens: int) -> None:
        """Count what belongs to a minute; less than nothing gives back."""
        at = bisect_left(self.minutes, minute)
        if at == len(self.minutes) or self.minutes[at] != minute:
            self.minutes.insert(at, minute)
            self.flops.insert(at, self.flops[at - 1])
            self.tokens.insert(at, self.tokens[at - 1])
        # Few: a minute that something is counted in is seldom long ago.
        for later in range(at, len(self.minutes)):
            self.flops[later] += flops
            self.tokens[later] += tokens

    def between(self, begin: int, end: int) -> tuple[int, int]:
        """Return FLOPs and tokens from one minute to another, the last left out."""
        first, last = (bisect_left(self.minutes, one, lo=1) - 1 for one in (begin, end))
        return self.flops[last] - self.flops[first], self.tokens[last] - self.tokens[first]

    def forget(self, before: int) -> None:
        """Keep no single minutes before one."""
        kept = bisect_left(self.minutes, before, lo=1)
        del self.minutes[1:kept], self.flops[: kept - 1], self.tokens[: kept - 1]


class Ledger:
    """What each key spent and holds. Its methods may be called from any thread.

    A request counts where it was let in, with all that it took later.

    Args:
        clock: Seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time):
        self._clock = clock
        self._lock = threading.Lock()
        self._spendings: dict[str, Spending] = {}
        self._holds: dict[str, Hold] = {}

    def reserve(
        self, holds: Mapping[str, tuple[float, int]], key: str, quotas: Sequence[Quota]
    ) -> None:
        """Hold what the answers of a request may take at most, all or none.

        Args:
            holds: FLOPs, and tokens of its prompt and of its longest answer, by id, unlike all
                others that hold something.
            key: Whose they are.
            quotas: What the key may spend.

        Raises:
            Denied: A quota does not allow them at all, or not before its next window.
        """
        now = self._clock()
        wanted = {id: (math.ceil(flops), tokens) for id, (flops, tokens) in holds.items()}
        flops, tokens = (sum(one[at] for one in wanted.values()) for at in (0, 1))
        with self._lock:
            spending = self._spending(key, now)
            both = flops, tokens
            denied = [one for quota in quotas for one in denials(key, quota, spending, both, now)]
            if denied:
                # What waiting does not help before what it does, and then the longest wait.
                raise max(denied, key=lambda one: one.retry_after or math.inf)
            minute = int(now // MINUTE)
            spending.add(minute, flops, tokens)
            self._holds |= {id: Hold(key, minute, *one) for id, one in wanted.items()}

    def settle(self, id: str, flops: float, tokens: int) -> None:
        """Count what a request took in place of what it holds."""
        with self._lock:
            hold = self._holds.pop(id)
            spending = self._spendings[hold.key]
            spending.add(hold.minute, math.ceil(flops) - hold.flops, tokens - hold.tokens)

    def restore(self, key: str, at: float, flops: float, tokens: int) -> None:
        """Count what was spent before the program started, and when, in seconds since 1970."""
        with self._lock:
            spending = self._spending(key, self._clock())
            spending.add(int(at // MINUTE), math.ceil(flops), tokens)

    def standing(self, key: str, quotas: Sequence[Quota]) -> list[Standing]:
        """Return how a key stands with its quotas."""
        now, found = self._clock(), []
        with self._lock:
            spending = self._spending(key, now)
            for quota in quotas:
                begin, end = window_of(quota, now)
                flops, tokens = spending.between(begin, end)
                held = [
                    hold
                    for hold in self._holds.values()
                    if hold.key == key and begin <= hold.minute < end
                ]
                held_flops = sum(hold.flops for hold in held)
                held_tokens = sum(hold.tokens for hold in held)
                spent = flops - held_flops, tokens - held_tokens
                found.append(Standing(quota, *spent, held_flops, held_tokens, end * MINUTE))
        return found

    def _spending(self, key: str, now: float) -> Spending:
        spending = self._spendings.setdefault(key, Spending())
        spending.forget(int(now - KEPT_SECONDS) // MINUTE)
        return spending


def window_of(quota: Quota, now: float) -> tuple[int, int]:
    """Return the first minute of the window that is running, and the first after it."""
    length = quota.seconds // MINUTE
    begin = int(now // quota.seconds) * length
    return begin, begin + length


def denials(
    key: str, quota: Quota, spending: Spending, wanted: tuple[int, int], now: float
) -> Iterator[Denied]:
    """Tell why a quota does not allow a request.

    Args:
        key: Whose it is.
        quota: The quota.
        spending: What the key spent or holds.
        wanted: FLOPs and tokens that the request may take.
        now: Seconds since 1970.
    """
    begin, end = window_of(quota, now)
    who = f"key {key}" if key else "whoever has no key"
    bounds = (
        (quota.flops, "FLOPs", ".4g", "fewer tokens or less depth"),
        (quota.tokens, "tokens", ",", "fewer tokens"),
    )
    for bound, taken, more in zip(bounds, spending.between(begin, end), wanted, strict=True):
        most, unit, form, less = bound
        if most is None or taken + more <= most:
            continue
        message = f"this request may take {more:{form}} {unit}, and {who} "
        whole = f"{most:{form}} per {quota.window}"
        if more > most:
            message += f"may spend {whole}: ask for {less}"
            yield Denied(message, code="quota_too_small")
            continue
        then = datetime.fromtimestamp(end * MINUTE, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        left = max(most - taken, 0)
        message += f"has {left:{form}} left of {whole}: ask again at {then}, or for {less}"
        wait = end * MINUTE - now
        yield Denied(message, status=429, code="quota_exceeded", retry_after=wait)
