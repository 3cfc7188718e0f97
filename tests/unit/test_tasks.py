"""What is asked for is found in any layout, and what is wrong is told before a model loads."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from huggingface_hub.errors import OfflineModeIsEnabled

from rondo.config import EvalConfig
from rondo.errors import UserError
from rondo.evaluation import harness, items, tasks
from rondo.evaluation.tasks import HarnessTask, TaskPlan, TextTask, plan_tasks

MADE_UP = Path(__file__).parents[1] / "data"
SUBJECTS = ("algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a network, and with nothing in the cache."""

    class Api:
        def dataset_info(self, name: str, timeout: float) -> None:
            raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(tasks, "HfApi", Api)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "no-cache"))


def plan(*names: str, data: Any = (MADE_UP,), **settings: Any) -> TaskPlan:
    where = tuple(str(one) for one in data)
    return plan_tasks(EvalConfig(model="model", tasks=names, data=where, **settings))


def refusal(*names: str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        plan(*names, **settings)
    return str(caught.value)


def put(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaded(task: HarnessTask, **settings: Any) -> dict[str, Any]:
    return harness.load(task, EvalConfig(model="model", **settings))


def first(task: HarnessTask) -> tuple[str, Any, Any]:
    """Prompt, options and target of the first item, by the harness's own definition."""
    (made,) = loaded(task).values()
    doc = made.eval_docs[0]
    options = made.doc_to_choice(doc) if made.config.doc_to_choice else None
    return made.doc_to_text(doc), options, made.doc_to_target(doc)


# What is asked for


def test_nothing_asked_for_is_the_loss_of_the_held_out_samples() -> None:
    assert plan(data=()) == TaskPlan(
        (TextTask("math-test", "math-test"), TextTask("general-test", "general-test")), ()
    )


def test_files_alone_are_texts_and_the_samples_are_left(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("A line.")
    found = plan(data=(text, f"mine={text}", text, "math-test"))
    assert [(one.name, one.spec) for one in found.texts] == [
        ("notes", str(text)), ("mine", f"mine={text}"), ("math-test", "math-test")
    ]  # fmt: skip


def test_names_are_apart_by_commas_and_spaces_and_count_once() -> None:
    found = plan("piqa, winogrande", "arc_easy piqa", "")
    assert [one.name for one in found.harness] == ["piqa", "winogrande", "arc_easy"]
    assert found.texts == ()


def test_tasks_and_texts_are_measured_together() -> None:
    found = plan("piqa", data=(MADE_UP, "general-test"))
    assert [one.name for one in found.texts] == ["general-test"]
    assert [one.name for one in found.harness] == ["piqa"]


def test_the_suite_of_mathematics() -> None:
    found = plan(suite=("math",))
    assert found.texts == (
        TextTask("gsm8k_answers", str(MADE_UP / "gsm8k/test.jsonl"), True, "math"),
    )
    assert [(one.name, one.base, one.suite) for one in found.harness] == [
        ("gsm8k_paper", "gsm8k_cot", "math"), ("minerva_math", "minerva_math", "math")
    ]  # fmt: skip
    assert len(found.harness[1].names) == 8


def test_the_suite_of_knowledge(tmp_path: Path) -> None:
    item = {"question": "?", "choices": ["a", "b"], "label": 0}
    put(tmp_path / "arc_challenge/test.jsonl", item)
    found = plan(suite=("knowledge",), data=(MADE_UP, tmp_path))
    assert [one.name for one in found.harness] == list(tasks.SUITES["knowledge"])
    assert {one.suite for one in found.harness} == {"knowledge"}
    assert not any(one.generates for one in found.harness)


def test_a_task_of_a_suite_can_be_named_alone() -> None:
    found = plan("gsm8k_paper", "gsm8k_answers")
    assert [one.name for one in (*found.texts, *found.harness)] == ["gsm8k_answers", "gsm8k_paper"]
    assert found.harness[0].generates


def test_the_suite_of_losses_takes_folders_of_held_out_text(tmp_path: Path) -> None:
    put(tmp_path / "books/train.jsonl", {"text": "seen"})
    put(tmp_path / "books/validation.jsonl", {"text": "not seen"})
    put(tmp_path / "books/test.jsonl", {"text": "last"})
    put(tmp_path / "seen/train.jsonl", {"text": "seen"})
    put(tmp_path / "quiz/test.jsonl", {"question": "?"})
    put(tmp_path / "piqa/test.jsonl", {"text": "of a task"})
    (tmp_path / "tales").mkdir()
    with gzip.open(tmp_path / "tales/all.txt.gz", "wt") as file:
        file.write("Once.")
    found = plan(suite=("loss",), data=(tmp_path, "math-test"))
    assert [(one.name, one.spec, one.suite) for one in found.texts] == [
        ("math-test", "math-test", "loss"),
        ("books", str(tmp_path / "books/test.jsonl"), "loss"),
        ("tales", str(tmp_path / "tales/all.txt.gz"), "loss"),
    ]


# Where its items are


def test_the_papers_prompt_is_one_solved_example_and_the_question() -> None:
    (task,) = plan("gsm8k_paper").harness
    (made,) = loaded(task).values()
    made.set_fewshot_seed(0)
    made.build_all_requests(limit=1)
    prompt, how = made.instances[0].args
    shown, asked = prompt.split("\n\nQ: ")
    assert shown.startswith("Q: There are 15 trees")
    assert shown.endswith("The answer is 6.")
    step = "\n\nA: Let's think step by step."
    assert step in shown
    assert asked == f"Ann has 3 pears and buys 4. How many has she?{step}"
    assert how["until"] == ["Q:", "</s>", "<|im_end|>"]
    assert not how["do_sample"]


def test_plain_and_hub_records_are_the_same_items(tmp_path: Path) -> None:
    plain = {"question": "What barks?", "choices": ["a tree", "a dog"], "label": 1}
    hub = plain | {"choices": {"text": ["a tree", "a dog"], "label": ["A", "B"]}, "answerKey": "B"}
    expected = ("Question: What barks?\nAnswer:", ["a tree", "a dog"], 1)
    for number, row in enumerate((plain, hub)):
        put(tmp_path / str(number) / "arc_easy/test.jsonl", row)
        (task,) = plan("arc_easy", data=(tmp_path / str(number),)).harness
        assert first(task) == expected


def test_hellaswag_is_cleaned_by_the_harness_unless_it_is_clean(tmp_path: Path) -> None:
    hub = {
        "ctx_a": "A man sits [step] down.", "ctx_b": "he", "activity_label": "Resting",
        "endings": ["sleeps [title] well.", "runs."], "label": "1",
    }  # fmt: skip
    put(tmp_path / "hellaswag/validation.jsonl", hub)
    (task,) = plan("hellaswag", data=(tmp_path,)).harness
    assert first(task) == ("Resting: A man sits down. He", ["sleeps. well.", "runs."], 1)
    (task,) = plan("hellaswag").harness
    prompt, options, target = first(task)
    assert prompt == "Baking: A man kneads dough on a table. He"
    assert (options[0], target) == ("puts it into a warm oven.", 0)


def test_the_other_tasks_are_read_as_the_harness_shows_them(tmp_path: Path) -> None:
    (task,) = plan("piqa").harness
    options = ["Push a wedge under it.", "Pour soup over it."]
    assert first(task) == ("Question: Keep a door open.\nAnswer:", options, 0)
    (task,) = plan("openbookqa").harness
    assert first(task)[::2] == ("A kettle on a fire will", 1)
    (task,) = plan("winogrande").harness
    number, contexts, rest = first(task)
    assert (number, rest) == (0, "was too tall.")
    assert contexts[1].endswith("because the shelf")
    (task,) = plan("gsm8k", num_fewshot=2).harness
    assert first(task)[0].startswith("Question: Ann has 3 pears")


def test_any_file_type_is_found_and_the_split_that_the_task_evaluates_goes_first(
    tmp_path: Path,
) -> None:
    item = {"goal": "Go.", "sol1": "a", "sol2": "b", "label": 0}
    put(tmp_path / "piqa/test.jsonl", item)
    (task,) = plan("piqa", data=(tmp_path,)).harness
    assert (task.source, len(loaded(task)["piqa"].eval_docs)) == (
        str(tmp_path / "piqa/test.jsonl"), 1
    )  # fmt: skip
    packed = tmp_path / "piqa/validation.jsonl.gz"
    with gzip.open(packed, "wt") as file:
        file.write(json.dumps(item) + "\n" + json.dumps(item | {"label": "1"}) + "\n")
    (task,) = plan("piqa", data=(tmp_path,)).harness
    assert (task.source, len(loaded(task)["piqa"].eval_docs)) == (str(packed), 2)


@pytest.mark.parametrize("layout", ["one file", "a file each", "a folder each", "the task's name"])
def test_math_is_found_by_subject_in_each_layout(tmp_path: Path, layout: str) -> None:
    lines = (MADE_UP / "minerva_math/test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    folder = tmp_path / "minerva_math"
    for row in rows:
        subject = {"Counting & Probability": "counting_and_probability"}.get(
            row["type"], row["type"].lower().replace(" ", "_")
        )
        leaf = {"counting_and_probability": "counting_and_prob", "number_theory": "num_theory",
                "precalculus": "precalc"}.get(subject, subject)  # fmt: skip
        path = {
            "one file": folder / "test.jsonl",
            "a file each": folder / f"{subject}.jsonl",
            "a folder each": folder / subject / "test.jsonl",
            "the task's name": tmp_path / f"minerva_math_{leaf}" / "test.jsonl",
        }[layout]
        before = path.read_text() if path.exists() else ""
        put(path, row)
        path.write_text(before + path.read_text())
    (task,) = plan("minerva_math", data=(tmp_path,)).harness
    found = {leaf: [doc["problem"] for doc in one.eval_docs] for leaf, one in loaded(task).items()}
    assert len(found) == 7
    assert found["minerva_math_algebra"] == ["Solve $x + 2 = 5$.", "What is $7 + 1$?"]
    assert found["minerva_math_counting_and_prob"] == ["What is $1 + 1$?"]
    assert found["minerva_math_precalc"] == ["What is $6 + 1$?"]


def test_any_task_of_the_users_own_is_found_and_reads_local_files_as_they_are(
    tmp_path: Path,
) -> None:
    definition = {
        "task": "riddles", "dataset_path": "nobody/riddles", "output_type": "multiple_choice",
        "test_split": "test", "doc_to_text": "{{riddle}}", "doc_to_target": "{{right}}",
        "doc_to_choice": "{{options}}", "metadata": {"version": 1},
    }  # fmt: skip
    put(tmp_path / "own/riddles.yaml", definition)
    put(tmp_path / "data/riddles/test.jsonl", {"riddle": "?", "options": ["a", "b"], "right": 1})
    found = plan("riddles", data=(tmp_path / "data",), include_path=str(tmp_path / "own"))
    settings = {"include_path": str(tmp_path / "own")}
    (made,) = loaded(found.harness[0], **settings).values()
    assert made.doc_to_target(made.eval_docs[0]) == 1


# What cannot be


def test_a_task_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    # The whole index takes seconds to read.
    monkeypatch.setattr(harness, "definitions", lambda name, path: {})
    monkeypatch.setattr(harness, "known_names", lambda path: ["arc_easy", "piqa"])
    assert refusal("arc_eazy") == "there is no task arc_eazy; did you mean arc_easy?"
    assert "did you mean gsm8k_paper or" in refusal("gsm8k_pape")
    assert refusal("xyzzy") == "there is no task xyzzy"
    assert "--suite knowledge" in refusal("knowledge")


def test_items_that_are_nowhere(tmp_path: Path) -> None:
    said = refusal("arc_challenge")
    assert "there is no arc_challenge/test.jsonl (nor .jsonl.gz, .jsonl.zst, .parquet)" in said
    assert f"in {MADE_UP}" in said
    assert said.endswith("does not give allenai/ai2_arc: no network")
    assert "hellaswag/validation.jsonl" in refusal("hellaswag", data=())
    assert "no directory is given with --data" in refusal("hellaswag", data=())
    assert "gsm8k/test.jsonl" in refusal("gsm8k_answers", data=())
    assert "EleutherAI/hendrycks_math: no network" in refusal("minerva_math", data=())
    put(tmp_path / "minerva_math/algebra.jsonl", {"problem": "?", "solution": "$\\boxed{1}$"})
    said = refusal("minerva_math", data=(tmp_path,))
    assert "minerva_math_counting_and_prob cannot be had" in said


def test_a_suite_can_be_had_without_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"to go without it: --tasks arc_challenge,hellaswag,piqa"):
        plan_tasks(EvalConfig(model="x", suite=("knowledge",)))


def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    (tmp_path / "no-cache" / "EleutherAI___hendrycks_math").mkdir(parents=True)
    assert tasks.unreachable("EleutherAI/hendrycks_math") is None
    assert tasks.unreachable("openai/gsm8k") == "no network"


GOOD: dict[str, dict[str, Any]] = {
    "arc_easy": {"question": "?", "choices": ["a", "b"], "label": 0},
    "openbookqa": {"question_stem": "?", "choices": {"text": ["a"], "label": ["A"]},
                   "answerKey": "A"},
    "hellaswag": {"query": "?", "endings": ["a", "b"], "label": 1},
    "piqa": {"goal": "?", "sol1": "a", "sol2": "b", "label": 1},
    "winogrande": {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "2"},
    "gsm8k_paper": {"question": "?", "answer": "#### 1"},
    "minerva_math": {"problem": "?", "solution": "$\\boxed{1}$", "type": "Algebra"},
}  # fmt: skip
BAD = [
    ("arc_easy", "question", None, "no `question` that is a text"),
    ("arc_easy", "choices", "ab", "no `choices` that is a list"),
    ("arc_easy", "label", 2, "no `label` that is one of 0 to 1"),
    ("openbookqa", "answerKey", "B", "no `choices` with `text` and the `label` B"),
    ("hellaswag", "label", "", "no `label` that is one of 0 to 1"),
    ("hellaswag", "endings", None, "no `endings` that is a list"),
    ("piqa", "sol2", None, "no `sol2` that is a text"),
    ("piqa", "label", -1, "no `label` that is one of 0 to 1"),
    ("winogrande", "answer", "3", "no `answer` that is one of 1 to 2"),
    ("winogrande", "sentence", "a b", "no _ in its `sentence`"),
    ("gsm8k_paper", "answer", 7, "no `answer` that is a text"),
    ("minerva_math", "type", None, "no `type` that is a text"),
    ("minerva_math", "solution", "1", "no \\boxed answer in its `solution`"),
]


@pytest.mark.parametrize(("task", "field", "value", "said"), BAD)
def test_a_record_without_a_field_that_is_needed(
    tmp_path: Path, task: str, field: str, value: Any, said: str
) -> None:
    good = GOOD[task]
    folder = {"gsm8k_paper": "gsm8k"}.get(task, task)
    split = "validation" if task in ("hellaswag", "piqa", "winogrande") else "test"
    path = put(tmp_path / folder / f"{split}.jsonl", good, good | {field: value})
    assert refusal(task, data=(tmp_path,)) == f"{path}, line 2 has {said}" + (
        " for the options" if "_ in" in said else ""
    )


def test_files_that_hold_nothing_or_do_not_fit(tmp_path: Path) -> None:
    path = put(tmp_path / "piqa/validation.jsonl")
    assert refusal("piqa", data=(tmp_path,)) == f"{path} holds no item"
    path = put(tmp_path / "gsm8k_cot_zeroshot/test.jsonl", {"problem": "?"})
    assert f"{path}, line 1 has no `question`" in refusal("gsm8k_cot_zeroshot", data=(tmp_path,))


def test_solved_examples_come_from_items_that_are_not_measured(tmp_path: Path) -> None:
    item = {"question": "?", "choices": ["a", "b"], "label": 0}
    put(tmp_path / "arc_easy/test.jsonl", item)
    said = refusal("arc_easy", data=(tmp_path,), num_fewshot=2)
    assert f"{tmp_path / 'arc_easy/train.jsonl'}, which is not there" in said
    put(tmp_path / "arc_easy/validation.jsonl", item, item, item)
    assert plan("arc_easy", data=(tmp_path,), num_fewshot=2)
    put(tmp_path / "gsm8k/test.jsonl", GOOD["gsm8k_paper"])
    assert "gsm8k/train.jsonl" in refusal("gsm8k", data=(tmp_path,))
    assert plan("gsm8k", data=(tmp_path,), num_fewshot=0)
    assert "knows 8 solved examples, and 9 are to be shown" in refusal("gsm8k_paper", num_fewshot=9)


def test_the_extra_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rondo.evaluation.harness", None)
    said = refusal("arc_easy")
    assert said == 'arc_easy needs lm-evaluation-harness: pip install "rondo-lm[eval]"'
    assert plan("gsm8k_answers").texts


def test_mathematics_is_verified_by_a_package_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    assert refusal("minerva_math").startswith("minerva_math needs math-verify: pip install")
    assert plan("gsm8k_paper").harness


def test_two_of_one_name(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", {"text": "a"})
    put(tmp_path / "b/a.txt", "a")
    said = refusal(data=(tmp_path / "a.jsonl", tmp_path / "b/a.txt"))
    assert said == "two of what is measured are called a: give a text as NAME=PATH"
    assert "called minerva_math_algebra" in refusal("minerva_math", "minerva_math_algebra")


def test_directories_without_text(tmp_path: Path) -> None:
    assert f"no folder of text (.txt, or records with `text`) in {MADE_UP}" in refusal()
    assert "--include-path nowhere is no directory" in refusal("piqa", include_path="nowhere")


def test_every_form_is_of_a_dataset_that_the_harness_names() -> None:
    named = {
        one["dataset_path"]
        for suite in tasks.SUITES.values()
        for name in suite if name != tasks.ANSWERS
        for one in harness.definitions(tasks.VARIANTS.get(name, (name,))[0], None).values()
    }  # fmt: skip
    assert named <= items.FORMS.keys()
