"""A checkpoint and settings made into an engine, after everything that can be refused."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rondo.config import GenerateConfig
from rondo.data import load_tokenizer
from rondo.errors import ProofError, UserError
from rondo.generation import open_session, shape_of
from rondo.memory import SPARED, Request, free_memory, in_words
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo_govern.efforts import EFFORTS, efforts_of
from rondo_serve.config import ServeConfig, bytes_of
from rondo_serve.engine.bounds import EngineSettings, longest_context
from rondo_serve.engine.engine import Engine
from rondo_serve.policy import Limits
from rondo_serve.requests import Ask, Event, Refused, Sampling, Token

# Part of what is free that keys and values may take, unless told: on a GPU the process has it for
# itself, elsewhere others live there too.
KV_SHARE = {"cuda": 0.85, "cpu": 0.25}
# A CPU is busy with few tokens already, and more make the tick longer for all.
TICK_TOKENS = {"cuda": 512, "cpu": 64}
# A prompt on which the engine is held against the plain model before it serves anyone.
PROOF_TOKENS, PROOF_NEW = 12, 3
PROOF_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float64: 1e-9}


@dataclass(frozen=True)
class Opened:
    """An engine that is ready to start, and what the operator is told of it."""

    engine: Engine
    tokenizer: Any
    shape: RecurrentConfig
    limits: Limits
    told: tuple[str, ...]

    @property
    def about(self) -> dict[str, str]:
        """What decides rounding, by name."""
        dtype = str(self.engine.shape.dtype).removeprefix("torch.")
        return {"dtype": dtype, "device": self.engine.passes.device.type}


def limits_of(config: ServeConfig, shape: RecurrentConfig) -> Limits:
    """Return the bounds that the settings and the model allow.

    Raises:
        UserError: They contradict each other.
    """
    cap = config.max_recurrences or shape.max_recurrences
    if cap > shape.max_recurrences:
        raise UserError(
            f"--max-recurrences {cap} is beyond the model's cap of {shape.max_recurrences} "
            f"(max_recurrences in {config.model}/config.json)"
        )
    floor = config.min_recurrences
    default = config.num_recurrences or min(max(shape.num_recurrences, floor), cap)
    if not floor <= default <= cap:
        raise UserError(
            f"a depth of {default} by default lies outside {floor} to {cap}: raise "
            "--max-recurrences or lower the other"
        )
    efforts = efforts_of(default, floor, cap) | (config.efforts or {})
    for effort in EFFORTS:
        if not floor <= efforts[effort] <= cap:
            raise UserError(f"--efforts {effort} {efforts[effort]} lies outside {floor} to {cap}")
    return Limits(default, cap, floor, efforts)


def context_of(config: ServeConfig, shape: RecurrentConfig) -> int:
    """Return how many tokens prompt and answer may have together.

    Raises:
        UserError: More is asked for than the model takes.
    """
    most = longest_context(shape)
    if config.max_context and config.max_context > most:
        raise UserError(
            f"--max-context {config.max_context} is beyond the {most} tokens that the model takes "
            "here: lower it"
        )
    return config.max_context or most


def open_engine(config: ServeConfig) -> Opened:
    """Load a model, plan its memory, and prove that the engine answers as the model does.

    Raises:
        UserError: Settings, checkpoint and machine do not go together.
        ProofError: The engine does not answer as the model does.
    """
    shape = shape_of(config.model)
    limits, context = limits_of(config, shape), context_of(config, shape)
    tokenizer = load_tokenizer(Path(config.model))
    loading = GenerateConfig(
        model=config.model, weights=config.weights, dtype=config.dtype, device=config.device
    )
    once = Request(depths=(limits.default,), prompt=1, new=1)
    session = open_session(loading, shape, tokenizer, once)
    model = session.model
    free = free_memory(model.device)
    kv_bytes = kv_bytes_of(config.kv_memory, free, model.device)
    tick_tokens = config.tick_tokens or TICK_TOKENS.get(model.device.type, TICK_TOKENS["cpu"])
    settings = EngineSettings(
        kv_bytes=kv_bytes,
        max_context=context,
        max_running=config.max_running,
        max_queue=config.max_queue,
        tick_tokens=tick_tokens,
        prompt_chunk=min(config.prompt_chunk or max(1, tick_tokens // 2), tick_tokens),
        prefix_cache=config.prefix_cache,
        favour=config.favour,
        max_seconds=config.max_seconds,
    )
    plain = {depth: plain_logits(model, depth) for depth in {limits.floor, limits.default}}
    try:
        engine = Engine(model, tokenizer, limits, settings, session.ends)
        prove(engine, plain)
    except Refused as error:
        raise UserError(f"{config.model} cannot be served so: {error}") from error
    return Opened(engine, tokenizer, shape, limits, tuple(told(engine, limits, config.policy)))


def kv_bytes_of(asked: str | None, free: int | None, device: torch.device) -> int:
    """Return the memory for keys and values.

    Raises:
        UserError: It is not free, or how much is free cannot be told.
    """
    if asked is None:
        if free is None:
            raise UserError("how much memory is free cannot be told here: give --kv-memory")
        return int(KV_SHARE.get(device.type, KV_SHARE["cpu"]) * free)
    wanted = bytes_of(asked)
    if free is not None and wanted > SPARED * free:
        raise UserError(
            f"--kv-memory {asked} is more than there is: {in_words(free)} are free, of which a "
            "tenth is kept for the layers"
        )
    return wanted


def told(engine: Engine, limits: Limits, policy: str | None = None) -> list[str]:
    """Return what an operator wants to know before the first request."""
    usual = f", {limits.default} by default" if policy is None else ""
    shape, pages = engine.shape, engine.arena.pages.total
    room = [
        f"{tokens_for(shape, pages, depth):,} tokens at r = {depth}"
        for depth in dict.fromkeys((limits.floor, limits.default, limits.cap))
    ]
    device, dtype = engine.passes.device.type, str(shape.dtype).removeprefix("torch.")
    return [
        f"{dtype} on {device}; depth {limits.floor} to {limits.cap}{usual}",
        f"keys and values {in_words(engine.settings.kv_bytes)} in {pages:,} pages: "
        + ", ".join(room),
        f"up to {engine.settings.max_running} texts at once, "
        f"{engine.settings.max_queue} waiting, {engine.settings.max_context:,} tokens each",
    ]


def tokens_for(shape: Any, pages: int, depth: int) -> int:
    """Return how many tokens of one long text at a depth so many pages hold."""
    each = 1 / shape.tokens_per_page(False) + depth / shape.tokens_per_page(True)
    return math.floor(pages / each)


def proof_text(vocab: int) -> list[int]:
    """Return tokens from all over a vocabulary."""
    return [1 + (7919 * n) % (vocab - 1) for n in range(PROOF_TOKENS + PROOF_NEW)]


@torch.inference_mode()
def plain_logits(model: Any, depth: int) -> torch.Tensor:
    """Return the logits (tokens, V) of the proof's text, computed by the model itself."""
    ids = torch.tensor([proof_text(model.config.vocab_size)], device=model.device)
    output = model(input_ids=ids, num_recurrences=depth)
    return output.logits[0].float()


def prove(engine: Engine, plain: Mapping[int, torch.Tensor]) -> None:
    """Hold the engine's log-probabilities of a few texts in one batch against the model's own.

    Args:
        engine: The engine, which does not run yet.
        plain: The model's logits of the proof's text, (tokens, V), by depth.

    Raises:
        ProofError: They differ by more than rounding.
        Refused: The engine cannot take such texts.
    """
    limit = PROOF_TOLERANCE.get(engine.shape.dtype, PROOF_TOLERANCE[torch.bfloat16])
    told: dict[tuple[int, int], list[Event]] = {}
    for depth, logits in plain.items():
        ids = proof_text(logits.shape[1])
        for count in range(PROOF_TOKENS, len(ids)):
            events = told[depth, count] = []
            name, told_too = f"proof-{depth}-{count}", Sampling(logprobs=0)
            ask = Ask(name, tuple(ids[:count]), 1, depth, sampling=told_too)
            # As many in one batch as may be in flight at once.
            while engine.load().running + engine.load().waiting >= engine.settings.max_running:
                engine.tick()
            engine.submit(ask, events.append)
    while engine.tick():
        pass
    for (depth, count), events in told.items():
        expected = plain[depth][count - 1].log_softmax(-1)
        tokens = [event for event in events if isinstance(event, Token)]
        found = tokens[0].logprob if tokens else None
        if found is None or not abs(found - float(expected[tokens[0].token])) <= limit:
            raise ProofError("the engine does not answer as the model does: do not serve it")
