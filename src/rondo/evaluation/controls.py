"""What a claimed gain of depth must beat: blind choices of depth, and other uses of the compute.

A depth picked as the best of several looks good by luck; a policy that gives each item its own
depth must beat one that gives the same depths to anyone; and a loop must beat what its training
or its inference would have bought elsewhere. Pure functions of results as `rondo eval` writes
them; only numpy is imported.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rondo.evaluation.comparisons import (
    Array,
    Difference,
    Finding,
    Json,
    Measured,
    compare,
    difference,
    measure,
    paired_bootstrap,
    unknown,
    unpaired,
)

_NUM_SPLITS = 200
_NUM_SHUFFLES = 500
_SEED = 0
# Budgets closer than this count as equal: a run ends with the step that crosses its budget.
EQUAL_FLOPS = 0.05
# Equal numbers may differ in the rounding of their file.
_SAME_FLOPS = 1e-8
_MISSING = {
    "static twin": "rondo train --mode static --budget.like RUN, then rondo eval --against static",
    "random twin": "rondo train --mode random --budget.like RUN, then rondo eval --against random",
    "parent": "rondo eval --against parent",
    "self-consistency": "rondo eval --against self-consistency",
}


def find(results: Sequence[Json], role: str, stage: str) -> Json | None:
    """Return the first result with this role at this stage."""
    for result in results:
        if (result["model"]["role"], result["model"]["stage"]) == (role, stage):
            return result
    return None


def rival(results: Sequence[Json], name: str) -> Json | None:
    """Return the result that stands for a control by its name."""
    role = name.removesuffix(" twin")
    return find(results, role, "after" if name.endswith("twin") else "before")


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
    findings = _item_controls(measured)
    for name in names:
        theirs = rival(results, name)
        if theirs is None or not share_items(ours, theirs, task):
            sentence = f"Not known on {task}: no {name} on the same items ({_MISSING[name]})."
            findings.append(unknown(name, sentence, measured.unit))
            continue
        findings.append(_against(name, ours, measured, theirs))
        if name == "static twin" and 1 in measured.depths:
            findings.append(_against(name, ours, measured, theirs, at_one=True))
    return findings + _checkpoint_controls(results, task)


def _item_controls(measured: Measured) -> list[Finding]:
    if measured.errors is None:
        return [cross_fitted_depth(measured), *_oracle_controls(measured)]
    sentence = (
        f"Not known on {measured.task}: a depth cannot be chosen on other items, nor a policy for "
        "each item, where no items are known."
    )
    return [unknown("blind depth", sentence, measured.unit)]


def cross_fitted_depth(measured: Measured) -> Finding:
    """Score the blindly chosen best depth without the luck of choosing.

    The depth is chosen on one half of the items and scored on the other, both ways, over many
    random halvings; the shallowest depth may be chosen too.
    """
    count, better = len(measured.weights), measured.better
    if count < 2:
        return unknown("blind depth", "One item cannot be halved.", measured.unit)
    rng = np.random.default_rng(_SEED)
    order = rng.permuted(np.tile(np.arange(count), (_NUM_SPLITS, 1)), axis=1)
    half = order < count // 2
    picked = [
        (mask @ better.T / (mask @ measured.weights)[:, None]).argmax(1)
        for mask in (half.astype(float), (~half).astype(float))
    ]
    # An item is scored at the depth that the other half chose.
    chosen = np.where(half, picked[1][:, None], picked[0][:, None])
    shares = np.stack([(chosen == i).mean(0) for i in range(len(better))])
    gap = paired_bootstrap((shares * better).sum(0), better[0], measured.weights)
    often = np.bincount(np.concatenate(picked), minlength=len(better))
    depth, rate = measured.depths[int(often.argmax())], often.max() / often.sum()
    what = "One depth for all, chosen on the other half of the items,"
    after = f"; r = {depth} was chosen in {rate:.0%} of halves"
    return compare("blind depth", what, f"r = {measured.depths[0]}", gap, measured, after)


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
    mixture, after = _blind_mixture(values, costs, chosen)
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


def _blind_mixture(values: Array, costs: Array, chosen: NDArray[np.int64]) -> tuple[Array, str]:
    """Return each item's part in the best mixture of two depths that spends what the policy does.

    The mixture follows the policy's mean cost, which the items sway: without the last term of
    what is returned, that part of the uncertainty would be missing. It averages zero.
    """
    spent, scores = float(costs[chosen].mean()), values.mean(1)
    best, pair = -math.inf, (0, 0, 0.0)
    for low in range(len(costs)):
        if costs[low] > spent:
            continue
        for high in range(len(costs)):
            # A pair of the same depth twice is that depth alone, which may leave cost unspent.
            dearer = costs[high] > spent
            part = (spent - costs[low]) / (costs[high] - costs[low]) if dearer else 0.0
            score = (1 - part) * scores[low] + part * scores[high]
            if score > best:
                best, pair = score, (low, high if dearer else low, float(part))
    low, high, part = pair
    slope = 0.0 if low == high else (scores[high] - scores[low]) / (costs[high] - costs[low])
    items = (1 - part) * values[low] + part * values[high]
    return items + slope * (costs[chosen] - spent), f"; the mixture scores {best:.1%}"


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


def _oracle_controls(measured: Measured) -> list[Finding]:
    """Bound what any policy could gain: leave at the first depth that is right."""
    if measured.sign < 0 or not all(math.isfinite(one) for one in measured.flops):
        return []
    right = measured.better > measured.scale / 2
    # Where no depth is right, an oracle spends least.
    chosen = np.where(right.any(0), right.argmax(0), 0)
    found = policy_controls(measured.better / measured.scale, measured.flops, chosen)
    bound = "An upper bound that no attainable policy reaches (it knows the answers): "
    return [
        replace(
            one,
            name=one.name.replace("policy", "oracle policy"),
            sentence=bound + one.sentence.replace("The policy", "the oracle"),
        )
        for one in found
    ]


def _against(
    name: str, ours: Json, measured: Measured, theirs: Json, at_one: bool = False
) -> Finding:
    """Compare our best depth, or r = 1, with the best that a control shows."""
    other = measure(theirs, measured.task)
    title = f"{name} at r = 1" if at_one else name
    if not other.depths:
        return unknown(title, f"Not known: the {name} gave no finite values.", measured.unit)
    mine = measured.depths.index(1) if at_one else measured.best
    choices = 1 if at_one else len(measured.depths)
    gap = difference(measured, mine, other, other.best, choices)
    what = f"r = {measured.depths[mine]}" + (f", the best of {choices}," if choices > 1 else "")
    than = spoken(name, theirs)
    if len(other.depths) > 1:
        than += f" at its best, r = {other.depths[other.best]}"
    notes = [cost_words(measured, mine, other, other.best)]
    if name.endswith("twin"):
        notes.insert(0, training_words(ours, theirs))
    after = ", ".join(filter(None, notes))
    return compare(title, what, than, gap, measured, f", {after}" if after else "")


def cost_words(first: Measured, i: int, second: Measured, j: int) -> str:
    """Say what depth i of one costs beside depth j of another, if it is not the same."""
    ratio = first.flops[i] / second.flops[j] if second.flops[j] else math.nan
    if not math.isfinite(ratio) or abs(ratio - 1) <= 0.01:
        return ""
    return f"at {ratio:.2f}x the FLOPs per token"


def training_words(ours: Json, theirs: Json) -> str:
    """Say how the training of the second compares with that of the first in FLOPs."""
    trainings = [result["model"]["training"] or {} for result in (ours, theirs)]
    for account in ("flops", "flops_paper"):
        mine, other = (float(training.get(account) or 0) for training in trainings)
        if mine and other:
            of_paper = "" if account == "flops" else " (the paper's account)"
            if math.isclose(mine, other, rel_tol=EQUAL_FLOPS):
                return f"at equal training FLOPs{of_paper}"
            return f"trained with {other / mine:.2f}x its FLOPs{of_paper}"
    return "training FLOPs unknown"


def equal_flops(ours: Sequence[Json], theirs: Sequence[Json]) -> Finding:
    """Compare two training curves at the largest training FLOPs that both reached.

    The validation loss counts where both have one: ours at its deepest depth, theirs at the
    depth nearest to that. Else it is the training loss. Between points it is linear in log FLOPs.
    """
    name, unit = "equal training FLOPs", "nats per token"
    depths = [
        {int(r) for point in curve for r in point.get("validation") or {}}
        for curve in (ours, theirs)
    ]
    deep = near = None
    if all(depths):
        deep = max(depths[0])
        near = min(sorted(depths[1]), key=lambda r: abs(math.log(r / deep)))
    curves = [_points_of(ours, deep), _points_of(theirs, near)]
    if not all(len(curve) for curve in curves):
        return unknown(name, "Not known: a training curve is missing.", unit)
    flops = min(curve[-1, 0] for curve in curves)
    if flops < max(curve[0, 0] for curve in curves):
        return unknown(name, "Not known: the training curves share no range of FLOPs.", unit)
    mine, other = (
        float(np.interp(math.log(flops), np.log(curve[:, 0]), curve[:, 1])) for curve in curves
    )
    what = (
        "training loss (of single steps, and noisy)"
        if deep is None
        else f"validation loss at r = {deep}"
    )
    beside = "" if near == deep else f" at r = {near}"
    gain = other - mine
    side = "below" if gain > 0 else "above" if gain < 0 else "beside"
    sentence = (
        f"At {flops:.2e} training FLOPs, the most that both reached, our {what} is {mine:.4f}, "
        f"{abs(gain):.4f} {side} the other's{beside}, {other:.4f}; one run each, so without an "
        "interval."
    )
    return Finding(name, gain, None, None, unit, sentence)


def equal_flops_checkpoint(ours: Json, theirs: Json, task: str) -> Finding:
    """Compare our latest checkpoint of at most their training FLOPs with what they ended as.

    Ours counts at its trained depth (or the nearest that was scored), theirs likewise. Only shares
    of right answers are compared: their standard errors follow from the number of items. Where
    checkpoints are far apart ours may have spent much less, and the sentence says how much.
    """
    name, facts = "equal training FLOPs", ours["tasks"][task]
    if facts["kind"] == "loss":
        return unknown(name, "Not known: checkpoints are compared by right answers only.")
    mine, other = (checkpoint_scores(result, task) for result in (ours, theirs))
    if not mine or not other:
        return unknown(name, f"Not known on {task}: no scores of checkpoints are there.", "points")
    budget, _, theirs_last, score = other[-1]
    affordable = [point for point in mine if point[0] <= budget * (1 + _SAME_FLOPS)]
    if not affordable:
        sentence = (
            f"Not known on {task}: our first checkpoint, at {mine[0][0]:.3g} training FLOPs, spent "
            f"more than the {budget:.3g} of the whole other training."
        )
        return unknown(name, sentence, "points")
    flops, depth, step, best = affordable[-1]
    errors = [100 * math.sqrt(p * (1 - p) / facts["items"]) for p in (best, score)]
    gap = unpaired(100 * (best - score), errors[0], errors[1])
    what = (
        f"The checkpoint of '{ours['model']['label']}' at step {step:,} ({flops:.3g} training "
        f"FLOPs, {flops / budget:.0%} of the other's), run at r = {depth},"
    )
    than = f"'{theirs['model']['label']}' at its end, step {theirs_last:,}"
    after = f": {best:.1%} against {score:.1%}"
    after += ", though its learning rate still had to fall" if step < mine[-1][2] else ""
    return compare(name, what, than, gap, measure(ours, task), after)


def _checkpoint_controls(results: Sequence[Json], task: str) -> list[Finding]:
    """Hold every looped model whose checkpoints were scored against the static twin's end."""
    static = rival(results, "static twin")
    if static is None or not checkpoint_scores(static, task):
        return []
    return [
        replace(found, name=f"{found.name}, {result['model']['label']}")
        for result in results
        if result["model"]["role"] == "recurrent"
        and share_items(result, static, task)
        and checkpoint_scores(result, task)
        for found in [equal_flops_checkpoint(result, static, task)]
    ]


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


def _points(gap: Difference) -> Difference:
    return Difference(100 * gap.value, 100 * gap.low, 100 * gap.high)


def _accuracies(values: Array) -> Measured:
    """Wrap bare accuracies, for their unit and digits."""
    return Measured(
        task="",
        is_loss=False,
        depths=tuple(range(len(values))),
        better=100 * values,
        weights=np.ones(values.shape[1]),
        flops=(math.nan,) * len(values),
        left_out=(),
        sign=1,
        unit="points",
    )
