"""How numbers are written, wherever they stand."""

import math
from collections.abc import Sequence
from typing import Any

from rondo.evaluation.comparisons import is_share

NONE = "-"
# Behind the point; losses have as many.
_MOST_DIGITS = 4


def ranges(layers: Sequence[int]) -> str:
    """Write layer indices briefly, such as 4-9 or 12, 14, 16."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) or "none"


def si(value: float | None, unit: str = "") -> str:
    """Write a count with three digits and a metric prefix, such as 51.2T."""
    if value is None:
        return NONE
    for power, prefix in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g}{prefix}{unit}"
    return f"{value:.3g}{unit}"


def number(value: float | None, form: str) -> str:
    """Write a number that may be missing."""
    return NONE if value is None else format(value, form)


def score(value: float | None, metric: str, stderr: float | None = None) -> str:
    """Write a share in percent, and any other value as it is, with its standard error if given."""
    if value is None or not math.isfinite(value):
        return "no finite value"
    factor, form, unit = (100, ".1f", "%") if is_share(metric) else (1, ".4f", "")
    error = "" if stderr is None else f" \u00b1 {factor * stderr:{form}}"
    return f"{factor * value:{form}}{error}{unit}"


def interval(value: float | None, low: float | None, high: float | None, unit: str) -> str:
    """Write a number to two digits of what it is known to, and percentages to a tenth."""
    if value is None:
        return "not known"
    known = low is not None and high is not None and math.isfinite(high - low)
    if not known or low == high:
        return f"{value:.4g}{f' ({low:.4g} to {high:.4g})' if known else ''} {unit}".rstrip()
    digits = min(max(0, 1 - math.floor(math.log10(high - low))), _MOST_DIGITS)
    if unit in ("points", "% of items"):
        digits = 1
    elif all(float(one).is_integer() for one in (value, low, high)):
        digits = 0
    # Adding 0 makes a rounded -0.0 plain.
    center, begin, end = (f"{round(one, digits) + 0:.{digits}f}" for one in (value, low, high))
    return f"{center} ({begin} to {end}) {unit}".rstrip()


def plain(value: Any) -> str:
    """Write a fact of a run."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return si(value) if value >= 1e6 else f"{value:.4g}"
    return str(value)
