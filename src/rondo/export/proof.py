"""The proof of an export: the plain model against the recurrent one at its depth."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rondo.convert.verify import TOLERANCE, Check, proof_tokens
from rondo.export.unroll import Plan, plain_class, write_weights
from rondo.loading import load_model
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM


@torch.no_grad()
def prove(plan: Plan, directory: Path, limit: float, seed: int) -> Iterator[Check]:
    """Compare the plain model with the recurrent one at its depth, in float32.

    Where deltas were rounded as they were folded in, the comparison is with what they were before,
    and the weights are shown to differ from that by the rounding only.
    """
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".proof.") as scratch:
        loadable = directory
        if plan.rounds():
            loadable = Path(scratch) / "unrounded"
            loadable.mkdir()
            plan.config.save_pretrained(loadable)
            write_weights(plan, loadable, limit, rounded=False)
            yield _only_rounded(directory, loadable)
        options: dict[str, Any] = {}
        if not fits_in_memory(plan):
            options = {"device_map": {"": "disk"}, "offload_folder": scratch}
        path = plan.checkpoint.path
        recurrent = load_model(RecurrentForCausalLM, path, torch.float32, **options)
        ids, mask = proof_tokens(plan.config.vocab_size, seed)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        ours = recurrent.eval()(ids, num_recurrences=plan.depth, **inputs).logits[mask == 1]
        del recurrent  # so that one of them is in memory at a time
        options |= {"output_loading_info": True}
        plain, info = load_model(plain_class(plan.config), loadable, torch.float32, **options)
        theirs = plain.eval()(ids, **inputs, use_cache=False).logits[mask == 1]
        unplaced = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    yield Check("every tensor has its place in the family's own class", float(len(unplaced)), 0.0)
    yield Check(
        f"{type(plain).__name__} equals the recurrent model at r = {plan.depth}, left-padded too",
        float((ours - theirs).abs().max()),
        0.0 if plan.exact else TOLERANCE * float(ours.std().clamp(min=1e-6)),
    )


def fits_in_memory(plan: Plan) -> bool:
    """Whether the larger model, the plain one, takes less than half the memory in float32."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4 * plan.sizes()["parameters"] < memory / 2


def _only_rounded(directory: Path, unrounded: Path) -> Check:
    wrong = 0
    for file in sorted(directory.glob("*.safetensors")):
        with (
            safe_open(file, framework="pt") as written,
            safe_open(unrounded / file.name, framework="pt") as exact,
        ):
            for name in written.keys():  # noqa: SIM118 (no mapping)
                one = written.get_tensor(name)
                wrong += not torch.equal(one, exact.get_tensor(name).to(one.dtype))
    return Check("weights differ from the folded deltas by their rounding only", float(wrong), 0.0)
