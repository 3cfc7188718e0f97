"""The model card: what was done to the parent, drawn and told."""

from collections.abc import Iterator
from typing import Any

from rondo.convert.split import Split, format_indices, parse_split


def draw_split(split: Split, num_layers: int) -> str:
    """Draw the parent's layers in a line: P prelude, C core, E coda (end), . dropped."""
    marks = ["."] * num_layers
    for letter, part in (("P", split.prelude), ("C", split.core), ("E", split.coda)):
        for index in part:
            marks[index] = letter
    return f"[{''.join(marks)}]  P prelude, C core (loops), E coda (ends), . dropped"


def fit_lines(deltas: dict[str, Any]) -> Iterator[str]:
    """Yield how near the deltas of each iteration come to the layers that they stand for."""
    yield (
        f"deltas of rank {deltas['rank']} for {deltas['num_iterations']} iterations; what they "
        "miss of the difference of the parent's layers from the shared ones (Frobenius):"
    )
    for number, layers in enumerate(deltas["targets"], 1):
        errors = " ".join(f"{error:.3f}" for error in deltas["fit_error"][number - 1])
        yield f"  iteration {number}, layers {format_indices(tuple(layers))}: {errors}"


def model_card(facts: dict[str, Any]) -> str:
    """Return the README.md of a checkpoint, made from its run.json facts."""
    plan, parent = facts["plan"], facts["parent"]
    split = parse_split(plan["split"], parent["num_layers"])
    depth_rows = "\n".join(
        f"| {row['num_recurrences']} | {row['effective_depth']} | "
        f"{row['forward_flops_per_token']:.4g} | {row['kv_bytes_per_token']:,} |"
        for row in plan["depths"]
    )
    deltas = (
        "".join(f"\n    {line}" for line in fit_lines(plan["deltas"])) if plan["deltas"] else ""
    )
    apart = ", but for the low-rank deltas of each iteration" if deltas else ""
    proof_rows = "\n".join(
        f"| {check['name']} | {check['measured']} | {'passed' if check['passed'] else 'FAILED'} |"
        for check in facts["proof"]
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [depth-recurrent, rondo]
---
# A depth-recurrent model made from {parent["name"]}

    {draw_split(split, parent["num_layers"])}{deltas}

The prelude runs once, the core `num_recurrences` times with the same weights{apart}, the coda once.
Injection `{plan["injection"]}`, initial state `{plan["state_init"]}`,
{plan["parameters"]["total"]:,} parameters.

```python
import rondo  # or pass trust_remote_code=True in both calls below
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this-directory")
tokenizer = AutoTokenizer.from_pretrained("this-directory")
inputs = tokenizer("Question: What is 12 + 30?\\nAnswer:", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, num_recurrences=4, max_new_tokens=32)[0]))
```

## What depth costs

| r | layers run | FLOPs per token | KV bytes per token |
|---|---|---|---|
{depth_rows}

## Proof of the conversion

| check | measured | |
|---|---|---|
{proof_rows}

What depth buys is not known from a conversion: train it and measure it (`rondo train`,
`rondo eval`). Licence and limits are those of the parent. The method is that of
arXiv:2511.07384.
"""
