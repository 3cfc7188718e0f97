"""Quotas: what is spent and held never exceeds them, whatever comes in whatever order."""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rondo_govern.policy import LONGEST_WINDOW, Quota
from rondo_govern.quotas import KEPT_SECONDS, Ledger, Standing
from rondo_govern.rules import Denied

DAY = 86_400
# Noon of a day.
NOON = 20_000.5 * DAY


class Clock:
    def __init__(self, now: float = NOON):
        self.now = now

    def __call__(self) -> float:
        return self.now


def quota(window: str, flops: float | None = None, tokens: int | None = None) -> Quota:
    return Quota(window=window, flops=flops, tokens=tokens)


def denial(ledger: Ledger, id: str, quotas: list[Quota], flops: float, tokens: int) -> Denied:
    with pytest.raises(Denied) as caught:
        ledger.reserve({id: (flops, tokens)}, "acme", quotas)
    return caught.value


def test_a_request_holds_its_worst_case_until_it_has_ended() -> None:
    clock, day = Clock(), [quota("1d", flops=100.0, tokens=50)]
    ledger = Ledger(clock)
    ledger.reserve({"a": (60.0, 10)}, "acme", day)
    assert ledger.standing("acme", day) == [
        Standing(day[0], flops=0, tokens=0, held_flops=60, held_tokens=10, ends=20_001 * DAY)
    ]
    denied = denial(ledger, "b", day, 41.0, 1)
    assert (denied.status, denied.code, denied.retry_after) == (429, "quota_exceeded", DAY / 2)
    assert str(denied) == (
        "this request may take 41 FLOPs, and key acme has 40 left of 100 per 1d: ask again at "
        "2024-10-05T00:00:00Z, or for fewer tokens or less depth"
    )
    ledger.settle("a", 20.5, 7)
    assert ledger.standing("acme", day) == [Standing(day[0], 21, 7, 0, 0, 20_001 * DAY)]
    ledger.reserve({"b": (41.0, 1)}, "acme", day)
    # Another key has all of it.
    ledger.reserve({"c": (100.0, 50)}, "beta", day)


def test_what_does_not_fit_a_whole_quota_is_told_so() -> None:
    quotas = [quota("1h", tokens=50), quota("1d", tokens=60, flops=9.0)]
    ledger = Ledger(Clock())
    ledger.restore("acme", NOON, 0.0, 45)
    denied = denial(ledger, "a", quotas, 1.0, 51)
    assert (denied.status, denied.code, denied.retry_after) == (403, "quota_too_small", None)
    assert str(denied) == (
        "this request may take 51 tokens, and key acme may spend 50 per 1h: ask for fewer tokens"
    )
    # Also where another quota would only have it wait.
    assert denial(ledger, "a", quotas, 10.0, 6).code == "quota_too_small"
    # The longest wait of several is told.
    assert denial(ledger, "a", quotas, 1.0, 6).retry_after == 3600
    assert denial(ledger, "a", quotas, 1.0, 16).retry_after == DAY / 2


def test_whoever_has_no_key_has_one_quota_together() -> None:
    ledger, quotas = Ledger(Clock()), [quota("1h", tokens=50)]
    ledger.reserve({"a": (0.0, 50)}, "", quotas)
    with pytest.raises(Denied, match="whoever has no key has 0 left of 50 per 1h"):
        ledger.reserve({"b": (0.0, 1)}, "", quotas)


def test_a_new_window_starts_anew_and_late_ends_count_where_they_began() -> None:
    clock, hour = Clock(), [quota("1h", tokens=50)]
    ledger = Ledger(clock)
    clock.now = NOON + 3599.9
    ledger.reserve({"a": (0.0, 50)}, "acme", hour)
    assert denial(ledger, "b", hour, 0.0, 1).retry_after == pytest.approx(0.1)
    clock.now = NOON + 3600
    ledger.reserve({"b": (0.0, 30)}, "acme", hour)
    ledger.settle("a", 0.0, 49)
    assert ledger.standing("acme", hour) == [
        Standing(hour[0], 0, 0, 0, 30, int(NOON) + 7200),
    ]
    # The two hours of noon to two o'clock are a window of their own.
    assert ledger.standing("acme", [quota("2h", tokens=1)])[0].tokens == 49


def test_changing_quotas_keeps_what_was_spent() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    ledger.reserve({"a": (5.0, 40)}, "acme", [])
    ledger.settle("a", 5.0, 40)
    clock.now += 120
    ledger.reserve({"b": (0.0, 2)}, "acme", [quota("1m", tokens=2)])
    # A window that nobody had named, then a smaller quota than what was spent already.
    assert denial(ledger, "c", [quota("90m", tokens=45)], 0.0, 4).code == "quota_exceeded"
    assert "has 0 left of 30" in str(denial(ledger, "c", [quota("1d", tokens=30)], 0.0, 4))


def test_a_restart_restores_what_the_log_tells() -> None:
    ledger, day = Ledger(Clock()), [quota("1d", tokens=50), quota("31d", flops=1e18)]
    for at, tokens in ((NOON - DAY, 100), (NOON - 60, 20), (NOON - 3600, 25)):
        ledger.restore("acme", at, 1e16, tokens)
    ledger.reserve({"a": (0.0, 5)}, "acme", day)
    assert denial(ledger, "b", day, 0.0, 1).code == "quota_exceeded"
    assert ledger.standing("acme", day)[1].flops == 30_000_000_000_000_000


def test_great_numbers_lose_nothing() -> None:
    ledger, month = Ledger(Clock()), [quota("31d", flops=1e24)]
    ledger.restore("acme", NOON, 1e24 - 2**30, 0)
    for number in range(3):
        ledger.reserve({str(number): (2.0**28, 0)}, "acme", month)
        ledger.settle(str(number), 1.0, 0)
    left = int(1e24) - int(1e24 - 2**30) - 3
    assert int(1e24) - ledger.standing("acme", month)[0].flops == left
    assert denial(ledger, "x", month, left + 1, 0).code == "quota_exceeded"
    ledger.reserve({"x": (left, 0)}, "acme", month)


def test_old_windows_are_forgotten() -> None:
    clock, quotas = Clock(), [quota("31d", tokens=10**9), quota("1m", tokens=9)]
    ledger = Ledger(clock)
    for number in range(3 * 31 * 24):
        clock.now = NOON + number * 3600
        ledger.reserve({"a": (0.0, 9)}, "acme", quotas)
        ledger.settle("a", 0.0, 8)
    kept = ledger._spendings["acme"]
    assert len(kept.minutes) == len(kept.flops) == len(kept.tokens)
    assert len(kept.minutes) <= KEPT_SECONDS / 3600 + 2
    begin = clock.now // LONGEST_WINDOW * LONGEST_WINDOW
    hours = sum(NOON + number * 3600 >= begin for number in range(3 * 31 * 24))
    assert ledger.standing("acme", quotas)[0].tokens == 8 * hours


def test_a_clock_that_is_set_back_reopens_no_quota() -> None:
    clock, month = Clock(), [quota("31d", tokens=50)]
    ledger = Ledger(clock)
    clock.now = begin = (NOON // LONGEST_WINDOW + 1) * LONGEST_WINDOW
    ledger.reserve({"a": (0.0, 50)}, "acme", month)
    clock.now = begin + LONGEST_WINDOW + DAY - 60
    ledger.reserve({"b": (0.0, 50)}, "acme", month)
    clock.now = begin + LONGEST_WINDOW - 60
    assert denial(ledger, "c", month, 0.0, 1).retry_after == 60


def test_no_thread_comes_between_what_is_left_and_what_is_held() -> None:
    ledger, hour = Ledger(Clock()), [quota("1h", tokens=50)]
    refused: list[str] = []

    def ask() -> None:
        try:
            ledger.reserve({"b": (0.0, 30)}, "acme", hour)
        except Denied as denied:
            refused.append(denied.code)

    other = threading.Thread(target=ask)

    class Slow(list[Quota]):
        def __iter__(self) -> Iterator[Quota]:
            yield from super().__iter__()
            # All quotas are looked at, and nothing is held yet.
            other.start()
            other.join(0.2)

    ledger.reserve({"a": (0.0, 30)}, "acme", Slow(hour))
    other.join()
    assert refused == ["quota_exceeded"]
    assert ledger.standing("acme", hour)[0].held_tokens == 30


# --- a plain recomputation from the list of all that happened ---


@dataclass
class Event:
    key: str
    at: float
    flops: int
    tokens: int
    held: bool


@dataclass
class Plain:
    """Counts anew, every time, from everything that ever happened."""

    events: dict[str, Event]

    def standing(self, key: str, one: Quota, now: float) -> Standing:
        begin = math.floor(now / one.seconds) * one.seconds
        inside = [
            event
            for event in self.events.values()
            if event.key == key and begin <= event.at < begin + one.seconds
        ]
        return Standing(
            one,
            sum(event.flops for event in inside if not event.held),
            sum(event.tokens for event in inside if not event.held),
            sum(event.flops for event in inside if event.held),
            sum(event.tokens for event in inside if event.held),
            begin + one.seconds,
        )

    def codes(
        self, key: str, quotas: list[Quota], now: float, flops: int, tokens: int
    ) -> Iterator[tuple[str, float | None]]:
        """Why a request is refused, if it is."""
        for one in quotas:
            there = self.standing(key, one, now)
            for most, taken, more in (
                (one.flops, there.flops + there.held_flops, flops),
                (one.tokens, there.tokens + there.held_tokens, tokens),
            ):
                if most is not None and more > most:
                    yield "quota_too_small", None
                elif most is not None and taken + more > most:
                    yield "quota_exceeded", there.ends - now


windows = st.sampled_from(["1m", "7m", "90m", "1h", "5h", "1d", "7d", "31d"])
amounts = st.integers(1, 300)
quotas_of = st.lists(
    st.builds(quota, windows, flops=amounts.map(float), tokens=st.none() | amounts), max_size=3
)
steps = st.one_of(
    st.tuples(
        st.just("reserve"),
        st.sampled_from(["acme", "beta"]),
        st.floats(0, 90, allow_subnormal=False),
        st.integers(0, 90),
    ),
    st.tuples(st.just("settle"), st.integers(0, 99), st.floats(0, 1), st.floats(0, 1)),
    st.tuples(st.just("clock"), st.sampled_from([1.0, 61.5, 3600.0, 90_000.0, 8.5e5, 3e6])),
    # A clock that is corrected, by less than a day against the latest that it ever told.
    st.tuples(st.just("back"), st.floats(0, DAY - 1)),
    st.tuples(st.just("restore"), st.floats(0, 35 * DAY), amounts, amounts),
    st.tuples(st.just("quotas"), quotas_of),
)


@settings(max_examples=300, deadline=None)
@given(quotas_of, st.lists(steps, max_size=40), st.floats(1e9, 2e9))
def test_the_ledger_is_a_plain_count_and_no_quota_is_exceeded(
    quotas: list[Quota], script: list[tuple], start: float
) -> None:
    clock, plain = Clock(start), Plain({})
    ledger, latest = Ledger(clock), start
    for number, (step, *how) in enumerate(script):
        id, live = str(number), [id for id, event in plain.events.items() if event.held]
        if step == "clock":
            clock.now += how[0]
            latest = max(latest, clock.now)
        elif step == "back":
            clock.now = max(latest - how[0], start)
        elif step == "quotas":
            quotas = how[0]
        elif step == "restore":
            # As at a start: a log tells of nothing that is to come.
            at = clock.now - how[0]
            ledger.restore("acme", at, how[1], how[2])
            plain.events[id] = Event("acme", at, how[1], how[2], held=False)
        elif step == "settle" and live:
            event = plain.events[live[how[0] % len(live)]]
            flops, event.tokens = how[1] * event.flops, int(how[2] * event.tokens)
            event.flops, event.held = math.ceil(flops), False
            ledger.settle(live[how[0] % len(live)], flops, event.tokens)
        elif step == "reserve":
            key, flops, tokens = how
            why = list(plain.codes(key, quotas, clock.now, math.ceil(flops), tokens))
            if why:
                with pytest.raises(Denied) as caught:
                    ledger.reserve({id: (flops, tokens)}, key, quotas)
                told = caught.value.code, caught.value.retry_after
                # What no wait helps comes first, then the longest wait.
                assert told == max(why, key=lambda one: math.inf if one[1] is None else one[1])
            else:
                ledger.reserve({id: (flops, tokens)}, key, quotas)
                plain.events[id] = Event(key, clock.now, math.ceil(flops), tokens, held=True)
                for one in ledger.standing(key, quotas):
                    assert one.flops + one.held_flops <= (one.quota.flops or math.inf)
                    assert one.tokens + one.held_tokens <= (one.quota.tokens or math.inf)
        for key in ("acme", "beta"):
            counted = [plain.standing(key, one, clock.now) for one in quotas]
            assert ledger.standing(key, quotas) == counted
