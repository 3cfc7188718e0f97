"""Policy, quotas and audit log put together: what stands between a request and an engine.

The same object stands in front of the embedded server and of the gateway. A request is granted
before anything is computed for it, and settled exactly once, however it ended.
"""

import contextlib
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

from rondo.errors import UserError
from rondo_govern.audit.log import AuditError, AuditLog
from rondo_govern.efforts import Effort
from rondo_govern.policy import Policy, Quota, Tier
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
        waiting: Requests that found no room.
        exits: Whether its tokens may leave the loop early by a rule of its own.
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
    exits: bool = False
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
        unmetered: Whether nobody knows what it took: then all that it held counts as spent.
    """

    reason: str
    depths: Mapping[int, int] = field(default_factory=dict)
    iterations: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    flops: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    unmetered: bool = False

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

    def tier_of(self, key: str) -> Tier:
        """Return the tier of whoever asks with a key.

        Raises:
            Denied: It is of none.
        """
        policy = self.policy
        return policy.tiers[seat_of(policy, key).tier]

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
        policy: SHA-256 of the policy that the log knows of; the one in force unless given.
    """

    def __init__(
        self,
        rules: Rules,
        bound: Bound,
        ledger: Ledger | None = None,
        log: AuditLog | None = None,
        model: str = "",
        policy: str | None = None,
    ):
        self.rules, self.log, self._model = rules, log, model
        self.ledger = ledger or Ledger()
        self._bound = bound
        self._lock = threading.Lock()
        # Ends that are not in the log yet; no answer begins before they are.
        self._unwritten: deque[dict[str, Any]] = deque()
        self._writing = threading.RLock()
        self._sha256 = policy or rules.sha256
        self._totals: dict[tuple[str, str], Totals] = defaultdict(Totals)
        self._denied: Counter[tuple[str, str]] = Counter()

    def grant(self, wants: Sequence[Want]) -> list[Grant]:
        """Give the answers of a request their depth, and hold what they may spend: all, or none.

        Args:
            wants: What is asked for; of one request, so alike in all that decides.

        Raises:
            Denied: They are given nothing, now or ever.
        """
        policy, (seat, decision, quotas) = self._given(wants[0])
        grants = [Grant(want, seat, decision, policy) for want in wants]
        holds = {grant.want.id: self._held(grant) for grant in grants}
        self.ledger.reserve(holds, seat.key, quotas)
        recorded: list[Grant] = []
        try:
            self._note(policy)
            for grant in grants:
                flops, tokens = holds[grant.want.id]
                held = {"reserved_flops": flops, "reserved_tokens": tokens}
                self._append("taken", **self._told(grant), **held, **grant.want.facts)
                recorded.append(grant)
        except BaseException as error:
            for grant in grants:
                self.ledger.settle(grant.want.id, 0.0, 0)
            for grant in recorded:
                with contextlib.suppress(AuditError):
                    self._end(grant, Spent("untaken"))
            if not isinstance(error, AuditError):
                raise
            # Why is for the operator: it names files of his.
            raise Denied(
                "nothing is answered while the audit log cannot be written: tell the operator",
                status=503,
                code="no_audit",
                retry_after=5,
            ) from error
        return grants

    def settle(self, grant: Grant, spent: Spent) -> None:
        """Take note of what an answer took, once for each grant.

        Raises:
            AuditError: It could not be recorded yet; it is before anything else is, and quotas and
                totals know it already.
        """
        took = self._held(grant) if spent.unmetered else (spent.flops, spent.tokens)
        self.ledger.settle(grant.want.id, *took)
        # What the engine had no room for is no answer.
        if spent.reason != "untaken":
            with self._lock:
                total = self._totals[grant.seat.tenant, grant.seat.tier]
                total.answers += 1
                total.prompt_tokens += spent.prompt_tokens
                total.new_tokens += spent.new_tokens
                total.iterations += spent.iterations
                total.flops += spent.flops
                total.price += grant.price_of(spent.iterations)
        self._end(grant, spent)

    def _held(self, grant: Grant) -> tuple[float, int]:
        """Return the FLOPs and tokens that an answer can take at most."""
        want = grant.want
        return self._bound(grant.decision, want), want.prompt_tokens + want.new_tokens

    def _end(self, grant: Grant, spent: Spent) -> None:
        told = {
            "reason": spent.reason,
            "depths": {str(depth): spent.depths[depth] for depth in sorted(spent.depths)},
            "iterations": spent.iterations,
            "prompt_tokens": spent.prompt_tokens or grant.want.prompt_tokens,
            "cached_tokens": spent.cached_tokens,
            "new_tokens": spent.new_tokens,
            "flops": spent.flops,
            "price": format(grant.price_of(spent.iterations), "f"),
            "prompt_sha256": grant.want.facts.get("prompt_sha256"),
        }
        if spent.unmetered:
            told["unmetered"] = True
        self._append("ended", **{**self._told(grant), **told, **spent.facts})

    def refuse(self, key: str, code: str, status: int) -> None:
        """Take note of a request with a good key that was refused."""
        policy = self.rules.sha256
        try:
            policy, (seat, *_) = self._given(Want("", 0, 0, key))
        except Denied:
            seat = Seat(key, key)
        with self._lock:
            self._denied[seat.tenant, code] += 1
        self._note(policy)
        told = {"key": seat.key, "tenant": seat.tenant, "tier": seat.tier, "policy_sha256": policy}
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
        """Wait until all that has ended is recorded and on the disk, where that is waited for.

        Raises:
            AuditError: It cannot be recorded.
        """
        if self.log is not None:
            self._write()
            self.log.durable(self.log.head.seq)

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

    def note(self, kind: str, **fields: Any) -> None:
        """Record what changed, as keys that took effect.

        Raises:
            AuditError: It could not be recorded.
        """
        self._append(kind, **fields)

    def _append(self, kind: str, **fields: Any) -> None:
        """Record something, after all ends that could not be before; an end is kept until it can.

        Raises:
            AuditError: It could not be recorded.
        """
        if self.log is None:
            return
        with self._writing:
            if kind == "ended":
                self._unwritten.append(fields)
            self._write()
            if kind != "ended":
                self.log.append(kind, **fields)

    def _write(self) -> None:
        with self._writing:
            while self._unwritten:
                assert self.log is not None
                self.log.append("ended", **self._unwritten[0])
                self._unwritten.popleft()

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
