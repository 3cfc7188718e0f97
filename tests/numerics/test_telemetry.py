"""The loop's telemetry: against known answers, the dense Jacobian, and plain recomputation."""

import math
from typing import Any

import pytest
import torch
from tests.conftest import VOCAB, WIDTH, recurrent
from torch import nn

from rondo.dynamics import loop_gain, loop_health
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.training.telemetry import alarms

IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def silenced(model: RecurrentForCausalLM) -> RecurrentForCausalLM:
    """The model with a core that adds nothing, so that an iteration is its injection alone."""
    for layer in model.model.core:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("mixing", [0.0, 0.25, 1.0, -1.5])
def test_the_gain_of_a_mix_alone_is_its_coefficient(
    mixing: float, dtype: torch.dtype, tolerance: float
) -> None:
    model = silenced(recurrent("llama")).to(dtype)
    model.model.injection.initialize(mixing)
    gain = loop_health(model, IDS, 3)["loop/gain"]
    assert gain == pytest.approx(abs(mixing), rel=tolerance)


def test_the_gain_of_a_linear_injection_is_its_radius_not_its_norm() -> None:
    model = silenced(recurrent("llama", injection="linear"))
    # Rotations by different angles in turned planes: complex eigenvalues, none of modulus above
    # 0.9; the shear makes the norm several times that.
    angle = torch.linspace(0.1, 3.0, WIDTH // 2)
    blocks = [
        torch.tensor([[math.cos(a), -4 * math.sin(a)], [math.sin(a) / 4, math.cos(a)]])
        for a in angle.tolist()
    ]
    matrix = 0.9 * torch.block_diag(*blocks)
    with torch.no_grad():
        model.model.injection.weight[:, :WIDTH] = matrix
    assert torch.linalg.matrix_norm(matrix, 2) > 3
    assert loop_health(model, IDS, 2)["loop/gain"] == pytest.approx(0.9, rel=0.1)


def state(model: RecurrentForCausalLM, ids: torch.Tensor, depth: int, **more: Any) -> torch.Tensor:
    """The state after an ordinary forward pass."""
    found = model.model(ids, num_recurrences=depth, **more).state
    assert found is not None
    return found


def iterated(
    model: RecurrentForCausalLM, ids: torch.Tensor, depth: int, given: torch.Tensor
) -> torch.Tensor:
    """What an ordinary forward pass makes, in its iteration depth + 1, of a given state."""
    calls: list[int] = []

    def swap(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        calls.append(1)
        return (given, args[1]) if len(calls) == depth + 1 else None

    handle = model.model.injection.register_forward_pre_hook(swap)
    found = state(model, ids, depth + 1)
    handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "granite"])
def test_the_gain_is_the_radius_of_the_dense_jacobian(family: str) -> None:
    model, ids = recurrent(family), IDS[:1]
    last = state(model, ids, 3).detach()
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: iterated(model, ids, 3, flat.view_as(last)).flatten(), last.flatten()
    )
    radius = float(torch.linalg.eigvals(jacobian).abs().max())
    assert loop_health(model, ids, 3)["loop/gain"] == pytest.approx(radius, rel=0.2)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("start", ["input", "zeros", "normal"])
def test_the_norms_are_those_of_an_ordinary_forward_pass(
    family: str, depth: int, start: str
) -> None:
    model = recurrent(family, state_init=start)
    health = loop_health(model, IDS, depth, state_seed=7)
    last, first = (state(model, IDS, r, state_seed=7).detach() for r in (depth, 1))
    rms = float(last.square().mean() ** 0.5)
    assert health["loop/state_norm"] == pytest.approx(rms, rel=1e-5)
    growth = [
        (a.norm() / b.norm()).item() for a, b in zip(tokens(last), tokens(first), strict=True)
    ]
    assert health["loop/state_growth"] == pytest.approx(sum(growth) / len(growth), rel=1e-5)
    if depth > 1:
        before = state(model, IDS, depth - 1, state_seed=7).detach()
        pairs = zip(tokens(last), tokens(before), strict=True)
        moved = [((a - b).norm() / a.norm()).item() for a, b in pairs]
        assert health["loop/residual"] == pytest.approx(sum(moved) / len(moved), rel=1e-4)


def tokens(state_BTD: torch.Tensor) -> torch.Tensor:
    """The state as a list of tokens."""
    return state_BTD.flatten(0, 1)


def test_each_row_has_a_gain_of_its_own_and_the_largest_counts() -> None:
    model = recurrent("llama")
    alone = [loop_health(model, row[None], 3)["loop/gain"] for row in IDS]
    together = loop_health(model, IDS, 3)["loop/gain"]
    assert together == pytest.approx(max(alone), rel=0.1)


def test_a_large_first_token_hides_no_other() -> None:
    # The first token is a thousand times larger and settles; the second doubles what is small,
    # and saturates where a disturbance is sized by the first.
    start = torch.ones(1, 2, WIDTH)
    start[:, 0] *= 1000
    factor = torch.tensor([0.5, 2.0])[None, :, None]
    for dtype, tolerance in ((torch.float32, 1e-2), (torch.bfloat16, 0.1)):

        def iterate(s_BTD: torch.Tensor) -> torch.Tensor:
            return (start + torch.tanh(factor * (s_BTD.float() - start))).to(s_BTD.dtype)

        assert loop_gain(iterate, start.to(dtype)) == pytest.approx(2.0, rel=tolerance)


def test_telemetry_in_bfloat16_is_near_that_in_float32() -> None:
    for family in ("llama", "gemma3_text"):
        full = loop_health(recurrent(family), IDS, 3)
        half = loop_health(recurrent(family).bfloat16(), IDS, 3)
        assert half == pytest.approx(full, rel=0.15)


def test_autocast_does_not_blur_it() -> None:
    model = recurrent("llama")
    plain = loop_health(model, IDS, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert loop_health(model, IDS, 3) == plain


def test_it_leaves_no_trace() -> None:
    model = recurrent("llama")
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    stream = torch.get_rng_state()
    first, again = (loop_health(model, IDS, 3) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


HEALTHY = {
    "loop/state_norm": 100.0,
    "loop/state_growth": 1.1,
    "loop/residual": 0.01,
    "loop/gain": 0.64,
}


def test_a_healthy_loop_raises_no_alarm() -> None:
    assert alarms(HEALTHY, 8) == []
    assert alarms(HEALTHY | {"loop/gain": 1.9, "loop/state_growth": 9.9}, 8) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_overflows_raises_one_alarm(value: float) -> None:
    (alarm,) = alarms(HEALTHY | {"loop/state_norm": value, "loop/gain": math.nan}, 8)
    assert "loop/state_norm, loop/gain" in alarm
    assert "lower optimizer.lr" in alarm


def test_growth_and_gain_raise_an_alarm_each() -> None:
    growth, gain = alarms(HEALTHY | {"loop/state_growth": 12.0, "loop/gain": 2.1}, 8)
    assert "grows 12-fold from r = 1 to 8" in growth
    assert "2.1-fold" in gain


@pytest.mark.parametrize(("depth", "bound"), [(1, 256), (2, 16), (4, 4), (8, 2), (16, 2**0.5)])
def test_the_bound_on_the_gain_is_where_rounding_outgrows_the_state(
    depth: int, bound: float
) -> None:
    assert alarms(HEALTHY | {"loop/gain": bound * 0.99}, depth) == []
    assert len(alarms(HEALTHY | {"loop/gain": bound * 1.01}, depth)) == 1


@torch.no_grad()
def test_a_model_with_a_broken_weight_is_reported_not_hidden() -> None:
    model = recurrent("llama")
    model.model.core[0].mlp.down_proj.weight[0, 0] = math.nan
    (alarm,) = alarms(loop_health(model, IDS, 2), 2)
    assert "not finite" in alarm
