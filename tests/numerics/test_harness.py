"""lm-evaluation-harness in process gives its own numbers, at every depth, out of one pass."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from conftest import byte_tokenizer, recurrent
from rondo.config import EvalConfig
from rondo.errors import UserError
from rondo.evaluation import harness
from rondo.evaluation.ledger import Ledger
from rondo.evaluation.lm import RondoLM, Sweep
from rondo.evaluation.outcome import Outcome
from rondo.evaluation.scores import most_frequent, voting
from rondo.evaluation.subject import load_subject
from rondo.evaluation.tasks import HarnessTask, plan_tasks
from rondo.processes import World

MADE_UP = Path(__file__).parents[1] / "data"
ALONE = World(0, 1, torch.device("cpu"))
LIKELIHOODS = ("arc_easy", "hellaswag", "piqa", "winogrande", "openbookqa")
DEPTHS = (1, 2, 5)
# Short ones, with stops that a random model meets.
SHORT = {"until": ["th", "!"], "max_gen_toks": 24, "do_sample": False}

Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def parent(tiny_base: Saved) -> Path:
    return tiny_base("llama")


def save(directory: Path, **fields: Any) -> Path:
    recurrent("llama", max_recurrences=8, **fields).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("looped"))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("noisy"), state_init="normal", state_std=1.0)


@pytest.fixture(scope="module")
def tasks() -> dict[str, HarnessTask]:
    names = (*LIKELIHOODS, "gsm8k_paper", "minerva_math")
    config = EvalConfig(model="", tasks=names, data=(str(MADE_UP),))
    return {
        one.name: replace(
            one,
            overrides={
                leaf: changes | ({"generation_kwargs": SHORT} if one.generates else {})
                for leaf, changes in one.overrides.items()
            },
        )
        for one in plan_tasks(config).harness
    }


def settings(directory: Path, **fields: Any) -> EvalConfig:
    fields = {"recurrences": DEPTHS, "batch_size": 3, "dtype": "float32"} | fields
    return EvalConfig(model=str(directory), **fields)


def measured(
    directory: Path,
    out: Path,
    *asked: HarnessTask,
    seed: int = 0,
    samples: int = 1,
    resume: bool = False,
    **fields: Any,
) -> list[Outcome]:
    config = settings(directory, **fields)
    subject = load_subject(directory, config, torch.device("cpu"))
    ledger = Ledger(out / "eval", {}, ALONE, resume=resume, overwrite=not resume)
    return harness.measure_tasks(subject, asked, ledger, config, seed, samples)


def swept(
    directory: Path, out: Path, task: HarnessTask, seed: int = 0, **fields: Any
) -> dict[int, Any]:
    """By depth, what the harness logs of each item."""
    config = settings(directory, **fields)
    subject = load_subject(directory, config, torch.device("cpu"))
    sweep = Sweep(subject, Ledger(out / "sweep", {}, ALONE, overwrite=True), config, seed)
    (made,) = harness.load(task, config).values()
    results = harness.results_by_depth(sweep, task.name, made, config)
    sweep.ledger.finish()
    return {depth: one["samples"][task.name] for depth, one in results.items()}


def by_harness(lm: Any, task: HarnessTask, **fields: Any) -> Any:
    """What the harness itself logs of each item with a model of its own."""
    (made,) = harness.load(task, settings(Path(), **fields)).values()
    made.set_fewshot_seed(1234)
    found = evaluate(lm, {"tasks": {task.name: made}}, bootstrap_iters=0)
    assert found
    return found["samples"][task.name]


def assert_same(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Texts and metrics are the same, and log-probabilities to the last digits of float32."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one["arguments"] == other["arguments"]
        for mine, its in zip(one["resps"], other["resps"], strict=True):
            if isinstance(its[0], str):
                assert mine == its
            else:
                assert mine[0] == (pytest.approx(its[0][0], rel=1e-6), its[0][1])
        for metric in other["metrics"]:
            assert one[metric] == other[metric]


# The harness's own numbers


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_of_a_parent_are_those_of_the_harness(
    parent: Path, tmp_path: Path, tasks: dict[str, HarnessTask], name: str
) -> None:
    ours = swept(parent, tmp_path, tasks[name])
    assert list(ours) == [1]
    theirs = by_harness(HFLM(str(parent), device="cpu", batch_size=2), tasks[name])
    assert_same(ours[1], theirs)


def test_texts_of_a_parent_are_those_of_the_harness(
    parent: Path, tmp_path: Path, tasks: dict[str, HarnessTask]
) -> None:
    ours = swept(parent, tmp_path, tasks["gsm8k_paper"])[1]
    theirs = by_harness(HFLM(str(parent), device="cpu", batch_size=3), tasks["gsm8k_paper"])
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["arc_easy", "gsm8k_paper"])
def test_a_sweep_is_what_our_model_in_the_harness_says_at_each_depth(
    looped: Path, tmp_path: Path, tasks: dict[str, HarnessTask], name: str
) -> None:
    ours = swept(looped, tmp_path, tasks[name])
    assert tuple(ours) == DEPTHS
    for depth in DEPTHS:
        lm = RondoLM(str(looped), num_recurrences=depth, device="cpu", batch_size=2)
        assert_same(ours[depth], by_harness(lm, tasks[name]))
    assert len({json.dumps([one["resps"] for one in ones]) for ones in ours.values()}) == 3
    alone = swept(looped, tmp_path, tasks[name], recurrences=(2,), batch_size=1)
    assert_same(alone[2], ours[2])


@pytest.mark.parametrize("name", ["piqa", "gsm8k_paper"])
def test_noise_in_the_initial_state_is_that_of_the_seed(
    noisy: Path, tmp_path: Path, tasks: dict[str, HarnessTask], name: str
) -> None:
    ours = {seed: swept(noisy, tmp_path, tasks[name], seed=seed) for seed in (0, 7)}
    for seed in ours:
        lm = RondoLM(str(noisy), num_recurrences=2, state_seed=seed, device="cpu", batch_size=2)
        assert_same(ours[seed][2], by_harness(lm, tasks[name]))
    one, other = ([item["resps"] for item in ones[1]] for ones in ours.values())
    assert one != other


@pytest.mark.parametrize("name", ["hellaswag", "winogrande", "gsm8k_paper"])
def test_the_size_of_batches_changes_nothing(
    looped: Path, tmp_path: Path, tasks: dict[str, HarnessTask], name: str
) -> None:
    one, other = (swept(looped, tmp_path, tasks[name], batch_size=size) for size in (1, 16))
    for depth in DEPTHS:
        assert_same(one[depth], other[depth])


def own_task(directory: Path, **fields: Any) -> HarnessTask:
    """A task of the user's own, over records with a `text`."""
    name = "texts"
    lines = [{"text": "the rain in the inner hen " * count} for count in (1, 13, 25)]
    (directory / name).mkdir()
    (directory / name / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    definition = {"task": name, "dataset_path": "nobody/texts", "test_split": "test"} | fields
    (directory / "texts.yaml").write_text(json.dumps(definition))
    where = {"data": (str(directory),), "include_path": str(directory)}
    (task,) = plan_tasks(EvalConfig(model="", tasks=(name,), **where)).harness
    return task


def test_whole_texts_are_measured_in_the_harnesss_windows(looped: Path, tmp_path: Path) -> None:
    task = own_task(
        tmp_path, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}"
    )
    own = {"include_path": str(tmp_path)}
    ours = swept(looped, tmp_path, task, **own)
    lm = RondoLM(str(looped), num_recurrences=5, device="cpu")
    # The longest is longer than the model's 256 positions.
    assert [len(lm.tok_encode(one["doc"]["text"])) > 256 for one in ours[5]][1:] == [False, True]
    for one, other in zip(ours[5], by_harness(lm, task, **own), strict=True):
        assert one["resps"][0][0] == pytest.approx(other["resps"][0][0], rel=1e-6)
    (outcome,) = measured(looped, tmp_path, task, **own)
    assert outcome.described["metric"] == "bits_per_byte"
    assert not outcome.described["higher_is_better"]
    total = sum(outcome.items["values"]["5"]) / sum(outcome.items["weights"])
    assert outcome.scores["bits_per_byte"][5].value == pytest.approx(total)


def test_solved_examples_are_those_that_the_harness_draws(
    looped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvalConfig(model="", tasks=("gsm8k",), data=(str(MADE_UP),), num_fewshot=2)
    (task,) = plan_tasks(config).harness
    task = replace(
        task, overrides={"gsm8k": {**task.overrides["gsm8k"], **{"generation_kwargs": SHORT}}}
    )
    runs, work = [], Ledger.run
    monkeypatch.setattr(Ledger, "run", lambda *words: runs.append(words) or work(*words))
    ours = swept(looped, tmp_path, task, num_fewshot=2, recurrences=(1, 2))
    lm = RondoLM(str(looped), num_recurrences=2, device="cpu", batch_size=2)
    theirs = by_harness(lm, task, num_fewshot=2)
    assert theirs[0]["arguments"][0][0].count("Question: What is") == 2
    assert_same(ours[2], theirs)
    # Each depth draws the same examples, so that all was measured in one go.
    assert len(runs) == 1


# Work that is kept


def plain(outcomes: Sequence[Outcome]) -> list[Any]:
    return [replace(one, seconds=0.0) for one in outcomes]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_stopped_evaluation_goes_on_to_the_same_numbers(
    looped: Path,
    tmp_path: Path,
    tasks: dict[str, HarnessTask],
    monkeypatch: pytest.MonkeyPatch,
    samples: int,
) -> None:
    asked = (tasks["piqa"], tasks["gsm8k_paper"])
    whole = measured(looped, tmp_path / "whole", *asked, samples=samples)
    left = [2]
    work = Sweep._continue

    def _continue(self: Sweep, batch: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return work(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "_continue", _continue)
        with pytest.raises(KeyboardInterrupt):
            measured(looped, tmp_path / "stopped", *asked, samples=samples)
    done = []

    def counted(self: Sweep, batch: Any) -> Any:
        done.append(batch)
        return work(self, batch)

    counted.__name__ = "_continue"
    monkeypatch.setattr(Sweep, "_continue", counted)
    again = measured(looped, tmp_path / "stopped", *asked, samples=samples, resume=True)
    # 4 prompts at 3 depths, in batches of 3.
    assert len(done) == 4 * samples - 2
    assert plain(again) == plain(whole)


# What is told of a task


def test_a_task_is_described(looped: Path, tmp_path: Path, tasks: dict[str, HarnessTask]) -> None:
    asked = (tasks["arc_easy"], tasks["winogrande"], tasks["gsm8k_paper"])
    arc, schemas, texts = measured(looped, tmp_path, *asked)
    assert {key: value for key, value in arc.described.items() if key != "sha256"} == {
        "kind": "likelihood",
        "metric": "acc_norm",
        "higher_is_better": True,
        "chance": pytest.approx((4 * 1 / 4 + 1 / 3 + 1 / 5) / 6),
        "source": str(MADE_UP / "arc_easy/test.jsonl"),
        "items": 6,
        "num_fewshot": 0,
        "suite": None,
        "truncated": 0,
        "samples": 1,
    }
    assert list(arc.scores) == ["acc_norm", "acc"]
    assert list(texts.scores) == ["exact_match", "exact_match,strict-match"]
    assert (texts.described["kind"], texts.described["chance"]) == ("generation", 0.0)
    assert texts.described["truncated"] == 4 * len(DEPTHS)
    assert texts.described["num_fewshot"] == 1
    for one in (arc, schemas, texts):
        assert len(one.described["sha256"]) == 64
        values = one.items["values"]
        assert list(values) == ["1", "2", "5"]
        for depth in DEPTHS:
            score = one.scores[one.described["metric"]][depth]
            assert score.value == sum(values[str(depth)]) / len(one.items["weights"])
        assert [line["item"] for line in one.samples] == list(range(one.described["items"]))
        assert [line["values"]["2"] for line in one.samples] == values["2"]
    line = arc.samples[1]
    assert line["prompt"] == "Question: What does a lamp give?\nAnswer:"
    assert line["target"] == "light"
    assert set(line["answers"].values()) <= {"light", "water", "bread"}
    assert schemas.samples[2]["prompt"] == "... was thin."
    assert schemas.samples[2]["target"] == "The ball broke the window as the window"


def test_the_chosen_option_is_the_one_that_is_judged(
    looped: Path, tmp_path: Path, tasks: dict[str, HarnessTask]
) -> None:
    for outcome in measured(looped, tmp_path, tasks["arc_easy"], tasks["winogrande"]):
        for line in outcome.samples:
            for depth, answer in line["answers"].items():
                assert (answer == line["target"]) == bool(line["values"][depth])


def test_the_standard_error_is_the_harnesss(
    parent: Path, tmp_path: Path, tasks: dict[str, HarnessTask]
) -> None:
    (made,) = harness.load(tasks["arc_easy"], settings(parent)).values()
    lm = HFLM(str(parent), device="cpu")
    found: Any = evaluate(lm, {"tasks": {"arc_easy": made}})
    (outcome,) = measured(parent, tmp_path, tasks["arc_easy"])
    for metric in ("acc", "acc_norm"):
        expected = found["results"]["arc_easy"][f"{metric}_stderr,none"]
        assert outcome.scores[metric][1].stderr == pytest.approx(expected)


def test_tokens_through_the_model_are_counted(
    parent: Path, tmp_path: Path, tasks: dict[str, HarnessTask]
) -> None:
    (outcome,) = measured(parent, tmp_path, tasks["piqa"])
    tokenizer = byte_tokenizer()
    lengths = [
        len(tokenizer.encode(f"Question: {row['goal']}\nAnswer: {row[option]}")) - 1
        for row in map(json.loads, (MADE_UP / "piqa/validation.jsonl").read_text().splitlines())
        for option in ("sol1", "sol2")
    ]
    assert outcome.lengths[1].per_item == pytest.approx(sum(lengths) / 4)
    assert outcome.lengths[1].read == pytest.approx(sum(lengths) / 8)


def test_each_text_ends_at_its_own_stop(
    parent: Path, tmp_path: Path, tasks: dict[str, HarnessTask]
) -> None:
    """Left to the harness, all rows of a batch would run until they have met the same stop."""
    config = settings(parent, batch_size=4)
    subject = load_subject(parent, config, torch.device("cpu"))
    sweep = Sweep(subject, Ledger(tmp_path / "one", {}, ALONE), config, 0)
    (made,) = harness.load(tasks["gsm8k_paper"], config).values()
    harness.results_by_depth(sweep, "texts", made, config)
    sweep.ledger.finish()
    new = [written for _, _, written in sweep.lengths]
    assert len(set(new)) > 1
    assert max(new) <= 24
    # A token of a byte-level tokenizer is a character at the most, and a stop has two.
    for text, length in zip(sweep.texts.values(), new, strict=True):
        assert length <= len(text) + 2


def test_a_group_is_its_tasks_and_all_their_items_together(
    parent: Path, tmp_path: Path, tasks: dict[str, HarnessTask]
) -> None:
    *parts, whole = measured(parent, tmp_path, tasks["minerva_math"])
    assert [one.name for one in parts] == [*tasks["minerva_math"].names[1:]]
    assert (whole.name, whole.described["items"], whole.described["metric"]) == (
        "minerva_math", 8, "math_verify"
    )  # fmt: skip
    values = [value for one in parts for value in one.items["values"]["1"]]
    assert whole.items["values"]["1"] == values
    assert whole.lengths[1].per_item == pytest.approx(
        sum(one.lengths[1].per_item * one.described["items"] for one in parts) / 8
    )
    assert whole.scores["math_verify"][1].value == sum(whole.items["values"]["1"]) / 8


# Several samples


def test_the_most_frequent_answer_counts(tasks: dict[str, HarnessTask]) -> None:
    (made,) = harness.load(tasks["gsm8k_paper"], settings(Path())).values()
    made = voting(made, 3, 0.7)
    assert made.config.repeats == 3
    assert made.config.generation_kwargs == SHORT | {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
    }
    made.set_fewshot_seed(0)
    made.build_all_requests(limit=1)
    (instance,) = made.instances
    instance.resps = ["It is 9.", "So 3 + 4 is 7", "The answer is 7.", "Well.", "Hm."]
    made.apply_filters()
    assert instance.filtered_resps == {"strict-match": "7", "flexible-extract": "7"}
    assert made.process_results(instance.doc, ["7."]) == {"exact_match": 1.0}


def test_answers_are_told_apart_as_the_metric_does() -> None:
    assert most_frequent(["9", "$1,000.", "1000"], ["\\$", ",", "\\.$"]) == "$1,000."
    assert most_frequent(["No", "yes", "YES"]) == "yes"
    assert most_frequent(["[invalid]", "[invalid]", "3"]) == "3"
    assert most_frequent(["[invalid]", "[invalid]"]) == "[invalid]"
    texts = ["So", "x. The final answer is $1$. I hope", "y. The final answer is $1$. I hope"]
    assert most_frequent(texts, answer=r"The final answer is(.*?)\. I hope") == texts[1]


def test_samples_differ_among_themselves_and_by_seed_and_never_by_chance(
    parent: Path, tmp_path: Path, tasks: dict[str, HarnessTask]
) -> None:
    def drawn(seed: int) -> list[str]:
        config = settings(parent)
        subject = load_subject(parent, config, torch.device("cpu"))
        sweep = Sweep(subject, Ledger(tmp_path / "one", {}, ALONE, overwrite=True), config, seed)
        (made,) = harness.load(tasks["gsm8k_paper"], config).values()
        harness.results_by_depth(sweep, "texts", voting(made, 3, 1.0), config)
        sweep.ledger.finish()
        return list(sweep.texts.values())

    one = drawn(0)
    torch.manual_seed(5)
    assert len(one) == 12
    assert len(set(one)) > 4
    assert drawn(0) == one != drawn(1)


def test_tasks_of_likelihood_have_no_samples(
    parent: Path, tmp_path: Path, tasks: dict[str, HarnessTask]
) -> None:
    asked = (tasks["piqa"], tasks["gsm8k_paper"])
    (outcome,) = measured(parent, tmp_path, *asked, samples=2)
    assert outcome.name == "gsm8k_paper"


# Settings


def test_limit_solved_examples_and_template_reach_the_harness(
    parent: Path, tmp_path: Path, tasks: dict[str, HarnessTask]
) -> None:
    with pytest.raises(UserError, match="has no chat template: leave --apply-chat-template"):
        measured(parent, tmp_path, tasks["piqa"], apply_chat_template=True)
    directory = tmp_path / "model"
    directory.mkdir()
    for path in parent.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(directory)
    where = {"limit": 2, "num_fewshot": 1, "apply_chat_template": True}
    (outcome,) = measured(directory, tmp_path, tasks["gsm8k_paper"], **where)
    assert outcome.described["items"] == 2
    prompt = outcome.samples[1]["prompt"]
    assert prompt.startswith("[user]Q: There are 15 trees")
    assert prompt.endswith("Let's think step by step.[assistant]")
    assert prompt.count("[assistant]") == 2


def test_texts_that_leave_no_room_for_a_prompt(parent: Path, tmp_path: Path) -> None:
    config = EvalConfig(model="", tasks=("gsm8k_paper",), data=(str(MADE_UP),))
    with pytest.raises(UserError, match="lets 256 tokens be generated, and the model was made"):
        measured(parent, tmp_path, *plan_tasks(config).harness)


def test_nothing_of_the_harness_reaches_the_screen(
    looped: Path,
    tmp_path: Path,
    tasks: dict[str, HarnessTask],
    capfd: pytest.CaptureFixture[str],
) -> None:
    measured(looped, tmp_path, tasks["hellaswag"], tasks["gsm8k_paper"])
    said = capfd.readouterr()
    assert said.out == ""
    # The one bar that is not of the harness; ours are drawn on terminals alone.
    assert re.sub(r"Loading weights:[^]]*]", "", said.err).strip() == ""


# Our model in the harness


def test_our_model_in_the_harness_knows_its_cap_length_and_depth(
    looped: Path, parent: Path
) -> None:
    lm = RondoLM(str(looped), device="cpu")
    assert lm.get_model_info()["num_recurrences"] == 4
    assert lm.max_length == 256
    with pytest.raises(UserError, match=r"num_recurrences=9 is beyond the cap of 8 of .*looped"):
        RondoLM(str(looped), num_recurrences=9, device="cpu")
    with pytest.raises(UserError, match="is a llama model, not a recurrent one: use --model hf"):
        RondoLM(str(parent), device="cpu")


@pytest.mark.slow
def test_our_model_is_known_to_the_harnesss_command_line(looped: Path, tmp_path: Path) -> None:
    definition = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(MADE_UP / "piqa/validation.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{goal}}",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(definition))
    words = [
        "--model", "rondo", "--model_args", f"pretrained={looped},num_recurrences=2",
        "--tasks", "mine", "--include_path", str(tmp_path), "--device", "cpu",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    run = f"from rondo.evaluation.harness import cli; cli({words})"
    subprocess.run([sys.executable, "-c", run], check=True, capture_output=True)
    (path,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(path.read_text())
    assert found["config"]["num_recurrences"] == 2
    assert found["results"]["mine"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
