"""What measuring a task gives, whatever its kind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Json = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """A metric at one depth.

    Attributes:
        value: Mean over the items; None where it is not finite.
        stderr: Its standard error over the items; None where there is none.
        by_seed: The value with each seed, where there were several.
    """

    value: float | None
    stderr: float | None
    by_seed: tuple[float | None, ...] = ()


class Lengths(NamedTuple):
    """Tokens through the model, as means.

    Attributes:
        sequences: Per item: the options of a choice, or one.
        read: Tokens of a sequence that are read at once.
        new: Tokens that are generated after them; 0 where depths share a pass.
    """

    sequences: float
    read: float
    new: float

    @property
    def per_item(self) -> float:
        """Tokens per item."""
        return self.sequences * (self.read + self.new)


@dataclass(frozen=True)
class Outcome:
    """One task as one model did it, with one seed or the mean of several.

    Attributes:
        name: The task's name.
        described: What it is: the entry of `tasks` in results.json.
        scores: By metric and depth.
        items: Of the metric of `described`: `weights`, and `values` by depth (as a string).
        samples: One line of samples.jsonl per item, without the model.
        seconds: What measuring took, all depths together.
        lengths: By depth, the tokens that went through the model.
    """

    name: str
    described: Json
    scores: dict[str, dict[int, Score]]
    items: Json
    samples: list[Json]
    seconds: float
    lengths: dict[int, Lengths]


def mean_of_seeds(outcomes: Sequence[Outcome]) -> Outcome:
    """Join what several seeds gave: the mean of the values, item by item."""
    first = outcomes[0]
    if len(outcomes) == 1:
        return first
    values = {
        depth: [
            mean(ones) for ones in zip(*(o.items["values"][depth] for o in outcomes), strict=True)
        ]
        for depth in first.items["values"]
    }
    items = {"weights": first.items["weights"], "values": values}
    scores: dict[str, dict[int, Score]] = {}
    for metric, by_depth in first.scores.items():
        scores[metric] = {}
        for depth in by_depth:
            found = [outcome.scores[metric][depth] for outcome in outcomes]
            by_seed = tuple(score.value for score in found)
            stderr = mean([score.stderr for score in found])
            if metric == first.described["metric"]:
                # The seeds answer the same items, so their errors do not average out.
                stderr = ratio_stderr(values[str(depth)], items["weights"])
            scores[metric][depth] = Score(mean(by_seed), stderr, by_seed)
    return Outcome(
        name=first.name,
        described=first.described,
        scores=scores,
        items=items,
        samples=first.samples,
        seconds=sum(outcome.seconds for outcome in outcomes) / len(outcomes),
        lengths=first.lengths,
    )


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None where one of the values is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def ratio(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Return summed values over summed weights, None where it is not finite."""
    total = sum(math.nan if value is None else value for value in values)
    return total / sum(weights) if math.isfinite(total) else None


def ratio_stderr(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Return the standard error of summed values over summed weights, items being the sample.

    None for a single item, which says nothing about others, and for values that are none.
    """
    n, value = len(values), ratio(values, weights)
    if n < 2 or value is None:
        return None
    residuals = [(one or 0.0) - value * weight for one, weight in zip(values, weights, strict=True)]
    return math.sqrt(sum(r * r for r in residuals) * n / (n - 1)) / sum(weights)


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: None for one that is none."""
    return value if math.isfinite(value) else None
