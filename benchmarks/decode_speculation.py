"""Plain decoding against drafts at a shallower depth that the full depth verifies.

    python benchmarks/decode_speculation.py MODEL --prompts questions.jsonl [--recurrences 8 32]

Every setting continues the same prompts by as many tokens, greedily, batch 1, and all take turns.
The figures are ratios of plain decoding's time to the setting's in the same turn, as a whole and
without what reading the prompt alone takes. Tokens must be the same ones. `1b` has random weights:
its time is of interest, not its acceptance.
"""

import argparse
from typing import Any

import decoding
import torch


def main() -> None:
    """Time drafts."""
    parser = decoding.arguments(__doc__)
    parser.add_argument("--recurrences", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--drafts", nargs="+", default=["1", "2", "4", "auto"])
    flags = parser.parse_args()
    model = decoding.load(flags)
    asked = decoding.prompts(flags, model)
    decoding.record(
        flags, {str(depth): at(model, asked, depth, flags) for depth in flags.recurrences}
    )


def at(model: Any, asked: list[torch.Tensor], depth: int, flags: argparse.Namespace) -> Any:
    """Measure at one depth r."""
    drafts = [draft if draft == "auto" else int(draft) for draft in flags.drafts]
    ways: dict[str, dict[str, Any]] = {"plain": {}} | {
        f"draft {draft}": {"draft_recurrences": draft}
        for draft in drafts
        if draft == "auto" or draft < depth
    }

    def run(how: dict[str, Any]) -> Any:
        return [decoding.greedy(model, ids, flags, num_recurrences=depth, **how) for ids in asked]

    settings = {name: (lambda how=how: run(how)) for name, how in ways.items()}
    once = argparse.Namespace(**{**vars(flags), "new_tokens": 1})
    settings["prompt"] = lambda: [
        decoding.greedy(model, ids, once, num_recurrences=depth) for ids in asked
    ]
    seconds, found = decoding.in_turns(settings, flags.repeats)
    plain = [one.sequences for one in found["plain"][0]]
    report = {}
    for name in ways:
        outputs = found[name][0]
        pairs = zip(plain, outputs, strict=True)
        report[name] = {
            "ms per token": decoding.spread(
                [1000 * one / flags.new_tokens / len(asked) for one in seconds[name]]
            ),
            "speed-up": decoding.spread(
                [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]
            ),
            "speed-up without the prompt": decoding.spread(
                [
                    (a - alone) / (b - alone)
                    for a, b, alone in zip(
                        seconds["plain"], seconds[name], seconds["prompt"], strict=True
                    )
                ]
            ),
            "same tokens": sum(torch.equal(a, b.sequences) for a, b in pairs) / len(asked),
        }
        if name != "plain":
            told = [one.drafting for one in outputs]
            report[name] |= {
                "draft depths": [one.depth for one in told],
                "tokens per verification": sum(one.emitted for one in told)
                / max(1, sum(one.rounds for one in told)),
                "acceptance": [round(one.acceptance, 3) for one in told],
            }
    return report


if __name__ == "__main__":
    main()
