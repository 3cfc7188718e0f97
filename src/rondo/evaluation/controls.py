"""What a claimed gain of depth must beat: blind choices of depth, and other uses of the compute.

A depth picked as the best of several looks good by luck, and a loop must beat what its training
or its inference would have bought elsewhere. What chooses a depth per item must beat more, see
`policies`. Pure functions of results as `rondo eval` writes them; only numpy is imported.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

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
    draws,
    is_share,
    measure,
    share_error,
    unknown,
    unpaired,
)

_NUM_SPLITS = 20
# Of the items, within each of which the depth is chosen anew.
_NUM_RESAMPLES = 300
_SEED = 0
# Budgets closer than this count as equal: a run ends with the step that crosses its budget.
EQUAL_FLOPS = 0.05
# Equal numbers may differ in the rounding of their file.
_SAME_FLOPS = 1e-8
_ROLES = {
    "static twin": ("static", "after"),
    "random twin": ("random", "after"),
    "parent": ("parent", "before"),
    "self-consistency": ("self-consistency", "before"),
}
_MISSING = {
    "static twin": "rondo train --mode static --budget.like RUN, then rondo eval --against static",
    "random twin": "rondo train --mode random --budget.like RUN, then rondo eval --against random",
    "parent": "rondo eval --against parent",
    "self-consistency": "rondo eval --against self-consistency",
}
# What a comparison comes to: what `compare` takes after a name, or why there is none.
Contest = tuple[str, str, Difference, Measured, str] | str


def find(results: Sequence[Json], role: str, stage: str) -> Json | None:
    """Return the first result with this role at this stage."""
    for result in results:
        if (result["model"]["role"], result["model"]["stage"]) == (role, stage):
            return result
    return None


def rival(results: Sequence[Json], name: str, ours: Json) -> Json | None:
    """Return the result that stands for a control by its name: of the same parent as ours.

    Of several, one that was trained on the same data goes first.
    """
    having = [one for one in results if one["model"]["parent"] == ours["model"]["parent"]]
    same = [one for one in having if data_of(one) == data_of(ours)]
    return find([*same, *having], *_ROLES[name])


def present(results: Sequence[Json], name: str) -> Json | None:
    """Return the first result that would be a control, of whatever parent."""
    return find(results, *_ROLES[name])


def lacking(results: Sequence[Json], name: str) -> str:
    """Say why a control is not there."""
    if other := present(results, name):
        return f"the {name} is of another parent ({other['model']['parent']})"
    return f"no {name} is among the results ({_MISSING[name]})"


def data_of(result: Json) -> str | None:
    """Return what a model was trained on, or none."""
    training = result["model"]["training"]
    return str(training["data"]) if training else None


def spoken(name: str, theirs: Json) -> str:
    """Name a control in a sentence."""
    if name != "self-consistency":
        return f"the {name}"
    return f"the parent's self-consistency of {theirs['rows'][0]['samples']} samples"


def share_items(first: Json, second: Json, task: str) -> bool:
    """Whether both results measured the same items of a task.

    Of what was published without items only the source can be told.
    """
    known = [
        (facts["sha256"] or facts["source"], result["items"].get(task, {}).get("weights"))
        for result in (first, second)
        if (facts := result["tasks"].get(task))
    ]
    return len(known) == 2 and known[0] == known[1]


def contest(
    ours: Json, theirs: Json, task: str, than: str, minimum: int = 1, maximum: float = math.inf
) -> Contest:
    """Set our best depth within bounds against another model's best, or against our own r = 1.

    The interval pays for every depth that could have been picked, on either side.
    """
    if not share_items(ours, theirs, task):
        return f"{than} was not measured on the same items"
    mine, other = measure(ours, task), measure(theirs, task)
    own = [i for i, r in enumerate(mine.depths) if minimum <= r <= maximum]
    rivals = [j for j, r in enumerate(other.depths) if ours is not theirs or r == 1]
    if not own or not rivals:
        return "no finite values at the depths to compare"
    i, j = mine.best_of(own), other.best_of(rivals)
    gap = difference(mine, i, other, j, choices=len(own) * len(rivals))
    what = f"r = {mine.depths[i]}" + (f", best of {len(own)}," if len(own) > 1 else "")
    if len(rivals) > 1:
        than += f" at its best (r = {other.depths[j]})"
    cost = cost_words(mine, i, other, j)
    return what, than, gap, mine, f", {cost}" if cost else ""


def depth_controls(results: Sequence[Json], task: str) -> list[Finding]:
    """Hold the looped model's depths on a task against every control that the results offer."""
    ours = find(results, "recurrent", "after") or find(results, "recurrent", "before")
    if ours is None or task not in ours["tasks"]:
        return [unknown("controls", f"No recurrent model was measured on {task}.")]
    measured = measure(ours, task)
    if len(measured.depths) < 2:
        return [unknown("controls", f"Fewer than two depths of {task} can be compared.")]
    names = ["static twin", "random twin", "parent"]
    if ours["tasks"][task]["kind"] == "generation":
        names.append("self-consistency")
    findings = [*blind_depths(measured), _NO_POLICY]
    for name in names:
        theirs = rival(results, name, ours)
        than = spoken(name, theirs) if theirs else ""
        found = contest(ours, theirs, task, than) if theirs else lacking(results, name)
        findings.append(_told(name, task, found, ours, theirs))
        if name == "static twin" and theirs and 1 in measured.depths:
            at_one = contest(ours, theirs, task, than, maximum=1)
            findings.append(_told(f"{name} at r = 1", task, at_one, ours, theirs))
    return findings + _checkpoint_controls(results, task)


_NO_POLICY = unknown(
    "depth per item",
    "One depth for all items leaves no depths to shuffle over them. What chooses a depth per item "
    "(an early exit) is held against the best blind mixture of equal cost and against its own "
    "depths shuffled; no such policy is among the results.",
)


def _told(name: str, task: str, found: Contest, ours: Json, theirs: Json | None) -> Finding:
    """Turn a contest into a finding; twins are told with what their training cost."""
    if isinstance(found, str):
        return unknown(name, f"Not known on {task}: {found}.")
    what, than, gap, measured, after = found
    if theirs and theirs["model"]["role"] in ("static", "random"):
        after = f", {training_words(ours, theirs)}{after}"
    return compare(name, what, than, gap, measured, after)


def blind_depths(measured: Measured) -> list[Finding]:
    """Score the blindly chosen best depth without the luck of choosing.

    The depth is chosen on one half of the items and scored on the other, both ways, over several
    random halvings; so is the best shallower depth, which costs less. The choice is made anew in
    each resample of the items, since the luck of choosing is part of the error: with the choice
    held fixed, 95% intervals were missed 13% of the time.
    """
    names, count = ("blind depth", "blind depth against cheaper"), measured.num_items
    if measured.errors is not None:
        reason = "a depth cannot be chosen on other items where no items are known"
        return [unknown(names[0], f"Not known on {measured.task}: {reason}.", measured.unit)]
    if count < MIN_ITEMS:
        reason = f"{count} items are too few to choose a depth on half of them"
        return [unknown(names[0], f"Not known on {measured.task}: {reason}.", measured.unit)]
    first_half = np.arange(count) < count // 2
    halves = np.random.default_rng(_SEED).permuted(np.tile(first_half, (_NUM_SPLITS, 1)), axis=1)
    values, often = _cross_fitted(measured, np.ones((1, count)), halves)
    drawn, _ = _cross_fitted(measured, draws(count)[:_NUM_RESAMPLES].astype(float), halves)
    margins = 1.96 * drawn.std(0)
    rate, depth = often.max() / often.sum(), measured.depths[int(often.argmax())]
    what = "One depth for all, chosen on the other half of the items,"
    others = (f"r = {measured.depths[0]}", "the best shallower depth, chosen likewise")
    return [
        compare(
            name, what, than, Difference(value, value - margin, value + margin), measured, after
        )
        for name, than, value, margin, after in zip(
            names,
            others,
            values[0].tolist(),
            margins.tolist(),
            (f"; r = {depth} was chosen in {rate:.0%} of halves", ""),
            strict=True,
        )
    ]


def _cross_fitted(
    measured: Measured, times: Array, halves: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Score the depth that each half chooses on the other half.

    Args:
        measured: The items.
        times: How often each item is there, by resample and item.
        halves: Whether an item is in the first half, by halving and item.

    Returns:
        The gain over the shallowest depth and over the best shallower one, by resample; and how
        often each depth was chosen.
    """
    columns = np.vstack([measured.better, measured.weights]).T
    everyone, order, often = np.arange(len(times)), np.arange(len(measured.depths)), 0
    whole, gains = times @ columns, np.zeros((len(times), 2))
    for half in halves:
        first = (times * half) @ columns
        for seen, unseen in ((first, whole - first), (whole - first, first)):
            # A half may come out empty of few items.
            scores = seen[:, :-1] / np.maximum(seen[:, -1:], 1e-9)
            best = scores.argmax(1)
            shallower = order < np.maximum(best, 1)[:, None]
            cheaper = np.where(shallower, scores, -np.inf).argmax(1)
            for column, other in enumerate((0, cheaper)):
                gains[:, column] += unseen[everyone, best] - unseen[everyone, other]
            often = often + np.bincount(best, minlength=len(order))
    return gains / whole[:, -1:] / len(halves), np.asarray(often, dtype=float)


def cost_words(first: Measured, i: int, second: Measured, j: int) -> str:
    """Say what depth i of one costs beside depth j of another, if it is not the same."""
    ratio = first.flops[i] / second.flops[j] if second.flops[j] else math.nan
    if not math.isfinite(ratio) or abs(ratio - 1) <= 0.01:
        return ""
    return f"at {ratio:.2f}x the FLOPs per token"


def training_words(ours: Json, theirs: Json) -> str:
    """Say how the training of the second compares with that of the first in FLOPs."""
    ratio, of_paper = training_ratio(ours, theirs)
    if ratio is None:
        return "training FLOPs unknown"
    if abs(ratio - 1) <= EQUAL_FLOPS:
        return f"at equal training FLOPs{of_paper}"
    return f"trained with {ratio:.2f}x its FLOPs{of_paper}"


def training_ratio(ours: Json, theirs: Json) -> tuple[float | None, str]:
    """Return the second's training FLOPs in those of the first, and which account they are of."""
    trainings = [result["model"]["training"] or {} for result in (ours, theirs)]
    for account, words in (("flops", ""), ("flops_paper", " (the paper's account)")):
        mine, other = (float(training.get(account) or 0) for training in trainings)
        if mine and other:
            return other / mine, words
    return None, ""


def equal_flops_losses(ours: Json, theirs: Json) -> Finding:
    """Compare the losses of two trainings at the largest training FLOPs that both reached.

    The validation loss counts where both have one, each at the depth nearest its trained one
    (without a loop, 1); else it is the training loss. Between points it is linear in log FLOPs.
    A run that goes on from there had not yet lowered its learning rate, which the sentence says.
    """
    name, unit = "equal training FLOPs", "nats per token"
    if data_of(ours) != data_of(theirs):
        return unknown(name, "Not known: the two were trained on different text.", unit)
    depths = [_validated_depth(result["model"]) for result in (ours, theirs)]
    if None in depths:
        depths = [None, None]
    curves = [
        _points_of(one["model"]["curve"], depth)
        for one, depth in zip((ours, theirs), depths, strict=True)
    ]
    if not all(len(curve) for curve in curves):
        return unknown(name, "Not known: a training curve is missing.", unit)
    ends = [curve[-1, 0] for curve in curves]
    flops = min(ends)
    if flops < max(curve[0, 0] for curve in curves):
        return unknown(name, "Not known: the training curves share no range of FLOPs.", unit)
    mine, other = (
        float(np.interp(math.log(flops), np.log(curve[:, 0]), curve[:, 1])) for curve in curves
    )
    names = [f"'{result['model']['label']}'" for result in (ours, theirs)]
    if depths[0] is None:
        what = "training losses (of single steps, and noisy) are"
    else:
        what = f"validation losses (at r = {depths[0]} and r = {depths[1]}) are"
    sentence = (
        f"At {flops:.2e} training FLOPs, the most that both reached, the {what} {mine:.4f} for "
        f"{names[0]} and {other:.4f} for {names[1]}, one run each, so without an interval"
    )
    if ends[1] > flops * (1 + EQUAL_FLOPS):
        sentence += (
            f"; {names[1]} is cut short there, before its learning rate had fallen: this favours "
            f"{names[0]} and is no claim"
        )
    elif ends[0] > flops * (1 + EQUAL_FLOPS):
        sentence += (
            f"; {names[0]} is cut short there, before its learning rate had fallen, to its "
            "disadvantage"
        )
    return Finding(name, other - mine, None, None, unit, f"{sentence}.")


def _validated_depth(model: Json) -> int | None:
    """Return the depth of a curve's validations that is nearest the trained one, or none."""
    depths = {int(r) for point in model["curve"] for r in point.get("validation") or {}}
    trained = model["trained_recurrence"] or 1
    return min(sorted(depths), key=lambda r: abs(math.log(r / trained)), default=None)


def checkpoint_contest(ours: Json, theirs: Json, task: str) -> Contest:
    """Set our latest checkpoint of at most their training FLOPs against what they ended as.

    Ours counts at its trained depth (or the nearest that was scored), theirs likewise. Only shares
    of right answers are compared: their standard errors follow from the number of items. Where
    checkpoints are far apart ours may have spent much less, and the sentence says how much.
    """
    facts = ours["tasks"][task]
    if not is_share(facts["metric"]):
        return "checkpoints are compared by right answers only"
    if not share_items(ours, theirs, task):
        return "both were not measured on the same items"
    mine, other = (checkpoint_scores(result, task) for result in (ours, theirs))
    if not mine or not other:
        return "no scores of checkpoints are there"
    budget, _, theirs_last, score = other[-1]
    affordable = [point for point in mine if point[0] <= budget * (1 + _SAME_FLOPS)]
    if not affordable:
        return (
            f"our first checkpoint, at {mine[0][0]:.3g} training FLOPs, spent more than the "
            f"{budget:.3g} of the whole other training"
        )
    flops, depth, step, best = affordable[-1]
    error = 100 * math.hypot(*(share_error(share, facts["items"]) for share in (best, score)))
    gap = unpaired(100 * (best - score), error, facts["items"])
    what = (
        f"The checkpoint of '{ours['model']['label']}' at step {step:,} ({flops:.3g} training "
        f"FLOPs, {flops / budget:.0%} of the other's), run at r = {depth},"
    )
    than = f"'{theirs['model']['label']}' at its end, step {theirs_last:,}"
    after = f": {best:.1%} against {score:.1%}"
    after += ", though its learning rate still had to fall" if step < mine[-1][2] else ""
    return what, than, gap, measure(ours, task), after


def equal_flops_checkpoint(ours: Json, theirs: Json, task: str) -> Finding:
    """Turn what `checkpoint_contest` comes to into a finding."""
    return _told("equal training FLOPs", task, checkpoint_contest(ours, theirs, task), ours, None)


def _checkpoint_controls(results: Sequence[Json], task: str) -> list[Finding]:
    """Hold every looped model whose checkpoints were scored against its static twin's end."""
    findings = []
    for result in results:
        if result["model"]["role"] != "recurrent" or task not in result["tasks"]:
            continue
        static = rival(results, "static twin", result)
        if static and checkpoint_scores(result, task) and checkpoint_scores(static, task):
            found = equal_flops_checkpoint(result, static, task)
            findings.append(replace(found, name=f"{found.name}, {result['model']['label']}"))
    return findings


def checkpoint_scores(result: Json, task: str) -> list[tuple[float, int, int, float]]:
    """Return FLOPs, depth, step and score of the checkpoints, at the depth nearest the trained."""
    trained = result["model"]["trained_recurrence"] or 1
    points = []
    for point in result["model"].get("checkpoints") or ():
        by_depth = {int(r): score for r, score in point["scores"].get(task, {}).items()}
        if by_depth:
            near = min(sorted(by_depth), key=lambda r: abs(math.log(r / trained)))
            points.append((point["flops"], near, point["step"], by_depth[near]))
    return sorted(points)


def _points_of(curve: Sequence[Json], depth: int | None) -> Array:
    """Return FLOPs and loss of the points that have one, by rows."""
    losses = [
        point["loss"] if depth is None else (point.get("validation") or {}).get(str(depth))
        for point in curve
    ]
    points = [
        (point["flops"], loss)
        for point, loss in zip(curve, losses, strict=True)
        if point["flops"] > 0 and loss is not None and math.isfinite(loss)
    ]
    return np.reshape(np.array(points, dtype=float), (len(points), 2))
