"""What the results say about depth, in plain words with paired intervals; no gain is assumed.

Pure functions of results as `rondo eval` writes them: nothing is read, written or drawn here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Json = dict[str, Any]
Judgement = tuple[str, list[str]]

_NUM_RESAMPLES = 2_000
# Bounds the memory that many documents take.
_RESAMPLES_AT_ONCE = 100
_BOOTSTRAP_SEED = 0
# Resampling fewer documents than this says little about others.
_MIN_DOCUMENTS = 10
# Budgets closer than this count as equal: a run ends with the step that crosses its budget.
_EQUAL_FLOPS = 0.05


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean loss per token of one run less that of another, with a 95% interval."""

    value: float
    low: float
    high: float


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], tokens: Sequence[int], choices: int = 1
) -> Difference:
    """Compare two runs over the same documents by resampling the documents.

    Args:
        first: Summed loss of each document.
        second: The same of the run that is compared with.
        tokens: Tokens of each document.
        choices: Number of runs `first` was picked from as the best. It widens the interval
            (Bonferroni), since the best of many looks good by luck.
    """
    change = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    sizes = np.asarray(tokens, dtype=float)
    value = float(change.sum() / sizes.sum())
    if len(change) < _MIN_DOCUMENTS:
        return Difference(value, -math.inf, math.inf)
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    shape = (_RESAMPLES_AT_ONCE, len(change))
    picks = (rng.integers(len(change), size=shape) for _ in range(0, _NUM_RESAMPLES, shape[0]))
    means = np.concatenate([change[pick].sum(1) / sizes[pick].sum(1) for pick in picks])
    tail = 0.025 / choices
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(value, float(low), float(high))


def verdict(results: Sequence[Json]) -> list[str]:
    """Say in up to five lines whether depth helped, and against what."""
    return [f"{question} {' '.join(answers)}" for question, answers in judge(results)]


def judge(results: Sequence[Json]) -> list[Judgement]:
    """Answer each question of the verdict once per dataset.

    Answers begin with Yes, No, Not shown or Not known. Where several results share a role, the
    first is judged: the order is the user's.
    """
    before, after = (find(results, "recurrent", stage) for stage in ("before", "after"))
    static, parent = find(results, "static", "after"), find(results, "parent", "before")
    judged: list[Judgement] = []
    if after:
        judged.append(("After training, does depth help?", _answers(after, after, "r = 1", 2)))
    else:
        missing = "Not known: no trained recurrent model is among the results."
        judged.append(("After training, does depth help?", [missing]))
    if after and static:
        judged.append((_static_question(after, static), _answers(after, static, "the static twin")))
        question = "At r = 1, is the trained model better than the static twin?"
        judged.append((question, _answers(after, static, "the static twin", 1, 1)))
    elif after:
        missing = "Not known: no static twin is among the results (rondo train --mode static)."
        judged.append(("Is the best depth better than plain training of the parent?", [missing]))
    if after and parent:
        question = "At r = 1, is the trained model better than the parent?"
        judged.append((question, _answers(after, parent, "the parent", 1, 1)))
    if before:
        judged.append(("Before training, did depth help?", _answers(before, before, "r = 1", 2)))
    return judged


def caveats(results: Sequence[Json]) -> list[str]:
    """Say what the intervals leave out, and where the conditions differ."""
    notes = [
        "Intervals are a paired bootstrap over documents (2,000 resamples), widened where the "
        "best of several depths was picked. They leave out the luck of the training seed."
    ]
    for key in ("dtype", "device", "seq_len"):
        values = dict.fromkeys(str(result["conditions"][key]) for result in results)
        if len(values) > 1:
            notes.append(f"Not all were evaluated with the same {key}: {'; '.join(values)}.")
    trainings = [training for result in results if (training := result["model"]["training"])]
    data = dict.fromkeys(str(training["data"]) for training in trainings)
    if len(data) > 1:
        notes.append(f"Not all were trained on the same data: {'; '.join(data)}.")
    return notes


def subject(results: Sequence[Json]) -> Json:
    """Return the result that a report of these results is about."""
    after, before = (find(results, "recurrent", stage) for stage in ("after", "before"))
    return after or before or results[0]


def find(results: Sequence[Json], role: str, stage: str) -> Json | None:
    """Return the first result with this role at this stage."""
    for result in results:
        if (result["model"]["role"], result["model"]["stage"]) == (role, stage):
            return result
    return None


def _static_question(after: Json, static: Json) -> str:
    ours, theirs = (
        result["model"]["training"] and result["model"]["training"]["flops"]
        for result in (after, static)
    )
    if not ours or not theirs:
        return "Is the best depth better than the static twin (training FLOPs unknown)?"
    if math.isclose(ours, theirs, rel_tol=_EQUAL_FLOPS):
        return "Is the best depth better than the static twin, at equal training FLOPs?"
    ratio = theirs / ours
    return f"Is the best depth better than the static twin, trained with {ratio:.2f}x its FLOPs?"


def _answers(
    first: Json, second: Json, other: str, minimum: int = 1, maximum: float = math.inf
) -> list[str]:
    """Compare the best depth of one model within bounds with r = 1 of another, per dataset."""
    return [_answer(first, second, other, name, minimum, maximum) for name in first["datasets"]]


def _answer(
    first: Json, second: Json, other: str, dataset: str, minimum: int, maximum: float
) -> str:
    depths = [r for r in _finite_losses(first, dataset) if minimum <= r <= maximum]
    ours, theirs = _finite_losses(first, dataset), _finite_losses(second, dataset).get(1)
    if not depths or theirs is None:
        return f"Not known on {dataset}: no finite loss at the depths to compare."
    best = min(depths, key=lambda depth: sum(ours[depth]))
    tokens = first["documents"][dataset]["tokens"]
    gap = paired_bootstrap(ours[best], theirs, tokens, choices=len(depths))
    name = f"r = {best}" + (f", the best of {len(depths)} depths," if len(depths) > 1 else "")
    if gap.low <= 0 <= gap.high:
        doubt = (
            f"(95% interval {gap.low:+.4f} to {gap.high:+.4f}), which may be chance"
            if math.isfinite(gap.low)
            else f"but {len(tokens)} documents are too few to tell that from chance"
        )
        return (
            f"Not shown on {dataset}: the loss of {name} differs from that of {other} by "
            f"{gap.value:+.4f} nats per token {doubt}."
        )
    word, side = ("Yes", "below") if gap.value < 0 else ("No", "above")
    low, high = sorted((abs(gap.low), abs(gap.high)))
    cost = _flops(first, dataset, best) / _flops(second, dataset, 1)
    price = f", at {cost:.2f}x the FLOPs per token" if abs(cost - 1) > 0.01 else ""
    return (
        f"{word} on {dataset}: the loss of {name} lies {abs(gap.value):.4f} nats per token "
        f"{side} that of {other} (95% interval {low:.4f} to {high:.4f}){price}."
    )


def _finite_losses(result: Json, dataset: str) -> dict[int, list[float]]:
    by_depth = result["documents"][dataset]["loss"]
    return {
        int(r): losses
        for r, losses in by_depth.items()
        if None not in losses and math.isfinite(sum(losses))
    }


def _flops(result: Json, dataset: str, depth: int) -> float:
    return next(
        row["flops_per_token"]
        for row in result["rows"]
        if (row["dataset"], row["num_recurrences"]) == (dataset, depth)
    )
