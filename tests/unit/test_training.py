"""The pure parts of training: learning rate, roles, budgets, losses, optimizers."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rondo.config import (
    BatchConfig,
    BudgetConfig,
    LossConfig,
    OptimizerConfig,
    RecurrenceConfig,
    TrainConfig,
)
from rondo.errors import UserError
from rondo.flops import Costs
from rondo.training import guard, losses
from rondo.training.budget import (
    paper_step_flops,
    plan_steps,
    step_flops,
    step_plan,
    steps_for,
)
from rondo.training.losses import Hidden
from rondo.training.optim import (
    average,
    averages,
    learning_rate_factor,
    make_optimizers,
    role,
    set_learning_rate,
)
from rondo.training.recurrence import row_seeds, scheduled_seq_len, scheduled_window

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
        ("model.injection.mixing", (4,), True, "loop"),
        ("model.layers.3.mlp.up_proj.delta_down", (2, 4, 4), True, "loop"),
        ("model.layers.3.mlp.up_proj.lora_A.default.weight", (4, 4), True, "matrix"),
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


def test_the_learning_rate_decays_to_its_floor() -> None:
    factors = [learning_rate_factor(step, 20, 0, 0.5, 0.1) for step in range(20)]
    assert factors[:10] == [1.0] * 10
    assert 0.1 < factors[-1] < 0.13
    assert learning_rate_factor(19, 20, 0, 0.5) < 0.03


def test_the_average_follows_the_weights() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    ema = averages(model)
    with torch.no_grad():
        model.weight.add_(1)
    average(ema, model, 0.75)
    torch.testing.assert_close(ema["weight"], before + 0.25)


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


def _plain(
    hidden: Hidden, labels: torch.Tensor, loss: LossConfig, head: nn.Module, parent: nn.Module
) -> torch.Tensor:
    """The definition, with all logits at once."""
    logits = head(hidden.last).flatten(0, 1)
    flat = labels.flatten()
    last = nn.functional.cross_entropy(logits, flat, reduction="sum")
    if hidden.shallow is None:
        return last
    found = head(hidden.shallow).flatten(0, 1)
    shallow = nn.functional.cross_entropy(found, flat, reduction="sum")
    if loss.kind == "deep+distil":
        temperature, keep = loss.temperature, flat != -100
        taught = torch.zeros(())
        teachers = [(loss.distil_weight, logits.detach())]
        if hidden.parent is not None:
            teachers.append((loss.parent_weight, parent(hidden.parent).flatten(0, 1)))
        for weight, teacher in teachers:
            p, q = (teacher / temperature).softmax(-1), (found / temperature).softmax(-1)
            divergence = (p * (p.log() - q.log())).sum(-1)[keep].sum()
            taught = taught + weight * temperature**2 * divergence
        shallow = (1 - loss.distil_weight - loss.parent_weight) * shallow + taught
    return (last + loss.shallow_weight * shallow) / (1 + loss.shallow_weight)


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (LossConfig(), 1),
        (LossConfig(kind="deep", shallow_weight=0.7), 2),
        (LossConfig(kind="deep+distil", distil_weight=0.4, temperature=2), 2),
        (LossConfig(kind="deep+distil", distil_weight=0.4, parent_weight=0.3, temperature=1.5), 3),
    ],
)
def test_the_chunked_losses_equal_the_plain_ones_with_their_gradients(
    loss: LossConfig, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 5)
    torch.manual_seed(0)
    head, parent = nn.Linear(6, 11, bias=False), nn.Linear(6, 11, bias=False)
    tensors = [torch.randn(3, 7, 6, requires_grad=True) for _ in range(given)]
    hidden = Hidden(*tensors)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :3] = -100
    wanted = [*tensors[:2], head.weight]
    plain = _plain(hidden, labels, loss, head, parent)
    expected = torch.autograd.grad(plain, wanted)
    found = losses.chunked_losses(hidden, labels, loss, head, parent)
    torch.testing.assert_close(found.objective, plain)
    for left, right in zip(torch.autograd.grad(found.objective, wanted), expected, strict=True):
        torch.testing.assert_close(left, right)


def test_the_deep_iteration_does_not_learn_from_the_shallow_one() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    student = torch.randn(4, 5, requires_grad=True)
    losses.divergence(logits, student, torch.ones(4, dtype=torch.bool), 1.0).backward()
    assert logits.grad is None
    assert student.grad is not None


def _config(**fields: object) -> TrainConfig:
    return TrainConfig(model="m", batch=BatchConfig(seq_len=16), **fields)  # type: ignore[arg-type]


DEEP = LossConfig(kind="deep")


def test_a_step_is_a_function_of_seed_and_step() -> None:
    config = _config(loss=DEEP, recurrence=RecurrenceConfig(mean=8, draws_per_step=2))
    plans = [step_plan(config, 64, step, 100) for step in range(50)]
    assert plans == [step_plan(config, 64, step, 100) for step in range(50)]
    assert any(plan.draws[0] != plan.draws[1] for plan in plans)
    other = config.model_copy(update={"seed": 1})
    assert plans != [step_plan(other, 64, step, 100) for step in range(50)]
    for draw in (draw for plan in plans for draw in plan.draws):
        assert draw.shallow is None or 1 <= draw.shallow < draw.depth.num_recurrences


def test_the_first_iteration_is_the_shallower_one_where_it_is_asked_for() -> None:
    loss = LossConfig(kind="deep", shallow="first")
    config = _config(loss=loss, recurrence=RecurrenceConfig(mean=8))
    draws = [step_plan(config, 64, step, 100).draws[0] for step in range(50)]
    assert {draw.shallow for draw in draws if draw.depth.num_recurrences > 1} == {1}


def test_depth_never_exceeds_the_models_cap() -> None:
    config = _config(recurrence=RecurrenceConfig(mean=8, cap=100))
    depths = [step_plan(config, 5, step, 9).draws[0].depth for step in range(99)]
    assert max(depth.num_recurrences for depth in depths) == 5


def test_the_static_twin_runs_once() -> None:
    (draw,) = step_plan(_config(mode="static", loss=DEEP), 1, 3, 10).draws
    assert (draw.depth.num_recurrences, draw.shallow) == (1, None)


@given(st.integers(1, 400), st.integers(1, 16), st.floats(0.01, 1))
def test_the_window_grows_from_one_to_its_end(total: int, window: int, fraction: float) -> None:
    found = [scheduled_window(step, total, window, fraction) for step in range(total + 3)]
    assert found == sorted(found)
    assert found[0] >= 1
    assert found[-1] == window


@given(st.integers(1, 400), st.sampled_from([64, 96, 100, 1024]), st.floats(0.01, 1))
def test_sequences_double_up_to_their_length(total: int, length: int, fraction: float) -> None:
    found = [scheduled_seq_len(step, total, length, 16, fraction) for step in range(total + 3)]
    assert found == sorted(found)
    assert found[-1] == length
    assert all(one >= 16 and length % one == 0 for one in found)
    assert {one * 2 for one in found if one < length} <= {*found, *(one * 2 for one in found)}


def test_sequences_begin_short() -> None:
    assert [scheduled_seq_len(step, 8, 64, 16, 0.5) for step in range(8)] == [
        16, 16, 32, 32, 64, 64, 64, 64,
    ]  # fmt: skip


def test_rows_have_seeds_of_their_own() -> None:
    seeds = row_seeds(3, range(5, 9))
    assert len(set(seeds.tolist())) == 4
    assert row_seeds(3, [6]).item() == seeds[1]
    assert not set(row_seeds(4, range(5, 9)).tolist()) & set(seeds.tolist())


@pytest.mark.parametrize("schedule", ["none", "linear", "1-sqrt"])
def test_a_flop_budget_is_met_to_within_a_step(schedule: str) -> None:
    recurrence = RecurrenceConfig(mean=4, schedule=schedule)  # type: ignore[arg-type]
    config = _config(recurrence=recurrence, loss=DEEP, budget=BudgetConfig(flops=3e7))
    total = plan_steps(config, COSTS, 64)
    plans = [step_plan(config, 64, step, total) for step in range(total)]
    costs = [step_flops(config, COSTS, plan) for plan in plans]
    assert abs(sum(costs) - 3e7) <= max(costs)


@given(st.floats(0.1, 1e6), st.floats(0.3, 50), st.floats(0.5, 1.5))
def test_the_search_for_steps_finds_the_nearest(flops: float, each: float, power: float) -> None:
    asked = []

    def spent(total: int) -> float:
        asked.append(total)
        return each * total**power

    found = steps_for(flops, spent)
    distance = [abs(spent(total) - flops) for total in (found - 1, found, found + 1) if total]
    assert min(distance) == abs(spent(found) - flops)
    assert len(asked) < 200


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
    deep = plain.model_copy(update={"loss": DEEP})
    # Coda and head once more, forward and backward; and whatever of its window lies before the
    # last one's.
    least = 3 * COSTS.finish_flops(16)
    most = least + 2 * 2 * COSTS.iteration_flops(16)
    for step in range(20):
        plans = [step_plan(config, 64, step, 20) for config in (deep, plain)]
        costs = [
            step_flops(config, COSTS, plan)
            for config, plan in zip((deep, plain), plans, strict=True)
        ]
        per_token = (costs[0] - costs[1]) / (4 * 16)
        assert least <= per_token <= most
        taught = step_flops(deep, COSTS, plans[0], COSTS) - costs[0]
        assert taught == 4 * 16 * COSTS.forward_flops(1, 16)


def test_short_sequences_save_attention_and_keep_the_tokens() -> None:
    batch = BatchConfig(seq_len=64, seq_schedule="doubling", seq_schedule_start=16)
    config = TrainConfig(model="m", batch=batch)
    first, last = (step_plan(config, 8, step, 10) for step in (0, 9))
    assert (first.seq_len, last.seq_len) == (16, 64)
    per_token = [COSTS.train_flops(*first.draws[0].depth, length) for length in (16, 64)]
    assert step_flops(config, COSTS, first) == per_token[0] * 4 * 64
    assert per_token[0] < per_token[1]


def test_the_papers_account_is_kept_beside() -> None:
    config = _config(recurrence=RecurrenceConfig(mean=12, schedule="none"))
    plan = step_plan(config, 64, 0, 10)
    assert paper_step_flops(config, COSTS, plan) == COSTS.paper_train_flops(12, 8) * 64
    twin = config.model_copy(update={"mode": "static"})
    found = paper_step_flops(twin, COSTS, step_plan(twin, 1, 0, 10))
    assert found == 6 * (300 + 4) * 64


def test_what_a_guard_refuses() -> None:
    calm = [2.0] * guard.WINDOW
    assert guard.refusal(2.1, 1.0, calm, 1.5) is None
    assert guard.refusal(3.1, 1.0, calm, 1.5) == "spike"
    assert guard.refusal(3.1, 1.0, calm, 0) is None
    assert guard.refusal(3.1, 1.0, calm[1:], 1.5) is None
    assert guard.refusal(float("nan"), 1.0, [], 0) == "non-finite"
    assert guard.refusal(2.0, float("inf"), [], 0) == "non-finite"
    assert guard.remembered(calm, 1.0) == [*calm[1:], 1.0]


def test_costs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        COSTS.core_matmul = 1  # type: ignore[misc]
