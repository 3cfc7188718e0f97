"""Audit logs for tests: written by the log, read and forged by means of the standard library."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rondo_govern.audit.log import AuditLog

START = 1_796_000_000.0


def filled(folder: Path, records: int = 40, rotate_bytes: int = 3000, **fields: Any) -> Path:
    """Write a log, close it, and return its active file."""
    path = folder / "audit.jsonl"
    clock = itertools.count(START, 60.0).__next__
    log = AuditLog.open(path, fsync="off", rotate_bytes=rotate_bytes, clock=clock)
    for number in range(records):
        log.append("taken" if number % 2 else "ended", id=f"a-{number}", depth=number, **fields)
    log.close()
    return path


def files_of(path: Path) -> list[Path]:
    return [*sorted(path.parent.glob("audit.0*.jsonl")), path]


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def line_of(record: dict[str, Any]) -> bytes:
    """Return a record as a line, with a hash that fits."""
    record = {name: value for name, value in record.items() if name != "hash"}
    record["hash"] = hashlib.sha256(plain(record)).hexdigest()
    return plain(record) + b"\n"


def plain(record: dict[str, Any]) -> bytes:
    told = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return told.encode()


def follows(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """Return the records of lines that must be a chain."""
    records, before = [json.loads(line) for line in lines], "0" * 64
    for number, (line, record) in enumerate(zip(lines, records, strict=True), 1):
        assert (record["seq"], record["prev"]) == (number, before)
        assert line_of(record) == line
        before = record["hash"]
    return records
