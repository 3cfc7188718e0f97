"""What calibrated exits save of iterations and of time, against the full depth.

    rondo calibrate MODEL --data mine.jsonl --tolerance 0.5% --max-recurrences 8
    python benchmarks/decode_exits.py MODEL --prompts questions.jsonl --tolerance 0.5%

Each exit that the checkpoint has for this tolerance continues the same prompts as the full depth
does, by as many tokens, greedily; all take turns. Iterations are those executed, prompt included;
`time saved` is of the same turn. What an exit does to the loss is in MODEL/calibration.json. The
fixed depths are what a user could have taken instead.
"""

import argparse
from typing import Any

import decoding
import torch

from rondo.modeling.generation_recurrent import calibrated


def main() -> None:
    """Time exits."""
    parser = decoding.arguments(__doc__)
    parser.add_argument("--tolerance", default="0.5%")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    flags = parser.parse_args()
    model = decoding.load(flags)
    rules = {
        name: stored[flags.tolerance]
        for name, stored in (model.config.exit_rules or {}).items()
        if flags.tolerance in stored
    }
    if not rules:
        parser.error(f"{flags.model} has no exit calibrated to {flags.tolerance}")
    cap = max(rule["max_recurrences"] for rule in rules.values())
    ways: dict[str, dict[str, Any]] = {
        f"r = {depth}": {"num_recurrences": depth, "cache_policy": "full"}
        for depth in sorted({cap, *(depth for depth in (1, 2, 4) if depth < cap)}, reverse=True)
    }
    for name, rule in rules.items():
        ways[name] = {
            "num_recurrences": rule["max_recurrences"],
            "exit": calibrated(model.config, name, flags.tolerance),
            "cache_policy": rule["cache_policy"],
        }
    asked = decoding.prompts(flags, model)
    found = {
        f"batch {size}": at(model, batches(asked, size), ways, f"r = {cap}", flags)
        for size in flags.batch_sizes
    }
    decoding.record(flags, found)


def batches(asked: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    """Return prompts in batches, cut on the left to the shortest of each."""
    found = []
    for start in range(0, len(asked) - size + 1, size):
        group = asked[start : start + size]
        shortest = min(ids.shape[1] for ids in group)
        found.append(torch.cat([ids[:, -shortest:] for ids in group]))
    return found


def at(
    model: Any,
    asked: list[torch.Tensor],
    ways: dict[str, dict[str, Any]],
    full: str,
    flags: argparse.Namespace,
) -> Any:
    """Measure all ways at one batch size."""
    settings = {
        name: (lambda how=how: [decoding.greedy(model, ids, flags, **how) for ids in asked])
        for name, how in ways.items()
    }
    seconds, found = decoding.in_turns(settings, flags.repeats)
    executed = {
        name: sum(float(one.past_key_values.executed.sum()) for one in found[name][0])
        for name in ways
    }
    checks = {name: sum(one.past_key_values.num_checks for one in found[name][0]) for name in ways}
    new = flags.new_tokens * sum(len(ids) for ids in asked)
    read = sum(ids.numel() for ids in asked) + new
    return {
        name: {
            "ms per new token": decoding.spread([1000 * one / new for one in seconds[name]]),
            "time saved": decoding.spread(
                [1 - a / b for a, b in zip(seconds[name], seconds[full], strict=True)]
            ),
            "iterations per token": executed[name] / read,
            "iterations saved": 1 - executed[name] / executed[full],
            "checks per token": checks[name] / read,
        }
        for name in ways
    }


if __name__ == "__main__":
    main()
