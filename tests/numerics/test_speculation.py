"""Drafts at a shallower depth: the same tokens, or the same distribution, as without them."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from conftest import VOCAB, recurrent
from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.modeling.exits_recurrent import ExitRule
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.modeling.speculation_recurrent import Drafting, best_count, expected_tokens, round_cost


@pytest.fixture(autouse=True)
def _without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny(family: str = "llama") -> RecurrentForCausalLM:
    """One layer of each part, in double precision: no rounding decides between two tokens."""
    return recurrent(family, [0, 3, 5], sizes=(1, 1, 1)).double()


def prompt(batch: int, length: int, padding: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, padded on the left."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


PROMPT = prompt(3, 7, [0, 2, 4])


# ---- greedily the same tokens


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_drafts_change_no_token(family: str) -> None:
    model, chance = tiny(family), random.Random(f"{family} drafts")
    emitted = rounds = drafted = 0
    for trial in range(67):
        batch, length, depth = chance.randint(1, 3), chance.randint(1, 12), chance.randint(2, 6)
        padding = [0, *(chance.randrange(length) for _ in range(batch - 1))]
        ids = prompt(batch, length, padding, trial)
        how = {"max_new_tokens": chance.randint(1, 8), "num_recurrences": depth}
        draft, tokens = chance.randint(1, depth - 1), chance.choice([None, 1, 2, 3, 5, 9])
        policy = chance.choice(["full", "ragged", None])
        expected = model.generate(**ids, **how)
        found = model.generate(
            **ids,
            **how,
            draft_recurrences=draft,
            draft_tokens=tokens,
            cache_policy=policy,
            return_dict_in_generate=True,
        )
        assert torch.equal(found.sequences, expected), (trial, batch, depth, draft, tokens)
        emitted += found.drafting.emitted
        rounds += found.drafting.rounds
        drafted += found.drafting.drafted // batch
    # Drafts were accepted, and drafts were refused.
    assert rounds < 0.9 * emitted < 0.8 * drafted


def test_a_row_that_ends_is_padded_and_the_others_go_on() -> None:
    model = tiny()
    how = {"num_recurrences": 4, "max_new_tokens": 9}
    free = model.generate(**PROMPT, **how, eos_token_id=None)
    ends = 0
    for row in range(3):
        for place in (7, 10, 14):
            stop = {"eos_token_id": [int(free[row, place]), 299], "pad_token_id": 0}
            expected = model.generate(**PROMPT, **how, **stop)
            for draft, tokens in ((1, 4), (3, 9)):
                drafts = {"draft_recurrences": draft, "draft_tokens": tokens}
                assert torch.equal(model.generate(**PROMPT, **how, **stop, **drafts), expected)
            ends += int((expected[:, -1] == 0).any()) + 16 - expected.shape[1]
    assert ends >= 6


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 5, "eos_token_id": list(range(0, 300, 3))},
        {"eos_token_id": list(range(0, 300, 3))},
        {"max_length": 11},
        {"bad_words_ids": [[one] for one in range(0, 300, 2)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_and_limits_see_what_they_see_without_drafts(options: dict[str, Any]) -> None:
    model, how = tiny(), {"num_recurrences": 4, "max_new_tokens": 9} | options
    if "max_length" in options:
        del how["max_new_tokens"]
    expected = model.generate(**PROMPT, **how)
    assert not torch.equal(expected, model.generate(**PROMPT, num_recurrences=4, max_new_tokens=9))
    for tokens in (1, 3, 6):
        found = model.generate(**PROMPT, **how, draft_recurrences=2, draft_tokens=tokens)
        assert torch.equal(found, expected)


class Listener(BaseStreamer):
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.heard.append("end")


def test_a_streamer_hears_the_same() -> None:
    model, ids = tiny(), PROMPT["input_ids"][:1]
    how = {"num_recurrences": 4, "max_new_tokens": 9}
    plain, drafts = Listener(), Listener()
    model.generate(ids, **how, streamer=plain)
    model.generate(ids, **how, streamer=drafts, draft_recurrences=2, draft_tokens=3)
    assert drafts.heard == plain.heard
    assert len(plain.heard) == 11


@pytest.mark.parametrize("length", [1, 7, 90], ids=lambda length: f"prompt of {length}")
def test_a_depth_that_is_chosen_for_one_changes_no_token(length: int) -> None:
    model, ids = tiny(), prompt(2, length, [0, length // 3])
    for depth in (2, 6):
        how = {"num_recurrences": depth, "max_new_tokens": 8}
        found = model.generate(**ids, **how, draft_recurrences="auto", return_dict_in_generate=True)
        assert torch.equal(found.sequences, model.generate(**ids, **how))
        assert found.drafting.depth in {1, 2, 4} & set(range(depth))


def test_what_is_returned_is_what_plain_decoding_returns_and_goes_on_like_it() -> None:
    model = tiny()
    how = {"num_recurrences": 4, "max_new_tokens": 7, "return_dict_in_generate": True}
    plain = model.generate(**PROMPT, **how, past_key_values=RecurrentCache(model.config))
    found = model.generate(**PROMPT, **how, draft_recurrences=2, draft_tokens=5)
    assert torch.equal(found.sequences, plain.sequences)
    assert torch.equal(found.recurrences, torch.full((3, 7), 4))
    one, other = found.past_key_values, plain.past_key_values
    assert one.get_seq_length() == other.get_seq_length() == 13
    assert [store.entries.used for store in one.stores] == [
        store.entries.used for store in other.stores
    ]
    mask = torch.nn.functional.pad(PROMPT["attention_mask"], (0, 7), value=1)
    longer = {"input_ids": plain.sequences, "attention_mask": mask}
    expected = model.generate(**longer, **how).sequences
    for cache, drafts in ((one, {}), (other, {"draft_recurrences": 1, "draft_tokens": 3})):
        again = model.generate(**longer, **how, past_key_values=cache, **drafts)
        assert torch.equal(again.sequences, expected)


def test_verification_takes_drafted_tokens_up_where_they_stopped() -> None:
    """So each of them runs each iteration once, the first two by itself, the rest in one pass."""
    model = tiny()
    read: list[int] = []
    looped: list[int] = []
    for layer, seen in zip(model.model.layers[:2], (read, looped), strict=True):
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
    how = {"num_recurrences": 6, "max_new_tokens": 9, "eos_token_id": None}
    model.generate(PROMPT["input_ids"][:1], **how, draft_recurrences=2, draft_tokens=3)
    drafted = len(read) - 1
    assert read == [7] + [1] * drafted
    assert looped[:6] == [7] * 6
    assert sum(looped[6:]) == 6 * drafted
    # Two passes for a drafted token, and four for all of a round's.
    rounds, left = divmod(len(looped) - 6 - 2 * drafted, 4)
    assert left == 0
    assert drafted / 3 <= rounds < 8


# ---- sampled from the same distribution

# Three tokens are likely at a time, at each depth others; four are drawn: 81 ways.
NARROW = {"do_sample": True, "top_k": 3, "temperature": 0.6, "eos_token_id": None}
START = torch.tensor([[17, 101, 45, 230]])
NEW = 4


def chances(model: RecurrentForCausalLM, depth: int) -> dict[tuple[int, ...], float]:
    """The probability of each way on, from plain forward passes."""
    ways: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NEW):
        ids = torch.cat([START.expand(len(ways), -1), torch.tensor([*ways]).long()], 1)
        logits = model(ids, num_recurrences=depth).logits[:, -1] / NARROW["temperature"]
        best = logits.topk(NARROW["top_k"], -1)
        ways = {
            (*way, int(token)): chance * float(share)
            for (way, chance), tokens, shares in zip(
                ways.items(), best.indices, best.values.softmax(-1), strict=True
            )
            for token, share in zip(tokens, shares, strict=True)
        }
    return ways


def drawn(
    model: RecurrentForCausalLM, rows: int, times: int, depth: int, **drafts: int
) -> list[list[tuple[int, ...]]]:
    """What is said on START, by call and row."""
    torch.manual_seed(7)
    how = {**NARROW, "max_new_tokens": NEW, "num_recurrences": depth, **drafts}
    ids = START.expand(rows, -1)
    calls = [model.generate(ids, **how)[:, START.shape[1] :].tolist() for _ in range(times)]
    return [[tuple(row) for row in call] for call in calls]


def misfit(expected: dict[Any, float], found: list[Any]) -> float:
    """Pearson's chi square over what a sample would exceed once in a million times."""
    counts, number = Counter(found), len(found)
    rare = [one for one, chance in expected.items() if number * chance < 5]
    cells = [(counts[one], number * expected[one]) for one in expected if one not in rare]
    cells.append((sum(counts[one] for one in rare), number * sum(expected[one] for one in rare)))
    if set(counts) - set(expected):
        return float("inf")  # what cannot be was said
    total = sum((seen - due) ** 2 / due for seen, due in cells if due)
    free = sum(due > 0 for _, due in cells) - 1
    # Wilson and Hilferty's approximation, at 4.753 standard deviations.
    bound = free * (1 - 2 / (9 * free) + 4.753 * (2 / (9 * free)) ** 0.5) ** 3
    return total / bound


# In a large batch a row refuses at once, and all others' drafts are cut with it; in a small one
# several tokens stand. The draft is far off in the former and close in the latter.
WIDE = {"rows": 1500, "times": 2, "depth": 3, "draft_recurrences": 1, "draft_tokens": 3}
DEEP = {"rows": 8, "times": 120, "depth": 5, "draft_recurrences": 4, "draft_tokens": 3}


@pytest.mark.parametrize("settings", [WIDE, DEEP], ids=["large batch", "small batch"])
def test_drafts_leave_the_distribution_as_it_is(settings: dict[str, int]) -> None:
    model = tiny()
    expected = chances(model, settings["depth"])
    assert sum(expected.values()) == pytest.approx(1)
    said = drawn(model, **settings)
    assert misfit(expected, [way for call in said for way in call]) < 1
    # Rows know nothing of each other, though they are cut together.
    third: Counter[int] = Counter()
    for way, chance in expected.items():
        third[way[2]] += chance
    pairs = {(one, other): third[one] * third[other] for one in third for other in third}
    met = [(a[2], b[2]) for call in said for a, b in zip(call[::2], call[1::2], strict=True)]
    assert misfit(pairs, met) < 1


def test_the_test_of_distributions_has_power(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    expected = chances(model, WIDE["depth"])
    shares = list(expected.values())
    assert misfit(expected, random.Random(1).choices(list(expected), shares, k=3000)) < 1
    # The distribution of the draft's own depth is another.
    shallow = [way for call in drawn(model, 1500, 2, 1) for way in call]
    assert misfit(expected, shallow) > 2
    # Whatever is drafted is accepted.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand_like", torch.zeros_like)
        assert misfit(expected, [way for call in drawn(model, **WIDE) for way in call]) > 2
    # Whatever is drafted is refused, and what comes instead comes from where the two differ.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 1e9))
        assert misfit(expected, [way for call in drawn(model, **WIDE) for way in call]) > 2


# ---- how many tokens are drafted


def test_drafts_are_longer_where_more_is_accepted_and_the_depth_is_far() -> None:
    config = tiny().config
    lengths = [best_count(accepted, config, 1, 32, 1.0) for accepted in (0.1, 0.5, 0.8, 0.97)]
    assert lengths == sorted(lengths)
    assert lengths[0] < 4 < lengths[-1]
    assert best_count(0.8, config, 1, 32, 1.0) > best_count(0.8, config, 1, 3, 1.0)


def test_a_round_gives_what_its_tokens_give_on_average() -> None:
    chance, accepted, count, rounds = random.Random(2), 0.7, 4, 40_000
    total = 0
    for _ in range(rounds):
        for _ in range(count):
            total += 1
            if chance.random() > accepted:
                break
    # Three standard errors of a mean of numbers in 1..4.
    assert expected_tokens(accepted, count) == pytest.approx(total / rounds, abs=3 * 1.5 / 200)
    # One layer of prelude, core and coda each, and a head of two.
    assert round_cost(tiny().config, draft=2, depth=6, count=3, head=2.0) == 3 * 6 + 4 + 3


def test_the_share_of_accepted_tokens_follows_what_happens_now() -> None:
    drafting = Drafting(2)
    for _ in range(400):
        drafting.judge(1, 0)
    assert drafting.acceptance > 0.98
    for _ in range(400):
        drafting.judge(0, 1)
    assert drafting.acceptance < 0.02


# ---- refusals

DRAFTS = {"num_recurrences": 4, "max_new_tokens": 3, "draft_recurrences": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_recurrences": 4}, "4 must be less than num_recurrences 4"),
        ({"draft_recurrences": 0}, "draft_recurrences must be at least 1"),
        ({"draft_tokens": 0}, "draft_tokens must be at least 1"),
        ({"draft_recurrences": "auto", "num_recurrences": 1}, "num_recurrences of at least 2"),
        ({"draft_recurrences": None, "draft_tokens": 3}, "no meaning without draft_recurrences"),
        ({"num_recurrences": [4, 3, 4]}, "one num_recurrences for all rows"),
        ({"cache_policy": "last"}, "policy full or ragged"),
        ({"cache_policy": "recompute"}, "policy full or ragged"),
        ({"cache_policy": "full-int8"}, "policy full or ragged"),
        ({"past_key_values": DynamicCache()}, "need a RecurrentCache"),
        ({"num_beams": 2}, "without beam search"),
        ({"output_scores": True, "return_dict_in_generate": True}, "without output_scores"),
        ({"output_logits": True, "return_dict_in_generate": True}, "without output_logits"),
        ({"exit": ExitRule("kl", 0.1)}, "drafts and exit exclude"),
        ({"contrast": 1}, "drafts and contrast exclude"),
        ({"warm_start": True}, "drafts and warm_start exclude"),
    ],
    ids=str,
)
def test_what_drafts_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().generate(**PROMPT, **(DRAFTS | options))


def test_embeddings_in_place_of_a_prompt_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=model.model.embed(PROMPT["input_ids"]), **DRAFTS)
