"""What was measured on a task, and how much better one thing is than another.

Pure functions of results as `rondo eval` writes them: nothing is read, written or drawn here, and
only numpy is imported. Gains are always "better by": a loss that falls and an accuracy that rises
are both positive. Intervals are 95%, from resampling items (documents), and none is given for
fewer than ten of them. Where only values and standard errors were published, and no items, nothing
can be paired: intervals are normal then, of values taken as independent.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Json = dict[str, Any]
Array = NDArray[np.float64]

NUM_RESAMPLES = 2_000
# Bounds the memory that many items take.
_RESAMPLES_AT_ONCE = 100
_BOOTSTRAP_SEED = 0
# Resampling fewer items than this says little about others.
MIN_ITEMS = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """One number, what it is known to, and what it means in plain words."""

    name: str
    value: float | None
    low: float | None
    """The 95% interval, or null where none can be had."""
    high: float | None
    unit: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of one run less that of another, with a 95% interval."""

    value: float
    low: float
    high: float
    paired: bool = True
    """Whether both saw the same items, and the interval knows which."""

    @property
    def aside(self) -> str:
        """What a sentence adds to the interval."""
        return "" if self.paired else ", with no items to pair"


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One task's items at every depth where all of them are finite.

    Without items each row of `better` holds one number, the published value.
    """

    task: str
    is_loss: bool
    depths: tuple[int, ...]
    better: Array
    """By depth and item, in `unit` times the item's weight, and turned so that more is better."""
    weights: Array
    flops: tuple[float, ...]
    """Executed per token at each depth, of all samples of an item together; NaN if unknown."""
    left_out: tuple[int, ...]
    """Depths that gave no number on some item."""
    sign: int
    """1 where more of the metric is better, else -1."""
    unit: str
    """Of differences: nats per token, or points (percentage points)."""
    errors: Array | None = None
    """Published standard errors by depth, in `unit`, where there are no items; else none."""

    @property
    def scores(self) -> Array:
        """The value at each depth, as far as better means more."""
        return self.better.sum(1) / self.weights.sum()

    @property
    def best(self) -> int:
        """Index of the best depth."""
        return int(np.argmax(self.scores))

    @property
    def scale(self) -> float:
        """Units in one of the metric's own."""
        return 1.0 if self.is_loss else 100.0

    def at(self, depth: int) -> Array | None:
        """Return the items at a depth, or none where it was not measured."""
        return self.better[self.depths.index(depth)] if depth in self.depths else None

    def number(self, value: float, plus: bool = False) -> str:
        """Write a number of this unit with as many digits as can mean something."""
        return f"{value:{'+' if plus else ''}.{4 if self.is_loss else 1}f}"

    def level(self, score: float) -> str:
        """Write a value, rather than a difference, in the metric's own direction."""
        value = self.number(self.sign * score)
        return f"{value} nats per token" if self.is_loss else f"{value}%"


def measure(result: Json, task: str) -> Measured:
    """Collect a task's items at the depths where all are finite."""
    facts, items = result["tasks"][task], result["items"].get(task)
    rows = {
        row["num_recurrences"]: row
        for row in result["rows"]
        if (row["task"], row["metric"]) == (task, facts["metric"])
    }
    known = items or {
        "weights": [1],
        # With its error, since a value without one cannot be compared either.
        "values": {r: [row["value"], row["stderr"]] for r, row in rows.items()},
    }
    values = {int(r): np.array(found, dtype=float) for r, found in known["values"].items()}
    depths = [r for r in sorted(values) if np.isfinite(values[r]).all()]
    flops = {r: float(row["flops_per_token"] or math.nan) for r, row in rows.items()}
    is_loss = facts["kind"] == "loss"
    scale = 1 if is_loss else 100
    sign = 1 if facts["higher_is_better"] else -1
    count = len(known["weights"])
    stacked = np.reshape([values[r][:count] for r in depths], (len(depths), count))
    return Measured(
        task=task,
        is_loss=is_loss,
        depths=tuple(depths),
        better=stacked * sign * scale,
        weights=np.array(known["weights"], dtype=float),
        flops=tuple(flops.get(r, math.nan) for r in depths),
        left_out=tuple(sorted(set(values) - set(depths))),
        sign=sign,
        unit="nats per token" if is_loss else "points",
        errors=None if items else np.array([scale * values[r][1] for r in depths]),
    )


def resample(measured: Measured, num_resamples: int = NUM_RESAMPLES) -> Array:
    """Return what each depth would score on other items, by resample and depth.

    Without items the depths are drawn each by itself around what was published.
    """
    if measured.errors is None:
        return bootstrap(measured.better, measured.weights, num_resamples)
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    noise = rng.standard_normal((num_resamples, len(measured.depths)))
    return measured.scores + measured.errors * noise


def bootstrap(values: Array, weights: Array, num_resamples: int = NUM_RESAMPLES) -> Array:
    """Resample items, and return what each resample makes of each row of values.

    All rows see the same resamples, so that their differences are paired.

    Args:
        values: By row and item, summed per item.
        weights: By item.
        num_resamples: How many, a multiple of 100.

    Returns:
        Sum of values over sum of weights, by resample and row.
    """
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    count = len(weights)
    shape = (_RESAMPLES_AT_ONCE, count)
    offsets = count * np.arange(shape[0])[:, None]
    means = []
    for _ in range(0, num_resamples, shape[0]):
        picks = rng.integers(count, size=shape) + offsets
        times = np.bincount(picks.ravel(), minlength=shape[0] * count).reshape(shape).astype(float)
        means.append(times @ values.T / (times @ weights)[:, None])
    return np.concatenate(means)


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, weights: ArrayLike, choices: int = 1
) -> Difference:
    """Compare two runs over the same items by resampling the items.

    Args:
        first: What each item sums to (nats of a document, right or wrong of a question).
        second: The same of the run that is compared with.
        weights: What each item counts: tokens of a document, one per question.
        choices: Number of runs `first` was picked from as the best. It widens the interval
            (Bonferroni), since the best of many looks good by luck.
    """
    change = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    sizes = np.asarray(weights, dtype=float)
    value = float(change.sum() / sizes.sum())
    return interval(value, bootstrap(change[None], sizes)[:, 0], len(change), choices)


def difference(first: Measured, i: int, second: Measured, j: int, choices: int = 1) -> Difference:
    """Compare depth i (an index) of one with depth j of another, paired where there are items."""
    if first.errors is None or second.errors is None:
        assert first.errors is second.errors, "one has items and the other has none"
        return paired_bootstrap(first.better[i], second.better[j], first.weights, choices)
    value = float(first.scores[i] - second.scores[j])
    return unpaired(value, first.errors[i], second.errors[j], choices)


def unpaired(value: float, first_error: float, second_error: float, choices: int = 1) -> Difference:
    """Give a difference of two means its normal interval, as if of independent samples.

    The two standard errors are in its unit. On the same items this is too wide as a rule, since
    what is hard for one model is hard for another.
    """
    z = NormalDist().inv_cdf(1 - 0.025 / choices)
    half = z * math.hypot(first_error, second_error)
    return Difference(value, value - half, value + half, paired=False)


def interval(value: float, drawn: Array, num_items: int, choices: int = 1) -> Difference:
    """Give a difference the interval that its resamples span, if the items are enough for one."""
    if num_items < MIN_ITEMS:
        return Difference(value, -math.inf, math.inf)
    tail = 0.025 / choices
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Difference(value, float(low), float(high))


def compare(
    name: str, what: str, than: str, gap: Difference, measured: Measured, after: str = ""
) -> Finding:
    """Say by how much one thing is better than another; `after` ends the sentence."""
    value, low, high = gap.value, gap.low, gap.high
    if low <= 0 <= high:
        doubt = (
            f"(95% interval {measured.number(low, True)} to {measured.number(high, True)}"
            f"{gap.aside}), which may be chance"
            if math.isfinite(low)
            else f"but {len(measured.weights)} items are too few to tell that from chance"
        )
        sentence = (
            f"{what} is not shown to differ from {than}: the gain is "
            f"{measured.number(value, True)} {measured.unit} {doubt}{after}."
        )
    else:
        nearest, farthest = sorted((abs(low), abs(high)))
        sentence = (
            f"{what} is {'better' if value > 0 else 'worse'} than {than} by "
            f"{measured.number(abs(value))} {measured.unit} "
            f"(95% interval {measured.number(nearest)} to {measured.number(farthest)}{gap.aside})"
            f"{after}."
        )
    return finding(name, gap, measured.unit, sentence)


def finding(name: str, gap: Difference, unit: str, sentence: str) -> Finding:
    """Turn a difference into a finding; an interval without bounds is none."""
    low, high = (gap.low, gap.high) if math.isfinite(gap.low) else (None, None)
    return Finding(name, gap.value, low, high, unit, sentence)


def unknown(name: str, sentence: str, unit: str = "") -> Finding:
    """Return a finding without a number, whose sentence says why."""
    return Finding(name, None, None, None, unit, sentence)
