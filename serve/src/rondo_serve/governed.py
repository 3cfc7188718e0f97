"""A governor in front of the engine: what `rondo serve` is given as policy, keys and audit log."""

import hashlib
import importlib.metadata
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rondo.errors import UserError
from rondo.flops import Costs
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.exits_recurrent import ExitRule
from rondo.modeling.generation_recurrent import calibrated
from rondo_govern.audit.log import AuditError
from rondo_govern.audit.records import digest_of
from rondo_govern.explain import check_model
from rondo_govern.governor import (
    Bound,
    FileRules,
    Governor,
    Spent,
    Want,
)
from rondo_govern.keys import Keyring, read_keyring
from rondo_govern.policy import Escalation, Policy, Quota, read_policy
from rondo_govern.quotas import Ledger
from rondo_govern.reopening import open_log
from rondo_govern.rules import Decision, Seat
from rondo_govern.watch import Watched
from rondo_serve.config import GovernanceConfig, ListenConfig, bytes_of
from rondo_serve.policy import Allowed, Limits
from rondo_serve.requests import Ask, Ending, Load, Receipt, Refused

LOGGER = logging.getLogger("rondo_serve.governed")
Ruling = Callable[[Escalation], ExitRule]
Sheets = tuple[FileRules | None, Watched[tuple[Keyring, str]] | None]


@dataclass(frozen=True)
class PlainRules:
    """The server's own bounds, alike for everyone, where there is no policy.

    Attributes:
        limits: The bounds.
        sha256: There is no policy to hash.
    """

    limits: Limits
    sha256: str | None = None

    def give(self, want: Want) -> tuple[Seat, Decision, Sequence[Quota]]:
        """Return the depth that is asked for.

        Raises:
            Refused: It does not lie within the bounds, or a risk class is named.
        """
        if want.risks:
            message = "there is no policy here, and no risk class: leave it or ask another server"
            raise Refused(message, "risk")
        depth = self.limits.depth_of(want.num_recurrences, want.effort)
        return Seat(want.key, want.key), Decision(depth, self.limits.floor), ()


@dataclass(frozen=True)
class Governed:
    """The policy of an engine: a governor asked for each request, and told what it took.

    Attributes:
        governor: Who grants and settles.
        ruling: Makes an exit of an escalation.
        texts: Whether the log keeps prompts and answers as tokens, not their hashes alone.
    """

    governor: Governor
    ruling: Ruling
    texts: bool = False

    def allow(self, asks: Sequence[Ask], load: Load) -> list[Allowed]:
        """Return what the answers of a request are given.

        Raises:
            Refused: They are given nothing.
            Denied: Likewise, by policy or quota.
        """
        grants = self.governor.grant([self._want(ask, load) for ask in asks])
        try:
            return [
                Allowed(grant.decision.depth, exit_of(ask.exit, grant.decision, self.ruling), grant)
                for ask, grant in zip(asks, grants, strict=True)
            ]
        except BaseException:
            for grant in grants:
                self.governor.settle(grant, Spent("untaken"))
            raise

    def _want(self, ask: Ask, load: Load) -> Want:
        return Want(
            id=ask.id,
            prompt_tokens=len(ask.prompt),
            new_tokens=ask.max_new_tokens,
            key=ask.key,
            risks=ask.risks,
            num_recurrences=ask.num_recurrences,
            effort=ask.effort,
            waiting=load.left_over,
            exits=ask.exit is not None,
            facts=self._facts(ask),
        )

    def _facts(self, ask: Ask) -> dict[str, Any]:
        """Return what the log tells of a request; hashing it for no log would be wasted."""
        if self.governor.log is None:
            return {}
        sampling = ask.sampling
        facts: dict[str, Any] = {
            "prompt_sha256": digest_of(ask.prompt),
            "exit": told_of(ask.exit),
            "stop": list(ask.stop),
            "sampling": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "seed": sampling.seed,
                "repetition_penalty": sampling.repetition_penalty,
            },
        }
        if self.texts:
            facts["prompt"] = list(ask.prompt)
        return facts

    def spent(self, ask: Ask, reason: Ending, receipt: Receipt) -> None:
        """Take note of what a request took.

        Where that cannot be recorded it is kept until it can, and nothing is granted before.
        """
        facts: dict[str, Any] = {}
        # On the engine's thread, too, so nothing is hashed for no log.
        if self.governor.log is not None:
            facts = {
                "seed": ask.sampling.seed,
                "exit": told_of(receipt.exit),
                "output_sha256": digest_of(receipt.tokens),
                "queued": round(receipt.queued, 6),
                "seconds": round(receipt.seconds, 6),
            }
            if self.texts:
                facts["output"] = list(receipt.tokens)
        settle(self.governor, reason, receipt, facts)


def settle(
    governor: Governor,
    ending: Ending,
    receipt: Receipt,
    facts: dict[str, Any],
    unmetered: bool = False,
) -> None:
    """Tell a governor what an answer took; an end that cannot be recorded yet is logged.

    Args:
        governor: Who granted it.
        ending: How it ended.
        receipt: What it took.
        facts: What the audit log tells of it besides.
        unmetered: Whether nobody knows what it took.
    """
    assert receipt.grant is not None
    spent = Spent(
        reason=ending,
        depths=receipt.depths,
        iterations=receipt.iterations,
        prompt_tokens=receipt.prompt_tokens,
        cached_tokens=receipt.cached_tokens,
        flops=receipt.flops,
        facts=facts,
        unmetered=unmetered,
    )
    try:
        governor.settle(receipt.grant, spent)
    except AuditError as error:
        LOGGER.error("the end of %s could not be recorded: %s", receipt.grant.want.id, error)


def exit_of(own: ExitRule | None, decision: Decision, ruling: Ruling) -> ExitRule | None:
    """Return when tokens leave the loop: by the risk class, or the request's own, not too early."""
    rule = own if decision.own_exit else None
    if decision.escalation is not None:
        rule = ruling(decision.escalation)
    if rule is None:
        return None
    return replace(rule, min_recurrences=max(rule.min_recurrences, decision.floor))


def told_of(rule: ExitRule | None) -> dict[str, Any] | None:
    """Return an exit as the log tells it."""
    if rule is None:
        return None
    return {
        "rule": rule.criterion,
        "threshold": rule.threshold,
        "min_recurrences": rule.min_recurrences,
        "check_every": rule.check_every,
    }


def ruling_of(shape: RecurrentConfig) -> Ruling:
    """Return what makes an exit of an escalation, with the model's calibrated thresholds."""

    def ruling(escalation: Escalation) -> ExitRule:
        if escalation.threshold is not None:
            return ExitRule(escalation.rule, escalation.threshold)
        return calibrated(shape, escalation.rule, escalation.tolerance)

    return ruling


def bound_of(costs: Costs) -> Bound:
    """Return what tells how many FLOPs a request can take at most."""

    def bound(decision: Decision, want: Want) -> float:
        read = want.prompt_tokens + want.new_tokens - 1
        flops = read * costs.generation_flops(decision.depth, want.prompt_tokens, want.new_tokens)
        if decision.escalation is not None or want.exits:
            # Each check may run the coda and the head.
            flops += read * decision.depth * costs.finish_flops(read)
        return flops

    return bound


@dataclass(frozen=True)
class Governance:
    """What a server is governed by.

    Attributes:
        limits: Its own bounds.
        governor: Who grants and settles.
        rules: The policy, or None.
        keys: Who may ask, or None for anyone.
    """

    limits: Limits
    governor: Governor
    rules: FileRules | None = None
    keys: Watched[tuple[Keyring, str]] | None = None

    @classmethod
    def plain(cls, limits: Limits) -> "Governance":
        """Return that of a server without policy, keys and log."""
        return cls(limits, Governor(PlainRules(limits), lambda decision, want: 0.0))

    def limits_of(self, key: str) -> Limits:
        """Return the bounds of whoever asks with a key.

        Raises:
            Denied: The key is of no tier.
        """
        if self.rules is None:
            return self.limits
        tier = self.rules.tier_of(key)
        return Limits(tier.default, tier.cap, tier.floor, tier.depths)

    @property
    def waits(self) -> bool:
        """Whether an answer ends only once its record is on the disk."""
        log = self.governor.log
        return log is not None and log.fsync == "each"

    def note_keys(self, keys: tuple[Keyring, str]) -> None:
        """Take note of keys that took effect."""
        try:
            self.governor.note("keys", keys_sha256=keys[1])
        except AuditError as error:
            LOGGER.error("other keys could not be recorded: %s", error)

    def refuse(self, key: str, code: str, status: int) -> None:
        """Take note of a request that was refused."""
        try:
            self.governor.refuse(key, code, status)
        except AuditError as error:
            LOGGER.error("a refusal could not be recorded: %s", error)


def sheets_of(config: GovernanceConfig, limits: Limits, shape: RecurrentConfig) -> Sheets:
    """Read policy and keys, before anything that takes long.

    Raises:
        UserError: One of them does not hold, or does not go with the model.
    """

    def policy(path: Path) -> tuple[Policy, str]:
        found, sha256 = read_policy(path)
        check_model(found, limits.cap, shape.exit_rules or {}, shape.exit_gate)
        if config.keys is None and found.tier_of_all is None:
            raise UserError(
                f"the policy {path} names no default_tier, and without --keys nobody has another"
            )
        return found, sha256

    def watched(path: str, load: Callable[[Path], Any]) -> Watched[Any]:
        # The loop asks, and a file of many keys takes seconds.
        return Watched(Path(path), load, LOGGER.warning, waits=False)

    rules = FileRules(watched(config.policy, policy)) if config.policy else None
    keys = watched(config.keys, read_keyring) if config.keys else None
    return rules, keys


def govern(
    config: ListenConfig,
    limits: Limits,
    costs: Costs,
    sheets: Sheets,
    about: dict[str, Any],
) -> Governance:
    """Open the log, restore quotas, and put all together.

    Args:
        config: What it is governed by, and which model is served.
        limits: The server's own bounds.
        costs: What the model costs.
        sheets: Policy and keys.
        about: What the log tells of the server besides.

    Raises:
        UserError: The log is damaged, another process has it, or it cannot be written.
    """
    rules, keys = sheets
    ledger, log, sha256 = Ledger(), None, ""
    policy = None if rules is None else rules.sha256
    if config.audit is not None:
        directory = Path(config.model)
        if Path(config.audit).resolve().parent == directory.resolve():
            raise UserError(
                f"--audit {config.audit} lies in the model's own directory, whose files are hashed "
                "to tell which model answered: give another"
            )
        sha256 = fingerprint(directory)
        opened = {
            "format": 1,
            "server": f"rondo-serve {importlib.metadata.version('rondo-serve')}",
            "model": config.model_name,
            "model_sha256": sha256,
            "policy_sha256": policy,
            "currency": "" if rules is None else rules.policy.currency,
            **about,
        }
        log = open_log(
            Path(config.audit),
            ledger,
            time.time(),
            opened,
            fsync=config.audit_fsync,
            interval=config.audit_seconds,
            rotate_bytes=bytes_of(config.audit_rotate),
        )
    given = rules or PlainRules(limits)
    governor = Governor(given, bound_of(costs), ledger, log, sha256, policy)
    governance = Governance(limits, governor, rules, keys)
    if keys is not None:
        keys.changed = governance.note_keys
    return governance


def fingerprint(directory: Path) -> str:
    """Return the SHA-256 of a checkpoint: of the names and hashes of its files, in order."""
    whole = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        with path.open("rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {own}\n".encode())
    return whole.hexdigest()


def told(governance: Governance, config: GovernanceConfig) -> Collection[str]:
    """Return what the operator is told of it."""
    lines = []
    if (rules := governance.rules) is not None:
        policy = rules.policy
        lines.append(
            f"policy {config.policy} ({rules.sha256[:12]}): tiers {', '.join(policy.tiers)}"
            + (f"; risk classes {', '.join(policy.risks)}" if policy.risks else "")
        )
    if governance.keys is not None:
        lines.append(f"keys {config.keys}: asked of whoever comes")
    if (log := governance.governor.log) is not None:
        lines.append(f"audit log {config.audit}: record {log.head.seq:,}, fsync {log.fsync}")
    return lines
