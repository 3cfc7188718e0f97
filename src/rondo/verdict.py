"""What the results say about depth, in plain words with paired intervals; no gain is assumed.

Pure functions of results as `rondo eval` writes them: nothing is read, written or drawn here.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rondo.evaluation.comparisons import NUM_RESAMPLES, Json, Measured, difference, measure
from rondo.evaluation.controls import (
    cost_words,
    find,
    rival,
    share_items,
    spoken,
    training_words,
)

Judgement = tuple[str, list[str]]

_DEPTH = "After training, does depth help?"
_STATIC = "Is the best depth better than the static twin"
_NO_AFTER = "Not known: no trained recurrent model is among the results."
_NO_STATIC = "Not known: no static twin is among the results (rondo train --mode static)."


@dataclass(frozen=True, slots=True)
class _Question:
    """A question, and what is compared to answer it: the best depth within bounds with a rival."""

    text: str
    first: Json
    second: Json
    other: str
    minimum: int = 1
    maximum: float = math.inf


def verdict(results: Sequence[Json]) -> list[str]:
    """Say in a line per question whether depth helped, and against what."""
    return [f"{question} {' '.join(answers)}" for question, answers in judge(results)]


def judge(results: Sequence[Json]) -> list[Judgement]:
    """Answer each question of the verdict once per task.

    Answers begin with Yes, No, Not shown or Not known. Where several results share a role, the
    first is judged: the order is the user's.
    """
    judged = [(question.text, _answers(question)) for question in _questions(results)]
    after = find(results, "recurrent", "after")
    if not after:
        judged.insert(0, (_DEPTH, [_NO_AFTER]))
    elif not rival(results, "static twin"):
        judged.insert(1, ("Is the best depth better than plain training?", [_NO_STATIC]))
    return judged


def headline(results: Sequence[Json]) -> str:
    """Sum the verdict over tasks up in one sentence."""
    after = find(results, "recurrent", "after")
    if not after:
        return "Not known whether depth helps after training: no trained recurrent model is here."
    told = {question.text: _answers(question) for question in _first_two(results)}
    depth = told.pop(_DEPTH)
    helps, harms = _count(depth, "Yes"), _count(depth, "No ")
    if one := next(iter(after["tasks"])) if len(depth) == 1 else "":
        verb = "helps" if helps else "harms" if harms else "is not shown to help"
        sentence = f"Depth {verb} on {one}"
    else:
        verb = f"helps on {helps}" if helps else "is shown to help on none"
        sentence = f"Depth {verb} of {len(depth)} tasks"
        sentence += f" and harms on {harms}" if harms else ""
    if not told:
        return f"{sentence}; no static twin was measured."
    question, answers = next(iter(told.items()))
    better, known = _count(answers, "Yes"), len(answers) - _count(answers, "Not known")
    than = question.removeprefix("Is the best depth better than ").rstrip("?").replace(",", "")
    if not known:
        return f"{sentence}; beside {than} nothing is known."
    if one:
        verb = (
            "beats" if better else "loses to" if _count(answers, "No ") else "is not shown to beat"
        )
        return f"{sentence}; its best depth {verb} {than}."
    return f"{sentence}; its best depth beats {than} on {better or 'none'} of {known}."


def claims_gain(results: Sequence[Json]) -> bool:
    """Whether the verdict answers any question about depth, beyond r = 1, with yes."""
    return any(
        answer.startswith("Yes")
        for question in _questions(results)
        if question.maximum > 1
        for answer in _answers(question)
    )


def caveats(results: Sequence[Json]) -> list[str]:
    """Say what the intervals leave out, and where the conditions differ."""
    notes = _intervals(results)
    comparisons = sum(
        share_items(question.first, question.second, task)
        for question in _questions(results)
        for task in _tasks(question)
    )
    if comparisons > 1:
        notes.append(
            f"The verdict makes {comparisons} comparisons, each at 95%: were there no differences "
            f"at all, about {max(1, round(0.05 * comparisons))} would seem to be one."
        )
    notes += _seeds(results)
    limits = {limit for result in results if (limit := result["conditions"]["limit"])}
    if limits:
        count = " or ".join(f"{limit:,}" for limit in sorted(limits))
        notes.append(f"Only the first {count} items of each task or text were measured.")
    for key in ("dtype", "device", "seq_len", "limit"):
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


def _questions(results: Sequence[Json]) -> Iterator[_Question]:
    """List what can be asked of these results, the weightiest first."""
    yield from _first_two(results)
    before, after = (find(results, "recurrent", stage) for stage in ("before", "after"))
    names = ("static twin", "parent", "random twin", "self-consistency")
    static, parent, random, votes = (rival(results, name) for name in names)
    if after and static:
        text = "At r = 1, is the trained model better than the static twin?"
        yield _Question(text, after, static, "the static twin", 1, 1)
    if after and parent:
        text = "At r = 1, is the trained model better than the parent?"
        yield _Question(text, after, parent, "the parent", 1, 1)
    if before:
        yield _Question("Before training, did depth help?", before, before, "r = 1", 2)
    ours = after or before
    if ours and votes:
        text = "Is the best depth better than the parent with self-consistency?"
        yield _Question(text, ours, votes, spoken("self-consistency", votes))
    if after and random:
        text = "Is the best depth better than the random twin, which began without the parent?"
        yield _Question(text, after, random, "the random twin")


def _first_two(results: Sequence[Json]) -> Iterator[_Question]:
    """List the questions that the headline sums up."""
    after, static = find(results, "recurrent", "after"), rival(results, "static twin")
    if after:
        yield _Question(_DEPTH, after, after, "r = 1", 2)
    if after and static:
        words = training_words(after, static)
        words = f" ({words})" if "unknown" in words else f", {words}"
        yield _Question(f"{_STATIC}{words}?", after, static, "the static twin")


def _tasks(question: _Question) -> Iterable[str]:
    """Return the tasks to answer on; self-consistency can only be had of those that generate."""
    return (
        task
        for task in question.first["tasks"]
        if question.second["model"]["role"] != "self-consistency"
        or task in question.second["tasks"]
    )


def _answers(question: _Question) -> list[str]:
    """Compare the best depth of one model within bounds with another model, per task."""
    answers = [_answer(question, task) for task in _tasks(question)]
    return answers or ["Not known: no task in common."]


def _answer(question: _Question, task: str) -> str:
    """Answer in one sentence, with the interval and the price."""
    if not share_items(question.first, question.second, task):
        return f"Not known on {task}: {question.other} was not measured on the same items."
    ours, theirs = measure(question.first, task), measure(question.second, task)
    depths = [r for r in ours.depths if question.minimum <= r <= question.maximum]
    rival_depth = _rival_depth(question, theirs)
    if not depths or rival_depth is None:
        return f"Not known on {task}: no finite values at the depths to compare."
    mine = max((ours.depths.index(r) for r in depths), key=lambda i: float(ours.scores[i]))
    gap = difference(ours, mine, theirs, rival_depth, choices=len(depths))
    name = f"r = {ours.depths[mine]}" + (f", best of {len(depths)}," if len(depths) > 1 else "")
    number, unit, other = ours.number, ours.unit, question.other
    if gap.low <= 0 <= gap.high:
        doubt = (
            f"(95% interval {number(gap.low, True)} to {number(gap.high, True)}{gap.aside}), which "
            "may be chance"
            if math.isfinite(gap.low)
            else f"but {len(ours.weights)} items are too few to tell that from chance"
        )
        return (
            f"Not shown on {task}: the gain of {name} over {other} is {number(gap.value, True)} "
            f"{unit} {doubt}."
        )
    word, side = ("Yes", "better") if gap.value > 0 else ("No", "worse")
    low, high = sorted((abs(gap.low), abs(gap.high)))
    price = cost_words(ours, mine, theirs, rival_depth)
    return (
        f"{word} on {task}: {name} is {number(abs(gap.value))} {unit} {side} than {other} "
        f"(95% interval {number(low)} to {number(high)}{gap.aside})"
        f"{f', {price}' if price else ''}."
    )


def _rival_depth(question: _Question, theirs: Measured) -> int | None:
    """Return the index of the depth to beat: r = 1, or the best of a looped model of its own."""
    if not theirs.depths:
        return None
    if question.first is question.second:
        return 0 if theirs.depths[0] == 1 else None
    return theirs.best


def _intervals(results: Sequence[Json]) -> list[str]:
    """Say what the intervals are made of."""
    tasks = {task: task in result["items"] for result in results for task in result["tasks"]}
    bare = [task for task, known in tasks.items() if not known]
    notes = []
    if len(bare) < len(tasks):
        notes.append(
            f"Intervals are a paired bootstrap over items ({NUM_RESAMPLES:,} resamples), widened "
            "where the best of several depths was picked."
        )
    if bare:
        notes.append(
            f"Of {', '.join(bare)} only values with standard errors are known, no items to pair: "
            "intervals take them as normal and independent, widened where the best of several "
            "depths was picked. On the same items that is too wide as a rule."
        )
    return notes


def _seeds(results: Sequence[Json]) -> list[str]:
    """Say how much luck of seeds the results could average over."""
    looped = [result for result in results if result["model"]["role"] == "recurrent"]
    seeds = {training["seed"] for result in looped if (training := result["model"]["training"])}
    notes = []
    if seeds:
        count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds, of which the first counts"
        notes.append(
            f"The loop was trained with {count}: intervals leave out the luck of training."
        )
    drawn = max(len(result["conditions"]["seeds"]) for result in results)
    if drawn > 1:
        notes.append(f"Where sampling or the initial state is random, {drawn} seeds are averaged.")
    return notes


def _count(answers: Sequence[str], word: str) -> int:
    return sum(answer.startswith(word) for answer in answers)
