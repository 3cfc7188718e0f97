"""What the page of an audit log stands on, summed up in one pass over its records."""

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rondo_govern.audit.records import Head, Record
from rondo_govern.audit.usage import Usage

# No name of a tenant or a risk class has a blank.
NOBODY, NO_CLASS = "no tenant", "no class"
MOST_BREACHES = 20
MOST_EVENTS = 100


@dataclass
class Tally(Usage):
    """What some requests took, added up.

    Attributes:
        depths: Generated tokens by the iterations that they took.
        asked: Generated tokens by the depth that was asked for, where a number was.
        allowed: Generated tokens by the depth that was allowed.
        numbered: Answers that asked for a number.
        adjusted: Answers by what made the allowed depth another than the one asked for.
        reasons: Answers by how they ended.
        codes: Requests that were refused, by code.
    """

    group: Mapping[str, str] = field(default_factory=dict)
    depths: Counter[int] = field(default_factory=Counter)
    asked: Counter[int] = field(default_factory=Counter)
    allowed: Counter[int] = field(default_factory=Counter)
    numbered: int = 0
    adjusted: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Add the end of a request."""
        super().add(record)
        if record["kind"] == "refused":
            self.codes[record["code"]] += 1
            return
        self.depths.update(depths_of(record))
        if record["asked"] is not None:
            self.numbered += 1
            self.asked[record["asked"]] += record["new_tokens"]
        self.allowed[record["allowed"]] += record["new_tokens"]
        self.adjusted.update(record["adjusted"])
        self.reasons[record["reason"]] += 1

    @property
    def requests(self) -> int:
        """How many there were, refused ones too."""
        return self.reasons.total() + self.refused


@dataclass
class Duty:
    """How the answers of a risk class were served.

    Attributes:
        floors: Iterations that their tokens had to take at least.
        depths: Generated tokens by the iterations that they took.
        below: Tokens that took fewer than they had to.
        above: Tokens that took more than they were allowed.
        raised: Answers that asked for less than the class needs.
    """

    answers: int = 0
    floors: set[int] = field(default_factory=set)
    depths: Counter[int] = field(default_factory=Counter)
    below: int = 0
    above: int = 0
    raised: int = 0


@dataclass
class Facts:
    """All that the page says, as numbers.

    Attributes:
        hours: Tallies by hour and tenant.
        duties: By risk class.
        breaches: The first answers with tokens outside of what was decided.
        broken: How many such answers there are.
        events: The latest starts, ends and reloads, with their moments.
        in_flight: Requests that were taken and have not ended.
        records: How many were read, those that do not count too.
        head: Number and hash of the last.
        models: Those that were served, in order.
        currency: What prices are in.
    """

    total: Tally = field(default_factory=Tally)
    tenants: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    hours: defaultdict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    duties: defaultdict[str, Duty] = field(default_factory=lambda: defaultdict(Duty))
    breaches: list[Sequence[str]] = field(default_factory=list)
    broken: int = 0
    events: deque[Sequence[str]] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS))
    in_flight: set[str] = field(default_factory=set)
    records: int = 0
    head: Head = field(default_factory=Head)
    models: dict[str, None] = field(default_factory=dict)
    currency: str = ""

    def add(self, record: Record, counts: bool = True) -> None:
        """Add a record; one that does not count tells only how the log stands."""
        self.records += 1
        self.head = Head(record["seq"], record["hash"])
        kind = record["kind"]
        if kind == "taken":
            self.in_flight.add(record["id"])
        elif kind == "ended":
            self.in_flight.discard(record["id"])
            # The engine had no room for it; that it was refused is a record of its own.
            if counts and record["reason"] != "untaken":
                self._count(record)
                self._check(record)
        elif kind == "refused":
            if counts:
                self._count(record)
        else:
            moment = record["time"][:19].replace("T", " ")
            self.events.append((moment, *event_of(record)))
            if kind == "opened":
                self.models[record["model"]] = None
                self.currency = record["currency"]

    def _count(self, record: Record) -> None:
        tenant = record["tenant"] or NOBODY
        for tally in (self.total, self.tenants[tenant], self.hours[record["time"][:13], tenant]):
            tally.add(record)

    def _check(self, record: Record) -> None:
        """Hold the executed depths of an answer against what was decided for it."""
        depths, floor, allowed = depths_of(record), record["floor"], record["allowed"]
        if not depths:
            return
        below = sum(count for depth, count in depths.items() if depth < floor)
        above = sum(count for depth, count in depths.items() if depth > allowed)
        for name in record["risks"] or [NO_CLASS]:
            duty = self.duties[name]
            duty.answers += 1
            duty.floors.add(floor)
            duty.depths.update(depths)
            duty.below += below
            duty.above += above
            duty.raised += "risk" in record["adjusted"]
        if below or above:
            self.broken += 1
            if len(self.breaches) < MOST_BREACHES:
                classes = ", ".join(record["risks"]) or NO_CLASS
                executed = f"{min(depths)} to {max(depths)}"
                decided = f"{floor} to {allowed}"
                who = record["id"], record["tenant"] or NOBODY
                self.breaches.append((*who, classes, decided, executed, f"{below + above:,}"))


def depths_of(record: Record) -> dict[int, int]:
    """Return how many generated tokens of an answer took how many iterations."""
    return {int(depth): count for depth, count in record["depths"].items() if count}


def event_of(record: Record) -> tuple[str, str]:
    """Tell a start, an end or a reload."""
    kind = record["kind"]
    if kind == "opened":
        model, policy = (_brief(record[f"{one}_sha256"]) for one in ("model", "policy"))
        where = f"{record['dtype']} on {record['device']}"
        served = f"{record['model']}, model {model}, policy {policy}, {where}"
        return "the server started", f"{record['server']}, {served}"
    if kind in ("policy", "keys"):
        return f"other {kind} took effect", f"{kind} {_brief(record[f'{kind}_sha256'])}"
    if kind == "continued":
        return "the log was rotated", f"before: {record['previous']}"
    return ("the server ended in order" if kind == "closed" else kind), ""


def _brief(sha256: str | None) -> str:
    return sha256[:12] if sha256 else "none"
