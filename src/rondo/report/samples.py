"""The items whose answer changes with depth, for the better and for the worse."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rondo import verdict
from rondo.report.sources import Json, is_right

# Of a longer text the begin and the end are shown: a prompt ends with its question, an answer
# with its result.
_MOST_CHARACTERS = 1_600


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered at one depth."""

    depth: str
    text: str
    right: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One item as one model answered it."""

    task: str
    model: str
    item: str
    prompt: str
    target: str
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that went the same way; `total` counts those that are not shown too."""

    title: str
    better: bool
    total: int
    samples: list[Sample]


def groups(results: Sequence[Json], most: int) -> list[Group]:
    """Choose samples of the recurrent models, balanced between both ways and among tasks.

    Args:
        results: As `load` returns them.
        most: Samples to show in all.
    """
    main = verdict.subject(results)
    ordered = [main, *(result for result in results if result is not main)]
    found: dict[bool, dict[tuple[str, str], list[Sample]]] = {True: {}, False: {}}
    for result in ordered:
        if not result["model"]["split"]:
            continue
        for line in result["samples"]:
            sample = _sample(line, result["model"]["label"])
            own = found[sample.answers[-1].right].setdefault((sample.task, sample.model), [])
            own.append(sample)
    counts = {better: sum(map(len, found[better].values())) for better in found}
    half = most // 2
    shown = {
        better: min(counts[better], max(most - half if better else half, most - counts[not better]))
        for better in found
    }
    titles = {
        True: "Depth corrected: right at the deepest, wrong at a shallower depth",
        False: "Depth spoiled: wrong at the deepest, right at a shallower depth",
    }
    return [
        Group(titles[better], better, counts[better], _in_turns(found[better], shown[better]))
        for better in found
        if counts[better]
    ]


def _in_turns(piles: dict[tuple[str, str], list[Sample]], most: int) -> list[Sample]:
    """Take one of each pile in turn."""
    rounds = itertools.zip_longest(*piles.values())
    return [sample for one in rounds for sample in one if sample is not None][:most]


def _sample(line: Json, model: str) -> Sample:
    depths = sorted(line["values"], key=int)
    answers = [
        Answer(depth, _cut(line["answers"].get(depth, "")), is_right(line["values"][depth]))
        for depth in depths
    ]
    item, prompt, target = (_cut(line[key]) for key in ("item", "prompt", "target"))
    return Sample(line["task"], model, item, prompt, target, answers)


def _cut(text: Any) -> str:
    text = str(text)
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
