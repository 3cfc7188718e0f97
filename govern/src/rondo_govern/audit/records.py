"""What a log is made of: records, their lines and hashes, and the names of its files.

A record is one line of canonical JSON. It names the hash of the record before, and its own hash
covers that, so that no line can change unless all that follow do.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rondo.errors import UserError

Record = dict[str, Any]

GENESIS = "0" * 64
"""What the first record names in place of a hash."""
HASH = re.compile(r"[0-9a-f]{64}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)


class Head(NamedTuple):
    """The last record of a log, or one that is known to be in it.

    Attributes:
        seq: Its number, counted from 1 over all files.
        hash: Its hash.
    """

    seq: int = 0
    hash: str = GENESIS


def canonical(record: Mapping[str, Any]) -> bytes:
    """Return the one way in which a record is written.

    Raises:
        ValueError: It holds a number that is not finite.
    """
    text = json.dumps(
        record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    # Half of a surrogate pair has no UTF-8; as JSON's escape it is read back as what it was.
    return text.encode("utf-8", "backslashreplace")


def sealed(fields: Mapping[str, Any]) -> tuple[str, bytes]:
    """Return the hash of a record, and its line."""
    # As a reader will see it: there the keys of mappings are texts, and sort as such.
    record: Record = json.loads(json.dumps(fields, allow_nan=False))
    record["hash"] = hashlib.sha256(canonical(record)).hexdigest()
    return record["hash"], canonical(record) + b"\n"


def record_of(line: bytes) -> Record:
    """Return the record that a line holds.

    Raises:
        ValueError: Its bytes are not those that were written.
    """
    try:
        record = json.loads(line.decode())
        same = canonical(record) + b"\n" == line
    except (ValueError, RecursionError) as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(record, dict) or not _is_record(record):
        raise ValueError("it is no record of an audit log")
    # What the hash covers: all but itself. That it stood elsewhere too, it would have to foresee.
    rest = line[:-1].replace(b'"hash":"%b",' % record["hash"].encode(), b"", 1)
    if not same or hashlib.sha256(rest).hexdigest() != record["hash"]:
        raise ValueError("its hash is that of another text")
    return record


def _is_record(record: Record) -> bool:
    seq, hashes = record.get("seq"), (record.get("prev"), record.get("hash"))
    try:
        moment_of(record)
    except (KeyError, TypeError, ValueError):
        return False
    return (
        type(seq) is int
        and seq > 0
        and isinstance(record.get("kind"), str)
        and all(isinstance(one, str) and HASH.fullmatch(one) for one in hashes)
    )


def digest_of(ids: Iterable[int]) -> str:
    """Return the SHA-256 of token ids, written as decimal numbers with blanks between."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


# ---- time


def text_of(moment: float) -> str:
    """Return seconds since 1970 as records tell them."""
    told = datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
    return told.replace("+00:00", "Z")


def moment_of(record: Mapping[str, Any]) -> float:
    """Return when a record was written, in seconds since 1970.

    Raises:
        ValueError: It does not tell its time as records do.
    """
    if not TIME.fullmatch(record["time"]):
        raise ValueError(f"{record['time']!r} is no time of a record")
    return datetime.fromisoformat(record["time"]).timestamp()


def parse_moment(text: str) -> float:
    """Return what a person wrote as seconds since 1970, UTC unless it says otherwise.

    Raises:
        UserError: It is neither a day nor a moment.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(
            f"{text!r} is no day or moment: write 2026-11-30 or 2026-11-30T12:00:00Z"
        ) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


# ---- files


def head_path(log: Path) -> Path:
    """Return the file that tells up to which record a log is known to be on the disk."""
    return log.with_name(f"{log.name}.head")


def segment_path(log: Path, number: int) -> Path:
    """Return the file that a log's active file is renamed to."""
    return log.with_name(f"{log.stem}.{number:06d}{log.suffix}")


def segments_of(log: Path) -> dict[Path, int]:
    """Return the files that were rotated out of a log with their numbers, oldest first."""
    pattern = re.compile(rf"{re.escape(log.stem)}\.([0-9]{{6,18}}){re.escape(log.suffix)}")
    found = {path: pattern.fullmatch(path.name) for path in log.parent.glob("*")}
    numbers = {path: int(match[1]) for path, match in found.items() if match}
    return dict(sorted(numbers.items(), key=lambda item: (item[1], item[0])))
