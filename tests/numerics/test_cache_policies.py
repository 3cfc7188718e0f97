"""What each cache policy shows of a token, against a computation that keeps everything by name."""

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import VOCAB, WINDOW, recurrent
from rondo.modeling.cache_recurrent import CACHE_POLICIES, RecurrentCache
from rondo.modeling.exits_recurrent import ExitGate, ExitRule
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.modeling.stores_recurrent import Entries, ResidualStore

# Keys and values of one token in one layer, (1, H, 1, d) each.
Pair = tuple[Tensor, Tensor]
FINAL = math.inf


class Given:
    """What an attention takes for a cache: it is told its token's pair and shown some others."""

    def __init__(self, others: Sequence[Pair], kept: Callable[[Pair], Pair]) -> None:
        self.others, self.kept = others, kept

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> Pair:
        self.own = self.kept((keys, values))
        keys, values = (torch.cat(kind, 2) for kind in zip(*self.others, self.own, strict=True))
        return keys, values


@dataclass
class Token:
    """One token: its place, its states so far, and its pairs by layer and iteration."""

    place: int
    call: int
    states: list[Tensor]
    pairs: dict[int, dict[float, Pair]] = field(default_factory=dict)
    said: list[Tensor] = field(default_factory=list)
    left: int = 0
    executed: int = 0


class Plain:
    """One row, token by token: the layers' own code, and lists of what each token computed.

    It shares the layers with the model, and neither its loop nor its cache nor its exits.
    """

    def __init__(self, model: RecurrentForCausalLM, policy: str = "full") -> None:
        self.model, self.policy, config = model, policy, model.config
        ends = torch.tensor(
            [0, config.num_prelude_layers, config.num_core_layers, config.num_coda_layers]
        ).cumsum(0)
        self.prelude, self.core, self.coda = (range(a, b) for a, b in pairwise(ends.tolist()))
        self.tokens: list[Token] = []
        self.calls = self.num_checks = 0

    def layer(
        self, index: int, x: Tensor, token: Token, at: float, kept: Callable[[Pair], Pair] = tuple
    ) -> Tensor:
        """Run one layer, which sees the tokens before as they stand at an iteration."""
        body, base = self.model.model, self.model.config.base_config
        kind = base.layer_types[index] if getattr(base, "layer_types", None) else "full_attention"
        first = max(0, token.place - WINDOW + 1) if kind == "sliding_attention" else 0
        given = Given(
            [self.shown(one, index, at, token.call) for one in self.tokens[first : token.place]],
            kept,
        )
        place = torch.tensor([[token.place]])
        angles = body.rotary_emb(x, place, *([kind] if body.rotary_by_type else []))
        x = body.layers[index](
            x, attention_mask=None, position_embeddings=angles, past_key_values=given
        )
        token.pairs.setdefault(index, {})[at] = given.own
        return x

    def shown(self, other: Token, index: int, at: float, call: int) -> Pair:
        """What stands for another token: its pair of this iteration, or the last one before."""
        pairs = other.pairs[index]
        all_done = other.call < call and (self.policy == "last" or index not in self.core)
        return pairs[max(pairs) if all_done else max(one for one in pairs if one <= at)]

    def enter(self, token: Token) -> Tensor:
        s, e, mixing = token.states[-1], token.states[0], self.model.model.injection.mixing
        return mixing * s + (1 - mixing) * e

    def iterate(self, token: Token, iteration: int) -> None:
        x = self.enter(token)
        for index in self.core:
            kept: Any = tuple
            if self.policy == "full-int8" and iteration > 1:
                before = token.pairs[index][iteration - 1]
                kept = lambda pair, before=before: rounded(pair, before)  # noqa: E731
            x = self.layer(index, x, token, iteration, kept)
        token.states.append(x)

    def lend(self, token: Token, iteration: int) -> None:
        """Every core layer projects the state that would enter the next iteration."""
        for index in self.core:
            self.layer(index, self.enter(token), token, iteration)

    def answer(self, token: Token, at: float) -> Tensor:
        x = token.states[token.left or -1]
        for index in self.coda:
            x = self.layer(index, x, token, at)
        logits = self.model.lm_head(self.model.model.norm(x))[0, 0]
        cap = getattr(self.model.config.base_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def call(
        self, ids: Tensor, depth: int, rule: ExitRule | None = None, several: bool = True
    ) -> Tensor:
        """Logits of the next tokens (T,), (T, V), read in one call that ends at a depth."""
        self.calls += 1
        new = []
        for number in ids.tolist():
            x = self.model.model.embed_tokens(torch.tensor([[number]]))
            token = Token(len(self.tokens), self.calls, [])
            for index in self.prelude:
                x = self.layer(index, x, token, FINAL)
            token.states.append(x)
            self.loop(token, depth, rule, several)
            self.tokens.append(token)
            new.append(token)
        return torch.stack([self.answer(token, FINAL) for token in new])

    def loop(self, token: Token, depth: int, rule: ExitRule | None, several: bool) -> None:
        for iteration in range(1, depth + 1):
            self.iterate(token, iteration)
            token.executed = iteration
            if token.left:
                continue
            if iteration == depth:
                token.left = depth
            elif rule is not None and rule.due(iteration) and self.leaves(token, rule, iteration):
                token.left = iteration
                # A single token's last check is its answer, and no check beside it.
                self.num_checks -= rule.reads_logits and not several
                if self.policy == "recompute":
                    self.lend(token, iteration + 1)
                if not self.policy.startswith("full"):
                    return

    def leaves(self, token: Token, rule: ExitRule, iteration: int) -> bool:
        if rule.reads_logits:
            self.num_checks += 1
            token.said.append(self.answer(token, iteration).log_softmax(-1))
        value = criterion(self.model, token, rule.criterion)
        # Else the model, which reads in single precision, might see it otherwise.
        assert abs(value - rule.threshold) > 1e-5 or rule.criterion == "argmax_stable"
        return value < rule.threshold


def criterion(model: RecurrentForCausalLM, token: Token, name: str) -> float:
    """A criterion as its definition says, of what one token has said and where it has been."""
    *old, now = token.said or [torch.zeros(2)]
    before, state = token.states[-2][0, 0], token.states[-1][0, 0]
    distance = float((state - before).square().sum().sqrt() / state.square().sum().sqrt())
    if name == "state_distance":
        return distance
    if name == "gate":
        gate = model.model.exit_gate
        unit = state / state.square().mean().sqrt()
        expected = gate.weight[0, :-1] @ unit + gate.weight[0, -1] * math.log(distance)
        return float((expected + gate.bias[0]).exp())
    if name == "kl":
        return float((old[-1].exp() * (old[-1] - now)).sum()) if old else math.inf
    if name == "entropy":
        return float(-(now.exp() * now).sum())
    if name == "margin":
        second, first = now.exp().sort().values[-2:]
        return float(1 - first + second)
    agreed = 0
    for one in reversed(old):
        if one.argmax() != now.argmax():
            break
        agreed += 1
    return 1 / (1 + agreed)


def rounded(pair: Pair, before: Pair) -> Pair:
    """A pair as before plus 255 steps of the change, of a size for each head."""
    kept = []
    for now, old in zip(pair, before, strict=True):
        step = (now - old).abs().max(-1, keepdim=True).values / 127
        kept.append(old + step * torch.round((now - old) / step))
    return kept[0], kept[1]


def small(family: str = "llama", gate: bool = False, **fields: Any) -> RecurrentForCausalLM:
    """A model of one layer, a core of two, one layer, in double precision."""
    model = recurrent(family, [0, 1, 3, 5], sizes=(1, 2, 1), **fields)
    if gate:
        model.model.exit_gate = ExitGate(model.config)
        stream = torch.Generator().manual_seed(2)
        nn.init.normal_(model.model.exit_gate.weight, std=0.1, generator=stream)
        nn.init.ones_(model.model.exit_gate.bias)
        model.model.exit_gate.weight.data[0, -1] = 1.0
    return model.double()


# A batch of three rows, the later ones padded on the left, read in three calls.
IDS = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
PADDING = (0, 2, 5)
CUTS = (8, 9, 11)
SETTLES = ExitRule("state_distance", 0.22)
SURE = ExitRule("kl", 0.03)
Depth = int | tuple[int, ...]

each_policy = pytest.mark.parametrize("policy", CACHE_POLICIES)


def feed(
    model: RecurrentForCausalLM,
    cache: RecurrentCache,
    ids: Tensor,
    padding: Sequence[int],
    depth: Depth,
    rule: ExitRule | None = None,
) -> Tensor:
    """Logits of the tokens (B, S) that the cache has not seen yet, read in one call."""
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]).long()
    new = slice(cache.get_seq_length(), None)
    return model(
        ids[:, new],
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, new],
        past_key_values=cache,
        use_cache=True,
        num_recurrences=depth,
        exit=rule,
    ).logits


def assert_as_plain(
    model: RecurrentForCausalLM,
    policy: str,
    depths: Sequence[Depth],
    rule: ExitRule | None = None,
    cuts: Sequence[int] = CUTS,
) -> list[int]:
    """Each row of a batch is what it is by itself in plain; return at which depths tokens left."""
    cache = RecurrentCache(model.config, policy)
    calls = list(zip(pairwise((0, *cuts)), depths, strict=True))
    found = [feed(model, cache, IDS[:, :b], PADDING, depth, rule) for (_, b), depth in calls]
    logits, left, num_checks = torch.cat(found, 1), [], 0
    for row, padding in enumerate(PADDING):
        plain, expected = Plain(model, policy), []
        for (start, stop), depth in calls:
            new = IDS[row, max(start, padding) : stop]
            own = depth if isinstance(depth, int) else depth[row]
            expected.append(plain.call(new, own, rule, several=stop - start > 1))
        torch.testing.assert_close(logits[row, padding:], torch.cat(expected))
        for noted, name in ((cache.recurrences, "left"), (cache.executed, "executed")):
            assert noted[row, padding:].tolist() == [getattr(one, name) for one in plain.tokens]
        left += [one.left for one in plain.tokens]
        num_checks += plain.num_checks
    assert cache.num_checks == num_checks
    return left


@pytest.fixture(autouse=True)
def _without_gradient() -> Any:
    with torch.no_grad():
        yield


# ---- each policy is its definition


@each_policy
@pytest.mark.parametrize("rule", [None, SETTLES, SURE], ids=["no exit", "distance", "kl"])
def test_every_policy_is_its_definition(policy: str, rule: ExitRule | None) -> None:
    left = assert_as_plain(small(), policy, [5] * 3, rule)
    assert rule is None or len(set(left)) >= 3


@pytest.mark.parametrize("family", ["olmo2", "gemma3_text"])
@pytest.mark.parametrize("policy", ["ragged", "recompute", "last", "full-int8"])
def test_every_policy_is_its_definition_in_other_families(family: str, policy: str) -> None:
    assert len(set(assert_as_plain(small(family), policy, [5] * 3, SURE))) >= 3


DEPTHS = {"by row": [(5, 3, 4)] * 3, "deeper later": [2, (4, 2, 3), 6]}


@pytest.mark.parametrize("policy", ["ragged", "recompute", "last"])
@pytest.mark.parametrize("rule", [None, SETTLES], ids=["no exit", "distance"])
@pytest.mark.parametrize("depths", DEPTHS)
def test_rows_and_later_calls_may_have_depths_of_their_own(
    policy: str, rule: ExitRule | None, depths: str
) -> None:
    assert_as_plain(small(), policy, DEPTHS[depths], rule)


@each_policy
def test_a_later_call_may_end_before_the_tokens_before(policy: str) -> None:
    assert_as_plain(small(), policy, [5, 3, 2])


def test_policies_differ_where_tokens_leave() -> None:
    """Else the tests above could not tell one from another."""
    model, said = small(), {}
    for policy in CACHE_POLICIES:
        cache = RecurrentCache(model.config, policy)
        for stop in CUTS:
            said[policy] = feed(model, cache, IDS[:, :stop], PADDING, 5, SETTLES)
    for one, policy in enumerate(CACHE_POLICIES):
        for other in CACHE_POLICIES[one + 1 :]:
            assert (said[policy] - said[other]).abs().max() > 1e-3, (policy, other)


@pytest.mark.parametrize("policy", ["full", "ragged", "recompute", "full-int8"])
def test_more_than_the_first_entries_are_kept_alike_in_any_pieces(policy: str) -> None:
    model, ids = small(), IDS.repeat(1, 28)[:2, :300]
    whole = feed(model, RecurrentCache(model.config, policy), ids, (0, 9), 3, SETTLES)
    cache = RecurrentCache(model.config, policy)
    cuts = (100, 101, 280, 299, 300)
    parts = [feed(model, cache, ids[:, :stop], (0, 9), 3, SETTLES) for stop in cuts]
    torch.testing.assert_close(torch.cat(parts, 1)[1, 9:], whole[1, 9:])
    torch.testing.assert_close(torch.cat(parts, 1)[0], whole[0])


# ---- residuals in eight bits


def test_an_entry_is_off_by_half_a_step_of_its_own_residual_at_most() -> None:
    model = small()
    cache = RecurrentCache(model.config, "full-int8")
    for store in cache.stores[1:3]:
        kept = store.exchange
        before: list[Tensor] = []

        def exchange(view: Any, *pair: Tensor, kept: Any = kept, before: Any = before) -> Any:
            all_of_them = kept(view, *pair)
            shown = [one[:, :, -pair[0].shape[2] :] for one in all_of_them]
            if view.iteration > 1:
                for new, old, one in zip(pair, before, shown, strict=True):
                    step = (new - old).abs().amax(-1, keepdim=True) / 127
                    assert ((one - new).abs() <= step / 2 + 1e-12).all()
                    assert ((one - new).abs() > step / 8).any()
            before[:] = shown
            return all_of_them

        store.exchange = exchange
    for stop in CUTS:
        feed(model, cache, IDS[:, :stop], PADDING, 6)


def test_residuals_in_eight_bits_hardly_change_the_answer() -> None:
    model = small()
    exact = model(IDS, num_recurrences=8).logits.log_softmax(-1)
    found = feed(model, RecurrentCache(model.config, "full-int8"), IDS, (0, 0, 0), 8)
    found = found.log_softmax(-1)
    # It grows with the square of the step: with six bits it would be sixteen times 3e-6 nats.
    assert 0 < (exact.exp() * (exact - found)).sum(-1).max() < 2e-5


# ---- what a decoding strategy does to a cache


@each_policy
def test_rows_can_be_reordered_selected_and_repeated(policy: str) -> None:
    model = small()
    ways: dict[str, tuple[Any, list[int]]] = {
        "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    }
    for change, rows in ways.values():
        cache = RecurrentCache(model.config, policy)
        feed(model, cache, IDS[:, :8], PADDING, 4, SETTLES)
        change(cache)
        # Rows that shared a past go on differently, each in entries of its own.
        new = (IDS[0, 8:11] + torch.arange(len(rows))[:, None]) % VOCAB
        ids = torch.cat([IDS[rows, :8], new], 1)
        padding = [PADDING[row] for row in rows]
        first = feed(model, cache, ids[:, :10], padding, 4, SETTLES)
        found = torch.cat([first, feed(model, cache, ids, padding, 4, SETTLES)], 1)
        for row, skip in enumerate(padding):
            plain = Plain(model, policy)
            pieces = ids[row, skip:].split([8 - skip, 2, 1])
            expected = [plain.call(piece, 4, SETTLES) for piece in pieces]
            torch.testing.assert_close(found[row], torch.cat(expected[1:]))
            assert cache.recurrences[row, skip:].tolist() == [one.left for one in plain.tokens]


def held(cache: RecurrentCache) -> list[tuple[int, int]]:
    """Entries in use and their bytes, by layer."""
    return [(store.entries.used, store.nbytes) for store in cache.stores]


@each_policy
def test_cropping_forgets_tokens_and_gives_their_entries_back(policy: str) -> None:
    model = small()
    cache = RecurrentCache(model.config, policy)
    feed(model, cache, IDS[:, :8], PADDING, 5, SETTLES)
    kept = held(cache)
    first = feed(model, cache, IDS, PADDING, 5, SETTLES)
    more, room = held(cache), [store.entries.capacity for store in cache.stores]
    for _ in range(6):
        cache.forget(3)
        assert cache.get_seq_length() == cache.recurrences.shape[1] == 8
        assert held(cache) == kept
        # Other tokens in between must leave nothing behind.
        feed(model, cache, IDS.flip(0, 1), PADDING, 5, SETTLES)
        cache.forget(3)
        again = feed(model, cache, IDS, PADDING, 5, SETTLES)
        torch.testing.assert_close(again[0], first[0])
        assert held(cache) == more
    assert [store.entries.capacity for store in cache.stores] == room


@each_policy
def test_a_cache_that_is_reset_is_a_new_one(policy: str) -> None:
    model = small()
    cache = RecurrentCache(model.config, policy)
    first = feed(model, cache, IDS[:, :8], PADDING, 5, SETTLES)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == cache.num_checks == 0
    feed(model, cache, IDS[:1].flip(1), (0,), 3, SETTLES)
    assert cache.recurrences.shape == (1, 11)
    cache.reset()
    assert torch.equal(feed(model, cache, IDS[:, :8], PADDING, 5, SETTLES), first)


@each_policy
@pytest.mark.parametrize("rule", [None, SETTLES], ids=["no exit", "distance"])
def test_bytes_are_those_of_what_plain_lists_hold(policy: str, rule: ExitRule | None) -> None:
    model = small()
    cache = RecurrentCache(model.config, policy)
    plain, pair = Plain(model, policy), 2 * 2 * 8 * 8  # keys and values, heads, numbers, bytes
    for stop in CUTS:
        feed(model, cache, IDS[:1, :stop], (0,), 5, rule)
        plain.call(IDS[0, len(plain.tokens) : stop], 5, rule)
    core = sum(len(token.pairs[index]) for token in plain.tokens for index in plain.core)
    expected = pair * (11 * 2 + core)
    if policy == "last":
        expected = pair * (11 * 2 + 11 * 2)
    if policy == "full-int8":
        # What comes after the first iteration is a byte for eight, and a step for each head.
        expected = pair * (11 * 2 + 11 * 2) + (core - 11 * 2) * (pair // 8 + 2 * 2 * 8)
    assert sum(store.nbytes for store in cache.stores) == expected
    # And tables of whole numbers: of the layers around the loop, and of six iterations at most.
    assert 2 * 11 * 8 <= cache.nbytes - expected <= 7 * 11 * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_eight_bits_hold_the_largest_of_every_head_in_any_precision(dtype: torch.dtype) -> None:
    first, later = Entries(), Entries()
    store = ResidualStore(first, later)
    shape = (1, 4, 300, 64)
    generator = torch.Generator().manual_seed(0)
    read: Any = None
    for iteration, space in ((1, first), (2, later)):
        entries = torch.randn(shape, generator=generator).to(dtype)
        where = space.take(300)[None]
        view = types.SimpleNamespace(iteration=iteration, write=where, read=where)
        read = store.exchange(view, entries, entries)
    worst = (read[0] - entries).float().abs().max()
    assert worst < (0.08 if dtype is torch.bfloat16 else 0.04)


@pytest.mark.parametrize("policy", ["full", "ragged"])
def test_prompt_lookup_on_our_cache_gives_the_plain_tokens(policy: str) -> None:
    model = recurrent("llama").double()
    ids = torch.arange(5, 11).repeat(4)[None]
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_recurrences": 3}
    plain = model.generate(ids, pad_token_id=0, **how)
    looked_up = model.generate(
        ids, pad_token_id=0, prompt_lookup_num_tokens=3, cache_policy=policy, **how
    )
    assert torch.equal(looked_up, plain)
    with pytest.raises(ValueError, match="negative"):
        RecurrentCache(model.config).crop(1)
