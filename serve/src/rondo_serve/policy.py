"""What a request may spend. The engine asks one object, and tells it what was spent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rondo_serve.requests import Ask, Load, Receipt, Refused


class Policy(Protocol):
    """Who says what a request may spend."""

    def allow(self, ask: Ask, load: Load) -> int:
        """Return the depth r that a request is given; called on the thread of whoever asks.

        Raises:
            Refused: It is given none.
        """

    def spent(self, ask: Ask, receipt: Receipt) -> None:
        """Take note of what a request took, once for each that was allowed, however it ended.

        Called on the engine's thread; or, where the engine did not take a request that was
        allowed, on that of whoever asked.
        """


@dataclass(frozen=True)
class Limits:
    """The same bounds for everyone.

    Attributes:
        default: Depth of a request that names none.
        cap: Deepest that can be asked for.
        floor: Shallowest that can be asked for.
        efforts: What OpenAI's `reasoning_effort` means.
    """

    default: int
    cap: int
    floor: int = 1
    efforts: Mapping[str, int] | None = None

    @property
    def depths(self) -> Mapping[str, int]:
        """Depth of each effort."""
        return self.efforts or efforts_of(self.default, self.floor, self.cap)

    def allow(self, ask: Ask, load: Load) -> int:
        """Return the depth that is asked for, if it lies within the bounds.

        Raises:
            Refused: It does not.
        """
        if ask.num_recurrences is None:
            return self.depths[ask.effort] if ask.effort else self.default
        if not self.floor <= ask.num_recurrences <= self.cap:
            raise Refused(
                f"num_recurrences must lie between {self.floor} and {self.cap} here, got "
                f"{ask.num_recurrences}",
                "num_recurrences",
            )
        return ask.num_recurrences

    def spent(self, ask: Ask, receipt: Receipt) -> None:
        """Everyone may spend as much again."""


def efforts_of(default: int, floor: int, cap: int) -> dict[str, int]:
    """Return depths for OpenAI's efforts: medium is the default, each step doubles or halves it."""
    wanted = {
        "none": 1,
        "minimal": default // 4,
        "low": default // 2,
        "medium": default,
        "high": 2 * default,
        "xhigh": 4 * default,
        "max": cap,
    }
    return {effort: min(max(depth, floor), cap) for effort, depth in wanted.items()}
