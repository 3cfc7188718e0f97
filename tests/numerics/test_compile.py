"""Compiled layers: how deep the loop runs never compiles anything again."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from conftest import VOCAB, recurrent
from rondo.compiling import compile_decoding, settled

# Said by the compiler's own look at a state inside the loop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor",
    "ignore:`torch.jit:DeprecationWarning",
)
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_depth_and_window_never_compile_a_layer_again(family: str) -> None:
    plain, compiled = recurrent(family), recurrent(family)
    torch._dynamo.reset()
    counters.clear()
    for layer in compiled.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    graphs = []
    for depth, window in ((3, 2), (1, 1), (2, 2), (6, 4), (5, 1)):
        losses = []
        for model in (plain, compiled):
            output = model.model(IDS, num_recurrences=depth, backprop_depth=window)
            loss = model.logits(output.last_hidden_state).square().mean()
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        graphs.append(counters["stats"]["unique_graphs"])
    # One with gradient, one without; the first step has both.
    assert set(graphs) == {2}
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.slow
def test_compiled_code_gives_the_gradients_of_plain_code() -> None:
    plain, compiled = recurrent("llama"), recurrent("llama")
    torch._dynamo.reset()
    for layer in compiled.model.layers:
        layer.compile()
    for depth, window in ((3, 2), (1, 1), (4, 4)):
        for model in (plain, compiled):
            output = model.model(IDS, num_recurrences=depth, backprop_depth=window)
            model.logits(output.last_hidden_state).square().mean().backward()
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_neither_depth_nor_batch_nor_length_compiles_decoding_again() -> None:
    plain, compiled = recurrent("llama"), recurrent("llama")
    torch._dynamo.reset()
    compile_decoding(compiled, max_batch_size=4, backend="eager")
    ways: list[dict[str, Any]] = [
        {"num_recurrences": 1, "cache_policy": "full"},
        {"num_recurrences": 6, "cache_policy": "ragged"},
        {"num_recurrences": 5, "draft_recurrences": 2},
    ]
    with settled():
        for batch_size in (1, 2, 3, 4):
            ids = torch.randint(3, VOCAB, (batch_size, 11))
            mask = torch.ones_like(ids)
            mask[0, : 3 * (batch_size > 1)] = 0
            how = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
            for way in ways:
                found = compiled.generate(ids, pad_token_id=0, **how, **way)
                assert torch.equal(found, plain.generate(ids, pad_token_id=0, **how, **way))
    with settled(), pytest.raises(RuntimeError, match="recompile"):
        compiled.double().generate(ids[:1], max_new_tokens=2, cache_policy="full")
