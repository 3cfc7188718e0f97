"""How tokens are made and what that costs: settings and checkpoint put together, FLOPs executed."""

from dataclasses import dataclass
from typing import Any

import torch

from rondo.config import DecodingConfig, calibrate
from rondo.errors import UserError
from rondo.flops import Costs
from rondo.memory import Request
from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.exits_recurrent import READING_LOGITS, ExitRule
from rondo.modeling.generation_recurrent import Contrast
from rondo.modeling.speculation_recurrent import TRIAL_TOKENS, Drafting


@dataclass(frozen=True)
class Decoding:
    """How tokens are made: the settings and what the checkpoint says, put together."""

    depths: tuple[int, ...]
    """r of each row; with an exit, its cap."""
    exit: ExitRule | None
    policy: str | None
    """None for the plain cache of one fixed depth."""
    contrast: Contrast | None
    config: DecodingConfig

    @property
    def cap(self) -> int:
        """The most iterations."""
        return max(self.depths)

    def options(self) -> dict[str, Any]:
        """Return the arguments of `generate` of the model."""
        config, one = self.config, len(set(self.depths)) == 1
        sampling: dict[str, Any] = {"do_sample": False}
        if config.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": config.temperature,
                "top_p": config.top_p,
            }
        return sampling | {
            "num_recurrences": self.cap if one else list(self.depths),
            "exit": self.exit,
            "contrast": self.contrast,
            "draft_recurrences": config.draft,
            "draft_tokens": config.draft_tokens,
            "warm_start": config.warm_start,
            "state_seed": config.seed,
        }

    def request(self, prompt: int, new: int) -> Request:
        """Return what a prompt and its continuation ask of memory."""
        readouts = 1
        if self.exit is not None and self.exit.criterion in READING_LOGITS:
            readouts = prompt
        elif self.config.draft == "auto":
            readouts = 4 * min(prompt, TRIAL_TOKENS)
        branching = self.contrast is not None
        return Request(self.depths, prompt, new, self.policy, readouts, branching)


def decoding_of(
    config: DecodingConfig, shape: RecurrentConfig, recurrences: tuple[int, ...] | None
) -> Decoding:
    """Put settings and checkpoint together.

    Args:
        config: The settings.
        shape: The model's config.
        recurrences: Depths that were asked for.

    Raises:
        UserError: They do not go together.
    """
    stored = stored_exit(config, shape) if config.exit and config.threshold is None else {}
    cap = config.max_recurrences or stored.get("max_recurrences", shape.num_recurrences)
    depths = recurrences or (cap,)
    several = len(set(depths)) > 1
    rule = exit_rule(config, shape, stored)
    if rule and rule.min_recurrences > min(depths):
        raise UserError(
            f"--min-recurrences {rule.min_recurrences} is beyond the depth of {min(depths)}"
        )
    for flag, shallow in (("draft", config.draft), ("contrast", config.contrast)):
        least = 1 if shallow == "auto" else shallow
        if least and least >= min(depths):
            raise UserError(
                f"--{flag} {shallow} needs a depth beyond it: {min(depths)} is not, so raise "
                "--recurrences"
            )
    if several and (config.draft or config.cache == "full-int8"):
        flag = "--draft" if config.draft else "--cache full-int8"
        raise UserError(f"{flag} needs one depth: give --recurrences a single number")
    contrast = None
    if config.contrast:
        strength = config.contrast_strength
        contrast = Contrast(config.contrast, 0.5 if strength is None else strength)
    policy: str | None = config.cache
    if policy is None and rule:
        policy = stored.get("cache_policy", "ragged")
    elif policy is None and (several or config.draft or contrast or config.warm_start):
        policy = "full"
    return Decoding(depths, rule, policy, contrast, config)


def stored_exit(config: DecodingConfig, shape: RecurrentConfig) -> dict[str, Any]:
    """Return what `rondo calibrate` stored for the exit that is asked for.

    Raises:
        UserError: It stored nothing, nothing for this tolerance, or several where none is named.
    """
    stored = (shape.exit_rules or {}).get(config.exit or "", {})
    if not stored:
        raise UserError(
            f"{config.model} has no calibrated {config.exit} exit: give --threshold, or run "
            f"rondo calibrate {config.model}"
        )
    if config.tolerance is None and len(stored) == 1:
        return next(iter(stored.values()))
    told = f"the {config.exit} exit of {config.model} is calibrated to {', '.join(stored)}"
    if config.tolerance is None:
        raise UserError(f"{told}: choose one with --tolerance")
    name = spelled(config.tolerance)
    if name not in stored:
        raise UserError(f"{told}, not to --tolerance {name}")
    return stored[name]


def spelled(tolerance: str) -> str:
    """Return a tolerance as checkpoints spell it; see `rondo.config.calibrate.spelled`.

    Raises:
        UserError: It is none.
    """
    try:
        return calibrate.spelled(tolerance)
    except ValueError as error:
        raise UserError(f"--tolerance: {error}") from error


def exit_rule(
    config: DecodingConfig, shape: RecurrentConfig, stored: dict[str, Any]
) -> ExitRule | None:
    """Return the exit that is asked for; what flags say goes before what is stored.

    Raises:
        UserError: The checkpoint has no gate to ask.
    """
    if config.exit is None:
        return None
    if config.exit == "gate" and not shape.exit_gate:
        raise UserError(
            f"{config.model} has no exit gate: train one with rondo train --mode gate, or take "
            "another --exit"
        )
    names = ("threshold", "min_recurrences", "check_every")
    fields = {name: stored[name] for name in names if name in stored}
    given = {name: getattr(config, name) for name in names}
    return ExitRule(config.exit, **fields | {k: v for k, v in given.items() if v is not None})


def executed_flops(
    costs: Costs, cache: RecurrentCache, prompt_length: int, start: int = 0
) -> torch.Tensor:
    """Return the FLOPs that reading each token took, (B, S - start).

    The cache says how many checks ran coda and head, but not when: they are counted with the
    tokens in proportion to their iterations. What the exit gate multiplies is not counted.

    Args:
        costs: The model's.
        cache: The cache after the generation.
        prompt_length: Tokens up to the end of the prompt, which were read at once.
        start: Tokens that an earlier call had read.
    """
    weight = cache.recurrences[:, start:].double()
    checks = cache.num_checks * weight / weight.sum().clamp_min(1)
    return flops_by_token(costs, cache.executed[:, start:], checks, prompt_length, start)


def flops_by_token(
    costs: Costs, iterations: torch.Tensor, checks: Any, prompt_length: int, start: int = 0
) -> torch.Tensor:
    """Return the FLOPs of tokens (B, T) by their iterations and further passes to the logits."""
    places = torch.arange(start, start + iterations.shape[1], device=iterations.device)
    lengths: Any = (places + 1).clamp_min(prompt_length)
    # Of the prompt only the last token's logits are wanted.
    headless = (places < prompt_length - 1) * 2 * costs.head_matmul
    once = costs.forward_flops(0, lengths) - headless
    return once + iterations * costs.iteration_flops(lengths) + checks * costs.finish_flops(lengths)


def drafting_flops(
    costs: Costs, drafting: Drafting, depth: int, prompt_length: int, read: int
) -> float:
    """Return the FLOPs that drafts took beyond those of the tokens that stand.

    Each drafted token was read out twice, one that was refused was read in vain, and a depth that
    was chosen was tried on the prompt.

    Args:
        costs: The model's.
        drafting: What was drafted.
        depth: r.
        prompt_length: Tokens of the prompt.
        read: Tokens after the prompt that stand and were read.
    """
    length = prompt_length + (read + 1) // 2
    vain = (drafting.drafted - read) * costs.forward_flops(depth, length)
    tokens, depths = drafting.tried
    tried = tokens * depths * costs.finish_flops(prompt_length)
    # At the full depth the last token's logits are wanted anyway.
    tried += max(0, tokens - 1) * 2 * costs.head_matmul
    return vain + drafting.drafted * costs.finish_flops(length) + tried
