"""What a sweep over depths costs, against one pass at its deepest and against separate passes.

    python benchmarks/eval_sweep.py RECURRENT_DIRECTORY [--tokens 256] [--output FILE.json]
    python benchmarks/eval_sweep.py --shape 4,8,4 --width 2048     (random weights, TinyLlama's)

Both are timed in turn in each repetition, so that a slow moment of the machine meets them alike;
figures are medians of the repetitions with their range. `texts` predicts every token, `options` the
last eight of each sequence, as the likelihood of an answer does. `by FLOPs` is the ratio that the
products of matrices alone would give: 1 + 5 (coda + head) / (prelude + 32 core + coda + head).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from rondo.config import EvalConfig
from rondo.evaluation.subject import GRID, Passage, Subject, load_subject
from rondo.flops import costs_of
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.provenance import record

OPTION_TOKENS = 8


def random_model(shape: str, width: int) -> RecurrentForCausalLM:
    """Return a recurrent Llama of TinyLlama's proportions."""
    prelude, core, coda = (int(count) for count in shape.split(","))
    base = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=prelude + core + coda,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 512),
        vocab_size=32_000,
        tie_word_embeddings=False,
    )
    config = RecurrentConfig(
        base_config=base,
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        source_layers=list(range(prelude + core + coda)),
    )
    return RecurrentForCausalLM(config)


def subject_of(arguments: argparse.Namespace) -> Subject:
    """Return what is measured, able to run to r = 32."""
    device = torch.device(arguments.device)
    if arguments.model:
        config = EvalConfig(model=arguments.model, dtype=arguments.dtype)
        return load_subject(Path(arguments.model), config, device)
    model = random_model(arguments.shape, arguments.width).to(device).eval()
    # Sequences are random, and no tokenizer is asked.
    return Subject(model, None, GRID, Path("random"))


@torch.inference_mode()
def seconds(subject: Subject, passages: list[Passage], recurrences: tuple[int, ...]) -> float:
    """Return the time of one pass over a batch."""
    subject.recurrences = recurrences
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    subject.predict(passages)
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_flops(subject: Subject, share: float) -> float:
    """Return the ratio that matrix products alone would give, a share of tokens being predicted."""
    costs = costs_of(subject.model)
    branch = costs.coda_matmul + share * costs.head_matmul
    alone = costs.prelude_matmul + GRID[-1] * (costs.core_matmul + costs.injection_matmul) + branch
    return 1 + (len(GRID) - 1) * branch / alone


def main() -> None:
    """Time the sweep and print, or write, what it cost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", default="4,8,4")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    subject = subject_of(arguments)
    generator = torch.Generator().manual_seed(0)
    vocabulary = subject.model.config.vocab_size
    size = (arguments.batch_size, arguments.tokens + 1)
    rows = torch.randint(vocabulary, size, generator=generator).tolist()
    found: dict[str, Any] = {}
    for name, start in (("texts", 1), ("options", arguments.tokens + 1 - OPTION_TOKENS)):
        passages = [Passage(row, start) for row in rows]
        ratios, separate = [], []
        for repetition in range(arguments.repetitions + 1):
            deepest = seconds(subject, passages, GRID[-1:])
            sweep = seconds(subject, passages, GRID)
            if repetition == 0:
                continue  # the first warms up
            ratios.append(sweep / deepest)
            alone = sum(seconds(subject, passages, (depth,)) for depth in GRID[:-1]) + deepest
            separate.append(sweep / alone)
        share = (arguments.tokens + 1 - start) / arguments.tokens
        found[name] = {
            "sweep over the pass at 32": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "by FLOPs": by_flops(subject, share),
            "sweep over separate passes": statistics.median(separate),
        }
        print(name, json.dumps(found[name]))
    if arguments.output:
        run = record(EvalConfig(model=arguments.model or "random"))
        facts = {
            "arguments": vars(arguments),
            "versions": run["versions"],
            "hardware": run["hardware"],
        }
        Path(arguments.output).write_text(json.dumps({**facts, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
