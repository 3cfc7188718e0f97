"""The engine's thread: requests in, events out."""

from typing import Any

from rondo_serve.policy import Policy
from rondo_serve.requests import Ask, Deliver, Load


class Engine:
    """Continues texts, each at its own depth, as many at once as memory allows.

    `submit` and `cancel` may be called from any thread and never wait for the model.
    """

    def start(self) -> None:
        """Start the thread that ticks."""

    def submit(self, ask: Ask, deliver: Deliver) -> int:
        """Take a request into the queue, and return the depth that it is allowed.

        Args:
            ask: What is asked for.
            deliver: Called on the engine's thread with each event; the last is a `Finished`. It
                must not wait.

        Raises:
            Refused: It can never be served.
            Busy: The queue is full.
            Closed: The engine shuts down or has failed.
        """
        raise NotImplementedError

    def cancel(self, id: str) -> None:
        """Stop a request at the next iteration; it still gets its `Finished`. Unknown ids are none."""

    def close(self, grace: float) -> None:
        """Take nothing more, wait `grace` seconds for what runs, cut the rest off, and stop."""

    @property
    def failure(self) -> str | None:
        """Why the engine stopped by itself, None while it has not."""
        return None

    def load(self) -> Load:
        """Return how busy the engine is."""
        return Load()


def open_engine(config: Any) -> Engine:
    raise NotImplementedError
