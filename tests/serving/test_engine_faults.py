"""What goes wrong with one request, or in the code around the engine, stays there."""

import threading
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

from rondo_serve.engine.engine import Engine
from rondo_serve.policy import Limits
from rondo_serve.requests import Ask, Event, Finished, Load, Receipt, Refused, Sampling


class Noting(Limits):
    """Bounds that note what was spent, and may fail at it."""

    fails = False

    def __init__(self) -> None:
        super().__init__(default=4, cap=16)
        object.__setattr__(self, "noted", [])

    def spent(self, ask: Ask, reason: Any, receipt: Receipt) -> None:
        self.noted.append((ask.id, receipt))  # type: ignore[attr-defined]
        if self.fails:
            raise OSError("the disk is full")


class Failing(Noting):
    fails = True


def an_ask(name: str, length: int = 5, new: int = 4, **fields: Any) -> Ask:
    return Ask(name, prompt(Random(length), length), new, **{"num_recurrences": 2} | fields)


def is_clean(engine: Engine) -> bool:
    found = engine.load()
    return (found.running, found.waiting) == (0, 0) and found.pages == found.cached_pages


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_policy_that_fails_harms_nobody(prefix_cache: bool) -> None:
    model = small()
    engine = make_engine(model, Failing(), prefix_cache=prefix_cache)
    asks = [an_ask(f"{n}", 20 + n) for n in range(6)]
    heard = serve(engine, [(2 * n, ask) for n, ask in enumerate(asks)])
    for ask in asks:
        assert heard[ask.id].end.reason == "length"
        assert heard[ask.id].tokens == alone(model, ask).tokens
    assert is_clean(engine)


def test_every_request_that_is_allowed_is_noted_once_as_spent_also_if_it_is_not_taken() -> None:
    policy = Noting()
    engine = make_engine(small(), policy, max_running=1, max_queue=0)
    engine.submit(an_ask("taken"), Heard())
    for name, fields in (("busy", {}), ("refused", {"length": 400})):
        with pytest.raises(Exception, match=r"full|exceed"):
            engine.submit(an_ask(name, **fields), Heard())
    with pytest.raises(Refused, match="between 1 and 16"):
        engine.submit(an_ask("not allowed", num_recurrences=17), Heard())
    while engine.tick():
        pass
    noted = policy.noted  # type: ignore[attr-defined]
    assert [name for name, _ in noted] == ["busy", "refused", "taken"]
    assert [receipt.new_tokens for _, receipt in noted] == [0, 0, 4]


def test_nobody_reads_what_is_not_his_own() -> None:
    """Whatever lies in pages that others had, NaN too, changes no token."""
    model = small()
    engine = make_engine(model, tick_tokens=12, prompt_chunk=5)
    engine.arena.keys[engine.shape.page_units :] = torch.nan
    engine.arena.values[engine.shape.page_units :] = torch.nan
    arrivals = traffic(3, 12)
    assert_as_alone(model, asks_of(arrivals), serve(engine, arrivals))


def test_a_request_that_cannot_be_placed_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    engine = make_engine(model)
    fill = engine.arena.fill
    heard = {name: Heard() for name in ("good", "bad", "later")}

    def fails(tables: list[int], start: int, stop: int) -> list[int]:
        if stop == 33:
            raise RuntimeError("out of memory")
        return fill(tables, start, stop)

    monkeypatch.setattr(engine.arena, "fill", fails)
    asks = {"good": an_ask("good"), "bad": an_ask("bad", 30), "later": an_ask("later", 7)}
    for name, ask in asks.items():
        engine.submit(ask, heard[name])
    while engine.tick():
        pass
    assert [one.end.reason for one in heard.values()] == ["length", "error", "length"]
    assert heard["later"].tokens == alone(model, asks["later"]).tokens
    assert engine.failure is None
    assert is_clean(engine)


def test_a_thread_that_cannot_go_on_says_so_and_ends_everyone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, ended = make_engine(small()), threading.Event()
    heard = Heard()

    def deliver(event: Event) -> None:
        heard(event)
        if isinstance(event, Finished):
            ended.set()

    def broken() -> bool:
        raise RuntimeError("no device")

    def beyond_help() -> None:
        raise RuntimeError("no memory either")

    monkeypatch.setattr(engine, "tick", broken)
    monkeypatch.setattr(engine._places, "forget_prefixes", beyond_help)
    engine.submit(an_ask("one"), deliver)
    engine.start()
    assert ended.wait(10)
    assert heard.end.reason == "error"
    assert engine.failure is not None
    engine.close(0.0)


def test_of_two_with_the_same_prompt_one_reads_it() -> None:
    model = small()
    asks = [an_ask("one", 60), an_ask("two", 60), an_ask("alone", 60)]
    ticks: dict[bool, int] = {}
    for prefix_cache in (False, True):
        engine = make_engine(model, prefix_cache=prefix_cache, prompt_chunk=16, tick_tokens=17)
        heard = serve(engine, [(0, ask) for ask in asks])
        ticks[prefix_cache] = engine.ticks
        cached = sorted(heard[ask.id].end.receipt.cached_tokens for ask in asks)
        assert cached[0] == 0
        assert all(count >= 32 for count in cached[1:]) == prefix_cache
        for ask in asks:
            assert heard[ask.id].tokens == alone(model, ask).tokens
    assert ticks[True] < ticks[False]


def test_one_prompt_asked_often_does_not_fill_the_cache() -> None:
    engine = make_engine(small(), prefix_cache=True)
    pages = []
    for number in range(12):
        serve(engine, [(0, an_ask(f"{number}", 40))])
        pages.append(engine.load().pages)
    assert pages[-1] == pages[2]


def test_a_cancel_that_comes_with_the_last_token_cancels_nothing_else() -> None:
    engine = make_engine(small())

    def deliver(event: Event) -> None:
        engine.cancel("again")

    engine.submit(an_ask("again", new=1), deliver)
    while engine.tick():
        pass
    heard = Heard()
    engine.submit(an_ask("again"), heard)
    while engine.tick():
        pass
    assert heard.end.reason == "length"


def test_an_engine_without_a_thread_ends_everyone_once_when_it_is_closed() -> None:
    engine = make_engine(small(), max_running=1)
    heard = {name: Heard() for name in ("running", "waiting")}
    for name, one in heard.items():
        engine.submit(an_ask(name), one)
    engine.tick()
    engine.close(0.0)
    engine.close(0.0)
    assert [one.end.reason for one in heard.values()] == ["shutdown", "shutdown"]
    assert is_clean(engine)


@pytest.mark.parametrize("temperature", [0.0, 1])
def test_repetition_is_held_against_a_token_as_generate_does(temperature: float) -> None:
    model = small()
    sampling = Sampling(temperature=temperature, repetition_penalty=1.7, seed=4)
    ask = an_ask("one", 12, 12, sampling=sampling)
    heard = serve(make_engine(model), [(0, ask)])["one"]
    torch.manual_seed(4)
    wanted = model.generate(
        torch.tensor([ask.prompt]),
        max_new_tokens=12,
        num_recurrences=2,
        do_sample=temperature > 0,
        temperature=float(temperature) or None,
        top_k=0,
        repetition_penalty=1.7,
    )[0, 12:].tolist()
    assert heard.tokens == wanted
    plain = serve(make_engine(model), [(0, an_ask("two", 12, 12))])["two"]
    assert temperature or plain.tokens != wanted


def test_the_load_is_what_it_says() -> None:
    engine = make_engine(small(), prefix_cache=True, max_running=1)
    for name in ("one", "two"):
        engine.submit(an_ask(name, 40), Heard())
    engine.tick()
    found = engine.load()
    assert (found.running, found.waiting, found.cached_pages) == (1, 1, 0)
    assert found.pages > 0
    assert isinstance(found, Load)
