"""The asks of one HTTP request on their way through the engine."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rondo_govern.audit.log import AuditError
from rondo_serve.api.errors import unrecorded
from rondo_serve.policy import Allowed
from rondo_serve.requests import Ask, Deliver, Event, Finished, Load


class Loaded(Protocol):
    """Who tells how busy it is."""

    def load(self) -> Load:
        """Return how busy it is."""
        ...


class Closes(Protocol):
    """Who can be brought to an end."""

    def close(self, grace: float) -> None:
        """Take nothing more, wait `grace` seconds for what runs, cut the rest off, and stop."""


class Engine(Loaded, Closes, Protocol):
    """Who answers: what the API needs of `rondo_serve.engine.engine.Engine`."""

    @property
    def failure(self) -> str | None:
        """Why it stopped by itself, None while it has not."""

    def start(self) -> None:
        """Begin to answer."""

    def submit_all(self, asks: Sequence[Ask], delivers: Sequence[Deliver]) -> list[Allowed]:
        """Take the answers of a request, all or none, and return what each is given."""
        ...

    def cancel(self, id: str) -> None:
        """Stop a request; it still gets its `Finished`."""


@dataclass
class Call:
    """Asks that were taken, and their events.

    Events come on the engine's thread and are read on the loop's: a slow reader lets them pile up,
    which the tokens of an answer bound, and never holds the engine up.

    Attributes:
        engine: Who answers.
        asks: What is asked.
        ended: Called on the loop with each `Finished` of a call that was taken, also where nobody
            reads any more.
        durable: Waits until what was recorded is on the disk, where an end waits for that.
        allowed: What each ask was given.
        finished: The ends that have come, by index.
        keeps_texts: Whether the answers' texts are kept, for the log.
        texts: Their pieces, by index.
    """

    engine: Engine
    asks: Sequence[Ask]
    ended: Callable[["Call", int, Finished], None]
    durable: Callable[[], None] | None = None
    allowed: list[Allowed] = field(default_factory=list)
    finished: dict[int, Finished] = field(default_factory=dict)
    keeps_texts: bool = False
    texts: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    @property
    def id(self) -> str:
        """What the answer is called."""
        return self.asks[0].id.rpartition("-")[0]

    @property
    def done(self) -> bool:
        """Whether every ask that was taken has ended."""
        return len(self.finished) == len(self.allowed)

    def submit(self) -> None:
        """Hand all asks to the engine, or none.

        Raises:
            Refused: One of them can never be served.
            Denied: The policy does not allow one of them.
            Busy: The queue does not take all of them.
            Closed: The engine takes no more.
        """
        delivers = [self._deliver(index) for index in range(len(self.asks))]
        self.allowed = self.engine.submit_all(self.asks, delivers)

    def cancel(self) -> None:
        """Stop what has not ended."""
        for index, ask in enumerate(self.asks[: len(self.allowed)]):
            if index not in self.finished:
                self.engine.cancel(ask.id)

    async def events(self, pause: float | None = None) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yield events with their asks' indices, those that came together at once, until all ended.

        Args:
            pause: Seconds of silence after which an empty list is yielded.

        Raises:
            ApiError: An end cannot be recorded.
        """
        left = len(self.asks)
        while left:
            try:
                batch = [await asyncio.wait_for(self._events.get(), pause)]
            except TimeoutError:
                yield []
                continue
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            ended = sum(isinstance(event, Finished) for _, event in batch)
            if ended and self.durable is not None:
                try:
                    await self._loop.run_in_executor(None, self.durable)
                except AuditError as error:
                    raise unrecorded() from error
            left -= ended
            yield batch

    def _deliver(self, index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            # The loop is gone where the server was cut off: nobody is left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._take, index, event)

        return deliver

    def _take(self, index: int, event: Event) -> None:
        self._events.put_nowait((index, event))
        if self.keeps_texts and event.text:
            self.texts.setdefault(index, []).append(event.text)
        if isinstance(event, Finished):
            self.finished[index] = event
            self.ended(self, index, event)


@dataclass
class Gate:
    """Whether the server takes requests, and how many it holds.

    Attributes:
        closing: The server shuts down.
        held: Requests for text that are being answered.
    """

    closing: threading.Event = field(default_factory=threading.Event)
    held: int = 0
