"""Ways through the loop: one depth for all, one for each row, branches on the way, exits.

Shapes: B batch, T tokens of this call, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .cache_recurrent import RecurrentCache
from .exits_recurrent import ExitChecks
from .inputs_recurrent import LayerInputs, Selection


@dataclass(frozen=True)
class Looped:
    """What comes out of a loop.

    Attributes:
        state: Each token's last state, (B, T, D).
        hidden: Normed coda output (B, T, D), where the way there needed it.
        branches: The same at other depths, each (B, T, D).
    """

    state: torch.Tensor
    hidden: torch.Tensor | None = None
    branches: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Way:
    """What happens on the way through a loop; see `RecurrentModel.forward` for the fields."""

    output_recurrences: Sequence[int] = ()
    backprop_depth: int | None = None
    checkpoint_iterations: bool = False
    branch_at: int = 0
    checks: ExitChecks | None = None

    @property
    def branches(self) -> bool:
        """Whether codas branch off, or gradient is cut."""
        return bool(self.output_recurrences or self.backprop_depth)


def run_loop(
    body: Any,
    way: Way,
    depth: Any,
    real_BT: torch.Tensor,
    s_BTD: torch.Tensor,
    e_BTD: torch.Tensor,
    inputs: LayerInputs,
    cache: Any,
) -> Looped:
    """Run the loop the way it is asked for, and note in the cache how far tokens went."""
    if way.branches:
        return loop_with_branches(body, depth, way, s_BTD, e_BTD, inputs)
    if way.checks is not None:
        return loop_with_exits(body, depth, way.checks, real_BT, s_BTD, e_BTD, inputs, cache)
    loop = loop_by_row(body, depth, s_BTD, e_BTD, inputs, cache, way.branch_at)
    if isinstance(cache, RecurrentCache):
        by_row = torch.as_tensor(depth, device=real_BT.device).reshape(-1, 1)
        cache.finished(torch.where(real_BT, by_row, 0), depth)
    return loop


def loop_by_row(
    body: Any,
    depth: int | torch.Tensor,
    s_BTD: torch.Tensor,
    e_BTD: torch.Tensor,
    inputs: LayerInputs,
    cache: Any,
    branch_at: int = 0,
) -> Looped:
    """Run all rows to one depth, or each to its own (B,); a row that is done takes no part.

    Args:
        body: The `RecurrentModel`.
        depth: r, or one for each row.
        s_BTD: First state.
        e_BTD: The prelude's output.
        inputs: What the layers are given.
        cache: The cache of the call.
        branch_at: Iteration at which a coda of its own is branched off, 0 for none.
    """
    branches = []
    for iteration in range(1, (depth if isinstance(depth, int) else int(depth.max())) + 1):
        selection = None
        if not isinstance(depth, int) and bool((done := depth < iteration).any()):
            selection = Selection((~done).nonzero().flatten().to(e_BTD.device))
        moved = body.iterate(iteration, s_BTD, e_BTD, inputs, cache, selection)
        s_BTD = moved if selection is None else selection.put(s_BTD, moved)
        if iteration == branch_at:
            branches.append(body.finish(s_BTD, inputs, cache, branch_at=branch_at))
    return Looped(s_BTD, branches=tuple(branches))


def loop_with_exits(
    body: Any,
    depth: int | torch.Tensor,
    checks: ExitChecks,
    real_BT: torch.Tensor,
    s_BTD: torch.Tensor,
    e_BTD: torch.Tensor,
    inputs: LayerInputs,
    cache: RecurrentCache,
) -> Looped:
    """Run each token until its rule lets it go, at most to the depth of its row.

    Under the cache policy `full` all run to the depth, and only the answer is taken earlier. Among
    several tokens a rule that reads logits sees those before as they stand at that iteration.

    Args:
        body: The `RecurrentModel`.
        depth: Hard cap, one or one for each row.
        checks: The rule and what it reads.
        real_BT: Which tokens are no padding.
        s_BTD: First state.
        e_BTD: The prelude's output.
        inputs: What the layers are given.
        cache: The cache of the call.
    """
    depth_B1 = torch.as_tensor(depth, device=e_BTD.device).reshape(-1, 1).expand(len(e_BTD), 1)
    active_BT, answer_BTD, hidden_BTD = real_BT, s_BTD, torch.zeros_like(e_BTD)
    nobody_BT, left_BT = torch.zeros_like(real_BT), torch.zeros_like(real_BT, dtype=torch.long)
    executed_BT, everyone = left_BT, cache.policy.startswith("full")
    # The last check of a single token is its answer; several are answered together at the end.
    answers = checks.rule.reads_logits and e_BTD.shape[1] == 1
    for iteration in range(1, int(depth_B1.max()) + 1):
        running_BT = (depth_B1 >= iteration).expand_as(real_BT) if everyone else active_BT
        selection, before_BTD = Selection.of(running_BT), s_BTD
        moved = body.iterate(iteration, s_BTD, e_BTD, inputs, cache, selection)
        s_BTD = moved if selection is None else selection.put(s_BTD, moved)
        executed_BT = torch.where(running_BT, iteration, executed_BT)
        answer_BTD = torch.where(active_BT[..., None], s_BTD, answer_BTD)
        leaving_BT = active_BT & (depth_B1 <= iteration)
        asked_BT = active_BT & ~leaving_BT if checks.rule.due(iteration) else nobody_BT
        asked_BT = asked_BT | leaving_BT if answers else asked_BT
        if bool(asked_BT.any()):
            chosen = Selection.of(asked_BT)
            value = checks(body, s_BTD, before_BTD, inputs, cache, chosen)
            if checks.hidden is not None:
                new = checks.hidden
                hidden_BTD = new if chosen is None else chosen.put(hidden_BTD, new)
            below = value < checks.rule.threshold
            left = below if chosen is None else chosen.put(nobody_BT, below)
            leaving_BT = leaving_BT | (asked_BT & left)
        left_BT = torch.where(leaving_BT, iteration, left_BT)
        active_BT = active_BT & ~leaving_BT
        lent_BT = leaving_BT & (depth_B1 > iteration)
        if cache.policy == "recompute" and bool(lent_BT.any()):
            body.project(iteration + 1, s_BTD, e_BTD, inputs, cache, Selection.of(lent_BT))
        if not everyone and not bool(active_BT.any()):
            break
    cache.finished(left_BT, executed_BT)
    cache.num_checks += checks.num_readouts - (int(real_BT.sum()) if answers else 0)
    return Looped(answer_BTD, hidden_BTD if answers else None)


def loop_with_branches(
    body: Any,
    depth: int,
    way: Way,
    s_BTD: torch.Tensor,
    e_BTD: torch.Tensor,
    inputs: LayerInputs,
) -> Looped:
    """Run to a depth, branch the coda off on the way, and cut the gradient outside the windows.

    Args:
        body: The `RecurrentModel`.
        depth: r.
        way: Depths of the branches, and the windows.
        s_BTD: First state.
        e_BTD: The prelude's output.
        inputs: What the layers are given.

    Raises:
        ValueError: A branch lies beyond the depth.
    """
    iterate = _recomputed(body.iterate) if way.checkpoint_iterations else body.iterate
    wanted = set(way.output_recurrences)
    if wanted and not 1 <= min(wanted) <= max(wanted) <= depth:
        raise ValueError(f"output_recurrences {sorted(wanted)} must lie in 1..{depth}")
    window = way.backprop_depth or depth
    outputs, finished = wanted | {depth}, {}
    for iteration in range(1, depth + 1):
        starts = [output - window + 1 for output in outputs if output >= iteration]
        # Cut between windows. Where two overlap, the deeper one reaches back through both.
        if iteration > 1 and not any(start < iteration for start in starts):
            s_BTD = s_BTD.detach()
        carries = any(start <= iteration for start in starts)
        with torch.set_grad_enabled(torch.is_grad_enabled() and carries):
            s_BTD = iterate(iteration, s_BTD, e_BTD, inputs, None)
        if iteration in outputs:
            finished[iteration] = body.finish(s_BTD, inputs, None)
    branches = tuple(finished[output] for output in way.output_recurrences)
    return Looped(s_BTD, finished[depth], branches)


def _recomputed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Keep a function's inputs only, and compute what is inside again in the backward pass."""
    return partial(checkpoint, function, use_reentrant=False)
