"""Files that are read again when they change, while the program runs."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class Watched(Generic[T]):
    """What a file holds, now; what does not load never takes the place of what did.

    Whoever asks for the value looks at the file, and reads it if it has changed; or a thread does,
    where nobody may wait that long. Several threads may ask: one looks, and the others have the
    value that is in force without waiting.

    Args:
        path: The file.
        load: Reads it, and raises `UserError` where it does not hold.
        told: Is told, once, why a changed file is refused.
        every: Seconds from look to look.
        clock: Seconds that never go back.
        waits: Whether whoever asks waits while a changed file is read.

    Attributes:
        changed: Is given each value that takes the place of another.
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
        waits: bool = True,
    ):
        self.changes, self.failures = 0, 0
        self.refused: str | None = None
        self.changed: Callable[[T], None] = lambda value: None
        self._path, self._load, self._told, self._waits = path, load, told, waits
        self._every, self._clock = every, clock
        self._looking = threading.Lock()
        # Always before the file is read: a change in between is seen at the next look.
        self._stamp = stamp_of(path)
        self._value = load(path)
        self._next = clock() + every

    @property
    def value(self) -> T:
        """The value in force."""
        if self._clock() >= self._next and self._looking.acquire(blocking=False):
            # A lock of threads, but whoever has it may hand it on.
            if self._stamp == stamp_of(self._path) or self._waits:
                self._look()
            else:
                threading.Thread(target=self._look, daemon=True).start()
        return self._value

    def _look(self) -> None:
        """Look at the file, and read it if it has changed."""
        try:
            self._next = self._clock() + self._every
            if (stamp := stamp_of(self._path)) != self._stamp:
                self._stamp = stamp
                self._read()
        finally:
            self._looking.release()

    def _read(self) -> None:
        try:
            value = self._load(self._path)
        except Exception as error:  # whatever it is, what is in force goes on
            self.failures += 1
            self.refused = str(error) or type(error).__name__
            self._told(f"{self.refused}; the one before stays in force")
            return
        self._value = value
        self.changes += 1
        self.refused = None
        self.changed(value)


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Return what changes whenever a file does, None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    # The last changes with rights, too: a file that could not be read may be readable now.
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns
