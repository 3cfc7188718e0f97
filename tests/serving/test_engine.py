"""The engine as others see it: ends, limits, queue, memory, and who waits for whom."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from engines import (
    Heard,
    alone,
    asks_of,
    assert_as_alone,
    make_engine,
    prompt,
    serve,
    small,
    traffic,
)

from rondo.modeling.exits_recurrent import ExitRule
from rondo_serve.engine.engine import Engine
from rondo_serve.policy import Allowed, Limits
from rondo_serve.requests import Ask, Busy, Closed, Load, Receipt, Refused, Sampling

PROMPT = tuple(range(10, 30))
LONG = prompt(Random(5), 60)


@pytest.fixture(autouse=True)
def _without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def submit(engine: Engine, *asks: Ask) -> list[Heard]:
    heard = []
    for ask in asks:
        heard.append(Heard())
        engine.submit(ask, heard[-1])
    return heard


def finish(engine: Engine, most: int = 2000) -> int:
    """Tick until nothing is left; return how often."""
    for tick in range(most):
        if not engine.tick():
            return tick
    raise AssertionError(f"still not done: {engine.load()}")


def assert_idle(engine: Engine) -> None:
    load = engine.load()
    assert (load.waiting, load.running, load.pages) == (0, 0, load.cached_pages)
    assert not engine.tick()


# ---- how a request ends


def test_a_request_is_answered_by_its_tokens_and_one_end() -> None:
    engine = make_engine(small())
    ask = Ask("one", PROMPT, 5, 3)
    heard = Heard()
    assert engine.submit(ask, heard).depth == 3
    assert engine.load().waiting == 1
    assert not heard.events
    finish(engine)
    assert len(heard.events) == 6
    assert_as_alone(small(), [ask], {"one": heard})
    assert_idle(engine)


def test_a_request_of_a_single_token_ends_with_it() -> None:
    asks = [Ask("one", (5,), 1, 1), Ask("two", PROMPT, 1, 4), Ask("three", (5,), 1, 4)]
    assert_as_alone(small(), asks, serve(make_engine(small()), [(0, ask) for ask in asks]))


@pytest.mark.parametrize("ticks", range(14))
def test_a_cancelled_request_ends_and_disturbs_no_other(ticks: int) -> None:
    """In the queue, in the prompt, in the loop of a token: wherever it is."""
    engine = make_engine(small(), prompt_chunk=8, max_running=2)
    asks = [Ask("gone", PROMPT, 9, 4), Ask("stays", PROMPT[::-1], 6, 3), Ask("later", PROMPT, 4, 2)]
    heard = submit(engine, *asks)
    for _ in range(ticks):
        engine.tick()
    engine.cancel("gone")
    engine.cancel("nobody")
    engine.tick()
    gone = heard[0]
    assert gone.end.reason == "cancelled"
    # Nothing of it is told later, and its last event says what it took.
    whole = alone(small(), asks[0])
    assert gone.tokens == whole.tokens[: len(gone.tokens)]
    receipt = gone.end.receipt
    assert receipt.depths == Counter([4] * len(gone.tokens))
    assert 0 <= receipt.iterations < whole.iterations
    assert 0 <= receipt.flops < whole.flops
    assert (receipt.flops > 0) == (receipt.iterations > 0)
    finish(engine)
    assert_as_alone(small(), asks[1:], {"stays": heard[1], "later": heard[2]})
    assert_idle(engine)


def test_all_that_was_read_is_on_the_bill_of_a_cancelled_request() -> None:
    engine = make_engine(small(), prompt_chunk=64)
    (heard,) = submit(engine, Ask("gone", PROMPT, 9, 4))
    while len(heard.tokens) < 3:
        engine.tick()
    engine.cancel("gone")
    engine.tick()
    three = alone(small(), Ask("three", PROMPT, 3, 4))
    assert heard.end.receipt.iterations >= three.iterations
    assert heard.end.receipt.flops >= three.flops * (1 - 1e-9)


def test_the_bill_of_a_prompt_that_is_read_at_once_is_that_of_generate() -> None:
    model = small(gate=True)
    exits = (None, ExitRule("state_distance", 0.22), ExitRule("gate", 0.6))
    arrivals = traffic(19, 9, depths=(4, 5), exits=exits)
    heard = serve(make_engine(model, prompt_chunk=64, tick_tokens=999), arrivals)
    for ask in asks_of(arrivals):
        expected = alone(model, ask).flops
        assert heard[ask.id].end.receipt.flops == pytest.approx(expected, rel=1e-9)


def test_a_cancelled_request_may_come_again_under_its_name() -> None:
    engine = make_engine(small())
    ask = Ask("one", PROMPT, 5, 3)
    submit(engine, ask)
    engine.tick()
    engine.cancel("one")
    finish(engine)
    (heard,) = submit(engine, ask)
    finish(engine)
    assert_as_alone(small(), [ask], {"one": heard})


def test_a_name_that_nobody_has_is_none_to_cancel() -> None:
    """A client that leaves after its answer must not take the next one's."""
    engine = make_engine(small())
    engine.cancel("one")
    ask = Ask("one", PROMPT, 3, 2)
    (heard,) = submit(engine, ask)
    finish(engine)
    assert_as_alone(small(), [ask], {"one": heard})


def test_cancelling_from_within_an_event_ends_the_request() -> None:
    """As an HTTP server does that finds its client gone."""
    engine = make_engine(small())

    class Leaving(Heard):
        def __call__(self, event: Any) -> None:
            super().__call__(event)
            engine.cancel("one")

    engine.submit(Ask("one", PROMPT, 50, 3), heard := Leaving())
    finish(engine)
    assert heard.end.reason == "cancelled"
    assert len(heard.tokens) < 3
    assert_idle(engine)


def test_a_request_that_takes_too_long_is_cut_off_as_it_stands() -> None:
    engine = make_engine(small(), max_seconds=0.15)
    asks = [Ask("long", PROMPT, 100, 4), Ask("short", PROMPT, 2, 1)]
    long, short = submit(engine, *asks)
    while not short.ended or len(long.tokens) < 2:
        engine.tick()
    time.sleep(0.15)
    engine.tick()
    assert long.end.reason == "time"
    assert 2 <= len(long.tokens) < 100
    assert long.end.receipt.seconds >= 0.15
    assert_idle(engine)
    # A place in the queue is no way around it.
    (late,) = submit(engine, asks[1])
    time.sleep(0.16)
    finish(engine)
    assert late.end.reason == "time"
    assert not late.tokens


def test_held_back_text_is_told_with_the_last_event_however_it_ends() -> None:
    model = small()
    whole = alone(model, Ask("one", PROMPT, 8, 3)).text
    # Each letter may begin this, so the end of the text is always held back.
    stop = tuple(f"{letter}\x00never" for letter in set(whole))
    ask = Ask("one", PROMPT, 8, 3, stop=stop)
    engine = make_engine(model)
    (heard,) = submit(engine, ask)
    finish(engine)
    assert heard.text == whole
    assert heard.end.text
    (heard,) = submit(engine, replace(ask, max_new_tokens=100))
    while len(heard.tokens) < 4:
        engine.tick()
    engine.cancel("one")
    engine.tick()
    assert heard.text == alone(model, replace(ask, max_new_tokens=len(heard.tokens))).text
    assert heard.end.text


# ---- the thread


def test_requests_of_many_threads_are_answered_by_one() -> None:
    model, engine = small(), make_engine(small(), max_running=4)
    engine.start()
    arrivals, threads = traffic(20, 16), set()
    heard = {ask.id: Heard() for ask in asks_of(arrivals)}

    def ask_for(ask: Ask) -> None:
        def deliver(event: Any) -> None:
            threads.add(threading.current_thread())
            heard[ask.id](event)

        engine.submit(ask, deliver)

    clients = [threading.Thread(target=ask_for, args=(ask,)) for ask in asks_of(arrivals)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    engine.close(60)
    assert len(threads) == 1
    assert not threads & {*clients, threading.current_thread()}
    assert_as_alone(model, asks_of(arrivals), heard)
    assert engine.failure is None
    with pytest.raises(Closed):
        submit(engine, Ask("late", PROMPT, 1, 1))


def wait_for(happened: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def test_a_shutdown_cuts_off_what_does_not_end_in_time() -> None:
    engine = make_engine(small(), max_running=1)
    engine.start()
    running, waiting = submit(engine, Ask("runs", PROMPT, 200, 8), Ask("waits", PROMPT, 200, 8))
    wait_for(lambda: running.tokens)
    start = time.monotonic()
    engine.close(0.05)
    assert time.monotonic() - start < 5
    for heard in (running, waiting):
        assert heard.end.reason == "shutdown"
    whole = alone(small(), Ask("runs", PROMPT, len(running.tokens), 8))
    assert running.tokens == whole.tokens
    assert not waiting.tokens
    assert engine.load().pages == 0
    engine.close(0)


def test_an_engine_that_has_nothing_to_do_closes_at_once() -> None:
    engine = make_engine(small())
    engine.start()
    start = time.monotonic()
    engine.close(30)
    assert time.monotonic() - start < 5
    never_started = make_engine(small())
    (heard,) = submit(never_started, Ask("one", PROMPT, 1, 1))
    never_started.close(0)
    assert heard.end.reason == "shutdown"


def test_a_failure_ends_what_is_in_flight_and_three_in_a_row_end_the_engine() -> None:
    engine = make_engine(small(), max_running=1)
    broken = threading.Event()

    def fail(*_: Any) -> None:
        if broken.is_set():
            raise RuntimeError("out of memory, say")

    model_of(engine).lm_head.register_forward_hook(fail)
    engine.start()
    (running,) = submit(engine, Ask("runs", PROMPT, 230, 8))
    wait_for(lambda: running.tokens)
    broken.set()
    wait_for(lambda: running.ended)
    assert running.end.reason == "error"
    broken.clear()
    assert engine.failure is None
    (after,) = submit(engine, Ask("after", PROMPT, 3, 2))
    wait_for(lambda: after.ended)
    assert_as_alone(small(), [Ask("after", PROMPT, 3, 2)], {"after": after})
    broken.set()
    several = submit(engine, *(Ask(f"{n}", PROMPT, 3, 2) for n in range(5)))
    wait_for(lambda: engine.failure is not None and all(one.ended for one in several))
    assert [one.end.reason for one in several] == ["error"] * 5
    assert "out of memory, say" in (engine.failure or "")
    with pytest.raises(Closed):
        submit(engine, Ask("late", PROMPT, 1, 1))
    assert engine.load().pages == 0
    engine.close(0)


def model_of(engine: Engine) -> Any:
    """The engine's own model, found without knowing what the engine calls it."""
    return engine.passes.model


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_recurrences": 17}, "num_recurrences"),
        ({"num_recurrences": 0}, "num_recurrences"),
        ({"prompt": ()}, None),
        ({"prompt": (5, 300)}, None),
        ({"prompt": (-1,)}, None),
        ({"max_new_tokens": 0}, None),
        ({"max_new_tokens": 237}, None),
        ({"exit": ExitRule("gate", 0.1)}, None),
        ({"stop": ("",)}, None),
    ],
)
def test_what_can_never_be_answered_is_refused(fields: dict[str, Any], param: str | None) -> None:
    engine = make_engine(small())
    ask = replace(Ask("one", PROMPT, 4, 2), **fields)
    with pytest.raises(Refused) as refused:
        submit(engine, ask)
    assert len(str(refused.value).split()) > 4
    assert param is None or refused.value.param == param
    assert_idle(engine)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": (5, 300)},
        {"prompt": (-1,)},
        {"max_new_tokens": 0},
        {"sampling": Sampling(temperature=1e-50)},
        {"sampling": Sampling(temperature=-1.0)},
        {"sampling": Sampling(temperature=float("nan"))},
        {"sampling": Sampling(temperature=1.0, top_p=2.0)},
        {"sampling": Sampling(temperature=1.0, top_k=-1)},
        {"sampling": Sampling(temperature=1.0, seed=1 << 64)},
        {"sampling": Sampling(seed=1 << 63)},
        {"sampling": Sampling(logprobs=301)},
        {"sampling": Sampling(logprobs=-1)},
    ],
)
def test_a_request_that_cannot_be_answered_harms_no_other(fields: dict[str, Any]) -> None:
    """Refused or not: who is served beside it is served."""
    model = small(state_init="normal")
    engine = make_engine(model)
    ask = Ask("good", PROMPT, 6, 3)
    (good,) = submit(engine, ask)
    bad = Heard()
    try:
        engine.submit(replace(Ask("bad", PROMPT, 4, 2), **fields), bad)
    except ValueError:  # which a Refused is
        bad = good
    engine.start()
    engine.close(20)
    assert bad.ended
    assert_as_alone(model, [ask], {"good": good})


def test_the_longest_that_the_model_takes_is_answered() -> None:
    ask = Ask("one", PROMPT, 236, 1)
    heard = serve(make_engine(small()), [(0, ask)])
    assert_as_alone(small(), [ask], heard)


def test_depths_are_those_of_the_policy_which_is_told_what_was_spent() -> None:
    class Half:
        spent_: list[tuple[Ask, Receipt]] = []  # noqa: RUF012

        def allow(self, asks: Sequence[Ask], load: Load) -> list[Allowed]:
            assert isinstance(load, Load)
            return [Allowed((ask.num_recurrences or 8) // 2) for ask in asks]

        def spent(self, ask: Ask, reason: str, receipt: Receipt) -> None:
            self.spent_.append((ask, receipt))

    engine = make_engine(small(), policy=Half())
    asks = [Ask("asks", PROMPT, 3, 6), Ask("leaves", PROMPT, 3), Ask("gone", PROMPT, 50, 6)]
    heard = submit(engine, *asks)
    engine.tick()
    engine.cancel("gone")
    finish(engine)
    receipts = [one.end.receipt for one in heard]
    assert [(one.asked, one.allowed) for one in receipts] == [(6, 3), (None, 4), (6, 3)]
    for one, depth in ((heard[0], 3), (heard[1], 4)):
        assert one.tokens == alone(small(), Ask("x", PROMPT, 3, depth)).tokens
    told = {ask.id: receipt for ask, receipt in Half.spent_}
    assert told == {ask.id: receipt for ask, receipt in zip(asks, receipts, strict=True)}
    assert len(Half.spent_) == 3


def test_an_effort_is_a_depth() -> None:
    engine = make_engine(small(), policy=Limits(default=4, cap=8))
    heard = submit(engine, Ask("one", PROMPT, 3, effort="high"), Ask("two", PROMPT, 3))
    finish(engine)
    assert [one.end.receipt.allowed for one in heard] == [8, 4]


def test_a_queue_that_is_full_says_when_to_come_again() -> None:
    engine = make_engine(small(), max_running=1, max_queue=2)
    asks = [Ask(f"{n}", PROMPT, 4, 2) for n in range(4)]
    heard = submit(engine, asks[0])
    engine.tick()
    heard += submit(engine, *asks[1:3])
    with pytest.raises(Busy) as busy:
        submit(engine, asks[3])
    assert 0 < busy.value.retry_after <= 600
    assert engine.load().waiting == 2
    engine.cancel("1")
    engine.tick()
    heard += submit(engine, asks[3])
    finish(engine)
    assert [one.end.reason for one in heard] == ["length", "cancelled", "length", "length"]
    assert_idle(engine)


# ---- who waits for whom


def test_a_shallow_row_gets_a_token_every_tick_beside_deep_ones() -> None:
    engine = make_engine(small())
    calls: list[int] = []
    layer = model_of(engine).model.core[0]
    layer.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    shallow, *deep = submit(
        engine,
        Ask("shallow", PROMPT, 20, 1),
        Ask("deep", PROMPT, 6, 8),
        Ask("deeper", PROMPT, 6, 11),
    )
    while not shallow.tokens:
        engine.tick()
    while not shallow.ended:
        told, called = len(shallow.tokens), len(calls)
        engine.tick()
        assert len(shallow.tokens) == told + 1
        assert len(calls) == called + 1, "the core ran more than once in a tick"
        assert calls[-1] >= 3
    assert [len(one.tokens) for one in deep] <= [3, 2]
    finish(engine)
    assert [one.end.reason for one in deep] == ["length"] * 2


def test_a_long_prompt_does_not_keep_others_from_their_tokens() -> None:
    engine = make_engine(small(), prompt_chunk=4, tick_tokens=8)
    (going,) = submit(engine, Ask("going", (5, 6), 60, 1))
    while not going.tokens:
        engine.tick()
    (long,) = submit(engine, Ask("long", prompt(Random(1), 150), 2, 4))
    for _ in range(30):
        told = len(going.tokens)
        engine.tick()
        assert len(going.tokens) == told + 1
    assert not long.tokens
    finish(engine)
    assert len(long.tokens) == 2


def test_a_tick_takes_no_more_tokens_than_it_may() -> None:
    engine = make_engine(small(), prompt_chunk=8, tick_tokens=20, max_running=12)
    body, calls = model_of(engine).model, []
    for layer in (body.prelude[0], body.core[0], body.coda[0]):
        layer.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    heard = submit(engine, *(Ask(f"{n}", LONG, 5, 1 + n % 4) for n in range(12)))
    finish(engine)
    assert max(calls) <= 20
    assert max(calls) > 12, "there was room for prompts beside the answers"
    assert [one.end.reason for one in heard] == ["length"] * 12


@pytest.mark.parametrize("favour", ["shallow", "even", "deep"])
def test_nobody_waits_for_ever_where_a_tick_cannot_take_all(favour: str) -> None:
    engine = make_engine(small(), favour=favour, tick_tokens=2, prompt_chunk=2, max_running=6)
    asks = [Ask(f"{n}", (5,), 250, depth) for n, depth in enumerate((1, 1, 1, 1, 12, 12))]
    heard = submit(engine, *asks)
    for _ in range(300):
        engine.tick()
    # An even share of 2 of 6 rows would have given each 100 iterations by now, or 8 tokens.
    for ask, one in zip(asks, heard, strict=True):
        assert one.tokens, f"{ask.id} of depth {ask.num_recurrences} got nothing"


def test_favour_decides_who_goes_first() -> None:
    told: dict[str, tuple[int, int]] = {}
    for favour in ("shallow", "even", "deep"):
        engine = make_engine(small(), favour=favour, tick_tokens=3, max_running=6)
        asks = [Ask(f"{n}", (5,), 100, depth) for n, depth in enumerate((2, 2, 2, 10, 10, 10))]
        heard = submit(engine, *asks)
        for _ in range(80):
            engine.tick()
        counts = [len(one.tokens) for one in heard]
        told[favour] = sum(counts[:3]), sum(counts[3:])
    for one, other in pairwise(("shallow", "even", "deep")):
        assert told[one][0] > told[other][0], told
        assert told[one][1] < told[other][1], told


def test_requests_are_taken_up_in_their_order() -> None:
    engine = make_engine(small(), max_running=1)
    asks = [Ask(f"{n}", PROMPT[: n + 1], 2, 2) for n in range(5)]
    ended: list[str] = []
    for ask in asks:
        engine.submit(ask, lambda event, ask=ask: ended.append(ask.id))
    finish(engine)
    assert ended == [ask.id for ask in asks for _ in range(3)]


# ---- memory


def test_requests_wait_for_memory_and_those_that_never_fit_are_refused() -> None:
    engine = make_engine(small(), kv_bytes=1 << 19, max_running=50)
    total = engine.load().total_pages
    assert total > 0
    asks = [Ask(f"{n}", PROMPT, 10, 8) for n in range(12)]
    heard, most = submit(engine, *asks), 0
    while engine.tick():
        load = engine.load()
        assert 0 < load.pages <= total or not load.running
        most = max(most, load.running)
    assert 1 <= most < 12, "the budget held nobody back"
    assert_as_alone(small(), asks, {ask.id: one for ask, one in zip(asks, heard, strict=True)})
    with pytest.raises(Refused, match="keys and values"):
        submit(engine, Ask("never", PROMPT, 200, 16))
    assert_idle(engine)
    assert engine.load().pages == 0


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))]
)
def test_no_page_is_lost_whatever_happens(seed: int, prefix_cache: bool) -> None:
    random, model = Random(seed), small()
    settings = {"max_running": 6, "tick_tokens": 16, "prefix_cache": prefix_cache}
    engine = make_engine(model, kv_bytes=1 << 19, **settings)
    begin, arrivals = prompt(random, 40), []
    exits = (None, None, ExitRule("state_distance", 0.22))
    for tick, ask in traffic(seed + 30, 20, depths=(1, 2, 3, 5, 8), exits=exits):
        head = begin[: random.choice((0, 20, 40))]
        arrivals.append((tick, replace(ask, prompt=head + ask.prompt[:20])))
    heard: dict[str, Heard] = {}
    gone: set[str] = set()
    for tick in range(5000):
        for _, ask in [one for one in arrivals if one[0] == tick]:
            (heard[ask.id],) = submit(engine, ask)
        if heard and random.random() < 0.05:
            gone.add(random.choice(list(heard)))
            for name in gone:
                engine.cancel(name)
        more = engine.tick()
        load = engine.load()
        assert load.cached_pages <= load.pages <= load.total_pages
        assert load.running <= 6
        if not more and tick > arrivals[-1][0]:
            break
    assert all(one.ended for one in heard.values())
    asks = asks_of(arrivals)
    stayed = [ask for ask in asks if heard[ask.id].end.reason != "cancelled"]
    assert len(asks) - len(gone) <= len(stayed)
    assert_as_alone(model, stayed, heard)
    assert_idle(engine)
    assert prefix_cache or engine.load().pages == 0
    # All memory can be had again: a request that needs nearly all of it gets it.
    (last,) = submit(engine, Ask("all", PROMPT, 200, 3))
    finish(engine)
    assert last.end.reason == "length"


def test_what_finds_keys_and_values_does_not_grow_with_the_requests_served() -> None:
    engine, sizes = make_engine(small(), prefix_cache=True), []
    for number in range(30):
        cached(engine, Ask(f"{number}", prompt(Random(number), 20), 3, 16))
        sizes.append(engine.arena.tables.numel())
    assert sizes[-1] == sizes[0]


def test_the_load_counts_ticks_and_the_tokens_that_the_core_ran() -> None:
    engine = make_engine(small())
    asks = [Ask("one", PROMPT, 4, 3), Ask("two", PROMPT[:5], 6, 2)]
    heard = submit(engine, *asks)
    finish(engine)
    load = engine.load()
    assert load.core_tokens == sum(one.end.receipt.iterations for one in heard)
    assert load.core_tokens == sum(alone(small(), ask).iterations for ask in asks)
    assert load.ticks >= 12


# ---- a cache of prefixes


def cached(engine: Engine, ask: Ask) -> int:
    """Answer one request, and return how many tokens it took from the cache."""
    (heard,) = submit(engine, ask)
    finish(engine)
    return heard.end.receipt.cached_tokens


def test_a_prefix_is_taken_at_its_depth_and_at_no_other() -> None:
    engine = make_engine(small(), prefix_cache=True)
    ask = Ask("one", LONG, 3, 4)
    assert cached(engine, ask) == 0
    assert engine.load().cached_pages > 0
    assert cached(engine, ask) > 40
    assert cached(engine, replace(ask, prompt=(*LONG[:40], 9, 9, 9))) > 16
    for depth in (1, 3, 5, 8):
        assert cached(engine, replace(ask, num_recurrences=depth)) == 0
        assert cached(engine, replace(ask, num_recurrences=depth)) > 40
    assert cached(engine, replace(ask, prompt=LONG[1:])) == 0


def test_a_prefix_is_taken_under_its_exit_and_under_no_other() -> None:
    engine = make_engine(small(gate=True), prefix_cache=True)
    ask, rule = Ask("one", LONG, 3, 5), ExitRule("state_distance", 0.22)
    others = [
        None,
        rule,
        replace(rule, threshold=0.3),
        replace(rule, min_recurrences=2),
        replace(rule, check_every=2),
        ExitRule("gate", 0.22),
    ]
    for one in others:
        assert cached(engine, replace(ask, exit=one)) == 0
    for one in others:
        assert cached(engine, replace(ask, exit=one)) > 40


def test_a_seeded_start_is_part_of_what_a_prefix_is() -> None:
    seeded = make_engine(small(state_init="normal"), prefix_cache=True)
    ask = Ask("one", LONG, 3, 4, sampling=Sampling(seed=1))
    assert cached(seeded, ask) == 0
    assert cached(seeded, replace(ask, sampling=Sampling(seed=2))) == 0
    assert cached(seeded, ask) > 40
    # Elsewhere a seed is of the draws alone.
    plain = make_engine(small(), prefix_cache=True)
    assert cached(plain, ask) == 0
    assert cached(plain, replace(ask, sampling=Sampling(temperature=1.0, seed=2))) > 40


def test_a_prefix_makes_room_for_requests() -> None:
    engine = make_engine(small(), prefix_cache=True, kv_bytes=1 << 18)
    random, asks = Random(6), []
    for number in range(8):
        asks.append(Ask(f"{number}", prompt(random, 60), 3, 4))
        assert cached(engine, asks[-1]) == 0
    load = engine.load()
    assert 0 < load.cached_pages <= load.total_pages
    assert cached(engine, asks[-1]) > 40, "the newest went first"
    assert cached(engine, asks[0]) == 0, "nothing was ever dropped"
    assert_idle(engine)


def test_no_prefix_makes_room_for_what_does_not_fit_yet() -> None:
    """All of them together might not be enough, and then they would be gone for nothing."""
    engine = make_engine(small(), prefix_cache=True, kv_bytes=1 << 19)
    ask = Ask("one", LONG, 3, 2)
    cached(engine, ask)
    kept = engine.load().cached_pages
    # With what this one holds, the next does not fit, prefixes or not.
    runs, waits = submit(engine, Ask("runs", PROMPT, 100, 3), Ask("waits", PROMPT[::-1], 200, 3))
    for _ in range(5):
        engine.tick()
    assert (engine.load().waiting, engine.load().running) == (1, 1)
    assert engine.load().cached_pages >= kept
    (again,) = submit(engine, replace(ask, id="again"))
    engine.cancel("waits")
    finish(engine)
    assert again.end.receipt.cached_tokens > 40
    assert (runs.end.reason, waits.end.reason) == ("length", "cancelled")


def test_a_prefix_spares_iterations_and_the_bill_says_so() -> None:
    engine = make_engine(small(), prefix_cache=True)
    ask = Ask("one", LONG, 3, 4)
    (one,) = submit(engine, ask)
    finish(engine)
    (second,) = submit(engine, ask)
    finish(engine)
    a, b = one.end.receipt, second.end.receipt
    assert a.iterations - b.iterations == 4 * b.cached_tokens
    assert b.flops < a.flops / 3
    assert_as_alone(small(), [ask], {"one": second})
