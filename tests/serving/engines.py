"""Engines of tiny models, what they tell, and what `generate` says to the same requests."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from conftest import EOS, VOCAB, byte_tokenizer, recurrent
from rondo.decoding import executed_flops, flops_by_token
from rondo.flops import costs_of
from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.modeling.exits_recurrent import ExitGate, ExitRule
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo_serve.engine.engine import Engine, EngineSettings
from rondo_serve.policy import Limits, Policy
from rondo_serve.requests import Ask, Event, Finished, Sampling, Token
from rondo_serve.text import Writer

TOKENIZER = byte_tokenizer()
SETTINGS: dict[str, Any] = {
    "max_running": 8,
    "max_queue": 100,
    "tick_tokens": 64,
    "prompt_chunk": 16,
    "kv_bytes": 1 << 24,
    "max_context": 256,
    "prefix_cache": False,
    "favour": "even",
    "max_seconds": 600.0,
}


@cache
def small(family: str = "llama", gate: bool = False, **fields: Any) -> RecurrentForCausalLM:
    """A model of one layer, a core of two, one layer, in double precision.

    It is shared: leave it as it is.
    """
    model = recurrent(family, [0, 1, 3, 5], sizes=(1, 2, 1), **fields)
    if gate:
        model.config.exit_gate = True
        model.model.exit_gate = ExitGate(model.config)
        stream = torch.Generator().manual_seed(2)
        nn.init.normal_(model.model.exit_gate.weight, std=0.1, generator=stream)
        nn.init.ones_(model.model.exit_gate.bias)
        model.model.exit_gate.weight.data[0, -1] = 1.0
    return model.double()


def make_engine(
    model: RecurrentForCausalLM, policy: Policy | None = None, **settings: Any
) -> Engine:
    """An engine of a copy of a model, since it has the layers attend in a way of its own."""
    return Engine(
        copy.deepcopy(model),
        TOKENIZER,
        policy or Limits(default=4, cap=16),
        EngineSettings(**SETTINGS | settings),
        ends=ends_of(model),
    )


def ends_of(model: RecurrentForCausalLM) -> set[int]:
    """Tokens that end a text."""
    told = model.generation_config.eos_token_id
    return {EOS, *(told if isinstance(told, list) else [told])}


@dataclass
class Heard:
    """The events of a request, which are its `deliver`."""

    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        assert not self.ended, f"{event} came after the end"
        self.events.append(event)

    @property
    def ended(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished)

    @property
    def end(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last

    @property
    def told(self) -> list[Token]:
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.told]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


Arrivals = Sequence[tuple[int, Ask]]
"""Requests with the ticks before which they come."""


def serve(engine: Engine, arrivals: Arrivals, most: int = 5000) -> dict[str, Heard]:
    """Let an engine answer requests, in this thread."""
    heard = {ask.id: Heard() for _, ask in arrivals}
    left, tick = sorted(arrivals, key=lambda one: one[0]), 0
    while True:
        while left and left[0][0] <= tick:
            ask = left.pop(0)[1]
            engine.submit(ask, heard[ask.id])
        if not engine.tick() and not left:
            break
        tick += 1
        assert tick < most, f"still not done: {engine.load()}"
    assert all(one.ended for one in heard.values())
    return heard


@dataclass(frozen=True)
class Answer:
    """What `generate` says to a request, by itself.

    Attributes:
        tokens: New tokens, up to what ends the text, itself included.
        depths: Iterations of each.
        logprobs: Logarithms of the probabilities each was chosen from, (V,) of each.
        iterations: Iterations of all tokens that were read.
        flops: FLOPs that this took, the prompt read at once.
        least_flops: Those of a prompt that is read token by token.
        reason: Why it ended.
        text: The text.
    """

    tokens: list[int]
    depths: list[int]
    logprobs: Tensor
    iterations: int
    flops: float
    least_flops: float
    reason: str
    text: str


@cache
@torch.no_grad()
def alone(model: RecurrentForCausalLM, ask: Ask, cached: int = 0) -> Answer:
    """Return what `generate` says to a request whose first tokens need not be read."""
    sampling, length, depth = ask.sampling, len(ask.prompt), ask.num_recurrences
    assert depth is not None
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    cache = None
    if ask.exit is not None:
        cache = RecurrentCache(model.config, "ragged")
        options |= {"exit": ask.exit, "past_key_values": cache}
    ids = torch.tensor([ask.prompt])
    torch.manual_seed(sampling.seed)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ask.max_new_tokens,
        num_recurrences=depth,
        state_seed=sampling.seed,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    made = output.sequences[0, length:].tolist()
    writer, tokens = Writer(TOKENIZER, ask.stop), []
    text = ""
    while len(tokens) < len(made) and not writer.stopped:
        tokens.append(made[len(tokens)])
        text += "" if tokens[-1] in ends_of(model) else writer.push(tokens[-1])
    stops = writer.stopped or tokens[-1] in ends_of(model)
    text += writer.finish()
    count, costs = len(tokens), costs_of(model)
    executed = torch.full((1, length + count - 1), depth) if cache is None else cache.executed
    took = executed if cache is None else cache.recurrences
    if cache is None:
        flops = flops_by_token(costs, executed[:, cached:], 0, length, cached)
    else:
        flops = executed_flops(costs, cache, length, cached)
    read = slice(cached, length + count - 1)
    headless = 2 * costs.head_matmul * (length - 1 - cached)
    least = flops_by_token(costs, executed[:, read], 0, 0, cached).sum() - headless
    return Answer(
        tokens,
        took[0, length - 1 : length + count - 1].tolist(),
        torch.stack(output.logits)[:count, 0].double().log_softmax(-1),
        int(executed[0, read].sum()),
        float(flops[0, : length + count - 1 - cached].sum()),
        float(least),
        "stop" if stops else "length",
        text,
    )


def assert_as_alone(
    model: RecurrentForCausalLM, asks: Iterable[Ask], heard: Mapping[str, Heard]
) -> list[Answer]:
    """Every answer is that of `generate`, and so is what it is said to have taken."""
    answers = []
    for ask in asks:
        found = heard[ask.id]
        receipt = found.end.receipt
        answer = alone(model, ask, receipt.cached_tokens)
        assert found.tokens == answer.tokens, ask
        assert [one.recurrences for one in found.told] == answer.depths, ask
        assert found.text == answer.text
        assert found.end.reason == answer.reason
        assert_logprobs(found.told, ask.sampling.logprobs, answer.logprobs)
        assert (receipt.asked, receipt.allowed) == (ask.num_recurrences, ask.num_recurrences)
        assert receipt.prompt_tokens == len(ask.prompt)
        assert receipt.depths == Counter(answer.depths)
        assert receipt.iterations == answer.iterations, ask
        assert_flops(receipt.flops, answer, ask)
        assert 0 <= receipt.queued <= receipt.seconds
        assert receipt.first_token is not None
        assert 0 <= receipt.first_token <= receipt.seconds
        answers.append(answer)
    return answers


def assert_flops(found: float, answer: Answer, ask: Ask) -> None:
    """FLOPs are those of the one call, or less by what tokens that come in parts do not attend."""
    if ask.exit is not None and ask.exit.reads_logits:
        # When checks ran is known to the engine, and to the oracle in proportion to iterations.
        assert abs(found / answer.flops - 1) < 0.02, ask
    else:
        assert answer.least_flops * (1 - 1e-9) <= found <= answer.flops * (1 + 1e-9), ask


def assert_logprobs(told: Sequence[Token], wanted: int | None, expected: Tensor) -> None:
    """Probabilities are those of the raw logits."""
    for token, logprobs in zip(told, expected, strict=True):
        if wanted is None:
            assert token.logprob is None
            assert token.top == ()
            continue
        assert token.logprob is not None
        assert abs(token.logprob - float(logprobs[token.token])) < 1e-5
        best = logprobs.topk(wanted)
        assert [number for number, _ in token.top] == best.indices.tolist()
        for (_, value), other in zip(token.top, best.values.tolist(), strict=True):
            assert abs(value - other) < 1e-5


def traffic(
    seed: int,
    count: int = 12,
    depths: Sequence[int] = range(1, 9),
    exits: Sequence[ExitRule | None] = (None,),
    longest: int = 40,
    new: int = 7,
    sampled: bool = False,
    apart: int = 3,
) -> list[tuple[int, Ask]]:
    """Requests of random lengths and depths at random ticks."""
    random, arrivals, tick = Random(seed), [], 0
    for number in range(count):
        tick += random.randrange(apart)
        sampling = Sampling(seed=random.randrange(1000), logprobs=random.choice((None, 0, 3)))
        if sampled:
            sampling = replace(
                sampling,
                temperature=random.choice((0.7, 1.0, 1.5)),
                top_p=random.choice((1.0, 0.9, 0.5)),
                top_k=random.choice((0, 5, 40)),
            )
        ask = Ask(
            id=f"{seed}-{number}",
            prompt=prompt(random, random.choice((1, 2, random.randint(1, longest), longest))),
            max_new_tokens=random.randint(1, new),
            num_recurrences=random.choice(depths),
            exit=random.choice(exits),
            sampling=sampling,
        )
        if ask.exit is not None:
            ask = replace(ask, num_recurrences=max(depths))
        arrivals.append((tick, ask))
    return arrivals


def prompt(random: Random, length: int) -> tuple[int, ...]:
    """A random prompt without special tokens."""
    return tuple(random.randrange(3, VOCAB) for _ in range(length))


def asks_of(arrivals: Arrivals) -> list[Ask]:
    return [ask for _, ask in arrivals]
