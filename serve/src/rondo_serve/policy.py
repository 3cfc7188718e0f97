"""What a request may spend. The engine asks one object, and tells it what was spent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rondo.modeling.exits_recurrent import ExitRule
from rondo_govern.efforts import Effort, efforts_of
from rondo_govern.governor import Grant
from rondo_serve.requests import Ask, Ending, Load, Receipt, Refused


@dataclass(frozen=True)
class Allowed:
    """What a request is given.

    Attributes:
        depth: r: no token takes more.
        exit: When a token leaves the loop before, or None.
        grant: The governor's, where there is one.
    """

    depth: int
    exit: ExitRule | None = None
    grant: Grant | None = None

    def untaken(self, ask: Ask) -> Receipt:
        """Return the receipt of a request that was allowed and never taken."""
        told = {"exit": self.exit, "grant": self.grant}
        return Receipt(ask.num_recurrences, self.depth, len(ask.prompt), **told)


class Policy(Protocol):
    """Who says what a request may spend."""

    def allow(self, asks: Sequence[Ask], load: Load) -> list[Allowed]:
        """Return what the answers of a request are given; called on the thread of whoever asks.

        Args:
            asks: Alike but for prompts and seeds.
            load: How busy the engine is.

        Raises:
            Refused: They are given nothing.
            Denied: Likewise, by policy or quota.
        """
        ...

    def spent(self, ask: Ask, reason: Ending, receipt: Receipt) -> None:
        """Take note of what an answer took, once for each that was allowed, however it ended.

        Called on the engine's thread before the end is told; or, where the engine did not take a
        request that was allowed, on that of whoever asked.
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

    def depth_of(self, num_recurrences: int | None, effort: Effort | None) -> int:
        """Return the depth that is asked for, if it lies within the bounds.

        Raises:
            Refused: It does not.
        """
        if num_recurrences is None:
            return self.depths[effort] if effort else self.default
        if not self.floor <= num_recurrences <= self.cap:
            raise Refused(
                f"num_recurrences must lie between {self.floor} and {self.cap} here, got "
                f"{num_recurrences}",
                "num_recurrences",
            )
        return num_recurrences

    def allow(self, asks: Sequence[Ask], load: Load) -> list[Allowed]:
        """Return the depth that is asked for, and the exit.

        Raises:
            Refused: It does not lie within the bounds.
        """
        return [Allowed(self.depth_of(ask.num_recurrences, ask.effort), ask.exit) for ask in asks]

    def spent(self, ask: Ask, reason: Ending, receipt: Receipt) -> None:
        """Everyone may spend as much again."""
