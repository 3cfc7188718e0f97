"""One page of what an audit log says: compliance, cost, depth and load by tenant.

It needs neither network nor script, and all that it takes from the log is escaped.
"""

import importlib.resources
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import jinja2

from rondo.errors import UserError
from rondo_govern.audit.drawing import Section, Table, cell, columns, scale_of, short
from rondo_govern.audit.facts import NO_CLASS, Facts, Tally
from rondo_govern.audit.reading import read
from rondo_govern.audit.records import parse_moment
from rondo_govern.audit.usage import well_formed, within
from rondo_govern.settings import AuditReportConfig

# No tenant has a blank in its name.
ALL, OTHERS = "all tenants", "all others"
# So many tenants have a colour of their own; charts take the others together, tables do not.
MOST_COLOURS = 7
# What is longer is drawn by day.
MOST_TIME = timedelta(hours=72)
WHY = {
    "cap": "lowered: the tier gives no more",
    "floor": "raised: the tier gives no less",
    "risk": "raised: the risk class needs more",
    "escalation": "raised: where the model is not sure",
    "overload": "lowered: others waited",
}
LOADS = {"in full": "full", "lowered": "lowered", "refused": "refused"}

Tallies = Mapping[str, Tally]


class Spans:
    """Hours from the first request to the last, or days where those are many.

    Attributes:
        unit: What one is called.
        names: As records write the moments in them.
        labels: What stands beneath their columns.
    """

    def __init__(self, facts: Facts):
        moments = [datetime.fromisoformat(f"{hour}:00") for hour, _ in facts.hours]
        first, last = min(moments), max(moments)
        by_day = last - first >= MOST_TIME
        step = timedelta(days=1) if by_day else timedelta(hours=1)
        first = first.replace(hour=0) if by_day else first
        all_of = [first + number * step for number in range((last - first) // step + 1)]
        self.unit = "day" if by_day else "hour"
        self.names = [f"{one:%Y-%m-%d}" if by_day else f"{one:%Y-%m-%dT%H}" for one in all_of]
        self.labels = [f"{one:%m-%d}" if by_day else f"{one:%H}:00" for one in all_of]
        self._hours = facts.hours

    def sums(
        self, names: Sequence[str], parts: Callable[[str, Tally], Mapping[str, int]]
    ) -> dict[str, list[int]]:
        """Add up, name by name and span by span, what a tenant's tally comes apart into."""
        found = {name: Counter[str]() for name in names}
        for (hour, tenant), tally in self._hours.items():
            for name, value in parts(tenant, tally).items():
                found[name][hour[: len(self.names[0])]] += value
        return {name: [sums[span] for span in self.names] for name, sums in found.items()}

    def table(self, title: str, sums: Mapping[str, Sequence[int]]) -> Table:
        """Tabulate what a chart shows."""
        lines = zip((name.replace("T", " ") for name in self.names), *sums.values(), strict=True)
        return Table(title, [self.unit, *sums], [*lines], folded=True)


def sections_of(facts: Facts, currency: str) -> list[Section]:
    """Return what the page says, in order."""
    spans, styles = Spans(facts), styles_of(facts)
    tallies = dict(sorted(facts.tenants.items())) | {ALL: facts.total}
    return [
        compliance_section(facts),
        cost_section(tallies, facts.total, spans, styles, currency),
        depth_section(tallies, styles),
        load_section(tallies, facts.total, spans),
        log_section(facts),
    ]


def styles_of(facts: Facts) -> dict[str, str]:
    """Give the tenants that computed most colours; the others share the last."""
    ranked = sorted(facts.tenants, key=lambda name: (-facts.tenants[name].iterations, name))
    own = ranked if len(ranked) <= MOST_COLOURS else [*ranked[: MOST_COLOURS - 1], OTHERS]
    return {name: f"s{number}" for number, name in enumerate(own)}


def compliance_section(facts: Facts) -> Section:
    """Tell whether the floors of risk classes and tiers were kept."""
    head = ["risk class", "floor", "answers", "generated tokens", "least required"]
    head += ["least executed", "tokens below", "tokens above allowed", "raised by class"]
    lines = [
        [
            name,
            "broken" if duty.below or duty.above else "kept",
            duty.answers,
            duty.depths.total(),
            min(duty.floors),
            min(duty.depths),
            duty.below,
            duty.above,
            duty.raised,
        ]
        for name, duty in sorted(facts.duties.items(), key=lambda one: (one[0] == NO_CLASS, one[0]))
    ]
    tables = [Table("Floors by risk class", head, lines)]
    if facts.breaches:
        title = "Answers outside of what was decided"
        if facts.broken > len(facts.breaches):
            title += f": the first {len(facts.breaches)} of {facts.broken:,}"
        head = ["answer", "tenant", "risk classes", "decided", "executed", "tokens"]
        tables.append(Table(title, head, facts.breaches))
    about = (
        "Counted from the iterations that each generated token took, against the floor and the "
        "depth that the answer's own record names. An answer of several classes counts in each."
    )
    return Section("Compliance", about, [], tables)


def cost_section(
    tallies: Tallies, total: Tally, spans: Spans, styles: Mapping[str, str], currency: str
) -> Section:
    """Tell what each tenant took, and when."""
    factor, prefix = scale_of(total.flops)
    head = ["tenant", "answers", "prompt tokens", "generated tokens", "iterations"]
    head += [f"{prefix}FLOPs", f"price {currency}".rstrip(), "% of price"]
    lines = [
        [
            name,
            tally.answers,
            tally.prompt_tokens,
            tally.new_tokens,
            tally.iterations,
            tally.flops / factor,
            tally.price,
            percent(tally.price, total.price),
        ]
        for name, tally in tallies.items()
    ]
    title = f"Iterations by {spans.unit}"
    about = "Of prompts and answers; moments are in UTC."
    sums = spans.sums(
        [*styles], lambda who, tally: {who if who in styles else OTHERS: tally.iterations}
    )
    return Section(
        "Cost",
        "An iteration takes one token, of a prompt or an answer, once through the core.",
        [columns(title, about, spans.labels, sums, styles, short)],
        [Table("Cost by tenant", head, lines), spans.table(title, sums)],
    )


def depth_section(tallies: Tallies, styles: Mapping[str, str]) -> Section:
    """Tell how deep tenants asked, and how deep they were answered."""
    depths = range(1, max(tally.max_depth for tally in tallies.values()) + 1) or range(1, 2)
    places = [str(depth) for depth in depths]
    means = {
        name: [mean(tally.asked), mean(tally.allowed), mean(tally.depths)]
        for name, tally in tallies.items()
    }
    deepest = max(1.0, *(value or 0.0 for own in means.values() for value in own))
    shares = {
        name: [tally.depths[depth] / max(1, tally.depths.total()) for depth in depths]
        for name, tally in tallies.items()
    }
    most = max(map(max, shares.values()))
    charts = []
    for name in styles:
        if name in tallies:
            kinds = zip(("asked", "allowed", "executed"), means[name], strict=True)
            lying = [(kind, 100 * (value or 0) / deepest, cell(value)) for kind, value in kinds]
            about, own = f"{tallies[name].new_tokens:,} generated tokens", {name: shares[name]}
            charts.append(columns(name, about, places, own, styles, "{:.0%}".format, most, lying))
    head = ["tenant", "asked for a number", "asked", "allowed", "executed", *WHY.values()]
    lines = [
        [name, tally.numbered, *means[name], *(tally.adjusted[one] for one in WHY)]
        for name, tally in tallies.items()
    ]
    counts = [[name, *(tally.depths[depth] for depth in depths)] for name, tally in tallies.items()]
    return Section(
        "Depth",
        "Generated tokens by the iterations that they took, and means over them. Asked: of answers "
        "that asked for a number; others named an effort, or nothing.",
        charts,
        [
            Table("Mean depths, and answers by what changed their depth", head, lines),
            Table("Generated tokens by iterations", ["tenant", *places], counts, folded=True),
        ],
    )


def load_section(tallies: Tallies, total: Tally, spans: Spans) -> Section:
    """Tell what gave way when there was too much to do."""
    title = f"Requests by {spans.unit}"
    about = "Lowered: given less depth, never below the floor, because others waited."
    sums = spans.sums([*LOADS], lambda _, tally: load_of(tally))
    reasons, codes = sorted(total.reasons), sorted(total.codes)
    lines = []
    for name, tally in tallies.items():
        _, lowered, refused = load_of(tally).values()
        lines.append([name, tally.requests, lowered, percent(lowered, tally.requests)])
        lines[-1] += [refused, percent(refused, tally.requests)]
    ends = [
        [name, *(tally.reasons[one] for one in reasons), *(tally.codes[one] for one in codes)]
        for name, tally in tallies.items()
    ]
    head = ["tenant", "requests", "lowered", "% lowered", "refused", "% refused"]
    kinds = [*(f"ended: {one}" for one in reasons), *(f"refused: {one}" for one in codes)]
    return Section(
        "Overload and refusals",
        "Requests without a good key are not in the log.",
        [columns(title, about, spans.labels, sums, LOADS, short)],
        [
            Table("Requests that were lowered or refused", head, lines),
            Table("How requests ended", ["tenant", *kinds], ends),
            spans.table(title, sums),
        ],
    )


def load_of(tally: Tally) -> dict[str, int]:
    """Return how many requests were served in full, lowered under overload, and refused."""
    lowered = tally.adjusted["overload"]
    in_full = tally.requests - lowered - tally.refused
    return dict(zip(LOADS, (in_full, lowered, tally.refused), strict=True))


def log_section(facts: Facts) -> Section:
    """Tell how the log stands."""
    about = (
        "Every line that was read follows from the one before, so that none was altered, left out "
        "or moved. Only a hash that was noted elsewhere shows that the log was not written anew as "
        "a whole: compare it with the last one."
    )
    lines = [
        ["records", f"{facts.records:,}"],
        ["last record", f"{facts.head.seq:,}"],
        ["its hash", facts.head.hash],
        ["requests in flight", f"{len(facts.in_flight):,}"],
    ]
    events = Table("Starts, ends and reloads", ["moment (UTC)", "what", "with"], [*facts.events])
    return Section("The log", about, [], [Table("State", [], lines), events])


def mean(counts: Counter[int]) -> float | None:
    """Return the mean of what was counted, None if nothing was."""
    total = counts.total()
    return sum(value * count for value, count in counts.items()) / total if total else None


def percent(part: Any, whole: Any) -> float | None:
    """Return a share in percent, None of nothing."""
    return float(100 * part / whole) if whole else None


def headline(facts: Facts) -> str:
    """Say in a sentence whether every answer was as deep as was decided for it."""
    tokens = f"{facts.total.new_tokens:,} generated tokens"
    if not facts.broken:
        return f"Each of {tokens} took the iterations that it had to, and no more than allowed."
    fault = "took fewer iterations than they had to, or more than allowed"
    return f"Of {tokens}, some in {facts.broken:,} answers {fault}."


def tiles(facts: Facts, currency: str) -> list[tuple[str, str]]:
    """Return the few numbers that matter most, with their names."""
    total = facts.total
    return [
        ("tenants", f"{len(facts.tenants):,}"),
        ("requests", f"{total.requests:,}"),
        ("generated tokens", f"{total.new_tokens:,}"),
        ("iterations per token", cell(mean(total.depths))),
        ("price", f"{total.price:,.2f} {currency}".rstrip()),
        ("% lowered", cell(percent(total.adjusted["overload"], total.requests))),
        ("% refused", cell(percent(total.refused, total.requests))),
    ]


def render(facts: Facts, title: str, currency: str) -> str:
    """Return the page."""
    # What a template lacks is a mistake of ours, not an empty place.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = cell
    source = importlib.resources.files("rondo_govern.audit").joinpath("page.html")
    hours = sorted(hour for hour, _ in facts.hours)
    first, last = (hour.replace("T", " ") for hour in (hours[0], hours[-1]))
    served = ", ".join(facts.models) or "not known"
    return environment.from_string(source.read_text("utf-8")).render(
        title=title,
        period=f"Requests that ended from {first}:00 to {last}:59 UTC. Served: {served}.",
        whole=not facts.broken,
        headline=headline(facts),
        tiles=tiles(facts, currency),
        sections=sections_of(facts, currency),
    )


def summed_up(log: Path, since: float | None, until: float | None) -> Facts:
    """Return what a log says of the requests that ended in a time.

    Raises:
        ProofError: The log is not what was written, or a record does not tell what it must.
        UserError: It cannot be read, or no request ended then.
    """
    facts = Facts()
    for record in read(log, since=since):
        with well_formed(record):
            facts.add(record, within(record, since, until))
    if not facts.hours:
        raise UserError(f"{log} tells of no request that ended then: there is nothing to draw")
    return facts


def run_report(config: AuditReportConfig) -> None:
    """Draw the page.

    Raises:
        ProofError: The log is not what was written.
        UserError: The page is there already or cannot be written, or the log gives none.
    """
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise UserError(f"{output} is there already: name another --output, or add --overwrite")
    since, until = (
        None if one is None else parse_moment(one) for one in (config.since, config.until)
    )
    facts = summed_up(Path(config.log), since, until)
    page = render(facts, "Depth asked for, given and paid for", config.currency or facts.currency)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    print(f"{output}: {facts.total.requests:,} requests of {len(facts.tenants):,} tenants")
