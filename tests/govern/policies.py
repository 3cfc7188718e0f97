"""Policies and requests of every kind, and what a policy file must say, written a second time."""

import math
import re
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from rondo_govern.efforts import EFFORTS
from rondo_govern.policy import Policy
from rondo_govern.rules import Case

EXAMPLE = Path(__file__).parents[2] / "examples" / "policy.yaml"
RULES = ("kl", "entropy", "margin", "argmax_stable", "state_distance", "gate")
TIERS, RISKS = ("bronze", "silver", "gold"), ("casual", "high", "medical", "legal")
# Few and small, so that bounds meet.
DEEPEST = 6
BARS = (
    {"rule": "entropy"},
    {"rule": "entropy", "threshold": 0.5},
    {"rule": "margin", "tolerance": "0.5%"},
)
names = st.sampled_from(["acme", "0", "press-web", "A.b_c", "x" * 64])


@st.composite
def tiers(draw: st.DrawFn) -> dict[str, Any]:
    floor = draw(st.integers(1, DEEPEST))
    default = draw(st.integers(floor, DEEPEST))
    cap = draw(st.integers(default, DEEPEST))
    found: dict[str, Any] = {"floor": floor, "default": default, "cap": cap}
    if draw(st.booleans()):
        wanted = st.lists(st.integers(floor, cap), min_size=len(EFFORTS), max_size=len(EFFORTS))
        found["efforts"] = dict(zip(EFFORTS, sorted(draw(wanted)), strict=True))
    found["price"] = draw(st.sampled_from([0, 1, 0.1, 0.015, 1e-7]))
    quota = st.fixed_dictionaries(
        {"window": st.sampled_from(["1m", "1h", "31d"]), "tokens": st.integers(1, 10**9)},
        optional={"flops": st.floats(1e-3, 1e30)},
    )
    return found | {"quotas": draw(st.lists(quota, max_size=2))}


@st.composite
def risks(draw: st.DrawFn, deepest: int) -> dict[str, Any]:
    found: dict[str, Any] = {"floor": draw(st.integers(1, deepest))}
    if draw(st.booleans()):
        up_to = draw(st.sampled_from([None, found["floor"], DEEPEST, 9]))
        bar = draw(st.sampled_from(BARS))
        found["escalation"] = bar if up_to is None else bar | {"up_to": up_to}
    return found


@st.composite
def sheets(draw: st.DrawFn) -> dict[str, Any]:
    """What a policy file that holds says."""
    there = draw(st.dictionaries(st.sampled_from(TIERS), tiers(), min_size=1))
    deepest = max(tier["cap"] for tier in there.values())
    classes = draw(st.dictionaries(st.sampled_from(RISKS), risks(deepest)))
    keys: dict[str, Any] = {}
    for key in draw(st.lists(names, max_size=3, unique=True)):
        tier = draw(st.sampled_from(sorted(there)))
        fit = sorted(name for name in classes if classes[name]["floor"] <= there[tier]["cap"])
        chosen = draw(st.lists(st.sampled_from(fit), unique=True)) if fit else []
        keys[key] = {"tier": tier, "risks": chosen}
        if draw(st.booleans()):
            keys[key]["tenant"] = draw(names)
    waiting = sorted(draw(st.sets(st.integers(1, 9), max_size=3)))
    keeps = draw(
        st.sets(st.integers(1, 99), min_size=len(waiting), max_size=len(waiting)).map(sorted)
    )
    steps = zip(waiting, reversed(keeps), strict=True)
    found = {
        "version": 1,
        "tiers": there,
        "risks": classes,
        "keys": keys,
        "overload": [{"waiting": count, "keep": keep / 100} for count, keep in steps],
        "currency": draw(st.sampled_from(["", "EUR"])),
    }
    if len(there) == 1 or draw(st.booleans()):
        found["default_tier"] = draw(st.sampled_from(sorted(there)))
    return found


policies = sheets().map(lambda sheet: Policy.model_validate(sheet, strict=False))


@st.composite
def asks(draw: st.DrawFn) -> tuple[Policy, Case]:
    """A policy and a request to one of its tiers, of some of its classes."""
    policy = draw(policies)
    named = st.sets(st.sampled_from(sorted(policy.risks))) if policy.risks else st.just(set())
    case = Case(
        tier=draw(st.sampled_from(sorted(policy.tiers))),
        risks=frozenset(draw(named)),
        num_recurrences=draw(st.none() | st.integers(1, 9)),
        effort=draw(st.none() | st.sampled_from(EFFORTS)),
        waiting=draw(st.integers(0, 12)),
    )
    return policy, case


def whole(value: Any, least: int = 1, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


def number(value: Any, least: float = 0.0) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= least


def named(value: Any) -> bool:
    return type(value) is str and bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value))


def knows(value: Any, **fields: Any) -> dict[str, Any]:
    """Return a mapping with what it leaves out filled in, after a look at its names."""
    assert type(value) is dict
    assert set(value) <= set(fields), set(value) - set(fields)
    return fields | value


def assert_holds(sheet: Any) -> None:
    """Fail unless a policy file may say this, by nothing but plain comparisons."""
    told = knows(sheet, version=None, tiers=None, default_tier=None, risks={}, keys={}, overload=[],
                 currency="")  # fmt: skip
    assert whole(told["version"], 1, 1)
    assert type(told["currency"]) is str
    assert len(told["currency"]) <= 16
    assert type(told["tiers"]) is dict
    assert told["tiers"]
    caps = {name: _tier(name, tier) for name, tier in told["tiers"].items()}
    assert told["default_tier"] in {None, *caps}
    floors = {name: _risk(name, risk, max(caps.values())) for name, risk in told["risks"].items()}
    only = next(iter(caps)) if len(caps) == 1 else None
    for key, holder in told["keys"].items():
        one = knows(holder, tenant=None, tier=None, risks=[])
        assert named(key)
        assert one["tenant"] is None or named(one["tenant"])
        tier = one["tier"] or told["default_tier"] or only
        assert type(one["risks"]) is list
        assert all(floors[name] <= caps[tier] for name in one["risks"])
    waiting, keep = 0, 1.0
    assert type(told["overload"]) is list
    for step in told["overload"]:
        one = knows(step, waiting=None, keep=None)
        assert whole(one["waiting"], waiting + 1)
        assert number(one["keep"])
        assert 0 < one["keep"] < keep
        waiting, keep = one["waiting"], one["keep"]


def _tier(name: Any, tier: Any) -> int:
    one = knows(tier, floor=1, default=None, cap=None, price=0, efforts={}, quotas=[])
    assert named(name)
    assert all(whole(one[field], 1, 10_000) for field in ("floor", "default", "cap"))
    assert one["floor"] <= one["default"] <= one["cap"]
    assert number(one["price"])
    for effort, depth in one["efforts"].items():
        assert effort in EFFORTS
        assert whole(depth, one["floor"], one["cap"])
    assert type(one["quotas"]) is list
    for quota in one["quotas"]:
        bound = knows(quota, window=None, flops=None, tokens=None)
        found = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", bound["window"])
        assert found
        assert int(found[1]) * {"m": 1, "h": 60, "d": 1440}[found[2]] <= 31 * 1440
        assert bound["flops"] is not None or bound["tokens"] is not None
        assert bound["flops"] is None or (number(bound["flops"]) and bound["flops"] > 0)
        assert bound["tokens"] is None or whole(bound["tokens"])
    return one["cap"]


def _risk(name: Any, risk: Any, deepest: int) -> int:
    one = knows(risk, floor=1, escalation=None, about="")
    assert named(name)
    assert whole(one["floor"], 1, deepest)
    assert type(one["about"]) is str
    if one["escalation"] is not None:
        bar = knows(one["escalation"], rule=None, tolerance=None, threshold=None, up_to=None)
        assert bar["rule"] in RULES
        assert bar["tolerance"] is None or bar["threshold"] is None
        assert bar["tolerance"] is None or type(bar["tolerance"]) is str
        assert bar["threshold"] is None or number(bar["threshold"])
        assert bar["up_to"] is None or whole(bar["up_to"], one["floor"], 10_000)
    return one["floor"]
