"""The paper's own tables through our report: published accuracies, our FLOPs, fits and verdicts.

    python benchmarks/paper_tables.py REFERENCE_NUMBERS.json OUTPUT_DIR

REFERENCE_NUMBERS.json holds the plot data published with arXiv:2511.07384: accuracies with their
standard errors by model and test depth, scores of checkpoints, and training FLOPs. Of each of its
three base models a directory with a results.json is written, for `rondo report` to read, and the
tables of the README are printed. Every training FLOPs of the file is recomputed, and must agree.
"""

import argparse
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config

from rondo import verdict
from rondo.config import Schedule
from rondo.convert.split import drop_split
from rondo.evaluation.comparisons import Finding
from rondo.evaluation.controls import equal_flops_checkpoint
from rondo.evaluation.measures import depth_measures
from rondo.flops import Costs, costs_of, costs_of_parent
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.provenance import write_json
from rondo.training.recurrence import scheduled_mean

Json = dict[str, Any]

TOKENS_PER_STEP = 2**20
SEQ_LEN = 1024
BYTES_PER_VALUE = 4  # of float32, which the paper evaluated in
DEPTHS = (1, 2, 4, 8, 16, 32)
# The first is what a report is about: tested both shallower and deeper than it was trained.
MEANS = (8, 4, 16, 32)
# By the paper's name: ours, metric and items. One solved example stands before each question.
TASKS = {
    "gsm8k_cot_sean": ("gsm8k", "exact_match", 1_319),
    "minerva_math": ("minerva_math", "math_verify", 5_000),
}


@dataclass(frozen=True, slots=True)
class Base:
    """A base model of the paper, by its names there."""

    key: str
    file: str
    sizes: tuple[int, int, int]
    static: str


BASES = {
    "tinyllama-1.1b": Base(
        "TinyLlama-1.1B-intermediate-step-1431k-3T",
        "tinyllama_ablate_rec_long",
        (4, 8, 4),
        "TinyLlama-1.1b-3T Static Depth",
    ),
    "llama-3.2-1b": Base(
        "Llama-3.2-1B",
        "tinyllama_gsm8k_llama_long_4_rec",
        (4, 6, 4),
        "Llama-3.2-1b Static Depth",
    ),
    "olmo-2-1b": Base(
        "OLMo-2-0425-1B", "olmo_50k_steps", (4, 6, 4), "Olmo-2-step1907359 Static Depth"
    ),
}
BY_FILE = {
    "tinyllama_gsm8k_llama_long_4_rec": "llama-3.2-1b",
    "tinyllama_long_run_table": "llama-3.2-1b",
    "olmo_50k_steps": "olmo-2-1b",
}


@dataclass(frozen=True, slots=True)
class Curriculum:
    """How the mean recurrence of a run grew."""

    schedule: Schedule
    fraction: float
    total_steps: int


MATH = Curriculum("1-sqrt", 0.75, 50_000)
# Its runs follow this curriculum only nearly, and how they differ was not published.
UNSURE = "loop_whole_model"
# What the names of models do not tell.
BY_DEFAULT = {
    "extend_prelude_coda": Curriculum("linear", 0.25, 50_000),
    "tinyllama_nemotron_fineweb_2": Curriculum("linear", 0.25, 25_000),
    UNSURE: Curriculum("linear", 0.25, 25_000),
    "tinyllama_long_run_table": Curriculum("none", 0.0, 28_000),
}


@functools.cache
def costs(name: str, sizes: tuple[int, int, int] | None = None) -> Costs:
    """Count a base model, or what it becomes when cut as the paper did; no weight is made."""
    with torch.device("meta"):
        if sizes is None:
            return costs_of_parent(AutoModelForCausalLM.from_config(base_config(name)))
        split = drop_split(base_config(name).num_hidden_layers, sizes)
        layers = [*split.prelude, *split.core, *split.coda]
        prelude, core, coda = sizes
        config = RecurrentConfig(
            base_config=base_config(name, len(layers)),
            num_prelude_layers=prelude,
            num_core_layers=core,
            num_coda_layers=coda,
            source_layers=layers,
            injection="linear",
            state_init="normal",
        )
        return costs_of(RecurrentForCausalLM(config))


def base_config(name: str, num_layers: int | None = None) -> LlamaConfig | Olmo2Config:
    """Return the shape of a base model, as its makers published it."""
    layers, kv_heads, heads, intermediate, vocab, tied = {
        "tinyllama-1.1b": (22, 4, 32, 5_632, 32_000, False),
        "llama-3.2-1b": (16, 8, 32, 8_192, 128_256, True),
        "olmo-2-1b": (16, 16, 16, 8_192, 100_352, False),
    }[name]
    family = Olmo2Config if name.startswith("olmo") else LlamaConfig
    return family(
        hidden_size=2_048,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


@functools.cache
def spent(
    name: str, sizes: tuple[int, int, int], mean: int, curriculum: Curriculum
) -> tuple[int, ...]:
    """Training FLOPs in the paper's account after each step, from step 0 on.

    The paper counts a step at the mean that holds once it is done.
    """
    per_token = [costs(name, sizes).paper_train_flops(m) for m in range(mean + 1)]
    means = (
        scheduled_mean(step, curriculum.total_steps, mean, curriculum.schedule, curriculum.fraction)
        for step in range(1, curriculum.total_steps + 1)
    )
    steps = (TOKENS_PER_STEP * per_token[m] for m in means)
    return tuple(itertools.accumulate(steps, initial=0))


def spent_without_loop(name: str, steps: int) -> int:
    """Training FLOPs of a base model; the paper counts the final norm here, and only here."""
    parent = costs(name)
    return TOKENS_PER_STEP * steps * (parent.paper_train_flops(1) + 6 * parent.norm_parameters)


def curriculum_of(file: str, model: str) -> Curriculum:
    """Read a run's curriculum off its name."""
    if found := re.search(r"(\d+)%? (?:1-)?(sqrt|linear)", model):
        schedule: Schedule = "1-sqrt" if found[2] == "sqrt" else "linear"
        return Curriculum(schedule, int(found[1]) / 100, 50_000)
    return BY_DEFAULT[file]


def published_flops(numbers: Json) -> Iterator[tuple[str, float, float]]:
    """Yield every training FLOPs of the file, and ours, after the name of what it is from."""
    rows = [
        (file, model, facts["train_rec"], row["chkpt"], row["FLOPs"])
        for file, models in numbers["results"].items()
        for model, facts in models.items()
        for by_depth in facts["final"].values()
        for row in by_depth.values()
    ]
    names = ("file", "model", "train_rec", "chkpt", "FLOPs")
    rows += [tuple(row[key] for key in names) for row in numbers["flops"]["golden_rows"]]
    for file, model, mean, step, theirs in rows:
        name = BY_FILE.get(file, "tinyllama-1.1b")
        sizes = re.match(r"(\d+),(\d+),(\d+)", model)
        if step == 0:
            continue
        if sizes or file == "tinyllama_long_run_table":
            prelude, core, coda = map(int, sizes.groups()) if sizes else (2, 4, 2)
            run = spent(name, (prelude, core, coda), mean, curriculum_of(file, model))
            yield file, theirs, run[step]
        else:
            yield file, theirs, spent_without_loop(name, step)
    for name, base in BASES.items():
        totals = numbers["flops"]["totals_at_50000_steps"]
        key = next(key for key in totals if key.lower().startswith(name.split("-1")[0]))
        for mean, by_curriculum in totals[key].items():
            if mean == "static":
                yield "totals", by_curriculum, spent_without_loop(name, 50_000)
                continue
            for text, theirs in by_curriculum.items():
                schedule, _, percent = text.partition("_")
                fraction = int(percent.removesuffix("%") or 0) / 100
                plan = Curriculum(schedule, fraction, 50_000)
                run = spent(name, base.sizes, int(mean.removeprefix("mean")), plan)
                yield "totals", theirs, run[-1]


def results_of(name: str, models: Json) -> list[Json]:
    """Return the results of one base model: looped at each mean, its static twin, the original."""
    base = BASES[name]
    prefix = ",".join(map(str, base.sizes))
    found = [
        result(name, "recurrent", models[f"{prefix} 75 sqrt (Train Recurrence={mean})"], mean)
        for mean in MEANS
    ]
    found.append(result(name, "static", models[base.static]))
    found += [result(name, "parent", models[key]) for key in ("tinyllama-hf",) if key in models]
    return found


def result(name: str, role: str, facts: Json, mean: int | None = None) -> Json:
    """Return one model's results in the format of `rondo eval`; of its answers nothing is known."""
    base = BASES[name]
    count = costs(name, base.sizes if mean else None)
    layers = drop_split(base_config(name).num_hidden_layers, base.sizes)
    steps = facts["final"]["gsm8k_cot_sean"]["1"]["chkpt"]
    model = {
        "path": f"{base.file}.jsonl",
        "label": f"trained at r = {mean}" if mean else f"{role} twin" if steps else "original",
        "role": role,
        "stage": "after" if steps else "before",
        "parent": base.key,
        "parameters": count.total_parameters,
        "split": {part: list(getattr(layers, part)) for part in ("prelude", "core", "coda")}
        if mean
        else None,
        "injection": "linear" if mean else None,
        "state_init": "normal" if mean else None,
        "max_recurrences": DEPTHS[-1] if mean else None,
        "trained_recurrence": float(mean) if mean else None,
        "training": training(name, mean, steps) if steps else None,
        "curve": [],
        "checkpoints": checkpoints(name, facts, mean),
        "history": [],
    }
    return {
        "model": model,
        "conditions": CONDITIONS,
        "tasks": {TASKS[task][0]: described(task, base.file) for task in TASKS},
        "rows": [row for task in TASKS for row in rows_of(task, facts["final"][task], count)],
        "items": {},
        "states": None,
    }


CONDITIONS = {
    "command": "python benchmarks/paper_tables.py REFERENCE_NUMBERS.json OUTPUT_DIR",
    "date": "2025-11 (published)",
    "device": "as published",
    "dtype": "float32",
    "seq_len": SEQ_LEN,
    "batch_size": 32,
    "limit": None,
    "num_processes": None,
    "seeds": [],
    "peak_memory_bytes": None,
    "versions": {"lm-eval": "0.4.11 or later"},
    "git": None,
}


def training(name: str, mean: int | None, steps: int) -> Json:
    """Return how a model was trained; executed FLOPs and seconds were not published."""
    run = spent(name, BASES[name].sizes, mean, MATH)[steps] if mean else None
    return {
        "mode": "recurrent" if mean else "static",
        "tokens": steps * TOKENS_PER_STEP,
        "steps": steps,
        "flops": None,
        "flops_paper": float(run or spent_without_loop(name, steps)),
        "seconds": None,
        "loss": "last",
        "recurrence": f"poisson-lognormal {mean}, 1-sqrt over 75%" if mean else "none",
        "optimizer": "muon",
        "lr": 1e-3,
        "seed": None,
        "data": "Nemotron-CC-Math-v1 4plus",
    }


def described(task: str, file: str) -> Json:
    """Return what a task is."""
    _, metric, items = TASKS[task]
    return {
        "kind": "generation",
        "metric": metric,
        "higher_is_better": True,
        "chance": 0.0,
        "source": f"arXiv:2511.07384, published plot data, {file}.jsonl, {task}",
        "sha256": None,
        "items": items,
        "num_fewshot": 1,
        "suite": "lm-eval",
    }


def rows_of(task: str, by_depth: Json, count: Costs) -> Iterator[Json]:
    """Yield a row per test depth: the published value beside our costs."""
    for text, row in by_depth.items():
        yield {
            "task": TASKS[task][0],
            "metric": TASKS[task][1],
            "num_recurrences": int(text),
            "value": row["acc"],
            "stderr": row["stderr"],
            "seed_values": [row["acc"]],
            "flops_per_token": count.forward_flops(int(text), SEQ_LEN),
            "kv_bytes_per_token": count.kv_bytes(int(text), BYTES_PER_VALUE),
            "ms_per_token": None,
            "seconds": None,
            "tokens_per_item": None,
            "samples": 1,
        }


def checkpoints(name: str, facts: Json, mean: int | None) -> list[Json]:
    """Return the scores of the checkpoints that were published, the last of them the final one."""
    scores: dict[int, Json] = {}
    for task, (ours, _, _) in TASKS.items():
        for depth, by_step in facts["curve_every_5k"].get(task, {}).items():
            last = facts["final"][task][depth]
            for step, value in {**by_step, str(last["chkpt"]): last["acc"]}.items():
                if int(step):
                    scores.setdefault(int(step), {}).setdefault(ours, {})[depth] = value
    run = spent(name, BASES[name].sizes, mean, MATH) if mean else None
    return [
        {
            "step": step,
            "flops": float(run[step] if run else spent_without_loop(name, step)),
            "scores": scores[step],
        }
        for step in sorted(scores)
    ]


def accuracy_table(name: str, results: Sequence[Json]) -> Iterator[list[str]]:
    """Yield the lines of accuracies (%) by model and test depth."""
    order = {"parent": 0, "static": 1}
    for one in sorted(results, key=lambda r: (order.get(r["model"]["role"], 2), *_trained(r))):
        cells = {(row["task"], row["num_recurrences"]): row["value"] for row in one["rows"]}
        yield [
            name,
            one["model"]["label"],
            *(
                f"{100 * cells[task, r]:.1f}" if (task, r) in cells else ""
                for task, _, _ in TASKS.values()
                for r in DEPTHS
            ),
        ]


def equal_flops_table(name: str, results: Sequence[Json]) -> Iterator[list[str]]:
    """Yield each looped model's latest checkpoint of at most the static twin's training FLOPs."""
    static = next(one["model"] for one in results if one["model"]["role"] == "static")
    budget = static["checkpoints"][-1]["flops"]
    for one in sorted(results, key=_trained):
        if one["model"]["role"] != "recurrent":
            continue
        mean = int(one["model"]["trained_recurrence"])
        last = [point for point in one["model"]["checkpoints"] if point["flops"] <= budget][-1]
        run = spent(name, BASES[name].sizes, mean, MATH)[::1_000]
        saved = 1_000 * max(i for i, flops in enumerate(run) if flops <= budget)
        scores = [f"{100 * last['scores'][task][str(mean)]:.1f}" for task, _, _ in TASKS.values()]
        share = f"{last['flops'] / budget:.3f}"
        yield [name, str(mean), f"{last['step']:,}", share, *scores, f"{saved:,}"]


def findings_table(name: str, results: Sequence[Json]) -> Iterator[list[str]]:
    """Yield what our measures and verdict say of each looped model."""
    static = next(one for one in results if one["model"]["role"] == "static")
    looped = [one for one in results if one["model"]["role"] == "recurrent"]
    for task, _, _ in TASKS.values():
        for one in sorted(looped, key=_trained):
            found = {finding.name: finding for finding in depth_measures(one, task)}
            found["equal"] = equal_flops_checkpoint(one, static, task)
            answers = [
                next(text for text in texts if f" on {task}" in text)
                for question, texts in verdict.judge([one, static])
                if question.startswith(("After training", "Is the best depth"))
            ]
            at = {row["num_recurrences"]: row for row in one["rows"] if row["task"] == task}
            shown = ("best depth", "knee", "practical knee", "stability", "equal")
            yield [
                name,
                task,
                str(int(one["model"]["trained_recurrence"])),
                *(answer.split(f" on {task}")[0] for answer in answers),
                *(_cell(found[key]) for key in shown),
                f"{100 * (at[32]['value'] - at[8]['value']):+.1f}",
            ]


def _cell(finding: Finding) -> str:
    if finding.value is None:
        return "-"
    digits = "+.1f" if finding.unit == "points" else ".0f"
    around = "" if finding.low is None else f" ({finding.low:{digits}} to {finding.high:{digits}})"
    return f"{finding.value:{digits}}{around}"


def _trained(result: Json) -> tuple[float]:
    return (result["model"]["trained_recurrence"] or 0.0,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", type=Path)
    parser.add_argument("output_dir", type=Path)
    arguments = parser.parse_args()
    numbers = json.loads(arguments.numbers.read_text(encoding="utf-8"))
    errors: dict[str, list[float]] = {}
    for file, theirs, ours in published_flops(numbers):
        errors.setdefault(file, []).append(abs(ours / theirs - 1))
    sure = [error for file, some in errors.items() if file != UNSURE for error in some]
    assert max(sure) < 1e-8, f"training FLOPs differ from the published by {max(sure):.2g}"
    print(f"{len(sure)} training FLOPs agree, the largest relative error is {max(sure):.2g}\n")
    for file, some in errors.items():
        print(f"| {file} | {len(some)} | {max(some):.1e} |")
    print()
    found = {name: results_of(name, numbers["results"][base.file]) for name, base in BASES.items()}
    for name, results in found.items():
        directory = arguments.output_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        file = {"format_version": 2, "kind": "eval", "results": results}
        write_json(directory / "results.json", file)
    for table in (accuracy_table, equal_flops_table, findings_table):
        for name, results in found.items():
            for line in table(name, results):
                print(f"| {' | '.join(line)} |")
        print()


if __name__ == "__main__":
    main()
