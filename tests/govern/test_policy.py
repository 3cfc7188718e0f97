"""Policy files: what holds is read, and what does not is refused in one sentence."""

import hashlib
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policies import EXAMPLE, assert_holds, sheets

from rondo.errors import UserError
from rondo_govern.policy import Policy, read_policy
from rondo_govern.sheets import MOST_BYTES, parse_sheet

# What a hand slips into a place where something else belongs.
STRAY = [
    None, True, False, 0, -1, 1, 3, 7, 10_001, 10**30, 0.0, 0.5, 1.0, -0.5, 5e15, "", "3", "0.5",
    "1d", "0d", "32d", "gold", "high", "kl", "x" * 70, "a b", [], [1], {}, {"floor": 1},
]  # fmt: skip
# What YAML is made of.
PIECES = [
    *"-:[]{},&*!|>'\"%@?=~#. \n", "  ", "a", "1", "<<", '"a\\nb": ', "!!int ", "!!bool ",
    "!!timestamp ", "!!float ", "&a ", "*a", "\\ud800", "version: 1\n", "tiers:\n  a: ",
    "{default: 1, cap: 1}",
]  # fmt: skip


def parse(text: str | bytes) -> Policy:
    return parse_sheet(Policy, text.encode() if isinstance(text, str) else text, "the policy p")


def accepted(text: str | bytes) -> Policy | None:
    """The policy, or None where it is refused in one line; nothing else may come of it."""
    try:
        return parse(text)
    except UserError as error:
        told = str(error)
    assert len(told.splitlines()) == 1
    return None


def write(sheet: Any) -> str:
    # Fresh objects, or what is the same would be written as an alias.
    return yaml.safe_dump(json.loads(json.dumps(sheet)))


def plain(policy: Policy) -> Any:
    return json.loads(json.dumps(policy.model_dump(), default=float))


def tier(more: str) -> str:
    return f"version: 1\ntiers: {{gold: {{default: 4, cap: 8, {more}}}}}\n"


def whole(more: str) -> str:
    return f"{tier('floor: 2')}{more}\n"


@settings(deadline=None)
@given(sheets())
def test_what_holds_is_read_as_it_was_written(sheet: dict[str, Any]) -> None:
    assert_holds(sheet)
    policy = parse(write(sheet))
    assert policy == Policy.model_validate(sheet, strict=False)
    assert policy == parse(json.dumps(sheet))
    assert_holds(plain(policy))


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to everything in a sheet."""
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    found = [(*way, key) for key in keys]
    return found + [one for at in found for one in places(value[at[-1]], at)]


@st.composite
def spoilt(draw: st.DrawFn) -> Any:
    """A sheet with one to three things replaced, left out or added."""
    sheet = json.loads(json.dumps(draw(sheets())))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(sheet)))
        inner = sheet
        for key in way:
            inner = inner[key]
        match draw(st.sampled_from(["replace", "leave", "add"])):
            case "replace":
                inner[last] = draw(st.sampled_from(STRAY))
            case "leave":
                del inner[last]
            case "add" if isinstance(inner, dict):
                inner[draw(st.sampled_from(["floors", "cap", "tier", "a b", "x"]))] = draw(
                    st.sampled_from(STRAY)
                )
        if not places(sheet):
            break
    return sheet


@settings(max_examples=200, deadline=None)
@given(spoilt())
def test_nothing_is_taken_that_does_not_hold(sheet: Any) -> None:
    if accepted(write(sheet)) is not None:
        assert_holds(sheet)


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode()))
@example(b"\xff\xfe")
@example(b"\0")
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    assert accepted(raw) is None


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_what_looks_like_yaml_is_read_or_refused(text: str) -> None:
    if (policy := accepted(text)) is not None:
        assert_holds(plain(policy))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_slips_of_the_pen_are_refused_or_hold(data: st.DataObject) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 2))
        put = data.draw(st.text("0123456789.-:{}[],#'\"!&* \nabe", max_size=2))
        text = text[:at] + put + text[at + cut :]
    if (policy := accepted(text)) is not None:
        assert_holds(plain(policy))


@pytest.mark.parametrize("line", re.findall(r"(?m)^ *[\w-]+:.*\n", EXAMPLE.read_text("utf-8")))
def test_nothing_is_given_twice(line: str) -> None:
    text = EXAMPLE.read_text(encoding="utf-8").replace(line, line + line, 1)
    with pytest.raises(UserError, match="is given twice"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (tier("floor: 5"), "tiers.gold: floor, default and cap must not fall, got 5, 4, 8"),
        (tier("floor: 0"), "tiers.gold.floor: Input should be greater than or equal to 1 (got 0)"),
        (tier("floor: true"), "tiers.gold.floor: Input should be a valid integer (got True)"),
        (tier('floor: "2"'), "tiers.gold.floor: Input should be a valid integer (got '2')"),
        (tier("floor: 2.0"), "tiers.gold.floor: Input should be a valid integer (got 2.0)"),
        (tier("floor: 010"), "tiers.gold.floor: Input should be a valid integer (got '010')"),
        (tier("floor: 0x2"), "tiers.gold.floor: Input should be a valid integer (got '0x2')"),
        (tier("floor: 0:02"), "tiers.gold.floor: Input should be a valid integer (got '0:02')"),
        (tier("floors: 1"), "tiers.gold.floors: Extra inputs are not permitted"),
        (tier('price: "3"'), "tiers.gold.price: must be a number, got '3'"),
        (tier("price: true"), "tiers.gold.price: must be a number, got True"),
        (tier("price: -1"), "tiers.gold.price: Input should be greater than or equal to 0"),
        (tier("price: .nan"), "tiers.gold.price: must be a number, got '.nan'"),
        (tier("price: 1e999"), "holds what is no text or number"),
        (tier(f"quotas: [{{window: 1d, flops: 1{'0' * 400}}}]"),
         "quotas.0.flops: Input should be a finite number"),
        (tier("efforts: {low: 9}"), "tiers.gold: effort low 9 lies outside 1 to 8"),
        (tier("floor: 3, efforts: {low: 2}"), "tiers.gold: effort low 2 lies outside 3 to 8"),
        (tier("efforts: {low: 5}"), "effort medium (4) is shallower than low (5): give both"),
        (tier("efforts: {much: 5}"), "tiers.gold.efforts.much"),
        (tier("quotas: [{window: 1d}]"), "quotas.0: flops, tokens or both must be given"),
        (tier("quotas: [{window: 32d, tokens: 1}]"), "a window of 32d is longer than 31 days"),
        (tier("quotas: [{window: 1w, tokens: 1}]"), "quotas.0.window: String should match"),
        (tier("quotas: [{window: 1d, tokens: 0}]"), "quotas.0.tokens: Input should be greater"),
        (tier("quotas: [{window: 1d, flops: .inf}]"), "quotas.0.flops: Input should be a valid"),
        ("version: 1\ntiers: {}\n", "tiers: Dictionary should have at least 1 item"),
        ("tiers: {a: {default: 1, cap: 1}}\n", "version: Field required"),
        ("version: 2\ntiers: {a: {default: 1, cap: 1}}\n", "version: Input should be less than"),
        ("version: true\ntiers: {a: {default: 1, cap: 1}}\n", "version: Input should be a valid"),
        ("version: 1\ntiers: {a b: {default: 1, cap: 1}}\n", "tiers.a b.[key]"),
        ("version: 1\ntiers: {7: {default: 1, cap: 1}}\n", "this name is no text: put it into"),
        (whole("default_tier: iron"), "default_tier 'iron' is no tier: there are gold"),
        (whole("keys: {acme: {tier: iron}}"), "keys.acme.tier 'iron' is no tier: there are gold"),
        (whole("keys: {acme: {risks: [x]}}"),
         "keys.acme.risks 'x' is no risk class: there are none"),
        (whole("keys: {a/b: {}}"), "keys.a/b.[key]: String should match pattern"),
        (whole("risks: {high: {floor: 9}}"),
         "risk high needs 9 iterations, and no tier gives more than 8"),
        (whole("risks: {high: {floor: 4, escalation: {rule: kl, up_to: 3}}}"),
         "risk high escalates up to 3, below its own floor"),
        (whole("risks: {high: {escalation: {rule: kl, tolerance: 1%, threshold: 1}}}"),
         "tolerance names a calibrated threshold: leave it or threshold"),
        (whole("risks: {high: {escalation: {rule: kl, tolerance: much}}}"),
         "risks.high.escalation.tolerance: a tolerance is written 0.5% or 0.005, got 'much'"),
        (whole("risks: {high: {escalation: {rule: kl, tolerance: ''}}}"),
         "a tolerance is written 0.5% or 0.005, got ''"),
        (whole("risks: {high: {escalation: {rule: doubt}}}"), "escalation.rule: Input should be"),
        (whole("overload: [{waiting: 5, keep: 0.5}, {waiting: 5, keep: 0.2}]"),
         "overload: waiting must rise from step to step, and keep must fall"),
        (whole("overload: [{waiting: 5, keep: 0.5}, {waiting: 9, keep: 0.5}]"),
         "overload: waiting must rise from step to step, and keep must fall"),
        (whole("overload: [{waiting: 5, keep: 1}]"),
         "overload.0.keep: Input should be less than 1"),
        (whole("overload: [{waiting: 0, keep: 0.5}]"),
         "overload.0.waiting: Input should be greater"),
        ("version: 1\ntiers: {a: {default: 1, cap: 1}, b: {default: 9, cap: 9}}\nkeys: {k: {}}\n",
         "keys.k names no tier, and there is no default_tier"),
        ("version: 1\ntiers: {a: {default: 1, cap: 1}, b: {default: 9, cap: 9}}\ndefault_tier: a\n"
         "risks: {high: {floor: 2}}\nkeys: {k: {risks: [high]}}\n",
         "keys.k is of risk high, which needs 2 iterations, and of tier a, which gives 1 at most"),
        ("a: &x [1]\nb: *x\n", "aliases are not read"),
        ("a: !!python/object/apply:os.system [ls]\n", "tags are not read"),
        ("a: !!timestamp x\n", "tags are not read"),
        ("--- a\n--- b\n", "expected a single document"),
        ("", "settings: Input should be an object (got None)"),
        ("[" * 2000, "is nested too deeply"),
        ("{a: " * 2000, "is nested too deeply"),
        ('version: "\\ud800"\n', "holds what is no text or number"),
        ("version: 1" + "0" * 5000, "holds what is no text or number"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        parse(text)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("the policy p ")


def test_nested_aliases_are_never_unfolded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(UserError, match="aliases are not read"):
        parse("\n".join(lines))


def test_numbers_are_what_was_written() -> None:
    quota = "quotas: [{window: 1d, flops: 5e15, tokens: 2_000_000}]"
    one = parse(tier(f"price: 0.1, {quota}")).tiers["gold"]
    assert one.price == Decimal("0.1")
    assert (one.quotas[0].flops, one.quotas[0].tokens) == (5e15, 2_000_000)
    assert one.quotas[0].seconds == 86_400
    bar = "{rule: kl, threshold: .05}"
    escalation = parse(whole(f"risks: {{no: {{escalation: {bar}}}}}")).risks["no"].escalation
    assert escalation is not None
    assert escalation.threshold == 0.05


@pytest.mark.parametrize("told", ["0.5%", "0.005", "5e-3", "0.50%"])
def test_a_tolerance_is_spelled_as_checkpoints_do(told: str) -> None:
    bar = f"{{rule: kl, tolerance: '{told} agreement'}}"
    escalation = parse(whole(f"risks: {{high: {{escalation: {bar}}}}}")).risks["high"].escalation
    assert escalation is not None
    assert escalation.tolerance == "0.5% agreement"


def test_a_file_is_read_with_its_hash(tmp_path: Path) -> None:
    policy, sha256 = read_policy(EXAMPLE)
    assert sha256 == hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()
    assert list(policy.tiers) == ["bronze", "silver", "gold"]
    with pytest.raises(UserError, match=r"cannot read the policy .*: No such file"):
        read_policy(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"cannot read the policy .*: Is a directory"):
        read_policy(tmp_path)
    large = tmp_path / "large.yaml"
    large.write_bytes(EXAMPLE.read_bytes() + b"#" * MOST_BYTES)
    with pytest.raises(UserError, match="is larger than 4000000 bytes"):
        read_policy(large)
