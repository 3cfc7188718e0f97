"""`rondo train` as a user runs it, on tiny models: resume, twins, guards, what it leaves."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import edit_weights, json_of, refusal, rondo, save_parent, weights_of

from rondo.config import TrainConfig
from rondo.training import train

TEXT = "\n\n".join(f"line {number} of a text that repeats itself" for number in range(120))
FAST = ("--seq-len", 16, "--micro-batch-size", 2, "--global-batch-size", 4, "--optimizer.lr", 1e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train")
    save_parent(directory / "parent", tie_word_embeddings=True)
    (directory / "text.txt").write_text(TEXT)
    assert rondo("convert", directory / "parent", directory / "model", "--sizes", "2,2,2") == 0
    return directory


def run(made: Path, out: Path, *flags: object) -> int:
    return rondo(
        "train", made / "model", "--data", made / "text.txt", "--output-dir", out, *FAST, *flags
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("perf/seconds")
        row.pop("perf/tokens_per_s")
    return rows


@pytest.mark.parametrize("flags", [(), ("--loss", "deep", "--optimizer.name", "muon")])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    made: Path, tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--budget.steps", 8, "--save-every", 3, *flags)
    assert run(made, tmp_path / "whole", *common) == 0
    step = train.train_step

    def interrupted(this: train.Run) -> dict[str, Any]:
        found = step(this)
        if this.progress.step == 5:
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(made, tmp_path / "halves", *common) == 130
    assert (tmp_path / "halves" / "step_000005").is_dir()
    monkeypatch.setattr(train, "train_step", step)
    assert rondo("train", tmp_path / "halves", "--resume") == 0
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    left = weights_of(tmp_path / "halves" / "final")
    for name, tensor in weights_of(tmp_path / "whole" / "final").items():
        assert torch.equal(left[name], tensor), name


def test_a_killed_run_loses_no_more_than_since_the_last_save(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--budget.steps", 6, "--save-every", 2)
    assert run(made, tmp_path / "whole", *common) == 0
    step = train.train_step

    def dies(this: train.Run) -> dict[str, Any]:
        if this.progress.step == 5:
            raise RuntimeError("power cut")
        return step(this)

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run(made, tmp_path / "cut", *common)
    monkeypatch.setattr(train, "train_step", step)
    assert run(made, tmp_path / "cut", *common, "--resume") == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_training_lowers_the_loss_and_leaves_a_checkpoint_like_the_one_it_began_with(
    made: Path, tmp_path: Path
) -> None:
    assert run(made, tmp_path / "run", "--budget.steps", 25) == 0
    losses = [row["train/loss"] for row in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    final = tmp_path / "run" / "final"
    assert {path.name for path in final.iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "modeling_recurrent.py",
        "run.json",
        "README.md",
    }
    facts = json_of(final / "run.json")
    assert facts["training"]["tokens"] == 25 * 4 * 16
    assert facts["training"]["flops"] == metrics(tmp_path / "run")[-1]["train/flops"]
    assert [command.split()[1] for command in facts["history"]] == ["convert", "train"]
    assert json_of(final / "config.json")["auto_map"]
    assert "lm_head.weight" not in weights_of(final)
    assert rondo("generate", final, "--prompt", "line", "--max-new-tokens", 3) == 0


def test_the_static_twin_gets_the_same_rows_and_flops_and_stays_the_parents_kind(
    made: Path, tmp_path: Path
) -> None:
    assert run(made, tmp_path / "run", "--budget.steps", 12, "--recurrence.mean", 3) == 0
    like = ("--mode", "static", "--budget.like", tmp_path / "run")
    assert run(made, tmp_path / "twin", *like) == 0
    ours, theirs = metrics(tmp_path / "run"), metrics(tmp_path / "twin")
    step = theirs[0]["train/flops"]
    assert abs(ours[-1]["train/flops"] - theirs[-1]["train/flops"]) <= step
    assert theirs[-1]["train/tokens"] > ours[-1]["train/tokens"]
    assert json_of(tmp_path / "twin" / "final" / "config.json")["model_type"] == "llama"
    assert json_of(tmp_path / "twin" / "final" / "run.json")["training"]["mode"] == "static"


def test_at_one_iteration_the_recurrent_model_trains_as_its_static_twin_does(
    made: Path, tmp_path: Path
) -> None:
    once = ("--recurrence.distribution", "fixed", "--recurrence.mean", 1, "--budget.steps", 4)
    assert run(made, tmp_path / "run", *once) == 0
    assert run(made, tmp_path / "twin", *once, "--mode", "static") == 0
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(tmp_path / "twin"), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)


def test_accumulation_gives_the_gradient_of_the_whole_batch(made: Path, tmp_path: Path) -> None:
    fixed = ("--recurrence.distribution", "fixed", "--recurrence.mean", 2, "--budget.steps", 3)
    assert run(made, tmp_path / "two", *fixed) == 0
    assert run(made, tmp_path / "one", *fixed, "--micro-batch-size", 4) == 0
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
        assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-3)


def test_a_non_finite_step_never_reaches_the_weights(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = train.micro_loss

    def poisoned(*arguments: Any) -> Any:
        objective, last = loss(*arguments)
        return objective * math.nan, last

    monkeypatch.setattr(train, "micro_loss", poisoned)
    assert run(made, tmp_path / "run", "--budget.steps", 40) == 2
    assert "20 steps in a row" in capsys.readouterr().err
    assert all(row["train/skipped"] for row in metrics(tmp_path / "run"))
    assert not (tmp_path / "run" / "final").exists()


def test_resuming_with_other_settings_is_refused_by_name(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(made, tmp_path / "run", "--budget.steps", 2) == 0
    capsys.readouterr()
    assert run(made, tmp_path / "run", "--budget.steps", 2, "--seed", 1, "--resume") == 2
    assert "another seed" in refusal(capsys)
    assert run(made, tmp_path / "run", "--budget.steps", 2) == 2
    assert "exists already" in refusal(capsys)
    assert run(made, tmp_path / "run", "--budget.steps", 2, "--resume") == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "nowhere.jsonl"), "there is no text nowhere.jsonl"),
        (("--seq-len", 100_000), "too few for one sequence"),
        (("--micro-batch-size", 3), "no multiple of"),
        (("--recurrence.minimum", 9), "out of order"),
        (("--device", "cuda:7"), "cannot be used here"),
    ],
)
def test_mistakes_are_told_in_one_line(
    made: Path,
    tmp_path: Path,
    flags: tuple[object, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(made, tmp_path / "run", *flags) == 2
    assert message in refusal(capsys)
    assert not (tmp_path / "run").exists()


def test_a_plain_model_cannot_be_trained(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rondo("train", made / "parent", "--output-dir", tmp_path / "run") == 2
    assert "run.json" in refusal(capsys) or "recurrent" in refusal(capsys)


def test_a_damaged_state_is_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(made, tmp_path / "run", "--budget.steps", 4, "--save-every", 2) == 0
    shutil.rmtree(tmp_path / "run" / "final")
    state = tmp_path / "run" / "step_000004" / "weights.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    capsys.readouterr()
    assert rondo("train", tmp_path / "run", "--resume") == 2
    assert "step_000004 is damaged" in refusal(capsys)


def test_evaluation_tells_trained_from_untrained_and_twin(made: Path, tmp_path: Path) -> None:
    assert run(made, tmp_path / "run", "--budget.steps", 2) == 0
    assert run(made, tmp_path / "twin", "--budget.steps", 2, "--mode", "static") == 0
    found = {}
    for model in (made / "parent", made / "model", tmp_path / "run/final", tmp_path / "twin/final"):
        out = tmp_path / "eval" / str(len(found))
        words = ("--data", made / "text.txt", "--recurrences", 1, 3, "--max-documents", 12)
        assert rondo("eval", model, "--output-dir", out, *words) == 0
        found[str(out)] = json_of(out / "results.json")
    roles = [(one["model"]["role"], one["model"]["stage"]) for one in found.values()]
    assert roles == [
        ("parent", "before"),
        ("recurrent", "before"),
        ("recurrent", "after"),
        ("static", "after"),
    ]
    parent, before, *_ = (one["rows"] for one in found.values())
    assert before[0]["value"] == pytest.approx(parent[0]["value"], rel=1e-5)
    assert [row["num_recurrences"] for row in before] == [1, 3]
    assert rondo("report", *found, "--output-dir", tmp_path / "report") == 0
    assert (tmp_path / "report" / "report.html").is_file()


def test_one_trajectory_gives_the_losses_of_separate_passes(made: Path, tmp_path: Path) -> None:
    words = ("--data", made / "text.txt", "--max-documents", 9, "--batch-size", 4)
    rows = {}
    for depths in ((1, 2, 4), (1,), (2,), (4,)):
        out = tmp_path / "-".join(map(str, depths))
        assert (
            rondo("eval", made / "model", "--output-dir", out, *words, "--recurrences", *depths)
            == 0
        )
        for row in json_of(out / "results.json")["rows"]:
            rows.setdefault(row["num_recurrences"], []).append(row["value"])
    for depth, (together, alone) in rows.items():
        assert together == pytest.approx(alone, rel=1e-5), depth


def test_altered_weights_change_the_loss(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    edit_weights(tmp_path / "model", lambda tensors: tensors["model.norm.weight"].mul_(3))
    values = []
    for model in (made / "model", tmp_path / "model"):
        out = tmp_path / "eval" / str(len(values))
        assert rondo("eval", model, "--output-dir", out, "--data", made / "text.txt") == 0
        values.append(json_of(out / "results.json")["rows"][0]["value"])
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_a_recipe_is_a_whole_run(made: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "train.yaml"
    recipe.write_text(
        f"model: {made / 'model'}\ndata: {made / 'text.txt'}\noutput_dir: {tmp_path / 'run'}\n"
        "seq_len: 16\nbudget: {steps: 3}\nrecurrence: {distribution: uniform, mean: 2}\n"
    )
    assert rondo("train", recipe, "--budget.steps", 2) == 0
    stored = TrainConfig(**json_of(tmp_path / "run" / "run.json")["config"])
    assert stored.budget.steps == 2
    assert stored.recurrence.distribution == "uniform"


def test_the_quickstart_runs_reuses_and_refuses_to_mix(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quickstart", "--source", made / "parent", "--output-dir", tmp_path / "quick")
    few = ("--minutes", 0.0001)
    assert rondo(*words, *few) == 0
    first = capsys.readouterr().out
    assert first.count("    $ rondo ") == 10
    assert first.count("\n  - ") == 5
    assert (tmp_path / "quick" / "report" / "report.html").is_file()
    assert rondo(*words, *few) == 0
    assert capsys.readouterr().out.count("done before") == 8
    assert rondo(*words, "--minutes", 5) == 2
    assert "other settings" in refusal(capsys)


def test_a_loss_that_is_none_is_told_as_such(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    edit_weights(tmp_path / "model", lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    words = ("--data", made / "text.txt", "--max-documents", 1, "--output-dir", tmp_path / "eval")
    assert rondo("eval", tmp_path / "model", *words) == 0
    assert json_of(tmp_path / "eval" / "results.json")["rows"][0]["value"] is None
    assert rondo("report", tmp_path / "eval", "--output-dir", tmp_path / "report") == 0


def test_depths_beyond_the_cap_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(made, tmp_path / "run", "--recurrence.mean", 65) == 2
    assert "cap of 64" in refusal(capsys)
    for verb in (("eval", "--output-dir", tmp_path / "eval"), ("generate",)):
        for depth, message in ((65, "beyond the model's cap of 64"), (0, "greater than or equal")):
            assert rondo(verb[0], made / "model", *verb[1:], "--recurrences", depth) == 2
            assert message in refusal(capsys)


def test_everything_exported_exists() -> None:
    import rondo as package

    assert all(getattr(package, name) is not None for name in package.__all__)
