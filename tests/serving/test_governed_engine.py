"""What a policy gives is what the engine executes, and what the log tells is what it executed."""

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from engines import Heard, asks_of, make_engine, prompt, serve, small, traffic
from governing import SHEET, Site, engine_of, heard_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import RULES
from rondo.modeling.exits_recurrent import ExitRule
from rondo_govern.governor import FileRules, Governor
from rondo_govern.policy import Policy
from rondo_serve.engine.engine import Engine
from rondo_serve.governed import Governance, Governed, bound_of, ruling_of
from rondo_serve.requests import Ask, Busy, Receipt, Refused

ROOMY = {"prompt_chunk": 64, "tick_tokens": 512}
TIGHT = {"prompt_chunk": 3, "tick_tokens": 7}
CACHED = {"prompt_chunk": 16, "tick_tokens": 40, "prefix_cache": True}
# One that tokens pass here and there, one that all pass, and one that none does.
BARS = {"entropy": 5.38, "state_distance": 0.22, "margin": 1e9, "gate": 0.0}
RISKS = SHEET["risks"] | {
    rule: {"escalation": {"rule": rule, "threshold": bar, "up_to": 7}} for rule, bar in BARS.items()
}
EXITS = [
    None,
    *RULES.values(),
    *(replace(rule, min_recurrences=3, check_every=2) for rule in RULES.values()),
    ExitRule("entropy", 1e9),
]
LONG = prompt(Random(5), 20)


@pytest.fixture(autouse=True)
def _without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def site(tmp_path: Path) -> Site:
    found = Site(tmp_path)
    found.rule(risks=RISKS)
    return found


Opened = Callable[..., tuple[Engine, Governance]]


@pytest.fixture
def opened(site: Site) -> Iterator[Opened]:
    """Return what opens an engine under the site's policy, and closes its log in the end."""
    logs = []

    def opens(**how: Any) -> tuple[Engine, Governance]:
        engine, governance = engine_of(site, small(gate=True), **how)
        logs.append(governance.governor.log)
        return engine, governance

    yield opens
    for log in logs:
        log.close()


def mixed(seed: int, count: int = 14) -> list[tuple[int, Ask]]:
    """Requests of all keys and classes, at any depth, with any exit."""
    random, arrivals = Random(seed), []
    for tick, ask in traffic(seed, count, longest=30, sampled=True):
        depth = random.choice((None, 1, 2, 3, 5, 8, 40))
        effort = random.choice((None, "none", "low", "high", "max")) if depth is None else None
        named = random.choice(((), (), *({name} for name in ("casual", "high", *BARS))))
        ask = replace(
            ask,
            num_recurrences=depth,
            effort=cast(Any, effort),
            exit=random.choice(EXITS),
            key=random.choice(("acme", "press", "clinic")),
            risks=frozenset(named),
        )
        arrivals.append((tick, ask))
    # Of each two the second reads what the first has read, where prefixes are kept.
    return arrivals + [(tick + 9, replace(ask, id=f"{ask.id}-again")) for tick, ask in arrivals]


def demanded(ask: Ask) -> int:
    """What tier and classes ask of every token, read off the policy."""
    holder = SHEET["keys"].get(ask.key, {})
    tier = SHEET["tiers"][holder.get("tier", "bronze")]
    classes = {*holder.get("risks", ()), *ask.risks}
    return max([tier.get("floor", 1), *(RISKS[name].get("floor", 1) for name in classes)])


def digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(str(token) for token in tokens).encode("ascii")).hexdigest()


def pairs(site: Site) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What was taken and how it ended: once each, in this order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in site.records():
        if record["kind"] in ("taken", "ended"):
            found.setdefault(record["id"], []).append(record)
    for records in found.values():
        assert [record["kind"] for record in records] == ["taken", "ended"]
    return {id: (records[0], records[1]) for id, records in found.items()}


def receipts(heard: dict[str, Heard]) -> list[Receipt]:
    return [one.end.receipt for one in heard.values()]


# ---- no more than was held


@pytest.mark.parametrize("how", [ROOMY, TIGHT, CACHED], ids=["roomy", "tight", "cached"])
@pytest.mark.parametrize("seed", range(3))
def test_every_token_lies_between_floor_and_depth_and_none_takes_more_than_was_held(
    site: Site, opened: Opened, how: dict[str, Any], seed: int
) -> None:
    engine, _ = opened(**how)
    arrivals = mixed(seed)
    heard = serve(engine, arrivals)
    recorded = pairs(site)
    for ask in asks_of(arrivals):
        taken, ended = recorded[ask.id]
        receipt = heard[ask.id].end.receipt
        depths = [token.recurrences for token in heard[ask.id].told]
        assert demanded(ask) <= taken["floor"] <= min(depths), ask
        assert max(depths) <= taken["allowed"] == receipt.allowed, ask
        # Of the prompt, too: what is read shallower is another text.
        read = len(ask.prompt) - receipt.cached_tokens + len(depths) - 1
        assert taken["floor"] * read <= receipt.iterations <= taken["allowed"] * read
        assert 0 < ended["flops"] <= taken["reserved_flops"], ask
        assert len(ask.prompt) + len(depths) <= taken["reserved_tokens"]
    assert any(receipt.cached_tokens for receipt in receipts(heard)) == (how is CACHED)


def plain(policy: dict[str, Any], model: Any = None, **how: Any) -> Engine:
    """An engine under a policy that lies in no file, without a log."""
    model = model or small(gate=True)
    engine = make_engine(model, **how)
    value = Policy.model_validate(policy, strict=False), "f" * 64
    rules = FileRules(cast(Any, SimpleNamespace(value=value)))
    engine.policy = Governed(Governor(rules, bound_of(engine.costs)), ruling_of(model.config))
    return engine


def held(engine: Engine, receipt: Receipt) -> float:
    assert receipt.grant is not None
    return bound_of(engine.costs)(receipt.grant.decision, receipt.grant.want)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40),
    new=st.integers(1, 6),
    depth=st.integers(1, 12),
    exit=st.sampled_from(EXITS),
    risks=st.sets(st.sampled_from([*BARS, "high"]), max_size=2),
    how=st.sampled_from([ROOMY, TIGHT, CACHED]),
    again=st.booleans(),
)
def test_a_request_holds_all_that_it_can_take(
    length: int,
    new: int,
    depth: int,
    exit: ExitRule | None,
    risks: set[str],
    how: dict[str, Any],
    again: bool,
) -> None:
    engine = plain(SHEET | {"risks": RISKS}, **how)
    text = prompt(Random(length), length)
    ask = Ask("one", text, new, depth, exit=exit, key="acme", risks=frozenset(risks))
    arrivals = [(0, ask)] + [(40, replace(ask, id="two"))] * again
    for receipt in receipts(serve(engine, arrivals)):
        assert 0 < receipt.flops <= held(engine, receipt) * (1 + 1e-12)


def test_where_nothing_is_spared_a_request_takes_exactly_what_it_held() -> None:
    """So what is held is no more than it must be."""
    engine = plain(SHEET, **ROOMY)
    random = Random(7)
    asks = [
        Ask(f"{depth}-{length}", prompt(random, length), new, depth, key="acme")
        for depth in (2, 5, 8)
        for length, new in ((1, 1), (1, 9), (24, 1), (40, 12))
    ]
    heard = serve(engine, [(0, ask) for ask in asks])
    ended = [heard[ask.id].end for ask in asks if heard[ask.id].end.reason == "length"]
    assert len(ended) > 6
    for end in ended:
        assert end.receipt.flops == pytest.approx(held(engine, end.receipt), rel=1e-12)


def test_in_parts_a_request_takes_not_much_less_than_it_held() -> None:
    engine = plain(SHEET, **TIGHT)
    ask = Ask("one", prompt(Random(3), 60), 12, 6, key="acme")
    (receipt,) = receipts(serve(engine, [(0, ask)]))
    assert 0.85 < receipt.flops / held(engine, receipt) < 1


# ---- floors and escalation


@pytest.mark.parametrize(
    "rule", ["kl", "entropy", "margin", "argmax_stable", "state_distance", "gate"]
)
@pytest.mark.parametrize(
    ("key", "named", "floor"),
    [
        ("press", (), 1),
        ("acme", (), 2),
        ("clinic", (), 3),
        ("press", ("high",), 3),
        ("acme", ("casual", "medical"), 6),
    ],
)
def test_no_exit_lets_a_token_leave_above_its_floor(
    rule: str, key: str, named: tuple[str, ...], floor: int
) -> None:
    engine = plain(SHEET, **ROOMY)
    ask = Ask("one", LONG, 4, 8, exit=ExitRule(rule, 1e9), key=key, risks=frozenset(named))
    heard = serve(engine, [(0, ask)])["one"]
    cap = 4 if key == "press" else 8
    # The first check has nothing to compare with.
    least = min(cap, floor + (rule == "kl"))
    assert {token.recurrences for token in heard.told} == {least}
    assert heard.end.receipt.exit == ExitRule(rule, 1e9, min_recurrences=floor)


@pytest.mark.parametrize("rule", ["entropy", "margin", "state_distance", "gate"])
@pytest.mark.parametrize(
    ("asked", "named", "floor", "depth"),
    [(3, (), 3, 7), (1, (), 2, 7), (None, (), 4, 7), (3, ("medical",), 6, 7), (8, (), 8, 8)],
)
@pytest.mark.parametrize("holds", [True, False])
def test_a_token_goes_deeper_than_asked_only_below_the_bar(
    rule: str, asked: int | None, named: tuple[str, ...], floor: int, depth: int, holds: bool
) -> None:
    bar = {"rule": rule, "threshold": 1e9 if holds else 0.0, "up_to": 7}
    engine = plain(SHEET | {"risks": SHEET["risks"] | {"unsure": {"escalation": bar}}}, **ROOMY)
    risks = frozenset(("unsure", *named))
    # An exit of its own would end it before.
    own = ExitRule("entropy", 1e9)
    ask = Ask("one", LONG, 3, asked, exit=own, key="acme", risks=risks)
    heard = serve(engine, [(0, ask)])["one"]
    assert {token.recurrences for token in heard.told} == {floor if holds else depth}
    receipt = heard.end.receipt
    assert receipt.allowed == depth
    assert receipt.grant is not None
    assert ("escalation" in receipt.grant.decision.adjusted) == (asked != 8)


def test_some_tokens_go_deeper_where_the_model_is_not_sure() -> None:
    engine = plain(SHEET | {"risks": RISKS}, **ROOMY)
    ask = Ask("one", LONG, 16, 2, key="acme", risks=frozenset({"entropy"}))
    depths = serve(engine, [(0, ask)])["one"].end.receipt.depths
    assert min(depths) == 2
    assert max(depths) > 2


def test_of_two_bars_none_is_read_and_every_token_goes_all_the_way() -> None:
    engine = plain(SHEET | {"risks": RISKS}, **ROOMY)
    ask = Ask("one", LONG, 4, 2, exit=ExitRule("entropy", 1e9), key="acme")
    both = serve(engine, [(0, replace(ask, risks=frozenset({"margin", "entropy"})))])["one"]
    assert both.end.receipt.exit is None
    assert both.end.receipt.depths == {7: 4}


def test_a_calibrated_bar_is_the_checkpoints() -> None:
    told = {"criterion": "entropy", "threshold": 1e9, "min_recurrences": 1, "check_every": 3}
    model = copy.deepcopy(small())
    model.config.exit_rules = {"entropy": {"0.5%": told | {"loss": 1.0}}}
    bar = {"rule": "entropy", "tolerance": "0.50%", "up_to": 8}
    risks = SHEET["risks"] | {"unsure": {"escalation": bar}}
    engine = plain(SHEET | {"risks": risks}, model)
    ask = Ask("one", LONG, 4, 4, key="acme", risks=frozenset({"unsure"}))
    receipt = serve(engine, [(0, ask)])["one"].end.receipt
    assert receipt.exit == ExitRule("entropy", 1e9, min_recurrences=4, check_every=3)
    assert receipt.depths == {4: 4}


# ---- what is told


@pytest.mark.parametrize("texts", [False, True])
def test_records_say_what_receipts_say_and_hashes_are_those_of_the_tokens(
    site: Site, opened: Opened, texts: bool
) -> None:
    engine, _ = opened(texts=texts, **CACHED)
    arrivals = mixed(4)
    heard = serve(engine, arrivals)
    recorded = pairs(site)
    assert len(recorded) == len(arrivals)
    for ask in asks_of(arrivals):
        taken, ended = recorded[ask.id]
        one, receipt = heard[ask.id], heard[ask.id].end.receipt
        spoken = Counter(token.recurrences for token in one.told)
        assert ended["depths"] == {str(depth): spoken[depth] for depth in spoken}
        assert (ended["iterations"], ended["flops"]) == (receipt.iterations, receipt.flops)
        assert (ended["new_tokens"], ended["cached_tokens"]) == (
            len(one.tokens),
            receipt.cached_tokens,
        )
        price = SHEET["tiers"]["bronze" if ask.key == "press" else "gold"]["price"]
        assert Decimal(ended["price"]) == Decimal(str(price)) * receipt.iterations / 10**6
        assert taken["prompt_sha256"] == ended["prompt_sha256"] == digest(ask.prompt)
        assert ended["output_sha256"] == digest(one.tokens)
        assert (taken["asked"], taken["effort"]) == (ask.num_recurrences, ask.effort)
        assert taken["sampling"]["seed"] == ended["seed"] == ask.sampling.seed
        assert taken["sampling"]["temperature"] == ask.sampling.temperature
        assert (taken.get("prompt"), ended.get("output")) == (
            (list(ask.prompt), one.tokens) if texts else (None, None)
        )
        assert ended["reason"] == one.end.reason
        assert (ended["exit"] or {}).get("rule") == (receipt.exit and receipt.exit.criterion)


def test_totals_are_the_sums_of_receipts_and_the_engines_own_counters(
    site: Site, opened: Opened
) -> None:
    engine, governance = opened(**TIGHT)
    heard = {}
    for seed in (5, 6):
        heard |= serve(engine, mixed(seed))
    # Some that are cut off: what they took is counted, too.
    for number in range(3):
        ask = Ask(f"gone-{number}", LONG, 9, 5 + number, key="acme")
        engine.submit(ask, one := Heard())
        for _ in range(4 + 9 * number):
            engine.tick()
        engine.cancel(ask.id)
        engine.tick()
        heard[ask.id] = one
    totals, ends = governance.governor.totals(), [ended for _, ended in pairs(site).values()]
    assert set(totals) == {("acme-corp", "gold"), ("acme-corp", "bronze"), ("clinic", "gold")}
    told = receipts(heard)
    executed = sum(receipt.iterations for receipt in told)
    assert executed == engine.load().core_tokens
    assert executed == sum(total.iterations for total in totals.values())
    assert executed == sum(ended["iterations"] for ended in ends)
    for who, total in totals.items():
        mine = [one for one in ends if (one["tenant"], one["tier"]) == who]
        assert total.answers == len(mine)
        assert total.new_tokens == sum(one["new_tokens"] for one in mine)
        assert total.prompt_tokens == sum(one["prompt_tokens"] for one in mine)
        assert total.flops == pytest.approx(sum(one["flops"] for one in mine), rel=1e-12)
        assert total.price == sum(Decimal(one["price"]) for one in mine)
    flops = sum(total.flops for total in totals.values())
    assert flops == pytest.approx(sum(receipt.flops for receipt in told), rel=1e-12)


@pytest.mark.parametrize(
    ("exit", "count"),
    [(None, 3), (ExitRule("entropy", 5.38), 1), (ExitRule("state_distance", 0.22), 1)],
)
def test_totals_are_a_count_of_the_matrix_products_that_ran(
    opened: Opened, exit: ExitRule | None, count: int
) -> None:
    engine, governance = opened(**ROOMY)
    asks = [Ask(f"{n}", prompt(Random(n), 20), 5, 6, exit=exit, key="acme") for n in range(count)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        serve(engine, [(0, ask) for ask in asks])
    assert governance.governor.totals()["acme-corp", "gold"].flops == counter.get_total_flops() > 0


# ---- one end for each that was taken


def test_whatever_becomes_of_a_request_it_ends_once(
    site: Site, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, governance = opened(max_running=1, max_queue=2)

    def ask(name: str, **fields: Any) -> Heard:
        plain = {"prompt": LONG, "max_new_tokens": 4, "num_recurrences": 3, "key": "acme"}
        engine.submit(Ask(name, **plain | fields), one := Heard())
        return one

    ask("whole")
    while engine.tick():
        pass
    ask("in flight")
    ask("in the queue")
    engine.tick()
    ask("third")
    with pytest.raises(Busy):
        ask("no room")
    with pytest.raises(Refused, match="exceed the 256"):
        ask("too long", max_new_tokens=400)
    for name in ("in flight", "in the queue"):
        engine.cancel(name)
    engine.tick()
    with monkeypatch.context() as patch:
        patch.setattr(engine.passes, "iterate", lambda flights: 1 / 0)
        engine._tick_safely()
    ask("running at the end")
    ask("waiting at the end")
    engine.tick()
    engine.close(0.0)
    reasons = {id: ended["reason"] for id, (_, ended) in pairs(site).items()}
    assert reasons == {
        "whole": "length",
        "in flight": "cancelled",
        "in the queue": "cancelled",
        "third": "error",
        "no room": "untaken",
        "too long": "untaken",
        "running at the end": "shutdown",
        "waiting at the end": "shutdown",
    }
    # Nobody holds anything, and only what was executed is counted.
    governor = governance.governor
    assert governor.ledger._holds == {}
    assert sum(total.answers for total in governor.totals().values()) == 6
    iterations = sum(total.iterations for total in governor.totals().values())
    assert iterations == engine.load().core_tokens


def test_an_end_that_cannot_be_recorded_harms_nobody(site: Site, opened: Opened) -> None:
    engine, governance = opened()
    engine.submit(Ask("one", LONG, 4, 3, key="acme"), heard := Heard())
    governance.governor.log.close()
    while engine.tick():
        pass
    assert heard.end.reason == "length"
    assert governance.governor.totals()["acme-corp", "gold"].new_tokens == 4
    assert [record["kind"] for record in site.records()] == ["opened", "taken"]


def test_who_finds_no_room_is_told_so_also_where_it_cannot_be_recorded(
    site: Site, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, governance = opened()

    def full(*of: Any) -> None:
        governance.governor.log.close()
        raise Busy(1.0)

    monkeypatch.setattr(engine, "_enqueue", full)
    with heard_of("rondo_serve.governed") as told, pytest.raises(Busy):
        engine.submit(Ask("one", LONG, 4, 3, key="acme"), Heard())
    assert told == ["the end of one could not be recorded: the audit log is closed"]
    assert governance.governor.ledger._holds == {}


# ---- overload


def test_under_load_depth_gives_way_before_anyone_is_turned_away(
    site: Site, opened: Opened
) -> None:
    site.rule(overload=[{"waiting": 2, "keep": 0.5}, {"waiting": 4, "keep": 0.1}])
    engine, _ = opened(max_running=1, max_queue=20)
    asks = [Ask(f"{n}", LONG, 2, 8, key="acme") for n in range(6)]
    # A class keeps its floor, however many wait.
    asks.append(Ask("6", LONG, 2, 8, key="acme", risks=frozenset({"high"})))
    # A tick apart, and slower than they are answered: the first waits for nobody.
    heard = serve(engine, list(enumerate(asks)))
    depths = [heard[ask.id].end.receipt.depths for ask in asks]
    assert depths == [{depth: 2} for depth in (8, 8, 8, 4, 4, 2, 3)]
    for ask, (_, ended) in zip(asks, pairs(site).values(), strict=True):
        grant = heard[ask.id].end.receipt.grant
        assert grant is not None
        told = ["overload"] if int(ask.id) >= 3 else []
        assert ended["adjusted"] == list(grant.decision.adjusted) == told
    # With the queue empty again the next ones have all of it: who comes together is no overload.
    burst = [Ask(f"last-{n}", LONG, 2, 8, key="acme") for n in range(5)]
    told = receipts(serve(engine, [(0, ask) for ask in burst]))
    assert [receipt.depths for receipt in told] == [{8: 2}] * 5
