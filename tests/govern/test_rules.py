"""What decides how deep a request goes: properties over every kind of policy and request."""

import copy
import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from policies import EXAMPLE, asks, policies

from rondo_govern.efforts import EFFORTS
from rondo_govern.policy import Policy, read_policy
from rondo_govern.rules import Case, Decision, Denied, Seat, decide, seat_of

Asked = tuple[Policy, Case]


@pytest.fixture(scope="module")
def example() -> Policy:
    return read_policy(EXAMPLE)[0]


def given_or_none(policy: Policy, case: Case) -> Decision | None:
    try:
        return decide(policy, case)
    except Denied:
        return None


def decided(asked: Asked) -> Decision:
    found = given_or_none(*asked)
    assume(found is not None)
    assert found is not None
    return found


def earliest(decision: Decision, own: bool) -> int:
    """The iteration from which on a token may stop, with an exit of the request's own or none."""
    stops = decision.escalation is not None or (own and decision.own_exit)
    return decision.floor if stops else decision.depth


@settings(deadline=None)
@given(asks())
def test_depth_lies_between_the_floors_and_the_cap(asked: Asked) -> None:
    policy, case = asked
    decision, tier = decided(asked), policy.tiers[case.tier]
    assert tier.floor <= decision.floor <= decision.depth <= tier.cap
    assert all(policy.risks[name].floor <= decision.floor for name in case.risks)


@settings(deadline=None)
@given(asks(), st.integers(1, 9))
def test_asking_for_more_gives_no_less(asked: Asked, more: int) -> None:
    policy, case = asked
    decided(asked)
    less = decide(policy, replace(case, num_recurrences=1))
    for depth in sorted({more, more + 1}):
        deeper = decide(policy, replace(case, num_recurrences=depth))
        assert deeper.depth >= less.depth
        assert deeper.floor >= less.floor
        less = deeper


@settings(deadline=None)
@given(asks())
def test_more_effort_gives_no_less(asked: Asked) -> None:
    policy, case = asked
    decided(asked)
    found = [
        decide(policy, replace(case, num_recurrences=None, effort=effort)) for effort in EFFORTS
    ]
    assert [one.depth for one in found] == sorted(one.depth for one in found)
    assert [one.floor for one in found] == sorted(one.floor for one in found)


@settings(deadline=None)
@given(asks(), st.data(), st.booleans())
def test_a_further_class_makes_nothing_shallower(
    asked: Asked, data: st.DataObject, own: bool
) -> None:
    policy, case = asked
    assume(policy.risks)
    named = data.draw(st.sampled_from(sorted(policy.risks)))
    before = decided(asked)
    after = decided((policy, replace(case, risks=case.risks | {named})))
    assert after.depth >= before.depth
    assert after.floor >= before.floor
    assert earliest(after, own) >= earliest(before, own)
    assert after.own_exit <= before.own_exit
    assert (after.tier, after.price) == (before.tier, before.price)


@settings(deadline=None)
@given(asks(), st.integers(0, 9))
def test_waiting_raises_nothing(asked: Asked, more: int) -> None:
    policy, case = asked
    busy, busier = decided(asked), decided((policy, replace(case, waiting=case.waiting + more)))
    assert busier.depth <= busy.depth
    assert busier.floor <= busy.floor


@settings(deadline=None)
@given(asks())
def test_the_same_answer_to_the_same_and_nothing_is_changed(asked: Asked) -> None:
    before = copy.deepcopy(asked)
    assert given_or_none(*asked) == given_or_none(*before)
    assert asked == before


@settings(deadline=None)
@given(asks())
def test_refused_exactly_when_a_class_needs_more_than_the_tier_gives(asked: Asked) -> None:
    policy, case = asked
    beyond = [n for n in case.risks if policy.risks[n].floor > policy.tiers[case.tier].cap]
    assert (given_or_none(policy, case) is None) == bool(beyond)
    if beyond:
        with pytest.raises(Denied, match="risk class") as denied:
            decide(policy, case)
        assert (denied.value.status, denied.value.code) == (403, "risk_beyond_tier")


@settings(max_examples=300, deadline=None)
@given(asks())
def test_each_reason_is_true_and_none_is_left_out(asked: Asked) -> None:
    """The depth, followed by hand from what is asked to what is given."""
    policy, case = asked
    decision, tier = decided(asked), policy.tiers[case.tier]
    depth = case.num_recurrences or (tier.depths[case.effort] if case.effort else tier.default)
    reasons = []
    for risk in (policy.risks[name] for name in case.risks):
        if risk.escalation and (up_to := min(risk.escalation.up_to or tier.cap, tier.cap)) > depth:
            depth, reasons = up_to, ["escalation"]
    least = max((policy.risks[name].floor for name in case.risks), default=1)
    if depth > tier.cap:
        depth, reasons = tier.cap, [*reasons, "cap"]
    if depth < tier.floor:
        depth, reasons = tier.floor, [*reasons, "floor"]
    if depth < least:
        depth, reasons = least, [*reasons, "risk"]
    kept = [step.keep for step in policy.overload if step.waiting <= case.waiting]
    share = math.ceil(Fraction(kept[-1]) * depth) if kept else depth
    if (kept_depth := max(share, tier.floor, least)) < depth:
        depth, reasons = kept_depth, [*reasons, "overload"]
    assert (decision.depth, list(decision.adjusted)) == (depth, reasons)


@settings(deadline=None)
@given(asks())
def test_an_escalation_goes_from_what_was_asked_to_deeper(asked: Asked) -> None:
    policy, case = asked
    decision, tier = decided(asked), policy.tiers[case.tier]
    there = {policy.risks[name].escalation for name in case.risks} - {None}
    assert decision.own_exit == (not there)
    if not there:
        assert decision.escalation is None
        least = [policy.risks[name].floor for name in case.risks]
        assert decision.floor == max([tier.floor, *least])
        return
    alone = policy.model_copy(
        update={
            "risks": {
                name: risk.model_copy(update={"escalation": None})
                for name, risk in policy.risks.items()
            }
        }
    )
    assert decision.floor == decide(alone, case).depth
    room = decision.floor < decision.depth
    assert decision.escalation == (there.pop() if len(there) == 1 and room else None)


@settings(deadline=None)
@given(policies, st.text(max_size=9))
def test_who_is_named_nowhere_is_of_the_default_tier_or_of_none(policy: Policy, key: str) -> None:
    assume(key not in policy.keys)
    if policy.tier_of_all is None:
        with pytest.raises(Denied, match="is of no tier") as denied:
            seat_of(policy, key)
        assert denied.value.code == "no_tier"
    else:
        assert seat_of(policy, key) == Seat(key, key, policy.tier_of_all, frozenset())


@settings(deadline=None)
@given(policies)
def test_whoever_is_named_can_be_served(policy: Policy) -> None:
    for key, holder in policy.keys.items():
        seat = seat_of(policy, key)
        tier = holder.tier or policy.tier_of_all
        assert seat == Seat(key, holder.tenant or key, tier or "", frozenset(holder.risks))
        decide(policy, Case(seat.tier, seat.risks))


def test_what_is_not_there_is_refused_by_name(example: Policy) -> None:
    with pytest.raises(Denied, match="no tier 'iron'") as denied:
        decide(example, Case("iron"))
    assert (denied.value.status, denied.value.code) == (403, "unknown_tier")
    with pytest.raises(Denied, match="no risk class 'hgih': there are medical, high") as denied:
        decide(example, Case("gold", frozenset({"hgih"})))
    refused = denied.value
    assert (refused.status, refused.code, refused.param) == (400, "unknown_risk", "risk")
    with pytest.raises(Denied, match=r"'x{100}'"):
        decide(example, Case("gold", frozenset({"x" * 1000})))


def test_a_share_is_what_was_written() -> None:
    """In binary, 0.07 of 100 is more than 7."""
    policy = Policy.model_validate_json(
        '{"version": 1, "tiers": {"t": {"default": 100, "cap": 100}},'
        ' "overload": [{"waiting": 1, "keep": 0.07}]}'
    )
    assert decide(policy, Case("t", waiting=1)).depth == 7


@pytest.mark.parametrize(
    ("case", "depth", "floor", "adjusted"),
    [
        (Case("gold"), 8, 2, ()),
        (Case("gold", num_recurrences=2), 2, 2, ()),
        (Case("gold", num_recurrences=99), 32, 2, ("cap",)),
        (Case("gold", num_recurrences=1), 2, 2, ("floor",)),
        (Case("gold", effort="high"), 16, 2, ()),
        (Case("silver", effort="high"), 6, 1, ()),
        (Case("gold", frozenset({"high"}), num_recurrences=2), 6, 6, ("risk",)),
        (Case("gold", frozenset({"medical"}), num_recurrences=2), 32, 8, ("escalation",)),
        (Case("gold", frozenset({"medical"}), num_recurrences=16), 32, 16, ("escalation",)),
        (Case("gold", num_recurrences=32, waiting=7), 32, 2, ()),
        (Case("gold", num_recurrences=32, waiting=8), 16, 2, ("overload",)),
        (Case("gold", frozenset({"high"}), 16, waiting=20), 6, 6, ("overload",)),
    ],
)
def test_the_example(
    example: Policy, case: Case, depth: int, floor: int, adjusted: tuple[str, ...]
) -> None:
    decision = decide(example, case)
    assert (decision.depth, decision.floor, decision.adjusted) == (depth, floor, adjusted)


def test_one_bar_is_kept_however_often_it_is_named_and_two_are_kept_by_going_deep() -> None:
    bars = {"a": {"tolerance": "0.5%"}, "b": {"tolerance": "0.005"}, "c": {"tolerance": "1%"}}
    told = {
        "version": 1,
        "tiers": {"t": {"default": 2, "cap": 8}},
        "risks": {name: {"escalation": {"rule": "kl", **bar}} for name, bar in bars.items()},
    }
    policy = Policy.model_validate(told)
    same = decide(policy, Case("t", frozenset("ab")))
    assert (same.depth, same.floor, same.own_exit) == (8, 2, False)
    assert same.escalation == policy.risks["a"].escalation == policy.risks["b"].escalation
    other = decide(policy, Case("t", frozenset("ac")))
    assert (other.depth, other.escalation, other.own_exit) == (8, None, False)
