"""A model to measure at several depths from one trajectory of its core.

The model runs to the deepest r once; coda and head branch off at each depth on the way.
Shapes: B batch, T tokens, N predicted tokens, D width, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from rondo.config import EvalConfig
from rondo.data import check_tokenizer, load_tokenizer
from rondo.evaluation.baselines import facts_of
from rondo.flops import Costs, costs_of, costs_of_parent
from rondo.generation import check_cap
from rondo.loading import load_model
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.provenance import choose_dtype, read_json

TIMED_TOKENS = 512
# Predicted tokens whose logits are held at once.
LOGIT_ROWS = 1024
GRID = (1, 2, 4, 8, 16, 32)


class Passage(NamedTuple):
    """Tokens of which those from `start` on are to be predicted."""

    ids: list[int]
    start: int


class Prediction(NamedTuple):
    """What a model says of a sequence at one depth.

    Attributes:
        logprob: Summed log-probability (nats) of the predicted tokens.
        greedy: Whether each of them is the most probable one.
    """

    logprob: float
    greedy: bool


@dataclass
class Subject:
    """A model to measure: recurrent, or one without a loop, which knows one depth only.

    Attributes:
        model: It, where it runs.
        tokenizer: Its tokenizer.
        recurrences: Depths to measure, rising.
        directory: The checkpoint.
        facts: What its run.json says.
    """

    model: Any
    tokenizer: Any
    recurrences: tuple[int, ...]
    directory: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.dtype

    @property
    def recurrent(self) -> bool:
        """Whether the model has a loop."""
        return self.model.config.model_type == "rondo"

    @cached_property
    def costs(self) -> Costs:
        """What the model costs at each depth."""
        return costs_of(self.model) if self.recurrent else costs_of_parent(self.model)

    @property
    def starts_from_noise(self) -> bool:
        """Whether a seed decides where the loop begins."""
        return self.recurrent and self.model.config.state_init == "normal"

    @property
    def max_length(self) -> int:
        """Tokens that the model was made for."""
        return int(self.model.config.max_position_embeddings)

    def predict(self, sequences: Sequence[Passage], seed: int = 0) -> list[list[Prediction]]:
        """Predict the tokens of a batch at each depth, in one pass.

        Sequences are padded on the right, which no causal model can see; so no mask is needed.

        Returns:
            For each sequence, what is said of it at each depth.
        """
        longest = max(len(one.ids) for one in sequences) - 1
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, one in enumerate(sequences):
            ids[row, : len(one.ids) - 1] = torch.tensor(one.ids[:-1])
        lengths = [len(one.ids) - one.start for one in sequences]
        rows = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(lengths))
        places = torch.cat([torch.arange(one.start - 1, len(one.ids) - 1) for one in sequences])
        targets_N = torch.cat([torch.tensor(one.ids[one.start :]) for one in sequences])
        where, targets_N = (rows.to(self.device), places.to(self.device)), targets_N.to(self.device)
        by_depth = []
        for logits in self._logits(ids.to(self.device), where, seed):
            logprob_N, greedy_N = _scores(logits, targets_N)
            by_depth.append(
                [
                    Prediction(float(logprob.sum()), bool(greedy.all()))
                    for logprob, greedy in zip(
                        logprob_N.double().split(lengths), greedy_N.split(lengths), strict=True
                    )
                ]
            )
        return [list(found) for found in zip(*by_depth, strict=True)]

    def _logits(
        self, ids: torch.Tensor, where: tuple[torch.Tensor, torch.Tensor], seed: int
    ) -> Any:
        """Yield at each depth pieces of logits (<= LOGIT_ROWS, V) of the places that count."""
        if not self.recurrent:
            # By the model's own forward, whatever its head does.
            logits_NV = self.model(ids, use_cache=False).logits[where]
            yield logits_NV.split(LOGIT_ROWS)
            return
        branches = self.model.model(
            ids,
            num_recurrences=max(self.recurrences),
            output_recurrences=self.recurrences,
            state_seed=seed,
        ).branches
        for hidden_BTD in branches:
            yield (self.model.logits(piece) for piece in hidden_BTD[where].split(LOGIT_ROWS))

    @torch.inference_mode()
    def milliseconds_per_token(self) -> dict[int, float]:
        """Return the time of a forward pass per token at each depth, the better of two."""
        ids = torch.arange(TIMED_TOKENS, device=self.device).reshape(2, -1)
        ids = ids % self.model.config.vocab_size
        found = {}
        for depth in self.recurrences:
            how = {"num_recurrences": depth} if self.recurrent else {}
            times = []
            for _ in range(2):
                self._wait()
                start = time.perf_counter()
                self.model(ids, use_cache=False, **how)
                self._wait()
                times.append(time.perf_counter() - start)
            found[depth] = 1000 * min(times) / TIMED_TOKENS
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def load_subject(directory: Path, config: EvalConfig, device: torch.device) -> Subject:
    """Load a checkpoint to measure it.

    Raises:
        UserError: The directory holds no model, or the depths are beyond its cap.
    """
    fields = read_json(directory / "config.json")
    recurrent = fields.get("model_type") == "rondo"
    recurrences = depths_of(directory, fields, config) if recurrent else (1,)
    dtype = choose_dtype(config.dtype, device)
    if recurrent:
        model = load_model(RecurrentForCausalLM, directory, dtype)
    else:
        remote = {"trust_remote_code": config.trust_remote_code}
        model = load_model(AutoModelForCausalLM, directory, dtype, **remote)
    tokenizer = load_tokenizer(directory)
    check_tokenizer(tokenizer, model.config.vocab_size)
    model = model.to(device).eval()
    return Subject(model, tokenizer, recurrences, directory, facts_of(directory))


def depths_of(directory: Path, fields: dict[str, Any], config: EvalConfig) -> tuple[int, ...]:
    """Return the depths to measure of a recurrent model with this config.json.

    Raises:
        UserError: One is beyond the model's cap.
    """
    cap = fields.get("max_recurrences", GRID[-1])
    wanted = tuple(sorted(set(config.recurrences or [r for r in GRID if r <= cap])))
    check_cap(wanted[-1], cap, directory)
    return wanted


def _scores(pieces: Any, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, greedy, start = [], [], 0
    for logits in pieces:
        targets = targets_N[start : start + len(logits)]
        start += len(logits)
        chosen = logits.float().log_softmax(-1).gather(1, targets[:, None])
        logprobs.append(chosen[:, 0])
        greedy.append(logits.argmax(-1) == targets)
    return torch.cat(logprobs), torch.cat(greedy)
