"""What is measured: tasks and suites by name, texts, and where the items of each come from.

The items of a task lie in a --data directory, as DIR/TASK/SPLIT.jsonl (.gz, .zst) or .parquet, or
come from the hub. Local records are brought into the form of the hub's dataset, so that prompts,
choices and metrics are those of the harness's own definition. All mistakes are found here, before
a model is loaded.
"""

import difflib
import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError

from rondo.config import EvalConfig
from rondo.data.sources import HUB, KINDS, parse_source, records
from rondo.errors import UserError
from rondo.evaluation.items import (
    FORMS,
    GSM8K,
    MATH,
    MATH_500,
    Adapt,
    as_it_is,
    hellaswag,
    math_problem,
    read_items,
)

Json = dict[str, Any]

SUITES = {
    "math": ("gsm8k_paper", "gsm8k_answers", "minerva_math"),
    "knowledge": (
        "arc_easy",
        "arc_challenge",
        "hellaswag",
        "piqa",
        "openbookqa",
        "winogrande",
    ),
}
HELD_OUT_SAMPLES = ("math-test", "general-test")
ANSWERS = "gsm8k_answers"
# What a task of ours changes in one of the harness: here the prompt of arXiv:2511.07384.
VARIANTS: dict[str, tuple[str, Json]] = {
    "gsm8k_paper": (
        "gsm8k_cot",
        {"doc_to_text": "Q: {{question}}\n\nA: Let's think step by step.", "num_fewshot": 1},
    )
}
MATH_FOLDER = "minerva_math"
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
TABLES = tuple(kind for kind in KINDS if ".txt" not in kind)
# A hub that cannot be reached is asked once, so long; datasets alone would go on for half a minute.
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class TextTask:
    """A text whose loss is measured.

    Attributes:
        name: What results call it.
        spec: What `parse_source` takes.
        answers: Measure the answers alone, given their questions.
        suite: The suite that asked for it.
    """

    name: str
    spec: str
    answers: bool = False
    suite: str | None = None


@dataclass(frozen=True)
class HarnessTask:
    """A task, or a group of tasks, of lm-evaluation-harness.

    Attributes:
        name: What results call it.
        base: What the harness calls it.
        suite: The suite that asked for it.
        overrides: By the harness's name of each task, what is changed in its definition; empty
            for the definition and the hub's data as they are.
        source: Where the items come from.
        names: What results call it, and the tasks of a group too.
        generates: Whether answers are texts that the model writes.
        sampled: Whether their definition has them drawn at random.
    """

    name: str
    base: str
    suite: str | None
    overrides: dict[str, Json]
    source: str
    names: tuple[str, ...]
    generates: bool
    sampled: bool


@dataclass(frozen=True)
class TaskPlan:
    """All that is measured."""

    texts: tuple[TextTask, ...]
    harness: tuple[HarnessTask, ...]


class Local(NamedTuple):
    """Local files of a task by split, and the subject to take of files that hold several."""

    files: dict[str, Path]
    subject: str | None = None


def plan_tasks(config: EvalConfig) -> TaskPlan:
    """Find everything that is asked for, and where its items are.

    Raises:
        UserError: A task is unknown, its items cannot be had or are damaged, or two have one name.
    """
    places = [Path(entry) for entry in config.data if Path(entry).is_dir()]
    files = dict.fromkeys(entry for entry in config.data if not Path(entry).is_dir())
    asked: dict[str, str | None] = {
        name: None for entry in config.tasks for name in re.split(r"[,\s]+", entry) if name
    }
    for suite in config.suite:
        asked |= {name: suite for name in SUITES.get(suite, ()) if name not in asked}
    loss = "loss" if "loss" in config.suite else None
    texts = [TextTask(parse_source(spec).name, spec, suite=loss) for spec in files]
    if loss or not asked:
        texts += [TextTask(name, spec, suite=loss) for name, spec in _folders_of_text(places)]
        if places and not texts:
            raise UserError(
                f"there is no folder of text (.txt, or records with `text`) in {_listed(places)}: "
                "name the tasks that are wanted with --tasks or --suite"
            )
        texts = texts or [TextTask(name, name, suite=loss) for name in HELD_OUT_SAMPLES]
    tasks = []
    for name, suite in asked.items():
        try:
            if name == ANSWERS:
                texts.append(_answers(places, suite))
            else:
                tasks.append(_plan_task(name, suite, places, config))
        except Missing as error:
            others = ",".join(one for one in SUITES.get(suite or "", ()) if one != name)
            without = f"; to go without it: --tasks {others}" if others else ""
            raise UserError(f"{error}{without}") from error
    names = [*(one.name for one in texts), *(leaf for one in tasks for leaf in one.names)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two of what is measured are called {name}: give a text as NAME=PATH")
    return TaskPlan(tuple(texts), tuple(tasks))


def shots(defined: int | None, wanted: int | None) -> int:
    """Return the solved examples before each item; a task that is defined without keeps to it."""
    return (defined or 0) if wanted is None or defined == 0 else wanted


def _folders_of_text(places: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield name and file of each folder that holds a held-out text and is no task's."""
    tasks = {"gsm8k", *(name for suite in SUITES.values() for name in suite)}
    for folder in (path for place in places for path in sorted(place.iterdir()) if path.is_dir()):
        kept = [
            path
            for path in sorted(folder.iterdir())
            if path.name.endswith(KINDS) and not path.name.startswith((".", "train"))
        ]
        by_split = {path.name.split(".")[0]: path for path in reversed(kept)}
        path = by_split.get("test") or by_split.get("validation") or next(iter(kept), None)
        if path and folder.name not in tasks and _is_text(path):
            yield folder.name, str(path)


def _is_text(path: Path) -> bool:
    if ".txt" in path.suffixes:
        return True
    first = next(records(parse_source(str(path)), "text"), None)
    return first is not None and isinstance(first.fields.get("text"), str)


def _answers(places: Sequence[Path], suite: str | None) -> TextTask:
    for folder in (place / name for place in places for name in (ANSWERS, "gsm8k")):
        if path := _files(folder, ["test"]).get("test"):
            return TextTask(ANSWERS, str(path), answers=True, suite=suite)
    if reason := unreachable(GSM8K):
        raise _nowhere(ANSWERS, "gsm8k", "test", places, f"{GSM8K}: {reason}")
    return TextTask(ANSWERS, f"{HUB}{GSM8K}:main:test", answers=True, suite=suite)


def _plan_task(
    name: str, suite: str | None, places: Sequence[Path], config: EvalConfig
) -> HarnessTask:
    try:
        harness: Any = importlib.import_module("rondo.evaluation.harness")
    except ImportError as error:
        raise UserError(
            f'{name} needs lm-evaluation-harness: pip install "rondo-lm[eval]"'
        ) from error
    if name in (*SUITES, "loss"):
        raise UserError(f"{name} is a suite, not a task: ask for it with --suite {name}")
    base, changes = VARIANTS.get(name, (name, {}))
    definitions: dict[str, Json] = harness.definitions(base, config.include_path)
    if not definitions:
        raise UserError(_unknown(name, harness.known_names(config.include_path)))
    datasets = {str(one.get("dataset_path")): one for one in definitions.values()}
    if datasets.keys() & {MATH, MATH_500} and not find_spec("math_verify"):
        raise UserError(f'{name} needs math-verify: pip install "rondo-lm[eval]"')
    found = {
        leaf: _local((name, leaf) if leaf == base else (leaf,), one, places)
        for leaf, one in definitions.items()
    }
    if any(found.values()):
        overrides = {}
        for leaf, local in found.items():
            definition = definitions[leaf] | changes
            if local is None:
                dataset = str(definition.get("dataset_path"))
                raise _nowhere(leaf, leaf, _evaluated(definition), places, dataset)
            overrides[leaf] = changes | _adapted(leaf, definition, local, config)
        paths = [str(_evaluated_file(definitions[leaf], one)) for leaf, one in found.items() if one]
        source = ", ".join(dict.fromkeys(paths))
    else:
        for dataset, one in datasets.items():
            if reason := unreachable(dataset):
                raise _nowhere(name, name, _evaluated(one), places, f"{dataset}: {reason}")
        overrides = {base: changes} if changes else {}
        source = ", ".join(
            f"{HUB}{dataset}:{one.get('dataset_name') or ''}:{_evaluated(one)}"
            for dataset, one in datasets.items()
        )
    leaves = (leaf for leaf in definitions if leaf != base)
    kinds = {one.get("output_type", "generate_until") for one in definitions.values()}
    ways = [one.get("generation_kwargs") or {} for one in definitions.values()]
    sampled = any(way.get("do_sample") for way in ways)
    task = HarnessTask(
        name, base, suite, overrides, source, (name, *leaves), "generate_until" in kinds, sampled
    )
    # Reads every item once: what is wrong with them shows now.
    harness.load(task, config)
    return task


def _local(names: Sequence[str], definition: Json, places: Sequence[Path]) -> Local | None:
    """Find a task's files: under its name, its dataset's, or its subject of MATH."""
    dataset, splits = definition.get("dataset_path"), _splits(definition)
    folders = (*names, "gsm8k") if dataset == GSM8K else names
    for place in places:
        for folder in folders:
            if _evaluable(files := _files(place / folder, splits)):
                return Local(files)
        if dataset != MATH:
            continue
        subject, short = definition["dataset_name"], names[-1].removeprefix(f"{MATH_FOLDER}_")
        for stem in (subject, short):
            if _evaluable(files := _files(place / MATH_FOLDER / stem, splits)):
                return Local(files)
            if files := _files(place / MATH_FOLDER, [stem]):
                return Local({"test": files[stem]})
        if _evaluable(files := _files(place / MATH_FOLDER, splits)):
            return Local(files, subject)
    return None


def _splits(definition: Json) -> list[str]:
    named = (definition.get(key) for key in SPLITS)
    return list(dict.fromkeys([*filter(None, named), "test", "validation", "train"]))


def _files(folder: Path, splits: Sequence[str]) -> dict[str, Path]:
    """Return the file of each split that a folder holds."""
    found = {
        split: next(filter(Path.is_file, (folder / f"{split}{kind}" for kind in TABLES)), None)
        for split in splits
    }
    return {split: path for split, path in found.items() if path}


def _evaluable(files: Mapping[str, Path]) -> bool:
    return bool(files.keys() - {"train", "dev"})


def _evaluated(definition: Json) -> str:
    """Return the split whose items a definition evaluates."""
    return definition.get("test_split") or definition.get("validation_split") or "test"


def _evaluated_file(definition: Json, local: Local) -> Path:
    order = (_evaluated(definition), "test", "validation", *local.files)
    return next(local.files[split] for split in order if split in local.files)


def _adapted(leaf: str, definition: Json, local: Local, config: EvalConfig) -> Json:
    """Return what must change in a definition for it to read local files.

    Raises:
        UserError: It takes solved examples, and no file has any beside the items themselves.
    """
    files = local.files
    path = _evaluated_file(definition, local)
    evaluated = next(split for split, one in files.items() if one == path)
    changes: Json = {
        key: split if split in files else None for key in SPLITS if (split := definition.get(key))
    }
    if not changes.get("test_split") and not changes.get("validation_split"):
        changes["test_split"] = evaluated
    pool = definition.get("fewshot_split") or definition.get("training_split") or "train"
    own = (definition.get("fewshot_config") or {}).get("samples")
    spare = pool in files or (
        "fewshot_split" not in definition and files.keys() & {"validation"} - {evaluated}
    )
    if shots(definition.get("num_fewshot"), config.num_fewshot) and not own and not spare:
        raise UserError(
            f"{leaf} takes its solved examples from {path.parent}/{pool}.jsonl, which is not "
            "there: add it, or give --num-fewshot 0"
        )
    adapt: Adapt = FORMS.get(str(definition.get("dataset_path")), as_it_is)
    if adapt is math_problem:
        adapt = partial(math_problem, subject=local.subject)
    first = next(records(parse_source(str(path)), "text"), None)
    if adapt is hellaswag and first and "query" in first.fields:
        # Such records are past the cleaning that the definition would do.
        changes["process_docs"] = None
    reads = partial(read_items, files, adapt)
    return changes | {"custom_dataset": reads, "dataset_kwargs": None}


def unreachable(dataset: str) -> str | None:
    """Return why a dataset of the hub cannot be had, or None where it can, or is in the cache."""
    if "/" not in dataset or Path(dataset).exists():
        return None
    try:
        HfApi().dataset_info(dataset, timeout=HUB_SECONDS)
    except (HTTPError, OSError) as error:
        cache = Path(os.environ.get("HF_DATASETS_CACHE", f"{constants.HF_HOME}/datasets"))
        wanted = _bare(dataset)
        if any(_bare(folder.name) == wanted for folder in cache.glob("*___*")):
            return None
        return str(error).strip().splitlines()[0]
    return None


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


class Missing(UserError):
    """The items of a task cannot be had."""


def _nowhere(name: str, folder: str, split: str, places: Sequence[Path], hub: str) -> Missing:
    where = f"in {_listed(places)}" if places else "here (no directory is given with --data)"
    return Missing(
        f"the items of {name} cannot be had: there is no {folder}/{split}.jsonl (nor .jsonl.gz, "
        f".jsonl.zst, .parquet) {where}, and the hub does not give {hub}"
    )


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, [*known, *VARIANTS, ANSWERS], n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"there is no task {name}{hint}"


def _listed(places: Sequence[Path]) -> str:
    return ", ".join(map(str, places))
