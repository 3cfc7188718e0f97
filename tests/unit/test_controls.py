import math

import numpy as np
import pytest
from synthetic import make_result

from rondo.evaluation.comparisons import Finding, Json, measure
from rondo.evaluation.controls import (
    cross_fitted_depth,
    depth_controls,
    equal_flops,
    equal_flops_checkpoint,
    policy_controls,
)
from rondo.evaluation.measures import depth_measures

GAIN = {1: 2.0, 2: 1.9, 4: 1.88}


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def controls(*others: Json, means: dict[int, float] | None = None) -> dict[str, Finding]:
    ours = make_result(tasks={"text": means or GAIN})
    return named(depth_controls([ours, *others], "text"))


def lucky_depths(seed: int, num_items: int = 100, num_depths: int = 12) -> Json:
    """Depths that differ from r = 1 by nothing but noise."""
    result = make_result(tasks={"text": dict.fromkeys(range(1, num_depths + 1), 2.0)})
    rng = np.random.default_rng(seed)
    values = {str(r): rng.normal(2, 0.3, num_items).tolist() for r in range(1, num_depths + 1)}
    result["items"]["text"] = {"weights": [1] * num_items, "values": values}
    return result


def test_cross_fitting_removes_the_luck_of_the_best_depth() -> None:
    results = [lucky_depths(seed) for seed in range(20)]
    picked = [named(depth_measures(result, "text"))["total gain"].value for result in results]
    honest = [cross_fitted_depth(measure(result, "text")) for result in results]
    assert np.mean(picked) > 0.03
    assert abs(np.mean([finding.value for finding in honest])) < 0.01
    assert sum(finding.low < 0 < finding.high for finding in honest) >= 17


def test_cross_fitting_keeps_a_real_gain() -> None:
    found = controls()["blind depth"]
    assert found.value == pytest.approx(0.12, abs=0.01)
    assert found.low > 0
    assert "r = 4 was chosen in" in found.sentence


def random_answers(*rates: float, num_items: int = 2000) -> np.ndarray:
    rng = np.random.default_rng(7)
    return np.stack([rng.random(num_items) < rate for rate in rates]).astype(float)


def test_policy_that_looks_at_nothing_gains_nothing() -> None:
    values = random_answers(0.3, 0.5, 0.6)
    chosen = np.random.default_rng(8).integers(3, size=2000)
    found = named(policy_controls(values, [1, 2, 4], chosen))
    for name in ("policy against blind", "policy against shuffled"):
        assert found[name].low < 0.5
    assert found["policy against shuffled"].low < 0 < found["policy against shuffled"].high
    assert found["policy"].value == pytest.approx(46.7, abs=3)


def test_policy_that_knows_the_items_beats_both_controls() -> None:
    values = random_answers(0.5, 0.5)
    found = named(policy_controls(values, [1, 2], values[1].astype(int)))
    assert found["policy against blind"].low > 20
    assert found["policy against shuffled"].low > 20


def test_blind_mixture_lies_on_the_line_between_two_depths() -> None:
    # Scores 0, 0 and 1 at costs 1, 2 and 3: at a mean cost of 2 the mixture of the first and the
    # last scores 1/2, which the middle depth does not.
    values = np.repeat([[0.0], [0.0], [1.0]], 40, axis=1)
    found = named(policy_controls(values, [1, 2, 3], np.ones(40, dtype=int)))
    assert found["policy against blind"].value == pytest.approx(-50)
    assert "the mixture scores 50.0%" in found["policy against blind"].sentence


def test_blind_mixture_follows_what_the_policy_spends() -> None:
    # All items are alike, so whoever is drawn, the policy is its own mixture.
    values = np.repeat([[0.0], [1.0]], 40, axis=1)
    gap = named(policy_controls(values, [1, 3], np.arange(40) % 2))["policy against blind"]
    assert (gap.low, gap.value, gap.high) == pytest.approx((0, 0, 0))


def test_blind_control_may_leave_cost_unspent() -> None:
    values = np.repeat([[1.0], [0.0]], 40, axis=1)
    chosen = np.arange(40) % 2
    found = named(policy_controls(values, [1, 5], chosen))
    assert found["policy"].value == 50
    assert found["policy against blind"].value == pytest.approx(-50)


def test_shuffled_depths_score_their_shares() -> None:
    values = np.repeat([[1.0], [0.0]], 40, axis=1)
    chosen = (np.arange(40) < 10).astype(int)
    found = named(policy_controls(values, [1, 5], chosen))
    shuffled = found["policy against shuffled"]
    assert shuffled.value == pytest.approx(0)
    # However items are resampled, dealing at random costs this policy nothing.
    assert (shuffled.low, shuffled.high) == pytest.approx((0, 0))
    assert "they score 75.0%, 95% of deals 75.0% to 75.0%" in (
        found["policy against shuffled"].sentence
    )


def test_interval_of_a_blind_policy_holds_as_often_as_it_says() -> None:
    held = 0
    for number in range(100):
        rng = np.random.default_rng(number)
        ease = rng.random(200)
        values = np.stack([ease < 0.4, ease < 0.6]).astype(float)
        gap = named(policy_controls(values, [1, 2], rng.integers(2, size=200)))
        held += gap["policy against blind"].low <= 0 <= gap["policy against blind"].high
    assert 88 <= held <= 100


def test_oracle_controls_are_labelled_as_bounds_and_only_for_answers() -> None:
    result = make_result(tasks={"acc-x": {1: 0.4, 2: 0.5}, "text": GAIN})
    found = named(depth_controls([result], "acc-x"))
    assert found["oracle policy"].value == pytest.approx(50)
    for name in ("oracle policy", "oracle policy against blind", "oracle policy against shuffled"):
        assert "no attainable policy reaches" in found[name].sentence
    assert "oracle policy" not in named(depth_controls([result], "text"))


def test_missing_controls_are_named_with_the_command_that_makes_them() -> None:
    found = controls()
    for name, command in (
        ("static twin", "--mode static"),
        ("random twin", "--mode random"),
        ("parent", "--against parent"),
    ):
        assert found[name].value is None
        assert command in found[name].sentence
    assert "self-consistency" not in found
    generated = make_result(tasks={"gen-x": {1: 0.2, 2: 0.3}})
    missing = named(depth_controls([generated], "gen-x"))["self-consistency"]
    assert "--against self-consistency" in missing.sentence


def test_static_twin_is_compared_at_the_best_depth_and_at_one() -> None:
    twin = make_result("static", tasks={"text": {1: 1.95}})
    found = controls(twin)
    assert found["static twin"].value == pytest.approx(0.07, abs=0.01)
    assert "at equal training FLOPs, at 1.47x the FLOPs per token" in found["static twin"].sentence
    assert found["static twin at r = 1"].value == pytest.approx(-0.05, abs=0.01)
    twin["model"]["training"] = twin["model"]["training"] | {"flops": 2 * 5.1e13}
    assert "trained with 2.00x its FLOPs" in controls(twin)["static twin"].sentence


def test_random_twin_is_met_at_its_own_best_depth() -> None:
    found = controls(make_result("random", tasks={"text": {1: 3.0, 2: 2.5, 4: 2.6}}))
    assert "the random twin at its best, r = 2" in found["random twin"].sentence
    assert found["random twin"].value == pytest.approx(0.62, abs=0.02)


def test_controls_on_other_items_do_not_count() -> None:
    parent = make_result("parent", tasks={"text": {1: 2.0}})
    assert controls(parent)["parent"].value is not None
    parent["tasks"]["text"] = parent["tasks"]["text"] | {"sha256": "1" * 64}
    assert controls(parent)["parent"].value is None
    fewer = make_result("parent", tasks={"text": {1: 2.0}}, num_items=30)
    assert controls(fewer)["parent"].value is None


def test_self_consistency_is_named_with_its_samples_and_price() -> None:
    tasks = {"gen-x": {1: 0.3, 4: 0.5}}
    votes = make_result("self-consistency", tasks={"gen-x": {1: 0.4}})
    votes["rows"][0]["flops_per_token"] *= 3  # of all three samples
    found = named(depth_controls([make_result(tasks=tasks), votes], "gen-x"))["self-consistency"]
    assert found.value == pytest.approx(10)
    assert "self-consistency of 3 samples" in found.sentence
    assert "at 0.49x the FLOPs per token" in found.sentence


def test_without_a_looped_model_nothing_is_controlled() -> None:
    assert (
        depth_controls([make_result("parent", tasks={"text": {1: 2.0}})], "text")[0].value is None
    )
    assert depth_controls([make_result(tasks={"text": {1: 2.0}})], "text")[0].value is None


def curve(losses: dict[float, float], depths: dict[str, float] | None = None) -> list[Json]:
    """Points by FLOPs; `depths` gives how far the validation of each depth lies off the loss."""
    return [
        {
            "step": step,
            "tokens": step,
            "flops": flops,
            "loss": loss,
            "validation": {r: loss + off for r, off in (depths or {}).items()},
        }
        for step, (flops, loss) in enumerate(losses.items(), 1)
    ]


def test_curves_meet_at_the_largest_budget_of_both() -> None:
    ours, theirs = curve({1e12: 3.0, 1e14: 2.0}), curve({1e12: 3.0, 1e13: 2.75})
    found = equal_flops(ours, theirs)
    # Half-way in log FLOPs ours is at 2.5.
    assert found.value == pytest.approx(0.25)
    assert "1.00e+13" in found.sentence
    assert "training loss" in found.sentence
    assert equal_flops(theirs, ours).value == pytest.approx(-0.25)


def test_curves_compare_validations_where_both_have_one() -> None:
    ours = curve({1e12: 3.0, 1e13: 2.5}, {"1": 0.0, "4": -0.5})
    found = equal_flops(ours, curve({1e12: 3.0, 1e13: 2.5}, {"1": 0.1}))
    assert found.value == pytest.approx(0.6)
    assert "validation loss at r = 4" in found.sentence
    assert "at r = 1" in found.sentence
    several = equal_flops(ours, curve({1e12: 3.0, 1e13: 2.5}, {"1": 0.1, "3": 0.2, "32": 9.0}))
    assert several.value == pytest.approx(0.7)
    assert "training loss" in equal_flops(ours, curve({1e12: 3.0, 1e13: 2.5})).sentence


def test_curves_that_do_not_meet_are_not_compared() -> None:
    for theirs in ([], curve({1e15: 1.0, 1e16: 0.9}), curve({1e12: math.nan})):
        assert equal_flops(curve({1e12: 3.0, 1e13: 2.0}), theirs).value is None


def published(result: Json) -> Json:
    """Leave what stands in a paper: values with standard errors, and no items."""
    tasks = {name: {**facts, "sha256": None} for name, facts in result["tasks"].items()}
    return {**result, "tasks": tasks, "items": {}}


def test_published_values_are_controlled_unpaired_and_only_from_one_source() -> None:
    ours = published(make_result(tasks={"gen-x": {1: 0.2, 4: 0.5}}))
    twin = published(make_result("static", tasks={"gen-x": {1: 0.3}}))
    found = named(depth_controls([ours, twin], "gen-x"))
    assert found["static twin"].value == pytest.approx(20)
    assert "with no items to pair" in found["static twin"].sentence
    assert found["blind depth"].value is None
    assert "no items are known" in found["blind depth"].sentence
    assert not any(name.startswith("oracle") for name in found)
    twin["tasks"]["gen-x"]["source"] = "another paper"
    assert named(depth_controls([ours, twin], "gen-x"))["static twin"].value is None


def test_published_values_do_not_meet_measured_items() -> None:
    ours = make_result(tasks={"gen-x": {1: 0.2, 4: 0.5}})
    twin = make_result("static", tasks={"gen-x": {1: 0.3}})
    assert named(depth_controls([ours, published(twin)], "gen-x"))["static twin"].value is None
    assert named(depth_controls([ours, twin | {"items": {}}], "gen-x"))["static twin"].value is None


def test_training_cost_falls_back_to_the_account_that_both_have() -> None:
    ours, twin = make_result(), make_result("static", tasks={"math-test": {1: 1.9}})
    twin["model"]["training"] = twin["model"]["training"] | {"flops": None, "flops_paper": 8.2e13}
    said = named(depth_controls([ours, twin], "math-test"))["static twin"].sentence
    assert "trained with 2.00x its FLOPs (the paper's account)" in said


def with_checkpoints(result: Json, scores: dict[float, dict[str, float]]) -> Json:
    """Add checkpoints, given by training FLOPs."""
    result["model"]["checkpoints"] = [
        {"step": step, "flops": flops, "scores": {"gen-x": by_depth}}
        for step, (flops, by_depth) in enumerate(scores.items(), 1)
    ]
    return result


def looped(scores: dict[float, dict[str, float]]) -> Json:
    result = make_result(tasks={"gen-x": {1: 0.2, 4: 0.5}}, num_items=1000)
    return with_checkpoints(result, scores)


def static(scores: dict[float, dict[str, float]]) -> Json:
    twin = make_result("static", tasks={"gen-x": {1: 0.3}}, num_items=1000)
    return with_checkpoints(twin, scores)


def test_checkpoint_that_counts_is_the_latest_of_at_most_the_others_flops() -> None:
    ours = looped({1e19: {"2": 0.3}, 2e19: {"2": 0.4}, 2.1e19: {"2": 0.9}})
    found = equal_flops_checkpoint(ours, static({1e19: {"1": 0.8}, 2e19: {"1": 0.3}}), "gen-x")
    half = 1.959964 * 100 * math.sqrt((0.4 * 0.6 + 0.3 * 0.7) / 1000)
    assert (found.value, found.low) == pytest.approx((10, 10 - half))
    assert "at step 2 (2e+19 training FLOPs, 100% of the other's), run at r = 2" in found.sentence
    assert "40.0% against 30.0%, though its learning rate still had to fall" in found.sentence


def test_checkpoints_are_scored_at_the_trained_depth_or_the_nearest() -> None:
    twin = static({2e19: {"1": 0.3}})
    found = equal_flops_checkpoint(looped({1e19: {"1": 0.9, "2": 0.4, "4": 0.9}}), twin, "gen-x")
    assert found.value == pytest.approx(10)
    assert "still had to fall" not in found.sentence
    found = equal_flops_checkpoint(looped({1e19: {"1": 0.9, "3": 0.5, "16": 0.9}}), twin, "gen-x")
    assert found.value == pytest.approx(20)


def test_checkpoints_that_cannot_be_met_are_not_compared() -> None:
    ours, twin = looped({3e19: {"2": 0.4}}), static({2e19: {"1": 0.3}})
    assert "spent more" in equal_flops_checkpoint(ours, twin, "gen-x").sentence
    assert equal_flops_checkpoint(looped({}), twin, "gen-x").value is None
    assert equal_flops_checkpoint(make_result(), make_result("static"), "math-test").value is None


def test_every_looped_model_with_checkpoints_is_met_by_the_static_twin() -> None:
    first, second = looped({1e19: {"2": 0.4}}), looped({1e19: {"2": 0.2}})
    second["model"]["label"] = "other"
    found = named(depth_controls([first, second, static({2e19: {"1": 0.3}})], "gen-x"))
    assert found["equal training FLOPs, recurrent, trained"].value == pytest.approx(10)
    assert found["equal training FLOPs, other"].value == pytest.approx(-10)
    assert sum(name.startswith("equal") for name in found) == 2
    without = named(depth_controls([first, make_result("static")], "gen-x"))
    assert not any(name.startswith("equal") for name in without)
