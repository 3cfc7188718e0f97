"""How the depth of each request reaches the model: by a logits processor that changes no logits.

Before each step vLLM tells its logits processors which requests are in the batch, in which order
and with which parameters. No other part of a plugin is told that.
"""

from typing import Any, ClassVar

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from rondo_vllm.limits import Depths


class DepthOfRows(LogitsProcessor):
    """Knows the depth of each row of the batch.

    Attributes:
        allowed: The depths of the engine that was set up last, in the process that takes requests.
        newest: The one made last, in a process with a model: its runner makes it before the model.
    """

    allowed: ClassVar[Depths | None] = None
    newest: ClassVar["DepthOfRows | None"] = None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a depth that is out of range before the request is taken.

        Raises:
            ValueError: It is; the server answers 400.
        """
        assert cls.allowed is not None, "an engine is set up before it takes requests"
        cls.allowed.of(sampling_params.extra_args)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        model = vllm_config.model_config.hf_config
        self._depths = Depths(model.num_recurrences, model.max_recurrences)
        self._of_row: dict[int, int] = {}
        DepthOfRows.newest = self

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that came, went and moved."""
        process_dict_updates(
            self._of_row, batch_update, lambda params, *_: self._depths.of(params.extra_args)
        )

    @property
    def rows(self) -> list[int]:
        """The depth of each row of this step, in order."""
        return [self._of_row[row] for row in range(len(self._of_row))]

    def is_argmax_invariant(self) -> bool:
        """Return that logits stay as they are."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave the logits (rows, V) as they are."""
        return logits
