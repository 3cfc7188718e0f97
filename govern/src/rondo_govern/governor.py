"""Policy, quotas and audit log put together: what stands between a request and an engine.

The same object stands in front of the embedded server and of the gateway. A request is granted
before anything is computed for it, and settled exactly once, however it ended.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from rondo.errors import UserError
from rondo_govern.audit.log import AuditError, AuditLog
from rondo_govern.audit.reading import Broken, read
from rondo_govern.audit.records import moment_of
from rondo_govern.efforts import Effort
from rondo_govern.policy import LONGEST_WINDOW, Policy, Quota
from rondo_govern.quotas import Ledger, Standing
from rondo_govern.rules import Case, Decision, Denied, Seat, decide, seat_of
from rondo_govern.watch import Watched

PER = 1_000_000


@dataclass(frozen=True)
class Want:
    """One answer that is asked for.

    Attributes:
        id: Its name.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Most tokens of the answer.
        key: Name of the key, empty where none is asked for.
        risks: Risk classes that the request itself names.
        num_recurrences: Depth asked for.
        effort: Depth asked for in OpenAI's words, where no number is given.
        waiting: Requests in the queue.
        facts: What the log tells of it besides, as the prompt's hash.
    """

    id: str
    prompt_tokens: int
    new_tokens: int
    key: str = ""
    risks: frozenset[str] = frozenset()
    num_recurrences: int | None = None
    effort: Effort | None = None
    waiting: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spent:
    """What an answer took, as the engine counted it.

    Attributes:
        reason: How it ended.
        depths: How many generated tokens took how many iterations.
        iterations: Iterations of all tokens that were read.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Those of them whose keys and values were there already.
        flops: FLOPs executed.
        facts: What the log tells of it besides, as the answer's hash.
    """

    reason: str
    depths: Mapping[int, int] = field(default_factory=dict)
    iterations: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    flops: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def new_tokens(self) -> int:
        """Tokens generated."""
        return sum(self.depths.values())

    @property
    def tokens(self) -> int:
        """Tokens that quotas count: of the prompt and generated, none of what was never begun."""
        return self.prompt_tokens + self.new_tokens if self.iterations else 0


@dataclass(frozen=True)
class Grant:
    """What an answer was given.

    Attributes:
        want: What was asked for.
        seat: Whose it is.
        decision: How deep.
        policy: SHA-256 of the policy that said so, None where there is none.
    """

    want: Want
    seat: Seat
    decision: Decision
    policy: str | None = None

    def price_of(self, iterations: int) -> Decimal:
        """Return what so many iterations cost, exactly."""
        return self.decision.price * iterations / PER


class Rules(Protocol):
    """Who says how deep."""

    @property
    def sha256(self) -> str | None:
        """Hash of the policy in force, None where there is none."""

    def give(self, want: Want) -> tuple[Seat, Decision, Sequence[Quota]]:
        """Return whose a request is, what it is given, and the quotas that bound it.

        Raises:
            Denied: It is given nothing.
        """


class FileRules:
    """A policy file, read again whenever it changes.

    Args:
        watched: The policy with its hash.
    """

    def __init__(self, watched: Watched[tuple[Policy, str]]):
        self.watched = watched

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.watched.value[0]

    @property
    def sha256(self) -> str:
        """Its hash."""
        return self.watched.value[1]

    def give(self, want: Want) -> tuple[Seat, Decision, Sequence[Quota]]:
        """Return whose a request is, what it is given, and the quotas that bound it.

        Raises:
            Denied: It is given nothing.
        """
        policy = self.policy
        seat = seat_of(policy, want.key)
        case = Case(
            seat.tier, seat.risks | want.risks, want.num_recurrences, want.effort, want.waiting
        )
        return seat, decide(policy, case), policy.tiers[seat.tier].quotas


Bound = Callable[[Decision, Want], float]


@dataclass
class Totals:
    """What a tenant took in a tier since the start."""

    answers: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    iterations: int = 0
    flops: float = 0.0
    price: Decimal = Decimal(0)


class Governor:
    """Grants and settles answers; all methods may be called from any thread.

    Args:
        rules: Who says how deep.
        bound: Most FLOPs that a want can take.
        ledger: What keys spent.
        log: Where it is recorded, or None.
        model: SHA-256 of the model.
    """

    def __init__(
        self,
        rules: Rules,
        bound: Bound,
        ledger: Ledger | None = None,
        log: AuditLog | None = None,
        model: str = "",
    ):
        self.rules, self.log, self._model = rules, log, model
        self.ledger = ledger or Ledger()
        self._bound = bound
        self._lock = threading.Lock()
        self._sha256 = rules.sha256
        self._totals: dict[tuple[str, str], Totals] = defaultdict(Totals)
        self._denied: Counter[tuple[str, str]] = Counter()

    def grant(self, want: Want) -> Grant:
        """Give an answer its depth, and hold what it may spend.

        Raises:
            Denied: It is given nothing, now or ever.
        """
        policy, (seat, decision, quotas) = self._given(want)
        grant = Grant(want, seat, decision, policy)
        flops = self._bound(decision, want)
        tokens = want.prompt_tokens + want.new_tokens
        self.ledger.reserve(want.id, seat.key, quotas, flops, tokens)
        held = {"reserved_flops": flops, "reserved_tokens": tokens}
        try:
            self._note(policy)
            self._append("taken", **self._told(grant), **held, **want.facts)
        except AuditError as error:
            self.ledger.settle(want.id, 0.0, 0)
            # Why is for the operator: it names files of his.
            raise Denied(
                "nothing is answered while the audit log cannot be written: tell the operator",
                status=503,
                code="no_audit",
                retry_after=5,
            ) from error
        return grant

    def settle(self, grant: Grant, spent: Spent) -> None:
        """Take note of what an answer took, once for each grant.

        Raises:
            AuditError: It could not be recorded; quotas and totals know it all the same.
        """
        self.ledger.settle(grant.want.id, spent.flops, spent.tokens)
        price = grant.price_of(spent.iterations)
        # What the engine had no room for is no answer.
        if spent.reason != "untaken":
            with self._lock:
                total = self._totals[grant.seat.tenant, grant.seat.tier]
                total.answers += 1
                total.prompt_tokens += spent.prompt_tokens
                total.new_tokens += spent.new_tokens
                total.iterations += spent.iterations
                total.flops += spent.flops
                total.price += price
        told = {
            "reason": spent.reason,
            "depths": {str(depth): spent.depths[depth] for depth in sorted(spent.depths)},
            "iterations": spent.iterations,
            "prompt_tokens": spent.prompt_tokens,
            "cached_tokens": spent.cached_tokens,
            "new_tokens": spent.new_tokens,
            "flops": spent.flops,
            "price": format(price, "f"),
            "prompt_sha256": grant.want.facts.get("prompt_sha256"),
        }
        self._append("ended", **{**self._told(grant), **told, **spent.facts})

    def refuse(self, key: str, code: str, status: int) -> None:
        """Take note of a request with a good key that was refused."""
        try:
            seat, *_ = self.rules.give(Want("", 0, 0, key))
        except Denied:
            seat = Seat(key, key)
        with self._lock:
            self._denied[seat.tenant, code] += 1
        told = {"key": seat.key, "tenant": seat.tenant, "tier": seat.tier}
        self._append("refused", **told, code=code, status=status)

    def standing(self, key: str) -> tuple[Seat, list[Standing]]:
        """Return whose a key is, and what it has spent of its quotas.

        Raises:
            Denied: It is of no tier.
        """
        seat, _, quotas = self.rules.give(Want("", 0, 0, key))
        return seat, self.ledger.standing(seat.key, quotas)

    def totals(self) -> dict[tuple[str, str], Totals]:
        """Return what each tenant took in each tier since the start."""
        with self._lock:
            return {who: Totals(**vars(total)) for who, total in self._totals.items()}

    def denied(self) -> dict[tuple[str, str], int]:
        """Return how many requests of each tenant were refused, by code."""
        with self._lock:
            return dict(self._denied)

    def durable(self) -> None:
        """Wait until all that was recorded is on the disk, where the operator wants to wait."""
        if self.log is not None:
            self.log.durable(self.log.head[0])

    def close(self) -> None:
        """End the log in order.

        Raises:
            UserError: It could not be; the next start cuts off what is not whole.
        """
        if self.log is None:
            return
        try:
            try:
                self._append("closed")
            finally:
                self.log.close()
        except AuditError as error:
            raise UserError(f"the audit log could not be ended in order: {error}") from error

    def _given(self, want: Want) -> tuple[str | None, tuple[Seat, Decision, Sequence[Quota]]]:
        """Return what a want is given, after the hash of the policy that says so.

        Raises:
            Denied: It is given nothing.
        """
        while True:
            sha256, given = self.rules.sha256, self.rules.give(want)
            # Where the file was read again in between, nobody knows which of the two it was.
            if self.rules.sha256 == sha256:
                return sha256, given

    def _note(self, sha256: str | None) -> None:
        """Record the policy in force where it is a new one.

        Raises:
            AuditError: It could not be recorded; the next request tries again.
        """
        with self._lock:
            if sha256 != self._sha256:
                self._append("policy", policy_sha256=sha256)
                self._sha256 = sha256

    def _append(self, kind: str, **fields: Any) -> None:
        if self.log is not None:
            self.log.append(kind, **fields)

    def _told(self, grant: Grant) -> dict[str, Any]:
        want, seat, decision = grant.want, grant.seat, grant.decision
        return {
            "id": want.id,
            "key": seat.key,
            "tenant": seat.tenant,
            "tier": seat.tier,
            "risks": list(decision.risks),
            "asked": want.num_recurrences,
            "effort": want.effort,
            "allowed": decision.depth,
            "floor": decision.floor,
            "adjusted": list(decision.adjusted),
            "prompt_tokens": want.prompt_tokens,
            "max_new_tokens": want.new_tokens,
            "policy_sha256": grant.policy,
            "model_sha256": self._model,
        }


def restore(path: Path, ledger: Ledger, now: float) -> Iterator[dict[str, Any]]:
    """Tell a ledger what the log says was spent, and yield the requests that never ended.

    They were in flight when the process died. What they held counts as spent, so that dying makes
    no quota larger; so it does where an answer's end says that nobody knows what it took.

    Raises:
        UserError: The log is damaged.
    """
    taken: dict[str, dict[str, Any]] = {}
    for record in read(path, since=now - LONGEST_WINDOW):
        if record["kind"] == "taken":
            taken[record["id"]] = record
        elif record["kind"] == "ended" and (begun := taken.pop(record["id"], None)) is not None:
            if record["reason"] == "lost" or record.get("unmetered"):
                hold(ledger, begun)
            elif record["iterations"]:
                tokens = record["prompt_tokens"] + record["new_tokens"]
                ledger.restore(record["key"], moment_of(begun), record["flops"], tokens)
    for begun in taken.values():
        hold(ledger, begun)
        yield begun


def hold(ledger: Ledger, taken: Mapping[str, Any]) -> None:
    """Count all that a request might have spent."""
    held = taken["reserved_flops"], taken["reserved_tokens"]
    ledger.restore(taken["key"], moment_of(taken), *held)


def lost(taken: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the record that ends a request whose process died."""
    own = ("id", "key", "tenant", "tier", "risks", "asked", "effort", "allowed", "floor")
    told = {name: taken[name] for name in (*own, "adjusted", "prompt_sha256", "policy_sha256")}
    nothing = {"iterations": 0, "cached_tokens": 0, "new_tokens": 0, "flops": 0.0, "price": "0"}
    return {
        **told,
        **nothing,
        "reason": "lost",
        "depths": {},
        "prompt_tokens": taken["prompt_tokens"],
        "model_sha256": taken["model_sha256"],
        "seed": taken.get("sampling", {}).get("seed"),
        "output_sha256": None,
    }


def open_log(
    path: Path, ledger: Ledger, now: float, opened: Mapping[str, Any], **how: Any
) -> AuditLog:
    """Open a log, restore quotas from it, and end what a dead process left open.

    Args:
        path: The log.
        ledger: Whose quotas are restored.
        now: Seconds since 1970.
        opened: What the first record of this process tells.
        how: Of `AuditLog.open`.

    Raises:
        UserError: It is damaged, another process has it, or it cannot be written.
    """
    log = AuditLog.open(path, **how)
    try:
        left = list(restore(path, ledger, now))
        log.append("opened", **opened, cut=log.cut)
        for taken in left:
            log.append("ended", **lost(taken))
    except (AuditError, Broken) as error:
        log.close()
        raise UserError(f"the audit log {path} cannot be continued: {error}") from error
    return log
