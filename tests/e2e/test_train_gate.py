"""`rondo train --mode gate` as a user runs it, on a tiny model: all else stays as it was."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import json_of, refusal, rondo, save_parent, weights_of

from rondo.loading import load_model
from rondo.modeling.exits_recurrent import ExitRule
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.provenance import read_metrics
from rondo.training import train

TEXT = "\n\n".join(f"line {number} of a text that repeats itself" for number in range(120))
FAST = (
    "--batch.seq-len", 16, "--batch.micro-batch-size", 2, "--batch.global-batch-size", 4,
    "--recurrence.mean", 3, "--optimizer.lr", 1e-2, "--watch.every", 4, "--watch.rows", 3,
)  # fmt: skip
GATE = {"model.exit_gate.weight", "model.exit_gate.bias"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gate")
    save_parent(directory / "parent", tie_word_embeddings=True, attention_dropout=0.5)
    (directory / "text.txt").write_text(TEXT)
    assert rondo("convert", directory / "parent", directory / "model", "--sizes", "2,2,2") == 0
    return directory


def run(made: Path, out: Path, *flags: object, model: Path | None = None) -> int:
    text = made / "text.txt"
    common = ("--data.sources", text, "--watch.data", text, "--output-dir", out, *FAST)
    return rondo("train", model or made / "model", "--mode", "gate", *common, *flags)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The steps of a run, without what depends on the machine's speed."""
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_metrics(out)
        if "event" not in row
    ]


def test_the_gate_learns_and_nothing_else_moves(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(made, tmp_path / "run", "--budget.steps", 60) == 0
    assert "MISSING" not in capsys.readouterr().err
    rows = metrics(tmp_path / "run")
    losses = [row["val/gate_loss"] for row in rows if "val/gate_loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert rows[-1]["val/gate_correlation"] > 0.3
    assert not any("train/loss" in row or "val/loss@r1" in row for row in rows)
    before, after = weights_of(made / "model"), weights_of(tmp_path / "run" / "final")
    assert after.keys() == before.keys() | GATE
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert json_of(tmp_path / "run" / "final" / "config.json")["exit_gate"]


def test_what_it_leaves_answers_as_before_and_can_leave_early(made: Path, tmp_path: Path) -> None:
    assert run(made, tmp_path / "run", "--budget.steps", 30) == 0
    final = tmp_path / "run" / "final"
    ids = torch.arange(4, 16)[None]
    old, new = (
        load_model(RecurrentForCausalLM, one, torch.float32) for one in (made / "model", final)
    )
    with torch.no_grad():
        assert torch.equal(new(ids).logits, old(ids).logits)
        executed = [
            int(
                new(ids, num_recurrences=6, exit=ExitRule("gate", nats), use_cache=True)
                .past_key_values.executed.sum()
            )
            for nats in (0.0, 1e9)
        ]  # fmt: skip
    assert executed == [6 * 12, 1 * 12]


def test_the_facts_of_the_model_stay_and_those_of_the_gate_are_told_beside_them(
    made: Path, tmp_path: Path
) -> None:
    text = ("--data.sources", made / "text.txt", *FAST, "--budget.steps", 3)
    assert rondo("train", made / "model", "--output-dir", tmp_path / "run", *text) == 0
    trained = tmp_path / "run" / "final"
    assert run(made, tmp_path / "gate", "--budget.steps", 5, model=trained) == 0
    facts = json_of(tmp_path / "gate" / "final" / "run.json")
    assert facts["training"] == json_of(trained / "run.json")["training"]
    assert facts["gate"]["tokens"] == 5 * 4 * 16
    assert facts["gate"]["flops"] == metrics(tmp_path / "gate")[-1]["train/flops"]
    assert (facts["gate"]["loss"], facts["gate"]["recurrence"]) == ("gate", "fixed 3")
    assert [command.split()[1] for command in facts["history"]] == ["convert", "train", "train"]
    like = ("--budget.like", tmp_path / "gate")
    assert run(made, tmp_path / "like", *like, model=trained) == 0
    assert json_of(tmp_path / "like" / "final" / "run.json")["gate"]["steps"] == 5


def test_of_a_model_that_was_only_converted_no_training_is_told(made: Path, tmp_path: Path) -> None:
    assert run(made, tmp_path / "run", "--budget.steps", 2) == 0
    facts = json_of(tmp_path / "run" / "final" / "run.json")
    assert "training" not in facts
    assert facts["gate"]["steps"] == 2


def test_training_a_gate_again_goes_on_and_training_the_rest_drops_it(
    made: Path, tmp_path: Path
) -> None:
    assert run(made, tmp_path / "one", "--budget.steps", 40) == 0
    first = tmp_path / "one" / "final"
    assert run(made, tmp_path / "two", "--budget.steps", 1, model=first) == 0
    begun = metrics(tmp_path / "one")[0]["train/objective"]
    assert metrics(tmp_path / "two")[0]["train/objective"] < 0.6 * begun
    text = ("--data.sources", made / "text.txt", *FAST, "--budget.steps", 1)
    for mode in ("recurrent", "random"):
        out = tmp_path / mode
        base = first if mode == "recurrent" else tmp_path / "two" / "final"
        assert rondo("train", base, "--mode", mode, "--output-dir", out, *text) == 0
        assert not json_of(out / "final" / "config.json")["exit_gate"]
        assert not GATE & weights_of(out / "final").keys()


@pytest.mark.parametrize("flags", [(), ("--optimizer.ema-decay", 0.9, "--data.streaming")])
def test_a_gate_that_was_stopped_and_resumed_equals_one_that_was_not(
    made: Path, tmp_path: Path, flags: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--budget.steps", 8, "--safety.save-every", 3, *flags)
    assert run(made, tmp_path / "whole", *common) == 0
    step = train.train_step

    def interrupted(this: train.Run, wishes: list[int]) -> Any:
        # Dropout would pass for divergence, after a validation too.
        assert not this.objective.model.training
        if this.progress.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(this, wishes)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(made, tmp_path / "halves", *common) == 0
    assert rondo("train", tmp_path / "halves", "--resume") == 0
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    whole, halves = (weights_of(tmp_path / name / "final") for name in ("whole", "halves"))
    assert all(torch.equal(halves[name], tensor) for name, tensor in whole.items())


def test_micro_batches_draws_and_the_body_s_checkpointing_change_nothing(
    made: Path, tmp_path: Path
) -> None:
    variants = {
        "plain": (),
        "one": ("--batch.micro-batch-size", 4),
        "draws": ("--recurrence.draws-per-step", 2),
        "lean": ("--machine.activation-checkpointing", "all"),
    }
    found = {}
    for name, flags in variants.items():
        assert run(made, tmp_path / name, "--budget.steps", 4, *flags) == 0
        found[name] = metrics(tmp_path / name)
    for name in variants:
        for row, plain in zip(found[name], found["plain"], strict=True):
            assert row == pytest.approx(plain, rel=1e-4), name


def test_a_gate_has_a_budget_and_a_plan(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ("--budget.flops", 3e8)
    words = ("plan", made / "model", "--mode", "gate", *FAST, *budget, "--json")
    assert rondo(*words) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"]["gate"] == planned["parameters"]["trained"] == 32 + 2
    assert planned["backprop_depth"] == 0
    memory = planned["memory"]
    assert 0 < memory["activations"] < memory["weights"]
    assert memory["gradients"] < 1000
    assert run(made, tmp_path / "run", *budget) == 0
    facts = json_of(tmp_path / "run" / "final" / "run.json")["gate"]
    for key in ("steps", "tokens", "flops", "flops_paper"):
        assert facts[key] == pytest.approx(planned[key], rel=1e-9), key


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--loss.kind", "deep"), "loss.kind would do nothing"),
        (("--lora.rank", 2), "lora.rank would do nothing"),
        (("--recurrence.schedule", "linear"), "recurrence.schedule would do nothing"),
        (("--recurrence.mean", 1), "recurrence.mean of at least 2"),
        (("--recurrence.mean", 100), "must not exceed the cap"),
    ],
)
def test_settings_without_a_part_are_refused(
    made: Path,
    tmp_path: Path,
    flags: tuple[object, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(made, tmp_path / "run", *flags) == 2
    assert said in refusal(capsys)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_loop_has_no_gate(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ("--data.sources", made / "text.txt", *FAST, "--budget.steps", 1)
    static = tmp_path / "static"
    assert rondo("train", made / "model", "--mode", "static", "--output-dir", static, *text) == 0
    capsys.readouterr()
    assert run(made, tmp_path / "run", model=static / "final") == 2
    assert "train it in mode static" in refusal(capsys)
