"""Compiled decoding: layers are compiled once, and neither depth nor batch compiles them again.

What is compiled is a layer, never the loop. So all layers share their programs, however often the
core runs and whichever rows take part.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# Variants a layer may have: one row and several, prompts and single tokens, masks and none.
VARIANTS = 64
# Plain decoding, and several tokens verified at once.
WAYS: tuple[dict[str, Any], ...] = (
    {"cache_policy": "full"},
    {"draft_recurrences": 1, "draft_tokens": 2},
    {"draft_recurrences": 1, "draft_tokens": 3},
)


def compile_decoding(model: Any, max_batch_size: int = 8, backend: str = "inductor") -> None:
    """Compile a model's layers for generation, and run what makes the compiler settle.

    Afterwards no depth, no length and no batch size up to the largest compiles anything, with
    drafts or without, with a `RecurrentCache` of the policy full or ragged. Tokens of a prompt
    that leave at different depths still may, a bounded number of times. `generate` runs without
    gradient but not in inference mode; call both as they will be called.

    Args:
        model: A `RecurrentForCausalLM`, in eval mode.
        max_batch_size: Rows of the largest batch.
        backend: Backend of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend=backend)
    # A size of one is a program of its own, and two other sizes are needed for "any size".
    for batch_size in sorted({1, min(2, max_batch_size), min(3, max_batch_size), max_batch_size}):
        for padded in (False, True)[:batch_size]:  # a row alone needs no padding
            _settle(model, batch_size, padded)


def _settle(model: Any, batch_size: int, padded: bool) -> None:
    """Generate in the ways that give a layer another kind of input."""
    for length, ways in ((5, WAYS), (7, WAYS[:1])):
        ids = torch.ones(batch_size, length, dtype=torch.long, device=model.device)
        mask = torch.ones_like(ids)
        mask[0, : int(padded)] = 0
        for way in ways:
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                num_recurrences=2,
                pad_token_id=0,
                **way,
            )


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Raise where anything would be compiled again."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield
