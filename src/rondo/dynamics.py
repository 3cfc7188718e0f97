"""The loop of a recurrent model as a dynamical system: its states, their norms, its gain.

Training watches the loop by it and evaluation draws it; nothing here changes the model.

Shapes: B batch, T tokens, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from rondo.modeling.body_recurrent import RecurrentModel
from rondo.modeling.inputs_recurrent import LayerInputs
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

POWER_STEPS = 16
TINY = 1e-30


@contextmanager
def undisturbed(model: RecurrentForCausalLM) -> Iterator[None]:
    """Run a model as it is: without gradient, eagerly, in the precision of its weights.

    Weights that differ in precision (adapters) need the autocast of the caller to meet. Compiled
    layers would be compiled once more.
    """
    alike = len({parameter.dtype for parameter in model.parameters()}) == 1
    with (
        torch.no_grad(),
        torch.autocast(model.device.type, enabled=False) if alike else nullcontext(),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


@dataclass(frozen=True)
class Loop:
    """The loop of a model over one batch, which has passed the prelude."""

    body: RecurrentModel
    inputs: LayerInputs
    e_BTD: torch.Tensor
    """The prelude's output."""
    start_BTD: torch.Tensor
    """The state before the first iteration."""

    @classmethod
    def enter(
        cls,
        model: RecurrentForCausalLM,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        state_seed: int = 0,
    ) -> "Loop":
        """Run the prelude over token ids (B, T), of which the mask (B, T) says what is padding."""
        body = model.model
        embeds = body.embed(input_ids)
        inputs = LayerInputs.prepare(body, embeds, attention_mask, None, None, {})
        e_BTD = body.run(slice(0, body.config.num_prelude_layers), embeds, inputs, None)
        return cls(body, inputs, e_BTD, body.initial_state(e_BTD, inputs.position_ids, state_seed))

    def iterate(self, iteration: int, s_BTD: torch.Tensor) -> torch.Tensor:
        """Run one iteration (1-based)."""
        return self.body.iterate(iteration, s_BTD, self.e_BTD, self.inputs, None)

    def states(self, depth: int) -> Iterator[torch.Tensor]:
        """Yield the state (B, T, D) before the loop, and after each iteration up to a depth."""
        s_BTD = self.start_BTD
        yield s_BTD
        for iteration in range(1, depth + 1):
            s_BTD = self.iterate(iteration, s_BTD)
            yield s_BTD

    def finish(self, s_BTD: torch.Tensor) -> torch.Tensor:
        """Run the coda and the final norm on a state, as a branch of the trajectory."""
        return self.body.finish(s_BTD, self.inputs, None)

    def gain(
        self, iteration: int, s_BTD: torch.Tensor, mask_BT: torch.Tensor | None = None
    ) -> float:
        """Return the gain of an iteration (1-based) at a state, see `loop_gain`."""
        return loop_gain(partial(self.iterate, iteration), s_BTD, mask_BT)


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
    with undisturbed(model):
        loop = Loop.enter(model, input_ids, state_seed=state_seed)
        states = loop.states(depth)
        before, s_BTD = next(states), next(states)
        first = s_BTD
        for state in states:
            before, s_BTD = s_BTD, state
        norm_BT = _norm(s_BTD)
        return {
            "loop/state_norm": float(s_BTD.float().square().mean().sqrt()),
            "loop/state_growth": float((norm_BT / _norm(first)).mean()),
            "loop/residual": float((_norm(s_BTD - before) / norm_BT).mean()),
            "loop/gain": loop.gain(depth + 1, s_BTD),
        }


def loop_gain(
    iterate: Callable[[torch.Tensor], torch.Tensor],
    s_BTD: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
) -> float:
    """Estimate the spectral radius of an iteration's Jacobian at a state, the largest of the rows.

    It is the factor by which each further iteration multiplies a small disturbance of the state
    in the long run: below 1 the loop settles, above 1 it does not. A single iteration can expand
    by more, up to the spectral norm. Power iteration by finite differences from a fixed random
    start; the estimate is the mean growth in the second half of POWER_STEPS, good to two digits
    on SmolLM2, to one in bfloat16. It costs POWER_STEPS + 1 iterations.

    Args:
        iterate: One iteration; each row depends on its own row alone.
        s_BTD: The state.
        mask_BT: 1 for tokens, 0 for padding, which no token may attend to.
    """
    # Disturbances are measured in each token's own norm, which leaves the radius as it is, and a
    # row's is that of its most disturbed token: no single step would suit the large first token
    # and all others, nor one token and a thousand.
    scale_BT1 = _norm(s_BTD)[..., None]
    step = torch.finfo(s_BTD.dtype).eps ** 0.5
    next_BTD = iterate(s_BTD)
    generator = torch.Generator().manual_seed(0)
    moved_BTD = torch.randn(s_BTD.shape, generator=generator).to(s_BTD.device)
    kept_BT1 = 1.0 if mask_BT is None else mask_BT[..., None]
    growth_B = torch.zeros(len(s_BTD), device=s_BTD.device)
    for number in range(POWER_STEPS):
        moved_BTD = moved_BTD * kept_BT1
        # An iteration that forgets the state moves nothing, and has a gain of 0.
        size_B = _norm(moved_BTD).amax(1).clamp_min(TINY)
        near_BTD = (s_BTD + step * scale_BT1 * moved_BTD / size_B[:, None, None]).to(s_BTD.dtype)
        moved_BTD = (iterate(near_BTD) - next_BTD) / scale_BT1
        if number >= POWER_STEPS // 2:
            given_B = _norm((near_BTD - s_BTD) / scale_BT1).amax(1).clamp_min(TINY)
            growth_B += (_norm(moved_BTD * kept_BT1).amax(1) / given_B).log()
    return float((growth_B / (POWER_STEPS - POWER_STEPS // 2)).exp().max())


def _norm(x_BTD: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x_BTD, dim=-1, dtype=torch.float32)
