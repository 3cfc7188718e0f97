"""Reads a log and holds each line against the one before; a log of any length in little memory."""

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from rondo.errors import ProofError, UserError
from rondo_govern.audit.records import (
    HASH,
    Head,
    Record,
    head_path,
    moment_of,
    record_of,
    segments_of,
)

# A line that is longer is none of ours, and no reason to fill the memory.
LONGEST = 1 << 26
LONGEST_HEAD = 1000
# Findings that are told, and gaps that are remembered; more are counted.
MOST = 1000


@dataclass(frozen=True)
class Finding:
    """What is wrong with a log.

    Attributes:
        file: Name of the file.
        line: The line in it that is to blame, or before which others are missing; None where it is
            the whole file, or its end.
        seq: Number of the record, None where it cannot be known.
        what: What is wrong: one word, and the reason.
    """

    file: str
    line: int | None
    seq: int | None
    what: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{where}: {self.what}"


class Broken(ProofError):
    """A log that is not what was written.

    Attributes:
        finding: The first thing that is wrong.
    """

    def __init__(self, finding: Finding):
        super().__init__(str(finding))
        self.finding = finding


class Chain:
    """Takes the lines of a log in order, and tells what does not follow from those before.

    Args:
        log: The log's active file.
        head: A record that must be there, None if nobody can tell.
        begun: Whether the log is read from its first record on; else any may be the first.
        anchor: Hash of a record that must be there, or be the one before the first.

    Attributes:
        anchored: Number of that record, None until it was found.
        last: The last record that was in its place.
        torn: Bytes of an incomplete last line.
        records: Records that were in their place, or after a gap.
        segments: Files that were read.
    """

    def __init__(self, log: Path, head: Head | None, begun: bool = True, anchor: str | None = None):
        self.last = Head()
        self.anchored: int | None = None
        self.torn = self.records = self.segments = 0
        self._log, self._head, self._begun, self._anchor = log, head, begun, anchor
        # Lines since the last good one whose numbers cannot be trusted.
        self._unknown = 0
        self._gaps: list[range] = []
        # The file before, until this one's first record was read.
        self._file = self._before = ""
        self._at = ("", 0)

    def take(self, file: str, line: int, raw: bytes) -> tuple[Record | None, list[Finding]]:
        """Take a line, and return its record, if it is one, and what is wrong."""
        if file != self._file:
            self._before, self._file = self._file, file
            self.segments += 1
        try:
            record = record_of(raw)
            seq = record["seq"]
            if self._begun and record["prev"] == self.last.hash and seq != self.last.seq + 1:
                raise ValueError(f"it follows record {self.last.seq} and says it is {seq}")
        except ValueError as error:
            self._unknown += 1
            return None, [Finding(file, line, None, f"altered: {error}")]
        if seq <= self.last.seq:
            return None, [Finding(file, line, seq, self._told_again(seq))]
        if not self.last.seq and record["prev"] == self._anchor:
            # What came before was put away, and its end is vouched for.
            self._begun, self.anchored = False, seq - 1
        elif record["hash"] == self._anchor:
            self.anchored = seq
        found = [*self._missed(seq, line), *self._unlinked(record, line)]
        if not found and not self._unknown:
            found = list(self._misfiled(record, line))
        self.last, self._at = Head(seq, record["hash"]), (file, line)
        self._begun, self._unknown, self._before = True, 0, ""
        self.records += 1
        return record, found

    def end(self) -> Iterator[Finding]:
        """Yield what is missing at the end."""
        if self._anchor and self.anchored is None:
            what = f"missing: a record with the hash {self._anchor}"
            yield Finding(self._log.name, None, None, what)
        if self._head is None:
            if self.last.seq:
                what = "missing: without it nobody can tell whether lines lack at the log's end"
                yield Finding(head_path(self._log).name, None, None, what)
        elif self._head.seq > (reach := self.last.seq + self._unknown):
            what = f"missing at its end: {_numbers(reach + 1, self._head.seq)}"
            yield Finding(self._file or self._log.name, None, reach + 1, what)

    def _told_again(self, seq: int) -> str:
        if any(seq in gap for gap in self._gaps):
            return f"reordered: record {seq} stands after record {self.last.seq}"
        return f"duplicated: record {seq} was there before"

    def _missed(self, seq: int, line: int) -> Iterator[Finding]:
        reach = self.last.seq + self._unknown + 1
        if self._begun and seq > reach:
            if len(self._gaps) < MOST:
                self._gaps.append(range(self.last.seq + 1, seq))
            what = f"missing: {_numbers(reach, seq - 1)} should stand before it"
            yield Finding(self._file, line, reach, what)

    def _unlinked(self, record: Record, line: int) -> Iterator[Finding]:
        seq, last = record["seq"], self.last
        if self._begun and seq == last.seq + 1 and record["prev"] != last.hash:
            file, blamed = self._at if last.seq else (self._file, line)
            what = f"altered, and its hash with it: record {seq} was written after another text"
            yield Finding(file, blamed, last.seq or seq, what)
        if self._head and seq == self._head.seq and record["hash"] != self._head.hash:
            what = f"altered, and its hash with it: {head_path(self._log).name} tells another"
            yield Finding(self._file, line, seq, what)

    def _misfiled(self, record: Record, line: int) -> Iterator[Finding]:
        """Yield what is wrong with where a file ends and the next one begins."""
        goes_on, told = record["kind"] == "continued", record.get("previous")
        if goes_on != bool(self._before) and self.last.seq:
            what = "reordered: it does not stand in the file in which it was written"
            yield Finding(self._file, line, record["seq"], what)
        elif self._before and told != self._before:
            what = f"renamed: it goes on from {told!r} and stands after {self._before}"
            yield Finding(self._file, line, record["seq"], what)


def _numbers(first: int, last: int) -> str:
    return f"record {first}" if first == last else f"records {first} to {last}"


# ---- a whole log


def read(path: Path, since: float | None = None) -> Iterator[Record]:
    """Yield the records of a log, oldest first, and check them on the way.

    Args:
        path: The log's active file.
        since: Files that ended before are left out, and need not be there, in seconds since 1970.
            Records of the first file that is read may be older.

    Raises:
        Broken: A line is altered, missing, duplicated or reordered. One that was altered together
            with its hash is known only at the line after it.
        UserError: There is no such log, or it cannot be read.
    """
    must_exist(path)
    left, begun = skipped(path, since)
    chain = Chain(path, read_head(path), begun)
    for record, findings in walk(chain, path, left):
        if findings:
            raise Broken(findings[0])
        if record is not None:
            yield record


@dataclass
class Verdict:
    """Whether a log is whole and unaltered.

    Attributes:
        findings: What is wrong, the first ones.
        found: How much is wrong.
        records: Records that are there.
        segments: Files that they are in.
        first: Number of the first one, 0 if there is none.
        head: The last one.
        anchor: Number of the record whose hash had been noted elsewhere, None if it was not found.
        torn: Bytes of an incomplete last line, as a crash leaves one.
    """

    findings: list[Finding] = field(default_factory=list)
    found: int = 0
    records: int = 0
    segments: int = 0
    first: int = 0
    head: Head = field(default_factory=Head)
    anchor: int | None = None
    torn: int = 0

    def blame(self, findings: Iterable[Finding]) -> None:
        """Take note of what is wrong."""
        for finding in findings:
            self.found += 1
            if len(self.findings) < MOST:
                self.findings.append(finding)


def verify(path: Path, head: str | None = None) -> Verdict:
    """Read a whole log, and tell all that is wrong with it.

    Args:
        path: The log's active file.
        head: Hash of a record that must be there, or be the one before the first, as it was noted
            elsewhere.

    Raises:
        UserError: There is no such log, or it cannot be read.
    """
    must_exist(path)
    verdict, known = Verdict(), Head()
    try:
        # With a hash from elsewhere the file beside the log need not be there.
        known = read_head(path) or (Head() if head else None)
    except Broken as error:
        verdict.blame([error.finding])
    chain = Chain(path, known, anchor=head)
    for record, findings in walk(chain, path):
        verdict.blame(findings)
        if record is not None:
            verdict.first = verdict.first or record["seq"]
    verdict.records, verdict.segments = chain.records, chain.segments
    verdict.head, verdict.torn, verdict.anchor = chain.last, chain.torn, chain.anchored
    return verdict


def check_end(path: Path) -> Chain:
    """Check the active file of a log, and that it goes on from the file before.

    Raises:
        Broken: It does not.
        UserError: It cannot be read.
    """
    segments = list(segments_of(path))
    chain = Chain(path, read_head(path), begun=not segments)
    found: list[Finding] = []
    if segments:
        with opened(segments[-1]) as file:
            [(line, raw)] = deque(lines_of(file), maxlen=1) or [(1, b"")]
        _, found = chain.take(segments[-1].name, line, raw)
    for _, findings in walk(chain, path, segments):
        if found := [*found, *findings]:
            raise Broken(found[0])
    return chain


# ---- files


def read_head(path: Path) -> Head | None:
    """Return the record up to which a log is known to be on the disk, None if no file tells.

    Raises:
        Broken: The file does not tell it.
    """
    where = head_path(path)
    try:
        with opened(where) as file:
            told = json.loads(file.read(LONGEST_HEAD).decode())
        head = Head(told["seq"], told["hash"])
        if type(head.seq) is not int or head.seq < 0 or not HASH.fullmatch(head.hash):
            raise ValueError("it is no head")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Broken(Finding(where.name, 1, None, "altered: it is no head of a log")) from error
    return head


def walk(
    chain: Chain, path: Path, left: Iterable[Path] = ()
) -> Iterator[tuple[Record | None, list[Finding]]]:
    """Yield the records of a log and what is wrong with each; what is missing at the end is last.

    Args:
        chain: Takes them.
        path: The log's active file.
        left: Files that are not read.

    Raises:
        UserError: It cannot be read.
    """
    for file in files_of(path, left):
        of = Path(file.name)
        for line, raw in lines_of(file):
            if of == path and len(raw) < LONGEST and not raw.endswith(b"\n"):
                chain.torn = len(raw)
            else:
                yield chain.take(of.name, line, raw)
    yield None, list(chain.end())


def lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers."""
    return enumerate(iter(partial(file.readline, LONGEST), b""), 1)


def must_exist(path: Path) -> None:
    """Refuse a log that is not there.

    Raises:
        UserError: Neither it nor anything that was beside it is there.
    """
    if not (path.exists() or head_path(path).exists() or segments_of(path)):
        raise UserError(f"there is no audit log {path}")


def files_of(path: Path, left: Iterable[Path] = ()) -> Iterator[BinaryIO]:
    """Yield the files of a log, oldest first, also while a server rotates them."""
    done = set(left)
    while True:
        for segment in segments_of(path):
            if segment not in done:
                done.add(segment)
                with opened(segment) as file:
                    yield file
        try:
            active = opened(path)
        except FileNotFoundError:
            active = None
        with active or nullcontext():
            # It may just have been renamed, and is then read under its number.
            if segments_of(path).keys() <= done:
                if active is not None:
                    yield active
                return


def skipped(path: Path, since: float | None) -> tuple[list[Path], bool]:
    """Return the files of a log that ended before a moment, and whether the log must be whole.

    A file ended before if another began before; and what was put away did, if any began before.
    """
    files = [*segments_of(path), path]
    for number in range(len(files) - 1, -1, -1):
        if since is not None and _began(files[number]) <= since:
            return files[:number], False
    return [], True


def _began(path: Path) -> float:
    try:
        with opened(path) as file:
            return moment_of(record_of(file.readline(LONGEST)))
    except (FileNotFoundError, ValueError):
        return math.inf


def opened(path: Path) -> BinaryIO:
    """Open a file to read it.

    Raises:
        FileNotFoundError: It is not there.
        UserError: It cannot be read.
    """
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
