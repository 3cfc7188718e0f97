"""Texts read to the full depth, noting what each token would say on the way, and read with exits.

What a token spends is told twice. When a text is read at once every check of coda and head is
extra; when tokens are decoded one by one the check that lets a token go is its answer.

Shapes: B batch, T tokens, N tokens with a next one, R iterations, D width or documents, V
vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from rondo.config.calibrate import CalibrateConfig
from rondo.data import padded_batches
from rondo.dynamics import Loop
from rondo.errors import UserError
from rondo.evaluation.comparisons import Array
from rondo.evaluation.exits import Measure, Numbers, num_checks
from rondo.evaluation.subject import LOGIT_ROWS, Subject
from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.modeling.exits_recurrent import (
    READING_LOGITS,
    ExitChecks,
    ExitRule,
    entropy,
    kl,
    margin,
    state_distance,
)


class Batch(NamedTuple):
    """Documents of like length, right-padded; each token but the last has one to predict."""

    ids_BT: torch.Tensor
    real_BT: torch.Tensor
    targets_N: torch.Tensor
    documents_N: torch.Tensor


class Said(NamedTuple):
    """What tokens are answered with: loss in nats and best token, (..., N)."""

    loss: Array
    best: Numbers


@dataclass(frozen=True)
class Setup:
    """What all exits of one calibration share."""

    subject: Subject
    depth: int
    config: CalibrateConfig

    def rule(self, criterion: str, threshold: float) -> ExitRule:
        """Return a rule that checks as the config says."""
        how = self.config
        return ExitRule(criterion, threshold, how.min_recurrences, how.check_every)

    def batches(self, documents: Sequence[list[int]], name: str) -> Iterator[Batch]:
        """Yield batches of token lists with a progress bar."""
        found = list(padded_batches(list(documents), self.config.batch_size))
        device = self.subject.device
        for chosen, ids, mask in tqdm(found, name, unit="batch", leave=False, disable=None):
            real_BT = mask[:, 1:].bool()
            numbers_N = torch.tensor(chosen)[:, None].expand_as(real_BT)[real_BT]
            yield Batch(
                ids[:, :-1].to(device),
                real_BT.to(device),
                ids[:, 1:][real_BT].to(device),
                numbers_N,
            )


@dataclass(frozen=True)
class Half:
    """One half of the documents, with what each token would say at each iteration.

    Attributes:
        setup: What it was measured with.
        documents: Their tokens.
        said: By iteration, (R, N) each.
        values: By criterion, (R, N); infinite where there is no check.
        documents_N: Number of each token's document.
    """

    setup: Setup
    documents: Sequence[list[int]]
    said: Said
    values: dict[str, Array]
    documents_N: Numbers

    def harm(self, said: Said) -> Array:
        """Return what is to be kept small, (..., N)."""
        if self.setup.config.measure == "loss":
            return said.loss
        return (said.best != self.said.best[-1]).astype(float)

    def by_document(self, per_token: Array) -> Array:
        """Sum (N,) over the tokens of each document."""
        found: Any = np.bincount(self.documents_N, per_token, minlength=len(self.documents))
        return found

    @cached_property
    def measure(self) -> Measure:
        """What must stay within the tolerance."""
        full, weights = self.fixed[-1], self.by_document(np.ones(len(self.documents_N)))
        return Measure(full, weights, self.setup.config.measure == "loss")

    @cached_property
    def fixed(self) -> Array:
        """Harm of each document at each fixed depth, (R, D)."""
        return np.stack([self.by_document(row) for row in self.harm(self.said)])

    @cached_property
    def costs(self) -> Array:
        """Executed FLOPs per token at each fixed depth, (R,)."""
        depths = range(1, self.setup.depth + 1)
        return np.array(
            [self.setup.subject.costs.forward_flops(r, self.length) for r in depths], dtype=float
        )

    @property
    def length(self) -> int:
        """Tokens of the document that a token lies in, on average."""
        weights = self.measure.weights
        return round(float((weights**2).sum() / weights.sum()))

    @property
    def check_in_iterations(self) -> float:
        """What a check that reads logits costs, in iterations."""
        costs = self.setup.subject.costs
        return costs.finish_flops(self.length) / costs.iteration_flops(self.length)

    def spent(self, rule: ExitRule, left_N: Numbers) -> dict[str, Array]:
        """Return the executed FLOPs of tokens that left at these iterations, (N,), checks included.

        The gate's readout, one product with the state, is left out.
        """
        costs, config = self.setup.subject.costs, self.setup.config
        depth, early_N = self.setup.depth, left_N < self.setup.depth
        spent_N, checks_N = self.costs[left_N - 1], np.zeros_like(left_N)
        if rule.reads_logits:
            checks_N = num_checks(left_N, depth, rule.min_recurrences, rule.check_every)
        if config.cache_policy == "recompute":
            width = self.setup.subject.model.config.hidden_size
            # Of a core layer that is stopped before it attends, queries, keys and values were made.
            heads = costs.num_core_layers * width * (costs.attention_width + 2 * costs.kv_width)
            spent_N = spent_N + early_N * 2 * (heads + costs.injection_matmul)
        finish = costs.finish_flops(self.length)
        answered_N = early_N & (checks_N > 0)
        return {
            "decoding": spent_N + finish * (checks_N - answered_N),
            "reading": spent_N + finish * checks_N,
        }


def follow(
    setup: Setup, documents: Sequence[list[int]], criteria: Sequence[str], name: str
) -> Half:
    """Run documents to the full depth, and note what each token would say on the way.

    Raises:
        UserError: A loss is no number.
    """
    said, values, numbers = [], [], []
    for batch in setup.batches(documents, name):
        hidden_RND, found = _states(setup, batch, criteria)
        pieces = [
            _read(setup, hidden_RND[:, some], batch.targets_N[some], criteria)
            for some in torch.arange(len(batch.targets_N)).split(LOGIT_ROWS)
        ]
        losses, bests, read = zip(*pieces, strict=True)
        found |= {
            criterion: torch.cat([one[criterion] for one in read], 1) for criterion in read[0]
        }
        said.append((torch.cat(losses, 1).cpu(), torch.cat(bests, 1).cpu()))
        values.append(found)
        numbers.append(batch.documents_N)
    loss = torch.cat([one[0] for one in said], 1).double().numpy()
    if not np.isfinite(loss).all():
        raise UserError(f"{setup.config.model} gives losses on these texts that are no numbers")
    best = torch.cat([one[1] for one in said], 1).numpy()
    joined = {
        criterion: torch.cat([one[criterion].cpu() for one in values], 1).double().numpy()
        for criterion in criteria
    }
    return Half(setup, documents, Said(loss, best), joined, torch.cat(numbers).numpy())


def _states(
    setup: Setup, batch: Batch, criteria: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the coda's output (R, N, D), and the criteria that read the state alone, (R, N)."""
    model, real_BT = setup.subject.model, batch.real_BT
    loop = Loop.enter(model, batch.ids_BT, real_BT.long(), setup.config.seed)
    read = {
        "state_distance": state_distance,
        "gate": lambda *two: model.model.exit_gate(*two).exp(),
    }
    never = torch.full((setup.depth, len(batch.targets_N)), math.inf, device=real_BT.device)
    found = {criterion: never.clone() for criterion in criteria if criterion in read}
    hidden_ND, states = [], loop.states(setup.depth)
    before_ND = next(states)[real_BT]
    for number, s_BTD in enumerate(states):
        s_ND = s_BTD[real_BT]
        hidden_ND.append(loop.finish(s_BTD)[real_BT])
        if _checked(setup, number + 1):
            for criterion, values in found.items():
                values[number] = read[criterion](s_ND, before_ND)
        before_ND = s_ND
    return torch.stack(hidden_ND), found


def _read(
    setup: Setup, hidden_RND: torch.Tensor, targets_N: torch.Tensor, criteria: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return losses, best tokens, and the criteria that read logits, (R, N) each."""
    losses, bests = [], []
    never = torch.full(hidden_RND.shape[:2], math.inf, device=hidden_RND.device)
    found = {criterion: never.clone() for criterion in criteria if criterion in READING_LOGITS}
    before_NV, agreed_N = None, torch.full_like(targets_N, -1)
    for number, hidden_ND in enumerate(hidden_RND):
        logits_NV = setup.subject.model.logits(hidden_ND).float()
        losses.append(nn.functional.cross_entropy(logits_NV, targets_N, reduction="none"))
        bests.append(logits_NV.argmax(-1))
        if not (found and _checked(setup, number + 1)):
            continue
        same_N = torch.zeros_like(targets_N, dtype=torch.bool)
        if before_NV is not None:
            same_N = bests[-1] == before_NV.argmax(-1)
        agreed_N = torch.where(same_N, agreed_N + 1, 0)
        for criterion, values in found.items():
            if criterion == "kl" and before_NV is not None:
                values[number] = kl(logits_NV, before_NV)
            elif criterion == "entropy":
                values[number] = entropy(logits_NV)
            elif criterion == "margin":
                values[number] = margin(logits_NV)
            elif criterion == "argmax_stable":
                values[number] = 1 / (1 + agreed_N)
        before_NV = logits_NV
    return torch.stack(losses), torch.stack(bests), found


def _checked(setup: Setup, iteration: int) -> bool:
    """Whether tokens are checked after an iteration; at the full depth they leave unasked."""
    return iteration < setup.depth and setup.rule("kl", 0).due(iteration)


class Executed(NamedTuple):
    """Exits as they were executed.

    Attributes:
        harm_D: By document.
        left_N: Iteration at which each token left.
    """

    harm_D: Array
    left_N: Numbers


def execute(half: Half, rule: ExitRule, name: str) -> Executed:
    """Read the documents with exits, one call a batch; deeper tokens see what the policy says."""
    setup, model = half.setup, half.setup.subject.model
    found = []
    for batch in setup.batches(half.documents, name):
        cache = RecurrentCache(model.config, setup.config.cache_policy)
        hidden_ND = model.model(
            batch.ids_BT,
            attention_mask=batch.real_BT.long(),
            past_key_values=cache,
            num_recurrences=setup.depth,
            checks=ExitChecks(rule, model.logits, model.model.exit_gate),
            state_seed=setup.config.seed,
        ).last_hidden_state[batch.real_BT]
        left_N = cache.recurrences[batch.real_BT].cpu()
        if rule.reads_logits and batch.ids_BT.shape[1] > 1:  # the last check of one is its answer
            how = rule.min_recurrences, rule.check_every
            assert cache.num_checks == num_checks(left_N.numpy(), setup.depth, *how).sum()
        pieces = zip(hidden_ND.split(LOGIT_ROWS), batch.targets_N.split(LOGIT_ROWS), strict=True)
        read = [_read(setup, hidden[None], targets, ()) for hidden, targets in pieces]
        losses, bests, _ = zip(*read, strict=True)
        found.append((torch.cat(losses, 1)[0].cpu(), torch.cat(bests, 1)[0].cpu(), left_N))
    loss, best, left = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return Executed(half.by_document(half.harm(Said(loss.astype(float), best))), left)
