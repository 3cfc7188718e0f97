"""Truncated backpropagation and branches against loops written by hand and plain autograd."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import VOCAB, recurrent
from rondo.modeling.inputs_recurrent import LayerInputs
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

IDS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
Gradients = dict[str, Tensor]

families = pytest.mark.parametrize("family", ["llama", "olmo2", "gemma3_text", "qwen3_moe"])
starts = pytest.mark.parametrize(
    ("injection", "state_init"),
    [("mix", "input"), ("linear", "normal"), ("add", "zeros"), ("mix", "normal")],
)


def build(family: str = "llama", **fields: Any) -> RecurrentForCausalLM:
    model = recurrent(family, **fields)
    if model.config.injection == "linear":
        nn.init.normal_(model.model.injection.weight, 0, 0.1, torch.Generator().manual_seed(1))
    return model


def loss_of(model: RecurrentForCausalLM, hidden: Tensor) -> Tensor:
    logits = model.logits(hidden)[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())


def gradients(model: RecurrentForCausalLM, loss: Tensor) -> Gradients:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    zeros = map(torch.zeros_like, parameters)
    return {
        name: zero if gradient is None else gradient
        for name, gradient, zero in zip(names, found, zeros, strict=True)
    }


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=lambda m, n=name: n + m
        )


def largest_difference(left: Gradients, right: Gradients) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def start(model: RecurrentForCausalLM) -> tuple[Tensor, LayerInputs]:
    """The prelude's output and what the layers are given, by the body's own pieces."""
    body = model.model
    embeds = body.embed(IDS)
    inputs = LayerInputs.prepare(body, embeds, None, None, None, {})
    return body.run(slice(0, model.config.num_prelude_layers), embeds, inputs, None), inputs


def loop_by_hand(model: RecurrentForCausalLM, depth: int, detach_after: int | None) -> Tensor:
    """Normed coda output, with the state cut off from its past after some iteration."""
    e, inputs = start(model)
    s = model.model.initial_state(e, inputs.position_ids, 0)
    for iteration in range(1, depth + 1):
        if iteration - 1 == detach_after:
            s = s.detach()
        s = model.model.iterate(iteration, s, e, inputs, None)
    return model.model.finish(s, inputs, None)


def run(model: RecurrentForCausalLM, depth: int, **options: Any) -> tuple[Tensor, Gradients]:
    hidden = model.model(IDS, num_recurrences=depth, **options).last_hidden_state
    return hidden, gradients(model, loss_of(model, hidden))


@families
@pytest.mark.parametrize("depth", [1, 3])
def test_a_window_of_the_whole_depth_is_plain_autograd(family: str, depth: int) -> None:
    model = build(family)
    by_hand = loop_by_hand(model, depth, None)
    expected = gradients(model, loss_of(model, by_hand))
    for window in (None, depth, depth + 5):
        hidden, found = run(model, depth, backprop_depth=window)
        assert torch.equal(hidden, by_hand)
        assert_same(found, expected)


@families
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_shorter_window_is_autograd_with_the_state_detached(family: str, window: int) -> None:
    model = build(family)
    by_hand = loop_by_hand(model, 4, 4 - window)
    hidden, found = run(model, 4, backprop_depth=window)
    assert torch.equal(hidden, by_hand)
    assert_same(found, gradients(model, loss_of(model, by_hand)))
    for other in {1, 2, 3, 4} - {window}:  # and the window matters
        assert largest_difference(found, run(model, 4, backprop_depth=other)[1]) > 1e-4


@starts
@pytest.mark.parametrize("window", [1, 2, 4])
def test_windows_hold_for_each_injection_and_start(
    injection: str, state_init: str, window: int
) -> None:
    model = build(injection=injection, state_init=state_init, state_std=0.5)
    by_hand = loop_by_hand(model, 4, 4 - window if window < 4 else None)
    hidden, found = run(model, 4, backprop_depth=window)
    assert torch.equal(hidden, by_hand)
    assert_same(found, gradients(model, loss_of(model, by_hand)))


@starts
@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_preludes_gradient_is_the_sum_over_the_injections_in_the_window(
    injection: str, state_init: str, window: int
) -> None:
    depth = 4
    model = build(injection=injection, state_init=state_init, state_std=0.5)
    body = model.model
    e, inputs = start(model)
    # One copy of e for each use of it: the start of the state, then each iteration.
    copies = [e.detach().clone().requires_grad_() for _ in range(depth + 1)]
    s = body.initial_state(copies[0], inputs.position_ids, 0)
    for iteration in range(1, depth + 1):
        if iteration == depth - window + 1 and window < depth:
            s = s.detach()
        s = body.iterate(iteration, s, copies[iteration], inputs, None)
    loss = loss_of(model, body.finish(s, inputs, None))
    parts = torch.autograd.grad(loss, copies, allow_unused=True)
    reached = [use for use, part in enumerate(parts) if part is not None]
    through_the_start = [0] if window == depth and state_init == "input" else []
    assert reached == [*through_the_start, *range(depth - window + 1, depth + 1)]

    prelude = {
        name: parameter
        for layer in range(model.config.num_prelude_layers)
        for name, parameter in body.layers[layer].named_parameters(f"model.layers.{layer}")
    }
    total = sum(parts[use] for use in reached)
    by_hand = torch.autograd.grad(e, list(prelude.values()), grad_outputs=total)
    _, found = run(model, depth, backprop_depth=window)
    assert_same({name: found[name] for name in prelude}, dict(zip(prelude, by_hand, strict=True)))


def branches(
    model: RecurrentForCausalLM, depth: int, outputs: Sequence[int], **options: Any
) -> tuple[Tensor, ...]:
    options |= {"num_recurrences": depth, "output_recurrences": outputs}
    return model.model(IDS, **options).branches


@families
def test_branches_equal_separate_runs(family: str) -> None:
    model, outputs = build(family), (3, 1, 5)
    together = branches(model, 5, outputs)
    assert len(together) == 3
    for depth, hidden in zip(outputs, together, strict=True):
        alone, expected = run(model, depth)
        assert torch.equal(hidden, alone)
        found = gradients(model, loss_of(model, hidden))
        assert_same(found, expected)


# Windows of two iterations with some between them, and one right after the other.
APART = [(5, (2, 5)), (6, (1, 4)), (4, (4,)), (7, (1, 4, 7))]
ADJACENT = [(4, (2, 4)), (6, (2, 4)), (5, (1, 3))]


@starts
@pytest.mark.parametrize(("depth", "outputs"), APART + ADJACENT, ids=str)
def test_branches_with_a_window_each_equal_separate_runs(
    injection: str, state_init: str, depth: int, outputs: tuple[int, ...]
) -> None:
    model = build(injection=injection, state_init=state_init, state_std=0.5)
    together = branches(model, depth, outputs, backprop_depth=2)
    for output, hidden in zip(outputs, together, strict=True):
        alone, expected = run(model, output, backprop_depth=2)
        assert torch.equal(hidden, alone)
        found = gradients(model, loss_of(model, hidden))
        assert_same(found, expected)


def test_windows_that_overlap_are_joined() -> None:
    # Each iteration runs once, with one graph: what a shallower output needs, a deeper one has.
    model = build()
    for output, hidden in zip((3, 4), branches(model, 4, (3, 4), backprop_depth=2), strict=True):
        expected = loop_by_hand(model, output, 1)
        assert torch.equal(hidden, expected)
        found = gradients(model, loss_of(model, hidden))
        assert_same(found, gradients(model, loss_of(model, expected)))


@pytest.mark.parametrize("outputs", [(2, 5), (2, 4)], ids=str)
def test_the_losses_of_branches_add_up(outputs: tuple[int, int]) -> None:
    model = build()
    together = branches(model, outputs[1], outputs, backprop_depth=2)
    found = gradients(model, sum(loss_of(model, hidden) for hidden in together))
    parts = [run(model, depth, backprop_depth=2)[1] for depth in outputs]
    assert_same(found, {name: parts[0][name] + parts[1][name] for name in found})


def test_branches_are_taken_without_gradient_too() -> None:
    model = build()
    with torch.no_grad():
        together = branches(model, 4, (1, 2, 4), backprop_depth=1)
        for depth, hidden in zip((1, 2, 4), together, strict=True):
            assert torch.equal(hidden, model.model(IDS, num_recurrences=depth).last_hidden_state)


def test_iterations_before_the_window_store_no_activations() -> None:
    model, graphs = build(), []
    core = model.model.core[0]
    core.register_forward_hook(lambda layer, args, out: graphs.append(out.requires_grad))
    model.model(IDS, num_recurrences=5, backprop_depth=2)
    assert graphs == [False, False, False, True, True]
    graphs.clear()
    branches(model, 6, (2, 6), backprop_depth=1)
    assert graphs == [False, True, False, False, False, True]
