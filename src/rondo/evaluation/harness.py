"""The door to lm-evaluation-harness: its tasks in our process, and our model in its command line.

With `lm.py`, whose model is registered by importing this, the only file that imports lm_eval.
Prompts, answers taken from texts and metrics are the harness's own, depth after depth; the passes
of the model are made once for all depths.
"""

import functools
import io
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.filter import Filter
from lm_eval.api.metrics import mean
from lm_eval.api.registry import register_filter
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from rondo.config import EvalConfig
from rondo.errors import UserError
from rondo.evaluation.ledger import Ledger
from rondo.evaluation.lm import Sweep
from rondo.evaluation.outcome import Outcome
from rondo.evaluation.scores import Effort, most_frequent, outcome_of, pooled, voting
from rondo.evaluation.subject import Subject
from rondo.evaluation.tasks import HarnessTask, shots

Json = dict[str, Any]
# What comes of a definition that does not fit its items, or of a hub that does not answer.
MISTAKES = (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


# Where the tasks lie that our suites name; reading all 14,000 definitions takes many seconds.
FOLDERS = [
    "arc",
    "benchmarks",
    "gsm8k",
    "hellaswag",
    "minerva_math",
    "openbookqa",
    "piqa",
    "winogrande",
]


@register_filter("most_frequent")
class MostFrequent(Filter):
    """Chooses the answer that most samples give; `most_frequent` says how.

    Args:
        options: Its arguments.
    """

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def apply(self, resps: Any, docs: Any) -> list[str]:
        """Return the answer of each item, of several texts each."""
        return [most_frequent(list(texts), **self.options) for texts in resps]


def cli(argv: Sequence[str]) -> None:
    """Run the harness's own command line, to which `--model rondo` is known."""
    sys.argv = ["rondo lm_eval", *argv]
    cli_evaluate()


def measure_tasks(
    subject: Subject,
    tasks: Sequence[HarnessTask],
    ledger: Ledger,
    config: EvalConfig,
    seed: int,
    samples: int = 1,
) -> list[Outcome]:
    """Measure tasks at every depth of a subject.

    A group gives an outcome for each of its tasks, and one over the items of all of them.

    Args:
        subject: The model.
        tasks: What is measured.
        ledger: Keeps and shares the work.
        config: Numbers of items and of solved examples, batch size, chat template.
        seed: Of sampling and of a `normal` initial state.
        samples: Answers that are drawn per item, of which the most frequent one counts; where
            there are several, tasks that generate nothing are left out.

    Raises:
        UserError: The model cannot do a task.
    """
    if config.apply_chat_template and subject.tokenizer.chat_template is None:
        raise UserError(f"{subject.directory} has no chat template: leave --apply-chat-template")
    with _quiet():
        sweep = Sweep(subject, ledger, config, seed)
    outcomes = []
    for given in tasks:
        parts = []
        for leaf, task in load(given, config).items():
            if samples > 1 and task.OUTPUT_TYPE != "generate_until":
                continue
            if samples > 1:
                with _quiet():
                    task = voting(task, samples, config.temperature)
            name = given.name if leaf == given.base else leaf
            results = results_by_depth(sweep, name, task, config)
            averaged = {key for key, way in task.aggregation().items() if way is mean}
            effort = Effort(sweep.seconds, sweep.lengths, sweep.cut)
            parts.append(outcome_of(given, name, task, results, effort, averaged))
        outcomes += parts
        if len({part.described["metric"] for part in parts}) == 1 and len(parts) > 1:
            outcomes.append(pooled(given, parts))
    return outcomes


def results_by_depth(sweep: Sweep, name: str, task: Any, config: EvalConfig) -> dict[int, Any]:
    """Return by depth what the harness says of a task."""
    chat = config.apply_chat_template
    how: Any = {
        "limit": config.limit,
        "apply_chat_template": chat,
        "fewshot_as_multiturn": chat,
    }
    sweep.begin(name)
    with _quiet():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        task.build_all_requests(**how, chat_template=sweep.apply_chat_template if chat else None)
    kinds: dict[str, list[Any]] = {}
    for one in task.instances:
        kinds.setdefault(one.request_type, []).extend([one] * one.repeats)
    answer: dict[str, Any] = {
        "loglikelihood": sweep.loglikelihood,
        "loglikelihood_rolling": sweep.loglikelihood_rolling,
        "generate_until": sweep.generate_until,
    }
    # All passes are made here, where our bar is seen; what follows reads them off.
    for kind, requests in kinds.items():
        with _quiet(bars=True):
            answer[kind](requests, disable_tqdm=True)
    results = {}
    for index, depth in enumerate(sweep.subject.recurrences):
        sweep.depth = index
        with _quiet():
            # Both draw the same solved examples.
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
            results[depth] = evaluate(sweep, {"tasks": {name: task}}, bootstrap_iters=0, **how)
    return results


def load(given: HarnessTask, config: EvalConfig) -> dict[str, Any]:
    """Make the harness's task objects, which reads their items.

    Returns:
        By the harness's names; several where a group is given.

    Raises:
        UserError: The items cannot be had or are damaged, or a task needs what we do not give it.
    """
    manager, specs = _manager(given.base, config.include_path), [given.base]
    if given.overrides:
        members = [{"task": leaf, **changes} for leaf, changes in given.overrides.items()]
        specs = [{"group": f"rondo {given.base}", "task": members}]
    # As the harness itself does: some definitions shuffle their choices.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        with _quiet():
            tasks: dict[str, Any] = manager.load(specs)["tasks"]
    except (*MISTAKES, DatasetsError, TemplateError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{given.name} cannot be made of {given.source}: {reason}") from error
    for task in tasks.values():
        if task.get_config("unsafe_code") or task.get_config("doc_to_image"):
            raise UserError(
                f"{given.name} runs code that the model writes, or shows it pictures: use rondo "
                "lm_eval"
            )
        number = shots(task.get_config("num_fewshot"), config.num_fewshot)
        task.set_config("num_fewshot", number)
        if number > (known := len(task.sampler.fewshot_docs())):
            raise UserError(
                f"{given.name} knows {known} solved examples, and {number} are to be shown: give "
                "a lower --num-fewshot"
            )
    return tasks


def definitions(name: str, include_path: str | None) -> dict[str, Json]:
    """Return the harness's definition of a task, or of each task of a group; none if unknown."""
    manager = _manager(name, include_path)
    return {leaf: manager.task_index[leaf].cfg or {} for leaf in _leaves(manager, name)}


def known_names(include_path: str | None) -> list[str]:
    """Return the names of all tasks and groups."""
    return _index(include_path, whole=True).all_tasks


def _leaves(manager: TaskManager, name: str) -> Iterator[str]:
    if name in manager.all_subtasks:
        yield name
    elif entry := manager.task_index.get(name):
        group = (entry.cfg or {}).get("task") if name in manager.all_groups else None
        for member in group or sorted(entry.tags):
            label = member if isinstance(member, str) else member.get("group") or member["task"]
            yield from _leaves(manager, label)


def _manager(name: str, include_path: str | None) -> TaskManager:
    few = _index(include_path, whole=False)
    known = name in few.all_subtasks or name == "minerva_math"
    return few if known else _index(include_path, whole=True)


@functools.cache
def _index(include_path: str | None, whole: bool) -> TaskManager:
    root = Path(lm_eval.tasks.__file__).parent
    paths: list[str | Path] = [] if whole else [root / folder for folder in FOLDERS]
    if include_path:
        if not Path(include_path).is_dir():
            raise UserError(f"--include-path {include_path} is no directory")
        paths.append(Path(include_path))
    with _quiet():
        return TaskManager(include_path=paths, include_defaults=whole)


@contextmanager
def _quiet(bars: bool = False) -> Iterator[None]:
    """Keep the harness's lines off the screen, which is ours, and all else but wanted bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        errors = nullcontext() if bars else redirect_stderr(io.StringIO())
        with redirect_stdout(io.StringIO()), errors:
            yield
    finally:
        logger.setLevel(level)
