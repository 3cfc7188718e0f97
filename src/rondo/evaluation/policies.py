"""What a policy that gives each item its own depth must beat: policies that see no items.

Of use to whatever chooses a depth per item, such as an early exit; a fixed depth has none to
shuffle. Pure functions of arrays; only numpy is imported.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rondo.evaluation.comparisons import (
    Array,
    Difference,
    Finding,
    Measured,
    compare,
    paired_bootstrap,
)

_NUM_SHUFFLES = 500
_SEED = 0


def policy_controls(
    values: Array, cost: Sequence[float], chosen: NDArray[np.int64]
) -> list[Finding]:
    """Hold a policy that picks a depth per item against policies that see no items.

    Args:
        values: Accuracy by depth and item, in [0, 1].
        cost: Of an item at each depth, in any unit, for instance executed FLOPs per token.
        chosen: Index of the depth that the policy picks for each item.

    Returns:
        The policy's score, then its gain over the best mixture of two fixed depths that costs no
        more on average, and over its own depths dealt to items at random.
    """
    costs, count = np.asarray(cost, dtype=float), values.shape[1]
    items = values[chosen, np.arange(count)]
    measured = _accuracies(values)
    score = 100 * paired_bootstrap(items, np.zeros(count), np.ones(count)).value
    spent = costs[chosen].mean()
    price = f" at {spent / costs[0]:.2f}x the cost of the first depth" if costs[0] > 0 else ""
    found = Finding("policy", score, None, None, "%", f"The policy scores {score:.1f}%{price}.")
    mixture, best = blind_mixture(values, costs, costs[chosen], np.ones(count))
    after = f"; the mixture scores {best:.1%}"
    blind = _points(paired_bootstrap(items, mixture, np.ones(count)))
    shuffled, after_shuffle = _shuffled(values, chosen)
    dealt = _points(paired_bootstrap(items, shuffled, np.ones(count)))
    than = "the best input-blind mixture of depths of at most equal cost"
    return [
        found,
        compare("policy against blind", "The policy", than, blind, measured, after),
        compare(
            "policy against shuffled",
            "The policy",
            "its own depths dealt to items at random",
            dealt,
            measured,
            after_shuffle,
        ),
    ]


def blind_mixture(values: Array, costs: Array, spent: Array, weights: Array) -> tuple[Array, float]:
    """Return each item's part in the best mixture of two depths that spends what a policy does.

    The mixture follows the policy's mean cost, which the items sway: without the last term of
    what is returned, that part of the uncertainty would be missing. It averages zero.

    Args:
        values: By depth and item, summed per item; more is better.
        costs: Of one token, or of whatever weights count, at each depth.
        spent: What the policy spends on each item, summed as the values are.
        weights: By item.

    Returns:
        By item, and the mixture's score per weight.
    """
    mean, scores = float(spent.sum() / weights.sum()), values.sum(1) / weights.sum()
    # Rounding must not leave a policy that never goes beyond the first depth without it.
    mean = max(mean, float(costs.min()))
    best, pair = -math.inf, (0, 0, 0.0)
    for low in range(len(costs)):
        if costs[low] > mean:
            continue
        for high in range(len(costs)):
            # A pair of the same depth twice is that depth alone, which may leave cost unspent.
            dearer = costs[high] > mean
            part = (mean - costs[low]) / (costs[high] - costs[low]) if dearer else 0.0
            score = (1 - part) * scores[low] + part * scores[high]
            if score > best:
                best, pair = float(score), (low, high if dearer else low, float(part))
    low, high, part = pair
    slope = 0.0 if low == high else (scores[high] - scores[low]) / (costs[high] - costs[low])
    items = (1 - part) * values[low] + part * values[high]
    return items + slope * (spent - mean * weights), best


def _shuffled(values: Array, chosen: NDArray[np.int64]) -> tuple[Array, str]:
    """Return each item's part in the score expected of the same depths in random order.

    How often each depth is dealt depends on the items too, which the last two terms account for.
    """
    shares = np.bincount(chosen, minlength=len(values)) / len(chosen)
    scores = values.mean(1)
    expected = float(shares @ scores)
    rng = np.random.default_rng(_SEED)
    everyone = np.arange(len(chosen))
    draws = [values[rng.permutation(chosen), everyone].mean() for _ in range(_NUM_SHUFFLES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    after = f"; dealt at random they score {expected:.1%}, 95% of deals {low:.1%} to {high:.1%}"
    return shares @ values + scores[chosen] - expected, after


def _points(gap: Difference) -> Difference:
    return Difference(100 * gap.value, 100 * gap.low, 100 * gap.high)


def _accuracies(values: Array) -> Measured:
    """Wrap bare accuracies, for their unit and digits."""
    return Measured(
        task="",
        depths=tuple(range(len(values))),
        better=100 * values,
        weights=np.ones(values.shape[1]),
        flops=(math.nan,) * len(values),
        num_items=values.shape[1],
    )
