"""What each cache policy holds, how fast it decodes, and what it does to the loss.

    python benchmarks/decode_cache.py MODEL --prompts texts.jsonl [--recurrences 32]

Texts are read token by token after a first half that is read at once, as in generation, so that
the loss is that of decoding. Bytes are those of the entries in use and of the tables that find
them, per token, against the parent's cache in the same precision. All policies take turns.
"""

import argparse
from typing import Any

import decoding
import torch

from rondo.flops import costs_of
from rondo.modeling.cache_recurrent import CACHE_POLICIES, RecurrentCache
from rondo.modeling.exits_recurrent import ExitRule


def main() -> None:
    """Measure the policies."""
    parser = decoding.arguments(__doc__)
    parser.add_argument("--recurrences", type=int, default=32)
    parser.add_argument("--exit", default="state_distance")
    parser.add_argument("--threshold", type=float, default=0.05)
    parser.add_argument(
        "--length", type=int, default=96, help="tokens of a text, half of them read at once"
    )
    parser.add_argument("--warm-start", action="store_true", help="measure warm starts too")
    flags = parser.parse_args()
    model = decoding.load(flags)
    texts = [ids[:, : flags.length] for ids in decoding.prompts(flags, model)]
    rule = ExitRule(flags.exit, flags.threshold)
    ways: dict[str, dict[str, Any]] = {policy: {"policy": policy} for policy in CACHE_POLICIES}
    ways |= {
        f"{policy}, {flags.exit} < {flags.threshold}": {"policy": policy, "exit": rule}
        for policy in ("full", "ragged", "recompute")
    }
    if flags.warm_start:
        ways["full, warm start"] = {"policy": "full", "warm_start": True}
    settings = {
        name: (lambda how=how: [read(model, ids, flags, **how) for ids in texts])
        for name, how in ways.items()
    }
    seconds, found = decoding.in_turns(settings, flags.repeats)
    bytes_per_value = next(model.parameters()).element_size()
    parent = costs_of(model).kv_bytes(1, bytes_per_value)
    tokens = sum(ids.shape[1] // 2 for ids in texts)
    report = {}
    for name in ways:
        runs = found[name][0]
        held = sum(one["bytes"] for one in runs) / sum(ids.shape[1] - 1 for ids in texts)
        report[name] = {
            "loss": sum(one["loss"] for one in runs) / tokens,
            "bytes per token": held,
            "times the parent's": held / parent,
            "iterations per token": sum(one["iterations"] for one in runs) / len(runs),
            "seconds over full": decoding.spread(
                [a / b for a, b in zip(seconds[name], seconds["full"], strict=True)]
            ),
        }
    decoding.record(flags, report)


@torch.no_grad()
def read(
    model: Any, ids: torch.Tensor, flags: argparse.Namespace, policy: str, **how: Any
) -> dict[str, float]:
    """Read half of a text (1, T) at once and the rest token by token; return loss and cost."""
    cache, half = RecurrentCache(model.config, policy), ids.shape[1] - ids.shape[1] // 2
    how = {"past_key_values": cache, "use_cache": True, "num_recurrences": flags.recurrences, **how}
    logits = [model(ids[:, :half], logits_to_keep=1, **how).logits]
    logits += [model(ids[:, at, None], **how).logits for at in range(half, ids.shape[1] - 1)]
    loss = torch.nn.functional.cross_entropy(
        torch.cat(logits, 1)[0].float(), ids[0, half:], reduction="sum"
    )
    return {
        "loss": float(loss),
        "bytes": float(cache.nbytes),
        "iterations": float(cache.executed.float().mean()),
    }


if __name__ == "__main__":
    main()
