"""What the exit gate learns from, against the model's own answers, and what learning it costs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import VOCAB, recurrent
from rondo.data import Rows
from rondo.flops import costs_of
from rondo.modeling.exits_recurrent import kl
from rondo.training import gate
from rondo.training.budget import Draw
from rondo.training.objective import Objective
from rondo.training.recurrence import Depth

R = 4
TOKENS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS[:, 1:].masked_fill(torch.arange(11) < 3, -100)
ROWS = Rows(TOKENS[:, :-1], LABELS, None)
COUNTED = LABELS != -100
SEEDS = torch.tensor([5, 6])


def gated(family: str = "llama", seed: int | None = 1, **fields: Any) -> Any:
    """A model with a gate, off its start unless the seed is None, and all else frozen."""
    model = recurrent(family, **fields)
    gate.fit_exits(model, True)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.model.exit_gate.parameters():
            nn.init.normal_(parameter, 0, 0.3, generator)
    return model


def found(model: Any, rows: Rows = ROWS) -> gate.Examples:
    return gate.examples(model, rows, R, SEEDS, model.logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere2"])
def test_the_examples_are_the_divergences_of_the_models_own_answers(family: str) -> None:
    model = gated(family, injection="linear", state_init="normal")
    examples = found(model)
    with torch.no_grad():
        answers = [
            model(ROWS.input_ids, num_recurrences=r, state_seed=SEEDS) for r in range(1, R + 1)
        ]
        states = [
            model.model(ROWS.input_ids, num_recurrences=r, state_seed=SEEDS).state
            for r in range(1, R)
        ]
    for index in range(R - 1):
        expected = kl(answers[index].logits[COUNTED], answers[-1].logits[COUNTED])
        torch.testing.assert_close(examples.divergences[index], expected, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(examples.states[index + 1], states[index][COUNTED])
    assert float(examples.divergences.mean()) > 1e-3


def test_documents_of_a_row_do_not_see_each_other() -> None:
    model = gated()
    positions = torch.cat([torch.arange(6), torch.arange(5)]).expand(2, -1)
    apart = found(model, replace(ROWS, position_ids=positions))
    second = Rows(ROWS.input_ids[:, 6:], LABELS[:, 6:], None)
    alone = found(model, second)
    where = COUNTED.nonzero()[:, 1] >= 6
    torch.testing.assert_close(apart.divergences[:, where], alone.divergences, rtol=1e-3, atol=1e-5)


def test_chunks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated()
    whole = found(model).divergences
    monkeypatch.setattr(gate, "CHUNK_TOKENS", 5)
    torch.testing.assert_close(found(model).divergences, whole)


def test_rows_without_a_token_that_counts_add_nothing() -> None:
    model = gated()
    nothing = found(model, replace(ROWS, labels=torch.full_like(LABELS, -100)))
    losses = gate.minimised(model.model.exit_gate, nothing)
    losses.objective.backward()
    assert float(losses.objective.detach()) == 0


def test_the_loss_is_hubers_of_the_logarithm_and_moves_the_gate_alone() -> None:
    model = gated()
    objective = Objective(model, True, gated=True)
    losses = objective("minimised", ROWS, Draw(Depth(R, 0), None), SEEDS)
    losses.objective.backward()
    examples, by_hand = found(model), 0.0
    for index in range(R - 1):
        expected = model.model.exit_gate(examples.states[index + 1], examples.states[index])
        gap = (expected - examples.divergences[index].log()).detach().abs()
        by_hand += float(torch.where(gap < 1, gap**2 / 2, gap - 0.5).sum()) / (R - 1)
    assert float(losses.objective.detach()) == pytest.approx(by_hand, rel=1e-5)
    moved = {name for name, one in model.named_parameters() if one.grad is not None}
    assert moved == {f"model.exit_gate.{name}" for name in model.model.exit_gate.state_dict()}
    assert moved == {name for name, one in model.named_parameters() if one.requires_grad}
    assert all(float(one.grad.abs().sum()) > 0 for one in model.model.exit_gate.parameters())


@torch.no_grad()
def test_what_is_measured_adds_up_over_micro_batches() -> None:
    model = gated()
    objective = Objective(model, True, gated=True)
    each = [objective("gauged", ROWS.take([row]), R, SEEDS[row : row + 1]) for row in (0, 1)]
    sums = [float(one + other) for one, other in zip(*each, strict=True)]
    row = gate.summary(sums, float(COUNTED.sum()))
    expected, true = gate.pairs(model.model.exit_gate, found(model))
    pearson = torch.corrcoef(torch.stack([expected.flatten(), true.flatten()]))[0, 1]
    assert row["val/gate_correlation"] == pytest.approx(float(pearson), abs=1e-4)
    assert abs(row["val/gate_correlation"]) > 0.05
    loss = nn.functional.huber_loss(expected, true)
    assert row["val/gate_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_a_gate_that_expects_the_same_of_everything_has_no_correlation() -> None:
    model = gated(seed=None)
    with torch.no_grad():
        sums = [float(one) for one in gate.measured(model.model.exit_gate, found(model))]
    assert gate.summary(sums, float(COUNTED.sum()))["val/gate_correlation"] == 0


def test_a_gate_learns_to_tell_near_from_far() -> None:
    model = gated(seed=None)
    examples, learned = found(model), model.model.exit_gate
    optimizer = torch.optim.AdamW(learned.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = gate.minimised(learned, examples).objective / COUNTED.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    with torch.no_grad():
        sums = [float(one) for one in gate.measured(learned, examples)]
    assert gate.summary(sums, float(COUNTED.sum()))["val/gate_correlation"] > 0.7


def test_a_new_gate_lets_nothing_go_and_an_old_one_is_kept() -> None:
    model = gated(seed=None)
    assert model.config.exit_gate
    assert all(float(one.detach().abs().sum()) == 0 for one in model.model.exit_gate.parameters())
    older = gated(seed=3)
    before = {name: one.clone() for name, one in older.state_dict().items()}
    gate.fit_exits(older, True)
    assert all(torch.equal(one, before[name]) for name, one in older.state_dict().items())


def test_new_weights_leave_no_gate_and_no_thresholds_behind() -> None:
    model = gated()
    model.config.exit_rules = {"kl": {"0.5%": {}}, "gate": {"0.5%": {}}}
    gate.fit_exits(model, True)
    assert model.config.exit_rules == {"kl": {"0.5%": {}}}
    gate.fit_exits(model, False)
    assert (model.config.exit_gate, model.config.exit_rules) == (False, None)
    assert not any("exit_gate" in name for name in model.state_dict())


def test_the_gates_parameters_are_counted() -> None:
    model = gated(family="qwen3")
    assert costs_of(model).total_parameters == sum(one.numel() for one in model.parameters())
    assert costs_of(model).gate_parameters == model.config.hidden_size + 2


def test_its_training_costs_what_is_counted() -> None:
    model, rows = gated(), replace(ROWS, labels=TOKENS[:, 1:])
    objective = Objective(model, True, gated=True)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        losses = objective("minimised", rows, Draw(Depth(R, 0), None), SEEDS)
        losses.objective.backward()
    length = rows.input_ids.shape[1]
    counted = costs_of(model).gate_train_flops(R, length) * rows.input_ids.numel()
    assert counter.get_total_flops() == counted
