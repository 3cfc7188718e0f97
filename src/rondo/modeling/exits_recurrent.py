"""When a token has looped enough: rules that read how far the loop has settled.

Each criterion is a pure function to one number per token that falls as the loop settles; a token
leaves once its number is below the threshold. So a threshold of 0 is the full depth, and a higher
one never makes a token stay longer.

    kl              KL(p before || p now) in nats, before being the check before (arXiv:2502.05171)
    entropy         entropy of the next token's distribution, in nats
    margin          1 - (p of the best token - p of the second)
    argmax_stable   1 / (1 + n) after n checks in a row that left the best token as it was, so
                    that a threshold of 1 / n asks for n of them
    state_distance  ||s now - s one iteration before|| / ||s now||
    gate            the divergence from the deepest answer, in nats, as a learned linear readout of
                    the state expects it

The first four need coda and head at each check, the last two the state alone.

Shapes: B batch, T tokens, D width, V vocabulary; ... any number of dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .configuration_recurrent import RecurrentConfig
from .inputs_recurrent import LayerInputs, Selection

READING_LOGITS = ("kl", "entropy", "margin", "argmax_stable")
CRITERIA = (*READING_LOGITS, "state_distance", "gate")
UNCHECKED = -1


@dataclass(frozen=True)
class ExitRule:
    """When a token leaves the loop; the call's `num_recurrences` is its hard cap.

    Attributes:
        criterion: One of `CRITERIA`.
        threshold: A token leaves when the criterion is below it.
        min_recurrences: Iterations that every token takes.
        check_every: Iterations from one check to the next.

    Raises:
        ValueError: A field is out of its range.
    """

    criterion: str
    threshold: float
    min_recurrences: int = 1
    check_every: int = 1

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(
                f"an exit's criterion must be one of {CRITERIA}, got {self.criterion!r}"
            )
        if not self.threshold >= 0:
            raise ValueError(f"an exit's threshold must not be negative, got {self.threshold}")
        if min(self.min_recurrences, self.check_every) < 1:
            raise ValueError(
                "an exit's min_recurrences and check_every must be at least 1, got "
                f"{self.min_recurrences} and {self.check_every}"
            )

    @property
    def reads_logits(self) -> bool:
        """Whether a check runs coda and head."""
        return self.criterion in READING_LOGITS

    def due(self, iteration: int) -> bool:
        """Return whether tokens are checked after an iteration (1-based)."""
        beyond = iteration - self.min_recurrences
        return beyond >= 0 and beyond % self.check_every == 0


def kl(logits: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return KL(before || now) in nats for logits (..., V)."""
    # In float32: the difference of two nearly equal distributions is lost in bfloat16.
    now, old = logits.float().log_softmax(-1), before.float().log_softmax(-1)
    # Rounding may leave a little less than nothing.
    return (old.exp() * (old - now)).sum(-1).clamp_min(0)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats of logits (..., V)."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Return how far the best token of logits (..., V) is from being certain against the second."""
    best = logits.float().softmax(-1).topk(2, -1).values
    return 1 - (best[..., 0] - best[..., 1])


def state_distance(state: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return ||now - before|| / ||now|| of states (..., D)."""
    now, old = state.float(), before.float()
    size = torch.linalg.vector_norm(now, dim=-1).clamp_min(1e-30)
    return torch.linalg.vector_norm(now - old, dim=-1) / size


class ExitGate(nn.Module):
    """Expects from the state how far the answer still is from the deepest one.

    A linear readout of the state at norm sqrt(D) and of the logarithm of `state_distance`.
    """

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size + 1))
        self.bias = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def initialize(self) -> None:
        """Start by expecting one nat of everything, at which no threshold of use lets go."""
        self.weight.zero_()
        self.bias.zero_()

    def forward(self, state: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the expected divergence in nats, (...), of states (..., D)."""
        moved = state_distance(state, before).clamp_min(1e-6).log()
        unit = nn.functional.normalize(state.float(), dim=-1) * state.shape[-1] ** 0.5
        features = torch.cat([unit, moved[..., None]], -1).to(self.weight)
        return nn.functional.linear(features, self.weight, self.bias)[..., 0].float()


def of_states(
    criterion: str, gate: nn.Module | None, now: torch.Tensor, before: torch.Tensor
) -> torch.Tensor:
    """Return a criterion (...) that reads states (..., D) of this iteration and the one before."""
    if criterion == "gate":
        assert gate is not None, "whoever makes a rule checks that the model has a gate"
        return gate(now, before).exp()
    return state_distance(now, before)


def of_logits(
    criterion: str, logits: torch.Tensor, before: torch.Tensor, agreed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a criterion (...) that reads logits, and how many checks in a row agree now.

    Args:
        criterion: One of `READING_LOGITS`.
        logits: Those of this check, (..., V).
        before: Those of the check before, of any value where there was none.
        agreed: How many checks in a row agreed so far, `UNCHECKED` where there was none.
    """
    same = (logits.argmax(-1) == before.argmax(-1)) & (agreed > UNCHECKED)
    now = torch.where(same, agreed + 1, 0)
    match criterion:
        case "kl":
            return torch.where(agreed == UNCHECKED, math.inf, kl(logits, before)), now
        case "entropy":
            return entropy(logits), now
        case "margin":
            return margin(logits), now
        case _:
            return 1 / (1 + now), now


class ExitChecks:
    """The checks of one call of the model.

    Args:
        rule: The rule.
        head: Maps normed coda output (..., D) to logits (..., V).
        gate: The model's gate, where it has one.

    Attributes:
        hidden: Normed coda output of the last check, (B', n, D), where the rule reads logits.
        logits: Those of each token's last check, (B, T, V), likewise.
        num_readouts: Tokens times checks that ran coda and head.

    Raises:
        ValueError: The rule needs a gate that the model does not have.
    """

    def __init__(self, rule: ExitRule, head: Callable[[torch.Tensor], torch.Tensor], gate: Any):
        if rule.criterion == "gate" and gate is None:
            raise ValueError("the model has no exit gate: train one with rondo train --mode gate")
        self.rule = rule
        self.hidden: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        self.num_readouts = 0
        self._head = head
        self._gate = gate
        self._agreed: torch.Tensor | None = None

    def __call__(
        self,
        body: Any,
        s_BTD: torch.Tensor,
        before_BTD: torch.Tensor,
        inputs: LayerInputs,
        cache: Any,
        chosen: Selection | None,
    ) -> torch.Tensor:
        """Return the criterion (B', n) of the chosen tokens, or of all.

        Args:
            body: The `RecurrentModel`.
            s_BTD: The state of every token.
            before_BTD: That of an iteration before.
            inputs: What the layers are given.
            cache: The cache of the call.
            chosen: Who is checked.
        """
        if not self.rule.reads_logits:
            now, before = (s_BTD, before_BTD)
            if chosen is not None:
                now, before = chosen.take(now), chosen.take(before)
            return of_states(self.rule.criterion, self._gate, now, before)
        self.hidden = body.finish(s_BTD, inputs, cache, chosen)
        self.num_readouts += s_BTD[..., 0].numel() if chosen is None else chosen.count(s_BTD)
        return self._of_logits(self._head(self.hidden), s_BTD.shape[:2], chosen)

    def _of_logits(
        self, logits: torch.Tensor, shape: torch.Size, chosen: Selection | None
    ) -> torch.Tensor:
        if self.logits is None or self._agreed is None:
            self.logits = logits.new_zeros(*shape, logits.shape[-1])
            self._agreed = torch.full(shape, UNCHECKED, device=logits.device)
        before, counted = self.logits, self._agreed
        if chosen is not None:
            before, counted = chosen.take(before), chosen.take(counted)
        value, agreed = of_logits(self.rule.criterion, logits, before, counted)
        self.logits = logits if chosen is None else chosen.put(self.logits, logits)
        self._agreed = agreed if chosen is None else chosen.put(self._agreed, agreed)
        return value
