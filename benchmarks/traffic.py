"""What the benchmarks of serving share: what is asked, how it was answered, and its figures."""

import argparse
import datetime
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rondo.provenance import git_commit, hardware, versions, write_json

SHARES = {2: 50, 4: 30, 8: 15, 16: 5}
SHALLOW, DEEPEST = min(SHARES), max(SHARES)


@dataclass
class Answer:
    """One request as it was answered.

    Attributes:
        depth: The depth that was asked for.
        tokens: What was generated.
        stamps: When each came.
        taken_up: When the engine took it up.
    """

    depth: int
    tokens: list[int] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)
    taken_up: float = 0.0

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.stamps[0] - self.taken_up

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in itertools.pairwise(self.stamps)]


@dataclass
class Counts:
    """What went through the core: passes, and tokens in all of them together."""

    count: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Run:
    """One setting, once through all requests.

    Attributes:
        seconds: What it took.
        worked: What the processors worked for it, in seconds of all threads together.
        answers: What was answered.
        passes: What went through the core.
    """

    seconds: float
    worked: float
    answers: list[Answer]
    passes: Counts


@dataclass(frozen=True)
class Traffic:
    """What is asked for.

    Attributes:
        prompts: Tokens of each prompt.
        depths: Depth of each.
        new_tokens: Tokens to generate.
        in_flight: Requests at once.
    """

    prompts: list[tuple[int, ...]]
    depths: list[int]
    new_tokens: int
    in_flight: int

    def first(self, count: int) -> "Traffic":
        """Return a small part of it, of which the deepest is one."""
        deepest = self.depths.index(max(self.depths))
        chosen = [deepest, *(n for n in range(len(self.depths)) if n != deepest)][:count]
        prompts = [self.prompts[n] for n in chosen]
        return Traffic(prompts, [self.depths[n] for n in chosen], 2, self.in_flight)

    def all_at(self, depth: int) -> "Traffic":
        """Return the same requests at one depth."""
        return Traffic(self.prompts, [depth] * len(self.depths), self.new_tokens, self.in_flight)


# ---- figures


def record(
    name: str,
    flags: argparse.Namespace,
    device: str,
    found: dict[str, Any],
    page: Callable[[dict[str, Any], dict[str, Any]], str],
) -> None:
    """Print the figures, and write them with what they were measured on.

    Args:
        name: Of the files.
        flags: How it was measured; `output_dir` says where to write.
        device: Where the model ran.
        found: The figures.
        page: Writes facts and figures as Markdown.
    """
    facts = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "arguments": vars(flags),
        "hardware": hardware(device),
        "versions": versions(),
        "git": git_commit(),
    }
    text = page(facts, found)
    print(text)
    if flags.output_dir:
        directory = Path(flags.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / f"{name}.json", {**facts, "found": found})
        (directory / f"{name}.md").write_text(text, encoding="utf-8")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rate(run: Run, worked: bool = False) -> float:
    """Return generated tokens per second, of time or of work."""
    count = sum(len(answer.tokens) for answer in run.answers)
    return count / (run.worked if worked else run.seconds)


def gap(run: Run, depth: int, share: float = 0.5) -> float:
    """Return a percentile of a depth's latency per token, in seconds."""
    gaps = [one for answer in run.answers if answer.depth == depth for one in answer.gaps]
    return percentile(gaps, share)


def summary(runs: list[Run]) -> dict[str, Any]:
    """Return the figures of a setting over its rounds; latencies in milliseconds."""
    latencies: dict[int, Any] = {}
    for depth in sorted({answer.depth for answer in runs[0].answers}):
        first = [[answer.first for answer in run.answers if answer.depth == depth] for run in runs]
        latencies[depth] = {
            "token p50": spread([1e3 * gap(run, depth) for run in runs]),
            "token p95": spread([1e3 * gap(run, depth, 0.95) for run in runs]),
            "first token p50": spread([1e3 * percentile(one, 0.5) for one in first]),
            "first token p95": spread([1e3 * percentile(one, 0.95) for one in first]),
        }
    return {
        "tokens per second": spread([rate(run) for run in runs]),
        "tokens per second of work": spread([rate(run, worked=True) for run in runs]),
        "core passes": statistics.median(run.passes.count for run in runs),
        "tokens per core pass": statistics.median(
            run.passes.tokens / run.passes.count for run in runs
        ),
        "by depth": latencies,
    }


def same(runs: list[Run], others: list[Run]) -> float:
    """Return the share of answers that are equal to the token."""
    pairs = zip(runs[0].answers, others[0].answers, strict=True)
    return statistics.mean(one.tokens == other.tokens for one, other in pairs)


def report(found: dict[str, list[Run]]) -> dict[str, Any]:
    """Return all figures, and the ratios that the goals are about."""
    ours = found["rondo"]
    others = {name: runs for name, runs in found.items() if name not in ("rondo", "shallow")}
    throughput, work = (
        {
            name: spread(
                [rate(a, worked) / rate(b, worked) for a, b in zip(ours, runs, strict=True)]
            )
            for name, runs in others.items()
        }
        for worked in (False, True)
    )
    alone = found["shallow"]
    latency = {
        name: spread([gap(a, SHALLOW) / gap(b, SHALLOW) for a, b in zip(runs, alone, strict=True)])
        for name, runs in found.items()
        if name != "shallow"
    }
    return {
        "settings": {name: summary(runs) for name, runs in found.items()},
        "throughput of rondo over": throughput,
        "throughput of rondo over, by work": work,
        f"latency at depth {SHALLOW} over an all-shallow batch's": latency,
        "equal to rondo's": {
            name: same(ours, runs) for name, runs in found.items() if name != "shallow"
        },
    }


def ranged(value: dict[str, float] | None, digits: int = 2) -> str:
    """Write a median and its range, nothing for none."""
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def table(rows: dict[str, dict[str, str]], corner: str = "") -> list[str]:
    """Write a table of Markdown, of cells by row and column."""
    columns = list(next(iter(rows.values())))
    lines = [[corner, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cells[column] for column in columns)] for name, cells in rows.items()]
    return ["", *("| " + " | ".join(line) + " |" for line in lines)]


def page(facts: dict[str, Any], found: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    over, work = "throughput of rondo over", "throughput of rondo over, by work"
    slower, equal = f"latency at depth {SHALLOW} over an all-shallow batch's", "equal to rondo's"
    rows, settings = {}, found["settings"]
    for name, one in settings.items():
        rows[name] = {
            "tokens/s": ranged(one["tokens per second"], 1),
            over: ranged(found[over].get(name)),
            work: ranged(found[work].get(name)),
            "core passes": f"{one['core passes']:.0f}",
            "tokens a pass": f"{one['tokens per core pass']:.1f}",
            slower: ranged(found[slower].get(name)),
            equal: f"{found[equal][name]:.0%}" if name in found[equal] else "",
        }
    lines = [f"`{facts['command']}`, {facts['hardware']}, {facts['date']}.", *table(rows)]
    for title in ("token", "first token"):
        rows = {name: cells(one["by depth"], title) for name, one in settings.items()}
        lines += table(rows, f"{title}, milliseconds, p50 / p95")
    return "\n".join(lines) + "\n"


def cells(by_depth: dict[int, Any], title: str) -> dict[str, str]:
    """Write the medians of a latency's percentiles, by depth."""
    found = dict.fromkeys((f"r = {depth}" for depth in SHARES), "")
    for depth, one in by_depth.items():
        middle, high = (one[f"{title} {share}"]["median"] for share in ("p50", "p95"))
        found[f"r = {depth}"] = f"{middle:.0f} / {high:.0f}"
    return found
