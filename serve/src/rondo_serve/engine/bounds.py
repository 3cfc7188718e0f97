"""What an engine may use, and what it can therefore never serve."""

from dataclasses import dataclass

import torch

from rondo.memory import READOUT_COPIES
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo_serve.engine.arena import Arena
from rondo_serve.engine.schedule import Favour
from rondo_serve.requests import Ask, Refused


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


def check(
    ask: Ask, depth: int, config: RecurrentConfig, settings: EngineSettings, arena: Arena
) -> None:
    """Refuse what can never be served.

    Args:
        ask: What is asked for.
        depth: Depth that the policy allowed.
        config: The model's.
        settings: The engine's.
        arena: Where keys and values would lie.

    Raises:
        Refused: It cannot.
    """
    length, most = len(ask.prompt) + ask.max_new_tokens, settings.max_context
    if not ask.prompt:
        raise Refused("the prompt is empty: give some text", "prompt")
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
    if ask.exit is not None and ask.exit.criterion == "gate" and not config.exit_gate:
        raise Refused("the model has no exit gate: take another rule", "exit")
    _check_readouts(ask, config.vocab_size, settings.readout_bytes)
    if (needed := arena.shape.pages_for(length - 1, depth)) > arena.pages.total:
        raise Refused(
            f"{length} tokens at depth {depth} need {needed} pages of keys and values, and "
            f"this server has {arena.pages.total}: ask for fewer tokens or less depth",
            "max_tokens",
        )


def _check_readouts(ask: Ask, vocab_size: int, room: int) -> None:
    """Refuse a prompt whose logits would not fit, where each of its tokens is read out."""
    if ask.exit is None or not ask.exit.reads_logits:
        return
    each = READOUT_COPIES * torch.float32.itemsize * vocab_size
    most = room // each
    if len(ask.prompt) > most:
        raise Refused(
            f"an exit that reads logits ({ask.exit.criterion}) takes prompts of up to {most} "
            f"tokens here, and this one has {len(ask.prompt)}: take state_distance or gate",
            "exit",
        )
