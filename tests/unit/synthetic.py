"""Results as `rondo eval` writes them, made up, so that their truth is known."""

import math
from typing import Any

import numpy as np

Json = dict[str, Any]
SPLIT = {"prelude": [*range(12)], "core": [*range(12, 18)], "coda": [*range(18, 30)]}
TRAINING = {
    "mode": "recurrent",
    "tokens": 61_440,
    "steps": 60,
    "flops": 5.1e13,
    "flops_paper": 4.1e13,
    "seconds": 120.0,
    "loss": "last",
    "recurrence": "fixed 2",
    "optimizer": "adamw",
    "lr": 1e-4,
    "seed": 0,
    "data": "math (shipped sample)",
}
LABELS = {
    "recurrent": "recurrent",
    "parent": "parent",
    "static": "static twin",
    "random": "random-init twin",
    "self-consistency": "parent, self-consistency",
}


def flops_at(depth: int) -> float:
    return 2.7e8 + 4.2e7 * (depth - 1)


def loss_items(means: dict[int, float], num_items: int, number: int) -> Json:
    """Documents differ much and models on one document little, as in real data."""
    rng = np.random.default_rng(number)
    tokens = rng.integers(80, 400, num_items)
    document = rng.normal(0, 0.3, num_items)
    values = {}
    for depth, mean in means.items():
        own = np.random.default_rng([depth, number, 7]).normal(0, 0.02, num_items)
        losses = mean + document + own - own.mean() - document @ tokens / tokens.sum()
        values[str(depth)] = (losses * tokens).tolist()
    return {"weights": tokens.tolist(), "values": values}


def accuracy_items(means: dict[int, float], num_items: int, number: int) -> Json:
    """Items have a difficulty in (0, 1), and a depth gets those right that lie below its mean."""
    difficulty = np.random.default_rng(number).permutation(num_items) / num_items
    values = {
        str(depth): [float(one < mean) for one in difficulty] for depth, mean in means.items()
    }
    return {"weights": [1] * num_items, "values": values}


def make_result(
    role: str = "recurrent",
    stage: str = "after",
    tasks: dict[str, dict[int, float]] | None = None,
    label: str | None = None,
    num_items: int = 60,
    **changes: Any,
) -> Json:
    """Make a result whose primary metric on each task has the given mean at each depth.

    A task whose name begins with `acc` is one of likelihoods, with `gen` one of generation, and
    any other one of loss.
    """
    tasks = tasks or {"math-test": {1: 2.0, 2: 1.9, 4: 1.88}}
    rows, items, described = [], {}, {}
    for number, (task, means) in enumerate(tasks.items()):
        kind = {"acc": "likelihood", "gen": "generation"}.get(task[:3], "loss")
        metric = {"likelihood": "acc_norm", "generation": "exact_match"}.get(kind, "loss")
        make = loss_items if kind == "loss" else accuracy_items
        items[task] = make(means, num_items, number)
        weights = np.asarray(items[task]["weights"], dtype=float)
        for depth in means:
            values = np.asarray(items[task]["values"][str(depth)])
            value = float(values.sum() / weights.sum())
            spread = values - value * weights
            row = {
                "task": task,
                "metric": metric,
                "num_recurrences": depth,
                "value": value,
                "stderr": math.sqrt(float((spread**2).sum()) * num_items / (num_items - 1))
                / float(weights.sum()),
                "seed_values": [value],
                "flops_per_token": flops_at(depth),
                "kv_bytes_per_token": 23_040 + 4_608 * (depth - 1),
                "ms_per_token": flops_at(depth) / 2.6e8,
                "seconds": 10.0 + depth,
                "tokens_per_item": 120.0,
                "samples": 3 if role == "self-consistency" else 1,
            }
            rows.append(row | ({"bits_per_byte": value * 0.47} if kind == "loss" else {}))
        described[task] = {
            "kind": kind,
            "metric": metric,
            "higher_is_better": kind != "loss",
            "chance": {"likelihood": 0.25, "generation": 0.0}.get(kind),
            "source": f"data/{task}.jsonl",
            "sha256": "0" * 64,
            "items": num_items,
            "num_fewshot": 0,
            "suite": None,
        }
        if kind == "loss":
            described[task] |= {"tokens": int(weights.sum()), "bytes": 61_000}
    loops = role in ("recurrent", "random")
    trained = stage == "after" and role not in ("parent", "self-consistency")
    training = TRAINING | {"mode": role}
    when = ", trained" if trained else ", untrained"
    result = {
        "model": {
            "path": f"out/{role}",
            "label": label or LABELS[role] + (when if role == "recurrent" else ""),
            "role": role,
            "stage": "after" if trained else "before",
            "parent": "SmolLM2-135M-Instruct",
            "parameters": 134_515_584,
            "split": SPLIT if loops else None,
            "injection": "mix" if loops else None,
            "state_init": "input" if loops else None,
            "max_recurrences": 64 if loops else None,
            "trained_recurrence": 2.0 if loops and trained else None,
            "training": training if trained else None,
            "curve": [
                {
                    "step": step,
                    "tokens": 1024 * step,
                    "flops": 8.5e11 * step,
                    "loss": 1.5 + step**-0.5,
                    "validation": {"1": 1.6 + step**-0.5, "2": 1.55 + step**-0.5},
                }
                for step in (10, 20, 30, 40, 50, 60)
            ]
            if trained
            else [],
            "history": [f"rondo train out/base --output-dir out/{role}"],
        },
        "conditions": {
            "command": f"rondo eval out/{role} --output-dir out/eval-{role}",
            "date": "2026-11-24T08:00:00Z",
            "device": "cpu (AMD EPYC, 2 threads)",
            "dtype": "float32",
            "seq_len": 512,
            "batch_size": 8,
            "limit": None,
            "num_processes": 1,
            "seeds": [0],
            "peak_memory_bytes": 1_400_000_000,
            "versions": {"rondo-lm": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
            "git": "abc1234",
        },
        "tasks": described,
        "rows": rows,
        "items": items,
        "states": make_states() if loops else None,
    }
    for group, change in changes.items():
        result[group] = {**result[group], **change} if isinstance(change, dict) else change
    return result


def published(result: Json) -> Json:
    """Leave what stands in a paper: values with standard errors, and no items."""
    tasks = {name: {**facts, "sha256": None} for name, facts in result["tasks"].items()}
    return {**result, "tasks": tasks, "items": {}}


def make_states(num_iterations: int = 8) -> Json:
    return {
        "text": "math-test",
        "tokens": 1024,
        "gain": 0.6,
        "behaviour": "settles",
        "iterations": [
            {
                "iteration": i,
                "state_norm": 40.0 + i,
                "step": 0.6 * 0.6**i,
                "cosine": 1 - 0.2 * 0.4**i,
                "loss": 1.9 + 0.2 * 0.5**i,
                "kl_to_last": 0.3 * 0.5**i if i < num_iterations else 0.0,
                "agreement": 1 - 0.3 * 0.5**i if i < num_iterations else 1.0,
                "entropy": 2.0 - 0.02 * i,
            }
            for i in range(1, num_iterations + 1)
        ],
    }


def make_file(*results: Json) -> Json:
    """Make what a results.json holds."""
    return {"format_version": 2, "kind": "eval", "results": list(results)}
