"""Which source a row comes from: a pure function of the row's number and the weights."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from rondo.config import DataConfig
from rondo.data.sources import Source, parse_source
from rondo.errors import UserError


@dataclass(frozen=True)
class Phase:
    """A mixture from one row on: the weights of its sources, by their paths."""

    first_row: int
    sources: tuple[Source, ...]

    def taken(self, rows: int) -> dict[str, int]:
        """Return how many of the phase's first rows each source gives.

        Source by source, from the heaviest on, the rest keeps the nearest whole number to its
        share of what was left. No count is ever further from its exact share than
        (1 + 1 + 1/2 + .. + 1/(k - 2)) / 2 for k sources: half a row for two, two for ten.
        """
        scale = lcm(*(source.weight.denominator for source in self.sources))
        weights = {source.path: int(source.weight * scale) for source in self.sources}
        counts, whole = {}, sum(weights.values())
        for path, weight in sorted(weights.items(), key=lambda item: -item[1]):
            left = (2 * rows * (whole - weight) + whole) // (2 * whole)
            counts[path] = rows - left
            rows, whole = left, whole - weight
        return counts


class Mixture:
    """Phases that follow each other; the last one has no end.

    Attributes:
        sources: Each source once, by its path; one that returns in a later phase goes on where it
            was.
    """

    def __init__(self, phases: Sequence[Phase]):
        self.phases = tuple(phases)
        self.sources = {source.path: source for phase in phases for source in phase.sources}

    def taken(self, rows: int) -> Mapping[str, int]:
        """Return how many of the first `rows` rows each source gives."""
        counts = dict.fromkeys(self.sources, 0)
        ends = [*(phase.first_row for phase in self.phases[1:]), rows]
        for phase, end in zip(self.phases, ends, strict=True):
            for path, count in phase.taken(max(0, min(end, rows) - phase.first_row)).items():
                counts[path] += count
        return counts

    def place(self, row: int) -> tuple[str, int]:
        """Return the path of the source that gives a row, and which of its own rows it is."""
        before, after = self.taken(row), self.taken(row + 1)
        return next((path, count) for path, count in before.items() if after[path] > count)


def read_mixture(config: DataConfig, total_rows: int) -> Mixture:
    """Read the sources, or the phases, of a training of `total_rows` rows.

    Raises:
        UserError: A source, a weight or a fraction is wrong.
    """
    phases, start = [], Fraction(0)
    for until, words in read_phases(config):
        phases.append(Phase(round(start * total_rows), _sources(words)))
        start = until
    return Mixture(phases)


def read_phases(config: DataConfig) -> list[tuple[Fraction, Sequence[str]]]:
    """Return what is read up to which fraction of a training; no text is looked at.

    Raises:
        UserError: A phase cannot be read, or they do not follow each other up to 1.
    """
    if not config.phases:
        return [(Fraction(1), config.sources)]
    phases: list[tuple[Fraction, Sequence[str]]] = []
    until = Fraction(0)
    for text in config.phases:
        start, (fraction, _, specs) = until, text.partition(":")
        try:
            until, words = Fraction(fraction.strip()), shlex.split(specs)
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"the phase {text!r} does not read UNTIL: SOURCE SOURCE ...") from error
        if not words or not start < until <= 1:
            raise UserError(
                f"the phase {text!r} must name a source and end between {float(start):g}, where "
                "it begins, and 1"
            )
        phases.append((until, words))
    if until != 1:
        raise UserError(f"the last of data.phases must end at 1, not at {float(until):g}")
    return phases


def _sources(specs: Sequence[str]) -> tuple[Source, ...]:
    sources = tuple(parse_source(spec) for spec in specs)
    if len({source.path for source in sources}) < len(sources):
        raise UserError(f"a text is named twice in one mixture: {' '.join(specs)}")
    return sources
