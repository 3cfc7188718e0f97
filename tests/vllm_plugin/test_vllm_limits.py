"""What an engine and its requests may ask for; no vLLM is needed for that."""

from types import SimpleNamespace
from typing import Any

import pytest

from rondo_vllm.limits import Depths, refuse

ALLOWED = Depths(default=3, cap=6)


@pytest.mark.parametrize("asked", [None, {}, {"session_id": "a"}, {"num_recurrences": None}])
def test_a_request_that_names_no_depth_has_the_default(asked: dict[str, Any] | None) -> None:
    assert ALLOWED.of(asked) == 3


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_a_depth_up_to_the_cap_is_allowed(depth: int) -> None:
    assert ALLOWED.of({"num_recurrences": depth}) == depth


@pytest.mark.parametrize("depth", [0, -1, 7, 2.0, "4", True, [2], 2**70])
def test_another_depth_is_refused_in_one_sentence(depth: Any) -> None:
    with pytest.raises(ValueError, match="between 1 and 6 here, got") as refusal:
        ALLOWED.of({"num_recurrences": depth})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("default", [0, 7])
def test_a_default_outside_the_cap_is_refused(default: int) -> None:
    with pytest.raises(ValueError, match="--hf-overrides"):
        Depths(default, cap=6)


def engine(**changes: Any) -> Any:
    parts: dict[str, Any] = {
        "use_v2_model_runner": False,
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
    }
    parallel: dict[str, Any] = {
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_ubatching": False,
    }
    shape = {"delta_rank": 0}
    for part in (parts, parallel, shape):
        part.update({name: value for name, value in changes.items() if name in part})
    model = SimpleNamespace(hf_config=SimpleNamespace(**shape))
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(**parallel), **parts)


def test_an_engine_that_asks_for_nothing_special_is_taken() -> None:
    refuse(engine())


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        ({"delta_rank": 4}, "rondo serve"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"pipeline_parallel_size": 2}, "--tensor-parallel-size"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"use_ubatching": True}, "micro-batches"),
        ({"speculative_config": object()}, "speculative"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "KV connector"),
    ],
)
def test_what_would_answer_otherwise_is_refused(asked: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice) as refusal:
        refuse(engine(**asked))
    assert "\n" not in str(refusal.value)
