"""`rondo eval`: tasks and texts at every depth asked for, beside the models to compare with.

Each model runs to its deepest r once, and everything at the depths on the way branches off that
pass. What is measured is kept as it comes (`ledger`), and written as a whole at the end.
"""

import gc
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig

from rondo import processes
from rondo.config import EvalConfig
from rondo.data import load_tokenizer
from rondo.errors import UserError
from rondo.evaluation import baselines
from rondo.evaluation.baselines import Wanted
from rondo.evaluation.ledger import Ledger
from rondo.evaluation.outcome import Json, Outcome, mean_of_seeds
from rondo.evaluation.results import FORMAT_VERSION, conditions, model_facts, rows_of, told_apart
from rondo.evaluation.states import trace_states
from rondo.evaluation.subject import Subject, depths_of, load_subject
from rondo.evaluation.tasks import TaskPlan, TextTask, plan_tasks
from rondo.evaluation.texts import Text, first_tokens, measure_text, read_text
from rondo.flops import Costs, costs_of
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.processes import World
from rondo.provenance import (
    choose_dtype,
    claim_directory,
    peak_memory,
    read_json,
    record,
    staged,
    write_json,
)

# Settings that decide where and how, not what is measured.
_ELSEWHERE = {"output_dir", "resume", "overwrite", "label", "stage", "batch_size", "device"}
# Processes meet at the end of a task, and one may have much more of it to do than another.
_PATIENCE_MINUTES = 24 * 60.0


def run(config: EvalConfig) -> None:
    """Run `rondo eval`.

    Raises:
        UserError: A model, task or text cannot be had, a depth is beyond the cap, or the output
            exists.
        KeyboardInterrupt: It was stopped; --resume goes on.
    """
    world = processes.join(config.device, _PATIENCE_MINUTES)
    try:
        _run(config, world)
    except UserError:
        if world.first:
            raise
        # One sentence is enough of all processes.
        raise SystemExit(2) from None
    finally:
        processes.leave(world)


def _run(config: EvalConfig, world: World) -> None:
    plan = plan_tasks(config)
    models = baselines.wanted_models(config)
    output_dir = Path(config.output_dir or f"out/eval-{baselines.name_of(config.model)}")
    check(config, plan, models, output_dir)
    # The choice may differ from one process, model or day to the next, and must not.
    dtype = str(choose_dtype(config.dtype, world.device)).removeprefix("torch.")
    settled = config.model_copy(update={"dtype": processes.gather(world, dtype)[0]})
    settings = settled.model_dump(mode="json", exclude=_ELSEWHERE)
    settings |= {"device": world.device.type, "models": [_files(one.directory) for one in models]}
    ledger = Ledger(output_dir, settings, world, config.resume, config.overwrite)
    try:
        found = [measure(one, models[0], plan, ledger, settled) for one in models]
    except KeyboardInterrupt:
        if world.first:
            print(f"\nkept in {ledger.directory}: the same command with --resume goes on from here")
        raise
    except UserError:
        ledger.leave_if_empty()
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the memory of the device is too small for --batch-size {config.batch_size}: give a "
            "smaller one with --resume, which goes on with what is done"
        ) from error
    told_apart(found)
    if world.first:
        write(config, output_dir, found)
    ledger.finish()


def check(config: EvalConfig, plan: TaskPlan, models: Sequence[Wanted], output_dir: Path) -> None:
    """Find what is wrong before anything heavy begins.

    Raises:
        UserError: Something is.
    """
    if config.resume and not config.overwrite and (output_dir / "results.json").is_file():
        raise UserError(
            f"{output_dir} is finished: there is nothing to resume; to redo it, leave --resume and "
            "add --overwrite"
        )
    for model in models:
        claim_directory(str(output_dir), config.overwrite, str(model.directory))
        fields = read_json(model.directory / "config.json")
        role = baselines.role_of(model.directory, fields)
        if model.role and model.role.replace("self-consistency", "parent") != role:
            raise UserError(
                f"{model.name} cannot stand for {model.role}: by its run.json and config.json it "
                f"is {role}"
            )
        if fields.get("model_type") == "rondo":
            depths_of(model.directory, fields, config)
        if config.apply_chat_template and plan.harness:
            tokenizer: Any = load_tokenizer(model.directory)
            if tokenizer.chat_template is None:
                raise UserError(f"{model.name} has no chat template: leave --apply-chat-template")
    if any(model.role == "self-consistency" for model in models):
        if not any(task.generates for task in plan.harness):
            raise UserError(
                "--against self-consistency draws several answers of a task whose answers are "
                "generated, and there is none among the tasks: add one (gsm8k), or leave it"
            )
        draws(models[0], config)


def _files(directory: Path) -> list[Any]:
    """Tell checkpoints apart by what is quick to see."""
    files = sorted(path for kind in ("safetensors", "json") for path in directory.glob(f"*.{kind}"))
    return [str(directory), [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]]


@torch.inference_mode()
def measure(
    wanted: Wanted, first: Wanted, plan: TaskPlan, ledger: Ledger, config: EvalConfig
) -> tuple[Json, list[Json]]:
    """Measure one model on every task.

    Returns:
        Its result, as in results.json, and its lines of samples.jsonl.
    """
    gc.collect()
    if ledger.world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    subject = load_subject(wanted.directory, config, ledger.world.device)
    samples = draws(first, config, subject.costs) if wanted.role == "self-consistency" else 1
    facts = model_facts(subject, wanted, first, config, samples)
    outcomes: list[Outcome] = []
    seeds = config.seeds if subject.starts_from_noise else config.seeds[:1]
    states = None
    if samples == 1:
        # A text that cannot be read is found before any is measured.
        texts = [read_text(task, subject, config) for task in plan.texts]
        for task, text in zip(plan.texts, texts, strict=True):
            found = [measure_text(subject, task, text, ledger, config, seed) for seed in seeds]
            outcomes.append(mean_of_seeds(found))
            tell(ledger.world, facts["label"], outcomes[-1:])
        states = trace(subject, plan.texts, texts, ledger, config)
    for one in measure_with_harness(subject, plan, ledger, config, samples):
        tell(ledger.world, facts["label"], one)
        outcomes += one
    scores = [
        score for o in outcomes for by_depth in o.scores.values() for score in by_depth.values()
    ]
    most = max(len(score.by_seed) for score in scores) or 1
    milliseconds = ledger.run(
        "timing",
        [str(subject.directory)],
        str,
        lambda _: {str(r): ms for r, ms in subject.milliseconds_per_token().items()},
    )[0][0]
    # A process has one peak, which is that of the first model; a GPU tells them apart.
    known = wanted is first or subject.device.type == "cuda"
    memory = peak_memory(subject.device) if known else None
    result = {
        "model": facts,
        "conditions": conditions(subject, config, ledger, config.seeds[:most], memory),
        "tasks": {one.name: one.described for one in outcomes},
        "rows": [row for one in outcomes for row in rows_of(one, subject, milliseconds)],
        "items": {one.name: one.items for one in outcomes},
        "states": states,
    }
    return result, [{"model": facts["label"], **line} for one in outcomes for line in one.samples]


def measure_with_harness(
    subject: Subject, plan: TaskPlan, ledger: Ledger, config: EvalConfig, samples: int
) -> Iterator[list[Outcome]]:
    """Measure the tasks of lm-evaluation-harness; of several samples, those that generate."""
    tasks = [task for task in plan.harness if samples == 1 or task.generates]
    if not tasks:
        return
    # The harness takes seconds to import.
    from rondo.evaluation.harness import measure_tasks

    for task in tasks:
        random = samples > 1 or task.sampled or subject.starts_from_noise
        seeds = config.seeds if random else config.seeds[:1]
        by_seed = [measure_tasks(subject, [task], ledger, config, seed, samples) for seed in seeds]
        yield [mean_of_seeds(ones) for ones in zip(*by_seed, strict=True)]


def tell(world: World, label: str, outcomes: Sequence[Outcome]) -> None:
    """Say what has just been measured: a long evaluation is not silent where there is no bar."""
    for one in outcomes if world.first else ():
        metric = one.described["metric"]
        values = ", ".join(
            f"{'-' if score.value is None else format(score.value, '.4f')} at r = {depth}"
            for depth, score in one.scores[metric].items()
        )
        tqdm.write(f"{label}: {one.name} {metric} {values} ({one.seconds:.0f} s)", file=sys.stderr)


def draws(first: Wanted, config: EvalConfig, parent: Costs | None = None) -> int:
    """Return how many answers of the parent cost what one at the deepest r does.

    Args:
        first: The model asked about.
        config: Its depths.
        parent: Costs of the parent; those of all stored layers once unless given.

    Raises:
        UserError: The model asked about has no loop, or its deepest r costs less than two.
    """
    settings: Any = AutoConfig.from_pretrained(first.directory)
    if settings.model_type != "rondo":
        raise UserError(
            f"--against self-consistency needs a model with a loop, and {first.name} has none"
        )
    with torch.device("meta"):
        costs = costs_of(RecurrentForCausalLM(settings))
    deepest = depths_of(first.directory, settings.to_dict(), config)[-1]
    ratio = costs.forward_flops(deepest, 1) / (parent or costs).forward_flops(1, 1)
    if round(ratio) < 2:
        raise UserError(
            f"--against self-consistency: r = {deepest} costs {ratio:.2f} times the parent, which "
            "buys no second answer: measure deeper, or leave it"
        )
    return round(ratio)


def trace(
    subject: Subject,
    tasks: Sequence[TextTask],
    texts: Sequence[Text],
    ledger: Ledger,
    config: EvalConfig,
) -> Json | None:
    """Follow the state of the loop through its iterations, on the beginnings of a text."""
    if not subject.recurrent or not config.trace_tokens:
        return None
    if not tasks:
        tasks = [TextTask("math-test", "math-test")]
        texts = [read_text(tasks[0], subject, config)]
    token_lists = first_tokens(texts[:1], config.trace_tokens)

    def work(ids: list[list[int]]) -> Json:
        deepest = subject.recurrences[-1]
        seed, size = config.seeds[0], config.batch_size
        return {"text": tasks[0].name, **trace_states(subject.model, ids, deepest, seed, size)}

    def key(ids: list[list[int]]) -> Any:
        return [str(subject.directory), ids]

    return ledger.run("states", [token_lists], key, work)[0][0]


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
            f"  {'task':<20}{'metric':<15}{'r':>4}{'value':>11}{'stderr':>10}"
            f"{'FLOPs/token':>14}{'ms/token':>10}"
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
