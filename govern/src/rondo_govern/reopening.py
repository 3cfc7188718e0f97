"""An audit log that goes on after a restart: quotas restored, and what was left open ended."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rondo.errors import UserError
from rondo_govern.audit.log import AuditError, AuditLog
from rondo_govern.audit.reading import Broken, read
from rondo_govern.audit.records import moment_of
from rondo_govern.policy import LONGEST_WINDOW
from rondo_govern.quotas import Ledger


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
        try:
            left = list(restore(path, ledger, now))
        except (LookupError, TypeError, ValueError) as error:
            raise AuditError(f"a record lacks what this version writes ({error!r})") from error
        log.append("opened", **opened, cut=log.cut)
        for taken in left:
            log.append("ended", **lost(taken))
    except (AuditError, Broken) as error:
        log.close()
        raise UserError(f"the audit log {path} cannot be continued: {error}") from error
    return log
