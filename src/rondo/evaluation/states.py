"""The loop's states on a text: how they move, and what each would say if it were the last.

What a state says is read through coda, norm and head (a logit lens): at iteration i it is what
the model says at r = i, and nothing else was trained or fitted to read it.

Every number is a mean over the tokens, all alike, padding left out; but the norm is their median,
because in many models the first token's is a hundred times all others'.

Shapes: B batch, T tokens, N tokens that are no padding, D width, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from rondo.data import padded_batches
from rondo.dynamics import Loop, undisturbed
from rondo.evaluation.outcome import finite
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

Columns = dict[str, torch.Tensor]

# A step of this share of the state is little more than what bfloat16 rounds off.
SETTLED_STEP = 0.01
# Movement in the second half of the iterations, as a multiple of that in the first.
FALLS, FALLS_A_LITTLE, GROWS = 0.5, 0.9, 1.5
# Movements count as one direction from this mean cosine on (60 degrees).
ALIGNED = 0.5
# Logits that are computed at once; some five times as many numbers are held beside the states.
LOGITS_AT_ONCE = 2**24
NO_TARGET = -100


def trace_states(
    model: RecurrentForCausalLM,
    token_lists: list[list[int]],
    depth: int,
    state_seed: int = 0,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Follow the states of token lists through the iterations of a model in eval mode.

    Each iteration's coda output is held for all tokens of a batch, (depth, N, D).

    Returns:
        The `states` of a result (see results-format.md) without `text`. The loss is that of the
        tokens that have one before them, the gain the largest of the sequences at the last state;
        null stands for a number that is none.
    """
    found: list[Columns] = []
    alignments: list[torch.Tensor] = []
    gains: list[float] = []
    batches = list(padded_batches(token_lists, batch_size))
    with undisturbed(model):
        for _, ids, mask in tqdm(batches, desc="states", unit="batch", disable=None, leave=False):
            ids_BT, mask_BT = ids.to(model.device), mask.to(model.device)
            loop, real_BT = Loop.enter(model, ids_BT, mask_BT, state_seed), mask_BT.bool()
            moved, alignment_N, hidden_ND, last_BTD = _follow(loop, depth, real_BT)
            said = _read(model, hidden_ND, _next_tokens(ids_BT, mask_BT)[real_BT])
            found.append(moved | said)
            alignments.append(alignment_N)
            gains.append(loop.gain(depth + 1, last_BTD, mask_BT))
    columns = {name: torch.cat([one[name] for one in found], dim=1).double() for name in found[0]}
    means = {name: values.mean(dim=1).tolist() for name, values in columns.items()}
    means["state_norm"] = columns["state_norm"].median(dim=1).values.tolist()
    gain = max(gains) if all(map(math.isfinite, gains)) else math.nan
    alignment = float(torch.cat(alignments).mean())
    return {
        "tokens": sum(map(len, token_lists)),
        "gain": finite(gain),
        "behaviour": behaviour(means["step"], means["state_norm"], alignment, gain),
        "iterations": [
            {"iteration": number + 1}
            | {name: finite(values[number]) for name, values in means.items()}
            for number in range(depth)
        ],
    }


def behaviour(steps: Sequence[float], norms: Sequence[float], alignment: float, gain: float) -> str:
    """Say in one word what a state does, from its way through the iterations.

    The way to the first state is left out: where it starts is not the loop's doing. Of the other
    movements (step times norm) the second half is compared with the first.

    - diverges: a number is none, or movement grows 1.5-fold or more;
    - settles: the last step is 1% of the state or less, or movement halves at least, or it falls
      by a tenth at least where the gain says that disturbances die out (below 1);
    - drifts: it does neither, and the movements point one way (alignment of 0.5 or more);
    - orbits: they do not; it circles, swings, or wanders;
    - unclear: there are fewer than three iterations to judge by.

    Args:
        steps: Length of each movement, relative to the state it led to.
        norms: Norm of that state.
        alignment: Mean cosine of all pairs of movements but the first. That of successive ones
            alone would take a slow circle for a drift.
        gain: Factor by which a further iteration multiplies a small disturbance.
    """
    if not all(map(math.isfinite, (*steps, *norms, alignment, gain))):
        return "diverges"
    if len(steps) < 3:
        return "unclear"
    moves = [step * norm for step, norm in zip(steps, norms, strict=True)][1:]
    half = len(moves) // 2
    early, late = sum(moves[:half]), sum(moves[-half:])
    if steps[-1] <= SETTLED_STEP or late <= FALLS * early:
        return "settles"
    if late >= GROWS * early:
        return "diverges"
    if gain < 1 and late <= FALLS_A_LITTLE * early:
        return "settles"
    return "drifts" if alignment >= ALIGNED else "orbits"


def _follow(
    loop: Loop, depth: int, real_BT: torch.Tensor
) -> tuple[Columns, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Follow the states of the tokens named.

    Returns:
        What is said of each movement, (depth, N) each; the alignment of movements (N,); the
        coda's output at each iteration, (N, D) each; the last state (B, T, D).
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("state_norm", "step", "cosine")}
    hidden_ND = []
    states = loop.states(depth)
    last_BTD = next(states)
    before_ND = last_BTD[real_BT].float()
    directions_ND = torch.zeros_like(before_ND)
    for number, last_BTD in enumerate(states):
        s_ND = last_BTD[real_BT].float()
        norm_N = torch.linalg.vector_norm(s_ND, dim=-1)
        step_N = torch.linalg.vector_norm(s_ND - before_ND, dim=-1) / norm_N
        found["state_norm"].append(norm_N / s_ND.shape[-1] ** 0.5)
        found["step"].append(step_N)
        found["cosine"].append(nn.functional.cosine_similarity(s_ND, before_ND, dim=-1))
        if number:
            directions_ND += nn.functional.normalize(s_ND - before_ND, dim=-1)
        hidden_ND.append(loop.finish(last_BTD)[real_BT])
        before_ND = s_ND
    # The square of a sum of k unit vectors is k and twice the cosines of all their pairs.
    k = max(2, depth - 1)
    alignment_N = (directions_ND.square().sum(dim=-1) - k) / (k * (k - 1))
    columns = {name: torch.stack(rows) for name, rows in found.items()}
    return columns, alignment_N, hidden_ND, last_BTD


def _read(
    model: RecurrentForCausalLM, hidden_ND: list[torch.Tensor], targets_N: torch.Tensor
) -> Columns:
    """Return what each iteration says, (depth, N) each; the loss where there is a target only."""
    pieces: list[Columns] = []
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, len(targets_N), size):
        some = slice(start, start + size)
        last_NV = _log_probabilities(model, hidden_ND[-1][some])
        rows = [
            _compare(_log_probabilities(model, one_ND[some]), last_NV, targets_N[some])
            for one_ND in hidden_ND
        ]
        pieces.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    found = {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]}
    found["loss"] = found["loss"][:, targets_N != NO_TARGET]
    return found


def _log_probabilities(model: RecurrentForCausalLM, hidden_ND: torch.Tensor) -> torch.Tensor:
    return model.logits(hidden_ND).float().log_softmax(dim=-1)


def _compare(own_NV: torch.Tensor, last_NV: torch.Tensor, targets_N: torch.Tensor) -> Columns:
    """Compare log-probabilities with those of the last iteration, token by token, (N,) each."""
    probabilities_NV = last_NV.exp()
    return {
        "loss": nn.functional.nll_loss(own_NV, targets_N, ignore_index=NO_TARGET, reduction="none"),
        # Rounding may leave it a little below 0, which no divergence is.
        "kl_to_last": (probabilities_NV * (last_NV - own_NV)).sum(dim=-1).clamp_min(0),
        "agreement": (own_NV.argmax(dim=-1) == last_NV.argmax(dim=-1)).float(),
        "entropy": -(own_NV.exp() * own_NV).sum(dim=-1),
    }


def _next_tokens(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the token that follows each one, (B, T); NO_TARGET where none does."""
    targets_BT = torch.full_like(ids_BT, NO_TARGET)
    targets_BT[:, :-1] = torch.where(mask_BT[:, 1:].bool(), ids_BT[:, 1:], NO_TARGET)
    return targets_BT
