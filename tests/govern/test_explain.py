"""`rondo policy check` and `rondo policy explain`, and a policy held against a model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import EXAMPLE, asks

from conftest import recurrent
from rondo.errors import UserError
from rondo.modeling.generation_recurrent import calibrated
from rondo_govern.explain import check_model, run_check, run_explain, tables, warnings
from rondo_govern.policy import Escalation, Policy, read_policy
from rondo_govern.rules import Case, Denied, decide
from rondo_govern.settings import PolicyCheckConfig, PolicyExplainConfig

Capture = pytest.CaptureFixture[str]


def policy_of(**told: Any) -> Policy:
    return Policy.model_validate({"version": 1, **told}, strict=False)


def escalating(**bar: Any) -> Policy:
    """A policy with one class that escalates."""
    return policy_of(
        tiers={"t": {"default": 2, "cap": 8}}, risks={"high": {"floor": 2, "escalation": bar}}
    )


def explained(capsys: Capture, **told: Any) -> list[str]:
    run_explain(PolicyExplainConfig(policy=str(EXAMPLE), **told))
    return capsys.readouterr().out.splitlines()


def test_check_tells_what_the_example_gives_whom(capsys: Capture) -> None:
    run_check(PolicyCheckConfig(policy=str(EXAMPLE)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [str(EXAMPLE), "holds"]
    assert ["silver", "1", "4", "8", "0.018", "1", "1", "2", "4", "6", "8", "8"] in lines
    assert ["silver", "1d", "2e16", "FLOPs", "and", "2,000,000", "tokens"] in lines
    assert ["high", "refused,", "gives", "4", "6", "to", "8", "6", "to", "32", "-"] in lines
    assert ["press-desk", "press", "silver", "high"] in lines
    assert ["20", "0.25", "1", "1", "2"] in lines
    assert not any("warning:" in line for line in lines)


def test_columns_stand_below_each_other(capsys: Capture) -> None:
    run_check(PolicyCheckConfig(policy=str(EXAMPLE)))
    blocks = [block.splitlines() for block in capsys.readouterr().out.split("\n\n")]
    for _, header, *rows in blocks[1:]:
        starts = [match.start() for match in re.finditer(r"(?<=  )\S", header)]
        assert rows
        for row in rows:
            assert all(row[at - 2 : at] == "  " and row[at] != " " for at in starts)


@settings(max_examples=50, deadline=None)
@given(asks(), st.data())
def test_tables_say_what_is_decided(asked: tuple[Policy, Case], data: st.DataObject) -> None:
    policy, case = asked
    found = tables(policy)
    rows = {
        row[0]: row[1:] for row in found["Risk classes, and the iterations that tiers give them"]
    }
    for risk in case.risks:
        told = str(rows[risk][list(policy.tiers).index(case.tier)])
        one = Case(case.tier, frozenset({risk}), num_recurrences=data.draw(st.integers(1, 9)))
        try:
            decision = decide(policy, one)
        except Denied:
            assert told == f"refused, gives {policy.tiers[case.tier].cap}"
        else:
            least, most = map(int, told.split(" to "))
            assert least <= decision.floor <= decision.depth <= most
            assert least == max(policy.risks[risk].floor, policy.tiers[case.tier].floor)
            assert most == policy.tiers[case.tier].cap


def test_what_escalates_begins_at_the_floor() -> None:
    policy = policy_of(
        tiers={"t": {"default": 4, "cap": 8}}, risks={"unsure": {"escalation": {"rule": "kl"}}}
    )
    rows = tables(policy)["Risk classes, and the iterations that tiers give them"]
    assert rows[1] == ("unsure", "1 to 8", "until kl is as calibrated, up to the cap")


def test_what_is_surely_not_meant_is_warned_of() -> None:
    tier = {"floor": 4, "default": 4, "cap": 5}
    policy = policy_of(
        tiers={"gold": tier, "iron": tier, "tin": {"floor": 5, "default": 5, "cap": 5}},
        risks={
            "idle": {"floor": 4},
            "high": {"floor": 5},
            "unsure": {"escalation": {"rule": "kl"}},
        },
        keys={"acme": {"tier": "gold"}, "umbra": {"tier": "tin"}},
        overload=[{"waiting": 5, "keep": 0.8}, {"waiting": 9, "keep": 0.5}],
    )
    assert list(warnings(policy)) == [
        "tier iron is nobody's: no key names it, and it is not the default",
        "there is no default_tier: keys that are not named here are refused",
        "risk idle changes nothing: every tier's floor is as deep",
        "overload from 9 waiting on changes nothing, whatever is asked",
    ]


def test_explain_goes_step_by_step(capsys: Capture) -> None:
    told = explained(capsys, key="acme", risk=("high",), num_recurrences=2, waiting=20)
    assert told == [
        "key acme: tenant acme",
        "asked: 2 (num_recurrences)",
        "risk high: at least 6",
        "tier gold: 2 to 32",
        "queue of 20: keeps 0.25, nothing changes",
        "given: depth 6, floor 6, price 0.015 EUR per million iterations",
        "exit: the request's own, from the floor on",
        "adjusted: risk",
    ]
    assert explained(capsys, key="clinic", effort="low", waiting=8)[1:] == [
        "asked: 4 (effort low)",
        "risk medical, by the key: at least 8",
        "risk medical: deeper than asked until entropy is below 1.5, up to the cap",
        "tier gold: 2 to 32",
        "queue of 8: keeps 0.5, 32 becomes 16",
        "given: depth 16, floor 8, price 0.015 EUR per million iterations",
        "exit: the risk class's, from the floor on; the request's own is not taken",
        "adjusted: escalation, overload",
    ]
    assert explained(capsys, key="nobody") == [
        "key nobody: tenant nobody, not named in the policy",
        "asked: 2 (nothing, so the default)",
        "tier bronze: 1 to 4",
        "given: depth 2, floor 1, price 0.02 EUR per million iterations",
        "exit: the request's own, from the floor on",
    ]
    assert "exit: none, every token takes the whole depth" in explained(
        capsys, key="clinic", waiting=20
    )


def test_explain_as_json_says_what_is_decided(capsys: Capture) -> None:
    settings = PolicyExplainConfig(
        policy=str(EXAMPLE), key="press-desk", risk=("high",), effort="max", json_output=True
    )
    run_explain(settings)
    told = json.loads(capsys.readouterr().out)
    policy, sha256 = read_policy(EXAMPLE)
    decision = decide(policy, Case("silver", frozenset({"high"}), effort="max"))
    assert (told["allowed"], told["floor"]) == (decision.depth, decision.floor)
    assert told | {"steps": []} == {
        "key": "press-desk",
        "tenant": "press",
        "tier": "silver",
        "risks": ["high"],
        "asked": None,
        "effort": "max",
        "waiting": 0,
        "allowed": 8,
        "floor": 6,
        "adjusted": [],
        "escalation": None,
        "own_exit": True,
        "price": "0.018",
        "currency": "EUR",
        "policy_sha256": sha256,
        "steps": [],
    }
    assert told["steps"][-2].startswith("given: depth 8, floor 6, price 0.018 EUR")


def test_a_tier_may_be_tried_with_a_key_of_none(tmp_path: Path, capsys: Capture) -> None:
    text = "version: 1\ntiers: {a: {default: 1, cap: 1}, b: {default: 2, cap: 2}}\n"
    (tmp_path / "p.yaml").write_text(text)
    path = str(tmp_path / "p.yaml")
    run_explain(PolicyExplainConfig(policy=path, key="k", tier="b"))
    assert "given: depth 2, floor 1, price 0 per million" in capsys.readouterr().out
    with pytest.raises(UserError, match="refused, status 403 no_tier: key 'k' is of no tier"):
        run_explain(PolicyExplainConfig(policy=path, key="k"))


def test_what_is_denied_is_told_with_its_status(capsys: Capture) -> None:
    with pytest.raises(UserError, match="refused, status 403 risk_beyond_tier: risk class high"):
        run_explain(PolicyExplainConfig(policy=str(EXAMPLE), risk=("high",)))
    with pytest.raises(UserError, match="refused, status 400 unknown_risk: there is no risk class"):
        run_explain(PolicyExplainConfig(policy=str(EXAMPLE), risk=("hgih",)))
    assert capsys.readouterr().out == ""


STORED = {
    rule: {tolerance: {"criterion": rule, "threshold": 0.1} for tolerance in tolerances}
    for rule, tolerances in {"kl": ["0.5%"], "margin": ["0.5%", "1% agreement"]}.items()
}


@pytest.mark.parametrize("rule", ["kl", "margin", "entropy", "gate"])
@pytest.mark.parametrize("bar", [{}, {"tolerance": "0.005"}, {"tolerance": "1% agreement"},
                                 {"tolerance": "2%"}, {"threshold": 0.3}])  # fmt: skip
def test_a_bar_is_taken_where_the_model_has_it(rule: str, bar: dict[str, Any]) -> None:
    """As generation looks it up: what passes here cannot fail there, and the other way round."""
    policy = escalating(rule=rule, **bar)
    escalation = policy.risks["high"].escalation
    assert isinstance(escalation, Escalation)
    shape = recurrent("llama", exit_rules=STORED).config
    there = escalation.threshold is not None
    if not there:
        try:
            there = calibrated(shape, rule, escalation.tolerance).criterion == rule
        except ValueError:
            there = False
    if there:
        check_model(policy, 8, STORED, exit_gate=True)
    else:
        with pytest.raises(UserError, match=f"risk high escalates by {rule} calibrated to"):
            check_model(policy, 8, STORED, exit_gate=True)


def test_what_a_model_does_not_have_is_told() -> None:
    with pytest.raises(UserError, match=r"tier t goes up to 8 .* beyond the cap of 7"):
        check_model(escalating(rule="kl", threshold=1), 7, {}, exit_gate=False)
    with pytest.raises(UserError, match="by the gate, and the model has none"):
        check_model(escalating(rule="gate", threshold=1), 8, {}, exit_gate=False)
    with pytest.raises(UserError, match=r"calibrated to one loss, .* calibrated to none: name"):
        check_model(escalating(rule="kl"), 8, {}, exit_gate=False)
    with pytest.raises(UserError, match=r"calibrated to 2%, .* calibrated to 0.5%, 1% agreement"):
        check_model(escalating(rule="margin", tolerance="2%"), 8, STORED, exit_gate=False)


def test_a_checkpoint_is_read_as_it_was_saved(tmp_path: Path, capsys: Capture) -> None:
    recurrent("llama", max_recurrences=32).config.save_pretrained(tmp_path / "deep")
    run_check(PolicyCheckConfig(policy=str(EXAMPLE), model=str(tmp_path / "deep")))
    assert f"holds for {tmp_path / 'deep'}" in capsys.readouterr().out
    recurrent("llama", max_recurrences=16).config.save_pretrained(tmp_path / "flat")
    with pytest.raises(UserError, match="tier gold goes up to 32 iterations, beyond the cap of 16"):
        run_check(PolicyCheckConfig(policy=str(EXAMPLE), model=str(tmp_path / "flat")))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is no recurrent model: model_type: Input should be"):
        run_check(PolicyCheckConfig(policy=str(EXAMPLE), model=str(tmp_path)))
    with pytest.raises(UserError, match=r"cannot read config.json of .*: No such file"):
        run_check(PolicyCheckConfig(policy=str(EXAMPLE), model=str(tmp_path / "none")))
    assert capsys.readouterr().out == ""
