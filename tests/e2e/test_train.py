"""`rondo train` as a user runs it, on tiny models: resume, twins, guards, what it leaves."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import json_of, refusal, rondo, save_parent, weights_of

from rondo.config import TrainConfig
from rondo.data import held_out_rows, load_tokenizer
from rondo.loading import load_model
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.provenance import read_metrics
from rondo.training import train

TEXT = "\n\n".join(f"line {number} of a text that repeats itself" for number in range(120))
FAST = (
    "--batch.seq-len", 16, "--batch.micro-batch-size", 2, "--batch.global-batch-size", 4,
    "--optimizer.lr", 1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train")
    save_parent(directory / "parent", tie_word_embeddings=True)
    (directory / "text.txt").write_text(TEXT)
    assert rondo("convert", directory / "parent", directory / "model", "--sizes", "2,2,2") == 0
    return directory


def run(made: Path, out: Path, *flags: object) -> int:
    return rondo(
        "train",
        made / "model",
        "--data.sources",
        made / "text.txt",
        "--output-dir",
        out,
        *FAST,
        *flags,
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    """The steps of a run, without what depends on the machine's speed."""
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_metrics(out)
        if "event" not in row
    ]


@pytest.mark.parametrize(
    ("number", "flags"),
    [
        (signal.SIGINT, ()),
        (signal.SIGTERM, ("--loss.kind", "deep", "--optimizer.name", "muon")),
        (signal.SIGTERM, ("--data.streaming", "--optimizer.ema-decay", 0.9)),
        (signal.SIGTERM, ("--lora.rank", 2, "--recurrence.draws-per-step", 2)),
    ],
)
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    made: Path,
    tmp_path: Path,
    number: int,
    flags: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = ("--budget.steps", 8, "--safety.save-every", 3, *flags)
    assert run(made, tmp_path / "whole", *common) == 0
    step = train.train_step

    def interrupted(this: train.Run, wishes: list[int]) -> Any:
        if this.progress.step == 4:
            signal.raise_signal(number)
        return step(this, wishes)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(made, tmp_path / "halves", *common) == 0
    assert not (tmp_path / "halves" / "final").exists()
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
    common = ("--budget.steps", 6, "--safety.save-every", 2)
    assert run(made, tmp_path / "whole", *common) == 0
    step = train.train_step

    def dies(this: train.Run, wishes: list[int]) -> Any:
        if this.progress.step == 5:
            raise RuntimeError("power cut")
        return step(this, wishes)

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
    assert run(made, tmp_path / "one", *fixed, "--batch.micro-batch-size", 4) == 0
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
        assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-3)


def poison(monkeypatch: pytest.MonkeyPatch, value: float, rows: range) -> None:
    """Make the loss of steps that begin at these rows of the stream `value` times what it is."""
    whole = train.gradients

    def poisoned(this: train.Run, *arguments: Any) -> Any:
        (objective, *others), stop = whole(this, *arguments)
        return [objective * (value if this.progress.rows in rows else 1), *others], stop

    monkeypatch.setattr(train, "gradients", poisoned)


def test_a_non_finite_step_never_reaches_the_weights(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, math.nan, range(10**9))
    assert run(made, tmp_path / "run", "--budget.steps", 40) == 2
    assert "5 steps in a row were skipped" in capsys.readouterr().err
    assert [row["train/skipped"] for row in metrics(tmp_path / "run")] == ["non-finite"] * 5
    assert not (tmp_path / "run" / "final").exists()


def test_one_bad_step_is_skipped(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, math.inf, range(8, 9))
    assert run(made, tmp_path / "run", "--budget.steps", 6) == 0
    rows = metrics(tmp_path / "run")
    assert [row["train/skipped"] for row in rows] == [False, False, "non-finite", *[False] * 3]
    assert rows[2]["train/objective"] == "inf"
    assert json_of(tmp_path / "run/final/run.json")["training"]["skipped_steps"] == 1


@pytest.mark.parametrize("value", [math.nan, 50.0])
def test_repeated_bad_steps_roll_back_and_go_on_with_later_text(
    made: Path,
    tmp_path: Path,
    value: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Bad text from row 160 to row 171: three steps of four rows.
    poison(monkeypatch, value, range(160, 172))
    flags = ("--safety.patience", 3, "--safety.save-every", 38, "--safety.spike-factor", 3)
    assert run(made, tmp_path / "run", "--budget.steps", 45, *flags) == 0
    assert "rollback" in capsys.readouterr().err
    events = [row for row in read_metrics(tmp_path / "run") if "event" in row]
    assert [(row["event"], row["step"], row["skipped_to_row"]) for row in events] == [
        ("rollback", 38, 172)
    ]
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 46))
    assert not any(row["train/skipped"] for row in rows)
    facts = json_of(tmp_path / "run/final/run.json")["training"]
    assert (facts["rollbacks"], facts["skipped_steps"]) == (1, 3)
    # What was spent is counted, what was thrown away too.
    assert facts["tokens"] == (45 + 5) * 4 * 16


def test_a_run_that_only_rolls_back_gives_up(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, math.nan, range(8, 10**9))
    flags = ("--safety.patience", 2, "--safety.save-every", 2, "--safety.max-rollbacks", 2)
    assert run(made, tmp_path / "run", "--budget.steps", 30, *flags) == 2
    assert "after 2 rollbacks" in capsys.readouterr().err
    assert (tmp_path / "run" / "step_000002").is_dir()


def test_checkpointed_activations_change_nothing(made: Path, tmp_path: Path) -> None:
    common = ("--budget.steps", 3, "--loss.kind", "deep", "--recurrence.mean", 5)
    found = {}
    for kind in ("none", "iteration", "all"):
        out = tmp_path / kind
        assert run(made, out, *common, "--machine.activation-checkpointing", kind) == 0
        found[kind] = metrics(out)
    assert found["none"] == found["iteration"] == found["all"]


def test_one_recipe_trains_the_twins(made: Path, tmp_path: Path) -> None:
    for mode in ("recurrent", "static", "random"):
        out = tmp_path / mode
        assert run(made, out, "--budget.steps", 3, "--mode", mode, "--loss.kind", "deep") == 0
        assert json_of(out / "final/run.json")["training"]["mode"] == mode
    first = {mode: metrics(tmp_path / mode)[0]["train/loss"] for mode in ("recurrent", "random")}
    # Random weights know nothing: the loss is about that of guessing.
    assert abs(first["random"] - math.log(260)) < 0.5
    ours, random = (weights_of(tmp_path / mode / "final") for mode in ("recurrent", "random"))
    assert ours.keys() == random.keys()


def test_a_trained_model_goes_on_in_its_own_mode(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode in ("static", "random"):
        assert run(made, tmp_path / mode, "--budget.steps", 2, "--mode", mode) == 0
    again = {"static": "static", "random": "recurrent"}
    for first, mode in again.items():
        final, out = tmp_path / first / "final", tmp_path / f"{first}-2"
        words = ("train", final, "--data.sources", made / "text.txt", *FAST, "--budget.steps", 1)
        wrong = "recurrent" if mode == "static" else "random"
        capsys.readouterr()
        assert rondo(*words, "--mode", wrong, "--output-dir", tmp_path / "wrong") == 2
        assert f"was trained in mode {first}" in refusal(capsys)
        assert rondo(*words, "--mode", mode, "--output-dir", out) == 0
        assert json_of(out / "final/run.json")["training"]["mode"] == first
        # It begins where the first training ended, not where that began.
        loss = [metrics(where)[-1]["train/loss"] for where in (tmp_path / first, out)]
        assert loss[1] < loss[0] + 0.3
        before, after = (weights_of(where / "final") for where in (tmp_path / first, out))
        name = next(one for one in before if "up_proj" in one)
        assert (before[name] - after[name]).abs().max() < 2.1e-3


def test_validation_measures_each_depth_and_the_loop(made: Path, tmp_path: Path) -> None:
    flags = ("--watch.data", made / "text.txt", "--watch.every", 2, "--watch.recurrences", 1, 3, 99)
    # Depths beyond the cap are left out.
    assert run(made, tmp_path / "run", "--budget.steps", 5, *flags) == 0
    rows = metrics(tmp_path / "run")
    measured = [row for row in rows if "val/loss@r1" in row]
    assert [row["step"] for row in measured] == [2, 4, 5]
    assert all(math.isfinite(row[f"val/loss@r{r}"]) for row in measured for r in (1, 3))
    assert not any("val/loss@r64" in row for row in measured)
    assert measured[0]["val/loss@r1"] > measured[-1]["val/loss@r1"]
    assert all("loop/gain" in row for row in measured)
    assert run(made, tmp_path / "twin", "--budget.steps", 2, "--mode", "static", *flags) == 0
    (row,) = (row for row in metrics(tmp_path / "twin") if "val/loss@r1" in row)
    assert "val/loss@r3" not in row
    assert "loop/gain" not in row


def test_the_same_tokens_in_short_sequences_first(made: Path, tmp_path: Path) -> None:
    flags = ("--batch.seq-schedule", "doubling", "--batch.seq-schedule-start", 8)
    assert run(made, tmp_path / "run", "--budget.steps", 4, *flags) == 0
    assert run(made, tmp_path / "plain", "--budget.steps", 4) == 0
    rows, plain = metrics(tmp_path / "run"), metrics(tmp_path / "plain")
    assert [row["train/seq_len"] for row in rows] == [8, 8, 16, 16]
    assert [row["train/tokens"] for row in rows] == [row["train/tokens"] for row in plain]
    assert rows[0]["train/flops"] < plain[0]["train/flops"]


def test_the_average_of_the_weights_is_what_is_written(made: Path, tmp_path: Path) -> None:
    for decay in (0.0, 0.9):
        out = tmp_path / str(decay)
        assert run(made, out, "--budget.steps", 6, "--optimizer.ema-decay", decay) == 0
    plain, averaged = (weights_of(tmp_path / one / "final") for one in ("0.0", "0.9"))
    start, name = weights_of(made / "model"), "model.layers.3.mlp.up_proj.weight"
    moved = [(weights[name] - start[name]).norm() for weights in (plain, averaged)]
    assert 0 < moved[1] < 0.7 * moved[0]


def test_adapters_are_folded_into_what_is_written(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ("--lora.rank", 2, "--watch.data", made / "text.txt", "--optimizer.lr", 1e-2)
    # In bfloat16 what is frozen is rounded, too.
    flags = (*flags, "--machine.dtype", "float32")
    assert run(made, out, "--budget.steps", 6, *flags, "--watch.recurrences", 2) == 0
    before, after = weights_of(made / "model"), weights_of(out / "final")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed)
    assert "model.injection.mixing" in changed
    assert not any("norm" in name or "embed" in name for name in changed)
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2
    # The model that was written is the one that was measured last.
    model = load_model(RecurrentForCausalLM, out / "final", torch.float32)
    config = TrainConfig(**json_of(out / "run.json")["config"])
    rows = held_out_rows(str(made / "text.txt"), config.data, load_tokenizer(out / "final"), 16, 16)
    with torch.no_grad():
        logits = model(rows.input_ids, num_recurrences=2).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels.flatten())
    assert metrics(out)[-1]["val/loss@r2"] == pytest.approx(float(loss), rel=1e-4)


def test_adapters_in_bfloat16_are_watched_and_move_in_float32(made: Path, tmp_path: Path) -> None:
    flags = ("--lora.rank", 2, "--machine.dtype", "bfloat16", "--watch.data", made / "text.txt")
    assert run(made, tmp_path / "run", "--budget.steps", 3, *flags) == 0
    assert "loop/gain" in metrics(tmp_path / "run")[-1]
    (state,) = (tmp_path / "run" / "step_000003").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(state).values()} == {torch.float32}


def test_a_parent_teaches(made: Path, tmp_path: Path) -> None:
    flags = ("--loss.kind", "deep+distil", "--loss.shallow", "first", "--budget.steps", 3)
    assert run(made, tmp_path / "alone", *flags) == 0
    parent = ("--loss.parent-weight", 0.5)
    assert run(made, tmp_path / "taught", *flags, *parent) == 0
    alone, taught = metrics(tmp_path / "alone"), metrics(tmp_path / "taught")
    assert alone[0]["train/loss"] == taught[0]["train/loss"]
    assert alone[0]["train/objective"] != taught[0]["train/objective"]
    assert alone[0]["train/flops"] < taught[0]["train/flops"]


def test_prompts_and_answers_are_trained_on_answers_alone(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = ({"question": f"What is {n} + 1?", "answer": f"It is {n + 1}."} for n in range(60))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--data.loss-on", "answers", "--data.packing", "documents", "--budget.steps", 3)
    assert run(made, tmp_path / "run", *flags, "--data.sources", file) == 0
    assert math.isfinite(metrics(tmp_path / "run")[-1]["train/loss"])


def test_settings_of_the_machine_may_change_when_a_run_goes_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = tmp_path / "run", train.train_step

    def stops(this: train.Run, wishes: list[int]) -> Any:
        return step(this, [signal.SIGTERM])

    monkeypatch.setattr(train, "train_step", stops)
    assert run(made, out, "--budget.steps", 2) == 0
    monkeypatch.setattr(train, "train_step", step)
    capsys.readouterr()
    assert rondo("train", out, "--resume", "--optimizer.lr", 1) == 2
    assert "another optimizer.lr" in refusal(capsys)
    # What equals a default of ours is asked for all the same.
    assert rondo("train", out, "--resume", "--optimizer.lr", 5e-5) == 2
    assert "another optimizer.lr" in refusal(capsys)
    other = ("--batch.micro-batch-size", 1, "--machine.activation-checkpointing", "iteration")
    assert rondo("train", out, "--resume", *other) == 0
    assert len(metrics(out)) == 2
    assert (out / "final" / "run.json").is_file()


def test_text_that_changed_is_not_gone_on_with(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out, step = tmp_path / "text.txt", tmp_path / "run", train.train_step
    text.write_text(TEXT)
    monkeypatch.setattr(train, "train_step", lambda this, _: step(this, [signal.SIGTERM]))
    assert run(made, out, "--budget.steps", 2, "--data.sources", text) == 0
    monkeypatch.setattr(train, "train_step", step)
    text.write_text(TEXT + " and more")
    capsys.readouterr()
    assert rondo("train", out, "--resume") == 2
    assert "has changed since" in refusal(capsys)


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
        (("--data.sources", "nowhere.jsonl"), "there is no text nowhere.jsonl"),
        (("--batch.seq-len", 100_000), "too few for one sequence"),
        (("--batch.global-batch-size", 3), "no multiple of"),
        (("--recurrence.minimum", 9), "out of order"),
        (("--machine.device", "cuda:7"), "cannot be used here"),
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


def test_a_damaged_state_is_passed_over(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(made, out, "--budget.steps", 4, "--safety.save-every", 2) == 0
    whole = metrics(out)
    shutil.rmtree(out / "final")
    (shard,) = (out / "step_000004").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    capsys.readouterr()
    assert rondo("train", out, "--resume") == 0
    said = capsys.readouterr().out
    assert "step_000004, which is damaged" in said
    assert "resumed from step 2 of 4" in said
    assert metrics(out) == whole
    shutil.rmtree(out / "final")
    for shard in out.glob("step_*/*.safetensors"):
        shard.write_bytes(b"")
    assert rondo("train", out, "--resume") == 2
    assert "every saved state" in capsys.readouterr().err


def test_a_recipe_is_a_whole_run(made: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "train.yaml"
    recipe.write_text(
        f"model: {made / 'model'}\ndata: {{sources: [{made / 'text.txt'}]}}\n"
        f"output_dir: {tmp_path / 'run'}\n"
        "batch: {seq_len: 16}\nbudget: {steps: 3}\nrecurrence: {distribution: uniform, mean: 2}\n"
    )
    assert rondo("train", recipe, "--budget.steps", 2) == 0
    stored = TrainConfig(**json_of(tmp_path / "run" / "run.json")["config"])
    assert stored.budget.steps == 2
    assert stored.recurrence.distribution == "uniform"


def test_the_quickstart_runs_reuses_and_refuses_to_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Long enough for its prompt of 90 bytes and the answer.
    save_parent(tmp_path / "parent", max_position_embeddings=256)
    words = ("quickstart", "--source", tmp_path / "parent", "--output-dir", tmp_path / "quick")
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
