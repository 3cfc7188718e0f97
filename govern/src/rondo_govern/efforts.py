"""OpenAI's words for how much an answer may think, as depths."""

from typing import Literal, get_args

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: tuple[str, ...] = get_args(Effort)


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
