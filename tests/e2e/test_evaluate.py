"""`rondo eval` as a user runs it, on tiny models: baselines, sweeps, stops, mistakes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import edit_weights, json_of, refusal, rondo, save_parent, tree

from rondo.evaluation.subject import Passage, Subject

TEXT = "\n\n".join(f"line {n} of a text that {'again ' * (n % 7)}" for n in range(60))
FAST = (
    "--batch.seq-len", 16, "--batch.micro-batch-size", 2, "--batch.global-batch-size", 4,
    "--budget.steps", 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, a converted model, a trained one and its static twin, as a user leaves them."""
    directory = tmp_path_factory.mktemp("eval")
    save_parent(directory / "parent", tie_word_embeddings=True)
    (directory / "text.txt").write_text(TEXT)
    (directory / "long.txt").write_text("word " * 100)
    pairs = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}."} for n in range(12)]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (directory / "data" / "gsm8k").mkdir(parents=True)
    (directory / "data" / "gsm8k" / "test.jsonl").write_text(lines)
    items = [
        {"question": f"What follows {n}?", "choices": [str(n + 1), "none"], "label": n % 2}
        for n in range(4)
    ]
    (directory / "data" / "arc_easy").mkdir()
    text = "".join(json.dumps(item) + "\n" for item in items)
    (directory / "data" / "arc_easy" / "test.jsonl").write_text(text)
    # Long enough for a worked example and an answer of the harness's length.
    save_parent(directory / "long-parent", max_position_embeddings=2048)
    long = directory / "long"
    assert rondo("convert", directory / "long-parent", long, "--sizes", "2,2,2") == 0
    model = directory / "model"
    assert rondo("convert", directory / "parent", model, "--sizes", "2,2,2") == 0
    for name, mode in (("run", "recurrent"), ("twin", "static")):
        words = ("--data.sources", directory / "text.txt", "--mode", mode, *FAST)
        assert rondo("train", model, "--output-dir", directory / "out" / name, *words) == 0
    return directory


def measure(made: Path, out: Path, model: str, *flags: object, data: str = "text.txt") -> Any:
    """Evaluate and return the results."""
    words = ("--data", made / data, "--output-dir", out, "--trace-tokens", 64, *flags)
    assert rondo("eval", made / model, *words) == 0
    return json_of(out / "results.json")["results"]


def values(result: Any, metric: str = "loss") -> dict[int, float]:
    return {
        row["num_recurrences"]: row["value"] for row in result["rows"] if row["metric"] == metric
    }


def test_a_model_is_measured_beside_its_parent_and_its_static_twin(
    made: Path, tmp_path: Path
) -> None:
    words = ("--against", "parent", "static", "--recurrences", 1, 3, "--limit", 12)
    results = measure(made, tmp_path / "eval", "out/run", *words)
    roles = [(one["model"]["role"], one["model"]["stage"]) for one in results]
    assert roles == [("recurrent", "after"), ("parent", "before"), ("static", "after")]
    assert [list(values(one)) for one in results] == [[1, 3], [1], [1]]
    assert len({one["tasks"]["text"]["sha256"] for one in results}) == 1
    ours, parent, static = results
    assert ours["model"]["trained_recurrence"] == 4
    assert [point["step"] for point in static["model"]["curve"]] == [1, 2]
    assert parent["model"]["curve"] == []
    assert [one["iteration"] for one in ours["states"]["iterations"]] == [1, 2, 3]
    assert parent["states"] is None
    assert {one["model"]["parent"] for one in results} == {"parent"}
    assert rondo("report", tmp_path / "eval", "--output-dir", tmp_path / "report") == 0
    assert (tmp_path / "report" / "report.html").is_file()


def test_an_untrained_model_is_its_parent_at_one_iteration(made: Path, tmp_path: Path) -> None:
    (parent,) = measure(made, tmp_path / "parent", "parent")
    (before,) = measure(made, tmp_path / "before", "model", "--recurrences", 1, 2)
    assert values(before)[1] == pytest.approx(values(parent)[1], rel=1e-6)
    assert values(before)[2] != pytest.approx(values(parent)[1], rel=1e-6)
    assert before["model"]["trained_recurrence"] is None


def test_one_trajectory_gives_the_losses_of_separate_passes(made: Path, tmp_path: Path) -> None:
    (together,) = measure(made, tmp_path / "all", "model", "--recurrences", 1, 2, 4)
    for depth in (1, 2, 4):
        (alone,) = measure(made, tmp_path / str(depth), "model", "--recurrences", depth)
        assert values(together)[depth] == pytest.approx(values(alone)[depth], rel=1e-6)
        theirs = together["items"]["text"]["values"][str(depth)]
        assert theirs == pytest.approx(alone["items"]["text"]["values"][str(depth)], rel=1e-5)


def test_the_batch_size_changes_nothing(made: Path, tmp_path: Path) -> None:
    words = ("--recurrences", 1, 3, "--dtype", "float32")
    found = [
        measure(made, tmp_path / str(size), "model", "--batch-size", size, *words)
        for size in (1, 7)
    ]
    (one,), (many,) = found
    for depth, losses in one["items"]["text"]["values"].items():
        assert losses == pytest.approx(many["items"]["text"]["values"][depth], rel=1e-5)


def test_items_make_up_the_value(made: Path, tmp_path: Path) -> None:
    (result,) = measure(made, tmp_path / "eval", "model", "--recurrences", 2)
    items, (row,) = result["items"]["text"], result["rows"]
    assert row["value"] == pytest.approx(sum(items["values"]["2"]) / sum(items["weights"]))
    described = result["tasks"]["text"]
    assert sum(items["weights"]) == described["tokens"]
    assert len(items["weights"]) == described["items"] == 60
    bits = row["value"] * described["tokens"] / math.log(2) / described["bytes"]
    assert row["bits_per_byte"] == pytest.approx(bits)


def test_the_loss_on_answers_leaves_the_questions_out(made: Path, tmp_path: Path) -> None:
    words = ("--tasks", "gsm8k_answers", "--recurrences", 1)
    (result,) = measure(made, tmp_path / "eval", "parent", *words, data="data")
    described = result["tasks"]["gsm8k_answers"]
    # A byte a token, and the space before each answer counts.
    assert described["tokens"] == sum(len(f" It is {2 * n}.") for n in range(12))
    assert values(result)[1] == pytest.approx(
        sum(result["items"]["gsm8k_answers"]["values"]["1"]) / described["tokens"]
    )


def test_a_stopped_evaluation_goes_on_and_ends_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--recurrences", 1, 3, "--batch-size", 4, "--against", "parent")
    whole = measure(made, tmp_path / "whole", "model", *words)
    predict, calls = Subject.predict, []

    def stopped(self: Subject, passages: list[Passage], seed: int = 0) -> Any:
        calls.append(passages)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return predict(self, passages, seed)

    monkeypatch.setattr(Subject, "predict", stopped)
    out = tmp_path / "halves"
    told = ("--data", made / "text.txt", "--output-dir", out, "--trace-tokens", 64, *words)
    capsys.readouterr()
    assert rondo("eval", made / "model", *told) == 130
    assert "--resume goes on" in capsys.readouterr().out
    assert not out.exists()
    assert rondo("eval", made / "model", *told) == 2
    assert "add --resume" in refusal(capsys)
    calls.clear()
    monkeypatch.setattr(Subject, "predict", lambda *a: calls.append(a) or predict(*a))
    assert rondo("eval", made / "model", *told, "--resume") == 0
    assert len(calls) == 2 * 15 - 8
    for one, other in zip(json_of(out / "results.json")["results"], whole, strict=True):
        assert one["items"] == other["items"]
        assert one["states"] == other["states"]
    assert not out.with_name("halves.unfinished").exists()


def test_an_evaluation_that_replaces_another_can_be_stopped_too(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = measure(made, tmp_path / "eval", "model", "--recurrences", 1, "--limit", 2)
    predict = Subject.predict

    def stopped(self: Subject, passages: list[Passage], seed: int = 0) -> Any:
        if len(passages) == 3:
            raise KeyboardInterrupt
        return predict(self, passages, seed)

    monkeypatch.setattr(Subject, "predict", stopped)
    told = ("--data", made / "text.txt", "--output-dir", tmp_path / "eval", "--limit", 15)
    command = ("eval", made / "model", *told, "--recurrences", 1, "--batch-size", 4, "--overwrite")
    assert rondo(*command) == 130
    (kept,) = json_of(tmp_path / "eval" / "results.json")["results"]
    assert kept["items"] == before["items"]
    monkeypatch.setattr(Subject, "predict", predict)
    assert rondo(*command, "--resume") == 0
    (after,) = json_of(tmp_path / "eval" / "results.json")["results"]
    assert after["tasks"]["text"]["items"] == 15


def test_resume_replaces_nothing_of_others(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out" / "run", tmp_path / "precious")
    before = tree(tmp_path)
    words = ("--data", made / "text.txt", "--limit", 2, "--output-dir", tmp_path / "precious")
    assert rondo("eval", made / "model", *words, "--resume") == 2
    assert tree(tmp_path) == before


def test_several_answers_of_the_parent_cost_what_depth_costs(made: Path, tmp_path: Path) -> None:
    words = ("--tasks", "gsm8k_paper", "--recurrences", 1, 5, "--limit", 2, "--against")
    (ours, many) = measure(made, tmp_path / "eval", "long", *words, "self-consistency", data="data")
    assert many["model"]["role"] == "self-consistency"
    samples = {row["samples"] for row in many["rows"]}
    (cheap, dear) = (ours["rows"][0]["flops_per_token"], ours["rows"][1]["flops_per_token"])
    assert samples == {round(dear / cheap)} == {2}
    assert many["conditions"]["seeds"] == [0]
    seconds = [row["seconds"] for row in ours["rows"] if row["metric"] == "exact_match"]
    # Each depth wrote its own answers, so that the two make up all of the time.
    assert seconds[0] < seconds[1] < 0.9 * sum(seconds)


def test_answers_are_kept_where_questions_are_long(made: Path, tmp_path: Path) -> None:
    pair = {"question": "word " * 30, "answer": "It is 4."}
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text(json.dumps(pair) + "\n")
    words = ("--tasks", "gsm8k_answers", "--data", tmp_path / "data", "--seq-len", 40)
    out = ("--output-dir", tmp_path / "eval")
    assert rondo("eval", made / "parent", *words, *out) == 0
    (result,) = json_of(tmp_path / "eval" / "results.json")["results"]
    assert result["tasks"]["gsm8k_answers"]["tokens"] == len(" It is 4.")
    assert result["tasks"]["gsm8k_answers"]["truncated"] == 1


def test_a_parent_that_lies_elsewhere_is_still_the_parent(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "parent", tmp_path / "moved")
    words = ("--recurrences", 1, "--limit", 2, "--against", f"parent={tmp_path / 'moved'}")
    ours, parent = measure(made, tmp_path / "eval", "out/run", *words)
    assert parent["model"]["parent"] == ours["model"]["parent"] == "parent"
    assert parent["model"]["path"] == str(tmp_path / "moved")


def test_documents_end_where_the_model_does(made: Path, tmp_path: Path) -> None:
    (result,) = measure(made, tmp_path / "eval", "parent", "--seq-len", 400, data="long.txt")
    described = result["tasks"]["long"]
    assert (described["tokens"], described["truncated"]) == (127, 1)


def test_seeds_that_decide_nothing_are_not_claimed(made: Path, tmp_path: Path) -> None:
    words = ("--seeds", 0, 1, 2, "--recurrences", 1, "--limit", 2)
    (result,) = measure(made, tmp_path / "eval", "model", *words)
    assert result["conditions"]["seeds"] == [0]


def test_two_twins_keep_their_samples_apart(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out" / "twin", tmp_path / "other")
    words = ("--tasks", "arc_easy", "--recurrences", 1, "--against")
    twins = (f"static={made / 'out' / 'twin'}", f"static={tmp_path / 'other'}")
    results = measure(made, tmp_path / "eval", "out/run", *words, *twins, data="data")
    labels = [result["model"]["label"] for result in results]
    assert labels == ["recurrent, trained", "static twin", "static twin (2)"]
    lines = (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["model"] for line in lines} == set(labels)


def test_a_seed_decides_where_a_loop_from_noise_begins(made: Path, tmp_path: Path) -> None:
    words = ("--sizes", "2,2,2", "--state-init", "normal", "--injection", "linear")
    assert rondo("convert", made / "parent", tmp_path / "noisy", *words) == 0
    common = ("--recurrences", 1, 3, "--limit", 10)
    shutil.copy(made / "text.txt", tmp_path / "text.txt")
    (both,) = measure(tmp_path, tmp_path / "both", "noisy", *common, "--seeds", 0, 1)
    alone = [
        measure(tmp_path, tmp_path / str(seed), "noisy", *common, "--seeds", seed)[0]
        for seed in (0, 1)
    ]
    for row in both["rows"]:
        depth = row["num_recurrences"]
        expected = [values(one)[depth] for one in alone]
        assert row["seed_values"] == pytest.approx(expected, rel=1e-6)
        assert row["value"] == pytest.approx(sum(expected) / 2)
    assert both["rows"][-1]["seed_values"][0] != both["rows"][-1]["seed_values"][1]


def test_altered_weights_change_the_loss(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    shutil.copy(made / "text.txt", tmp_path / "text.txt")
    edit_weights(tmp_path / "model", lambda tensors: tensors["model.norm.weight"].mul_(3))
    (before,) = measure(made, tmp_path / "a", "model", "--recurrences", 1)
    (after,) = measure(tmp_path, tmp_path / "b", "model", "--recurrences", 1)
    assert values(before)[1] != pytest.approx(values(after)[1], rel=1e-3)


def test_a_loss_that_is_none_is_told_as_such(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    edit_weights(tmp_path / "model", lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    shutil.copy(made / "text.txt", tmp_path / "text.txt")
    (result,) = measure(tmp_path, tmp_path / "eval", "model", "--limit", 1)
    assert set(values(result).values()) == {None}
    assert rondo("report", tmp_path / "eval", "--output-dir", tmp_path / "report") == 0


def test_the_output_is_named_after_the_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--data", made / "text.txt", "--limit", 2, "--recurrences", 1, "--trace-tokens", 0)
    assert rondo("eval", made / "out" / "run" / "final", *words) == 0
    assert (tmp_path / "out" / "eval-run" / "results.json").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("out/run", "--recurrences", "100"), "--recurrences 100 is beyond the model's cap of 64"),
        (("out/run", "--against", "random"), "no random twin"),
        (("out/run", "--against", "cousin"), "--against cousin: give parent, static"),
        (("out/run", "--against", "self-consistency"), "there is none among the tasks"),
        (("nothing/at/all",), "there is no directory"),
        (("out/run", "--tasks", "arc_hard"), "there is no task arc_hard"),
        (("out/run", "--against", "static=parent"), "no config.json"),
        (("parent", "--against", "parent"), "names no parent"),
        (("out/run", "--data", "absent.txt"), "there is no text absent.txt"),
        (
            ("out/run", "--tasks", "gsm8k_paper", "--data", "data", "--apply-chat-template"),
            "has no chat template: leave --apply-chat-template",
        ),
        (
            (
                "parent",
                "--tasks",
                "gsm8k_paper",
                "--data",
                "data",
                "--against",
                "self-consistency=parent",
            ),
            "needs a model with a loop",
        ),
        (
            (
                "out/run",
                "--tasks",
                "gsm8k_paper",
                "--data",
                "data",
                "--against",
                "self-consistency",
                "--recurrences",
                "1",
            ),
            "buys no second answer",
        ),
    ],
)
def test_a_mistake_is_told_in_one_sentence_and_nothing_is_written(
    made: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    capsys.readouterr()
    before = tree(made)
    if told == "no config.json":
        words = (*words[:-1], f"static={tmp_path}")
    assert rondo("eval", *words, "--output-dir", tmp_path / "eval") == 2
    assert told in refusal(capsys)
    assert list(tmp_path.iterdir()) == []
    assert tree(made) == before


def test_a_twin_of_another_kind_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", made / "text.txt", "--limit", 2, "--output-dir", tmp_path / "eval")
    capsys.readouterr()
    assert rondo("eval", made / "model", *words, "--against", f"static={made / 'parent'}") == 2
    assert "cannot stand for static" in refusal(capsys)
    assert list(tmp_path.iterdir()) == []


def test_finished_results_are_kept(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--limit", 2, "--recurrences", 1)
    measure(made, tmp_path / "eval", "model", *words)
    before = tree(tmp_path)
    capsys.readouterr()
    told = ("--data", made / "text.txt", "--output-dir", tmp_path / "eval", *words)
    assert rondo("eval", made / "model", *told) == 2
    assert "exists already" in refusal(capsys)
    assert rondo("eval", made / "model", *told, "--resume") == 2
    assert "is finished" in refusal(capsys)
    assert tree(tmp_path) == before
    assert rondo("eval", made / "model", *told, "--overwrite") == 0
