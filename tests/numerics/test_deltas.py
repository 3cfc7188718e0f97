"""Per-iteration deltas against plain models whose weights have them merged in."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import LAYERS, VOCAB, recurrent
from rondo.convert.deltas import low_rank, merged
from rondo.flops import costs_of
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.deltas_recurrent import DeltaLinear, DeltaVectors
from rondo.modeling.inputs_recurrent import LayerInputs
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

RANK, SETS, SIZES = 3, 2, (1, 3, 2)
IDS = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
# Plain; biases; norms behind the layers and on queries and keys; norms around 1; fused matrices.
families = pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2", "gemma3_text", "phi3"])


def with_deltas(family: str = "llama", **fields: Any) -> Any:
    """The tiny model of a family with deltas large enough to tell."""
    plain = recurrent(family, sizes=SIZES, **fields)
    settings = plain.config.to_dict() | {"delta_rank": RANK, "num_delta_iterations": SETS}
    model = RecurrentForCausalLM(RecurrentConfig(**settings))
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert all(".delta_" in name for name in missing)
    assert not unexpected
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".delta_" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def moves(gradient: Tensor | None) -> bool:
    """Whether a stacked parameter has a gradient in each set."""
    return gradient is not None and bool((gradient.flatten(1).abs().sum(1) > 0).all())


def in_iteration(model: RecurrentForCausalLM, iteration: int, family: str) -> RecurrentForCausalLM:
    """The model without deltas that has merged in those of one iteration."""
    plain = recurrent(family, sizes=SIZES)
    state = model.state_dict()
    deltas = {name: tensor for name, tensor in state.items() if ".delta_" in name}
    for name in plain.state_dict():
        index = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        if 1 <= index <= 3:
            state[name] = merged(name, state[name], deltas, iteration)
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


@torch.no_grad()
def by_hand(model: RecurrentForCausalLM, depth: int, family: str, ids: Tensor = IDS) -> Tensor:
    """Logits by the definition, each iteration run by a model without deltas."""
    body = in_iteration(model, 1, family).model
    embeds = body.embed(ids)
    inputs = LayerInputs.prepare(body, embeds, None, None, None, {})
    s = e = body.run(slice(0, 1), embeds, inputs, None)
    for iteration in range(1, depth + 1):
        body = in_iteration(model, (iteration - 1) % SETS + 1, family).model
        s = body.iterate(iteration, s, e, inputs, None)
    return model.logits(body.finish(s, inputs, None))


@families
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_an_iteration_has_its_own_deltas_and_late_ones_begin_again(family: str, depth: int) -> None:
    model = with_deltas(family)
    with torch.no_grad():
        ours = model(IDS, num_recurrences=depth).logits
    torch.testing.assert_close(ours, by_hand(model, depth, family), rtol=1e-4, atol=1e-4)


def test_fresh_deltas_change_nothing_but_can_learn() -> None:
    plain = recurrent("llama", sizes=SIZES)
    fields = plain.config.to_dict() | {"delta_rank": RANK, "num_delta_iterations": SETS}
    model = RecurrentForCausalLM(RecurrentConfig(**fields))
    model.load_state_dict(plain.state_dict(), strict=False)
    output = model(IDS, labels=IDS, num_recurrences=3)
    assert torch.equal(output.logits, plain(IDS, num_recurrences=3).logits)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith(("delta_up", "delta_weight")):
            assert moves(parameter.grad), name


def test_without_rank_the_core_is_the_familys_own() -> None:
    model = recurrent("llama")
    assert not any(isinstance(one, (DeltaLinear, DeltaVectors)) for one in model.modules())
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    fields = model.config.to_dict()
    del fields["delta_rank"], fields["num_delta_iterations"]
    assert RecurrentConfig(**fields).delta_rank == 0


@pytest.mark.parametrize("fields", [{"delta_rank": 2}, {"num_delta_iterations": 2}])
def test_half_a_setting_is_refused(fields: dict[str, int]) -> None:
    settings = recurrent("llama").config.to_dict() | fields
    with pytest.raises(ValueError, match="delta_rank and num_delta_iterations"):
        RecurrentConfig(**settings)


@families
def test_rows_of_different_depth_equal_separate_runs(family: str) -> None:
    model = with_deltas(family)
    depths = [3, 1, 2]
    with torch.no_grad():
        together = model(IDS, num_recurrences=depths).logits
        for row, depth in enumerate(depths):
            alone = model(IDS[row : row + 1], num_recurrences=depth).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@families
def test_cached_generation_equals_the_whole_sequence(family: str) -> None:
    model = with_deltas(family)
    depths = torch.tensor([3, 1, 2])
    options: dict[str, Any] = {"num_recurrences": depths, "do_sample": False}
    tokens = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, **options)
    with torch.no_grad():
        whole = model(tokens[:, :-1], num_recurrences=depths).logits[:, IDS.shape[1] - 1 :]
    whole[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(whole.argmax(-1), tokens[:, IDS.shape[1] :])


def test_recomputed_iterations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = with_deltas().train()
        model.model(
            IDS, num_recurrences=3, backprop_depth=3, checkpoint_iterations=recompute
        ).last_hidden_state.square().sum().backward()
        gradients.append(
            {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        )
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
    # Iterations 1 and 3 have the first deltas, iteration 2 the second.
    assert moves(plain["model.layers.2.mlp.up_proj.delta_up"])


def test_recomputing_a_core_layer_alone_is_refused() -> None:
    model = with_deltas().train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = None
    for layer in (*model.model.prelude, *model.model.coda):
        layer.gradient_checkpointing = False
    with pytest.raises(ValueError, match="checkpoint_iterations"):
        model(IDS, use_cache=False)
    model.eval()(IDS)


def test_a_compiled_core_serves_every_depth_with_one_graph() -> None:
    model, compiled = with_deltas(), with_deltas()
    torch._dynamo.reset()
    counters.clear()
    for layer in compiled.model.core:
        layer.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        for depth in (1, 2, 3, 5):
            ours = compiled(IDS, num_recurrences=depth, use_cache=False).logits
            assert torch.equal(ours, model(IDS, num_recurrences=depth, use_cache=False).logits)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_copy_is_a_model_of_its_own() -> None:
    model = with_deltas()
    other = copy.deepcopy(model)
    expected = model(IDS, num_recurrences=1).logits
    other(IDS, num_recurrences=2)
    # Were the copy's layers to tell the model its iteration, this call would read the wrong one.
    assert torch.equal(model(IDS, num_recurrences=1).logits, expected)
    assert other.model.core[0].mlp.up_proj.current is not model.model.core[0].mlp.up_proj.current
    assert torch.equal(other(IDS, num_recurrences=1).logits, expected)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = with_deltas("qwen2")
    model.save_pretrained(tmp_path)
    again = RecurrentForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@families
@pytest.mark.parametrize(("depth", "window"), [(1, None), (3, None), (4, 2)], ids=str)
def test_costs_are_those_torch_counts(family: str, depth: int, window: int | None) -> None:
    model = with_deltas(family)
    costs = costs_of(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(IDS, labels=IDS, num_recurrences=depth, backprop_depth=window)
        forward = counter.get_total_flops()
        output.loss.backward()
    assert forward == IDS.numel() * costs.forward_flops(depth, IDS.shape[1])
    expected = IDS.numel() * costs.train_flops(depth, window or depth, IDS.shape[1])
    assert counter.get_total_flops() == expected


@families
def test_parameters_are_those_the_model_holds(family: str) -> None:
    model, plain = with_deltas(family), recurrent(family, sizes=SIZES)
    costs, shared = costs_of(model), costs_of(plain)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert costs.total_parameters == count
    assert costs.delta_parameters == count - sum(one.numel() for one in plain.parameters())
    assert costs.core_parameters == shared.core_parameters
    # A token meets one of the sets in each iteration.
    extra = 5 * costs.delta_parameters // SETS
    assert costs.effective_parameters(5) == shared.effective_parameters(5) + extra


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_a_fit_misses_what_no_matrix_of_its_rank_holds(
    height: int, width: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    difference = torch.randn(height, width, generator=generator, dtype=torch.float64)
    up, down = low_rank(difference, rank, torch.Generator())
    assert up.shape == (height, min(rank, height, width))
    assert down.shape == (min(rank, height, width), width)
    missed = torch.linalg.matrix_norm(difference - up @ down)
    beyond = torch.linalg.svdvals(difference)[rank:].norm()
    torch.testing.assert_close(missed, beyond, rtol=1e-9, atol=1e-9)


def test_every_core_layer_has_deltas() -> None:
    names = {name for name, _ in with_deltas().named_parameters() if ".delta_" in name}
    assert {int(name.split(".")[2]) for name in names} == {1, 2, 3}
    assert sum(SIZES) == LAYERS
    assert "model.layers.1.self_attn.q_proj.delta_down" in names
    assert "model.layers.3.input_layernorm.delta_weight" in names
