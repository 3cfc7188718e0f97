"""What vLLM tells of an answer, counted, and what the governor is told of it."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from rondo.flops import Costs
from rondo_govern.audit.log import AuditError
from rondo_govern.audit.records import digest_of
from rondo_govern.governor import Grant
from rondo_serve.api.errors import unrecorded
from rondo_serve.api.metrics import Metrics
from rondo_serve.governed import Governance, settle
from rondo_serve.requests import Ending, Finished, Reason, Receipt

# vLLM's words; all others are ways of coming to an end.
REASONS: dict[str, Reason] = {"length": "length", "abort": "error", "error": "error"}


@dataclass(eq=False)
class Answer:
    """One answer, as far as vLLM has told of it.

    Attributes:
        grant: What was given; the prompt's tokens are not known before.
        prompt_tokens: Tokens of the prompt, None until they are told.
        new_tokens: Tokens generated.
        prompt: The prompt's tokens, where they are told.
        tokens: Those generated, likewise.
        ended: How it ended.
    """

    grant: Grant
    prompt_tokens: int | None = None
    new_tokens: int = 0
    prompt: list[int] | None = None
    tokens: list[int] = field(default_factory=list)
    ended: Ending | None = None

    def __post_init__(self) -> None:
        self._since = time.monotonic()
        self._first: float | None = None

    def hear(self, prompt_tokens: int, new_tokens: int) -> None:
        """Take over how many tokens there are by now."""
        if new_tokens and self._first is None:
            self._first = time.monotonic() - self._since
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens

    def receipt(self, costs: Costs) -> Receipt:
        """Return what it took so far: every token but the last generated one was read."""
        prompt, new, depth = self.prompt_tokens or 0, self.new_tokens, self.grant.decision.depth
        read = prompt + max(0, new - 1)
        return Receipt(
            asked=self.grant.want.num_recurrences,
            allowed=depth,
            prompt_tokens=prompt,
            depths={depth: new} if new else {},
            iterations=read * depth,
            flops=read * costs.generation_flops(depth, prompt, new) if read else 0.0,
            first_token=self._first,
            seconds=time.monotonic() - self._since,
            tokens=tuple(self.tokens),
            grant=self.grant,
        )


@dataclass(frozen=True)
class Books:
    """Settles answers.

    Attributes:
        governance: Who grants.
        costs: What the model costs.
        metrics: What is counted.
        texts: Whether the log keeps prompts and answers as tokens.
    """

    governance: Governance
    costs: Costs
    metrics: Metrics
    texts: bool = False

    def settle(self, answer: Answer, ending: Ending) -> None:
        """Tell the governor what an answer took, once."""
        if answer.ended is not None:
            return
        answer.ended = ending
        receipt = answer.receipt(self.costs)
        # vLLM computes before it tells: who leaves before that has spent what nobody knows.
        unmetered = answer.prompt_tokens is None and ending not in ("untaken", "error")
        facts = self._facts(answer, receipt)
        settle(self.governance.governor, ending, receipt, facts, unmetered)
        if ending != "untaken":
            self.metrics.finished(Finished(ending, "", receipt))

    def _facts(self, answer: Answer, receipt: Receipt) -> dict[str, Any]:
        # Some are not told, as of a hidden reasoning: no hash is better than a wrong one.
        told = bool(answer.tokens) and len(answer.tokens) == answer.new_tokens
        facts: dict[str, Any] = {
            "seed": answer.grant.want.facts["sampling"]["seed"],
            "exit": None,
            "queued": 0.0,
            "seconds": round(receipt.seconds, 6),
            "prompt_sha256": None if answer.prompt is None else digest_of(answer.prompt),
            "output_sha256": digest_of(answer.tokens) if told else None,
        }
        if self.texts:
            facts |= {"prompt": answer.prompt, "output": answer.tokens if told else None}
        return facts

    async def kept(self) -> None:
        """Wait until what was settled is on the disk, where an answer's end waits for that.

        Raises:
            ApiError: It cannot be.
        """
        if self.governance.waits:
            durable = self.governance.governor.durable
            try:
                await asyncio.get_running_loop().run_in_executor(None, durable)
            except AuditError as error:
                raise unrecorded() from error
