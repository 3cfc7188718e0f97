"""From what each token would say at each iteration to thresholds, and what they cost.

A rule lets a token go at the first check whose value is below its threshold, so all that a
threshold does on a text follows from one trajectory to the full depth, as long as deeper
iterations see what they would have seen there. Only numpy is used.

Harm is what a user does not want more of: the loss in nats, or whether the best token is another
than the full depth's. Its increase is relative to the full depth's loss, or a share of tokens.

Shapes: R iterations up to the full depth, N tokens, D documents, L candidate thresholds (levels).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from rondo.evaluation.comparisons import (
    MIN_ITEMS,
    Array,
    Difference,
    bootstrap,
    interval,
)

Numbers = NDArray[np.int64]

LEVELS = 256
# A threshold of 0 lets no token go, not even one whose value is 0.
LEAST_THRESHOLD = 1e-12


def candidates(values: Array, criterion: str) -> Array:
    """Return thresholds worth trying, rising; each lets go a token that the one before keeps.

    Between the values at which tokens would leave nothing changes, so some of those are taken, by
    rank: they span orders of magnitude. They do not depend on a tolerance.

    Args:
        values: The criterion, (R, N); infinite where there is no check.
        criterion: Its name; `argmax_stable` counts checks, which leaves 1/n.
    """
    before = np.full_like(values, np.inf)
    before[1:] = np.minimum.accumulate(values)[:-1]
    found = np.unique(values[values < before])
    if criterion == "argmax_stable":
        return np.array(
            [1 / n for n in range(round(1 / found[0]) - 1, 0, -1)] if len(found) else []
        )
    places = np.unique(np.linspace(0, len(found) - 1, min(len(found), LEVELS)).round().astype(int))
    # Above the value by more than float32 rounds off, since it must be below the threshold.
    return np.unique(np.maximum(found[places] * (1 + 1e-6), LEAST_THRESHOLD))


def idealised(
    harm: Array, values: Array, thresholds: Array, documents: Numbers, num_documents: int
) -> Array:
    """Return the harm of each document at each threshold, were all keys those of the full depth.

    Args:
        harm: By iteration and token, (R, N).
        values: The criterion, likewise; infinite where there is no check.
        thresholds: (L,).
        documents: Number of each token's document, (N,).
        num_documents: D.

    Returns:
        Summed over the tokens of a document, (L, D).
    """
    least, everyone = np.minimum.accumulate(values), np.arange(harm.shape[1])
    sums = np.empty((len(thresholds), num_documents))
    for level, threshold in enumerate(thresholds):
        left = np.minimum((least >= threshold).sum(0), len(harm) - 1)
        sums[level] = np.bincount(documents, harm[left, everyone], minlength=num_documents)
    return sums


@dataclass(frozen=True, eq=False)
class Measure:
    """What must stay within a tolerance, by how much of it there is at the full depth.

    Attributes:
        full: The full depth's harm, summed by document, (D,).
        weights: Tokens of each document, (D,).
        relative: Whether the tolerance is a share of the full depth's harm, not of all tokens.
    """

    full: Array
    weights: Array
    relative: bool

    def increase(self, sums: Array) -> Array:
        """Return the increase of harm (..., D) over the full depth's, (...)."""
        unit = self.full if self.relative else self.weights
        return (sums - self.full).sum(-1) / unit.sum()

    def drawn(self, sums: Array) -> Array:
        """Return what resampled documents make of the increase of harm (L, D), by resample."""
        means = bootstrap(np.vstack([sums, self.full]), self.weights)
        more = means[:, :-1] - means[:, -1:]
        return more / means[:, -1:] if self.relative else more

    def change(self, sums: Array) -> Difference:
        """Return the increase of harm (D,), with an interval over documents."""
        drawn = self.drawn(sums[None])[:, 0]
        return interval(float(self.increase(sums)), drawn, len(self.weights))

    def thresholds_drawn(
        self, thresholds: Array, sums: Array, tolerance: float, shift: float = 0.0
    ) -> tuple[float, float] | None:
        """Return between which thresholds (L,) other documents would have led to, 95% of them.

        Args:
            thresholds: Rising.
            sums: The harm at each, (L, D).
            tolerance: Of the increase.
            shift: By how much the increase was larger when it was executed.
        """
        if len(self.weights) < MIN_ITEMS:
            return None
        levels = [largest(row, tolerance) for row in self.drawn(sums) + shift]
        # Level -1 is the last: no threshold holds, so that 0 is what remains.
        low, high = np.quantile(
            np.append(thresholds, 0.0)[levels], [0.025, 0.975], method="inverted_cdf"
        )
        return float(low), float(high)


def largest(increase: Array, tolerance: float) -> int:
    """Return the highest level (L,) at which an increase is within the tolerance, -1 for none."""
    held = np.flatnonzero(increase <= tolerance)
    return int(held[-1]) if len(held) else -1


def highest_that_holds(increase: Array, tolerance: float, execute: Callable[[int], float]) -> int:
    """Return the highest level that holds when it is executed, -1 for none.

    It is sought from the highest that holds on paper downwards, by bisection, which takes the
    executed increase to rise with the threshold. What the execution adds hardly depends on the
    level, so a guess from what it added before saves most of the executions.

    Args:
        increase: On paper, by level, (L,).
        tolerance: Of the increase.
        execute: Returns the executed increase at a level.
    """
    low, level = -1, largest(increase, tolerance)
    high = level + 1
    for step in count(1):
        if high - low <= 1:
            break
        found = execute(level)
        low, high = (level, high) if found <= tolerance else (low, level)
        guess = largest(increase + found - increase[level], tolerance)
        # A guess may creep; every second step halves what is left.
        level = (low + high) // 2 if step % 2 == 0 else min(max(guess, low + 1), high - 1)
    return low


def num_checks(left: Numbers, depth: int, min_recurrences: int, check_every: int) -> Numbers:
    """Return how many checks tokens saw that left at these iterations (N,), of at most `depth`.

    At the full depth a token leaves unasked.
    """
    asked = np.minimum(left, depth - 1) - min_recurrences
    return np.maximum(asked // check_every + 1, 0)


def transfers(held_out: Difference, tolerance: float) -> str:
    """Say in a clause whether a threshold keeps on other documents what it kept on its own."""
    within = held_out.value <= tolerance
    if not np.isfinite(held_out.high):
        said = "it keeps within" if within else "it goes beyond"
        return f"{said}, but the documents are too few to tell that from chance"
    if within:
        sure = held_out.high <= tolerance
        return "it transfers" if sure else "it transfers, though the interval reaches beyond"
    if held_out.low > tolerance:
        return "it does not transfer"
    return "it goes beyond, which may be chance"


def pays(spent: dict[str, float], fixed: float, worse: set[str]) -> str:
    """Say in a clause whether a rule is worth its checks.

    Args:
        spent: FLOPs per token by way of running.
        fixed: Those of the shallowest fixed depth that keeps the tolerance.
        worse: Ways in which a mixture of fixed depths of equal cost was shown to be better.
    """
    ways = [how for how, flops in spent.items() if flops < fixed and how not in worse]
    if len(ways) == len(spent):
        return "pays"
    return f"pays in {' and '.join(ways)} only" if ways else "does not pay"
