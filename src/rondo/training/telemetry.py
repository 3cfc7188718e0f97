"""Is the loop healthy? What is alarming in what `rondo.dynamics` measures of it."""

import math

MAX_GROWTH = 10.0
# bfloat16 rounds off one part in this many.
BFLOAT16_PARTS = 256.0


def alarms(health: dict[str, float], depth: int) -> list[str]:
    """Return a sentence for each thing that is wrong with a loop, with what to do about it."""
    broken = [name for name, value in health.items() if not math.isfinite(value)]
    if broken:
        return [
            f"{', '.join(broken)} not finite at r = {depth}: the state overflows; go back to the "
            "last good checkpoint and lower optimizer.lr"
        ]
    found = []
    growth, gain = health["loop/state_growth"], health["loop/gain"]
    if growth > MAX_GROWTH:
        found.append(
            f"the state grows {growth:.3g}-fold from r = 1 to {depth}: lower optimizer.lr, or "
            "convert with --injection mix and a small --mixing"
        )
    # Over the whole loop the rounding of bfloat16 then grows to the size of the state itself.
    if gain > (bound := BFLOAT16_PARTS ** (1 / depth)):
        found.append(
            f"an iteration expands disturbances {gain:.3g}-fold (more than {bound:.3g} turns "
            f"rounding into noise by r = {depth}): lower optimizer.lr, train at fewer recurrences, "
            "or convert with a smaller --mixing"
        )
    return found
