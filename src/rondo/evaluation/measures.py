"""What depth does to one task, each as a number with its interval and a sentence that says it.

Pure functions of results as `rondo eval` writes them; `comparisons` says what intervals are.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rondo.evaluation.comparisons import (
    MIN_ITEMS,
    Array,
    Difference,
    Finding,
    Json,
    Measured,
    compare,
    difference,
    finding,
    interval,
    measure,
    paired_bootstrap,
    resample,
    unknown,
)

# A curve that leaves its chord by less of its height than this is straight and has no knee.
_LEAST_BEND = 0.1
_STABLE_UP_TO = 4


def depth_measures(result: Json, task: str) -> list[Finding]:
    """Measure one model on one task: best depth, knees, gains, oracle, stability."""
    measured = measure(result, task)
    findings = []
    if measured.left_out:
        depths = ", ".join(map(str, measured.left_out))
        sentence = f"r = {depths} gave values that are no numbers on {task}, and is left out."
        findings.append(unknown("left out", sentence))
    if len(measured.depths) < 2:
        sentence = f"Fewer than two depths were measured on {task}: nothing is known about depth."
        return [*findings, unknown("depth", sentence)]
    drawn = resample(measured)
    return [
        *findings,
        _best_depth(measured, drawn),
        *_seeds(result, measured),
        _knee(measured, drawn),
        _practical_knee(measured, drawn),
        _total_gain(measured, drawn),
        *_marginal_gains(measured, drawn),
        *_by_item(measured),
        _stability(measured, drawn, result["model"]["trained_recurrence"]),
    ]


def knees(depths: Sequence[int], scores: Array) -> NDArray[np.int64]:
    """Find where each curve bends most, as Kneedle does (Satopaa et al. 2011), over log depth.

    It is the largest distance above the chord of the curve scaled to a unit square.

    Args:
        depths: Rising, positive.
        scores: By curve and depth; more is better.

    Returns:
        Index of the knee by curve; -1 where there are fewer than three depths, or no bend.
    """
    if len(depths) < 3:
        return np.full(len(scores), -1)
    x = np.log2(depths)
    x = (x - x[0]) / (x[-1] - x[0])
    height = np.ptp(scores, axis=1, keepdims=True)
    y = (scores - scores[:, :1]) / np.where(height > 0, height, 1)
    above = (y - y[:, -1:] * x)[:, 1:-1]
    return np.where(above.max(1) >= _LEAST_BEND, above.argmax(1) + 1, -1)


def _gain(
    measured: Measured, drawn: Array, deep: int, shallow: int, choices: int = 1
) -> Difference:
    """How much better the depth with one index is than that with another."""
    if measured.errors is not None:
        return difference(measured, deep, measured, shallow, choices)
    value = float(measured.scores[deep] - measured.scores[shallow])
    return interval(value, drawn[:, deep] - drawn[:, shallow], measured.num_items, choices)


def _best_depth(measured: Measured, drawn: Array) -> Finding:
    name, unit, best, depths = "best depth", "recurrences", measured.best, np.array(measured.depths)
    alike = depths[measured.scores >= measured.scores.max() - measured.least]
    level = measured.level(measured.scores[best])
    if len(alike) > 1:
        which = ", ".join(map(str, alike))
        sentence = f"No depth stands out: r = {which} are the best alike ({level})."
        return unknown(name, sentence, unit)
    what = f"r = {depths[best]} is the best of {len(depths)} depths ({level})"
    if measured.num_items < MIN_ITEMS:
        sentence = f"{what}, but {measured.num_items} items are too few to tell that from chance."
        return Finding(name, float(depths[best]), None, None, unit, sentence)
    winners = drawn.argmax(1)
    low, high = np.quantile(depths[winners], [0.025, 0.975], method="inverted_cdf")
    sentence = f"{what}, as in {np.mean(winners == best):.0%} of {_draws(measured)}."
    return Finding(name, float(depths[best]), float(low), float(high), unit, sentence)


def _seeds(result: Json, measured: Measured) -> list[Finding]:
    """How far the seeds of the evaluation lie apart at the best depth, where there are several."""
    best, metric = measured.depths[measured.best], result["tasks"][measured.task]["metric"]
    keys, wanted = ("task", "metric", "num_recurrences"), (measured.task, metric, best)
    row = next(row for row in result["rows"] if tuple(row[key] for key in keys) == wanted)
    values = [measured.scale * value for value in row["seed_values"] if value is not None]
    if len(values) < 2:
        return []
    low, high = min(values), max(values)
    sentence = (
        f"At r = {best} the {len(values)} seeds gave {measured.level(measured.sign * low)} to "
        f"{measured.level(measured.sign * high)}; their mean is what counts."
    )
    return [Finding("spread over seeds", high - low, None, None, measured.unit, sentence)]


def _knee(measured: Measured, drawn: Array) -> Finding:
    """Only a curve that is known to rise can have a knee."""
    depths, unit = measured.depths, "recurrences"
    if len(depths) < 3:
        return unknown("knee", "No knee: it takes at least three depths.", unit)
    rise = _gain(measured, drawn, *_rise(measured), choices=len(depths) - 1)
    if rise.low <= 0 or rise.value < measured.least:
        return unknown("knee", f"No knee: no depth is shown to beat r = {depths[0]}.", unit)
    knee = int(knees(depths, measured.scores[None])[0])
    found = knees(depths, drawn)
    agree = f"{np.mean(found == knee):.0%} of {_draws(measured)}"
    if knee < 0:
        sentence = f"No knee: over log depth the gain is nearly straight, as in {agree}."
        return unknown("knee", sentence, unit)
    bent = np.array(depths)[found[found >= 0]]
    low, high = np.quantile(bent, [0.025, 0.975], method="inverted_cdf")
    sentence = (
        f"The curve bends most at r = {depths[knee]} (Kneedle over log depth), as in {agree}; "
        "loops beyond it buy less."
    )
    return Finding("knee", float(depths[knee]), float(low), float(high), unit, sentence)


def _practical_knee(measured: Measured, drawn: Array) -> Finding:
    """The error is that of the paired difference: models differ less than items do."""
    best, name, unit = measured.best, "practical knee", "recurrences"
    if measured.num_items < MIN_ITEMS:
        return unknown(name, f"Not known: {measured.num_items} items are too few.", unit)
    gaps = measured.scores[best] - measured.scores
    errors = (drawn[:, [best]] - drawn).std(0)
    kind = "paired" if measured.errors is None else "unpaired"
    least = measured.depths[int(np.argmax(gaps <= errors))]
    sentence = (
        f"r = {least} is the smallest depth within one ({kind}) standard error of the best, "
        f"r = {measured.depths[best]}."
    )
    return Finding(name, float(least), None, None, unit, sentence)


def _rise(measured: Measured) -> tuple[int, int]:
    """Return the indices of the best depth beyond the shallowest, and of the shallowest."""
    return measured.best_of(range(1, len(measured.depths))), 0


def _total_gain(measured: Measured, drawn: Array) -> Finding:
    deep, shallow = _rise(measured)
    choices = len(measured.depths) - 1
    gap = _gain(measured, drawn, deep, shallow, choices)
    what = f"r = {measured.depths[deep]}" + (
        f", the best of {choices} deeper ones," if choices > 1 else ""
    )
    return compare("total gain", what, f"r = {measured.depths[0]}", gap, measured)


def _marginal_gains(measured: Measured, drawn: Array) -> list[Finding]:
    """What each step between neighbouring depths gains, in all and per executed GFLOP."""
    gains, prices = [], []
    costs = (np.diff(measured.flops) / 1e9).tolist()
    for i, (a, b) in enumerate(zip(measured.depths, measured.depths[1:], strict=False)):
        gap, step = _gain(measured, drawn, i + 1, i), f"{a} to {b}"
        gains.append(compare(f"gain {step}", f"r = {b}", f"r = {a}", gap, measured))
        prices.append(_price(step, gap, costs[i], measured.unit))
    return gains + prices


def _price(step: str, gap: Difference, cost: float, unit: str) -> Finding:
    name, unit_price = f"gain per GFLOP {step}", f"{unit} per GFLOP per token"
    if not cost > 0:
        return unknown(name, f"The FLOPs from r = {step} are not known.", unit_price)
    value, low, high = gap.value / cost, gap.low / cost, gap.high / cost
    between = (
        f"95% interval {low:+.3g} to {high:+.3g}{gap.aside}"
        if math.isfinite(low)
        else "too few items"
    )
    chance = "; this may be chance" if low <= 0 <= high else ""
    sentence = (
        f"From r = {step} a further GFLOP per token buys {value:+.3g} {unit} ({between}){chance}."
    )
    return finding(name, Difference(value, low, high), unit_price, sentence)


def _by_item(measured: Measured) -> list[Finding]:
    """What only the items can tell."""
    if measured.errors is not None:
        sentence = (
            f"Only values and standard errors are known on {measured.task}, no items: nothing can "
            "be said of answers that depth spoils or mends, nor of the best depth of each item."
        )
        return [unknown("items", sentence)]
    right_or_wrong = measured.is_share and measured.sign > 0
    rates = _answers(measured) if right_or_wrong else [_documents(measured)]
    return [*rates, _oracle(measured)]


def _draws(measured: Measured) -> str:
    return "resamples" if measured.errors is None else "draws from the standard errors"


def _answers(measured: Measured) -> tuple[Finding, Finding]:
    """How often deeper loops spoil a right answer, and how often they mend a wrong one."""
    # Values are means where there are several seeds: an item is right where most of them are.
    right = measured.better > measured.scale / 2
    shallow, deep = f"r = {measured.depths[0]}", f"r = {measured.depths[-1]}"
    total = right.shape[1]
    spoilt = int((right[:-1].any(0) & ~right[-1]).sum())
    mended, lost = int((~right[0] & right[-1]).sum()), int((right[0] & ~right[-1]).sum())
    low, high = wilson(mended, mended + lost)
    balance = (
        "more than" if low > 0.5 else "fewer than" if high < 0.5 else "not shown to differ from"
    )
    return (
        _share(
            "overthinking rate",
            spoilt,
            total,
            f"of the items are right at some shallower depth and wrong at {deep}",
        ),
        _share(
            "self-correction rate",
            mended,
            total,
            f"of the items are wrong at {shallow} and right at {deep}, {balance} the "
            f"{lost / total:.1%} that go the other way",
        ),
    )


def _documents(measured: Measured) -> Finding:
    gains = measured.better[-1] - measured.better[0]
    better, total = int((gains > measured.least * measured.weights).sum()), measured.num_items
    low, high = wilson(better, total)
    half = "more than half" if low > 0.5 else "less than half" if high < 0.5 else None
    half = half or "not shown to differ from half"
    return _share(
        "documents better",
        better,
        total,
        f"of the documents are better at r = {measured.depths[-1]} than at "
        f"r = {measured.depths[0]}: {half}",
    )


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson 1927), which holds for few and for no hits."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.96, hits / total
    middle = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    whole = 1 + z**2 / total
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def _share(name: str, hits: int, total: int, meaning: str) -> Finding:
    low, high = wilson(hits, total)
    sentence = f"{hits / total:.1%} {meaning} (95% interval {low:.1%} to {high:.1%})."
    return Finding(name, 100 * hits / total, 100 * low, 100 * high, "% of items", sentence)


def _oracle(measured: Measured) -> Finding:
    best = measured.best
    gap = paired_bootstrap(measured.better.max(0), measured.better[best], measured.weights)
    sentence = (
        f"Each item at the depth that suits it best would reach "
        f"{measured.level(gap.value + measured.scores[best])}, {measured.number(gap.value)} "
        f"{measured.unit} better than r = {measured.depths[best]} for all: an upper bound of any "
        "router, not attainable, since it knows the answers and profits from luck too."
    )
    return finding("oracle depth", gap, measured.unit, sentence)


def _stability(measured: Measured, drawn: Array, trained: float | None) -> Finding:
    """Compare the deepest depth up to four times the trained one with the trained one."""
    name = "stability"
    if trained is None:
        sentence = "Not trained with recurrence: there is no trained depth to go beyond."
        return unknown(name, sentence, measured.unit)
    near = min(
        range(len(measured.depths)), key=lambda i: abs(math.log(measured.depths[i] / trained))
    )
    beyond = [i for i, r in enumerate(measured.depths) if trained < r <= _STABLE_UP_TO * trained]
    if not beyond or beyond[-1] <= near:
        sentence = (
            f"No depth between the trained one ({trained:g}) and {_STABLE_UP_TO} times it was "
            "measured beyond the one nearest to it; name some with --recurrences."
        )
        return unknown(name, sentence, measured.unit)
    deep, anchor = measured.depths[beyond[-1]], measured.depths[near]
    than = f"r = {anchor}" + ("" if anchor == trained else f" (the nearest to {trained:g})")
    what = f"r = {deep}, beyond the trained depth,"
    return compare(name, what, than, _gain(measured, drawn, beyond[-1], near), measured)
