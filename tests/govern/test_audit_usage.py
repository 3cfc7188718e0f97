"""Totals are those of the records, to the last digit of a price."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from audit_logs import START
from hypothesis import given
from hypothesis import strategies as st

from rondo.errors import ProofError, UserError
from rondo_govern.audit.commands import run_usage
from rondo_govern.audit.log import AuditLog
from rondo_govern.audit.usage import GROUPS, parse_groups, table, usage
from rondo_govern.settings import AuditUsageConfig

DAY = 86_400.0
MODEL = "ab" * 32


def ended(**fields: Any) -> dict[str, Any]:
    told = {"kind": "ended", "seq": 1, "time": "2026-11-30T12:00:00.000Z", "key": "acme"}
    told |= {"tenant": "acme", "tier": "gold", "risks": [], "reason": "stop", "depths": {"4": 2}}
    told |= {"iterations": 20, "prompt_tokens": 3, "cached_tokens": 1, "new_tokens": 2}
    told |= {"flops": 1e9, "price": "0.00002", "model_sha256": MODEL}
    return told | fields


def refused(**fields: Any) -> dict[str, Any]:
    told = {"kind": "refused", "seq": 2, "time": "2026-11-30T12:00:00.000Z", "key": "acme"}
    return told | {"tenant": "acme", "tier": "gold", "code": "quota", "status": 429} | fields


def test_totals_are_those_of_the_records() -> None:
    records = [
        ended(),
        ended(depths={"8": 1, "12": 3}, iterations=50, new_tokens=4, flops=2e9, price="0.1"),
        refused(),
        ended(reason="lost", depths={}, new_tokens=0, iterations=0, flops=0.0, price="0"),
        ended(reason="untaken", flops=7e9, price="9"),
        ended(reason="cancelled", depths={}, new_tokens=0, iterations=3, flops=1.0, price="0"),
        {"kind": "taken", "seq": 9, "id": "a-1"},
        ended(tenant="zoo"),
    ]
    acme, zoo = usage(records, ["tenant"])
    assert acme.group == {"tenant": "acme"}
    assert (acme.answers, acme.refused, acme.lost) == (3, 1, 1)
    assert (acme.prompt_tokens, acme.cached_tokens, acme.new_tokens) == (9, 3, 6)
    assert (acme.iterations, acme.flops) == (73, 3e9 + 1)
    assert acme.mean_depth == (4 * 2 + 8 + 12 * 3) / 6
    assert acme.max_depth == 12
    assert acme.price == Decimal("0.10002")
    assert (zoo.answers, zoo.refused, zoo.price) == (1, 0, Decimal("0.00002"))


def test_every_group_has_its_name() -> None:
    records = [
        {"kind": "opened", "seq": 1, "model_sha256": MODEL},
        ended(risks=["legal", "medical"], key="k1", time="2026-12-01T00:00:00.000Z"),
        refused(key="k2"),
    ]
    one, two = usage(records, GROUPS)
    names = {"tenant": "acme", "tier": "gold", "model": MODEL}
    assert one.group == {**names, "key": "k1", "risk": "legal+medical", "day": "2026-12-01"}
    assert two.group == {**names, "key": "k2", "risk": "", "day": "2026-11-30"}
    assert [found.group["risk"] for found in usage(records, ["risk"])] == ["", "legal+medical"]


def test_requests_count_when_they_end() -> None:
    days = [ended(time=f"2026-11-{day}T00:00:00.000Z") for day in (28, 29, 30)]
    noon = 1_796_000_000.0 - 1_796_000_000.0 % DAY
    since, until = noon - DAY, noon
    assert [one.group["day"] for one in usage(days, ["day"], since, until)] == ["2026-11-29"]


@given(st.lists(st.decimals(0, 10**9, places=12, allow_nan=False), min_size=1, max_size=30))
def test_prices_are_added_exactly(prices: list[Decimal]) -> None:
    units = sum(int(price.scaleb(12)) for price in prices)
    [found] = usage([ended(price=format(price, "f")) for price in prices], ["tenant"])
    assert int(found.price.scaleb(12)) == units
    assert Decimal(found.told()["price"]) == found.price


@pytest.mark.parametrize(
    "bad",
    [{"price": "much"}, {"depths": []}, {"depths": {"x": 1}}, {"flops": "1"}, {"tenant": None}],
    ids=str,
)
def test_a_record_that_tells_too_little_is_named(bad: dict[str, Any]) -> None:
    told = ended(seq=7, **bad)
    if bad == {"tenant": None}:
        del told["tenant"]
    with pytest.raises(ProofError, match="record 7 does not tell what one of its kind, ended"):
        usage([told], ["tenant"])


def test_a_table_is_aligned() -> None:
    found = usage([ended(), refused(tenant="a-long-name", tier="")], ["tenant", "tier"])
    assert table(found, ["tenant", "tier"]) == [
        "tenant       tier  answers  refused  lost  prompt  cached  new  iterations  mean depth"
        "  max depth  FLOPs    price",
        "a-long-name  -           0        1     0       0       0    0           0           -"
        "          0      0        0",
        "acme         gold        1        0     0       3       1    2          20        4.00"
        "          4  1e+09  0.00002",
    ]


@pytest.mark.parametrize("text", ["", "tenant,", "colour", "tenant,tenant"])
def test_what_cannot_be_summed_up_by_is_refused(text: str) -> None:
    with pytest.raises(
        UserError, match="name some of tenant, tier, key, risk, model, day, each once"
    ):
        parse_groups(text)


def test_the_command_reads_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "audit.jsonl"
    moments = iter([START, START + 1, START + DAY, START + DAY + 1])
    log = AuditLog.open(path, fsync="off", clock=lambda: next(moments))
    for number in range(2):
        log.append("taken", id=f"a-{number}")
        fields = {name: value for name, value in ended().items() if name not in ("kind", "seq")}
        log.append("ended", id=f"a-{number}", **fields)
    log.close()
    run_usage(AuditUsageConfig(log=str(path), json_output=True))
    [told] = json.loads(capsys.readouterr().out)
    assert told == {
        "tenant": "acme", "tier": "gold", "answers": 2, "refused": 0, "lost": 0,
        "prompt_tokens": 6, "cached_tokens": 2, "new_tokens": 4, "iterations": 40,
        "generated_iterations": 16, "max_depth": 4, "flops": 2e9, "price": "0.00004",
        "mean_depth": 4.0,
    }  # fmt: skip
    run_usage(AuditUsageConfig(log=str(path), by="day", since="2026-12-01"))
    assert capsys.readouterr().out.splitlines()[1].startswith("2026-12-01        1")
    with pytest.raises(UserError, match="is no day or moment"):
        run_usage(AuditUsageConfig(log=str(path), until="soon"))


def test_totals_of_a_log_that_was_altered_are_not_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog.open(path, fsync="off")
    for _ in range(3):
        log.append("ended", **{name: value for name, value in ended().items() if name != "kind"})
    log.close()
    path.write_bytes(path.read_bytes()[::-1].replace(b"20000.0", b"10000.0", 1)[::-1])
    with pytest.raises(ProofError, match="line 3: altered"):
        run_usage(AuditUsageConfig(log=str(path)))
    assert capsys.readouterr().out == ""
