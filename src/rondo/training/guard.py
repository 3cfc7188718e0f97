"""Whether a step may reach the weights: pure functions over what has been seen."""

import math
import statistics
from collections.abc import Sequence

# Long enough for a median that a spike cannot move, short enough to follow a falling loss.
WINDOW = 32


def refusal(
    loss: float, grad_norm: float, recent: Sequence[float], spike_factor: float
) -> str | None:
    """Return why a step must not reach the weights, or None.

    Args:
        loss: What the step minimises, in nats per token.
        grad_norm: Norm of its gradient before clipping.
        recent: Losses of the last accepted steps, at most `WINDOW`.
        spike_factor: Multiple of their median above which a loss is a spike; 0 for none.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return "non-finite"
    if spike_factor and len(recent) == WINDOW and loss > spike_factor * statistics.median(recent):
        return "spike"
    return None


def remembered(recent: Sequence[float], loss: float) -> list[float]:
    """Return the recent losses with one more."""
    return [*recent, loss][-WINDOW:]
