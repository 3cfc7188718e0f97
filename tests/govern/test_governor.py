"""The governor: what it grants is held, settled once and recorded, and outlives the process."""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from rondo.errors import UserError
from rondo_govern.audit.log import AuditError
from rondo_govern.audit.reading import verify
from rondo_govern.governor import FileRules, Governor, Grant, Spent, Want
from rondo_govern.policy import Quota, read_policy
from rondo_govern.quotas import Ledger
from rondo_govern.reopening import open_log
from rondo_govern.rules import Decision, Denied, Seat
from rondo_govern.watch import Watched

NOON = 1_796_040_000.0
HOUR, DAY, MONTH = 3600, 86_400, 31 * 86_400
OPENED = {"format": 1, "server": "a test", "model": "tiny", "policy_sha256": None}
POLICY: dict[str, Any] = {
    "version": 1,
    "default_tier": "bronze",
    "tiers": {
        "bronze": {"default": 2, "cap": 4, "price": 0.1},
        "gold": {
            "floor": 2,
            "default": 4,
            "cap": 8,
            "price": 0.25,
            "quotas": [{"window": "1d", "flops": 2000, "tokens": 200}],
        },
    },
    "risks": {"high": {"floor": 6}},
    "keys": {"acme": {"tenant": "acme-corp", "tier": "gold"}, "beta": {"tenant": "acme-corp"}},
}


def bound(decision: Decision, want: Want) -> float:
    return 10.0 * decision.depth * (want.prompt_tokens + want.new_tokens)


@dataclass
class Office:
    """A governor's files and its clock; what dies leaves no last record."""

    folder: Path
    now: float = NOON
    told: list[str] = field(default_factory=list)
    governors: list[Governor] = field(default_factory=list)

    def write(self, **changes: Any) -> str:
        """Change the policy, and return its hash."""
        text = json.dumps(POLICY | changes)
        new = self.folder / "policy.new"
        new.write_text(text)
        new.replace(self.folder / "policy.yaml")
        return hashlib.sha256(text.encode()).hexdigest()

    def start(self, rules: type[FileRules] = FileRules, **how: Any) -> Governor:
        watched = Watched(self.folder / "policy.yaml", read_policy, self.told.append, every=0.0)
        ledger = Ledger(lambda: self.now)
        how = {"fsync": "off", "clock": lambda: self.now} | how
        log = open_log(self.path, ledger, self.now, OPENED, **how)
        governor = Governor(rules(watched), bound, ledger, log, "m" * 64, watched.value[1])
        self.governors.append(governor)
        return governor

    def die(self) -> None:
        log = self.governors.pop().log
        assert log is not None
        log.close()

    @property
    def path(self) -> Path:
        return self.folder / "audit.jsonl"

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Records of all files, whose chain must hold."""
        assert verify(self.path).findings == []
        files = [*sorted(self.folder.glob("audit.0*.jsonl")), self.path]
        lines = [line for file in files for line in file.read_text().splitlines()]
        found = [json.loads(line) for line in lines]
        return [record for record in found if kind in (None, record["kind"])]

    def kinds(self) -> list[str]:
        return [record["kind"] for record in self.records()]


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    found = Office(tmp_path)
    found.write()
    yield found
    while found.governors:
        found.die()


def want(id: str, prompt: int = 5, new: int = 5, key: str = "acme", **fields: Any) -> Want:
    facts = {"prompt_sha256": "p" * 64, "sampling": {"seed": 7}}
    return Want(id, prompt, new, key, facts=facts, **fields)


def spent(reason: str = "stop", flops: float = 123.5, **fields: Any) -> Spent:
    plain = {"depths": {3: 1, 4: 2}, "iterations": 31, "prompt_tokens": 5}
    return Spent(reason, flops=flops, **plain | fields)


def untaken() -> Spent:
    return Spent("untaken", prompt_tokens=5)


def standing(governor: Governor, key: str = "acme") -> tuple[int, int, int, int]:
    (one,) = governor.standing(key)[1]
    return one.flops, one.tokens, one.held_flops, one.held_tokens


def denial(governor: Governor, asked: Want) -> Denied:
    with pytest.raises(Denied) as caught:
        governor.grant([asked])
    return caught.value


def given(governor: Governor, asked: Want) -> Grant:
    (grant,) = governor.grant([asked])
    return grant


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Governor], Any]:
    """Return what fills the disk that a log is on; the result's `undo` frees it."""
    write = os.write

    def fill(governor: Governor) -> Any:
        log = governor.log
        assert log is not None

        def failing(file: int, line: bytes) -> int:
            # As a disk does: some of it fits.
            if file == log._file:
                return write(file, line[:3])
            return write(file, line)

        monkeypatch.setattr(os, "write", failing)
        return monkeypatch

    return fill


# ---- granting and settling


def test_an_answer_is_taken_and_ended_and_the_records_say_all_of_it(office: Office) -> None:
    governor = office.start()
    grant = given(governor, want("a", num_recurrences=20, risks=frozenset({"high"})))
    assert (grant.seat.tenant, grant.decision.depth, grant.decision.floor) == ("acme-corp", 8, 6)
    assert standing(governor) == (0, 0, 800, 10)
    governor.settle(grant, spent())
    assert standing(governor) == (124, 8, 0, 0)
    _, taken, ended = office.records()
    own = {
        "id": "a",
        "key": "acme",
        "tenant": "acme-corp",
        "tier": "gold",
        "risks": ["high"],
        "asked": 20,
        "effort": None,
        "allowed": 8,
        "floor": 6,
        "adjusted": ["cap"],
        "prompt_sha256": "p" * 64,
        "model_sha256": "m" * 64,
        "policy_sha256": office.write(),
    }
    held = {"reserved_flops": 800.0, "reserved_tokens": 10, "max_new_tokens": 5, "prompt_tokens": 5}
    assert taken | own | held | {"kind": "taken", "sampling": {"seed": 7}} == taken
    told = {"reason": "stop", "depths": {"3": 1, "4": 2}, "iterations": 31, "new_tokens": 3}
    assert ended | own | told | {"kind": "ended", "price": "0.00000775", "flops": 123.5} == ended


def test_prices_are_exact(office: Office) -> None:
    governor = office.start()
    for number in range(30):
        # 0.1 has no binary fraction: thirty of them as floats are not three.
        governor.settle(
            given(governor, want(f"{number}", key="beta")), spent(iterations=10**6 + number)
        )
    total = governor.totals()["acme-corp", "bronze"]
    assert total.price == Decimal("3.0000435")
    assert sum(Decimal(record["price"]) for record in office.records("ended")) == total.price
    assert [record["price"] for record in office.records("ended")][:2] == ["0.1", "0.1000001"]


def test_totals_are_sums_by_tenant_and_tier_of_what_was_answered(office: Office) -> None:
    governor = office.start()
    for key, more in (("acme", 0), ("beta", 1), ("beta", 2), ("nobody-knows", 3)):
        grant = given(governor, want(f"{key}-{more}", key=key))
        governor.settle(grant, spent(flops=1.0 + more, iterations=10 + more))
    governor.settle(given(governor, want("busy")), untaken())
    found = governor.totals()
    assert {who: total.answers for who, total in found.items()} == {
        ("acme-corp", "gold"): 1,
        ("acme-corp", "bronze"): 2,
        ("nobody-knows", "bronze"): 1,
    }
    beta = found["acme-corp", "bronze"]
    assert (beta.prompt_tokens, beta.new_tokens, beta.iterations, beta.flops) == (10, 6, 23, 5.0)
    assert beta.price == Decimal("0.0000023")
    # They are copies: nobody changes what is counted.
    beta.answers = 99
    assert governor.totals()["acme-corp", "bronze"].answers == 2


def test_what_the_engine_had_no_room_for_spends_nothing(office: Office) -> None:
    governor = office.start()
    governor.settle(given(governor, want("busy")), untaken())
    assert standing(governor) == (0, 0, 0, 0)
    (ended,) = office.records("ended")
    assert (ended["reason"], Decimal(ended["price"]), ended["new_tokens"]) == ("untaken", 0, 0)
    assert governor.totals() == {}


def test_a_grant_is_settled_once(office: Office) -> None:
    governor = office.start()
    grant = given(governor, want("a"))
    governor.settle(grant, spent())
    before = standing(governor), governor.totals(), office.kinds()
    with pytest.raises(KeyError):
        governor.settle(grant, spent())
    assert (standing(governor), governor.totals(), office.kinds()) == before


def test_threads_settle_each_grant_once_and_no_quota_is_overrun(office: Office) -> None:
    governor = office.start(rotate_bytes=20_000)
    denied: list[str] = []

    def ask(name: str) -> None:
        for number in range(12):
            try:
                grant = given(governor, want(f"{name}-{number}", 2, 1))
            except Denied as error:
                denied.append(error.code)
            else:
                # What is spent and held is never more than the quota, whoever looks.
                flops, tokens, held_flops, held_tokens = standing(governor)
                assert flops + held_flops <= 2000
                assert tokens + held_tokens <= 200
                governor.settle(grant, spent(flops=40.0, depths={4: 1}, prompt_tokens=2))

    threads = [threading.Thread(target=ask, args=(f"{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = Counter(record["id"] for record in office.records("taken"))
    ended = Counter(record["id"] for record in office.records("ended"))
    assert taken == ended
    assert set(taken.values()) == {1}
    assert set(denied) == {"quota_exceeded"}
    assert len(taken) + len(denied) == 96
    assert standing(governor) == (40 * len(taken), 3 * len(taken), 0, 0)
    assert governor.totals()["acme-corp", "gold"].answers == len(taken)


def test_refusals_are_counted_and_recorded(office: Office) -> None:
    governor = office.start()
    denied = denial(governor, want("long", new=400))
    assert (denied.status, denied.code) == (403, "quota_too_small")
    for key, code, status in (("acme", "quota_too_small", 403), ("beta", "busy", 429)) * 2:
        governor.refuse(key, code, status)
    assert governor.denied() == {
        ("acme-corp", "quota_too_small"): 2,
        ("acme-corp", "busy"): 2,
    }
    told = [(one["key"], one["tier"], one["code"]) for one in office.records("refused")]
    assert told == [("acme", "gold", "quota_too_small"), ("beta", "bronze", "busy")] * 2
    # Nothing was taken, so nothing is held.
    assert standing(governor) == (0, 0, 0, 0)
    assert office.records("taken") == []


def test_a_key_of_no_tier_is_refused_under_its_own_name(office: Office) -> None:
    office.write(default_tier=None)
    with pytest.raises(UserError):
        office.start()
    office.write(default_tier=None, keys={"acme": {"tier": "gold"}})
    governor = office.start()
    assert denial(governor, want("a", key="new")).code == "no_tier"
    with pytest.raises(Denied, match="key 'new' is of no tier"):
        governor.standing("new")
    governor.refuse("new", "no_tier", 403)
    (refused,) = office.records("refused")
    assert (refused["tenant"], refused["tier"]) == ("new", "")


def test_without_a_log_nothing_is_recorded_and_nothing_waits() -> None:
    class Same:
        sha256 = None

        def give(self, want: Want) -> tuple[Seat, Decision, Sequence[Quota]]:
            return Seat(want.key, want.key), Decision(3, 1), ()

    governor = Governor(Same(), bound)
    grant = given(governor, want("a"))
    governor.settle(grant, spent())
    governor.refuse("acme", "busy", 429)
    governor.durable()
    governor.close()
    assert grant.policy is None
    assert governor.totals()["acme", ""].iterations == 31


# ---- another policy


def test_another_policy_is_recorded_before_what_is_given_by_it(office: Office) -> None:
    governor = office.start()
    first = given(governor, want("a"))
    sha256 = office.write(tiers=POLICY["tiers"] | {"gold": {"default": 6, "cap": 6}})
    second = given(governor, want("b"))
    third = given(governor, want("c"))
    assert [one.decision.depth for one in (first, second, third)] == [4, 6, 6]
    assert second.policy == third.policy == sha256 != first.policy
    assert office.kinds() == ["opened", "taken", "policy", "taken", "taken"]
    (policy,) = office.records("policy")
    assert policy["policy_sha256"] == sha256
    # It ends under the policy under which it was let in.
    governor.settle(first, spent())
    assert office.records("ended")[0]["policy_sha256"] == first.policy
    assert office.records("ended")[0]["price"] == "0.00000775"


def test_a_refusal_tells_under_which_policy(office: Office) -> None:
    governor = office.start()
    sha256 = office.write(currency="EUR")
    governor.refuse("acme", "risk_beyond_tier", 403)
    assert office.kinds() == ["opened", "policy", "refused"]
    assert {one["policy_sha256"] for one in office.records()[1:]} == {sha256}


def test_an_invalid_policy_is_told_once_and_recorded_never(office: Office) -> None:
    governor = office.start()
    before = given(governor, want("a")).policy
    office.write(tiers={})
    assert [given(governor, want(f"{n}")).policy for n in range(3)] == [before] * 3
    assert len(office.told) == 1
    assert "policy" not in office.kinds()


def test_a_policy_that_changes_while_it_is_read_is_not_taken_for_the_one_before(
    office: Office,
) -> None:
    class Turning(FileRules):
        """Changes the file once it has given something."""

        turned = ""

        def give(self, want: Want) -> tuple[Seat, Decision, Sequence[Quota]]:
            given = super().give(want)
            if not self.turned:
                deeper = {"gold": {"default": 7, "cap": 7}}
                self.turned = office.write(tiers=POLICY["tiers"] | deeper)
            return given

    governor = office.start(Turning)
    grant = given(governor, want("a"))
    assert (grant.decision.depth, grant.policy) == (7, governor.rules.turned)  # type: ignore[attr-defined]


# ---- a disk that is full


def test_nothing_is_answered_or_held_while_the_log_cannot_be_written(
    office: Office, full: Callable[[Governor], Any]
) -> None:
    governor = office.start()
    held = given(governor, want("before"))
    disk = full(governor)
    denied = denial(governor, want("a"))
    assert (denied.status, denied.code, denied.retry_after) == (503, "no_audit", 5)
    assert "No space left on device" in str(denied.__cause__)
    # Whoever asks is not told of the operator's files.
    assert str(office.folder) not in str(denied)
    assert standing(governor)[2:] == (400, 10)
    disk.undo()
    # The same name may come again, and the log goes on as if nothing had been.
    governor.settle(given(governor, want("a")), spent())
    governor.settle(held, spent())
    assert office.kinds() == ["opened", "taken", "taken", "ended", "ended"]


def test_another_policy_that_could_not_be_recorded_is_so_with_the_next_request(
    office: Office, full: Callable[[Governor], Any]
) -> None:
    governor = office.start()
    sha256 = office.write(currency="EUR")
    disk = full(governor)
    assert denial(governor, want("a")).code == "no_audit"
    assert standing(governor) == (0, 0, 0, 0)
    disk.undo()
    assert given(governor, want("b")).policy == sha256
    assert office.kinds() == ["opened", "policy", "taken"]


def test_an_end_that_could_not_be_recorded_counts_all_the_same(
    office: Office, full: Callable[[Governor], Any]
) -> None:
    governor = office.start()
    grant = given(governor, want("a"))
    disk = full(governor)
    with pytest.raises(AuditError, match="No space left"):
        governor.settle(grant, spent())
    assert standing(governor) == (124, 8, 0, 0)
    assert governor.totals()["acme-corp", "gold"].answers == 1
    with pytest.raises(UserError, match="could not be ended in order: cannot write to"):
        governor.close()
    disk.undo()
    office.governors.clear()
    # The next start ends it, and counts what it held.
    again = office.start()
    assert [record["reason"] for record in office.records("ended")] == ["lost"]
    assert standing(again) == (400, 10, 0, 0)


def test_an_end_that_could_not_be_recorded_is_so_before_anything_else(
    office: Office, full: Callable[[Governor], Any]
) -> None:
    governor = office.start(fsync="each")
    first, second = given(governor, want("a")), given(governor, want("b"))
    disk = full(governor)
    for grant in (first, second):
        with pytest.raises(AuditError):
            governor.settle(grant, spent())
    with pytest.raises(AuditError, match="No space left"):
        governor.durable()
    assert denial(governor, want("c")).code == "no_audit"
    disk.undo()
    given(governor, want("d"))
    told = [(one["kind"], one.get("id")) for one in office.records()][3:]
    assert told == [("ended", "a"), ("ended", "b"), ("taken", "d")]
    governor.durable()
    # Nothing of it is lost, or counted twice.
    office.die()
    assert standing(office.start()) == (2 * 124 + 400, 2 * 8 + 10, 0, 0)
    assert [one["id"] for one in office.records("ended") if one["reason"] == "lost"] == ["d"]


# ---- several answers to one request


def test_the_answers_of_a_request_are_granted_together_or_not_at_all(office: Office) -> None:
    governor = office.start()
    # Any one of them fits.
    several = [want(f"a-{n}", 5, 35, num_recurrences=2) for n in range(3)]
    with pytest.raises(Denied, match="may take 2400 FLOPs, and key acme may spend 2000"):
        governor.grant(several)
    assert standing(governor) == (0, 0, 0, 0)
    assert office.kinds() == ["opened"]
    several = [want(f"b-{n}", 5, 5 + n, num_recurrences=2) for n in range(3)]
    grants = governor.grant(several)
    assert [grant.want.id for grant in grants] == ["b-0", "b-1", "b-2"]
    assert standing(governor) == (0, 0, 20 * 33, 33)
    assert [one["reserved_tokens"] for one in office.records("taken")] == [10, 11, 12]
    for grant in grants:
        governor.settle(grant, spent())
    assert standing(governor) == (3 * 124, 3 * 8, 0, 0)


def test_where_the_disk_fills_up_between_two_answers_none_is_granted(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    governor = office.start()
    log, write = governor.log, os.write
    assert log is not None
    room = iter([True, False, True, True])

    def failing(file: int, line: bytes) -> int:
        if file == log._file and not next(room):
            return write(file, line[:3])
        return write(file, line)

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(Denied) as caught:
        governor.grant([want("a-0"), want("a-1")])
    assert caught.value.code == "no_audit"
    assert standing(governor) == (0, 0, 0, 0)
    given(governor, want("b"))
    told = [(one["kind"], one.get("id"), one.get("reason")) for one in office.records()][1:]
    assert told == [("taken", "a-0", None), ("ended", "a-0", "untaken"), ("taken", "b", None)]
    assert governor.totals() == {}


# ---- a restart


def test_a_restart_counts_what_was_spent_and_ends_once_what_was_in_flight(office: Office) -> None:
    governor = office.start(rotate_bytes=900)
    governor.settle(given(governor, want("ended")), spent())
    governor.settle(given(governor, want("busy")), untaken())
    office.now += HOUR
    flying = [given(governor, want(f"flying-{n}", 5 + n, 3, num_recurrences=2)) for n in range(2)]
    before = standing(governor)
    assert before == (124, 8, 20 * 8 + 20 * 9, 17)
    office.die()

    office.now += HOUR
    again = office.start()
    # What they held counts as spent: dying makes no quota larger.
    assert standing(again) == (before[0] + before[2], before[1] + before[3], 0, 0)
    lost = [one for one in office.records("ended") if one["reason"] == "lost"]
    assert [one["id"] for one in lost] == ["flying-0", "flying-1"]
    for one, grant in zip(lost, flying, strict=True):
        zeros = {"iterations": 0, "new_tokens": 0, "cached_tokens": 0, "flops": 0.0, "price": "0"}
        same = {"key": "acme", "tenant": "acme-corp", "tier": "gold", "allowed": 2, "asked": 2}
        told = {"prompt_tokens": grant.want.prompt_tokens, "seed": 7, "policy_sha256": grant.policy}
        assert one | zeros | same | told | {"depths": {}, "output_sha256": None} == one
    # They are no answers of this process.
    assert again.totals() == {}
    office.die()

    for _ in range(2):
        kinds = office.kinds()
        third = office.start()
        assert standing(third) == standing(again)
        assert office.kinds() == [*kinds, "opened"]
        third.close()
        office.governors.pop()


def test_a_quota_that_was_spent_before_a_restart_is_spent_after_it(office: Office) -> None:
    governor = office.start()
    governor.settle(given(governor, want("a", 50, 20, num_recurrences=1)), spent(flops=1900.0))
    assert denial(governor, want("b")).code == "quota_exceeded"
    office.die()
    again = office.start()
    denied = denial(again, want("b"))
    assert (denied.status, denied.code) == (429, "quota_exceeded")
    assert given(again, want("c", key="beta")).decision.depth == 2


@pytest.mark.parametrize(
    ("later", "left"), [(DAY - 1, 0), (DAY, 0), (MONTH, 0), (2 * MONTH, 0), (60, 124)]
)
def test_what_was_spent_in_another_window_does_not_count(
    office: Office, later: int, left: int
) -> None:
    governor = office.start()
    governor.settle(given(governor, want("a")), spent())
    office.die()
    office.now += later
    assert standing(office.start())[0] == left


def test_what_an_answer_took_counts_where_it_was_let_in_also_after_a_restart(
    office: Office,
) -> None:
    midnight = NOON - NOON % DAY
    office.now = midnight - 120
    governor = office.start()
    grant = given(governor, want("a"))
    office.now = midnight + 60
    governor.settle(grant, spent())
    here = standing(governor)
    office.die()
    assert standing(office.start()) == here == (0, 0, 0, 0)


def test_a_torn_last_line_is_cut_off_and_told(office: Office) -> None:
    governor = office.start()
    given(governor, want("a"))
    office.die()
    with office.path.open("ab") as file:
        file.write(b'{"adjusted":[],"all')
    office.start()
    assert [one["cut"] for one in office.records("opened")] == [0, 19]
    assert office.kinds() == ["opened", "taken", "opened", "ended"]


@pytest.mark.parametrize("altered", ["id", "rotated"])
def test_a_damaged_log_is_not_continued(office: Office, altered: str) -> None:
    governor = office.start(rotate_bytes=700)
    for number in range(4):
        governor.settle(given(governor, want(f"a-{number}")), spent())
    office.die()
    path = office.path if altered == "id" else office.folder / "audit.000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"key":"acme"', b'"key":"beta"', 1))
    whole = {file.name: file.read_bytes() for file in office.folder.glob("audit*.jsonl")}
    with pytest.raises(UserError, match="altered") as caught:
        office.start()
    assert "\n" not in str(caught.value)
    # It is left as it is, and nobody holds it.
    assert {file.name: file.read_bytes() for file in office.folder.glob("audit*.jsonl")} == whole
    with pytest.raises(UserError, match="altered"):
        office.start()


def test_two_processes_do_not_write_to_one_log(office: Office) -> None:
    governor = office.start()
    with pytest.raises(UserError, match="another process writes to the audit log"):
        office.start()
    given(governor, want("a"))
    assert office.kinds() == ["opened", "taken"]


def test_an_end_in_order_is_recorded(office: Office) -> None:
    governor = office.start()
    governor.close()
    office.governors.clear()
    assert office.kinds() == ["opened", "closed"]
    with pytest.raises(AuditError):
        governor.refuse("acme", "late", 503)
