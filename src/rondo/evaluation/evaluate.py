"""`rondo eval`: tasks and texts at every depth asked for, beside the models to compare with.

Each model runs to its deepest r once, and everything at the depths on the way branches off that
pass. What is measured is kept as it comes (`ledger`), and written as a whole at the end.
"""

import json
import resource
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rondo import processes
from rondo.config import EvalConfig
from rondo.errors import UserError
from rondo.evaluation import baselines
from rondo.evaluation.baselines import Wanted
from rondo.evaluation.ledger import Ledger
from rondo.evaluation.outcome import Json, Outcome, mean_of_seeds
from rondo.evaluation.states import trace_states
from rondo.evaluation.subject import Subject, depths_of
from rondo.evaluation.tasks import TaskPlan, TextTask, plan_tasks
from rondo.evaluation.texts import Text, bits_per_byte, first_tokens, measure_text, read_text
from rondo.flops import costs_of
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.processes import World
from rondo.provenance import (
    claim_directory,
    hardware,
    read_json,
    record,
    staged,
    write_json,
)

FORMAT_VERSION = 2
LABELS = {
    ("recurrent", "before"): "recurrent, untrained",
    ("recurrent", "after"): "recurrent, trained",
    ("static", "after"): "static twin",
    ("random", "after"): "random-init twin",
    ("parent", "before"): "parent",
}
# Settings that decide where and how, not what is measured.
_ELSEWHERE = {"output_dir", "resume", "overwrite", "label", "stage"}


def run(config: EvalConfig) -> None:
    """Run `rondo eval`.

    Raises:
        UserError: A model, task or text cannot be had, a depth is beyond the cap, or the output
            exists.
        KeyboardInterrupt: It was stopped; --resume goes on.
    """
    world = processes.join(config.device)
    try:
        _run(config, world)
    finally:
        processes.leave(world)


def _run(config: EvalConfig, world: World) -> None:
    plan = plan_tasks(config)
    models = baselines.wanted_models(config)
    output_dir = Path(config.output_dir or f"out/eval-{baselines.name_of(models[0].directory)}")
    check(config, plan, models, output_dir)
    settings = config.model_dump(mode="json", exclude=_ELSEWHERE)
    settings |= {"models": [_weights(model.directory) for model in models]}
    ledger = Ledger(output_dir, settings, world, config.resume, config.overwrite)
    try:
        found = [measure(model, models[0], plan, ledger, config) for model in models]
    except KeyboardInterrupt:
        if world.first:
            print(f"\nkept in {ledger.directory}: the same command with --resume goes on from here")
        raise
    if world.first:
        write(config, output_dir, found)
    ledger.close(finished=True)


def check(config: EvalConfig, plan: TaskPlan, models: Sequence[Wanted], output_dir: Path) -> None:
    """Find what is wrong before anything heavy begins.

    Raises:
        UserError: Something is.
    """
    for model in models:
        claim_directory(str(output_dir), config.overwrite or config.resume, str(model.directory))
        fields = read_json(model.directory / "config.json")
        role = baselines.role_of(model.directory, fields)
        if model.role and model.role.replace("self-consistency", "parent") != role:
            raise UserError(f"{model.directory} cannot be the {model.role}: it is {role}")
        if fields.get("model_type") == "rondo":
            depths_of(fields, config)
    if config.resume and (output_dir / "results.json").is_file():
        raise UserError(f"{output_dir} is finished: leave --resume, or add --overwrite to redo it")
    drawn = [model for model in models if model.role == "self-consistency"]
    if drawn and not any(task.generates for task in plan.harness):
        raise UserError(
            "--against self-consistency draws several answers of a task whose answers are "
            "generated, and there is none among the tasks: add one (gsm8k), or leave it"
        )


def _weights(directory: Path) -> list[Any]:
    """Tell weights apart by what is quick to see."""
    files = sorted(directory.glob("*.safetensors"))
    return [str(directory), [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]]


@torch.inference_mode()
def measure(
    wanted: Wanted, first: Wanted, plan: TaskPlan, ledger: Ledger, config: EvalConfig
) -> tuple[Json, list[Json]]:
    """Measure one model on every task.

    Returns:
        Its result, as in results.json, and its lines of samples.jsonl.
    """
    subject = Subject(wanted.directory, config, ledger.world.device)
    samples = 1
    if wanted.role == "self-consistency":
        samples = draws(subject, first, config)
    facts = model_facts(subject, wanted, config, samples)
    outcomes: list[Outcome] = []
    states = None
    if samples == 1:
        seeds = config.seeds if subject.starts_from_noise else config.seeds[:1]
        for task in plan.texts:
            found = [measure_text(subject, task, ledger, config, seed) for seed in seeds]
            outcomes.append(mean_of_seeds(found))
        states = trace(subject, plan.texts, ledger, config)
    outcomes += measure_with_harness(subject, plan, ledger, config, samples)
    milliseconds = ledger.run(
        "timing",
        [subject.directory],
        str,
        lambda _: {str(r): ms for r, ms in subject.milliseconds_per_token().items()},
    )[0][0]
    run = record(config)
    rows = [row for one in outcomes for row in rows_of(one, subject, milliseconds, samples)]
    result = {
        "model": facts,
        "conditions": {
            "command": run["command"],
            "date": run["date"],
            "device": hardware(subject.device.type),
            "dtype": str(subject.dtype).removeprefix("torch."),
            "seq_len": config.seq_len,
            "batch_size": config.batch_size,
            "limit": config.limit,
            "num_processes": ledger.world.size,
            "seeds": list(config.seeds),
            "peak_memory_bytes": peak_memory(subject.device),
            "versions": run["versions"],
            "git": run["git"],
        },
        "tasks": {one.name: one.described for one in outcomes},
        "rows": rows,
        "items": {one.name: one.items for one in outcomes},
        "states": states,
    }
    return result, [{"model": facts["label"], **line} for one in outcomes for line in one.samples]


def measure_with_harness(
    subject: Subject, plan: TaskPlan, ledger: Ledger, config: EvalConfig, samples: int
) -> list[Outcome]:
    """Measure the tasks of lm-evaluation-harness; of several samples, those that generate."""
    tasks = [task for task in plan.harness if samples == 1 or task.generates]
    if not tasks:
        return []
    # The harness takes seconds to import.
    from rondo.evaluation.harness import measure_tasks

    seeds = config.seeds if samples > 1 or subject.starts_from_noise else config.seeds[:1]
    by_seed = [measure_tasks(subject, tasks, ledger, config, seed, samples) for seed in seeds]
    return [mean_of_seeds(ones) for ones in zip(*by_seed, strict=True)]


def draws(parent: Subject, first: Wanted, config: EvalConfig) -> int:
    """Return how many answers of the parent cost what one at the deepest r does."""
    settings: Any = AutoConfig.from_pretrained(first.directory)
    with torch.device("meta"):
        costs = costs_of(RecurrentForCausalLM(settings))
    deepest = depths_of(settings.to_dict(), config)[-1]
    ours, theirs = costs.forward_flops(deepest, 1), parent.costs.forward_flops(1, 1)
    return max(2, round(ours / theirs))


def trace(
    subject: Subject, texts: Sequence[TextTask], ledger: Ledger, config: EvalConfig
) -> Json | None:
    """Follow the state of the loop through its iterations, on the beginnings of a text."""
    if not subject.recurrent or not config.trace_tokens:
        return None
    task = texts[0] if texts else TextTask("math-test", "math-test")
    text: Text = read_text(task, subject, config)
    token_lists = first_tokens([text], config.trace_tokens)

    def work(ids: list[list[int]]) -> Json:
        deepest = subject.recurrences[-1]
        seed, size = config.seeds[0], config.batch_size
        return {"text": task.name, **trace_states(subject.model, ids, deepest, seed, size)}

    def key(ids: list[list[int]]) -> Any:
        return [str(subject.directory), ids]

    return ledger.run("states", [token_lists], key, work)[0][0]


def rows_of(
    outcome: Outcome, subject: Subject, milliseconds: dict[str, float], samples: int
) -> list[Json]:
    """Return one row per metric and depth, each beside its costs."""
    bytes_per_value = torch.empty(0, dtype=subject.dtype).element_size()
    flops = {r: subject.costs.forward_flops(r, outcome.seq_len) for r in subject.recurrences}
    rows = []
    for metric, scores in outcome.scores.items():
        for depth, score in scores.items():
            row = {
                "task": outcome.name,
                "metric": metric,
                "num_recurrences": depth,
                "value": score.value,
                "stderr": score.stderr,
                "seed_values": outcome.seed_values[metric][depth],
                "flops_per_token": flops[depth] * samples,
                "kv_bytes_per_token": subject.costs.kv_bytes(depth, bytes_per_value),
                "ms_per_token": milliseconds[str(depth)] * samples,
                # A depth's share of the pass over all, by what it would have executed alone.
                "seconds": outcome.seconds * min(1.0, flops[depth] / flops[max(flops)]),
                "tokens_per_item": outcome.tokens_per_item,
                "samples": samples,
            }
            if metric == "loss":
                row["bits_per_byte"] = bits_per_byte(score.value, outcome.described)
            rows.append(row)
    return rows


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use: on a GPU by tensors, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_facts(subject: Subject, wanted: Wanted, config: EvalConfig, samples: int) -> Json:
    """Return what a report says about the model, read off its run.json."""
    facts, training = subject.facts, subject.facts.get("training")
    role = baselines.role_of(wanted.directory, {"model_type": subject.model.config.model_type})
    stage = "after" if training or facts.get("imported") else "before"
    label = LABELS.get((role, stage), f"{role}, {stage} training")
    if samples > 1:
        role, label = "self-consistency", f"parent, self-consistency of {samples}"
    settings = subject.model.config if subject.recurrent else None
    split = None
    if settings:
        core = settings.num_prelude_layers
        coda, layers = core + settings.num_core_layers, settings.source_layers
        split = {"prelude": layers[:core], "core": layers[core:coda], "coda": layers[coda:]}
    main = wanted.role is None
    return {
        "path": str(wanted.directory),
        "label": wanted.label or label,
        "role": role,
        "stage": (config.stage if main else None) or stage,
        "parent": Path(facts.get("parent", {}).get("name") or wanted.directory).name,
        "parameters": subject.costs.total_parameters,
        "split": split,
        "injection": settings.injection if settings else None,
        "state_init": settings.state_init if settings else None,
        "max_recurrences": settings.max_recurrences if settings else None,
        "trained_recurrence": trained_recurrence(subject),
        "training": training,
        "curve": baselines.training_curve(wanted.directory) if training else [],
        "history": facts.get("history", [facts["command"]] if "command" in facts else []),
    }


def trained_recurrence(subject: Subject) -> float | None:
    """Return the mean depth that the loop was trained at, if it was."""
    if not subject.recurrent:
        return None
    if "training" in subject.facts:
        return float(subject.facts["config"]["recurrence"]["mean"])
    return float(subject.model.config.num_recurrences) if subject.facts.get("imported") else None


def write(config: EvalConfig, output_dir: Path, found: Sequence[tuple[Json, list[Json]]]) -> None:
    """Write what was found, and print it."""
    results = [result for result, _ in found]
    with staged(output_dir) as partial:
        lines = (json.dumps(line, ensure_ascii=False) for _, samples in found for line in samples)
        (partial / "samples.jsonl").write_text("".join(f"{one}\n" for one in lines), "utf-8")
        file = {"format_version": FORMAT_VERSION, "kind": "eval", "results": results}
        write_json(partial / "results.json", file)
        write_json(partial / "run.json", record(config, kind="eval"))
    for result in results:
        print(f"\n{result['model']['label']} ({result['model']['path']})")
        print(
            "  task                metric            r      value    stderr   FLOPs/token  ms/token"
        )
        for row in result["rows"]:
            value, stderr = (
                "-" if row[key] is None else f"{row[key]:.4f}" for key in ("value", "stderr")
            )
            print(
                f"  {row['task']:<20}{row['metric']:<15}{row['num_recurrences']:>4}{value:>11}"
                f"{stderr:>10}{row['flops_per_token']:>14.4g}{row['ms_per_token']:>10.2f}"
            )
    place = shlex.quote(str(output_dir))
    print(f"\nwrote {output_dir}/results.json; draw it with: rondo report {place}")
