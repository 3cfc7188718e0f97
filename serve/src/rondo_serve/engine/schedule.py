"""Who goes next: which rows leave the queue, which enter the loop, which tokens run an iteration.

Pure functions of what there is. Nobody starves: who is left out gains on the others with each tick
or second.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from rondo_serve.config import Favour
from rondo_serve.engine.rows import Flight, Row

SIGNS: dict[Favour, int] = {"shallow": 1, "even": 0, "deep": -1}
# Ticks from one start of rows to the next, the most that can be had first.
PACES = (4, 3, 2, 1)


def next_admitted(
    waiting: Iterable[Row], favour: Favour, now: float, held_back: Callable[[Row], bool]
) -> Row | None:
    """Return the row that leaves the queue next.

    A second of waiting counts as much as one iteration of difference in depth.

    Args:
        waiting: The queue.
        favour: Who goes first.
        now: Time, by the clock that rows were asked at.
        held_back: Whether a row does better to wait.
    """
    sign = SIGNS[favour]
    if not sign:
        return next((row for row in waiting if not held_back(row)), None)
    order = sorted(waiting, key=lambda row: sign * row.depth - (now - row.asked_at))
    return next((row for row in order if not held_back(row)), None)


def ready(rows: Sequence[Row], phase: int, lockstep: bool) -> list[Row]:
    """Return the rows whose next token, made by their last one, may enter the loop in this tick.

    Prelude and coda read their weights whether one row passes them or many. So rows start together
    where that delays nobody for long: in every second, third or fourth tick if that divides all
    the depths in flight, by which, unless it is left out, each is done when it may start anew.
    Tokens that leave when they like let nobody plan.

    Args:
        rows: Those in flight, whose prompts are read.
        phase: Ticks since the loop was empty.
        lockstep: Whether all wait for the deepest, as other engines do; to measure against.
    """
    waiting = [row for row in rows if row.flight is None]
    if lockstep:
        return waiting if len(waiting) == len(rows) else []
    if any(row.rule is not None for row in rows):
        return waiting
    depths = math.gcd(*(row.depth for row in rows))
    pace = next(ticks for ticks in PACES if depths % ticks == 0)
    return waiting if phase % pace == 0 else []


def chunks(
    rows: Sequence[Row], flights: Sequence[Flight], room: int, chunk: int
) -> list[tuple[Row, int]]:
    """Return the rows whose prompts go on being read, oldest first, each with how many tokens.

    Args:
        rows: Those whose prompts are not read to the end.
        flights: Tokens of prompts in the loop.
        room: Tokens that all prompts may have in the loop at once.
        chunk: Tokens of a prompt that enter at once.
    """
    found: list[tuple[Row, int]] = []
    room -= sum(one.stop - one.start for one in flights)
    alone = not flights
    for row in rows:
        left = len(row.ask.prompt) - row.read
        count = min(left, chunk) if row.shares else left
        if row.shares and not alone:
            count = min(count, room)
        # One that must be read at once waits until nothing else is, and whoever comes after it.
        if count < 1 or not (alone or count <= room):
            break
        found.append((row, count))
        room -= count
        alone = False
    return found


def choose(flights: Sequence[Flight], room: int, favour: Favour) -> list[Flight]:
    """Return the flights that run the tick's iteration.

    Answers go before prompts; one flight at least goes.

    Args:
        flights: All in the loop.
        room: Tokens that an iteration takes at most.
        favour: Who goes first where not all can.
    """
    if sum(one.count for one in flights) <= room:
        return list(flights)
    sign = SIGNS[favour]
    order = sorted(flights, key=lambda one: (sign * one.remaining - one.waited, one.is_prompt))
    chosen: list[Flight] = []
    for one in order:
        if one.count <= room or not chosen:
            chosen.append(one)
            room -= one.count
    return chosen
