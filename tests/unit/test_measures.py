import math
import subprocess
import sys

import numpy as np
import pytest
from synthetic import make_result, published

from rondo.evaluation.comparisons import Finding, Json, is_share, measure, paired_bootstrap
from rondo.evaluation.measures import depth_measures, knees, wilson

GAIN = {1: 2.0, 2: 1.9, 4: 1.88, 8: 1.885}
FLAT = {1: 2.0, 2: 2.0, 4: 2.0, 8: 2.0}


def measures(result: Json, task: str = "math-test") -> dict[str, Finding]:
    return {finding.name: finding for finding in depth_measures(result, task)}


def of_losses(means: dict[int, float], **changes: object) -> dict[str, Finding]:
    return measures(make_result(tasks={"math-test": means}, num_items=100, **changes))


def of_answers(*by_depth: str, depths: tuple[int, ...] = (1, 2, 4)) -> dict[str, Finding]:
    """Measure items whose answers are given as strings of 0 and 1, one per depth, repeated."""
    result = make_result(tasks={"acc-x": dict.fromkeys(depths, 0.5)}, num_items=4)
    answers = [[float(one) for one in line] * 10 for line in by_depth]
    result["items"]["acc-x"] = {
        "weights": [1] * len(answers[0]),
        "values": {str(r): line for r, line in zip(depths, answers, strict=True)},
    }
    return measures(result, "acc-x")


def test_a_falling_loss_is_a_gain_and_so_is_a_rising_accuracy() -> None:
    assert of_losses(GAIN)["total gain"].value == pytest.approx(0.12, abs=0.01)
    accuracy = measures(make_result(tasks={"acc-x": {1: 0.4, 2: 0.5}}, num_items=100), "acc-x")
    assert accuracy["total gain"].value == pytest.approx(10)
    assert accuracy["total gain"].unit == "points"
    assert "r = 2 is 10.0 points better than r = 1" in accuracy["total gain"].sentence
    assert accuracy["best depth"].value == 2
    assert "(50.0%)" in accuracy["best depth"].sentence


def test_a_harmful_depth_is_worse_and_not_hidden_by_the_best() -> None:
    found = of_losses({1: 1.9, 2: 2.0, 4: 2.1})
    assert found["best depth"].value == 1
    assert found["total gain"].value == pytest.approx(-0.1, abs=0.01)
    said = found["total gain"].sentence
    assert said.startswith("r = 2, the best of 2 deeper ones, is 0.0")
    assert "nats per token worse than r = 1" in said
    assert found["knee"].value is None


def shifted(change: float) -> Json:
    """Documents that are all better by the same at each further depth."""
    result = make_result(tasks={"math-test": {1: 2.0, 2: 2.0, 4: 2.0}}, num_items=60)
    items = result["items"]["math-test"]
    first, weights = (np.array(one) for one in (items["values"]["1"], items["weights"]))
    for step, depth in enumerate(("1", "2", "4")):
        items["values"][depth] = (first - step * change * weights).tolist()
    return result


def test_a_difference_of_rounding_counts_as_none_however_sure() -> None:
    found = measures(shifted(1e-6))
    gain = found["gain 1 to 2"]
    assert gain.low == pytest.approx(1e-6, abs=1e-9)
    assert gain.sentence.startswith("Not shown")
    assert "below 0.0001 it is no difference that counts" in gain.sentence
    assert "No depth stands out: r = 1, 2, 4 are" in found["best depth"].sentence
    assert found["knee"].value is None
    assert found["documents better"].value == 0
    assert "0.0010 nats per token better" in measures(shifted(1e-3))["gain 1 to 2"].sentence


def test_depths_that_tie_leave_none_that_stands_out() -> None:
    tied = of_answers("1000", "1100", "0110")["best depth"]
    assert tied.value is None
    assert "No depth stands out: r = 2, 4 are the best alike (50.0%)" in tied.sentence


def test_best_depth_and_practical_knee_of_few_items_are_not_made_much_of() -> None:
    few = make_result(tasks={"acc-x": {1: 0.2, 2: 0.5, 4: 0.9}}, num_items=6)
    found = measures(few, "acc-x")
    assert found["best depth"].low is None
    assert "6 items are too few" in found["best depth"].sentence
    assert found["practical knee"].value is None


@pytest.mark.parametrize(
    ("metric", "share"),
    [
        ("acc_norm", True),
        ("exact_match,strict-match", True),
        ("math_verify", True),
        ("f1", True),
        ("pass@1", True),
        ("bits_per_byte", False),
        ("word_perplexity", False),
        ("loss", False),
        ("bleu", False),
    ],
)
def test_shares_are_told_from_other_metrics_by_name(metric: str, share: bool) -> None:
    assert is_share(metric) == share


def test_a_metric_that_is_no_share_keeps_its_unit() -> None:
    result = make_result(tasks={"text": {1: 0.85, 2: 0.80}}, num_items=60)
    result["tasks"]["text"] |= {"metric": "bits_per_byte", "kind": "likelihood"}
    for row in result["rows"]:
        row["metric"] = "bits_per_byte"
    found = measures(result, "text")
    assert found["total gain"].unit == "bits per byte"
    assert found["total gain"].value == pytest.approx(0.05, abs=0.01)
    assert "0.8000 bits per byte" in found["best depth"].sentence or "0.7" in (
        found["best depth"].sentence
    )
    assert "documents better" in found


def test_seeds_are_told_with_how_far_they_lie_apart() -> None:
    result = make_result(tasks={"acc-x": {1: 0.2, 2: 0.5}})
    assert "spread over seeds" not in measures(result, "acc-x")
    for row in result["rows"]:
        row["seed_values"] = [0.48, 0.50, 0.53]
    spread = measures(result, "acc-x")["spread over seeds"]
    assert spread.value == pytest.approx(5)
    assert "At r = 2 the 3 seeds gave 48.0% to 53.0%" in spread.sentence


def test_knee_pays_for_the_choice_of_the_best_depth() -> None:
    # The best of ten depths lies above r = 1 by what one comparison would just call a gain.
    rng = np.random.default_rng(0)
    result = make_result(tasks={"text": dict.fromkeys(range(1, 12), 2.0)}, num_items=100)
    noise = rng.normal(0, 0.3, (11, 100))
    noise -= noise.mean(1, keepdims=True)
    noise[5] -= 2.4 * math.hypot(noise[5].std(), noise[0].std()) / 10
    result["items"]["text"] = {
        "weights": [1] * 100,
        "values": {str(r): (2 + noise[r - 1]).tolist() for r in range(1, 12)},
    }
    assert measures(result, "text")["gain 5 to 6"].low > 0
    assert measures(result, "text")["knee"].value is None


def test_marginal_gains_add_up_and_each_has_an_interval() -> None:
    found = of_losses(GAIN)
    steps = [found[f"gain {step}"] for step in ("1 to 2", "2 to 4", "4 to 8")]
    scores = measure(make_result(tasks={"math-test": GAIN}, num_items=100), "math-test").scores
    assert sum(step.value or 0 for step in steps) == pytest.approx(scores[-1] - scores[0])
    assert all(step.low < step.value < step.high for step in steps)
    assert steps[0].low > 0 > steps[2].high


def test_marginal_gain_of_a_flat_curve_is_nothing() -> None:
    found = of_losses(FLAT)["gain 1 to 2"]
    assert found.low < 0 < found.high
    assert found.sentence.startswith("Not shown: the gain of r = 2 over r = 1")
    assert "may be chance" in found.sentence


def test_gain_per_gflop_divides_by_what_the_loops_executed() -> None:
    found = of_losses(GAIN)
    for step, loops in (("1 to 2", 1), ("2 to 4", 2), ("4 to 8", 4)):
        gain, price = found[f"gain {step}"], found[f"gain per GFLOP {step}"]
        assert price.value == pytest.approx(gain.value / (0.042 * loops))
        assert price.high == pytest.approx(gain.high / (0.042 * loops))


def test_gain_per_gflop_is_unknown_without_flops() -> None:
    result = make_result(num_items=20)
    for row in result["rows"]:
        row["flops_per_token"] = None
    assert measures(result)["gain per GFLOP 1 to 2"].value is None


def test_knee_is_where_the_curve_bends() -> None:
    bent = np.array([[0, 0.8, 0.9, 1.0], [0, 0.4, 0.9, 1.0]])
    assert knees((1, 2, 4, 8), bent).tolist() == [1, 2]
    assert knees((1, 2, 4, 8), -bent).tolist() == [-1, -1]
    assert knees((1, 4), np.array([[0.0, 1.0]])).tolist() == [-1]


def test_a_gain_straight_in_log_depth_has_no_knee_nor_has_a_flat_one() -> None:
    assert knees((1, 2, 4, 8), np.array([[0.0, 1, 2, 3], [1, 1, 1, 1]])).tolist() == [-1, -1]
    assert of_losses(GAIN)["knee"].value == 2
    assert "100% of resamples" in of_losses(GAIN)["knee"].sentence
    assert "no depth is shown to beat r = 1" in of_losses(FLAT)["knee"].sentence
    assert "three depths" in of_losses({1: 2.0, 2: 1.0})["knee"].sentence


def test_practical_knee_is_the_smallest_depth_that_noise_cannot_tell_from_the_best() -> None:
    # The depths differ by 0.02 per document: one standard error over 100 is about 0.003.
    assert of_losses({1: 2.0, 2: 1.9, 4: 1.8995, 8: 1.899})["practical knee"].value == 2
    assert of_losses({1: 2.0, 2: 1.91, 4: 1.905, 8: 1.9})["practical knee"].value == 8


def test_rates_count_what_deeper_loops_spoil_and_mend() -> None:
    found = of_answers("1100", "0110", "1001")
    # Second and third item are right once and wrong at the end; the fourth is mended.
    assert found["overthinking rate"].value == 50
    assert found["self-correction rate"].value == 25
    assert "the 25.0% that go the other way" in found["self-correction rate"].sentence
    assert "not shown to differ from the 25.0%" in found["self-correction rate"].sentence
    assert "more than" in of_answers("0000", "0110", "1111")["self-correction rate"].sentence
    assert "documents better" not in found


def test_rates_take_means_over_seeds_by_their_majority() -> None:
    result = make_result(tasks={"gen-x": {1: 0.5, 2: 0.5}}, num_items=20)
    result["items"]["gen-x"]["values"] = {"1": [0.67] * 20, "2": [0.33] * 20}
    assert measures(result, "gen-x")["overthinking rate"].value == 100


def test_losses_have_a_share_of_documents_instead_of_rates() -> None:
    found = of_losses(GAIN)
    assert found["documents better"].value > 95
    assert "more than half" in found["documents better"].sentence
    assert "not shown to differ from half" in of_losses(FLAT)["documents better"].sentence
    assert "overthinking rate" not in found


def test_wilson_interval_matches_its_table() -> None:
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-3)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-3)
    assert wilson(0, 0) == (0, 1)


def test_oracle_is_the_best_of_each_item_and_says_it_is_a_bound() -> None:
    found = of_answers("1100", "0110", "1001")["oracle depth"]
    assert found.value == 50  # all four are right once, each depth has two
    assert "upper bound" in found.sentence
    assert "100.0%" in found.sentence


def test_stability_looks_up_to_four_times_the_trained_depth() -> None:
    fallen = of_losses({1: 2.0, 2: 1.8, 4: 1.85, 8: 1.9, 16: 1.0})["stability"]
    assert fallen.value == pytest.approx(-0.1, abs=0.01)
    assert fallen.sentence.startswith("r = 8, beyond the trained depth, is 0.1")
    assert "worse than r = 2" in fallen.sentence
    assert of_losses({1: 2.0, 2: 1.8, 16: 1.0})["stability"].value is None
    assert of_losses({1: 2.0, 4: 1.9}, model={"trained_recurrence": 3})["stability"].value is None
    near = of_losses({1: 2.0, 4: 1.9, 8: 1.9}, model={"trained_recurrence": 3.6})["stability"]
    assert "r = 4 (the nearest to 3.6)" in near.sentence
    assert (
        "Not trained" in of_losses(GAIN, model={"trained_recurrence": None})["stability"].sentence
    )


@pytest.mark.parametrize("bad", [math.nan, None])
def test_depths_without_numbers_are_left_out_and_named(bad: float | None) -> None:
    result = make_result(tasks={"math-test": GAIN}, num_items=20)
    result["items"]["math-test"]["values"]["8"][3] = bad
    found = measures(result)
    assert "r = 8 gave values that are no numbers" in found["left out"].sentence
    assert "gain 4 to 8" not in found
    assert found["best depth"].value == 4


def test_one_depth_says_nothing_about_depth() -> None:
    assert list(of_losses({1: 2.0})) == ["depth"]


def test_few_items_have_no_interval() -> None:
    found = measures(make_result(num_items=6))["total gain"]
    assert (found.low, found.high) == (None, None)
    assert "6 items are too few" in found.sentence


def test_bootstrap_interval_matches_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(300, 60, 400)
    change = rng.normal(10, 10, 400)
    gap = paired_bootstrap(base + change, base, [100] * 400)
    half_width = 1.96 * change.std() / 20 / 100
    assert gap.value == pytest.approx(change.mean() / 100)
    assert gap.high - gap.value == pytest.approx(half_width, rel=0.15)
    assert gap.value - gap.low == pytest.approx(half_width, rel=0.15)
    assert gap == paired_bootstrap(base + change, base, [100] * 400)
    wider = paired_bootstrap(base + change, base, [100] * 400, choices=5)
    assert wider.low < gap.low
    assert wider.high > gap.high


def test_bootstrap_is_of_a_ratio_of_sums() -> None:
    # Losses in proportion to their tokens: whatever is resampled, the ratio stays.
    weights = np.arange(1, 41)
    gap = paired_bootstrap(0.5 * weights, 0 * weights, weights)
    assert (gap.low, gap.value, gap.high) == pytest.approx((0.5, 0.5, 0.5))


def test_bootstrap_intervals_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        change = rng.normal(0.3, 1, 60)
        gap = paired_bootstrap(change, np.zeros(60), np.ones(60))
        held += gap.low <= 0.3 <= gap.high
    assert 180 <= held <= 197


def test_statistics_load_without_torch() -> None:
    modules = "rondo.verdict, rondo.evaluation.fits, rondo.evaluation.controls"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_published_values_have_the_interval_of_independent_samples() -> None:
    result = published(make_result(tasks={"acc-x": {1: 0.2, 4: 0.5}}, num_items=100))
    gain = measures(result, "acc-x")["total gain"]
    half = 1.959964 * 100 * math.hypot(*(row["stderr"] for row in result["rows"]))
    assert (gain.value, gain.low, gain.high) == pytest.approx((30, 30 - half, 30 + half))
    assert "with no items to pair)" in gain.sentence


def test_published_interval_is_widened_for_the_best_of_several() -> None:
    for depths, z in (((4,), 1.959964), ((4, 8, 16, 32, 64), 2.575829)):
        result = published(make_result(tasks={"acc-x": {1: 0.2, **dict.fromkeys(depths, 0.5)}}))
        gain = measures(result, "acc-x")["total gain"]
        half = z * 100 * math.hypot(*(row["stderr"] for row in result["rows"][:2]))
        assert gain.high == pytest.approx(30 + half)


def test_published_losses_gain_by_falling() -> None:
    found = measures(published(make_result(tasks={"text": GAIN}, num_items=100)), "text")
    assert found["total gain"].value == pytest.approx(0.12, abs=0.01)
    assert found["best depth"].value == 4
    # Documents differ much, and here nothing takes that out.
    assert found["total gain"].low is not None
    assert (
        found["total gain"].low
        < measures(make_result(tasks={"text": GAIN}), "text")["total gain"].low
    )


def test_a_published_curve_has_its_knees_and_says_what_they_rest_on() -> None:
    curve = {1: 0.1, 2: 0.3, 4: 0.4, 8: 0.402, 16: 0.4}
    found = measures(published(make_result(tasks={"acc-x": curve}, num_items=1000)), "acc-x")
    assert found["knee"].value == 4
    assert "draws from the standard errors" in found["knee"].sentence
    assert found["practical knee"].value == 4
    assert "one (unpaired) standard error" in found["practical knee"].sentence
    assert "one (paired) standard error" in of_losses(GAIN)["practical knee"].sentence


def test_without_items_one_sentence_stands_for_all_that_they_would_tell() -> None:
    found = measures(published(make_result(tasks={"acc-x": {1: 0.2, 4: 0.5}})), "acc-x")
    assert "no items" in found["items"].sentence
    assert not {"overthinking rate", "self-correction rate", "oracle depth"} & set(found)


def test_a_published_share_of_none_is_not_known_for_sure() -> None:
    result = published(make_result(tasks={"acc-x": {1: 0.0, 4: 0.0}}, num_items=100))
    assert all(row["stderr"] == 0 for row in result["rows"])
    gain = measures(result, "acc-x")["gain 1 to 4"]
    assert gain.low is not None
    assert gain.low < -1
    few = published(make_result(tasks={"acc-x": {1: 0.0, 4: 1.0}}, num_items=6))
    assert measures(few, "acc-x")["gain 1 to 4"].low is None


def test_a_published_value_without_its_error_is_left_out() -> None:
    result = published(make_result(tasks={"acc-x": {1: 0.2, 2: 0.3, 4: 0.5}}))
    result["rows"][1]["stderr"] = None
    assert measure(result, "acc-x").depths == (1, 4)
    assert "r = 2" in measures(result, "acc-x")["left out"].sentence
