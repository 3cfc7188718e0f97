import numpy as np
import pytest
from synthetic import make_result

from rondo.evaluation.fits import depth_fit, recurrence_equivalence, training_fit
from rondo.evaluation.measures import Json

DEPTHS = (1, 2, 4, 8, 16)


def law(x: float, limit: float = 1.8, amplitude: float = 0.2, exponent: float = 1.3) -> float:
    return limit + amplitude * x**-exponent


def with_curve(losses: list[float], validation: list[Json] | None = None) -> Json:
    result = make_result(num_items=10)
    result["model"]["curve"] = [
        {
            "step": step,
            "tokens": 1000 * step,
            "flops": 1e12 * step,
            "loss": loss,
            "validation": validation[step - 1] if validation else {},
        }
        for step, loss in enumerate(losses, 1)
    ]
    return result


def test_depth_law_recovers_the_loss_it_was_made_from() -> None:
    result = make_result(tasks={"text": {r: law(r) for r in DEPTHS}}, num_items=400)
    fit, findings = depth_fit(result, "text")
    assert fit is not None
    assert fit.exponent_low < 1.3 < fit.exponent_high
    assert fit.limit_low < 1.8 < fit.limit_high
    assert fit.predict(2) == pytest.approx(law(2), abs=0.01)
    assert fit.rmse < 0.002
    assert fit.num_points == 5
    left = next(finding for finding in findings if finding.name == "depth left")
    assert left.low < law(16) - 1.8 < left.high


def test_depth_law_of_an_accuracy_rises_to_its_limit() -> None:
    means = {r: law(r, 0.6, -0.2, 1.0) for r in DEPTHS}
    fit, findings = depth_fit(make_result(tasks={"acc-x": means}, num_items=500), "acc-x")
    assert fit is not None
    assert fit.amplitude < 0
    assert fit.limit == pytest.approx(0.6, abs=0.02)
    assert findings[0].unit == "%"
    assert findings[0].value == pytest.approx(100 * fit.limit)


@pytest.mark.parametrize(
    ("means", "num_items", "reason"),
    [
        ({1: 2.0, 2: 1.9, 4: 1.88}, 60, "it takes 4 depths, and 3"),
        (dict.fromkeys(DEPTHS, 2.0), 60, "flat within its errors"),
        ({1: 2.0, 2: 1.9, 4: 1.7, 8: 1.3}, 60, "without bending"),
        ({1: 2.0, 2: 1.8, 4: 1.75, 8: 1.74, 16: 1.79}, 100, "r = 16 being worse than r = 8"),
        ({1: 2.0, 2: 1.9, 4: 1.9, 8: 1.9, 16: 1.9}, 100, "a step at its first point"),
        ({1: 2.0, 2: 1.99, 4: 1.8, 8: 1.79, 16: 1.785}, 100, "of another shape"),
        ({r: law(r) for r in DEPTHS}, 6, "6 items are too few"),
    ],
)
def test_depth_law_is_refused_with_a_reason(
    means: dict[int, float], num_items: int, reason: str
) -> None:
    fit, findings = depth_fit(make_result(tasks={"text": means}, num_items=num_items), "text")
    assert fit is None
    assert findings[0].value is None
    assert reason in findings[0].sentence


def test_depth_law_leaves_out_a_diverged_depth() -> None:
    result = make_result(tasks={"text": {r: law(r) for r in DEPTHS}}, num_items=60)
    result["items"]["text"]["values"]["16"][0] = None
    fit, _ = depth_fit(result, "text")
    assert fit is not None
    assert fit.num_points == 4


def test_depth_law_is_rarely_refused_where_it_holds() -> None:
    refused = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        result = make_result(tasks={"text": {r: law(r) for r in DEPTHS}}, num_items=100)
        for depth in DEPTHS:
            items = np.array([law(depth)] * 100) + rng.normal(0, 0.05, 100)
            result["items"]["text"]["values"][str(depth)] = items.tolist()
        result["items"]["text"]["weights"] = [1] * 100
        refused += depth_fit(result, "text")[0] is None
    assert refused <= 6


def test_training_law_recovers_a_noisy_curve() -> None:
    rng = np.random.default_rng(3)
    losses = [law(1e12 * step, 2.0, 40.0, 0.12) for step in range(1, 301)]
    noisy = (np.array(losses) + rng.normal(0, 0.005, 300)).tolist()
    fit, findings = training_fit(with_curve(noisy))
    assert fit is not None
    assert fit.exponent_low < 0.12 < fit.exponent_high
    assert fit.limit_low < 2.0 < fit.limit_high
    assert fit.predict(2e14) == pytest.approx(law(2e14, 2.0, 40.0, 0.12), abs=0.005)
    assert "training loss" in findings[0].sentence


def test_training_law_ignores_the_warm_up() -> None:
    losses = [law(step, 2.0, 1.0, 0.5) for step in range(1, 101)]
    spoilt = [9.0] * 10 + losses[10:]
    fit, _ = training_fit(with_curve(spoilt))
    assert fit is not None
    assert fit.limit == pytest.approx(2.0, abs=1e-3)


def test_training_law_prefers_the_validation_at_the_trained_depth() -> None:
    losses = [law(step, 3.0, 1.0, 0.5) for step in range(1, 41)]
    validation = [
        {"1": loss, "2": loss - 1, "8": loss + 1} if step % 4 == 0 else {}
        for step, loss in enumerate(losses)
    ]
    fit, findings = training_fit(with_curve(losses, validation))
    assert fit is not None
    assert fit.limit == pytest.approx(2.0, abs=1e-3)
    assert "validation loss at r = 2 over 9 points" in findings[0].sentence
    rare = [one if step == 20 else {} for step, one in enumerate(validation)]
    assert "training loss" in training_fit(with_curve(losses, rare))[1][0].sentence


def test_training_law_is_refused_with_a_reason() -> None:
    for losses, reason in (([], "there are 0"), ([2.0, 1.9, 1.8], "there are 2")):
        fit, findings = training_fit(with_curve(losses))
        assert fit is None
        assert reason in findings[0].sentence
    noise = np.random.default_rng(0).normal(2, 0.1, 60).tolist()
    assert training_fit(with_curve(noise))[0] is None


def runs(phi: float, tokens: bool, count: int = 14, noise: float = 0.001) -> list[Json]:
    """Make trained runs of several sizes and depths that obey the law."""
    rng = np.random.default_rng(5)
    found = []
    for i in range(count):
        size, depth, seen = 1e8 * 2 ** (i % 4), (1, 2, 4, 8, 3)[i % 5], 1e9 * 3 ** (i % 3)
        once, looped = 0.8 * size, 0.2 * size
        loss = 1.5 + 300 * (once + depth**phi * looped) ** -0.3 + 400 * tokens * seen**-0.3
        result = make_result(tasks={"text": {depth: loss + rng.normal(0, noise)}}, num_items=40)
        training = result["model"]["training"] | {"tokens": seen if tokens else 1e9}
        result["model"] |= {
            "parameters": size,
            "trained_recurrence": float(depth),
            "training": training,
        }
        found.append(result)
    return found


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("phi", [0.0, 0.46, 1.0])
def test_recurrence_equivalence_recovers_the_worth_of_a_loop(phi: float, tokens: bool) -> None:
    found = recurrence_equivalence(runs(phi, tokens), "text")
    assert found is not None
    assert found.low <= phi <= found.high
    assert found.high - found.low < 0.3
    assert ("not told from looping that buys nothing" in found.sentence) == (phi == 0)


def test_noisy_runs_widen_the_interval_of_a_loop() -> None:
    clean, noisy = (recurrence_equivalence(runs(0.46, False, 14, n), "text") for n in (0.001, 0.01))
    assert clean is not None
    assert noisy is not None
    assert noisy.low <= 0.46 <= noisy.high
    assert noisy.high - noisy.low > 2 * (clean.high - clean.low)
    lost = recurrence_equivalence(runs(0.46, False, 14, 0.3), "text")
    assert lost is not None
    assert "do not settle it" in lost.sentence


def test_recurrence_equivalence_needs_runs_that_can_tell() -> None:
    enough = runs(0.46, tokens=False)
    assert recurrence_equivalence(enough[:4], "text") is None
    assert recurrence_equivalence(runs(0.46, tokens=True)[:6], "text") is None
    same_depth = [run for run in enough if run["model"]["trained_recurrence"] == 2] * 4
    assert recurrence_equivalence(same_depth, "text") is None
    untrained = [run | {"model": run["model"] | {"training": None}} for run in enough]
    assert recurrence_equivalence(untrained, "text") is None
    twins = [run | {"model": run["model"] | {"role": "random"}} for run in enough]
    assert recurrence_equivalence([enough[0], *twins], "text") is None
    strangers = [run | {"model": run["model"] | {"parent": "other"}} for run in enough]
    assert recurrence_equivalence([*enough[:4], *strangers], "text") is None
    accuracies = [make_result(tasks={"acc-x": {1: 0.5, 2: 0.6}}) for _ in range(8)]
    assert recurrence_equivalence(accuracies, "acc-x") is None
