"""How numbers are written, wherever they stand."""

import math
from collections.abc import Sequence
from typing import Any

NONE = "-"


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


def score(value: float | None, kind: str, stderr: float | None = None) -> str:
    """Write a loss in nats, or a share in percent, with its standard error where given."""
    if value is None or not math.isfinite(value):
        return "no finite value"
    # A task may report more than shares, such as a perplexity.
    share = kind != "loss" and abs(value) <= 1
    factor, form, unit = (100, ".1f", "%") if share else (1, ".4f", "")
    error = "" if stderr is None else f" \u00b1 {factor * stderr:{form}}"
    return f"{factor * value:{form}}{error}{unit}"


def interval(value: float | None, low: float | None, high: float | None, unit: str) -> str:
    """Write a number with what it is known to."""
    if value is None:
        return "not known"
    around = ""
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        around = f" ({low:.4g} to {high:.4g})"
    return f"{value:.4g}{around} {unit}".rstrip()


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
