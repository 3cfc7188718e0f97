"""What was used, summed up from a log by tenant, tier, key, risk class, model or day."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any

from rondo.errors import ProofError, UserError
from rondo_govern.audit.records import Record, moment_of
from rondo_govern.tables import aligned

# Adds prices without rounding, or not at all.
EXACT = Context(prec=100, traps=[Inexact, InvalidOperation])

GROUPS = ("tenant", "tier", "key", "risk", "model", "day")
HASH_SHOWN = 12
NONE = "-"


@dataclass
class Usage:
    """What one group used.

    Attributes:
        group: What it is, by what was summed up.
        answers: Requests that were taken, whatever ended them.
        refused: Requests that were not.
        lost: Requests that were taken by a process that died; what they took is not known.
        prompt_tokens: Tokens of prompts.
        cached_tokens: Those of them whose keys and values were there already.
        new_tokens: Tokens generated.
        iterations: Iterations of all tokens that were read.
        generated_iterations: Those of the generated tokens.
        max_depth: Most iterations of a generated token.
        flops: FLOPs executed.
        price: What it costs, exactly.
    """

    group: Mapping[str, str]
    answers: int = 0
    refused: int = 0
    lost: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    iterations: int = 0
    generated_iterations: int = 0
    max_depth: int = 0
    flops: float = 0.0
    price: Decimal = Decimal(0)

    @property
    def mean_depth(self) -> float | None:
        """Iterations of a generated token, on average; None where there is none."""
        return self.generated_iterations / self.new_tokens if self.new_tokens else None

    def add(self, record: Record) -> None:
        """Add the end of a request."""
        if record["kind"] == "refused":
            self.refused += 1
            return
        if record["reason"] == "lost":
            self.lost += 1
            return
        depths = {int(depth): count for depth, count in record["depths"].items()}
        self.answers += 1
        self.prompt_tokens += record["prompt_tokens"]
        self.cached_tokens += record["cached_tokens"]
        self.new_tokens += record["new_tokens"]
        self.iterations += record["iterations"]
        self.generated_iterations += sum(depth * count for depth, count in depths.items())
        self.max_depth = max(self.max_depth, *depths, 0)
        self.flops += record["flops"]
        self.price = EXACT.add(self.price, Decimal(record["price"]))

    def told(self) -> dict[str, Any]:
        """Return it as JSON has it; the price is a text, since no number of JSON is exact."""
        numbers = {name: value for name, value in asdict(self).items() if name != "group"}
        told = {**self.group, **numbers, "mean_depth": self.mean_depth}
        return told | {"price": format(self.price, "f")}


def usage(
    records: Iterable[Record],
    by: Sequence[str],
    since: float | None = None,
    until: float | None = None,
) -> list[Usage]:
    """Sum up what was used, in the order of the groups' names.

    Args:
        records: Those of a log.
        by: What to sum up by, of `GROUPS`.
        since: First moment, in seconds since 1970: requests count when they end.
        until: First moment that is left out.

    Raises:
        ProofError: A record of the end of a request does not tell what it must.
    """
    found: dict[tuple[str, ...], Usage] = {}
    model = ""
    for record in records:
        with well_formed(record):
            if record["kind"] == "opened":
                model = record["model_sha256"]
            if not (_counts(record) and within(record, since, until)):
                continue
            # A request that was refused is one to the model that was served.
            group = {name: _name_of({"model_sha256": model, **record}, name) for name in by}
            found.setdefault(tuple(group.values()), Usage(group)).add(record)
    return [found[key] for key in sorted(found)]


def _counts(record: Record) -> bool:
    return record["kind"] in ("ended", "refused") and record.get("reason") != "untaken"


def within(record: Record, since: float | None, until: float | None) -> bool:
    """Return whether a record is of a time, whose end is left out; None leaves it open."""
    moment = moment_of(record)
    return (since is None or moment >= since) and (until is None or moment < until)


@contextmanager
def well_formed(record: Record) -> Iterator[None]:
    """Take a record for one that tells all that its kind must.

    Raises:
        ProofError: It does not.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ProofError(
            f"record {record['seq']} does not tell what one of its kind, {record['kind']}, must"
        ) from error


def _name_of(record: Record, by: str) -> str:
    match by:
        case "day":
            return record["time"][:10]
        case "risk":
            return "+".join(record.get("risks", ()))
        case "model":
            return record["model_sha256"]
    return record[by]


def parse_groups(text: str) -> list[str]:
    """Return what a person wants to sum up by.

    Raises:
        UserError: There is nothing of that name.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in GROUPS or names.count(name) > 1:
            raise UserError(f"--by {name!r}: name some of {', '.join(GROUPS)}, each once")
    return names


def table(found: Sequence[Usage], by: Sequence[str]) -> list[str]:
    """Return what was used as aligned lines."""
    heads = ["answers", "refused", "lost", "prompt", "cached", "new", "iterations"]
    heads += ["mean depth", "max depth", "FLOPs", "price"]
    rows = [[*by, *heads], *(_cells(one) for one in found)]
    return aligned(rows, len(by))


def _cells(one: Usage) -> list[str]:
    group = [
        (value[:HASH_SHOWN] if name == "model" else value) or NONE
        for name, value in one.group.items()
    ]
    counts = [one.answers, one.refused, one.lost, one.prompt_tokens, one.cached_tokens]
    counts += [one.new_tokens, one.iterations]
    mean = NONE if one.mean_depth is None else f"{one.mean_depth:.2f}"
    most, price = f"{one.max_depth:,}", f"{one.price:,f}"
    return [*group, *(f"{count:,}" for count in counts), mean, most, f"{one.flops:.4g}", price]
