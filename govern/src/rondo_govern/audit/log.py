"""Writes the log: one writer, whole lines only, and a record is on the disk when it is said to be.

A line is handed to the system at once, so that a killed process loses none. A thread brings lines
to the disk in groups, and then notes in a file beside the log how far it reached.
"""

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

from rondo.errors import UserError
from rondo_govern.audit.reading import Broken, check_end
from rondo_govern.audit.records import Head, head_path, sealed, segment_path, segments_of, text_of

Fsync = Literal["each", "interval", "off"]


class AuditError(Exception):
    """A record that could not be kept: one sentence."""


class AuditLog:
    """A log that is written to; all methods may be called from any thread.

    Args:
        path: The active file.
        fsync: When a record must be on the disk: each before `durable` returns, all within an
            interval, or whenever the system likes.
        interval: Seconds of that interval.
        rotate_bytes: Size from which on the active file is renamed, and another begun.
        clock: Tells seconds since 1970.

    Attributes:
        fsync: When a record must be on the disk.
        cut: Bytes of an incomplete last line that were cut off at the start.
    """

    def __init__(
        self,
        path: Path,
        fsync: Fsync,
        interval: float,
        rotate_bytes: int,
        clock: Callable[[], float],
    ):
        self._path, self.fsync, self._clock = path, fsync, clock
        self._rotate_bytes = rotate_bytes
        self._pause = interval if fsync == "interval" else 0.0
        self._changed = threading.Condition()
        self._closing = threading.Event()
        # Why nothing can be added any more, if so.
        self._failed = ""
        # The file that is being brought to the disk.
        self._syncing: int | None = None
        with ExitStack() as stack:
            self._held(stack, _lock(path))
            self._folder = self._held(stack, os.open(path.parent, os.O_RDONLY))
            chain = check_end(path)
            self.cut, self._head, self._durable = chain.torn, chain.last, chain.last
            self._file = _open(path)
            stack.callback(lambda: os.close(self._file))
            self._size = os.fstat(self._file).st_size - chain.torn
            os.ftruncate(self._file, self._size)
            if not chain.last.seq:
                # From now on a log without its head is one that somebody took it from.
                _write_head(path, chain.last)
            elif not self._size:
                self._write("continued", {"previous": list(segments_of(path))[-1].name})
            os.fsync(self._folder)
            self._files = stack.pop_all()
        self._thread = threading.Thread(target=self._keep_durable, name="audit", daemon=True)
        if fsync != "off":
            self._thread.start()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        fsync: Fsync = "interval",
        interval: float = 1.0,
        rotate_bytes: int = 100_000_000,
        clock: Callable[[], float] = time.time,
    ) -> "AuditLog":
        """Open a log to go on with it, or begin one.

        An incomplete last line, as a crash leaves one, is cut off.

        Raises:
            UserError: Another process writes to it, it is damaged, or it cannot be written.
        """
        try:
            return cls(path, fsync, interval, rotate_bytes, clock)
        except BlockingIOError as error:
            raise UserError(
                f"another process writes to the audit log {path}: stop it, or give another file"
            ) from error
        except (OSError, AuditError) as error:
            raise UserError(f"cannot open the audit log {path}: {_reason(error)}") from error
        except Broken as error:
            raise UserError(
                f"the audit log {path} is damaged: {error}; see rondo audit verify, keep all its "
                "files as they are, and begin another"
            ) from error

    @property
    def head(self) -> Head:
        """The last record."""
        return self._head

    def append(self, kind: str, **fields: Any) -> int:
        """Add a record and return its number; the process may die then.

        Raises:
            AuditError: It could not be kept. The log is as it was before.
        """
        with self._changed:
            if self._failed:
                raise AuditError(self._failed)
            if self._size >= self._rotate_bytes:
                self._rotate()
            self._write(kind, fields)
            self._changed.notify_all()
            return self._head.seq

    @property
    def failed(self) -> str:
        """Why nothing can be added until a restart, empty where it can."""
        return self._failed

    def durable(self, seq: int) -> None:
        """Wait until a record is on the disk, where each must be.

        Raises:
            AuditError: The disk failed.
        """
        if self.fsync != "each":
            return
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._durable.seq >= seq)
            if self._durable.seq < seq:
                raise AuditError(self._failed)

    def close(self) -> None:
        """Bring all to the disk, and let others have the log.

        Raises:
            AuditError: The disk failed.
        """
        with self._changed:
            if self._closing.is_set():
                return
            self._closing.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        if not self._failed:
            self._sync()
        with self._changed, self._files:
            failed, self._failed = self._failed, self._failed or "the audit log is closed"
        if failed:
            raise AuditError(failed)

    def _held(self, stack: ExitStack, file: int) -> int:
        stack.callback(os.close, file)
        return file

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        seq, prev = self._head.seq + 1, self._head.hash
        own = {"seq": seq, "time": text_of(self._clock()), "kind": kind, "prev": prev}
        own_hash, line = sealed({**fields, **own})
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._cut_off()
            raise AuditError(f"cannot write to {self._path}: {_reason(error)}") from error
        self._head = Head(seq, own_hash)
        self._size += len(line)

    def _cut_off(self) -> None:
        """Undo a write that failed."""
        try:
            os.ftruncate(self._file, self._size)
        except OSError as error:
            self._fail(error)

    def _rotate(self) -> None:
        """Give the active file a number and begin another, or change nothing.

        Raises:
            AuditError: It could not be done.
        """
        before, size, known = self._file, self._size, self._head
        number = max(segments_of(self._path).values(), default=0) + 1
        segment = segment_path(self._path, number)
        self._flush(before)
        try:
            self._path.rename(segment)
        except OSError as error:
            raise AuditError(f"cannot rename {self._path}: {_reason(error)}") from error
        try:
            self._file, self._size = _open(self._path, os.O_EXCL), 0
            self._write("continued", {"previous": segment.name})
        except (OSError, AuditError) as error:
            if self._file != before:
                os.close(self._file)
            self._file, self._size = before, size
            segment.rename(self._path)
            raise AuditError(f"cannot begin a new {self._path}: {_reason(error)}") from error
        if self._syncing != before:
            os.close(before)
        self._flush(self._folder)
        if self.fsync == "off":
            # No other moment comes at which anything is known to be on the disk.
            _write_head(self._path, known)

    def _flush(self, file: int) -> None:
        """Bring a file to the disk.

        Raises:
            AuditError: The disk failed.
        """
        try:
            os.fsync(file)
        except OSError as error:
            self._fail(error)
            raise AuditError(self._failed) from error

    def _fail(self, error: OSError) -> None:
        # The system forgets what it could not write: to ask it again would prove nothing.
        with self._changed:
            self._failed = f"{self._path} failed, restart with a sound disk: {_reason(error)}"
            self._changed.notify_all()

    def _keep_durable(self) -> None:
        """Bring to the disk what was added, as often as is wanted."""
        while not self._failed:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing.is_set() or self._durable.seq < self._head.seq
                )
            if self._closing.wait(self._pause):
                return
            self._sync()

    def _sync(self) -> None:
        with self._changed:
            head, file = self._head, self._file
            self._syncing = file
        with suppress(AuditError):
            self._flush(file)
        with self._changed:
            self._syncing = None
            if file != self._file:
                os.close(file)
            if self._failed:
                return
            self._durable = head
            self._changed.notify_all()
        # One that lags behind is still true, so nobody has to wait for it.
        with suppress(OSError):
            _write_head(self._path, head)


def _lock(path: Path) -> int:
    """Return a file that no other process holds.

    Raises:
        BlockingIOError: One does.
    """
    file = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _open(path: Path, flags: int = 0) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o600)


def _write_head(path: Path, head: Head) -> None:
    """Replace what tells how far a log reached on the disk."""
    new = path.with_name(f"{path.name}.head.new")
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(file, json.dumps(head._asdict()).encode() + b"\n")
        os.fsync(file)
    finally:
        os.close(file)
    new.replace(head_path(path))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
