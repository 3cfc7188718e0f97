"""The pure parts of training: learning rate, roles, budgets, losses, optimizers."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rondo.config import BudgetConfig, OptimizerConfig, RecurrenceConfig, TrainConfig
from rondo.errors import UserError
from rondo.flops import Costs
from rondo.training import losses
from rondo.training.budget import micro_batch, plan_steps, step_flops
from rondo.training.optim import learning_rate_factor, make_optimizers, role, set_learning_rate

COSTS = Costs(2, 2, 2, 100, 100, 100, 0, 4, 50, 50, 90, 90, 90, 10, 50, 8, 4)


@given(
    st.integers(1, 300),
    st.floats(0, 1, allow_nan=False),
    st.floats(0, 1, allow_nan=False),
)
def test_the_learning_rate_is_positive_at_every_step_and_never_above_its_peak(
    total: int, warmup: float, decay: float
) -> None:
    factors = [learning_rate_factor(step, total, warmup, decay) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)


def test_the_learning_rate_warms_up_holds_and_decays() -> None:
    factors = [learning_rate_factor(step, 20, 0.2, 0.3) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:14] == [1.0] * 10
    assert factors[14:] == sorted(factors[14:], reverse=True)
    assert factors[13] > factors[14] > factors[19] > 0


@pytest.mark.parametrize(
    ("name", "shape", "muon", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), True, "muon"),
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), False, "matrix"),
        ("model.layers.0.input_layernorm.weight", (4,), True, "vector"),
        ("model.layers.0.gate.weight", (1, 4), True, "matrix"),
        ("model.embed_tokens.weight", (9, 4), True, "matrix"),
        ("lm_head.weight", (9, 4), True, "matrix"),
        ("model.norm.weight", (4,), True, "vector"),
        ("model.injection.weight", (4, 8), True, "muon"),
        ("model.injection.mixing", (4,), True, "injection"),
    ],
)
def test_each_weight_has_its_role(
    name: str, shape: tuple[int, ...], muon: bool, expected: str
) -> None:
    assert role(name, nn.Parameter(torch.zeros(shape)), muon) == expected


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(9, 4),
                "layers": nn.ModuleList([nn.Linear(4, 4)]),
                "injection": nn.ParameterDict({"mixing": nn.Parameter(torch.zeros(4))}),
            }
        )


def test_every_weight_is_moved_by_one_optimizer() -> None:
    model = _Body()
    optimizers = make_optimizers(model, OptimizerConfig(name="muon", injection_lr_factor=10))
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["Muon", "AdamW"]
    moved = [
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert sorted(moved) == sorted(id(parameter) for parameter in model.parameters())
    set_learning_rate(optimizers, 0.5)
    rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    assert rates == {0.5e-3, 2.5e-5, 2.5e-4}


def test_the_chunked_loss_equals_the_plain_one_with_its_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 5)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 11, bias=False)
    hidden = torch.randn(3, 7, 6, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :3] = -100
    plain = nn.functional.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    expected = torch.autograd.grad(plain, [hidden, head.weight])
    chunked = losses.next_token_loss(hidden, labels, head)
    found = torch.autograd.grad(chunked, [hidden, head.weight])
    torch.testing.assert_close(chunked, plain)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_losses_combine_to_their_weighted_mean() -> None:
    last, shallow = torch.tensor(2.0), torch.tensor(5.0)
    assert losses.combine(last, None, 0.5) == last
    assert losses.combine(last, shallow, 0.5) == pytest.approx(3.0)


def _config(**fields: object) -> TrainConfig:
    return TrainConfig(model="m", seq_len=16, **fields)  # type: ignore[arg-type]


def test_a_micro_batch_is_a_function_of_seed_step_and_micro_step() -> None:
    config = _config(loss="deep", recurrence=RecurrenceConfig(mean=8))
    batches = [micro_batch(config, 64, step, 0, 100) for step in range(50)]
    assert batches == [micro_batch(config, 64, step, 0, 100) for step in range(50)]
    assert batches != [micro_batch(config, 64, step, 1, 100) for step in range(50)]
    other = config.model_copy(update={"seed": 1})
    assert batches != [micro_batch(other, 64, step, 0, 100) for step in range(50)]
    for batch in batches:
        assert batch.shallow is None or 1 <= batch.shallow < batch.depth.num_recurrences


def test_depth_never_exceeds_the_models_cap() -> None:
    config = _config(recurrence=RecurrenceConfig(mean=8, cap=100))
    assert max(micro_batch(config, 5, step, 0, 9).depth.num_recurrences for step in range(99)) == 5


def test_the_static_twin_runs_once() -> None:
    batch = micro_batch(_config(mode="static", loss="deep"), 1, 3, 0, 10)
    assert (batch.depth.num_recurrences, batch.shallow) == (1, None)


@pytest.mark.parametrize("schedule", ["none", "1-sqrt"])
def test_a_flop_budget_is_met_to_within_a_step(schedule: str) -> None:
    recurrence = RecurrenceConfig(mean=4, schedule=schedule)  # type: ignore[arg-type]
    config = _config(recurrence=recurrence, loss="deep", budget=BudgetConfig(flops=3e7))
    total = plan_steps(config, COSTS, 64)
    costs = [step_flops(config, COSTS, 64, step, total) for step in range(total)]
    assert abs(sum(costs) - 3e7) <= max(costs)


def test_other_budgets() -> None:
    assert plan_steps(_config(), COSTS, 64) == 100
    assert plan_steps(_config(budget=BudgetConfig(steps=7)), COSTS, 64) == 7
    assert plan_steps(_config(budget=BudgetConfig(tokens=640)), COSTS, 64) == 10
    with pytest.raises(UserError, match="no finished run"):
        plan_steps(_config(budget=BudgetConfig(like="/nowhere")), COSTS, 64)
    with pytest.raises(UserError, match="given 2 times"):
        BudgetConfig(steps=1, tokens=2)


def test_a_shallower_output_is_paid_for() -> None:
    plain = _config(recurrence=RecurrenceConfig(distribution="fixed", mean=6, backprop_depth=2))
    deep = plain.model_copy(update={"loss": "deep"})
    # Coda and head once more, forward and backward; and whatever of its window lies before the
    # last one's.
    least = 3 * COSTS.finish_flops(16)
    most = least + 2 * 2 * COSTS.iteration_flops(16)
    for step in range(20):
        extra = step_flops(deep, COSTS, 64, step, 20) - step_flops(plain, COSTS, 64, step, 20)
        per_token = extra / (deep.global_batch_size * deep.seq_len)
        assert least <= per_token <= most


def test_costs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        COSTS.core_matmul = 1  # type: ignore[misc]
