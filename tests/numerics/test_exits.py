"""Exits: what the rules say, who takes part in an iteration, and what is reported of it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.numerics.test_cache_policies import IDS, PADDING, assert_as_plain, feed, small
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, GenerationMixin
from transformers.generation.streamers import BaseStreamer

from conftest import RULES, THRESHOLDS
from rondo.modeling.cache_recurrent import CACHE_POLICIES, RecurrentCache
from rondo.modeling.exits_recurrent import (
    CRITERIA,
    ExitGate,
    ExitRule,
    entropy,
    kl,
    margin,
    state_distance,
)
from rondo.modeling.inputs_recurrent import LayerInputs, Selection
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

DEPTH = 5

each_criterion = pytest.mark.parametrize("name", CRITERIA)
each_policy = pytest.mark.parametrize("policy", CACHE_POLICIES)


@pytest.fixture(autouse=True)
def _without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- the criteria as functions


def distributions(count: int, size: int = 7) -> Tensor:
    return 3 * torch.randn(count, size, generator=torch.Generator().manual_seed(5))


def test_criteria_are_their_formulas() -> None:
    logits, before = distributions(20), distributions(20).flip(0)
    for row in range(20):
        total = sum(math.exp(one) for one in logits[row].tolist())
        p = [math.exp(one) / total for one in logits[row].tolist()]
        total = sum(math.exp(one) for one in before[row].tolist())
        q = [math.exp(one) / total for one in before[row].tolist()]
        divergence = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        assert float(kl(logits, before)[row]) == pytest.approx(divergence, abs=1e-5)
        spread = -sum(a * math.log(a) for a in p)
        assert float(entropy(logits)[row]) == pytest.approx(spread, abs=1e-5)
        second, first = sorted(p)[-2:]
        assert float(margin(logits)[row]) == pytest.approx(1 - (first - second), abs=1e-6)
        moved = math.dist(logits[row].tolist(), before[row].tolist())
        relative = moved / math.hypot(*logits[row].tolist())
        assert float(state_distance(logits, before)[row]) == pytest.approx(relative, rel=1e-5)


def test_criteria_at_their_ends() -> None:
    alike = distributions(4)
    assert kl(alike, alike).tolist() == state_distance(alike, alike).tolist() == [0.0] * 4
    # Nearly alike: rounding must not make a divergence negative, which is below any threshold.
    wide = torch.randn(500, 300, generator=torch.Generator().manual_seed(1))
    assert (kl(wide, wide + 1e-6 * wide.flip(0)) >= 0).all()
    sure = torch.tensor([[0.0, 1e4, 0.0]])
    assert float(entropy(sure)) == float(margin(sure)) == 0
    flat = torch.zeros(1, 8)
    assert float(entropy(flat)) == pytest.approx(math.log(8))
    assert float(margin(flat)) == 1
    nothing = torch.zeros(1, 8)
    assert float(state_distance(nothing, nothing)) == 0


def test_criteria_of_bfloat16_are_taken_in_single_precision() -> None:
    now = distributions(50, 40).bfloat16()
    before = (now.float() + 0.05 * distributions(50, 40).flip(0)).bfloat16()
    assert torch.equal(kl(now, before), kl(now.float(), before.float()))
    assert torch.equal(entropy(now), entropy(now.float()))
    assert torch.equal(state_distance(now, before), state_distance(now.float(), before.float()))


def test_a_gate_that_is_new_expects_a_nat_of_everything() -> None:
    model = small(gate=True)
    gate = ExitGate(model.config)
    gate.initialize()
    assert gate(torch.randn(2, 3, 32), torch.randn(2, 3, 32)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("floor", "every", "expected"),
    [(1, 1, [1, 2, 3, 4, 5, 6, 7]), (3, 1, [3, 4, 5, 6, 7]), (2, 3, [2, 5]), (1, 2, [1, 3, 5, 7])],
)
def test_checks_are_due_from_the_floor_on_at_an_interval(
    floor: int, every: int, expected: list[int]
) -> None:
    rule = ExitRule("kl", 0.1, floor, every)
    assert [one for one in range(1, 8) if rule.due(one)] == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("speed", 0.1), "criterion must be one of"),
        (("kl", -0.1), "must not be negative"),
        (("kl", math.nan), "must not be negative"),
        (("kl", 0.1, 0), "at least 1, got 0 and 1"),
        (("kl", 0.1, 1, 0), "at least 1, got 1 and 0"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitRule(*fields)


# ---- rules in the loop


@each_criterion
@pytest.mark.parametrize("policy", ["full", "ragged"])
def test_every_rule_of_a_padded_batch_is_its_definition_row_by_row(name: str, policy: str) -> None:
    left = assert_as_plain(small(gate=True), policy, [(DEPTH, 3, 4)] * 3, RULES[name])
    assert len(set(left)) >= 3


@pytest.mark.parametrize("name", ["kl", "argmax_stable"])
@pytest.mark.parametrize("policy", ["full", "recompute"])
def test_floors_and_intervals_are_kept(name: str, policy: str) -> None:
    rule = ExitRule(name, THRESHOLDS[name] * 1.3, min_recurrences=3, check_every=2)
    left = assert_as_plain(small(), policy, [8] * 3, rule)
    assert set(left) <= {3, 5, 7, 8}
    assert len(set(left)) >= 2


@pytest.mark.parametrize("name", ["margin", "gate"])
def test_rules_are_their_definition_in_a_family_whose_layers_differ(name: str) -> None:
    threshold = {"margin": 0.994, "gate": 0.8}[name]
    model = small("gemma3_text", gate=True)
    left = assert_as_plain(model, "ragged", [DEPTH] * 3, ExitRule(name, threshold))
    assert len(set(left)) >= 3


def run(
    model: RecurrentForCausalLM, policy: str, rule: ExitRule | None, depth: int = DEPTH
) -> tuple[Tensor, RecurrentCache]:
    """Logits of a prompt and of three tokens after it, and the cache."""
    cache = RecurrentCache(model.config, policy)
    parts = [feed(model, cache, IDS[:, :b], PADDING, depth, rule) for b in (8, 9, 10, 11)]
    return torch.cat(parts, 1), cache


def real(x: Tensor) -> Tensor:
    """What belongs to no padding, (N, ...)."""
    return x[torch.arange(x.shape[1]) >= torch.tensor(PADDING)[:, None]]


@each_criterion
@each_policy
def test_a_threshold_of_nothing_is_the_full_depth(name: str, policy: str) -> None:
    model = small(gate=True)
    found, cache = run(model, policy, ExitRule(name, 0.0))
    expected, _ = run(model, policy, None)
    torch.testing.assert_close(real(found), real(expected), rtol=0, atol=1e-12)
    assert (real(cache.recurrences) == DEPTH).all()
    assert (real(cache.executed) == DEPTH).all()


@each_criterion
def test_a_higher_threshold_never_keeps_a_token_longer(name: str) -> None:
    model, middle = small(gate=True), THRESHOLDS[name]
    thresholds = [0.0, 0.5 * middle, 0.97 * middle, middle, 1.03 * middle, 2 * middle, 1e4]
    deep, first = [], []
    for threshold in thresholds:
        rule = ExitRule(name, threshold, min_recurrences=1)
        # Under full what a token reads does not depend on when others leave.
        deep.append(real(run(model, "full", rule)[1].recurrences))
        alone = RecurrentCache(model.config, "ragged")
        feed(model, alone, IDS[:, :1], (0, 0, 0), DEPTH, rule)
        first.append(alone.recurrences)
    for counts in (deep, first):
        for less, more in pairwise(counts):
            assert (more <= less).all()
    assert len({tuple(one.tolist()) for one in deep}) >= 3
    assert (deep[-1] == (2 if name == "kl" else 1)).all()


def test_a_divergence_needs_two_checks() -> None:
    for rule, soonest in ((ExitRule("kl", 1e9), 2), (ExitRule("kl", 1e9, 2, 2), 4)):
        for policy in ("full", "ragged"):
            _, cache = run(small(), policy, rule)
            assert (real(cache.recurrences) == soonest).all()


@pytest.mark.parametrize("agreeing", [1, 2, 3])
def test_a_best_token_must_be_stable_for_the_checks_that_are_asked_for(agreeing: int) -> None:
    model = small()
    rule = ExitRule("argmax_stable", 1 / agreeing, min_recurrences=1)
    _, cache = run(model, "full", rule, 8)
    best = []
    for depth in range(1, 9):
        best.append(real(run(model, "full", None, depth)[0].argmax(-1)))
    # In a prompt, a check sees the tokens before at that depth; there alone the ways are equal.
    left = real(cache.recurrences).tolist()
    for token, depth in enumerate(left[: 8 - PADDING[0]]):
        said = [int(one[token]) for one in best]
        stable = [len({*said[last - agreeing - 1 : last]}) == 1 for last in range(1, 9)]
        stable[:agreeing] = [False] * agreeing
        assert depth == next((n for n, one in enumerate(stable, 1) if one), 8)


# ---- who takes part


class Counter:
    """Notes rows and tokens of every pass of every layer."""

    def __init__(self, model: RecurrentForCausalLM) -> None:
        self.seen: list[list[tuple[int, int]]] = [[] for _ in model.model.layers]
        for seen, layer in zip(self.seen, model.model.layers, strict=True):
            layer.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(tuple(args[0].shape[:2]))
            )

    def clear(self) -> None:
        for seen in self.seen:
            seen.clear()


def expected_passes(executed: Tensor) -> list[tuple[int, int]]:
    """Rows that still have a token, and the most that one of them has, by iteration."""
    passes = []
    for iteration in range(1, int(executed.max()) + 1):
        going = (executed >= iteration).sum(1)
        passes.append((int((going > 0).sum()), int(going.max())))
    return passes


@pytest.mark.parametrize("name", ["kl", "state_distance"])
@pytest.mark.parametrize("policy", ["ragged", "last", "recompute"])
def test_who_has_left_takes_no_part(name: str, policy: str) -> None:
    model = small()
    rule, cache, counter = RULES[name], RecurrentCache(model.config, policy), Counter(model)
    rows, most, extra = set(), set(), 0
    for start, stop in ((0, 8), (8, 9), (9, 10), (10, 11)):
        counter.clear()
        feed(model, cache, IDS[:, :stop], PADDING, 8, rule)
        new = cache.executed[:, start:]
        assert torch.equal(new, cache.recurrences[:, start:])
        passes = expected_passes(new)
        rows |= {one for one, _ in passes}
        most |= {one for _, one in passes}
        before, *core, after = counter.seen
        assert before == [(3, stop - start)]
        if policy != "recompute":  # which also projects the keys of tokens that leave
            assert core == [passes] * 2
        if name == "state_distance":
            assert after == [(3, stop - start)]
        elif stop - start == 1:  # each check is one pass of those who are still there
            assert after == passes
            extra += sum(one for one, _ in after) - 3
        else:
            # No check sees the last iteration of the cap; then all are answered.
            assert after == [*passes[:7], (3, 8)]
            extra += int(new.clamp(max=7).sum())
    assert cache.num_checks == extra
    assert len(rows) >= 2
    assert len(most) >= 3


def test_policy_full_runs_all_and_says_so() -> None:
    model = small()
    counter = Counter(model)
    _, cache = run(model, "full", RULES["state_distance"])
    assert counter.seen[1] == [(3, 8)] * DEPTH + 3 * [(3, 1)] * DEPTH
    assert (real(cache.executed) == DEPTH).all()
    assert len(real(cache.recurrences).unique()) >= 3


def test_padding_runs_no_iteration_and_is_reported_as_none() -> None:
    _, cache = run(small(), "ragged", RULES["kl"])
    for row, padding in enumerate(PADDING):
        for noted in (cache.recurrences, cache.executed):
            assert (noted[row, :padding] == 0).all()
            assert (noted[row, padding:] >= 1).all()
    _, cache = run(small(), "full", None)
    assert (cache.recurrences[2, : PADDING[2]] == 0).all()


def test_checks_of_padding_are_not_counted_in_a_call_of_one_token() -> None:
    model, singly = small(), 0
    cache = RecurrentCache(model.config, "ragged")
    for stop in range(1, 8):
        feed(model, cache, IDS[:, :stop], PADDING, DEPTH, RULES["kl"])
    for row, padding in enumerate(PADDING):
        alone = RecurrentCache(model.config, "ragged")
        for stop in range(1, 8 - padding):
            ids = IDS[row : row + 1, padding:7]
            feed(model, alone, ids[:, :stop], (0,), DEPTH, RULES["kl"])
        singly += alone.num_checks
    assert cache.num_checks == singly


# ---- generate


def prompts(length: int = 8) -> dict[str, Tensor]:
    ids = IDS[:, :length]
    mask = (torch.arange(length) >= torch.tensor(PADDING)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("caps", [DEPTH, (DEPTH, 2, 4)], ids=["one cap", "caps by row"])
def test_generating_a_batch_is_generating_each_row(name: str, caps: int | Sequence[int]) -> None:
    model, new = small(gate=True), {"max_new_tokens": 5, "eos_token_id": None}
    how: dict[str, Any] = {"exit": RULES[name], "return_dict_in_generate": True, **new}
    both = model.generate(**prompts(), num_recurrences=caps, **how)
    assert both.recurrences.shape == (3, 5)
    for row, padding in enumerate(PADDING):
        own = caps if isinstance(caps, int) else caps[row]
        ids = IDS[row : row + 1, padding:8]
        alone = model.generate(ids, num_recurrences=own, **how)
        assert torch.equal(both.sequences[row, 8:], alone.sequences[0, 8 - padding :])
        assert torch.equal(both.recurrences[row], alone.recurrences[0])
    assert len(both.recurrences.unique()) >= 2


def test_each_new_token_is_reported_with_the_iterations_that_made_it() -> None:
    model, rule = small(), RULES["kl"]
    how = {"exit": rule, "num_recurrences": DEPTH, "max_new_tokens": 5, "eos_token_id": None}
    found = model.generate(IDS[:1, :8], return_dict_in_generate=True, **how)
    cache, made = RecurrentCache(model.config, "ragged"), []
    for stop in range(8, 13):
        said = feed(model, cache, found.sequences[:, :stop], (0,), DEPTH, rule)
        assert int(said[0, -1].argmax()) == int(found.sequences[0, stop])
        made.append(int(cache.recurrences[0, -1]))
    assert found.recurrences[0].tolist() == made


BEAMS = [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}]


@pytest.mark.parametrize("beams", BEAMS, ids=["greedy", "beam", "several beams"])
def test_beam_search_with_exits_finds_what_it_finds_without_a_cache(beams: Any) -> None:
    """A rule of the state alone reads a token alike in a prompt and in decoding."""
    model, rule = small(), RULES["state_distance"]
    how = {"num_recurrences": DEPTH, "max_new_tokens": 6, **prompts(), **beams}
    cached = model.generate(**how, exit=rule)
    # The library's own, which makes no cache by itself: each step reads the whole text anew.
    anew = GenerationMixin.generate(model, **how, exit=rule, use_cache=False)
    assert torch.equal(anew, cached)
    assert not torch.equal(model.generate(**how), cached)


@pytest.mark.parametrize("beams", BEAMS, ids=["greedy", "beam", "several beams"])
def test_generating_without_a_cache_is_generating_with_one(beams: Any) -> None:
    how = {"exit": RULES["state_distance"], "num_recurrences": DEPTH, "max_new_tokens": 6}
    cached = small().generate(**prompts(), **how, **beams)
    assert torch.equal(small().generate(**prompts(), **how, **beams, use_cache=False), cached)


def test_sampling_with_a_seed_is_repeatable_and_streams_what_it_returns() -> None:
    class Listener(BaseStreamer):
        heard: list[int] = []  # noqa: RUF012

        def put(self, value: Tensor) -> None:
            self.heard += value.flatten().tolist()

        def end(self) -> None:
            self.heard.append(-1)

    model, found = small(), []
    how = {"exit": RULES["kl"], "num_recurrences": DEPTH, "do_sample": True, "max_new_tokens": 6}
    for _ in range(2):
        torch.manual_seed(3)
        found.append(model.generate(IDS[:1], streamer=Listener(), **how))
    assert torch.equal(*found)
    assert Listener.heard == [*found[0][0].tolist(), -1] * 2
    torch.manual_seed(4)
    assert not torch.equal(model.generate(IDS[:1], **how), found[0])


# ---- refusals


def test_a_cache_of_the_library_is_refused() -> None:
    model, rule = small(), RULES["kl"]
    for call, limit in ((model, {}), (model.generate, {"max_new_tokens": 2})):
        with pytest.raises(ValueError, match="need a RecurrentCache, got DynamicCache"):
            call(IDS, exit=rule, num_recurrences=3, past_key_values=DynamicCache(), **limit)


def test_a_gate_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no exit gate"):
        small()(IDS, exit=RULES["gate"])


def test_an_exit_that_was_not_calibrated_is_refused() -> None:
    with pytest.raises(ValueError, match="no calibrated exit 'kl'"):
        small().generate(IDS, exit="kl", max_new_tokens=2)


@pytest.mark.parametrize("attention", ["flex", "flash, whole rows", "flash, padded rows"])
def test_tokens_of_a_row_cannot_part_under_an_attention_without_plain_masks(attention: str) -> None:
    model, some = small(), Selection.of(IDS % 2 == 0)
    if attention != "flex":
        model.config.base_config._attn_implementation = "flash_attention_2"
    padding = torch.tensor(PADDING if "padded" in attention else (0, 0, 0))
    mask = (torch.arange(11) >= padding[:, None]).long()
    embeds = model.model.embed(IDS)
    inputs = LayerInputs.prepare(model.model, embeds, mask, None, None, {}, whole_masks=True)
    if attention == "flex":
        blocks = create_block_mask(lambda b, h, q, k: q >= k, 3, 1, 128, 128, device="cpu")
        inputs = replace(inputs, masks=blocks)
    model.config.base_config._attn_implementation = "sdpa"
    assert some is not None
    with pytest.raises(ValueError, match="need attn_implementation sdpa or eager"):
        inputs.take(some)
