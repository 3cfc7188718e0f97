"""What the harness says of a task at each depth, as an outcome."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rondo.evaluation.items import MATH, MATH_500
from rondo.evaluation.outcome import Lengths, Outcome, Score, finite, ratio, ratio_stderr
from rondo.evaluation.tasks import HarnessTask

Json = dict[str, Any]

# What a task is judged by, the first of these that it has; else by its first metric.
METRICS = ("acc_norm", "acc", "math_verify", "exact_match", "bits_per_byte")
FILTERS = ("flexible-extract", "none", "strict-match")
# Steps of a filter that choose among several answers.
SELECTIONS = ("take_first", "take_first_k", "majority_vote")
# What the harness's filters give for a text without an answer.
NO_ANSWER = "[invalid]"
# Characters of a prompt (its end) and of an answer that are kept to be shown.
SHOWN = 1500


def voting(task: Any, samples: int, temperature: float) -> Any:
    """Return the task with several sampled answers per item, of which the most frequent counts.

    Self-consistency, arXiv:2203.11171. Answers are told apart as the task's metric does; the
    harness's own vote would count 7 and 7. as two, and a text without an answer as one.
    """
    matching = [one for one in task.config.metric_list or () if "regexes_to_ignore" in one]
    vote: Json = {
        "function": "most_frequent",
        "ignore": [regex for one in matching for regex in one["regexes_to_ignore"]],
    }
    if task.config.dataset_path in (MATH, MATH_500):
        # Its definition takes answers from texts after the filters.
        vote["answer"] = r"The final answer is(.*?)\. I hope"
    filters = []
    for pipeline in task.config.filter_list or [{"name": "none", "filter": []}]:
        steps = [step for step in pipeline["filter"] if step["function"] not in SELECTIONS]
        filters.append({"name": pipeline["name"], "filter": [*steps, vote]})
    how = task.config.generation_kwargs | {"do_sample": True, "temperature": temperature}
    # Else those of the model's own settings would take part unseen.
    how |= {"top_k": 0, "top_p": 1.0}
    changes = {"repeats": samples, "generation_kwargs": how, "filter_list": filters}
    return type(task)(config=vars(task.config) | changes)


def most_frequent(texts: Sequence[str], ignore: Sequence[str] = (), answer: str = "") -> str:
    """Return the first of the texts whose answer most of them give.

    Args:
        texts: What is chosen among.
        ignore: Patterns of what is no part of an answer.
        answer: Pattern whose first group is the answer of a text; the whole text unless given.
    """
    said = [re.search(answer, text, re.DOTALL) for text in texts] if answer else texts
    votes = [one.group(1) if isinstance(one, re.Match) else one for one in said]
    for pattern in ignore:
        votes = [vote and re.sub(pattern, "", vote) for vote in votes]
    votes = [vote and vote.strip().lower() for vote in votes]
    counts = Counter(vote for vote in votes if vote and vote != NO_ANSWER)
    return texts[votes.index(counts.most_common(1)[0][0])] if counts else texts[0]


class Effort(NamedTuple):
    """What measuring a task took.

    Attributes:
        seconds: Of all passes.
        lengths: Of each sequence that was run: its depth, if it was run at one alone, tokens that
            were read, and tokens that were generated.
        cut: How many of these lost their beginning, being longer than the model was made for.
    """

    seconds: float
    lengths: list[tuple[int | None, int, int]]
    cut: int


class Series(NamedTuple):
    """A metric of a task, under one of its filters.

    Attributes:
        name: What results call it.
        metric: What the harness calls it.
        chosen: The filter, which takes the answer from the text.
        weights: By item.
        values: By depth and item; summed over the summed weights they are the metric, and None
            where it is no such ratio.
        scores: By depth, the harness's number.
    """

    name: str
    metric: str
    chosen: str
    weights: list[float]
    values: dict[int, list[float | None]]
    scores: dict[int, Score]


def _all_series(name: str, results: Mapping[int, Any], averaged: Container[str]) -> list[Series]:
    """Return each metric with each filter, the one that a task is judged by first."""
    first = next(iter(results.values()))["results"][name]
    keys = [key.split(",") for key in first if "," in key and "_stderr," not in key]
    keys.sort(key=lambda key: (_rank(key[0], METRICS), _rank(key[1], FILTERS)))
    found: list[Series] = []
    for metric, chosen in keys:
        plain = metric not in [one.metric for one in found]
        values: dict[int, list[float | None]] = {}
        scores, weights = {}, []
        for depth, result in results.items():
            items = [one.get(metric) for one in _samples(result, name, chosen)]
            values[depth], weights = _values(metric, items, metric in averaged)
            value = float(result["results"][name][f"{metric},{chosen}"])
            scores[depth] = Score(finite(value), ratio_stderr(values[depth], weights))
        readable = metric if plain else f"{metric},{chosen}"
        found.append(Series(readable, metric, chosen, weights, values, scores))
    return found


def _rank(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _samples(result: Any, name: str, chosen: str) -> list[Any]:
    return [one for one in result["samples"][name] if one["filter"] == chosen]


def _values(
    metric: str, items: Sequence[Any], averaged: bool
) -> tuple[list[float | None], list[float]]:
    """Return values and weights of items, whose ratio is the metric."""
    if averaged:
        return [None if one is None else float(one) for one in items], [1] * len(items)
    if metric == "bits_per_byte":
        return [-logprob / math.log(2) for logprob, _ in items], [size for _, size in items]
    return [None] * len(items), [1] * len(items)


def outcome_of(
    given: HarnessTask,
    name: str,
    task: Any,
    results: Mapping[int, Any],
    effort: Effort,
    averaged: Container[str],
) -> Outcome:
    """Describe a task as a subject did it.

    Args:
        given: What was asked for.
        name: What results call the task.
        task: The harness's object.
        results: By depth, what its `evaluate` returns.
        effort: What it took, all depths together.
        averaged: The metrics that are plain means over the items.
    """
    every = _all_series(name, results, averaged)
    main, generates = every[0], task.OUTPUT_TYPE == "generate_until"
    by_depth = {depth: _samples(one, name, main.chosen) for depth, one in results.items()}
    items = next(iter(by_depth.values()))
    docs = json.dumps([one["doc"] for one in items], sort_keys=True, default=str)
    described = {
        "kind": "generation" if generates else "likelihood",
        "metric": main.name,
        "higher_is_better": bool(task.higher_is_better().get(main.metric, True)),
        "chance": _chance(task, main.metric, items),
        "source": given.source,
        "sha256": hashlib.sha256(docs.encode()).hexdigest(),
        "items": len(items),
        "num_fewshot": task.config.num_fewshot,
        "suite": given.suite,
        "truncated": effort.cut,
        "samples": task.config.repeats,
    }
    return Outcome(
        name=name,
        described=described,
        scores={one.name: one.scores for one in every},
        items={
            "weights": main.weights,
            "values": {str(depth): values for depth, values in main.values.items()},
        },
        samples=_lines(name, task, main, by_depth),
        seconds=effort.seconds,
        lengths={depth: _lengths(effort, depth, len(items)) for depth in results},
    )


def _lines(name: str, task: Any, main: Series, by_depth: Mapping[int, Sequence[Any]]) -> list[Json]:
    """Return an item's line of samples.jsonl each, with what was answered at each depth."""
    return [
        {
            "task": name,
            "item": one["doc_id"],
            "prompt": _prompt(task, one)[-SHOWN:],
            "target": _target(task, one),
            "answers": {
                str(depth): _answer(task, main.metric, ones[number])[:SHOWN]
                for depth, ones in by_depth.items()
            },
            "values": {str(depth): values[number] for depth, values in main.values.items()},
        }
        for number, one in enumerate(next(iter(by_depth.values())))
    ]


def _lengths(effort: Effort, depth: int, num_items: int) -> Lengths:
    """Return the mean tokens at a depth; likelihoods of all depths share a pass."""
    own = [(read, new) for at, read, new in effort.lengths if at in (None, depth)]
    read, new = (sum(column) / len(own) for column in zip(*own, strict=True))
    shared = effort.lengths[0][0] is None
    return Lengths(len(own) / num_items if shared else 1.0, read, new)


def _chance(task: Any, metric: str, items: Sequence[Any]) -> float | None:
    """Return what guessing scores: one in the number of choices, and nothing where one writes."""
    if task.OUTPUT_TYPE == "multiple_choice" and metric in ("acc", "acc_norm"):
        return sum(1 / len(task.doc_to_choice(one["doc"])) for one in items) / len(items)
    return 0.0 if task.OUTPUT_TYPE == "generate_until" and "match" in metric else None


def _answer(task: Any, metric: str, item: Any) -> str:
    """Return what was answered, in words: an option, a text, or what most texts come to."""
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(item["doc"])
        scores = [logprob for logprob, _ in item["filtered_resps"][: len(choices)]]
        lengths = [len(one) if metric == "acc_norm" else 1 for one in choices]
        return choices[int(np.argmax(np.divide(scores, lengths)))]
    if task.OUTPUT_TYPE == "generate_until":
        return str(item["filtered_resps"][0] if task.config.repeats > 1 else item["resps"][0][0])
    return f"log-probability {np.ravel(item['resps'][0][0])[0]:.3f}"


def _prompt(task: Any, item: Any) -> str:
    """Return what comes before the answer; or after it, where the options come first."""
    if task.OUTPUT_TYPE == "multiple_choice" and task.multiple_input:
        return f"... {item['target']}"
    return str(item["arguments"][0][0])


def _target(task: Any, item: Any) -> str:
    target = item["target"]
    if task.OUTPUT_TYPE == "multiple_choice":
        # Where the options differ in what comes before, their number stands in the text's place.
        target = task.doc_to_text(item["doc"]) if task.multiple_input else target
        if isinstance(target, int):
            return task.doc_to_choice(item["doc"])[target]
    return str(target)


def pooled(given: HarnessTask, parts: Sequence[Outcome]) -> Outcome:
    """Return a group as one task: all items weigh the same."""
    first, counts = parts[0], [len(part.items["weights"]) for part in parts]
    weights = [one for part in parts for one in part.items["weights"]]
    values = {
        depth: [one for part in parts for one in part.items["values"][depth]]
        for depth in first.items["values"]
    }
    scores = {
        int(depth): Score(ratio(ones, weights), ratio_stderr(ones, weights))
        for depth, ones in values.items()
    }
    chances = [part.described["chance"] for part in parts]
    hashes = "".join(part.described["sha256"] for part in parts)
    described = first.described | {
        "chance": None if None in chances else float(np.average(chances, weights=counts)),
        "source": given.source,
        "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "items": len(weights),
        "truncated": sum(part.described["truncated"] for part in parts),
    }
    metric = described["metric"]
    return Outcome(
        name=given.name,
        described=described,
        scores={metric: scores},
        items={"weights": weights, "values": values},
        samples=[],
        seconds=sum(part.seconds for part in parts),
        lengths={
            depth: Lengths(*np.average([p.lengths[depth] for p in parts], 0, counts).tolist())
            for depth in first.lengths
        },
    )
