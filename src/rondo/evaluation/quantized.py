"""`rondo quantize`: what int8 weights cost in loss at every depth, and what they spare.

The model is held twice, as it is and rounded, so that timings can take turns. The loss is compared
document by document, since a small difference shows only where both read the same.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from rondo.config import BenchConfig, EvalConfig
from rondo.config.quantize import QuantizeConfig
from rondo.errors import UserError
from rondo.evaluation.baselines import locate
from rondo.evaluation.benchmark import Setting, take_turns
from rondo.evaluation.comparisons import paired_bootstrap
from rondo.evaluation.outcome import Json, finite
from rondo.evaluation.subject import Passage, Subject, load_subject
from rondo.evaluation.tasks import TextTask
from rondo.evaluation.texts import read_text
from rondo.provenance import choose_device, choose_dtype, hardware, record
from rondo.quantization import quantize

Array = NDArray[np.float64]


@torch.inference_mode()
def losses(subject: Subject, passages: Sequence[Passage], size: int, seed: int, name: str) -> Array:
    """Return the summed loss (nats) of each passage at each depth, by depth and passage."""
    # Passages of like length share a batch, the longest first: what memory lacks shows at once.
    order = sorted(range(len(passages)), key=lambda index: -len(passages[index].ids))
    found = np.empty((len(subject.recurrences), len(passages)))
    for start in tqdm(range(0, len(order), size), name, unit="batch", leave=False, disable=None):
        batch = order[start : start + size]
        predictions = subject.predict([passages[index] for index in batch], seed)
        for index, by_depth in zip(batch, predictions, strict=True):
            found[:, index] = [-one.logprob for one in by_depth]
    return found


def compared(before: Array, after: Array, weights: Sequence[int]) -> list[Json]:
    """Return per depth the loss of both, in nats per token, and by how much it rose.

    Args:
        before: Summed losses, by depth and document.
        after: The same, with quantized weights.
        weights: Predicted tokens of each document.
    """
    rows = []
    for first, second in zip(before, after, strict=True):
        gap = paired_bootstrap(second, first, weights)
        rows.append(
            {
                "before": finite(first.sum() / sum(weights)),
                "after": finite(second.sum() / sum(weights)),
                "difference": finite(gap.value),
                "low": finite(gap.low),
                "high": finite(gap.high),
            }
        )
    return rows


def timed(before: Subject, after: Subject, config: QuantizeConfig) -> list[Json]:
    """Return per depth the milliseconds that a token takes to decode, before and after.

    Raises:
        UserError: It does not fit in the device's memory.
    """
    settings = [
        Setting(
            name, subject.model, before.costs, depth, 1,
            {"num_recurrences": depth, "state_seed": config.seed},
        )
        for depth in before.recurrences
        for name, subject in (("before", before), ("after", after))
    ]  # fmt: skip
    stream = torch.Generator().manual_seed(config.seed)
    vocab_size = before.model.config.vocab_size
    prompt = torch.randint(vocab_size, (1, config.prompt_tokens), generator=stream)
    how = BenchConfig(
        model=config.model,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        repeats=config.repeats,
    )
    found = []
    for timings in take_turns(settings, prompt.to(before.device), how):
        each = [1e3 * one.decode_seconds / (config.new_tokens - 1) for one in timings]
        found.append({"median": statistics.median(each), "min": min(each), "max": max(each)})
    return [{"before": found[i], "after": found[i + 1]} for i in range(0, len(found), 2)]


def measure(config: QuantizeConfig) -> Json:
    """Measure a model as it is and quantized.

    Raises:
        UserError: torchao is missing, the model or the text cannot be read, a depth is beyond the
            model's cap, or the memory is too small.
    """
    directory, device = locate(config.model), choose_device(config.device)
    # Once for both: on a machine that is as fast in either type the choice may differ.
    dtype: Any = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    settings = EvalConfig(
        model=config.model,
        recurrences=config.recurrences,
        limit=config.limit,
        seq_len=config.seq_len,
        dtype=dtype,
    )
    after = load_subject(directory, settings, device)
    if not after.recurrent:
        raise UserError(f"{config.model} is not a recurrent model: convert it first")
    footprint = quantize(after.model, config.weights)
    before = load_subject(directory, settings, device)
    text = read_text(TextTask("loss", config.data), before, settings)
    passages, size, seed = text.passages, config.batch_size, config.seed
    compare = compared(
        losses(before, passages, size, seed, "as it is"),
        losses(after, passages, size, seed, config.weights),
        [len(one.ids) - one.start for one in passages],
    )
    times = timed(before, after, config) if config.repeats else [None] * len(compare)
    run = record(config)
    return {
        "kind": "quantize",
        "model": str(directory),
        "weights": config.weights,
        "matrices": len(footprint.names),
        "bytes": {"before": footprint.before, "after": footprint.after},
        "text": text.described,
        "conditions": {key: run[key] for key in ("command", "date", "versions", "git")}
        | {"device": hardware(device.type), "dtype": dtype},
        "rows": [
            {"num_recurrences": depth, "loss": loss, "decode_ms_per_token": time}
            for depth, loss, time in zip(before.recurrences, compare, times, strict=True)
        ],
    }


def table(results: Json) -> list[list[str]]:
    """Return the rows of a table of results, its header first."""
    kind = results["weights"]
    lines = [["r", "loss", kind, "change", "95% interval", "ms/token", f"{kind} ms/token"]]
    for row in results["rows"]:
        loss, time = row["loss"], row["decode_ms_per_token"]
        bounded = loss["low"] is not None and loss["high"] is not None
        lines.append(
            [
                str(row["num_recurrences"]),
                *("-" if loss[key] is None else f"{loss[key]:.4f}" for key in ("before", "after")),
                "-" if loss["difference"] is None else f"{loss['difference']:+.5f}",
                f"{loss['low']:+.5f} to {loss['high']:+.5f}" if bounded else "-",
                *(f"{time[key]['median']:.2f}" if time else "-" for key in ("before", "after")),
            ]
        )
    return lines


def run(config: QuantizeConfig) -> None:
    """Run `rondo quantize`.

    Raises:
        UserError: Something is missing, cannot be read, or does not fit.
    """
    try:
        results = measure(config)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device's memory is too small for the model and its quantized copy: give a smaller "
            "--batch-size, or --device cpu"
        ) from error
    if config.json_output:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return
    size, at, text = results["bytes"], results["conditions"], results["text"]
    lines = table(results)
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    print(
        f"{results['model']}: {results['matrices']} matrices in {results['weights']}, "
        f"{size['before'] / 1e6:.1f} MB of weights become {size['after'] / 1e6:.1f} MB"
    )
    print(
        f"{at['dtype']} on {at['device']}; {text['items']} documents and {text['tokens']} tokens "
        f"of {text['source']}, in nats per token; decoding one row, medians of {config.repeats}"
    )
    for cells in lines:
        columns = zip(cells, widths, strict=True)
        print("  " + "  ".join(cell.rjust(width) for cell, width in columns))
    print("no checkpoint is written: int8 is applied where a model is loaded", file=sys.stderr)
