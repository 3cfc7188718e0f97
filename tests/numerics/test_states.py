"""The loop's states on a text: against plain forward passes, and loops whose ways are known."""

import json
import math
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from tests.conftest import VOCAB, WIDTH, recurrent
from tests.numerics.test_deltas import with_deltas
from torch import Tensor, nn

from rondo.dynamics import loop_gain
from rondo.evaluation import states
from rondo.evaluation.states import behaviour, trace_states
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

DEPTH = 5
STREAM = torch.Generator().manual_seed(3)
TOKENS = [torch.randint(3, VOCAB, (size,), generator=STREAM).tolist() for size in (9, 17, 5, 12)]
MODELS: dict[str, Any] = {
    "input": lambda: recurrent("llama"),
    "zeros, add": lambda: recurrent("olmo2", injection="add", state_init="zeros"),
    "normal, linear": lambda: recurrent("llama", injection="linear", state_init="normal"),
    "sliding, soft cap": lambda: recurrent("gemma3_text"),
    "scaled logits": lambda: recurrent("granite"),
    "deltas": with_deltas,
}
every_model = pytest.mark.parametrize("name", MODELS)


def column(traced: dict[str, Any], key: str) -> list[float]:
    return [row[key] for row in traced["iterations"]]


@torch.no_grad()
def log_probabilities(model: RecurrentForCausalLM, depth: int) -> list[Tensor]:
    """Of each token list, by an ordinary forward pass of its own."""
    return [
        model(torch.tensor([one]), num_recurrences=depth, state_seed=7).logits[0].log_softmax(-1)
        for one in TOKENS
    ]


@every_model
def test_each_iteration_says_what_the_model_says_at_that_depth(name: str) -> None:
    model = MODELS[name]()
    traced = trace_states(model, TOKENS, DEPTH, state_seed=7)
    last = torch.cat(log_probabilities(model, DEPTH))
    for depth in range(1, DEPTH + 1):
        said = log_probabilities(model, depth)
        losses = [
            nn.functional.nll_loss(one[:-1], torch.tensor(tokens[1:]), reduction="none")
            for one, tokens in zip(said, TOKENS, strict=True)
        ]
        own = torch.cat(said)
        row = traced["iterations"][depth - 1]
        assert row["iteration"] == depth
        assert row["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
        divergence = (last.exp() * (last - own)).sum(-1).mean()
        assert row["kl_to_last"] == pytest.approx(float(divergence), abs=1e-5)
        assert row["entropy"] == pytest.approx(float(-(own.exp() * own).sum(-1).mean()), abs=1e-5)
        same = own.argmax(-1) == last.argmax(-1)
        assert row["agreement"] == pytest.approx(float(same.float().mean()))
    assert traced["tokens"] == sum(map(len, TOKENS))
    # Else agreement and divergence above were told apart from nothing.
    assert column(traced, "agreement")[0] < 1
    assert column(traced, "kl_to_last")[0] > 0.01


@every_model
def test_movements_are_those_between_ordinary_forward_passes(name: str) -> None:
    model = MODELS[name]()
    traced = trace_states(model, TOKENS, DEPTH, state_seed=7)
    with torch.no_grad():
        found = [
            torch.cat(
                [
                    model.model(torch.tensor([one]), num_recurrences=r, state_seed=7).state[0]
                    for one in TOKENS
                ]
            )
            for r in range(1, DEPTH + 1)
        ]
    for depth in range(2, DEPTH + 1):
        row, now, before = traced["iterations"][depth - 1], found[depth - 1], found[depth - 2]
        norms = now.norm(dim=-1)
        assert row["state_norm"] == pytest.approx(float((norms / WIDTH**0.5).median()), rel=1e-4)
        step = ((now - before).norm(dim=-1) / norms).mean()
        assert row["step"] == pytest.approx(float(step), rel=1e-4)
        cosine = ((now * before).sum(-1) / norms / before.norm(dim=-1)).mean()
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-4)


@torch.no_grad()
def test_movements_are_aligned_by_the_cosines_of_all_their_pairs_but_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[Any] = []
    monkeypatch.setattr(states, "behaviour", lambda *given: judged.append(given) or "settles")
    model = recurrent("llama", state_init="normal")
    trace_states(model, TOKENS, DEPTH, state_seed=7, batch_size=2)
    cosines = []
    for one in TOKENS:
        path = [
            model.model(torch.tensor([one]), num_recurrences=r, state_seed=7).state[0]
            for r in range(1, DEPTH + 1)
        ]
        moves = [now - before for before, now in pairwise(path)]
        pairs = [nn.functional.cosine_similarity(a, b) for a, b in combinations(moves, 2)]
        cosines.append(torch.stack(pairs).mean(0))
    assert judged[0][2] == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-4)


@every_model
def test_padding_and_batches_change_nothing(name: str) -> None:
    model = MODELS[name]()
    padded, alone = (trace_states(model, TOKENS, DEPTH, batch_size=size) for size in (8, 1))
    assert padded["behaviour"] == alone["behaviour"]
    # An estimate: another shape has another random start.
    assert padded["gain"] == pytest.approx(alone["gain"], rel=0.2)
    for key in alone["iterations"][0]:
        assert column(padded, key) == pytest.approx(column(alone, key), rel=1e-4, abs=1e-5)


def test_a_disturbance_of_padding_is_none() -> None:
    # The padding sees the tokens and itself, and would have the largest gain of all.
    weights = torch.tensor([[0.5, 0.0, 0.0], [0.1, 0.5, 0.0], [8.0, 8.0, 8.0]])
    mask, start = torch.tensor([[1, 1, 0]]), torch.ones(1, 3, WIDTH)

    def iterate(s_BTD: Tensor) -> Tensor:
        return start + weights @ (s_BTD - start)

    assert loop_gain(iterate, start) == pytest.approx(8.0, rel=1e-2)
    assert loop_gain(iterate, start, mask) == pytest.approx(0.5, rel=0.1)


def test_the_last_iteration_agrees_with_itself_exactly() -> None:
    traced = trace_states(recurrent("llama"), TOKENS, DEPTH)
    assert column(traced, "kl_to_last")[-1] == 0
    assert column(traced, "agreement")[-1] == 1


def test_logits_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = recurrent("llama")
    whole = trace_states(model, TOKENS, DEPTH)
    monkeypatch.setattr(states, "LOGITS_AT_ONCE", 3 * VOCAB)
    pieces = trace_states(model, TOKENS, DEPTH)
    for key in whole["iterations"][0]:
        assert column(pieces, key) == pytest.approx(column(whole, key), rel=1e-5, abs=1e-6)


@torch.no_grad()
def linear_loop(mixing: float, **fields: Any) -> RecurrentForCausalLM:
    """A model whose core adds nothing: its loop is s -> e + mixing (s - e), or s -> s + e."""
    model = recurrent("llama", **fields)
    for layer in model.model.core:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.injection.initialize(mixing)
    return model


def test_a_loop_that_forgets_its_state_settles_at_once() -> None:
    model = recurrent("llama", state_init="normal")
    model.model.injection.initialize(0.0)
    traced = trace_states(model, TOKENS, DEPTH)
    assert column(traced, "step")[0] > 0.1
    assert column(traced, "step")[1:] == [0.0] * (DEPTH - 1)
    assert column(traced, "cosine")[1:] == pytest.approx([1.0] * (DEPTH - 1))
    assert column(traced, "kl_to_last") == [0.0] * DEPTH
    assert traced["gain"] == 0
    assert traced["behaviour"] == "settles"


@pytest.mark.parametrize(
    ("word", "model"),
    [
        ("settles", lambda: linear_loop(0.5, state_init="normal")),
        ("orbits", lambda: linear_loop(-1.0, state_init="normal")),
        ("drifts", lambda: linear_loop(0.0, state_init="zeros", injection="add")),
        ("diverges", lambda: linear_loop(1.5, state_init="normal")),
    ],
)
def test_a_loop_whose_way_is_known_has_the_word_for_it(word: str, model: Any) -> None:
    traced = trace_states(model(), TOKENS, 8)
    assert traced["behaviour"] == word


def test_a_circle_in_state_space_is_no_drift() -> None:
    # Each pair of channels turns by 40 degrees about its own origin.
    model = linear_loop(0.0, injection="linear", state_init="normal")
    angle = math.radians(40)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    with torch.no_grad():
        model.model.injection.weight.zero_()
        model.model.injection.weight[:, :WIDTH] = torch.block_diag(*[turn] * (WIDTH // 2))
    traced = trace_states(model, TOKENS, 8)
    assert column(traced, "cosine") == pytest.approx([math.cos(angle)] * 8, abs=1e-4)
    assert traced["gain"] == pytest.approx(1.0, rel=1e-2)
    assert traced["behaviour"] == "orbits"


def test_a_loop_that_forgets_nothing_drifts_by_equal_movements() -> None:
    # s_i = i e: the i-th step is 1 / i of the state, and the norm grows by as much each time.
    traced = trace_states(linear_loop(0.0, state_init="zeros", injection="add"), TOKENS, 6)
    assert column(traced, "step") == pytest.approx([1 / i for i in range(1, 7)], rel=1e-4)
    norms = column(traced, "state_norm")
    assert norms == pytest.approx([i * norms[0] for i in range(1, 7)], rel=1e-4)


def judged(path: list[list[float]], gain: float = 1.0) -> str:
    """The word for the way of a single state through the given points."""
    points = torch.tensor(path, dtype=torch.float64)
    movements = points[1:] - points[:-1]
    norms, lengths = points[1:].norm(dim=-1), movements.norm(dim=-1)
    directions = [one / length for one, length in zip(movements[1:], lengths[1:], strict=True)]
    cosines = [float(one @ other) for one, other in combinations(directions, 2)]
    alignment = sum(cosines) / max(1, len(cosines))
    return behaviour((lengths / norms).tolist(), norms.tolist(), alignment, gain)


def circle(degrees: float, number: int = 13) -> list[list[float]]:
    angles = [math.radians(degrees * i) for i in range(number)]
    return [[math.cos(angle), math.sin(angle)] for angle in angles]


def spiral(rate: float, number: int = 13) -> list[list[float]]:
    """Points around (1, 0) whose distance from it changes by a factor each time."""
    return [[1 + 0.3 * rate**i * math.cos(i), 0.3 * rate**i * math.sin(i)] for i in range(number)]


@pytest.mark.parametrize(
    ("word", "path"),
    [
        ("settles", spiral(0.8)),
        ("settles", [[1 + 0.002 * i, 0] for i in range(9)]),
        ("orbits", spiral(1.0)),
        ("orbits", circle(90)),
        ("orbits", circle(30)),
        ("orbits", circle(180)),
        ("drifts", [[1.0, 0.1 * i] for i in range(9)]),
        ("diverges", spiral(1.3)),
        ("unclear", spiral(0.5, 3)),
    ],
)
def test_ways_in_the_plane(word: str, path: list[list[float]]) -> None:
    assert judged(path) == word


def test_a_slow_fall_settles_only_where_disturbances_die_out() -> None:
    assert judged(spiral(0.93), gain=0.93) == "settles"
    assert judged(spiral(0.93), gain=1.2) == "orbits"


def test_the_way_to_the_first_state_is_not_the_loops_doing() -> None:
    assert judged([[40.0, 0], *circle(90)]) == "orbits"


def test_a_number_that_is_none_diverges() -> None:
    fine, broken = [0.001] * 6, [*[0.001] * 5, math.nan]
    assert behaviour(fine, fine, 0.0, 0.5) == "settles"
    assert behaviour(broken, fine, 0.0, 0.5) == "diverges"
    assert behaviour(fine, broken, 0.0, 0.5) == "diverges"
    assert behaviour(fine, fine, math.nan, 0.5) == "diverges"
    assert behaviour(fine, fine, 0.0, math.inf) == "diverges"


@torch.no_grad()
def test_a_broken_weight_gives_nulls_that_json_can_hold() -> None:
    model = recurrent("llama")
    model.model.core[0].mlp.down_proj.weight[0, 0] = math.nan
    traced = trace_states(model, TOKENS, 3)
    assert traced["behaviour"] == "diverges"
    assert traced["gain"] is None
    assert traced["iterations"][0]["loss"] is None
    json.dumps(traced, allow_nan=False)
