"""What is in flight: rows, one for each request, and the tokens of a row that are in the loop.

Shapes: n tokens of a flight, D width, V vocabulary.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from rondo.modeling.exits_recurrent import UNCHECKED, ExitRule
from rondo_serve.policy import Allowed
from rondo_serve.requests import Ask, Deliver, Receipt
from rondo_serve.text import Writer


@dataclass(eq=False)
class Flight:
    """Tokens of a row on their way through the loop, all at the same iteration.

    Attributes:
        row: Whose they are.
        start: Place of the first in the row.
        stop: One after the last.
        iteration: Iterations done.
        inputs: Output of the prelude, (n, D).
        state: (n, D).
        before: Those of the tokens that ran the last iteration, before it.
        looping: Which of them still loop, (n,), or None for all.
        took: Iterations of those that left, (n,).
        logits: Those of each token's last check, (n, V), where the rule reads them.
        agreed: Checks in a row that agreed, (n,), likewise.
        num_checks: Passes of its tokens through coda and head that were checks.
        waited: Ticks in a row in which it was left out.
    """

    row: "Row"
    start: int
    stop: int
    iteration: int = 0
    inputs: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    state: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    before: torch.Tensor | None = None
    looping: torch.Tensor | None = None
    took: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    agreed: torch.Tensor | None = None
    num_checks: int = 0
    waited: int = 0

    @property
    def is_prompt(self) -> bool:
        """Whether its tokens are the prompt's."""
        return self.start < len(self.row.ask.prompt)

    @property
    def count(self) -> int:
        """How many tokens an iteration takes."""
        return self.stop - self.start if self.looping is None else int(self.looping.sum())

    @property
    def remaining(self) -> int:
        """Iterations to the depth."""
        return self.row.depth - self.iteration

    @property
    def done(self) -> bool:
        """Whether all tokens have left the loop."""
        return not self.remaining or not self.count

    @property
    def is_last(self) -> bool:
        """Whether its last token is the row's, which the next one follows."""
        return self.stop == len(self.row.tokens)

    @property
    def answers(self) -> bool:
        """Whether a check's logits are the answer: those of a single token are."""
        rule = self.row.rule
        return rule is not None and rule.reads_logits and self.stop - self.start == 1

    @property
    def iterations(self) -> list[int]:
        """Iterations of each token so far."""
        if self.looping is None or self.took is None:
            return [self.iteration] * (self.stop - self.start)
        return self.took.masked_fill(self.looping, self.iteration).tolist()

    @property
    def places(self) -> range:
        """Places of its tokens in the row."""
        return range(self.start, self.stop)

    @property
    def places_looping(self) -> list[int]:
        """Places of those that still loop."""
        if self.looping is None:
            return list(self.places)
        return [self.start + n for n in self.looping.nonzero().flatten().tolist()]

    def of_looping(self, x: torch.Tensor) -> torch.Tensor:
        """Take from (n, ...) the tokens that still loop."""
        return x if self.looping is None else x[self.looping]

    def moved(self, state: torch.Tensor) -> None:
        """Take over the states of the tokens that still loop, after one more iteration."""
        self.before = self.of_looping(self.state)
        if self.looping is None:
            self.state = state
        else:
            self.state = self.state.clone()
            self.state[self.looping] = state
        self.iteration += 1

    def last_checks(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and agreement of the looping tokens' last checks.

        Args:
            logits: Those of this check, whose like is made where there was none.
        """
        count = self.stop - self.start
        if self.logits is None or self.agreed is None:
            self.logits = logits.new_zeros(count, logits.shape[-1])
            self.agreed = torch.full((count,), UNCHECKED, device=logits.device)
        return self.of_looping(self.logits), self.of_looping(self.agreed)

    def note_checks(self, logits: torch.Tensor, agreed: torch.Tensor) -> None:
        """Note the looping tokens' checks."""
        if self.looping is None:
            self.logits, self.agreed = logits, agreed
        else:
            assert self.logits is not None
            assert self.agreed is not None
            self.logits[self.looping], self.agreed[self.looping] = logits, agreed
        self.num_checks += len(logits)

    def leave(self, leaving: torch.Tensor) -> torch.Tensor:
        """Let some of the looping tokens go, and return their places in the row."""
        count = self.stop - self.start
        if self.looping is None or self.took is None:
            self.looping = torch.ones(count, dtype=torch.bool, device=leaving.device)
            self.took = torch.zeros(count, dtype=torch.long, device=leaving.device)
        gone = self.looping.nonzero().flatten()[leaving]
        self.looping[gone] = False
        self.took[gone] = self.iteration
        return gone + self.start


@dataclass(eq=False)
class Row:
    """A request in flight.

    Attributes:
        ask: What was asked for.
        deliver: Where events go.
        allowed: What it was given.
        picker: How tokens are chosen.
        generator: What draws are made with.
        writer: Makes text of tokens.
        asked_at: When it was asked for, by the monotonic clock.
        tokens: Prompt and answer so far.
        read: Tokens whose keys and values are complete.
        cached: Those of the prompt that were there already.
        tables: Its tables in the arena.
        pages: Pages it holds.
        flight: Its tokens in the loop.
        depths: How many tokens of the answer took how many iterations.
        iterations: Iterations of all tokens that were read.
        flops: FLOPs executed.
        admitted_at: When it was taken out of the queue.
        first_at: When its first token came.
    """

    ask: Ask
    deliver: Deliver
    allowed: Allowed
    picker: Any
    generator: torch.Generator | None
    writer: Writer
    asked_at: float
    tokens: list[int]
    read: int = 0
    cached: int = 0
    tables: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    flight: Flight | None = None
    depths: Counter[int] = field(default_factory=Counter)
    iterations: int = 0
    flops: float = 0.0
    admitted_at: float | None = None
    first_at: float | None = None

    @property
    def depth(self) -> int:
        """The depth r that it was given."""
        return self.allowed.depth

    @property
    def rule(self) -> ExitRule | None:
        """When its tokens leave the loop."""
        return self.allowed.exit

    @property
    def length(self) -> int:
        """Tokens that will be read at most: the last of the answer is not."""
        return len(self.ask.prompt) + self.ask.max_new_tokens - 1

    @property
    def shares(self) -> bool:
        """Whether its prompt may be taken from a cache, and read in parts.

        What a rule that reads logits sees of a prompt depends on which of its tokens are read
        together, so it reads all of them at once.
        """
        return self.rule is None or not self.rule.reads_logits

    def key(self, seeded: bool) -> Hashable:
        """Return what two rows must have in common for their keys and values to be the same.

        Nobody shares with another tenant: what is cached tells in time and price what was asked.

        Args:
            seeded: Whether the loop starts at noise that a seed decides.
        """
        grant = self.allowed.grant
        tenant = None if grant is None else grant.seat.tenant
        return self.depth, self.rule, tenant, self.ask.sampling.seed if seeded else None

    def receipt(self, now: float) -> Receipt:
        """Return what it took up to now, by the monotonic clock."""
        first = None
        if self.first_at is not None and self.admitted_at is not None:
            first = self.first_at - self.admitted_at
        return Receipt(
            asked=self.ask.num_recurrences,
            allowed=self.depth,
            prompt_tokens=len(self.ask.prompt),
            cached_tokens=self.cached,
            depths=dict(self.depths),
            iterations=self.iterations,
            flops=self.flops,
            queued=(self.admitted_at or now) - self.asked_at,
            first_token=first,
            seconds=now - self.asked_at,
            exit=self.rule,
            tokens=tuple(self.tokens[len(self.ask.prompt) :]),
            grant=self.allowed.grant,
        )
