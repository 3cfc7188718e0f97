"""Files that are read again when they change, while the program runs."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from rondo.errors import UserError

T = TypeVar("T")


class Watched(Generic[T]):
    """What a file holds, now; what does not load never takes the place of what did.

    Whoever asks for the value pays for the look at the file, so there is no thread to end. Several
    threads may ask: one looks, and the others have the value that is in force without waiting.

    Args:
        path: The file.
        load: Reads it, and raises `UserError` where it does not hold.
        told: Is told, once, why a changed file is refused.
        every: Seconds from look to look.
        clock: Seconds that never go back.
        changed: Is given each value that takes the place of another.

    Attributes:
        changes: How often another value took effect.
        failures: How often a changed file was refused.
        refused: Why the file as it is now was refused, None if its value is in force.

    Raises:
        UserError: The file does not load at the start.
    """

    def __init__(
        self,
        path: Path,
        load: Callable[[Path], T],
        told: Callable[[str], None],
        every: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[T], None] = lambda value: None,
    ):
        self.changes, self.failures = 0, 0
        self.refused: str | None = None
        self._path, self._load, self._told, self._changed = path, load, told, changed
        self._every, self._clock = every, clock
        self._looking = threading.Lock()
        # Always before the file is read: a change in between is seen at the next look.
        self._stamp = stamp_of(path)
        self._value = load(path)
        self._next = clock() + every

    @property
    def value(self) -> T:
        """The value in force."""
        if self._looking.acquire(blocking=False):
            try:
                self._look(self._clock())
            finally:
                self._looking.release()
        return self._value

    def _look(self, now: float) -> None:
        if now < self._next:
            return
        self._next = now + self._every
        if (stamp := stamp_of(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            value = self._load(self._path)
        except UserError as error:
            self.failures += 1
            self.refused = str(error)
            self._told(f"{error}; the one before stays in force")
            return
        self._value = value
        self.changes += 1
        self.refused = None
        self._changed(value)


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Return what changes whenever a file does, None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    # The last changes with rights, too: a file that could not be read may be readable now.
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns
