"""The cost formulas against the paper's published accounts and against torch's own counter."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, assert_never

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from rondo.config import Schedule
from rondo.flops import Costs

PAPER: dict[str, Any] = json.loads((Path(__file__).parent / "data/paper_flops.json").read_text())
RETROFITS: dict[str, Any] = PAPER["retrofits"]
TINY = {
    "hidden": 12,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "intermediate": 20,
    "vocab": 30,
    "qk_norm": False,
}
TINY_SHAPE = (1, 3, 2)


# The paper's accounting of whole runs, of which a training counts its own steps only.


def static_train_flops(non_embedding_parameters: int) -> int:
    """Training FLOPs per token of a model without recurrence in the paper's account.

    The paper's count for these models includes the final norm.
    """
    return 6 * non_embedding_parameters


def paper_total_flops(
    costs: Costs,
    mean: int,
    steps: int,
    total_steps: int,
    tokens_per_step: int,
    schedule: Schedule,
    fraction: float,
    window: int = 8,
) -> int:
    """Training FLOPs of the first `steps` steps of a `total_steps` run in the paper's account.

    Args:
        costs: The model.
        mean: Mean recurrence after the curriculum.
        steps: Optimizer steps to account for.
        total_steps: Optimizer steps the curriculum was laid out for.
        tokens_per_step: Tokens per optimizer step, over all ranks and micro-batches.
        schedule: How the mean grows towards `mean`.
        fraction: Part of `total_steps` over which it grows.
        window: Most iterations that carry gradient.
    """
    # The paper rounds the ramp down here and up in training; its totals need its rounding.
    ramp_steps = 0 if schedule == "none" else int(fraction * total_steps)
    flops_per_token = max(0, steps - ramp_steps) * costs.paper_train_flops(mean, window)
    for level in range(1, mean + 1):
        start, end = (_ramp_end(schedule, m, mean, ramp_steps) for m in (level - 1, level))
        steps_at_level = min(end, steps) - min(start, steps)
        flops_per_token += steps_at_level * costs.paper_train_flops(level, window)
    return tokens_per_step * flops_per_token


def _ramp_end(schedule: Schedule, level: int, mean: int, ramp_steps: int) -> int:
    """First step at which the accounted mean exceeds `level`."""
    match schedule:
        case "none":
            return 0
        case "linear":
            return ramp_steps * level // mean
        case "1-sqrt":
            return ramp_steps * (mean**2 - (mean - level) ** 2) // mean**2
        case unknown:
            assert_never(unknown)


def decoder_costs(base: dict[str, Any], shape: tuple[int, int, int], tied: bool = False) -> Costs:
    """Costs of a Llama or OLMo-2 decoder cut into `shape`, with a linear injection."""
    hidden = base["hidden"]
    attention_width = base["heads"] * base["head_dim"]
    kv_width = base["kv_heads"] * base["head_dim"]
    matmul = 2 * hidden * (attention_width + kv_width) + 3 * hidden * base["intermediate"]
    layer = matmul + 2 * hidden + (attention_width + kv_width if base["qk_norm"] else 0)
    prelude, core, coda = shape
    vocab = base["vocab"] * hidden
    return Costs(
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        prelude_parameters=prelude * layer,
        core_parameters=core * layer,
        coda_parameters=coda * layer,
        injection_parameters=2 * hidden**2,
        norm_parameters=hidden,
        embedding_parameters=vocab,
        head_parameters=0 if tied else vocab,
        prelude_matmul=prelude * matmul,
        core_matmul=core * matmul,
        coda_matmul=coda * matmul,
        injection_matmul=2 * hidden**2,
        head_matmul=vocab,
        attention_width=attention_width,
        kv_width=kv_width,
    )


def retrofit_costs(name: str) -> Costs:
    retrofit = RETROFITS[name]
    return decoder_costs(PAPER["base_models"][retrofit["base"]], tuple(retrofit["shape"]))


class Layer(nn.Module):
    """The matrix products of one decoder layer, and nothing else."""

    def __init__(self, base: dict[str, Any]) -> None:
        super().__init__()
        hidden, wide = base["hidden"], base["intermediate"]
        self.head_dim = base["head_dim"]
        self.groups = base["heads"] // base["kv_heads"]
        self.query = nn.Linear(hidden, base["heads"] * self.head_dim, bias=False)
        self.key = nn.Linear(hidden, base["kv_heads"] * self.head_dim, bias=False)
        self.value = nn.Linear(hidden, base["kv_heads"] * self.head_dim, bias=False)
        self.out = nn.Linear(base["heads"] * self.head_dim, hidden, bias=False)
        self.gate = nn.Linear(hidden, wide, bias=False)
        self.up = nn.Linear(hidden, wide, bias=False)
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        key, value = (t.repeat_interleave(self.groups, dim=1) for t in (key, value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.gate(x) * self.up(x))


class Looped(nn.Module):
    """The matrix products of a recurrent model cut into `TINY_SHAPE`."""

    def __init__(self) -> None:
        super().__init__()
        hidden = TINY["hidden"]
        self.embedding = nn.Embedding(TINY["vocab"], hidden)
        self.prelude, self.core, self.coda = (
            nn.Sequential(*(Layer(TINY) for _ in range(count))) for count in TINY_SHAPE
        )
        self.injection = nn.Linear(2 * hidden, hidden, bias=False)
        self.head = nn.Linear(hidden, TINY["vocab"], bias=False)

    def forward(
        self, tokens: torch.Tensor, num_recurrences: int, backprop_depth: int
    ) -> torch.Tensor:
        inputs = self.prelude(self.embedding(tokens))
        state = torch.zeros_like(inputs)
        for iteration in range(num_recurrences):
            with torch.set_grad_enabled(iteration >= num_recurrences - backprop_depth):
                state = self.core(self.injection(torch.cat([state, inputs], dim=-1)))
        return self.head(self.coda(state))


@pytest.mark.parametrize("name", PAPER["base_models"])
def test_hand_built_layers_have_the_base_models_parameters(name: str) -> None:
    base = PAPER["base_models"][name]
    costs = decoder_costs(base, (base["layers"], 1, 0))
    assert costs.core_parameters == base["params_per_layer"]
    assert costs.embedding_parameters == base["params_one_embedding"]
    non_embedding = costs.prelude_parameters + costs.norm_parameters
    assert non_embedding == base["params_non_embedding_incl_final_norm"]


@pytest.mark.parametrize("name", RETROFITS)
def test_parameters_are_the_papers(name: str) -> None:
    costs, facts = retrofit_costs(name), RETROFITS[name]["parameters"]
    assert costs.prelude_parameters == facts["prelude"]
    assert costs.core_parameters == facts["core"]
    assert costs.coda_parameters == facts["coda"]
    assert costs.injection_parameters == facts["adapter"]
    assert costs.norm_parameters == facts["final_norm"]
    assert costs.total_parameters == facts["total"]


@pytest.mark.parametrize("name", RETROFITS)
def test_costs_at_every_recurrence_are_the_papers(name: str) -> None:
    costs, facts = retrofit_costs(name), RETROFITS[name]
    for key, cost in (
        ("effective_parameters", costs.effective_parameters),
        ("forward_flops", costs.paper_forward_flops),
        ("train_flops", costs.paper_train_flops),
        ("kv_bytes", costs.kv_bytes),
    ):
        assert {r: cost(int(r)) for r in facts[key]} == facts[key], key


@pytest.mark.parametrize("row", PAPER["total_flops"], ids=lambda row: f"{row[1]}-{row[2]}-{row[6]}")
def test_published_totals_are_reproduced(row: list[Any]) -> None:
    _, retrofit, mean, schedule, fraction, total_steps, steps, published = row
    total = paper_total_flops(
        retrofit_costs(retrofit),
        mean,
        steps,
        total_steps,
        PAPER["tokens_per_step"],
        schedule,
        fraction,
    )
    assert total == pytest.approx(published, rel=1e-8)


@pytest.mark.parametrize("name", PAPER["totals_at_50000_steps"])
def test_totals_of_whole_runs_are_reproduced(name: str) -> None:
    costs, tokens_per_step = retrofit_costs(name), PAPER["tokens_per_step"]
    for mean, totals in PAPER["totals_at_50000_steps"][name].items():
        if mean == "static":
            base = PAPER["base_models"][RETROFITS[name]["base"]]
            per_token = static_train_flops(base["params_non_embedding_incl_final_norm"])
            assert 50_000 * tokens_per_step * per_token == totals
            continue
        for curriculum, expected in totals.items():
            schedule, _, percent = curriculum.partition("_")
            fraction = int(percent.removesuffix("%") or 0) / 100
            total = paper_total_flops(
                costs, int(mean), 50_000, 50_000, tokens_per_step, schedule, fraction
            )
            assert total == pytest.approx(expected, rel=1e-12), (mean, curriculum)


@pytest.mark.parametrize("schedule", ["none", "linear", "1-sqrt"])
@given(
    mean=st.integers(1, 40),
    total_steps=st.integers(1, 200),
    fraction=st.floats(0, 1),
    window=st.integers(1, 12),
)
def test_accounted_steps_lose_and_invent_none(
    schedule: Any, mean: int, total_steps: int, fraction: float, window: int
) -> None:
    costs = decoder_costs(TINY, TINY_SHAPE)
    totals = [
        paper_total_flops(costs, mean, steps, total_steps, 1, schedule, fraction, window)
        for steps in range(total_steps + 2)
    ]
    per_step = [after - before for before, after in pairwise(totals)]
    levels = [costs.paper_train_flops(m, window) for m in range(1, mean + 1)]
    assert totals[0] == 0
    assert per_step == sorted(per_step)
    assert set(per_step) <= set(levels)
    assert per_step[-1] == levels[-1]


@pytest.mark.parametrize(
    ("num_recurrences", "backprop_depth"), [(1, 1), (1, 4), (3, 3), (5, 2), (6, 1)]
)
def test_executed_flops_are_what_torch_counts(num_recurrences: int, backprop_depth: int) -> None:
    seq_len, batch = 7, 2
    costs = decoder_costs(TINY, TINY_SHAPE)
    model = Looped()
    tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    # The unfused kernel recomputes nothing, so its backward pass is exactly twice its forward.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens, num_recurrences, backprop_depth)
        forward = counter.get_total_flops()
        logits.sum().backward()
    num_tokens = batch * seq_len
    assert forward == num_tokens * costs.forward_flops(num_recurrences, seq_len)
    trained = costs.train_flops(num_recurrences, backprop_depth, seq_len)
    assert counter.get_total_flops() == num_tokens * trained


def test_tying_the_head_saves_parameters_but_no_flops() -> None:
    untied, tied = (decoder_costs(TINY, TINY_SHAPE, tied=tied) for tied in (False, True))
    assert untied.total_parameters - tied.total_parameters == tied.embedding_parameters
    assert untied.forward_flops(4, 16) == tied.forward_flops(4, 16)


def test_depth_and_cache_count_the_core_once_per_iteration() -> None:
    costs = decoder_costs(TINY, TINY_SHAPE)
    assert [costs.effective_depth(r) for r in (1, 2, 5)] == [6, 9, 18]
    assert costs.kv_values(5) == 18 * 2 * 16
    assert costs.kv_bytes(5, bytes_per_value=4) == 2 * costs.kv_bytes(5)
