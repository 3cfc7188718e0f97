"""Laws fitted to what was measured: of depth, of training compute, and of a loop's worth.

Pure functions of results as `rondo eval` writes them; only numpy is imported. A law that the points
do not support is refused, and a sentence says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rondo.evaluation.comparisons import (
    LEAST,
    MIN_ITEMS,
    Array,
    Difference,
    Finding,
    Json,
    Measured,
    compare,
    difference,
    measure,
    resample,
    unknown,
)

_MIN_POINTS = 4
# A law is refused where a point lies farther off than this many standard errors.
_CLEARLY = 3.0
_NUM_REFITS = 200
_SEED = 0
# An exponent at these bounds stands for (at best) a logarithm, or for a step at the first point.
_EXPONENTS = (0.05, 8.0)
_GOLDEN = (math.sqrt(5) - 1) / 2
# More points of a training curve than this are averaged in groups first.
_MAX_CURVE_POINTS = 200
_WARM_UP = 0.1
_PHIS = np.linspace(-0.5, 1.5, 101)
_SAME_TOKENS = 0.05
_MIN_RUNS = 5
# Student's t at 97.5% by degrees of freedom, from one.
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True)
class SaturatingFit:
    """The law y(x) = limit + amplitude * x**(-exponent), with 95% intervals."""

    limit: float
    amplitude: float
    exponent: float
    limit_low: float
    limit_high: float
    exponent_low: float
    exponent_high: float
    rmse: float
    """Root of the mean squared distance of the points, in the units of y."""
    num_points: int

    def predict(self, x: float) -> float:
        """Return y at x, which says little far outside what was fitted."""
        return self.limit + self.amplitude * x**-self.exponent


@dataclass(frozen=True, slots=True, eq=False)
class _Curves:
    """The law fitted to many curves over the same points; all but `predicted` are by curve."""

    limit: Array
    amplitude: Array
    exponent: Array
    predicted: Array


def depth_fit(result: Json, task: str) -> tuple[SaturatingFit | None, list[Finding]]:
    """Fit a task's value, in the metric's own unit, against recurrence; items are resampled."""
    name, measured = "depth law", measure(result, task)
    if len(measured.depths) < _MIN_POINTS:
        sentence = (
            f"No law of depth on {task}: it takes {_MIN_POINTS} depths, and "
            f"{len(measured.depths)} were measured."
        )
        return None, [unknown(name, sentence)]
    if measured.num_items < MIN_ITEMS:
        sentence = f"No law of depth on {task}: {measured.num_items} items are too few."
        return None, [unknown(name, sentence)]
    own = measured.sign / measured.scale
    drawn = own * resample(measured, _NUM_REFITS)
    errors = drawn.std(0)
    weights = errors**-2 if errors.min() > 0 else np.ones(len(errors))
    x = np.array(measured.depths, dtype=float)
    law, refits, doubt = _saturating(x, own * measured.scores, weights, drawn)
    doubt = doubt or _turns(measured) or _misses(own * measured.scores, law, refits, drawn, x)
    if doubt:
        return None, [unknown(name, f"No law of depth on {task}: {doubt}.")]
    # The last depth and the limit are resampled together, so that how hard the items are cancels.
    left = measured.sign * measured.scale * (refits.limit - drawn[:, -1])
    return law, _depth_findings(law, left, measured)


def _turns(measured: Measured) -> str:
    """Say where a curve is known to turn, which no law of this kind does."""
    best, last = measured.best, len(measured.depths) - 1
    loss = difference(measured, best, measured, last, choices=last)
    if loss.low <= 0 or loss.value < measured.least:
        return ""
    depths = measured.depths
    return f"the curve turns, r = {depths[last]} being worse than r = {depths[best]}"


def _misses(y: Array, law: SaturatingFit, refits: _Curves, drawn: Array, x: Array) -> str:
    """Say where the law misses a point by more than resampling could move the two apart."""
    off = np.abs(y - [law.predict(one) for one in x])
    errors = (drawn - refits.predicted).std(0)
    beyond = np.where(off > LEAST, off - _CLEARLY * errors, -1)
    worst = int(beyond.argmax())
    if beyond[worst] <= 0:
        return ""
    return (
        f"the curve is of another shape, r = {x[worst]:g} lying more than {_CLEARLY:g} standard "
        "errors off the best law"
    )


def training_fit(result: Json) -> tuple[SaturatingFit | None, list[Finding]]:
    """Fit the loss of one run against its training FLOPs.

    The validation at the depth nearest the trained one is used where it has enough points, else
    the training loss. The first tenth of the points (the warm-up) is left out. Residuals are
    resampled in blocks, since those of neighbouring steps go together.
    """
    model, name = result["model"], "training law"
    flops, losses, what = curve_points(model["curve"], model["trained_recurrence"])
    if len(flops) < _MIN_POINTS:
        sentence = (
            f"No law of training for {model['label']}: it takes {_MIN_POINTS} points of its curve "
            f"after the warm-up, and there are {len(flops)}."
        )
        return None, [unknown(name, sentence)]
    weights = np.ones(len(flops))
    predicted = _fit(flops, losses[None], weights).predicted[0]
    residuals = (losses - predicted) * math.sqrt(len(flops) / max(1, len(flops) - 3))
    rng = np.random.default_rng(_SEED)
    block = max(2, round(len(flops) ** (1 / 3)))
    starts = rng.integers(len(flops), size=(_NUM_REFITS, math.ceil(len(flops) / block), 1))
    picks = (starts + np.arange(block)).reshape(_NUM_REFITS, -1)[:, : len(flops)] % len(flops)
    law, _, doubt = _saturating(flops, losses, weights, predicted + residuals[picks])
    if doubt:
        sentence = f"No law of training for {model['label']}, {what}: {doubt}."
        return None, [unknown(name, sentence)]
    about = f"{model['label']}, {what} over {law.num_points} points"
    return law, [
        Finding(
            "training limit",
            law.limit,
            law.limit_low,
            law.limit_high,
            "nats per token",
            f"{about}: the curve heads for {law.limit:.4f} (95% interval {law.limit_low:.4f} to "
            f"{law.limit_high:.4f}), as far as this run's schedule and data go on.",
        ),
        Finding(
            "training exponent",
            law.exponent,
            law.exponent_low,
            law.exponent_high,
            "",
            f"What is above the limit falls as FLOPs to the power -{law.exponent:.2f} (95% "
            f"interval {law.exponent_low:.2f} to {law.exponent_high:.2f}; {_quality(law.rmse)}). "
            "Within one run the learning rate shapes it too: it is no scaling law across runs.",
        ),
    ]


def curve_points(curve: Sequence[Json], trained: float | None) -> tuple[Array, Array, str]:
    """Return FLOPs, losses and what they are, after the warm-up, of a training curve."""
    late = curve[math.ceil(_WARM_UP * len(curve)) :]
    depths = {int(depth) for point in late for depth in point.get("validation") or {}}
    what = "training loss"
    known = _finite([(point["flops"], point["loss"]) for point in late])
    if depths:
        near = min(sorted(depths), key=lambda depth: abs(math.log(depth / (trained or 1))))
        validation = [(point.get("validation") or {}).get(str(near)) for point in late]
        found = _finite(
            [(point["flops"], loss) for point, loss in zip(late, validation, strict=True)]
        )
        if len(found) >= _MIN_POINTS:
            what, known = f"validation loss at r = {near}", found
    groups = np.array_split(np.array(known), min(len(known), _MAX_CURVE_POINTS) or 1)
    means = np.array([group.mean(0) for group in groups if len(group)]).reshape(-1, 2)
    return means[:, 0], means[:, 1], what


def _finite(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if x > 0 and y is not None and math.isfinite(y)]


def _depth_findings(fit: SaturatingFit, left: Array, measured: Measured) -> list[Finding]:
    unit = "%" if measured.is_share else measured.unit
    limit, low, high = (measured.scale * one for one in (fit.limit, fit.limit_low, fit.limit_high))
    last = measured.depths[-1]
    value = measured.sign * limit - float(measured.scores[-1])
    low_left, high_left = np.quantile(left, [0.025, 0.975]).tolist()
    gap = Difference(value, low_left, high_left, paired=measured.errors is None)
    endless = "Depth without end, if the curve went on so,"
    return [
        Finding(
            "depth limit",
            limit,
            low,
            high,
            unit,
            f"Over r = {measured.depths[0]} to {last} the curve heads for "
            f"{measured.level(measured.sign * limit)} (95% interval {measured.number(low)} to "
            f"{measured.number(high)}).",
        ),
        compare("depth left", endless, f"r = {last}", gap, measured),
        Finding(
            "depth exponent",
            fit.exponent,
            fit.exponent_low,
            fit.exponent_high,
            "",
            f"The distance to the limit shrinks as r to the power -{fit.exponent:.2f} (95% "
            f"interval {fit.exponent_low:.2f} to {fit.exponent_high:.2f}; "
            f"{_quality(measured.scale * fit.rmse, measured)}).",
        ),
    ]


def _quality(rmse: float, measured: Measured | None = None) -> str:
    number = measured.number(rmse) if measured else f"{rmse:.4f}"
    return f"points lie {number} {measured.unit if measured else 'nats per token'} off the law"


def _saturating(
    x: Array, y: Array, weights: Array, drawn: Array
) -> tuple[SaturatingFit, _Curves, str]:
    """Fit one curve, with intervals from refits of `drawn` (resample, point).

    Returns:
        The law, the refits, and why the law is to be refused, or nothing.
    """
    one, many = _fit(x, y[None], weights), _fit(x, drawn, weights)
    drop = np.quantile(many.predicted[:, 0] - many.predicted[:, -1], [0.025, 0.975])
    doubt = ""
    if drop[0] <= 0 <= drop[1]:
        doubt = "the curve is flat within its errors"
    elif one.exponent[0] < 1.01 * _EXPONENTS[0]:
        doubt = "the curve goes on without bending, and no limit is in sight"
    elif one.exponent[0] > 0.99 * _EXPONENTS[1]:
        doubt = "the curve is a step at its first point, which no exponent describes"
    limits, exponents = (np.quantile(a, [0.025, 0.975]) for a in (many.limit, many.exponent))
    law = SaturatingFit(
        limit=float(one.limit[0]),
        amplitude=float(one.amplitude[0]),
        exponent=float(one.exponent[0]),
        limit_low=float(limits[0]),
        limit_high=float(limits[1]),
        exponent_low=float(exponents[0]),
        exponent_high=float(exponents[1]),
        rmse=float(np.sqrt(np.mean((y - one.predicted[0]) ** 2))),
        num_points=len(x),
    )
    return law, many, doubt


def _fit(x: Array, y: Array, weights: Array) -> _Curves:
    """Fit every row of y by least squares.

    Given the exponent the law is linear. The exponent comes from a grid in its logarithm, and
    from golden-section search between the neighbours of the best.
    """
    # Relative to the first point, so that powers of FLOPs stay in range.
    u = np.log(x / x[0])
    grid = np.linspace(math.log(_EXPONENTS[0]), math.log(_EXPONENTS[1]), 64)

    def error(logs: Array) -> Array:
        return _linear(np.exp(-np.exp(logs)[..., None] * u), y, weights)[2]

    best = error(np.repeat(grid[:, None], len(y), 1)).argmin(0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    for _ in range(40):
        span = _GOLDEN * (high - low)
        left = error(high - span) < error(low + span)
        low, high = np.where(left, low, high - span), np.where(left, low + span, high)
    exponent = np.exp((low + high) / 2)
    basis = np.exp(-exponent[:, None] * u)
    limit, slope, _ = _linear(basis, y, weights)
    return _Curves(
        limit=limit,
        amplitude=slope * np.exp(exponent * math.log(x[0])),
        exponent=exponent,
        predicted=limit[:, None] + slope[:, None] * basis,
    )


def _linear(basis: Array, y: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Return intercept, slope and weighted squared error of lines over the last axis."""
    share = weights / weights.sum()
    b_mean, y_mean = basis @ share, y @ share
    b, t = basis - b_mean[..., None], y - y_mean[..., None]
    slope = ((b * t) @ share) / (b**2 @ share)
    error = (t - slope[..., None] * b) ** 2 @ share
    return y_mean - slope * b_mean, slope, error


@dataclass(frozen=True, slots=True)
class _Run:
    """One trained model as the law of recurrence sees it."""

    once: float
    looped: float
    depth: int
    tokens: float
    loss: float


def recurrence_equivalence(results: Sequence[Json], task: str) -> Finding | None:
    """Fit what a loop is worth in parameters: the exponent phi of arXiv:2604.21106.

    A core of N_rec parameters that runs r times counts as r**phi * N_rec beside the N_once that
    run once, in L = E + A * (N_once + r**phi * N_rec)**(-alpha), plus B * tokens**(-beta) where
    runs differ in tokens. Results know only all parameters together: each layer is taken to hold
    an equal share, the embedding's included, which counts the core somewhat too large. The interval
    is that of the profile likelihood. Twins do not count, nor do runs of another parent than that
    of the first: the law is of one family of weights, looped.

    Returns:
        None for anything but losses, and with too few runs to tell: at least five, one more than
        the law has constants, over two shapes and two depths.
    """
    looped = [one for one in results if one["model"]["role"] == "recurrent"]
    same = [one for one in looped if one["model"]["parent"] == looped[0]["model"]["parent"]]
    runs = [run for result in same if (run := _run(result, task))]
    tokens = [run.tokens for run in runs]
    differ = bool(runs) and max(tokens) > min(tokens) * (1 + _SAME_TOKENS)
    constants = 6 if differ else 4
    shapes = {(run.once, run.looped) for run in runs}
    depths = {run.depth for run in runs}
    if len(runs) < max(_MIN_RUNS, constants + 1) or len(shapes) < 2 or len(depths) < 2:
        return None
    errors = np.array([_law_error(runs, phi, differ) for phi in _PHIS.tolist()])
    phi = float(_PHIS[errors.argmin()])
    free = len(runs) - constants
    t = _T[free - 1] if free <= len(_T) else 1.96 + 2.4 / free
    inside = _PHIS[errors <= errors.min() * (1 + t**2 / free)]
    step = float(_PHIS[1] - _PHIS[0])
    low, high = float(inside[0]) - step, float(inside[-1]) + step
    known = low > float(_PHIS[0]) and high < float(_PHIS[-1])
    meaning = (
        "the interval is open: these runs do not settle it"
        if not known
        else "not told from looping that buys nothing"
        if low <= 0 <= high
        else "0 would be looping that buys nothing, 1 as good as distinct layers"
    )
    sentence = (
        f"On {task} over {len(runs)} runs, r loops of the core are worth r^{phi:.2f} times its "
        f"parameters (phi {phi:.2f}, 95% interval {low:.2f} to {high:.2f}): {meaning}."
    )
    return Finding("recurrence equivalence", phi, low, high, "", sentence)


def _run(result: Json, task: str) -> _Run | None:
    """Read one trained run at the measured depth nearest its trained one."""
    model = result["model"]
    if not model["training"] or result["tasks"].get(task, {}).get("kind") != "loss":
        return None
    measured = measure(result, task)
    if not measured.depths:
        return None
    trained = model["trained_recurrence"] or 1
    depth = min(measured.depths, key=lambda r: abs(math.log(r / trained)))
    split = model["split"]
    share = len(split["core"]) / sum(map(len, split.values())) if split else 0.0
    return _Run(
        once=model["parameters"] * (1 - share),
        looped=model["parameters"] * share,
        depth=depth,
        tokens=float(model["training"]["tokens"]),
        loss=-float(measured.scores[measured.depths.index(depth)]),
    )


def _law_error(runs: Sequence[_Run], phi: float, with_tokens: bool) -> float:
    """Return the least squared error over E, A, B >= 0, alpha and beta for one phi.

    Alpha and beta come from a grid that zooms in; given them the law is linear.
    """
    size = np.log([run.once + run.depth**phi * run.looped for run in runs])
    tokens = np.log([run.tokens for run in runs])
    losses = np.array([run.loss for run in runs])
    spans = [np.log([0.02, 2.0]), np.log([0.02, 2.0])]
    best = math.inf
    for _ in range(4):
        alphas, betas = (np.linspace(span[0], span[1], 25) for span in spans)
        f = np.exp(-np.exp(alphas)[:, None, None] * (size - size.min()))
        h = np.exp(-np.exp(betas)[None, :, None] * (tokens - tokens.min()))
        error = _plane_error(f, h if with_tokens else None, losses)
        a, b = np.unravel_index(error.argmin(), error.shape)
        best = min(best, float(error[a, b]))
        spans = [
            np.array([grid[max(i - 2, 0)], grid[min(i + 2, len(grid) - 1)]])
            for grid, i in ((alphas, int(a)), (betas, int(b) if with_tokens else 0))
        ]
    return best


def _plane_error(f: Array, h: Array | None, y: Array) -> Array:
    """Squared error of y = E + A * f (+ B * h) over the last axis; infinite if one is below 0."""
    f_mean, y_mean = f.mean(-1, keepdims=True), y.mean()
    fc, yc = f - f_mean, y - y_mean
    if h is None:
        a = (fc * yc).sum(-1) / np.maximum((fc**2).sum(-1), 1e-30)
        error = ((yc - a[..., None] * fc) ** 2).sum(-1)
        return np.where((a >= 0) & (y_mean - a * f_mean[..., 0] >= 0), error, np.inf)
    h_mean = h.mean(-1, keepdims=True)
    hc = h - h_mean
    ff, hh, fh = (fc**2).sum(-1), (hc**2).sum(-1), (fc * hc).sum(-1)
    fy, hy = (fc * yc).sum(-1), (hc * yc).sum(-1)
    whole = np.maximum(ff * hh - fh**2, 1e-30)
    a, b = (fy * hh - hy * fh) / whole, (hy * ff - fy * fh) / whole
    error = ((yc - a[..., None] * fc - b[..., None] * hc) ** 2).sum(-1)
    e = y_mean - a * f_mean[..., 0] - b * h_mean[..., 0]
    return np.where((a >= 0) & (b >= 0) & (e >= 0), error, np.inf)
