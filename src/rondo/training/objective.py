"""The module that training calls: rows in, sums of losses out.

Everything a step computes goes through one `forward`, so that a sharded model gathers what it
needs once per call, however often the core runs in it.
"""

from typing import Any

import torch
from torch import nn

from rondo.config import LossConfig
from rondo.data import Rows
from rondo.dynamics import loop_health
from rondo.modeling.modeling_recurrent import lm_logits
from rondo.training import gate
from rondo.training.budget import Draw
from rondo.training.losses import Hidden, Losses, chunked_losses

PLAIN = LossConfig()


class Objective(nn.Module):
    """A model under training, recurrent or static, with what it minimises.

    Args:
        model: `RecurrentForCausalLM`, or a parent of any family.
        recurrent: Whether it is the former.
        loss: What is minimised.
        teacher: The frozen parent, where it teaches.
        checkpoint_iterations: Whether iterations are recomputed in the backward pass.
        gated: Whether its exit gate alone is trained.
    """

    def __init__(
        self,
        model: Any,
        recurrent: bool,
        loss: LossConfig = PLAIN,
        teacher: Any = None,
        checkpoint_iterations: bool = False,
        gated: bool = False,
    ):
        super().__init__()
        self.model = model
        # In a tuple, so that it is no submodule: it is neither trained nor saved nor sharded.
        self.teacher = (teacher,)
        self.recurrent = recurrent
        self.loss = loss
        self.checkpoint_iterations = checkpoint_iterations
        self.gated = gated

    def forward(self, task: str, *arguments: Any) -> Any:
        """Do one of `minimised`, `measured`, `gauged` and `health`."""
        return getattr(self, task)(*arguments)

    def minimised(self, rows: Rows, draw: Draw, state_seeds: torch.Tensor) -> Losses:
        """Return what a micro-batch contributes to the step's loss."""
        if self.gated:
            return gate.minimised(*self._examples(rows, draw.depth.num_recurrences, state_seeds))
        shallow = parent = None
        if self.recurrent:
            output = self.model.model(
                rows.input_ids,
                position_ids=rows.position_ids,
                num_recurrences=draw.depth.num_recurrences,
                backprop_depth=draw.depth.backprop_depth,
                output_recurrences=() if draw.shallow is None else (draw.shallow,),
                state_seed=state_seeds,
                checkpoint_iterations=self.checkpoint_iterations,
            )
            last = output.last_hidden_state
            shallow = None if draw.shallow is None else output.branches[0]
            if shallow is not None and self.teacher[0] is not None:
                with torch.no_grad():
                    parent = hidden_of(self.teacher[0], rows)
        else:
            last = hidden_of(self.model, rows)
        hidden = Hidden(last, shallow, parent)
        return chunked_losses(hidden, rows.labels, self.loss, self._logits, self._teacher_logits)

    def measured(
        self, rows: Rows, depths: tuple[int, ...], state_seeds: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the summed loss at each depth, from one trajectory."""
        if self.recurrent:
            output = self.model.model(
                rows.input_ids,
                position_ids=rows.position_ids,
                num_recurrences=max(depths),
                output_recurrences=depths,
                state_seed=state_seeds,
            )
            branches = output.branches
        else:
            branches = (hidden_of(self.model, rows),)
        return [
            chunked_losses(Hidden(one), rows.labels, PLAIN, self._logits, self._logits).last
            for one in branches
        ]

    def gauged(self, rows: Rows, depth: int, state_seeds: torch.Tensor) -> list[torch.Tensor]:
        """Return what `gate.summary` sums up of the gate, where a depth is the deepest."""
        return gate.measured(*self._examples(rows, depth, state_seeds))

    def health(self, input_ids: torch.Tensor, depth: int) -> dict[str, float]:
        """Return the telemetry of the loop."""
        return loop_health(self.model, input_ids, depth)

    def _examples(self, rows: Rows, depth: int, state_seeds: torch.Tensor) -> tuple[Any, Any]:
        found = gate.examples(self.model, rows, depth, state_seeds, self._logits)
        return self.model.model.exit_gate, found

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits_of(self.model, hidden, self.recurrent)

    def _teacher_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits_of(self.teacher[0], hidden, False)


def hidden_of(parent: Any, rows: Rows) -> torch.Tensor:
    """Return the normed hidden states (B, T, D) of a model without recurrence."""
    return parent.base_model(
        rows.input_ids, position_ids=rows.position_ids, use_cache=False
    ).last_hidden_state


def logits_of(model: Any, hidden: torch.Tensor, recurrent: bool) -> torch.Tensor:
    """Return a model's logits (N, V) for normed hidden states (N, D)."""
    config = model.config.base_config if recurrent else model.config
    return lm_logits(model.get_output_embeddings(), config, hidden)
