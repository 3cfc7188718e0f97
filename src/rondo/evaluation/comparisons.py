"""What was measured on a task, and how much better one thing is than another.

Pure functions of results as `rondo eval` writes them: nothing is read, written or drawn here, and
only numpy is imported. Gains are always "better by": a loss that falls and an accuracy that rises
are both positive. Intervals are 95%, from resampling items (documents), and none is given for
fewer than ten of them. Where only values and standard errors were published, and no items, nothing
can be paired: intervals are normal then, of values taken as independent.
"""

import functools
import math
import re
from collections.abc import Sequence
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
# Of losses, a smaller difference counts as none, however sure: it is of the size of rounding.
# Shares need no such bound, being counts of items.
LEAST = 1e-4
# A metric with one of these words in its name is a share, from 0 to 1.
_SHARES = {"acc", "accuracy", "correct", "em", "exact", "f1", "match", "mc1", "mc2", "pass"}
_SHARES |= {"verify"}


def is_share(metric: str) -> bool:
    """Whether a metric is a share, to be told in percent; bits and perplexities are none."""
    return not _SHARES.isdisjoint(re.split(r"[^a-z0-9]+", metric.partition(",")[0].lower()))


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
    depths: tuple[int, ...]
    better: Array
    """By depth and item, in `unit` times the item's weight, and turned so that more is better."""
    weights: Array
    flops: tuple[float, ...]
    """Executed per token at each depth, of all samples of an item together; NaN if unknown."""
    num_items: int
    sign: int = 1
    """1 where more of the metric is better, else -1."""
    unit: str = "points"
    """Of differences: points (percentage points) of a share, else what the metric is in."""
    scale: float = 100.0
    """Units in one of the metric's own: 100 of a share, else 1."""
    errors: Array | None = None
    """Published standard errors by depth, in `unit`, where there are no items; else none."""
    left_out: tuple[int, ...] = ()
    """Depths that gave no number on some item."""

    @property
    def scores(self) -> Array:
        """The value at each depth, as far as better means more."""
        return self.better.sum(1) / self.weights.sum()

    @property
    def is_share(self) -> bool:
        """Whether values are shares."""
        return self.scale > 1

    @property
    def least(self) -> float:
        """The smallest difference that counts, in `unit`."""
        return 0.0 if self.is_share else LEAST

    @property
    def best(self) -> int:
        """Index of the best depth."""
        return self.best_of(range(len(self.depths)))

    def best_of(self, indices: Sequence[int]) -> int:
        """Return the index of the best; the shallowest of those between which nothing counts."""
        scores = self.scores
        top = max(scores[i] for i in indices)
        return next(i for i in indices if scores[i] >= top - self.least)

    def number(self, value: float, plus: bool = False) -> str:
        """Write a number of this unit with as many digits as can mean something."""
        return f"{value:{'+' if plus else ''}.{1 if self.is_share else 4}f}"

    def level(self, score: float) -> str:
        """Write a value, rather than a difference, in the metric's own direction."""
        value = self.number(self.sign * score)
        return f"{value}%" if self.is_share else f"{value} {self.unit}"


def measure(result: Json, task: str) -> Measured:
    """Collect a task's items at the depths where all are finite."""
    facts, items = result["tasks"][task], result["items"].get(task)
    metric = facts["metric"]
    rows = {
        row["num_recurrences"]: row
        for row in result["rows"]
        if (row["task"], row["metric"]) == (task, metric)
    }
    known = items or {
        "weights": [1],
        # With its error, since a value without one cannot be compared either.
        "values": {r: [row["value"], row["stderr"]] for r, row in rows.items()},
    }
    values = {int(r): np.array(found, dtype=float) for r, found in known["values"].items()}
    depths = [r for r in sorted(values) if np.isfinite(values[r]).all()]
    flops = {r: float(row["flops_per_token"] or math.nan) for r, row in rows.items()}
    share = is_share(metric)
    own = "nats per token" if metric == "loss" else metric.replace("_", " ")
    scale = 100.0 if share else 1.0
    sign = 1 if facts["higher_is_better"] else -1
    count = len(known["weights"])
    errors = None
    if not items:
        # Wald's error of a share is 0 where all or none are right, which is not how sure one is.
        pairs = [values[r] for r in depths]
        floor = [share_error(value, facts["items"]) if share else 0 for value, _ in pairs]
        errors = scale * np.array([e or f for (_, e), f in zip(pairs, floor, strict=True)])
    return Measured(
        task=task,
        depths=tuple(depths),
        better=np.reshape([values[r][:count] for r in depths], (len(depths), count)) * sign * scale,
        weights=np.array(known["weights"], dtype=float),
        flops=tuple(flops.get(r, math.nan) for r in depths),
        num_items=count if items else facts["items"],
        sign=sign,
        unit="points" if share else own,
        scale=scale,
        errors=errors,
        left_out=tuple(sorted(set(values) - set(depths))),
    )


def share_error(share: float, count: int) -> float:
    """Return a standard error of a share that is never 0, for differences (Agresti, Caffo 2000)."""
    middle = (share * count + 1) / (count + 2)
    return math.sqrt(middle * (1 - middle) / (count + 2))


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
    means = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        times = draws(len(weights))[start : start + _RESAMPLES_AT_ONCE].astype(float)
        means.append(times @ values.T / (times @ weights)[:, None])
    return np.concatenate(means)


@functools.lru_cache(maxsize=2)
def draws(count: int) -> NDArray[np.uint8]:
    """Return how often each of so many items is in each resample, by resample and item.

    Kept, since all comparisons on a task see the same resamples.
    """
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    times = np.empty((NUM_RESAMPLES, count), dtype=np.uint8)
    offsets = count * np.arange(_RESAMPLES_AT_ONCE)[:, None]
    for start in range(0, NUM_RESAMPLES, _RESAMPLES_AT_ONCE):
        picks = rng.integers(count, size=(_RESAMPLES_AT_ONCE, count)) + offsets
        found = np.bincount(picks.ravel(), minlength=offsets.size * count)
        times[start : start + _RESAMPLES_AT_ONCE] = found.reshape(-1, count)
    return times


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
    error = math.hypot(first.errors[i], second.errors[j])
    return unpaired(value, error, first.num_items, choices)


def unpaired(value: float, error: float, num_items: int, choices: int = 1) -> Difference:
    """Give a difference of two means its normal interval, as if of independent samples.

    The standard error is that of the difference. On the same items this is too wide as a rule,
    since what is hard for one model is hard for another.
    """
    z = NormalDist().inv_cdf(1 - 0.025 / choices)
    half = z * error if num_items >= MIN_ITEMS else math.inf
    return Difference(value, value - half, value + half, paired=False)


def interval(value: float, drawn: Array, num_items: int, choices: int = 1) -> Difference:
    """Give a difference the interval that its resamples span, if the items are enough for one."""
    if num_items < MIN_ITEMS:
        return Difference(value, -math.inf, math.inf)
    tail = 0.025 / choices
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Difference(value, float(low), float(high))


def answer(
    what: str, than: str, gap: Difference, measured: Measured, after: str = ""
) -> tuple[str, str]:
    """Say by how much one thing is better than another; `after` ends the sentence.

    Returns:
        Yes, No or Not shown, and the sentence, without its full stop.
    """
    number, unit = measured.number, measured.unit
    around = f"(95% interval {number(gap.low, True)} to {number(gap.high, True)}{gap.aside})"
    if not math.isfinite(gap.low):
        doubt = f", but {measured.num_items} items are too few to tell that from chance"
    elif gap.low <= 0 <= gap.high:
        doubt = f" {around}, which may be chance"
    elif abs(gap.value) < measured.least:
        doubt = f" {around}: below {measured.least:g} it is no difference that counts"
    else:
        word, side = ("Yes", "better") if gap.value > 0 else ("No", "worse")
        low, high = sorted((abs(gap.low), abs(gap.high)))
        return word, (
            f"{what} is {number(abs(gap.value))} {unit} {side} than {than} "
            f"(95% interval {number(low)} to {number(high)}{gap.aside}){after}"
        )
    what = what[0].lower() + what[1:]
    return "Not shown", (
        f"the gain of {what} over {than} is {number(gap.value, True)} {unit}{doubt}{after}"
    )


def compare(
    name: str, what: str, than: str, gap: Difference, measured: Measured, after: str = ""
) -> Finding:
    """Turn what `answer` says into a finding."""
    word, sentence = answer(what, than, gap, measured, after)
    said = f"{word}: {sentence}." if word == "Not shown" else f"{sentence}."
    return finding(name, gap, measured.unit, said)


def finding(name: str, gap: Difference, unit: str, sentence: str) -> Finding:
    """Turn a difference into a finding; an interval without bounds is none."""
    low, high = (gap.low, gap.high) if math.isfinite(gap.low) else (None, None)
    return Finding(name, gap.value, low, high, unit, sentence)


def unknown(name: str, sentence: str, unit: str = "") -> Finding:
    """Return a finding without a number, whose sentence says why."""
    return Finding(name, None, None, None, unit, sentence)
