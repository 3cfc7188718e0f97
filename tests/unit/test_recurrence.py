"""Depth sampling and curricula against the paper's streams and against what they promise."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rondo.training.recurrence import (
    Depth,
    Distribution,
    backprop_window,
    sample_depth,
    scheduled_mean,
    shallower_depth,
    step_generator,
)

PAPER: dict[str, Any] = json.loads((Path(__file__).parent / "data/paper_depth.json").read_text())
NUM_DRAWS = 10_000
DISTRIBUTIONS = st.sampled_from(get_args(Distribution))
SCHEDULES = st.sampled_from(["none", "linear", "1-sqrt"])
INT64 = st.integers(-(2**63), 2**63 - 1)


def reference_generator(data_step: int) -> torch.Generator:
    """The paper's stream for one micro-batch, the same in every run whatever its seed.

    Args:
        data_step: The reference's count of micro-batches, which it starts at 1, or at 2 when it
            reads parquet files.
    """
    return torch.Generator().manual_seed((514229 + data_step) % (2**31 - 1))


def poisson_lognormal(
    mean: int, window: int, generator: torch.Generator, cap: int | None = None
) -> Depth:
    return sample_depth("poisson-lognormal", mean, 1, cap, window, generator)


def draws(distribution: Distribution, mean: int, minimum: int = 1) -> torch.Tensor:
    generator = step_generator(0, 0, 0)
    window = backprop_window(mean)
    depths = [
        sample_depth(distribution, mean, minimum, None, window, generator) for _ in range(NUM_DRAWS)
    ]
    return torch.tensor(depths, dtype=torch.float64)


def assert_mean_within_five_standard_errors(sample: torch.Tensor, expected: float) -> None:
    standard_error = float(sample.std()) / math.sqrt(len(sample))
    assert float(sample.mean()) == pytest.approx(expected, abs=5 * standard_error)


@pytest.mark.parametrize("run", PAPER["draws"], ids=lambda run: f"mean{run['mean']}")
def test_depths_are_the_reference_runs(run: dict[str, Any]) -> None:
    drawn = []
    for data_step in range(1, 33):
        depth = poisson_lognormal(run["mean"], run["window"], reference_generator(data_step))
        drawn.append([depth.num_recurrences - depth.backprop_depth, depth.backprop_depth])
    assert drawn == run["without_and_with_gradient"]


@pytest.mark.parametrize("mean", [int(mean) for mean in PAPER["moments"]])
def test_depths_have_the_papers_moments(mean: int) -> None:
    num_recurrences, backprop_depth = draws("poisson-lognormal", mean).T
    moments, split = PAPER["moments"][str(mean)], PAPER["expected_split"][str(mean)]
    assert_mean_within_five_standard_errors(num_recurrences, moments["mean_r"])
    assert float(num_recurrences.var()) == pytest.approx(moments["var_r"], rel=0.15)
    # The recorded split is itself an estimate, rounded to three digits.
    assert float(backprop_depth.mean()) == pytest.approx(split["E_k"], abs=0.05)


@pytest.mark.parametrize("mean", [1, 2, 5, 32])
@pytest.mark.parametrize("distribution", ["poisson-lognormal-honest", "uniform", "fixed"])
def test_depths_average_the_mean_they_are_asked_for(distribution: Any, mean: int) -> None:
    assert_mean_within_five_standard_errors(draws(distribution, mean)[:, 0], mean)


def test_uniform_depths_reach_both_ends_and_no_further() -> None:
    assert set(draws("uniform", mean=5, minimum=3)[:, 0].tolist()) == {3, 4, 5, 6, 7}


def test_uniform_depths_stay_at_the_minimum_while_the_mean_is_below_it() -> None:
    assert set(draws("uniform", mean=1, minimum=3)[:, 0].tolist()) == {3}


def test_window_above_the_mean_does_not_raise_the_mean() -> None:
    wide, narrow = (poisson_lognormal(4, window, reference_generator(1)) for window in (8, 4))
    assert wide.num_recurrences == narrow.num_recurrences


@given(seed=INT64, mean=st.integers(1, 64), window=st.integers(1, 8), cap=st.integers(1, 64))
def test_cap_clips_the_uncapped_draw(seed: int, mean: int, window: int, cap: int) -> None:
    free = poisson_lognormal(mean, window, step_generator(seed, 0, 0))
    capped = poisson_lognormal(mean, window, step_generator(seed, 0, 0), cap)
    assert capped.num_recurrences == min(free.num_recurrences, cap)
    assert capped.backprop_depth == min(window, capped.num_recurrences)


@given(
    distribution=DISTRIBUTIONS,
    seed=INT64,
    mean=st.integers(1, 64),
    minimum=st.integers(1, 8),
    extra=st.none() | st.integers(0, 64),
    window=st.integers(1, 12),
)
def test_depth_keeps_its_bounds(
    distribution: Distribution, seed: int, mean: int, minimum: int, extra: int | None, window: int
) -> None:
    cap = None if extra is None else minimum + extra
    generator = step_generator(seed, 0, 0)
    depth = sample_depth(distribution, mean, minimum, cap, window, generator)
    assert minimum <= depth.num_recurrences
    assert cap is None or depth.num_recurrences <= cap
    assert depth.backprop_depth == min(window, depth.num_recurrences)


@given(distribution=DISTRIBUTIONS, seed=INT64, step=INT64, micro_step=INT64)
def test_equal_inputs_give_equal_depths_whatever_came_before(
    distribution: Distribution, seed: int, step: int, micro_step: int
) -> None:
    def draw() -> tuple[Depth, int | None]:
        generator = step_generator(seed, step, micro_step)
        depth = sample_depth(distribution, 16, 1, None, 8, generator)
        return depth, shallower_depth(depth.num_recurrences, generator)

    first = draw()
    torch.rand(1)
    global_state = torch.get_rng_state()
    assert draw() == first
    assert torch.equal(torch.get_rng_state(), global_state)


def test_neighbouring_seeds_steps_and_micro_steps_share_no_stream() -> None:
    firsts = [
        float(torch.rand((), generator=step_generator(seed, step, micro_step)))
        for seed in range(8)
        for step in range(8)
        for micro_step in range(8)
    ]
    assert len(set(firsts)) == len(firsts)


@given(mean=st.integers(1, 100), window=st.integers(1, 20))
def test_window_exceeds_neither_its_limit_nor_the_mean(mean: int, window: int) -> None:
    assert backprop_window(mean, window) == min(mean, window)
    assert backprop_window(mean) == min(mean, 8)


@pytest.mark.parametrize(
    "run", PAPER["first_steps"], ids=lambda run: f"{run['schedule']}-{run['mean']}"
)
def test_mean_first_rises_on_the_reference_runs_steps(run: dict[str, Any]) -> None:
    total_steps, mean = run["total_steps"], run["mean"]
    first_steps: dict[int, int] = {}
    for step in range(total_steps):
        m = scheduled_mean(step, total_steps, mean, run["schedule"], run["fraction"])
        first_steps.setdefault(m, step)
    assert first_steps == dict(zip(range(1, mean + 1), run["first_steps"], strict=True))


@pytest.mark.parametrize(
    "run", PAPER["average_mean"], ids=lambda run: f"{run['schedule']}-{run['fraction']}"
)
def test_mean_averages_what_the_reference_runs_averaged(run: dict[str, Any]) -> None:
    steps = run["total_steps"]
    total = sum(
        scheduled_mean(step, steps, run["mean"], run["schedule"], run["fraction"])
        for step in range(steps)
    )
    assert total / steps == pytest.approx(run["average"], abs=0.005)


@pytest.mark.parametrize("schedule", PAPER["ramp_sums"])
def test_ramp_sums_to_the_reference_ramp_and_its_floor(schedule: Any) -> None:
    ramp = [scheduled_mean(step, 6125, 32, schedule, 0.5) for step in range(3063)]
    assert sum(ramp) == PAPER["ramp_sums"][schedule] + 1


@given(
    schedule=SCHEDULES,
    total_steps=st.integers(1, 300),
    mean=st.integers(1, 64),
    fraction=st.floats(0, 1),
    data=st.data(),
)
def test_mean_climbs_from_floor_to_mean_and_stays(
    schedule: Any, total_steps: int, mean: int, fraction: float, data: st.DataObject
) -> None:
    floor = data.draw(st.integers(1, mean))
    ramp_steps = 0 if schedule == "none" else math.ceil(fraction * total_steps)
    means = [
        scheduled_mean(step, total_steps, mean, schedule, fraction, floor)
        for step in range(2 * total_steps + 1)
    ]
    assert means[0] == (floor if ramp_steps else mean)
    assert all(before <= after for before, after in pairwise(means))
    assert all(floor <= m <= mean for m in means)
    assert set(means[ramp_steps:]) == {mean}


@given(step=st.integers(0, 999), mean=st.integers(1, 64))
def test_integer_ramp_is_the_formulas_ceiling(step: int, mean: int) -> None:
    progress = step / 1000
    for schedule, exact in (
        ("linear", mean * progress),
        ("1-sqrt", mean * (1 - math.sqrt(1 - progress))),
    ):
        ramped = scheduled_mean(step, 1000, mean, schedule, 1.0)
        # Within float error of a whole number the formula in floats may land on either side.
        assert max(1, math.ceil(exact - 1e-9)) <= ramped <= max(1, math.ceil(exact + 1e-9))


def test_shallower_depth_reaches_every_earlier_iteration_and_no_other() -> None:
    generator = step_generator(0, 0, 0)
    assert shallower_depth(1, generator) is None
    assert {shallower_depth(2, generator) for _ in range(10)} == {1}
    assert {shallower_depth(5, generator) for _ in range(200)} == {1, 2, 3, 4}
