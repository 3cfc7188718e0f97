"""What an engine and its requests may ask of a model that loops. Imports no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIELD = "num_recurrences"


@dataclass(frozen=True)
class Depths:
    """The depths that an engine allows.

    Attributes:
        default: Depth of a request that names none.
        cap: Deepest that can be asked for; keys and values have room for it.

    Raises:
        ValueError: The default lies outside 1 to the cap.
    """

    default: int
    cap: int

    def __post_init__(self) -> None:
        if not 1 <= self.default <= self.cap:
            raise ValueError(
                f"{FIELD} = {self.default} must lie between 1 and max_recurrences = {self.cap}: "
                "give both in --hf-overrides"
            )

    def of(self, asked: Mapping[str, Any] | None) -> int:
        """Return the depth of a request, out of its `vllm_xargs`.

        Raises:
            ValueError: It is no whole number, or lies outside 1 to the cap.
        """
        depth = (asked or {}).get(FIELD)
        if depth is None:
            return self.default
        if type(depth) is not int or not 1 <= depth <= self.cap:
            raise ValueError(
                f"{FIELD} must be a whole number between 1 and {self.cap} here, got {depth!r}"
            )
        return depth


def refuse(engine: Any) -> None:
    """Refuse what would answer otherwise than the model, or was never tried.

    Args:
        engine: vLLM's whole config.

    Raises:
        ValueError: With what to do.
    """
    parallel = engine.parallel_config
    asked = {
        "per-iteration deltas have no place in vLLM's layers: serve this model with rondo serve": (
            engine.model_config.hf_config.delta_rank > 0
        ),
        "vLLM's second model runner was never tried with a loop: set VLLM_USE_V2_MODEL_RUNNER=0": (
            engine.use_v2_model_runner
        ),
        "the core loops on one stage: use --tensor-parallel-size, not --pipeline-parallel-size": (
            parallel.pipeline_parallel_size > 1
        ),
        "context parallelism divides the rows that depths belong to: leave it": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "micro-batches divide the rows that depths belong to: leave them": parallel.use_ubatching,
        "with speculative decoding vLLM tells nobody the depths: leave it": (
            engine.speculative_config is not None
        ),
        "LoRA was never tried with a loop: merge the adapter into the weights": (
            engine.lora_config is not None
        ),
        "a KV connector finds keys and values by tokens alone, whatever their depth: leave it": (
            engine.kv_transfer_config is not None
        ),
    }
    for reason, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"a model that loops cannot be served so: {reason}")
