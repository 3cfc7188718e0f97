"""Lossless speculation with the model's own shallow depth as the draft (cf. arXiv:2609.17184).

The draft at depth d is a prefix of the computation at depth r: the states after d iterations, and
the keys and values up to there, are those that the full computation has. So verification takes the
drafted tokens up where they stopped and runs iterations d + 1 .. r of all of them in one pass.
Tokens are accepted by the rule of speculative sampling (arXiv:2211.17192), under which what comes
out is distributed as without drafts; greedily it is the same tokens, up to the rounding by which a
pass over several tokens differs from one over each. Logits processors must be functions of what
they are given.

Shapes: B batch, k drafted tokens, D width, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .cache_recurrent import RecurrentCache
from .inputs_recurrent import LayerInputs

MOST_DRAFTED = 16
# The share of accepted tokens is remembered over about this many drafted ones.
MEMORY = 64.0
# Tokens of the prompt on which draft depths are tried, from its end.
TRIAL_TOKENS = 64


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted.

    Attributes:
        recurrences: Depth d of the draft, or "auto".
        tokens: Tokens k of a draft, or None to go by what was accepted.

    Raises:
        ValueError: A number is below 1.
    """

    recurrences: int | Literal["auto"]
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.recurrences != "auto" and self.recurrences < 1:
            raise ValueError(f"draft_recurrences must be at least 1, got {self.recurrences}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"draft_tokens must be at least 1, got {self.tokens}")


@dataclass
class Drafting:
    """The draft's depth, and what is known of its acceptance.

    Attributes:
        depth: d.
        accepted: Tokens accepted lately, fading.
        judged: Tokens that were accepted or refused lately, fading.
        rounds: Verifications so far.
        emitted: Tokens so far.
        drafted: Tokens that were read at the draft's depth so far.
        tried: Tokens on which the draft's depth was chosen, and how many depths there were.
    """

    depth: int
    accepted: float = 3.0
    judged: float = 4.0
    rounds: int = 0
    emitted: int = 0
    drafted: int = 0
    tried: tuple[int, int] = (0, 0)

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted, of those that were judged."""
        return self.accepted / self.judged

    def judge(self, accepted: int, refused: int) -> None:
        """Count a round's tokens."""
        fade = max(0.0, 1 - (accepted + refused) / MEMORY)
        self.accepted = fade * self.accepted + accepted
        self.judged = fade * self.judged + accepted + refused


def expected_tokens(acceptance: float, count: int) -> float:
    """Return how many tokens a round of `count` drafted ones gives on average.

    The j-th comes out if the j - 1 before it were accepted; if it is refused, its better comes.
    """
    return sum(acceptance**place for place in range(count))


def round_cost(config: Any, draft: int, depth: int, count: int, head: float) -> float:
    """Return the cost of a round in passes through a layer.

    A pass over a few tokens is counted as one, since it is the weights that are read which cost.

    Args:
        config: The model's config.
        draft: d.
        depth: r.
        count: k.
        head: What the head costs, in layers.
    """
    finish = config.num_coda_layers + head
    drafting = config.num_prelude_layers + draft * config.num_core_layers + finish
    return count * drafting + (depth - draft) * config.num_core_layers + finish


def best_count(acceptance: float, config: Any, draft: int, depth: int, head: float) -> int:
    """Return the length of a draft that gives the most tokens for what it costs."""
    return max(
        range(1, MOST_DRAFTED + 1),
        key=lambda count: (
            expected_tokens(acceptance, count) / round_cost(config, draft, depth, count, head)
        ),
    )


class Text:
    """The text so far, which grows by a token of each row at a time until all rows are finished.

    Args:
        ids: The prompt, (B, T).
        stopping_criteria: What finishes a row.
        streamer: Where new tokens are put, or None.
        pad: What a finished row goes on with, or None.
    """

    def __init__(self, ids: torch.Tensor, stopping_criteria: Any, streamer: Any, pad: Any):
        self.ids = ids
        self.going_B = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self._stopping = stopping_criteria
        self._streamer = streamer
        self._pad = pad

    def append(self, new: torch.Tensor) -> bool:
        """Add tokens (B, count), those after the end left out; return whether any row goes on."""
        for token_B1 in new.split(1, 1):
            if self._pad is not None:
                token_B1 = torch.where(self.going_B[:, None], token_B1, self._pad)
            self.ids = torch.cat([self.ids, token_B1], 1)
            if self._streamer is not None:
                self._streamer.put(token_B1.flatten().cpu())
            self.going_B = self.going_B & ~self._stopping(self.ids, None)
            if not bool(self.going_B.any()):
                return False
        return True

    def room(self, wanted: int) -> int:
        """Return how many of the wanted tokens fit."""
        length = self.ids.shape[1]
        return min(wanted, (self._stopping.max_length or length + wanted) - length)


@dataclass
class Decoder:
    """A model that drafts and verifies one batch.

    Attributes:
        model: The `RecurrentForCausalLM`.
        cache: Its cache, of the policy `full` or `ragged`.
        depth: r.
        seed: Seed of a `normal` initial state.
        mask: 1 for tokens, 0 for padding, (B, tokens so far).
        states: State and prelude's output of the drafted tokens, each (B, 1, D).
    """

    model: Any
    cache: RecurrentCache
    depth: int
    seed: Any
    mask: torch.Tensor
    states: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def head(self) -> float:
        """What the head costs, in layers."""
        layer = sum(one.numel() for one in self.model.model.core[0].parameters())
        return self.model.lm_head.weight.numel() / layer

    def best_count(self, drafting: Drafting) -> int:
        """Return the length of draft to go by."""
        config = self.model.config
        return best_count(drafting.acceptance, config, drafting.depth, self.depth, self.head)

    def _inputs(self, embeds: torch.Tensor) -> LayerInputs:
        length = self.cache.length + embeds.shape[1]
        missing = length - self.mask.shape[1]
        if missing > 0:
            self.mask = torch.nn.functional.pad(self.mask, (0, missing), value=1)
        mask = self.mask[:, :length]
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -embeds.shape[1] :]
        return LayerInputs.prepare(self.model.model, embeds, mask, positions, self.cache, {})

    def read(self, ids: torch.Tensor, depths: tuple[int, ...]) -> list[torch.Tensor]:
        """Read tokens (B, T) up to the last depth; return normed hidden states at each of them."""
        body, found = self.model.model, []
        embeds = body.embed(ids)
        inputs = self._inputs(embeds)
        self.cache.begin(embeds.shape[:2], depths[-1], embeds.device)
        prelude = slice(0, body.config.num_prelude_layers)
        e_BTD = body.run(prelude, embeds, inputs, self.cache.outside())
        s_BTD = body.initial_state(e_BTD, inputs.position_ids, self.seed)
        for iteration in range(1, depths[-1] + 1):
            s_BTD = body.iterate(iteration, s_BTD, e_BTD, inputs, self.cache)
            if iteration in depths:
                found.append(body.finish(s_BTD, inputs, self.cache))
        self.cache.finished(depths[-1], depths[-1])
        self.states.append((s_BTD, e_BTD))
        return found

    def draft(self, ids: torch.Tensor, draft: int) -> torch.Tensor:
        """Read one token (B, 1) at the draft's depth; return the logits of the next, (B, 1, V)."""
        return self.model.logits(self.read(ids, (draft,))[0])

    def verify(self, ids: torch.Tensor, draft: int) -> torch.Tensor:
        """Take the tokens read lately (B, k) up from the draft's depth; return logits (B, k, V)."""
        body = self.model.model
        s_BTD, e_BTD = (torch.cat(parts, 1) for parts in zip(*self.states, strict=True))
        self.states.clear()
        self.cache.rewind(ids.shape[1])
        inputs = self._inputs(e_BTD)
        self.cache.begin(ids.shape, self.depth, e_BTD.device)
        for iteration in range(draft + 1, self.depth + 1):
            s_BTD = body.iterate(iteration, s_BTD, e_BTD, inputs, self.cache)
        self.cache.finished(self.depth, self.depth)
        return self.model.logits(body.finish(s_BTD, inputs, self.cache))


def speculate(
    settings: Speculation,
    streamer: Any,
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """Decode as transformers' sampling does, by drafts and their verification.

    All rows go on by as many tokens as the one with the fewest accepted drafts; what that leaves
    out of a row is drafted anew, which leaves its distribution as it is.

    Args:
        settings: How tokens are drafted.
        streamer: Where new tokens are put, or None.
        model: The `RecurrentForCausalLM`.
        input_ids: The prompt, (B, T).
        logits_processor: What generate() made of the sampling options.
        stopping_criteria: Likewise, of the limits.
        generation_config: The options.
        **model_kwargs: What a forward pass is given.

    Raises:
        ValueError: The options need another way of decoding.
    """
    cache: Any = model_kwargs.get("past_key_values")
    depth = model.model.check_depth(model_kwargs.get("num_recurrences"), len(input_ids))
    _check(settings, generation_config, model_kwargs, depth, input_ids.shape[1])
    if streamer is not None:
        streamer.put(input_ids.cpu())
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    decoder = Decoder(model, cache, depth, model_kwargs.get("state_seed", 0), mask)
    pick = Picker(logits_processor, generation_config.do_sample)
    drafting, logits_BV = _begin(decoder, settings, pick, input_ids)
    new_B1 = pick.draw(pick.scores(input_ids, logits_BV))
    text = Text(input_ids, stopping_criteria, streamer, generation_config._pad_token_tensor)
    while text.append(new_B1):
        # What was read beyond the last token that stands is forgotten.
        cache.forget(cache.length - (text.ids.shape[1] - 1))
        count = settings.tokens or decoder.best_count(drafting)
        count = max(1, min(count, text.room(count)))
        new_B1 = _round(decoder, drafting, pick, text.ids, text.going_B, count)
    ids = text.ids
    cache.forget(cache.length - (ids.shape[1] - 1))
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return ids
    kind: Any = GenerateDecoderOnlyOutput
    output = kind(sequences=ids, past_key_values=cache)
    output.drafting = drafting
    return output


def _check(
    settings: Speculation, options: Any, given: dict[str, Any], depth: Any, length: int
) -> None:
    cache = given.get("past_key_values")
    if cache is None:
        raise ValueError("drafts need a cache: leave use_cache=False")
    if given.get("inputs_embeds") is not None:
        raise ValueError("drafts need input_ids: a prompt of inputs_embeds is not supported")
    if cache.get_seq_length() >= length:
        raise ValueError("the cache holds the whole prompt already: start anew")
    if not isinstance(cache, RecurrentCache) or cache.policy not in ("full", "ragged"):
        raise ValueError("drafts need a RecurrentCache of the policy full or ragged")
    if not isinstance(depth, int):
        raise ValueError("drafts need one num_recurrences for all rows")
    if settings.recurrences != "auto" and settings.recurrences >= depth:
        raise ValueError(
            f"draft_recurrences {settings.recurrences} must be less than num_recurrences {depth}"
        )
    if settings.recurrences == "auto" and depth < 2:
        raise ValueError("drafts need num_recurrences of at least 2")
    # What remembers its calls would be asked for drafts that do not stand.
    names = ("output_scores", "output_logits", "output_hidden_states", "output_attentions",
             "guidance_scale", "watermarking_config", "prompt_lookup_num_tokens")  # fmt: skip
    told = [name for name in names if getattr(options, name)]
    if options.guidance_scale == 1:  # none
        told.remove("guidance_scale")
    if options.num_beams > 1 or told:
        raise ValueError(f"drafts go without {told[0] if told else 'beam search'}")


@dataclass(frozen=True)
class Picker:
    """How a token is chosen from logits.

    Attributes:
        processors: The logits processors of the call.
        samples: Whether it is drawn, or the best.
    """

    processors: Any
    samples: bool

    def scores(self, ids: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """Return the probabilities (B, V) of the token after ids; one-hot where it is the best."""
        scores = self.processors(ids, logits_BV.to(copy=True, dtype=torch.float32))
        if self.samples:
            return scores.softmax(-1)
        return torch.zeros_like(scores).scatter_(1, scores.argmax(-1, keepdim=True), 1.0)

    def draw(
        self, probs_BV: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return a token of each row, (B, 1)."""
        if self.samples:
            return torch.multinomial(probs_BV, 1, generator=generator)
        return probs_BV.argmax(-1, keepdim=True)


def _begin(
    decoder: Decoder, settings: Speculation, pick: Picker, ids: torch.Tensor
) -> tuple[Drafting, torch.Tensor]:
    """Read the prompt, choose the draft's depth, return it and the logits (B, V) of the next token.

    With "auto", depths 1, 2 and 4 are tried on the end of the prompt, each against the full depth.
    """
    new = ids[:, decoder.cache.length :]
    depths: tuple[int, ...] = (decoder.depth,)
    if settings.recurrences != "auto":
        hidden = decoder.read(new, depths)[-1]
        decoder.states.clear()
        return Drafting(settings.recurrences), decoder.model.logits(hidden[:, -1])
    if new.shape[1] > TRIAL_TOKENS:
        decoder.read(new[:, :-TRIAL_TOKENS], depths)
        new = new[:, -TRIAL_TOKENS:]
    candidates = [depth for depth in (1, 2, 4) if depth < decoder.depth]
    tried = [decoder.model.logits(one).float() for one in decoder.read(new, (*candidates, *depths))]
    decoder.states.clear()
    real_BT = decoder.mask[:, -new.shape[1] :].bool()
    found = []
    for depth, shallow in zip(candidates, tried, strict=False):
        if pick.samples:
            agreed = torch.minimum(shallow.softmax(-1), tried[-1].softmax(-1)).sum(-1)
        else:
            agreed = (shallow.argmax(-1) == tried[-1].argmax(-1)).float()
        # Two tokens more, one of them accepted: a short prompt must not promise everything.
        judged = int(real_BT.sum()) + 2
        told = (real_BT.numel(), len(candidates))
        found.append(Drafting(depth, float(agreed[real_BT].sum()) + 1, judged, tried=told))

    def tokens_for_cost(one: Drafting) -> float:
        count = settings.tokens or decoder.best_count(one)
        config = decoder.model.config
        cost = round_cost(config, one.depth, decoder.depth, count, decoder.head)
        return expected_tokens(one.acceptance, count) / cost

    return max(found, key=tokens_for_cost), tried[-1][:, -1]


def _round(
    decoder: Decoder,
    drafting: Drafting,
    pick: Picker,
    ids: torch.Tensor,
    going_B: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """Draft so many tokens after ids (B, T) and return those that stand, (B, 1 to count)."""
    drafted, likely = ids, []
    for _ in range(count):
        probs_BV = pick.scores(drafted, decoder.draft(drafted[:, -1:], drafting.depth)[:, -1])
        likely.append(probs_BV)
        drafted = torch.cat([drafted, pick.draw(probs_BV)], 1)
    length = ids.shape[1]
    logits_BKV = decoder.verify(drafted[:, length - 1 : -1], drafting.depth)
    drafting.rounds += 1
    drafting.drafted += count * len(ids)
    standing = []
    for place in range(count):
        token_B1 = drafted[:, length + place, None]
        draft_BV = likely[place]
        full_BV = pick.scores(drafted[:, : length + place], logits_BKV[:, place])
        ratio = full_BV.gather(1, token_B1) / draft_BV.gather(1, token_B1)
        lucky = torch.rand_like(ratio) if pick.samples else torch.full_like(ratio, 0.5)
        accepted_B1 = lucky < ratio
        left_BV = (full_BV - draft_BV).clamp_min(0)
        # Where nothing is left both are alike, and every token was accepted.
        left_BV = torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, full_BV)
        standing.append(torch.where(accepted_B1, token_B1, pick.draw(left_BV)))
        refused_B = ~accepted_B1[:, 0] & going_B
        drafting.judge(int((going_B & ~refused_B).sum()), int(refused_B.sum()))
        if bool(refused_B.any()):
            break
    drafting.emitted += len(standing)
    return torch.cat(standing, 1)
