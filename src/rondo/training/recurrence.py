"""How deep each step runs and how far its gradient reaches.

Everything here is a pure function of explicit inputs: ranks agree on depth without talking, and a
resumed run repeats what it would have done. Nothing reads the rank, the clock or torch's global
random state.

Depth is sampled around a mean which a curriculum may raise during training. Only the last
iterations carry gradient; the earlier ones run without it.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple, assert_never

import torch

from rondo.config import Distribution, Schedule

_RATE_SIGMA = 0.5


class Depth(NamedTuple):
    """How often the core runs, and how many of those iterations, the last ones, carry gradient."""

    num_recurrences: int
    backprop_depth: int


def scheduled_mean(
    step: int, total_steps: int, mean: int, schedule: Schedule, fraction: float, floor: int = 1
) -> int:
    """Mean recurrence after `step` completed optimizer steps.

    The ramp is evaluated in integers, so that no platform's rounding can move a change of depth to
    another step.

    Args:
        step: Completed optimizer steps; beyond `total_steps` the mean stays where it arrived.
        total_steps: Optimizer steps the curriculum is laid out for.
        mean: Mean recurrence at the end of the ramp.
        schedule: Shape of the ramp; "1-sqrt" starts slowly and finishes fast.
        fraction: Part of `total_steps` the ramp takes.
        floor: Mean recurrence the ramp starts from.
    """
    assert 1 <= floor <= mean, (floor, mean)
    ramp_steps = math.ceil(fraction * total_steps)
    if step >= ramp_steps:
        return mean
    match schedule:
        case "none":
            return mean
        case "linear":
            ramped = -(-mean * step // ramp_steps)
        case "1-sqrt":
            # ceil(mean * (1 - sqrt(x))) = mean - floor(sqrt(mean^2 * x)), x the part still to go.
            ramped = mean - math.isqrt(mean**2 * (ramp_steps - step) // ramp_steps)
        case unknown:
            assert_never(unknown)
    return max(floor, ramped)


def backprop_window(mean: int, window: int = 8) -> int:
    """Most iterations that may carry gradient while the scheduled mean is `mean`."""
    return min(window, mean)


def scheduled_window(step: int, total_steps: int, window: int, fraction: float) -> int:
    """Most iterations with gradient when their number grows linearly from one.

    Args:
        step: Completed optimizer steps.
        total_steps: Optimizer steps the curriculum is laid out for.
        window: Its end.
        fraction: Part of `total_steps` it takes.
    """
    ramp_steps = math.ceil(fraction * total_steps)
    # One step ahead, as the reference does, so that the first step has gradient.
    return min(window, -(-window * (step + 1) // ramp_steps))


def scheduled_seq_len(
    step: int, total_steps: int, seq_len: int, start: int, fraction: float
) -> int:
    """Tokens per sequence when `seq_len` is halved first, as often as `start` allows.

    Each length gets an equal part of the ramp.

    Args:
        step: Completed optimizer steps.
        total_steps: Optimizer steps the schedule is laid out for.
        seq_len: Length after the ramp.
        start: Shortest length allowed.
        fraction: Part of `total_steps` the ramp takes.
    """
    halvings = 0
    while seq_len % 2 ** (halvings + 1) == 0 and seq_len // 2 ** (halvings + 1) >= start:
        halvings += 1
    ramp_steps = math.ceil(fraction * total_steps)
    done = halvings if step >= ramp_steps else halvings * step // ramp_steps
    return seq_len // 2 ** (halvings - done)


def row_seeds(seed: int, rows: Sequence[int]) -> torch.Tensor:
    """Seeds of the initial states of rows of the stream, (B,).

    A row meets the same noise whichever process takes it.
    """
    return torch.tensor(rows, dtype=torch.long) + seed * 1_000_000_007


def step_generator(seed: int, step: int, draw: int) -> torch.Generator:
    """Our stream for one draw of a step: the same on every rank, another for every run's seed."""
    # Hashed because a sum would make neighbours overlap: seed 1 would replay seed 0 one step
    # later. Python's own hash() may change between versions. The CPU generator reads 32 bits.
    key = struct.pack("<3q", seed, step, draw)
    digest = hashlib.blake2b(key, digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def sample_depth(
    distribution: Distribution,
    mean: int,
    minimum: int,
    cap: int | None,
    window: int,
    generator: torch.Generator,
) -> Depth:
    """Draws one micro-batch's depth.

    - "poisson-lognormal": the paper's, one plus a Poisson count whose rate is log-normal. Its mean
      is `mean + 1`, and its tail is long: at mean 32 one draw in a hundred exceeds 93. Where
      `window` exceeds `mean` the reference raises the mean to the window; here it is kept.
    - "poisson-lognormal-honest": the same with a rate of mean `mean - 1`, so its mean is `mean`.
    - "uniform": whole numbers from `minimum` to its mirror image about `mean`.
    - "fixed": always `mean`.

    Args:
        distribution: Which of the above.
        mean: Mean recurrence the curriculum asks for now.
        minimum: Shallowest recurrence allowed; shallower draws are raised to it.
        cap: Deepest recurrence allowed, or None for none; deeper draws are lowered to it.
        window: Most iterations that carry gradient.
        generator: CPU generator to draw from.
    """
    match distribution:
        case "poisson-lognormal":
            drawn = 1 + _poisson_lognormal_count(mean, generator)
        case "poisson-lognormal-honest":
            drawn = 1 + _poisson_lognormal_count(mean - 1, generator)
        case "uniform":
            # A curriculum may still be below the minimum; then only the minimum is left.
            deepest = max(minimum, 2 * mean - minimum)
            drawn = int(torch.randint(minimum, deepest + 1, (), generator=generator))
        case "fixed":
            drawn = mean
        case unknown:
            assert_never(unknown)
    return _clipped(drawn, minimum, cap, window)


def shallower_depth(num_recurrences: int, generator: torch.Generator) -> int | None:
    """A uniformly drawn earlier iteration to supervise as well; None where there is none."""
    if num_recurrences == 1:
        return None
    return int(torch.randint(1, num_recurrences, (), generator=generator))


def _poisson_lognormal_count(mean: int, generator: torch.Generator) -> int:
    """A Poisson count whose rate is log-normal with mean `mean`."""
    if mean == 0:
        return 0
    # A log-normal has mean exp(mu + sigma^2 / 2). Another dtype would draw another stream.
    mu = math.log(mean) - _RATE_SIGMA**2 / 2
    rate = torch.empty(1, dtype=torch.float32).log_normal_(mu, _RATE_SIGMA, generator=generator)
    return int(torch.poisson(rate, generator=generator))


def _clipped(num_recurrences: int, minimum: int, cap: int | None, window: int) -> Depth:
    """The depth brought between `minimum` and `cap`, with gradient for at most `window` of it."""
    if cap is not None:
        num_recurrences = min(num_recurrences, cap)
    num_recurrences = max(num_recurrences, minimum)
    return Depth(num_recurrences, min(window, num_recurrences))
