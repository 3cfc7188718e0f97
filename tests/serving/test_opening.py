"""From a checkpoint to an engine: what is refused, planned and proved before anyone is served."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import byte_tokenizer, recurrent
from rondo.errors import ProofError, UserError
from rondo_serve.config import ServeConfig
from rondo_serve.engine.opening import open_engine
from rondo_serve.engine.packing import Attention


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny"
    model = recurrent("llama", num_recurrences=3, max_recurrences=8)
    model.generation_config.do_sample = True
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def opened(checkpoint: Path, **fields: Any) -> Any:
    plain = {"kv_memory": "4MB", "dtype": "float32", "device": "cpu"}
    return open_engine(ServeConfig(**{"model": str(checkpoint)} | plain | fields))


def test_an_engine_is_proved_and_the_operator_told_what_it_holds(checkpoint: Path) -> None:
    found = opened(checkpoint, max_running=5)
    first, second, third = found.told
    assert first == "float32 on cpu; depth 1 to 8, 3 by default"
    assert second.startswith("keys and values 4 MB in ")
    assert [f"at r = {depth}" in second for depth in (1, 3, 8)] == [True] * 3
    assert third == "up to 5 texts at once, 128 waiting, 256 tokens each"
    # The proof was asked at two depths, and left nothing behind.
    assert found.engine.passes.core_tokens > 0
    assert found.engine.load().running == 0


@pytest.mark.parametrize(("tick", "chunk", "found"), [(None, None, (64, 32)), (8, 64, (8, 8))])
def test_a_chunk_is_no_more_than_a_tick_takes(
    checkpoint: Path, tick: int | None, chunk: int | None, found: tuple[int, int]
) -> None:
    settings = opened(checkpoint, tick_tokens=tick, prompt_chunk=chunk).engine.settings
    assert (settings.tick_tokens, settings.prompt_chunk) == found


def test_an_engine_that_does_not_answer_as_the_model_does_is_not_served(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = Attention.mask

    def blind(self: Attention, *args: Any) -> torch.Tensor:
        seen = mask(self, *args)
        seen[..., 1:2] = False
        return seen

    monkeypatch.setattr(Attention, "mask", blind)
    with pytest.raises(ProofError, match="does not answer as the model does"):
        opened(checkpoint)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_context": 12}, "cannot be served so"),
        ({"kv_memory": "1kB"}, "a page alone takes"),
        ({"max_context": 1000}, "beyond the 256 tokens"),
        ({"max_recurrences": 9}, "beyond the model's cap of 8"),
        ({"weights": "int8", "device": "nowhere"}, "--device nowhere"),
    ],
)
def test_what_cannot_be_served_is_refused(
    checkpoint: Path, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        opened(checkpoint, **fields)


def test_a_model_that_is_not_recurrent_is_refused(tiny_base: Any) -> None:
    with pytest.raises(UserError, match="convert it first"):
        opened(tiny_base("llama"))
