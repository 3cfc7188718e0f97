"""Tokens that leave the loop before its end, by the rules of `rondo.modeling.exits_recurrent`."""

from collections.abc import Sequence
from typing import Any

import torch

from rondo.modeling.exits_recurrent import of_logits, of_states
from rondo_serve.engine.arena import Arena
from rondo_serve.engine.rows import Flight


def is_checked(flight: Flight) -> bool:
    """Return whether the flight's tokens are checked after the iteration they have run."""
    rule = flight.row.rule
    return rule is not None and flight.remaining > 0 and rule.due(flight.iteration)


def check_states(flights: Sequence[Flight], gate: Any, arena: Arena) -> None:
    """Let tokens go whose rules read the state."""
    for one in flights:
        rule = one.row.rule
        assert rule is not None
        assert one.before is not None
        now = one.of_looping(one.state)
        let_go(one, of_states(rule.criterion, gate, now, one.before), arena)


def check_logits(flight: Flight, logits: torch.Tensor, arena: Arena) -> None:
    """Let tokens go whose rule reads the logits (n, V) of those that loop."""
    rule = flight.row.rule
    assert rule is not None
    value, agreed = of_logits(rule.criterion, logits, *flight.last_checks(logits))
    flight.note_checks(logits, agreed)
    let_go(flight, value, arena)


def let_go(flight: Flight, value: torch.Tensor, arena: Arena) -> None:
    """Let the looping tokens go whose criterion (n,) is below the threshold.

    What they have cached last is what deeper readers are shown.
    """
    rule = flight.row.rule
    assert rule is not None
    leaving = value < rule.threshold
    if bool(leaving.any()):
        arena.lend(flight.row.tables, flight.leave(leaving), flight.iteration)
