"""What an engine may use, and what it can therefore never serve."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from rondo.memory import READOUT_COPIES
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.exits_recurrent import ExitRule
from rondo_serve.config import Favour
from rondo_serve.engine.arena import Arena
from rondo_serve.policy import Allowed
from rondo_serve.requests import Ask, Refused

# Logits divided by less may leave the range of numbers.
COLDEST = 1e-5
# Ropes whose angles depend on how long the texts of a call are.
SCALING_ROPES = ("dynamic", "longrope")


@dataclass(frozen=True)
class EngineSettings:
    """What an engine may use, and how it goes about it; see `ServeConfig` for what is not said.

    Attributes:
        kv_bytes: Memory for keys and values.
        max_context: Tokens of a prompt and its answer.
        readout_bytes: Memory for the logits of prompts whose exit reads them.
        lockstep: Whether every token waits for the deepest in flight; to measure against.
    """

    kv_bytes: int
    max_context: int
    max_running: int = 32
    max_queue: int = 128
    tick_tokens: int = 256
    prompt_chunk: int = 64
    prefix_cache: bool = True
    favour: Favour = "even"
    max_seconds: float = 600.0
    readout_bytes: int = 10**9
    lockstep: bool = False


def longest_context(config: RecurrentConfig) -> int:
    """Return how many tokens of a text a model can be served.

    Positions that scale with how long a text is would depend on who else is in the batch, so such a
    model is served up to the length from which on it scales.
    """
    most = config.max_position_embeddings
    for rope in _ropes(getattr(config.base_config, "rope_parameters", None) or {}):
        if rope.get("rope_type") in SCALING_ROPES:
            most = min(most, rope.get("original_max_position_embeddings") or most)
    return most


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rotary embeddings of a config, which has one, or one for each kind of layer."""
    if "rope_type" in parameters:
        return [parameters]
    return [one for one in parameters.values() if isinstance(one, dict)]


def check(
    ask: Ask, allowed: Allowed, config: RecurrentConfig, settings: EngineSettings, arena: Arena
) -> None:
    """Refuse what can never be served.

    Args:
        ask: What is asked for.
        allowed: What the policy gave it.
        config: The model's.
        settings: The engine's.
        arena: Where keys and values would lie.

    Raises:
        Refused: It cannot.
    """
    length, most = len(ask.prompt) + ask.max_new_tokens, settings.max_context
    depth, rule = allowed.depth, allowed.exit
    _check_values(ask, config.vocab_size)
    if length > most:
        raise Refused(
            f"a prompt of {len(ask.prompt)} tokens and {ask.max_new_tokens} new ones exceed "
            f"the {most} that this server takes",
            "max_tokens",
        )
    if depth > config.max_recurrences:
        raise Refused(
            f"num_recurrences {depth} is beyond the model's cap of {config.max_recurrences}",
            "num_recurrences",
        )
    if rule is not None and rule.criterion == "gate" and not config.exit_gate:
        raise Refused("the model has no exit gate: take another rule", "exit")
    if rule is not None and rule.reads_logits:
        _check_readouts(len(ask.prompt), rule, config.vocab_size, settings.readout_bytes)
    if (needed := arena.shape.pages_for(length - 1, depth)) > arena.pages.total:
        raise Refused(
            f"{length} tokens at depth {depth} need {needed} pages of keys and values, and "
            f"this server has {arena.pages.total}: ask for fewer tokens or less depth",
            "max_tokens",
        )


def _check_values(ask: Ask, vocab_size: int) -> None:
    """Refuse what would fail in the midst of a tick, which others share."""
    if not ask.prompt:
        raise Refused("the prompt is empty: give some text", "prompt")
    if not 0 <= min(ask.prompt) <= max(ask.prompt) < vocab_size:
        raise Refused(f"the prompt's tokens must lie in 0..{vocab_size - 1}", "prompt")
    if ask.max_new_tokens < 1:
        raise Refused(f"max_tokens must be at least 1, got {ask.max_new_tokens}", "max_tokens")
    sampling = ask.sampling
    if not (sampling.temperature == 0 or COLDEST <= sampling.temperature < math.inf):
        raise Refused(
            f"temperature must be 0 or at least {COLDEST}, got {sampling.temperature}",
            "temperature",
        )
    if not 0 <= sampling.top_p <= 1 or sampling.top_k < 0:
        raise Refused("top_p must lie in 0..1, and top_k must not be negative", "top_p")
    if not 0 < sampling.repetition_penalty < math.inf:
        raise Refused("repetition_penalty must be above 0", "repetition_penalty")
    if not 0 <= sampling.seed < 2**63:
        raise Refused("seed must be a whole number below 2 ** 63", "seed")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= vocab_size:
        raise Refused(f"logprobs must lie in 0..{vocab_size}", "logprobs")


def _check_readouts(length: int, rule: ExitRule, vocab_size: int, room: int) -> None:
    """Refuse a prompt whose logits would not fit, where each of its tokens is read out."""
    each = READOUT_COPIES * torch.float32.itemsize * vocab_size
    most = room // each
    if length > most:
        raise Refused(
            f"an exit that reads logits ({rule.criterion}) takes prompts of up to {most} tokens "
            f"here, and this one has {length}: take state_distance or gate",
            "exit",
        )
