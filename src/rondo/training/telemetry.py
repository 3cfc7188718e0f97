"""Is the loop healthy? Norms of its state, and how far an iteration expands a disturbance.

Shapes: B batch, T tokens, D width.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch

from rondo.modeling.inputs_recurrent import LayerInputs
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

POWER_STEPS = 16
MAX_GROWTH = 10.0
# bfloat16 rounds off one part in this many.
BFLOAT16_PARTS = 256.0
TINY = 1e-30


def loop_health(
    model: RecurrentForCausalLM, input_ids: torch.Tensor, depth: int, state_seed: int = 0
) -> dict[str, float]:
    """Return norms of the loop's state at a depth r, and the gain of one more iteration.

    loop/state_norm is the root mean square of the last state, loop/state_growth the mean over
    tokens of ||s_r|| / ||s_1||, loop/residual that of ||s_r - s_{r-1}|| / ||s_r||. The means count
    tokens alike, because in many models the first one's norm is a hundred times all others'.
    loop/gain is a spectral radius, see `loop_gain`, which says what it costs beside the prelude
    and the r iterations: a few rows are enough.

    Args:
        model: The model, in eval mode: dropout would be taken for a disturbance.
        input_ids: Token ids, (B, T).
        depth: Iterations r.
        state_seed: Seed of a `normal` initial state.
    """
    body = model.model
    # In the precision of the weights, unless they differ (adapters) and need autocast to meet; and
    # eagerly: compiled layers would be compiled once more.
    alike = len({parameter.dtype for parameter in model.parameters()}) == 1
    with (
        torch.no_grad(),
        torch.autocast(input_ids.device.type, enabled=False) if alike else nullcontext(),
        torch.compiler.set_stance("force_eager"),
    ):
        embeds = body.embed(input_ids)
        inputs = LayerInputs.prepare(body, embeds, None, None, None, {})
        e_BTD = body.run(slice(0, body.config.num_prelude_layers), embeds, inputs, None)
        before = body.initial_state(e_BTD, inputs.position_ids, state_seed)
        s_BTD = first = body.iterate(1, before, e_BTD, inputs, None)
        for iteration in range(2, depth + 1):
            before, s_BTD = s_BTD, body.iterate(iteration, s_BTD, e_BTD, inputs, None)
        norm_BT = _norm(s_BTD)
        gain = loop_gain(lambda s: body.iterate(depth + 1, s, e_BTD, inputs, None), s_BTD)
        return {
            "loop/state_norm": float(s_BTD.float().square().mean().sqrt()),
            "loop/state_growth": float((norm_BT / _norm(first)).mean()),
            "loop/residual": float((_norm(s_BTD - before) / norm_BT).mean()),
            "loop/gain": gain,
        }


def loop_gain(iterate: Callable[[torch.Tensor], torch.Tensor], s_BTD: torch.Tensor) -> float:
    """Estimate the spectral radius of an iteration's Jacobian at a state, the largest of the rows.

    It is the factor by which each further iteration multiplies a small disturbance of the state
    in the long run: below 1 the loop settles, above 1 it does not. A single iteration can expand
    by more, up to the spectral norm. Power iteration by finite differences from a fixed random
    start; the estimate is the mean growth in the second half of POWER_STEPS, good to two digits
    on SmolLM2, to one in bfloat16. It costs POWER_STEPS + 1 iterations.

    Args:
        iterate: One iteration; each row depends on its own row alone.
        s_BTD: The state.
    """
    # Disturbances are measured in each token's own norm, which leaves the radius as it is, and a
    # row's is that of its most disturbed token: no single step would suit the large first token
    # and all others, nor one token and a thousand.
    scale_BT1 = _norm(s_BTD)[..., None]
    step = torch.finfo(s_BTD.dtype).eps ** 0.5
    next_BTD = iterate(s_BTD)
    generator = torch.Generator().manual_seed(0)
    moved_BTD = torch.randn(s_BTD.shape, generator=generator).to(s_BTD.device)
    growth_B = torch.zeros(len(s_BTD), device=s_BTD.device)
    for number in range(POWER_STEPS):
        # An iteration that forgets the state moves nothing, and has a gain of 0.
        size_B = _norm(moved_BTD).amax(1).clamp_min(TINY)
        near_BTD = (s_BTD + step * scale_BT1 * moved_BTD / size_B[:, None, None]).to(s_BTD.dtype)
        moved_BTD = (iterate(near_BTD) - next_BTD) / scale_BT1
        if number >= POWER_STEPS // 2:
            given_B = _norm((near_BTD - s_BTD) / scale_BT1).amax(1).clamp_min(TINY)
            growth_B += (_norm(moved_BTD).amax(1) / given_B).log()
    return float((growth_B / (POWER_STEPS - POWER_STEPS // 2)).exp().max())


def _norm(x_BTD: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x_BTD, dim=-1, dtype=torch.float32)


def alarms(health: dict[str, float], depth: int) -> list[str]:
    """Return a sentence for each thing that is wrong with a loop, with what to do about it."""
    broken = [name for name, value in health.items() if not math.isfinite(value)]
    if broken:
        return [
            f"{', '.join(broken)} not finite at r = {depth}: the state overflows; go back to the "
            "last good checkpoint and lower optimizer.lr"
        ]
    found = []
    growth, gain = health["loop/state_growth"], health["loop/gain"]
    if growth > MAX_GROWTH:
        found.append(
            f"the state grows {growth:.3g}-fold from r = 1 to {depth}: lower optimizer.lr, or "
            "convert with --injection mix and a small --mixing"
        )
    # Over the whole loop the rounding of bfloat16 then grows to the size of the state itself.
    if gain > (bound := BFLOAT16_PARTS ** (1 / depth)):
        found.append(
            f"an iteration expands disturbances {gain:.3g}-fold (more than {bound:.3g} turns "
            f"rounding into noise by r = {depth}): lower optimizer.lr, train at fewer recurrences, "
            "or convert with a smaller --mixing"
        )
    return found
