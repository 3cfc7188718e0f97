"""What `generate` of transformers takes beside its own arguments.

Shapes: B batch, T tokens of this call, V vocabulary.
"""

import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from .cache_recurrent import RecurrentCache
from .exits_recurrent import ExitRule
from .speculation_recurrent import Speculation, speculate


@dataclass(frozen=True)
class Contrast:
    """Weigh what the loop says at its depth against what it said at a shallower one.

    Contrastive decoding (arXiv:2210.15097) with the model's own shallow answer as the amateur, as
    in arXiv:2610.02185: (1 + strength) log p_deep - strength log p_shallow, over the tokens whose
    p_deep is at least `plausible` times the best one's.

    Attributes:
        recurrences: The shallower depth.
        strength: Weight of the shallow answer; 0 changes nothing but what is implausible.
        plausible: Part of the best token's probability that a token must have.

    Raises:
        ValueError: A field is out of its range.
    """

    recurrences: int = 1
    strength: float = 0.5
    plausible: float = 0.1

    def __post_init__(self) -> None:
        if self.recurrences < 1 or self.strength < 0 or not 0 <= self.plausible <= 1:
            raise ValueError(
                "a contrast needs recurrences >= 1, strength >= 0 and plausible in 0..1, got "
                f"{self}"
            )

    def check(self, config: Any, depth: Any, exits: Any) -> None:
        """Refuse what cannot be contrasted.

        Raises:
            ValueError: The depth (one, one per row, or the model's own) is no deeper, or tokens
                may leave before.
        """
        depth = config.num_recurrences if depth is None else depth
        shallowest = int(torch.as_tensor(depth).min())
        if shallowest <= self.recurrences:
            raise ValueError(
                f"a contrast with depth {self.recurrences} needs num_recurrences beyond it, got "
                f"{shallowest}"
            )
        if exits is not None:
            raise ValueError("a contrast and an exit exclude each other: leave one")

    def __call__(self, deep: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
        """Return contrasted scores of two answers' logits, (B, T, V) each."""
        expert, amateur = deep.float().log_softmax(-1), shallow.float().log_softmax(-1)
        scores = expert + self.strength * (expert - amateur)
        if self.plausible == 0:
            return scores
        least = expert.amax(-1, keepdim=True) + math.log(self.plausible)
        return scores.masked_fill(expert < least, -math.inf)


class RecurrentGenerationMixin(GenerationMixin):
    """`generate` with depth, exits, cache policies, drafts at a shallower depth, and contrast."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does.

        What is said here is taken beside the arguments of `GenerationMixin.generate`. With
        return_dict_in_generate, the output's `recurrences` are the iterations that each new token
        took, (B, new tokens).

        Args:
            *args: Those of transformers.
            **kwargs: Those of transformers, and

                - num_recurrences: Depth r, one for all rows or one per row; with an exit, the cap.
                - exit: An `ExitRule`, or the name of a criterion that was calibrated.
                - cache_policy: What deeper iterations read of a token that left, one of
                  `CACHE_POLICIES`; ragged with an exit unless given, full without.
                - draft_recurrences: Draft tokens at this depth and verify them at the full one;
                  "auto" chooses by what the prompt and the drafts show. The result is that of
                  plain decoding.
                - draft_tokens: Tokens of a draft; chosen by what was accepted unless given.
                - contrast: A `Contrast`, or the shallower depth of one.
                - warm_start: Start each new token at the state of the one before it.
                - state_seed: Seed of a `normal` initial state.

        Raises:
            ValueError: Options exclude each other or are out of range.
        """
        model: Any = self
        if isinstance(kwargs.get("exit"), str):
            kwargs["exit"] = calibrated(model.config, kwargs["exit"])
        if isinstance(kwargs.get("contrast"), int):
            kwargs["contrast"] = Contrast(kwargs["contrast"])
        draft, tokens = kwargs.pop("draft_recurrences", None), kwargs.pop("draft_tokens", None)
        ours = [name for name in ("exit", "contrast", "warm_start") if kwargs.get(name)]
        self._give_cache(kwargs, bool(ours or draft))
        if draft is not None:
            if ours:
                raise ValueError(f"drafts and {ours[0]} exclude each other: leave one")
            settings = Speculation(draft, tokens)
            # The library gives a streamer to its own ways of decoding only.
            decode = partial(speculate, settings, kwargs.pop("streamer", None))
            kwargs["custom_generate"] = decode
        elif tokens is not None:
            raise ValueError("draft_tokens has no meaning without draft_recurrences")
        parent: Any = super()
        output = parent.generate(*args, **kwargs)
        # Beams are other rows than the sequences that come of them.
        plain = isinstance(output, GenerateDecoderOnlyOutput)
        cache = output.get("past_key_values") if plain else None
        if isinstance(cache, RecurrentCache):
            prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            new = output.sequences.shape[1] - (0 if prompt is None else prompt.shape[1])
            # A new token is made by its predecessor's iterations, and the last one is not read.
            output.recurrences = cache.recurrences[:, cache.length - new : cache.length]
        return output

    def _give_cache(self, kwargs: dict[str, Any], needed: bool) -> None:
        """Put a cache of our own into the arguments where one is needed and none is given."""
        model: Any = self
        policy, given = kwargs.pop("cache_policy", None), kwargs.get("past_key_values")
        if policy is not None and given is not None:
            raise ValueError("cache_policy is the cache's own: give it to the RecurrentCache")
        options = kwargs.get("generation_config")
        cached = kwargs.get("use_cache", True if options is None else options.use_cache)
        if cached is False:
            told = [name for name in ("past_key_values", "warm_start") if kwargs.get(name)]
            told += ["cache_policy"] if policy else []
            if told:
                raise ValueError(f"{told[0]} needs a cache: leave use_cache=False")
        elif given is None and (policy or needed):
            if kwargs.get("cache_implementation") is not None:
                raise ValueError(
                    "exits, contrasts, warm starts, drafts and cache_policy need a RecurrentCache: "
                    "leave cache_implementation"
                )
            policy = policy or ("ragged" if kwargs.get("exit") else "full")
            kwargs["past_key_values"] = RecurrentCache(model.config, policy)

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # Beams and samples repeat each row; a depth per row must be a tensor to be repeated too.
        if isinstance(kwargs.get("num_recurrences"), (list, tuple)):
            kwargs["num_recurrences"] = torch.as_tensor(kwargs["num_recurrences"])
        parent: Any = super()
        return parent._expand_inputs_for_generation(*args, **kwargs)

    # pyrefly: ignore[bad-override]
    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        by_row = isinstance(model_kwargs.get("num_recurrences"), torch.Tensor)
        cache = model_kwargs.get("past_key_values")
        if by_row and type(cache) is DynamicCache and not cache.get_seq_length():
            model: Any = self
            model_kwargs["past_key_values"] = RecurrentCache(model.config)


def calibrated(config: Any, criterion: str, tolerance: str | None = None) -> ExitRule:
    """Return the exit that `rondo calibrate` stored in a model's config.

    Args:
        config: The model's config.
        criterion: Name of the criterion.
        tolerance: Relative loss it was calibrated to, as it is stored; the only one unless given.

    Raises:
        ValueError: There is none, or several.
    """
    stored = (config.exit_rules or {}).get(criterion, {})
    if not stored:
        raise ValueError(
            f"the model has no calibrated exit {criterion!r}: run rondo calibrate, or give an "
            "ExitRule with a threshold"
        )
    if tolerance is None and len(stored) > 1:
        raise ValueError(f"{criterion!r} is calibrated to {sorted(stored)}: say to which")
    found = stored.get(tolerance or next(iter(stored)))
    if found is None:
        raise ValueError(f"{criterion!r} is calibrated to {sorted(stored)}, not to {tolerance}")
    names = inspect.signature(ExitRule).parameters
    return ExitRule(**{name: found[name] for name in names if name in found})
