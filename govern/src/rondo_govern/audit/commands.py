"""`rondo audit verify` and `rondo audit usage`."""

import json
from pathlib import Path

from rondo.errors import ProofError, UserError
from rondo_govern.audit.reading import Verdict, read, verify
from rondo_govern.audit.records import HASH, parse_moment
from rondo_govern.audit.usage import parse_groups, table, usage
from rondo_govern.settings import AuditUsageConfig, AuditVerifyConfig

# More findings are a count.
TOLD = 20


def run_verify(config: AuditVerifyConfig) -> None:
    """Tell whether a log is whole and unaltered.

    Raises:
        ProofError: It is not.
        UserError: There is no such log.
    """
    if config.head is not None and not HASH.fullmatch(config.head):
        raise UserError(f"--head {config.head!r} is no hash: it has 64 digits of 0-9 and a-f")
    verdict = verify(Path(config.log), config.head)
    if verdict.findings:
        raise ProofError("\n".join([f"{config.log} is not what was written", *blamed(verdict)]))
    print("\n".join(praised(verdict)))


def blamed(verdict: Verdict) -> list[str]:
    """Return what is wrong with a log, line by line."""
    lines = [f"  {finding}" for finding in verdict.findings[:TOLD]]
    if verdict.found > TOLD:
        lines.append(f"  and {verdict.found - TOLD:,} more")
    return lines


def praised(verdict: Verdict) -> list[str]:
    """Return what is told of a log that is as it was written."""
    records = "1 record" if verdict.records == 1 else f"{verdict.records:,} records"
    files = "1 file" if verdict.segments == 1 else f"{verdict.segments:,} files"
    seq, last = verdict.head
    lines = [f"{records} in {files}, whole and unaltered; head {last} (seq {seq:,})"]
    if verdict.anchor is not None:
        lines.append(f"the hash that was noted is that of record {verdict.anchor:,}")
    if verdict.torn:
        lines.append(
            f"an incomplete last line of {verdict.torn:,} bytes: a crash; the next start cuts it "
            "off"
        )
    return lines


def run_usage(config: AuditUsageConfig) -> None:
    """Tell what was used.

    Raises:
        ProofError: The log is not what was written.
        UserError: There is no such log, or nothing to sum up by.
    """
    by = parse_groups(config.by)
    since = None if config.since is None else parse_moment(config.since)
    until = None if config.until is None else parse_moment(config.until)
    found = usage(read(Path(config.log), since), by, since, until)
    if config.json_output:
        print(json.dumps([one.told() for one in found], indent=2, ensure_ascii=False))
    else:
        print("\n".join(table(found, by)))
