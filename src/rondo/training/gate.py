"""The learned exit gate, trained alone: all other weights stay as they are.

One trajectory without gradient gives the examples. After each iteration i before the deepest, R,
coda and head answer as well, and d_i = KL(p_R || p_i) is how far the answer still is from the
deepest one. The gate, which sees the state and how far it moved, learns the logarithm of d_i.

The logarithm, because divergences span orders of magnitude, and thresholds with them; Huber's
loss, because the smallest are rounding. What the gate expects is thus a typical divergence, which
lies below the mean.

Shapes: B batch, T tokens, N tokens that count, D width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from rondo.data import Rows
from rondo.dynamics import Loop
from rondo.modeling.exits_recurrent import ExitGate, kl
from rondo.modeling.inputs_recurrent import LayerInputs
from rondo.training.losses import CHUNK_TOKENS, Losses

# In nats; what is less is rounding of the logits, and no threshold of use.
FLOOR = 1e-6


class Examples(NamedTuple):
    """What a gate learns from: N tokens after each of R - 1 iterations."""

    states: torch.Tensor
    """Before the first iteration and after each of them, (R, N, D)."""
    divergences: torch.Tensor
    """KL(deepest || now) in nats, (R - 1, N)."""


def fit_exits(model: Any, gated: bool) -> None:
    """Give a recurrent model the exits that training leaves it, in place.

    Args:
        model: `RecurrentForCausalLM`.
        gated: Whether its gate is trained: it gets one, unless it has one to go on from, and all
            else is frozen. Otherwise it loses gate and thresholds, which new weights would belie.
    """
    body, config = model.model, model.config
    if not gated:
        config.exit_gate, config.exit_rules, body.exit_gate = False, None, None
        return
    if body.exit_gate is None:
        config.exit_gate = True
        body.exit_gate = ExitGate(config)
        body.exit_gate.initialize()
    if config.exit_rules:
        kept = {rule: found for rule, found in config.exit_rules.items() if rule != "gate"}
        config.exit_rules = kept or None
    model.requires_grad_(False)
    body.exit_gate.requires_grad_(True)


@torch.no_grad()
def examples(
    model: Any,
    rows: Rows,
    depth: int,
    state_seeds: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
) -> Examples:
    """Run one trajectory and say of each token that counts what the gate should have expected.

    Args:
        model: `RecurrentForCausalLM`, in eval mode: dropout would pass for divergence.
        rows: The tokens; those with a label count.
        depth: R, at least 2.
        state_seeds: Seeds of the rows' initial states.
        head: Maps (N, D) to logits (N, V).
    """
    body, counted = model.model, rows.labels != -100
    embeds = body.embed(rows.input_ids)
    inputs = LayerInputs.prepare(body, embeds, None, rows.position_ids, None, {})
    e_BTD = body.run(slice(0, body.config.num_prelude_layers), embeds, inputs, None)
    start_BTD = body.initial_state(e_BTD, inputs.position_ids, state_seeds)
    loop = Loop(body, inputs, e_BTD, start_BTD)
    states, answers = [], []
    for iteration, s_BTD in enumerate(loop.states(depth)):
        if iteration < depth:
            states.append(s_BTD[counted])
        if iteration > 0:
            answers.append(loop.finish(s_BTD)[counted])
    return Examples(torch.stack(states), divergences(answers, head))


def divergences(
    answers: Sequence[torch.Tensor], head: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return KL(last || each of those before) in nats, (R - 1, N), for normed states (N, D).

    Logits of two answers and a chunk of tokens exist at one time.
    """
    *earlier, deepest = answers
    found = torch.empty(len(earlier), len(deepest), device=deepest.device)
    for start in range(0, len(deepest), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        last = head(deepest[part])
        for index, answer in enumerate(earlier):
            found[index, part] = kl(head(answer[part]), last)
    return found


def pairs(gate: Any, found: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logarithms the gate expects and those it should, each (R - 1, N)."""
    # In float32 under autocast too: a dot product over the width is all there is to it.
    with torch.autocast(found.states.device.type, enabled=False):
        expected = gate(found.states[1:], found.states[:-1])
    return expected, found.divergences.clamp_min(FLOOR).log()


def minimised(gate: Any, found: Examples) -> Losses:
    """Return Huber's loss, its mean over the iterations, summed over tokens."""
    expected, true = pairs(gate, found)
    loss = nn.functional.huber_loss(expected, true, reduction="sum") / len(true)
    return Losses(loss, loss, torch.zeros_like(loss))


def measured(gate: Any, found: Examples) -> list[torch.Tensor]:
    """Return sums over tokens, of means over the iterations, that `summary` reads."""
    expected, true = pairs(gate, found)
    x, y = expected.double(), true.double()
    sums = [x, y, x * x, y * y, x * y]
    return [minimised(gate, found).objective, *(one.mean(0).sum() for one in sums)]


def summary(sums: Sequence[float], counted: float) -> dict[str, float]:
    """Return loss and correlation of the logarithms, from sums over so many tokens.

    The correlation is Pearson's: its sums add up over processes and micro-batches alike. A gate
    that expects the same of everything has none, which is told as 0.
    """
    loss, x, y, xx, yy, xy = (one / max(counted, 1.0) for one in sums)
    spread = math.sqrt(max(xx - x * x, 0.0) * max(yy - y * y, 0.0))
    correlation = (xy - x * y) / spread if spread > 1e-12 else 0.0
    return {"val/gate_loss": loss, "val/gate_correlation": correlation}
