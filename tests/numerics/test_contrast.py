"""Contrast with a shallower answer, and a warm start, against runs of their own."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.numerics.test_cache_policies import IDS, PADDING, feed, small
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.modeling.exits_recurrent import ExitRule
from rondo.modeling.generation_recurrent import Contrast
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

DEPTH = 4
RULE = ExitRule("state_distance", 0.25)
MASK = (torch.arange(11) >= torch.tensor(PADDING)[:, None]).long()
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)
BATCH = {"input_ids": IDS * MASK, "attention_mask": MASK, "position_ids": POSITIONS}


@pytest.fixture(autouse=True)
def _without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_alike(found: Tensor, expected: Tensor) -> None:
    """The same up to single precision, in which answers are contrasted; of real tokens."""
    real = slice(None) if found.shape[1] != MASK.shape[1] else MASK == 1
    torch.testing.assert_close(found[real].double(), expected[real].double(), atol=1e-5, rtol=1e-5)


def by_hand(deep: Tensor, shallow: Tensor, strength: float, plausible: float) -> Tensor:
    """(1 + strength) log p - strength log q where p is within a factor of the best one."""
    scores = torch.empty_like(deep)
    for place in torch.cartesian_prod(*map(torch.arange, deep.shape[:-1])).tolist():
        row, column = place
        p, q = deep[row, column].softmax(-1), shallow[row, column].softmax(-1)
        value = (1 + strength) * p.log() - strength * q.log()
        scores[row, column] = torch.where(p >= plausible * p.max(), value, -math.inf)
    return scores


def contrasted(model: RecurrentForCausalLM, how: Contrast, **inputs: Any) -> Tensor:
    """The same of two whole runs."""
    deep = model(**inputs, num_recurrences=DEPTH).logits
    shallow = model(**inputs, num_recurrences=how.recurrences).logits
    return by_hand(deep, shallow, how.strength, how.plausible)


def test_no_strength_and_nothing_implausible_is_the_deep_answer() -> None:
    model = small()
    found = model(**BATCH, num_recurrences=DEPTH, contrast=Contrast(1, 0.0, 0.0)).logits
    assert_alike(found, model(**BATCH, num_recurrences=DEPTH).logits.log_softmax(-1))


CONTRASTS = [Contrast(), Contrast(3, 2.0, 0.3), Contrast(2, 1.0, 0.0), Contrast(1, 0.5, 1.0)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "how",
    [Contrast(), Contrast(3, 2.0, 0.3), Contrast(2, 1.0, 0.0), Contrast(1, 0.5, 1.0)],
    ids=str,
)
def test_a_contrast_is_that_of_two_whole_runs(family: str, how: Contrast) -> None:
    model = small(family)
    expected = contrasted(model, how, **BATCH)
    assert_alike(model(**BATCH, num_recurrences=DEPTH, contrast=how).logits, expected)
    # Else half of the formula would have shown nothing.
    assert expected[MASK == 1].isinf().any() == (how.plausible > 0)
    if how.plausible == 1:
        assert (expected[MASK == 1].isfinite().sum(-1) == 1).all()


@pytest.mark.parametrize("policy", ["full", "ragged", "recompute"])
def test_cached_is_uncached_for_the_shallow_answer_too(policy: str) -> None:
    model, how = small("gemma3_text"), Contrast(2, 1.5, 0.01)
    expected = contrasted(model, how, **BATCH)
    cache, found = RecurrentCache(model.config, policy), []
    for start, stop in ((0, 6), (6, 7), (7, 10), (10, 11)):
        inputs = {name: tensor[:, start:stop] for name, tensor in BATCH.items()}
        inputs["attention_mask"] = MASK[:, :stop]
        options = {"past_key_values": cache, "use_cache": True, "num_recurrences": DEPTH}
        found.append(model(**inputs, **options, contrast=how).logits)
    assert_alike(torch.cat(found, 1), expected)
    # And neither coda has disturbed the other: the deep answer goes on as if alone.
    cache.forget(1)
    last = {name: tensor[:, 10:] for name, tensor in BATCH.items()} | {"attention_mask": MASK}
    deep = model(**last, past_key_values=cache, use_cache=True, num_recurrences=DEPTH).logits
    assert_alike(deep, model(**BATCH, num_recurrences=DEPTH).logits[:, -1:])


def greedy_by_hand(model: RecurrentForCausalLM, how: Contrast, ids: Tensor, new: int) -> Tensor:
    for _ in range(new):
        best = contrasted(model, how, input_ids=ids)[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], 1)
    return ids


OPTIONS = {"num_recurrences": DEPTH, "max_new_tokens": 6, "eos_token_id": None}
PROMPT = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("given", [Contrast(2, 1.5, 0.05), 1], ids=["contrast", "depth alone"])
def test_generating_by_contrast_is_choosing_by_two_whole_runs(given: Any) -> None:
    model = small()
    how = given if isinstance(given, Contrast) else Contrast(given)
    found = model.generate(**PROMPT, **OPTIONS, contrast=given)
    for row, padding in enumerate(PADDING):
        alone = greedy_by_hand(model, how, IDS[row : row + 1, padding:], 6)
        assert torch.equal(found[row, padding:], alone[0])
    assert not torch.equal(found, model.generate(**PROMPT, **OPTIONS))


def test_beams_by_contrast_are_those_found_with_every_step_read_anew() -> None:
    model, how = small(), {"contrast": Contrast(1, 1.5, 0.05), "num_beams": 3} | OPTIONS | PROMPT
    # The library's own generate makes no cache by itself.
    anew = GenerationMixin.generate(model, **how, use_cache=False)
    assert torch.equal(anew, model.generate(**how))


def test_rows_of_different_depth_can_be_contrasted() -> None:
    model, how = small(), Contrast(1, 1.5, 0.05)
    options = OPTIONS | {"num_recurrences": [4, 2, 3]}
    found = model.generate(**PROMPT, **options, contrast=how)
    for row, padding in enumerate(PADDING):
        options = OPTIONS | {"num_recurrences": [4, 2, 3][row]}
        alone = model.generate(IDS[row : row + 1, padding:], **options, contrast=how)
        assert torch.equal(found[row, padding:], alone[0])


def test_generating_by_contrast_without_a_cache_is_generating_with_one() -> None:
    model, how = small(), Contrast(1, 1.5, 0.05)
    found = model.generate(**PROMPT, **OPTIONS, contrast=how)
    assert torch.equal(model.generate(**PROMPT, **OPTIONS, contrast=how, use_cache=False), found)


# ---- refusals


@pytest.mark.parametrize("depth", [1, 2, [3, 2, 4], None])
def test_a_depth_that_is_no_deeper_is_refused(depth: Any) -> None:
    model = small(num_recurrences=2)
    with pytest.raises(ValueError, match="needs num_recurrences beyond it"):
        model(IDS, num_recurrences=depth, contrast=Contrast(2))


@pytest.mark.parametrize("wrong", [(0,), (1, -0.1), (1, 0.5, -0.1), (1, 0.5, 1.1)])
def test_a_contrast_that_cannot_be_is_refused(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="a contrast needs"):
        Contrast(*wrong)


def test_a_contrast_and_an_exit_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        small().generate(IDS, **OPTIONS, contrast=1, exit=RULE)


@pytest.mark.parametrize("option", [{"contrast": 1}, {"warm_start": True}], ids=str)
def test_a_cache_of_the_library_is_refused_for_what_it_cannot_keep(option: dict[str, Any]) -> None:
    """It has no place for a second coda, nor for a state, and must not leave them out unsaid."""
    with pytest.raises(ValueError, match="RecurrentCache"):
        small().generate(IDS, **OPTIONS, **option, past_key_values=DynamicCache())


# ---- warm start


class Entering:
    """The states with which iterations begin."""

    def __init__(self, model: RecurrentForCausalLM) -> None:
        self.states: list[tuple[Tensor, Tensor]] = []
        model.model.injection.register_forward_pre_hook(
            lambda _, args: self.states.append((args[0].clone(), args[1].clone()))
        )


@pytest.mark.parametrize("rule", [None, RULE], ids=["no exit", "exit"])
def test_a_decoded_token_starts_where_the_one_before_it_ended(rule: ExitRule | None) -> None:
    model = small()
    entering, cache, executed = Entering(model), RecurrentCache(model.config, "ragged"), []
    ended: list[Tensor] = []
    model.model.layers[2].register_forward_hook(lambda _, args, out: ended.append(out.clone()))
    last = None
    for stop in (8, 9, 10, 11):
        entering.states.clear()
        ended.clear()
        new = IDS[:1, cache.get_seq_length() : stop]
        options = {"use_cache": True, "num_recurrences": 8, "exit": rule, "warm_start": True}
        model(new, past_key_values=cache, **options)
        first, e = entering.states[0]
        assert torch.equal(first, e if last is None else last)
        executed.append(int(cache.executed[0, -1]))
        # Where tokens of a prompt have left, the last one still stands last.
        last = ended[executed[-1] - 1][:, -1:]
        assert not torch.equal(e, last)
    assert (max(executed[1:]) < 8) == (rule is not None)


def test_what_is_read_in_one_call_or_without_a_cache_starts_cold() -> None:
    model, cold = small(), small()(IDS, num_recurrences=DEPTH).logits
    assert torch.equal(model(IDS, num_recurrences=DEPTH, warm_start=True).logits, cold)
    one = model(IDS[:, :1], num_recurrences=DEPTH, warm_start=True).logits
    torch.testing.assert_close(one, cold[:, :1])
    cache = RecurrentCache(model.config)
    options = {"use_cache": True, "num_recurrences": DEPTH, "past_key_values": cache}
    parts = [model(part, **options, warm_start=True).logits for part in IDS.split([6, 5], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), cold)


def test_a_warm_start_follows_its_row() -> None:
    model = small()
    cache, alone = RecurrentCache(model.config), RecurrentCache(model.config)
    feed(model, cache, IDS[:, :8], PADDING, DEPTH)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    feed(model, alone, IDS[2:, 5:8], (0,), DEPTH)
    options = {"use_cache": True, "num_recurrences": DEPTH, "warm_start": True}
    mask, place = MASK[[2, 0, 1], :9], POSITIONS[[2, 0, 1], 8:9]
    found = model(
        IDS[[2, 0, 1], 8:9],
        attention_mask=mask,
        position_ids=place,
        past_key_values=cache,
        **options,
    )
    expected = model(IDS[2:, 8:9], past_key_values=alone, **options)
    torch.testing.assert_close(found.logits[:1], expected.logits)


def test_generating_warm_changes_what_is_said_and_a_batch_is_its_rows() -> None:
    model = small()
    warm = model.generate(**PROMPT, **OPTIONS, warm_start=True)
    assert not torch.equal(warm, model.generate(**PROMPT, **OPTIONS))
    for row, padding in enumerate(PADDING):
        alone = model.generate(IDS[row : row + 1, padding:], **OPTIONS, warm_start=True)
        assert torch.equal(warm[row, padding:], alone[0])


def test_a_contrast_is_refused_over_tokens_that_were_read_without_it() -> None:
    model, ids = small("llama"), IDS
    for contrast in (None, Contrast(2)):
        cache = RecurrentCache(model.config)
        how: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "num_recurrences": 4}
        model(ids[:, :5], contrast=contrast, **how)
        with pytest.raises(ValueError, match="contrast of depth 1"):
            model(ids[:, 5:6], contrast=Contrast(1), **how)
