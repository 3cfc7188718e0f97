import math
from itertools import pairwise

import numpy as np
import pytest

from rondo.config.calibrate import CalibrateConfig
from rondo.errors import UserError
from rondo.evaluation.calibrate import halves
from rondo.evaluation.comparisons import Array, Difference
from rondo.evaluation.exits import (
    Measure,
    candidates,
    highest_that_holds,
    idealised,
    largest,
    num_checks,
    pays,
    transfers,
)
from rondo.evaluation.policies import blind_mixture
from rondo.modeling.exits_recurrent import ExitRule

DEPTH, TOKENS, DOCUMENTS = 6, 400, 20


def text(seed: int = 0) -> tuple[Array, Array, np.ndarray]:
    """Losses that fall with depth, a criterion that falls too, and whose tokens they are."""
    rng = np.random.default_rng(seed)
    depth = np.arange(1, DEPTH + 1)[:, None]
    hard = rng.gamma(1.0, 1.0, TOKENS)
    losses = 1 + hard / depth + rng.normal(0, 0.05, (DEPTH, TOKENS))
    values = hard / depth * rng.lognormal(0, 0.3, (DEPTH, TOKENS))
    values[-1] = math.inf
    return losses, values, rng.integers(DOCUMENTS, size=TOKENS)


def left_one_by_one(values: Array, threshold: float) -> list[int]:
    """Index of the iteration at which each token leaves, by the rule's own words."""
    found = []
    for token in range(values.shape[1]):
        below = [i for i in range(len(values)) if values[i, token] < threshold]
        found.append(below[0] if below else len(values) - 1)
    return found


def searched(seed: int = 0) -> tuple[Array, Array, Measure]:
    losses, values, documents = text(seed)
    thresholds = candidates(values, "kl")
    sums = idealised(losses, values, thresholds, documents, DOCUMENTS)
    counts = np.bincount(documents, minlength=DOCUMENTS).astype(float)
    full = np.bincount(documents, losses[-1], minlength=DOCUMENTS)
    return thresholds, sums, Measure(full, counts, relative=True)


def test_each_candidate_lets_go_a_token_that_the_one_before_keeps() -> None:
    _, values, _ = text()
    values = values[:, :40]
    left = [np.array(left_one_by_one(values, one)) for one in (0.0, *candidates(values, "kl"))]
    for before, after in pairwise(left):
        assert (after <= before).all()
        assert (after < before).any()
    assert left[0].min() == DEPTH - 1
    assert left[-1].max() == 0


def test_candidates_are_above_zero_even_where_nothing_changes_any_more() -> None:
    values = np.array([[0.0, 0.5], [math.inf, math.inf]])
    found = candidates(values, "kl")
    assert found[0] > 0
    assert left_one_by_one(values, found[0]) == [0, 1]
    assert len(candidates(np.full((3, 4), math.inf), "kl")) == 0


def test_a_stable_best_token_is_counted_in_checks() -> None:
    agreed = np.array([[0, 0], [1, 0], [2, 1], [3, 0]])
    assert candidates(1 / (1 + agreed), "argmax_stable").tolist() == [1 / 3, 1 / 2, 1]
    assert len(candidates(np.ones((3, 4)), "argmax_stable")) == 0


def test_idealised_harm_is_that_of_tokens_taken_one_by_one() -> None:
    losses, values, documents = text()
    thresholds = np.array([0.05, 0.3, 2.0])
    sums = idealised(losses, values, thresholds, documents, DOCUMENTS)
    for row, threshold in zip(sums, thresholds, strict=True):
        left = left_one_by_one(values, threshold)
        expected = np.zeros(DOCUMENTS)
        for token, index in enumerate(left):
            expected[documents[token]] += losses[index, token]
        np.testing.assert_allclose(row, expected)


def test_a_larger_tolerance_never_gives_a_smaller_threshold() -> None:
    for seed in range(10):
        thresholds, sums, measure = searched(seed)
        increase = measure.increase(sums)

        def executed(level: int, increase: Array = increase) -> float:
            return float(np.maximum.accumulate(increase)[level] + 0.002)

        paper, found = [], []
        for tolerance in (1e-4, 1e-3, 0.003, 0.005, 0.01, 0.05, 0.3, 0.9):
            paper.append(largest(increase, tolerance))
            found.append(highest_that_holds(increase, tolerance, executed))
        assert paper == sorted(paper)
        assert found == sorted(found)
        assert len(set(found)) > 3
        assert thresholds[paper[-1]] == thresholds[-1]


@pytest.mark.parametrize(("wild", "most"), [(False, 8), (True, 16)])
def test_what_holds_is_found_in_a_few_executions(wild: bool, most: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        paper = np.cumsum(rng.exponential(1e-4, 256))
        other = np.cumsum(rng.exponential(1e-4, 256)) * rng.uniform(1, 3)
        actual = other if wild else 1.1 * paper + 5e-4
        asked: list[int] = []

        def executed(level: int, asked: list[int] = asked, actual: Array = actual) -> float:
            asked.append(level)
            return float(actual[level])

        found = highest_that_holds(paper, 0.01, executed)
        # It may not rise above what holds on paper.
        assert found == min(largest(actual, 0.01), largest(paper, 0.01))
        assert len(asked) == len(set(asked)) <= most


def test_no_threshold_is_told_from_the_lowest() -> None:
    rising = np.linspace(0.02, 0.2, 30)
    assert highest_that_holds(rising, 0.01, lambda level: 0.0) == -1
    assert highest_that_holds(rising, 0.03, lambda level: 1.0) == -1
    assert highest_that_holds(rising, 0.02, lambda level: 0.0) == 0


def test_increase_is_relative_to_the_loss_or_a_share_of_tokens() -> None:
    full, weights = np.full(12, 4.0), np.full(12, 2.0)
    assert Measure(full, weights, True).change(full * 1.01).value == pytest.approx(0.01)
    share = Measure(0 * full, weights, False).change(np.full(12, 0.5))
    assert (share.low, share.value, share.high) == pytest.approx((0.25, 0.25, 0.25))


def test_interval_of_the_threshold_lies_around_it_and_follows_what_execution_adds() -> None:
    thresholds, sums, measure = searched()
    best = thresholds[largest(measure.increase(sums), 0.05)]
    around = measure.thresholds_drawn(thresholds, sums, 0.05)
    assert around is not None
    assert around[0] <= best <= around[1]
    assert around[0] < around[1]
    below = measure.thresholds_drawn(thresholds, sums, 0.05, shift=0.03)
    assert below is not None
    assert below[1] < around[1]
    # Where execution adds more than is tolerated nothing is left.
    assert measure.thresholds_drawn(thresholds, sums, 0.05, shift=9) == (0, 0)
    few = Measure(measure.full[:9], measure.weights[:9], True)
    assert few.thresholds_drawn(thresholds, sums[:, :9], 0.05) is None


@pytest.mark.parametrize(("first", "every"), [(1, 1), (2, 1), (1, 2), (3, 2), (5, 4)])
def test_checks_are_counted_as_the_rule_has_them(first: int, every: int) -> None:
    rule = ExitRule("kl", 1.0, first, every)
    left = np.arange(1, DEPTH + 1)
    expected = [sum(rule.due(i) for i in range(1, min(at, DEPTH - 1) + 1)) for at in left]
    assert num_checks(left, DEPTH, first, every).tolist() == expected


def test_blind_mixture_of_losses_weighs_documents_by_their_tokens() -> None:
    weights = np.array([10.0, 30.0] * 10)
    better = -np.outer([3.0, 1.0], weights)
    spent = 2.0 * weights
    items, score = blind_mixture(better, np.array([1.0, 5.0]), spent, weights)
    # A quarter of the way in cost is a quarter of the way in loss.
    assert score == pytest.approx(-2.5)
    np.testing.assert_allclose(items, -2.5 * weights)


def test_blind_mixture_of_a_policy_that_never_loops_is_the_first_depth() -> None:
    weights = np.ones(10)
    _, score = blind_mixture(
        -np.outer([3.0, 1.0], weights), np.array([1.0, 5.0]), weights * (1 - 1e-12), weights
    )
    assert score == pytest.approx(-3)


def test_transfer_is_told_by_the_interval() -> None:
    assert transfers(Difference(0.001, -0.001, 0.004), 0.005) == "it transfers"
    assert "interval reaches beyond" in transfers(Difference(0.001, -0.001, 0.006), 0.005)
    assert "may be chance" in transfers(Difference(0.006, 0.001, 0.009), 0.005)
    assert transfers(Difference(0.008, 0.006, 0.009), 0.005) == "it does not transfer"
    assert "too few" in transfers(Difference(0.001, -math.inf, math.inf), 0.005)
    assert "too few" in transfers(Difference(0.006, -math.inf, math.inf), 0.005)


def test_a_rule_pays_where_no_depth_chosen_blindly_does_better() -> None:
    spent = {"decoding": 2.0, "reading": 4.0}
    assert pays(spent, 5.0, set()) == "pays"
    assert pays(spent, 3.0, set()) == "pays in decoding only"
    assert pays(spent, 2.0, set()) == "does not pay"
    assert pays(spent, 5.0, {"decoding"}) == "pays in reading only"
    assert pays(spent, 5.0, {"decoding", "reading"}) == "does not pay"


def test_documents_are_halved_by_content_and_copies_count_once() -> None:
    documents = [[number, 1] for number in range(20)] * 2
    first, second = halves(documents, seed=0)
    assert len(first) == len(second) == 10
    assert sorted(first + second) == sorted(documents[:20])
    assert halves(documents[::-1], seed=0) == (first, second)
    assert halves(documents, seed=1) != (first, second)


@pytest.mark.parametrize("given", ["0.5%", 0.005, "0.005", "0.50 %", ".5%", "5e-3"])
def test_a_tolerance_has_one_spelling(given: object) -> None:
    config = CalibrateConfig(model="m", data=("math",), tolerance=given)
    assert config.tolerance == "0.5%"
    assert config.share == pytest.approx(0.005)


@pytest.mark.parametrize("given", ["half", "0", "100%", "-1%", "1.5", "%", "nan"])
def test_a_tolerance_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="tolerance"):
        CalibrateConfig(model="m", data=("math",), tolerance=given)


def test_a_cap_that_lets_no_token_leave_early_is_refused() -> None:
    with pytest.raises(UserError, match="no token can leave early"):
        CalibrateConfig(model="m", data=("math",), max_recurrences=2, min_recurrences=2)
