"""How fast a recurrent model reads and writes at each depth on this machine, beside its parent.

Each measurement is a prefill with a fresh cache and then greedy decoding, token by token, in a
plain loop of forward passes: no sampling, no stopping criteria, no copies to the host, so what is
timed is the model and the framework's own launch of its kernels. All settings take turns within
each repeat, every second time backwards, so that a machine that warms up or slows down does so
to all of them. A warm-up round is thrown away.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from rondo.config import BenchConfig
from rondo.errors import UserError
from rondo.evaluation.baselines import facts_of, locate, name_of
from rondo.flops import Costs, costs_of, costs_of_parent
from rondo.generation import check_cap, load_recurrent
from rondo.loading import load_model, parent_directory
from rondo.provenance import (
    claim_directory,
    hardware,
    peak_memory,
    read_json,
    record,
    staged,
    write_json,
)

FORMAT_VERSION = 1
COLUMNS = (
    "batch", "model", "prefill ms/token", "x parent", "of ideal",
    "decode ms/token", "x parent", "of ideal", "first token ms", "KV bytes/token",
)  # fmt: skip
Json = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is timed: a model at a depth, over a batch."""

    name: str
    """recurrent or parent."""
    model: Any
    costs: Costs
    num_recurrences: int
    batch_size: int
    options: Json
    """Arguments of each forward pass that choose depth and initial state."""


@dataclass(frozen=True)
class Timing:
    """One measurement of a setting."""

    prefill_seconds: float
    """From the prompt to the first new token."""
    decode_seconds: float
    """All further new tokens."""
    kv_bytes_per_token: float
    """Keys and values held at the end, over tokens and rows."""
    peak_memory_bytes: int | None
    """The model's weights and what the call added to them; None on a CPU."""


@torch.inference_mode()
def measure(setting: Setting, prompt: torch.Tensor, new_tokens: int) -> Timing:
    """Read a prompt (B, T) and write new tokens, the first of which comes from the prompt."""
    model, before = setting.model, 0
    if prompt.is_cuda:
        torch.cuda.reset_peak_memory_stats(prompt.device)
        before = torch.cuda.memory_allocated(prompt.device)
    _wait(prompt.device)
    start = time.perf_counter()
    cache = DynamicCache(config=model.config)  # what generate() takes where all is of one depth
    output = model(
        prompt, past_key_values=cache, use_cache=True, logits_to_keep=1, **setting.options
    )
    token = output.logits.argmax(dim=-1)
    _wait(prompt.device)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        output = model(token, past_key_values=cache, use_cache=True, **setting.options)
        token = output.logits.argmax(dim=-1)
    _wait(prompt.device)
    end = time.perf_counter()
    peak = None
    if prompt.is_cuda:
        added = torch.cuda.max_memory_allocated(prompt.device) - before
        peak = added + sum(one.nbytes for one in model.parameters())
    layers: Any = cache.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    tokens = prompt.numel() + len(prompt) * (new_tokens - 1)
    return Timing(first - start, end - first, held / tokens, peak)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    settings: Sequence[Setting], prompts: torch.Tensor, config: BenchConfig
) -> list[list[Timing]]:
    """Measure all settings in turn, once to warm up and then `repeats` times.

    Args:
        settings: What to measure.
        prompts: Token ids, as many rows as the largest batch has.
        config: How often, and how many new tokens.

    Raises:
        UserError: A setting does not fit in the device's memory.
    """
    found: list[list[Timing]] = [[] for _ in settings]
    total = (config.repeats + 1) * len(settings)
    with tqdm(total=total, desc="bench", unit="setting", disable=None) as bar:
        for repeat in range(config.repeats + 1):
            order = list(enumerate(settings))
            for number, setting in order if repeat % 2 else reversed(order):
                try:
                    prompt = prompts[: setting.batch_size]
                    timing = measure(setting, prompt, config.new_tokens)
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"{setting.name} at r = {setting.num_recurrences} and batch size "
                        f"{setting.batch_size} does not fit in the device's memory: take smaller "
                        "--batch-sizes, or fewer --prompt-tokens"
                    ) from error
                if repeat:
                    found[number].append(timing)
                bar.update()
    return found


def flops_and_bytes(setting: Setting, config: BenchConfig, bytes_per_value: int) -> Json:
    """Return what a token costs: executed FLOPs in both phases, bytes read in decoding.

    The head runs once per prompt, as in `measure`. A decoding step reads every weight that it
    multiplies with once for all rows, the core's once per iteration, and each row's cache.
    """
    costs, depth, prompt = setting.costs, setting.num_recurrences, config.prompt_tokens
    spared = 2 * costs.head_matmul * (prompt - 1)
    lengths = range(prompt + 1, prompt + config.new_tokens)
    attended = statistics.mean(lengths)
    kv_bytes = costs.kv_bytes(depth, bytes_per_value)
    # Over no tokens, what is left of the FLOPs is two per weight.
    weights = costs.forward_flops(depth, 0) // 2 * bytes_per_value
    return {
        "prefill_flops_per_token": costs.forward_flops(depth, prompt) - spared / prompt,
        "decode_flops_per_token": statistics.mean(
            costs.forward_flops(depth, length) for length in lengths
        ),
        "decode_bytes_per_token": weights / setting.batch_size + kv_bytes * attended,
        "kv_bytes_per_token_counted": kv_bytes,
    }


def summary(
    setting: Setting, timings: Sequence[Timing], config: BenchConfig, bytes_per_value: int
) -> Json:
    """Return a row of bench.json, without its ratios."""
    cost = flops_and_bytes(setting, config, bytes_per_value)
    rows, steps = setting.batch_size, config.new_tokens - 1
    peaks = [one.peak_memory_bytes for one in timings if one.peak_memory_bytes is not None]
    return {
        "model": setting.name,
        "num_recurrences": setting.num_recurrences,
        "batch_size": rows,
        "first_token_ms": _spread([1e3 * one.prefill_seconds for one in timings]),
        "prefill": _phase([one.prefill_seconds for one in timings], rows * config.prompt_tokens)
        | {"flops_per_token": cost["prefill_flops_per_token"], "bytes_per_token": None},
        "decode": {"ms_per_step": _spread([1e3 * one.decode_seconds / steps for one in timings])}
        | _phase([one.decode_seconds for one in timings], rows * steps)
        | {
            "flops_per_token": cost["decode_flops_per_token"],
            "bytes_per_token": cost["decode_bytes_per_token"],
        },
        "kv_bytes_per_token": timings[0].kv_bytes_per_token,
        "kv_bytes_per_token_counted": cost["kv_bytes_per_token_counted"],
        "peak_memory_bytes": max(peaks) if peaks else None,
    }


def _phase(seconds: Sequence[float], tokens: int) -> Json:
    milliseconds = _spread([1e3 * one / tokens for one in seconds])
    return {"ms_per_token": milliseconds, "tokens_per_s": 1e3 / milliseconds["median"]}


def _spread(values: Sequence[float]) -> Json:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(own: Json, parent: Json) -> Json:
    """Compare a phase with the parent's at the same batch size, medians both.

    Returns:
        time: The time of a token over the parent's. flops and bytes: the same of what a token
        costs. of_ideal: flops / time; 1 is a time in proportion to the FLOPs, and more is faster
        than that. of_ideal_bytes: the same for bytes, which bound the decoding of small batches.
    """
    time_ratio = own["ms_per_token"]["median"] / parent["ms_per_token"]["median"]
    flops = own["flops_per_token"] / parent["flops_per_token"]
    size = own["bytes_per_token"] and own["bytes_per_token"] / parent["bytes_per_token"]
    return {
        "time": time_ratio,
        "flops": flops,
        "of_ideal": flops / time_ratio,
        "bytes": size,
        "of_ideal_bytes": size and size / time_ratio,
    }


def with_ratios(rows: Sequence[Json]) -> list[Json]:
    """Set each row beside the parent's of its batch size; null where there is none."""
    parents = {row["batch_size"]: row for row in rows if row["model"] == "parent"}

    def compared(row: Json, phase: str) -> Json:
        parent = parents.get(row["batch_size"])
        return row[phase] | {"to_parent": parent and ratios(row[phase], parent[phase])}

    return [
        row | {"prefill": compared(row, "prefill"), "decode": compared(row, "decode")}
        for row in rows
    ]


def load_parent(config: BenchConfig, directory: Path, model: Any) -> tuple[Any, str]:
    """Return the parent in the model's type and place, or None and a sentence that says why not.

    Raises:
        UserError: The parent that `--parent` names cannot be used.
    """
    if config.parent == "none":
        return None, "the parent is left out, as --parent none asks"
    if config.parent:
        return _load(locate(config.parent), model), ""
    facts = facts_of(directory)
    if "parent" not in facts:
        return None, f"the parent is left out: {directory} names none in a run.json"
    try:
        return _load(parent_directory(facts["parent"]), model), ""
    except UserError as error:
        return None, f"the parent is left out, say where it is with --parent: {error}"


def _load(directory: Path, model: Any) -> Any:
    if read_json(directory / "config.json").get("model_type") == "rondo":
        raise UserError(f"{directory} is a recurrent checkpoint, not the parent of one")
    parent = load_model(AutoModelForCausalLM, directory, model.dtype)
    return parent.to(model.device).eval()


def check(config: BenchConfig, model: Any) -> None:
    """Refuse depths and lengths that the model was not made for.

    Raises:
        UserError: One of them is beyond what its config.json says.
    """
    check_cap(max(config.recurrences), model.config.max_recurrences, config.model)
    context = model.config.max_position_embeddings
    if config.prompt_tokens + config.new_tokens > context:
        raise UserError(
            f"--prompt-tokens {config.prompt_tokens} and --new-tokens {config.new_tokens} are "
            f"together beyond the model's context of {context} tokens"
        )


def benchmark(config: BenchConfig, directory: Path) -> Json:
    """Measure a model and its parent and return what goes into bench.json.

    Raises:
        UserError: The model cannot be loaded, or a setting is not for it.
    """
    model = load_recurrent(str(directory), config.dtype, config.device)
    check(config, model)
    parent, missing = load_parent(config, directory, model)
    if missing:
        print(missing, file=sys.stderr)
    sizes = sorted(set(config.batch_sizes))
    counted = costs_of(model)
    settings = [
        Setting(
            "recurrent", model, counted, depth, size,
            {"num_recurrences": depth, "state_seed": config.seed},
        )
        for size in sizes
        for depth in sorted(set(config.recurrences))
    ]  # fmt: skip
    vocab_size = model.config.vocab_size
    if parent is not None:
        own = costs_of_parent(parent)
        settings = [*(Setting("parent", parent, own, 1, size, {}) for size in sizes), *settings]
        vocab_size = min(vocab_size, parent.config.vocab_size)
    stream = torch.Generator().manual_seed(config.seed)
    shape = (sizes[-1], config.prompt_tokens)
    prompts = torch.randint(vocab_size, shape, generator=stream).to(model.device)
    timings = take_turns(settings, prompts, config)
    bytes_per_value = torch.empty(0, dtype=model.dtype).element_size()
    rows = [
        summary(setting, measured, config, bytes_per_value)
        for setting, measured in zip(settings, timings, strict=True)
    ]
    run = record(config)
    return {
        "format_version": FORMAT_VERSION,
        "kind": "bench",
        "model": {"path": str(directory), "parameters": counted.total_parameters},
        "parent": None
        if parent is None
        else {"path": parent.name_or_path, "parameters": settings[0].costs.total_parameters},
        "note": missing or None,
        "conditions": {
            "command": run["command"],
            "date": run["date"],
            "device": hardware(model.device.type),
            "dtype": str(model.dtype).removeprefix("torch."),
            "prompt_tokens": config.prompt_tokens,
            "new_tokens": config.new_tokens,
            "repeats": config.repeats,
            "seed": config.seed,
            "peak_memory_bytes": peak_memory(torch.device("cpu")),
            "versions": run["versions"],
            "git": run["git"],
        },
        "rows": with_ratios(rows),
    }


def table(rows: Sequence[Json], with_ranges: bool) -> list[list[str]]:
    """Return the cells of a table of bench.json's rows, under COLUMNS."""

    def time(spread: Json) -> str:
        median, low, high = (f"{spread[key]:.4g}" for key in ("median", "min", "max"))
        return f"{median} ({low} to {high})" if with_ranges else median

    def phase(measured: Json) -> list[str]:
        beside = measured["to_parent"]
        compared = [f"{beside[key]:.2f}" for key in ("time", "of_ideal")] if beside else ["-", "-"]
        return [time(measured["ms_per_token"]), *compared]

    return [
        [
            str(row["batch_size"]),
            "parent" if row["model"] == "parent" else f"r = {row['num_recurrences']}",
            *phase(row["prefill"]),
            *phase(row["decode"]),
            time(row["first_token_ms"]),
            f"{row['kv_bytes_per_token']:,.0f}",
        ]
        for row in sorted(rows, key=lambda row: row["batch_size"])
    ]


def headline(results: Json) -> str:
    """Return one line that says what was measured, where and how."""
    at, models = results["conditions"], [results["model"], results["parent"]]
    names = " beside ".join(model["path"] for model in models if model)
    return (
        f"{names}: {at['prompt_tokens']} tokens read and {at['new_tokens']} written, "
        f"{at['dtype']} on {at['device']}, medians of {at['repeats']}"
    )


def markdown(results: Json) -> str:
    """Return bench.md: the table with ranges, and what its columns mean."""
    lines = [COLUMNS, ["---:"] * len(COLUMNS), *table(results["rows"], with_ranges=True)]
    cells = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = f"In this run {results['note']}.\n\n" if results["note"] else ""
    return f"""# Speed by depth

{headline(results)} (smallest to largest).

{cells}

{note}A token's time is that of the batch over its tokens. x parent is that time over the
parent's at the same batch size; of ideal is the FLOPs over the parent's, divided by that: 1 is a
time in proportion to the FLOPs, more is faster. Decoding a small batch waits for memory rather than
for FLOPs; `bench.json` has bytes too.

    {results["conditions"]["command"]}
"""


def run(config: BenchConfig) -> None:
    """Run `rondo bench`.

    Raises:
        UserError: The model cannot be loaded, a setting is not for it, or the output exists.
    """
    directory = locate(config.model)
    output_dir = config.output_dir or f"out/bench-{name_of(config.model)}"
    claim_directory(output_dir, config.overwrite, spare=str(directory))
    results = benchmark(config, directory)
    with staged(output_dir) as partial:
        write_json(partial / "bench.json", results)
        (partial / "bench.md").write_text(markdown(results), encoding="utf-8")
        write_json(partial / "run.json", record(config, kind="bench"))
    if config.json_output:
        print(json.dumps(results, indent=1))
        return
    lines = [list(COLUMNS), *table(results["rows"], with_ranges=False)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    print(headline(results))
    for cells in lines:
        columns = zip(cells, widths, strict=True)
        print("  " + "  ".join(cell.rjust(width) for cell, width in columns))
    print(f"wrote {output_dir}/bench.json and bench.md")
