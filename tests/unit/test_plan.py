"""What a plan says against the paper's accounts, against autograd, and against plain arithmetic."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import parent_of, recurrent
from rondo import cli
from rondo.config import PlanConfig, load_yaml
from rondo.errors import UserError
from rondo.flops import costs_of
from rondo.training import plan
from rondo.training.budget import Draw, paper_step_flops, step_flops, step_plan
from rondo.training.objective import Objective
from rondo.training.recurrence import Depth

ROOT = Path(__file__).parents[2]
BATCH, LENGTH = 3, 16


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A directory with no more than config.json, and the parent's below it."""
    recurrent("llama").config.save_pretrained(tmp_path / "model")
    parent_of("llama").config.save_pretrained(tmp_path / "model" / "parent")
    return str(tmp_path / "model")


def config(model: str, **groups: dict[str, Any]) -> PlanConfig:
    small = {
        "budget": {"steps": 10},
        "batch": {"micro_batch_size": BATCH, "global_batch_size": BATCH, "seq_len": LENGTH},
        "recurrence": {"distribution": "fixed", "mean": 5, "backprop_depth": 3},
        "machine": {"dtype": "float32"},
    }
    top = {key: value for key, value in groups.items() if not isinstance(value, dict)}
    nested = {key: value for key, value in groups.items() if isinstance(value, dict)}
    merged = {key: small.get(key, {}) | nested.get(key, {}) for key in {**small, **nested}}
    return PlanConfig(model=model, **top, **merged)


# ---- the paper


def test_the_papers_run_of_tinyllama_costs_what_the_paper_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_yaml(PlanConfig, Path("recipes/tinyllama-1.1b/train.yaml"))
    depth = recipe.recurrence.model_copy(update={"mean": 4, "draws_per_step": 1})
    found = plan.forecast(recipe.model_copy(update={"recurrence": depth, "throughput": 1e15}))
    assert found["parameters"]["total"] == found["parameters"]["trained"] == 844_171_264
    assert found["steps"] == 50_000
    assert found["tokens"] == 50_000 * 2**20
    # The paper's account rounds its curriculum down where its training rounds up.
    assert found["flops_paper"] == pytest.approx(3.776e20, rel=1e-3)
    assert found["hours"] == pytest.approx(found["flops"] / 1e15 / 3600)
    assert [row["last_step"] for row in found["phases"]] == [125, 20_000, 37_500, 50_000]
    assert [row["learning_rate"] for row in found["phases"]] == [
        "warm-up",
        "hold",
        "decay",
        "decay",
    ]
    assert [row["mean"] for row in found["phases"]] == [(1, 1), (1, 2), (2, 4), (4, 4)]


# ---- what autograd keeps


def bytes_kept(model: Any, shallow: int | None, dtype: torch.dtype) -> int:
    """What the forward pass of a real training step leaves for its backward pass."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    rows: Any = SimpleNamespace(input_ids=ids, position_ids=None, labels=ids)
    storages = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages.add(tensor.untyped_storage())
        return tensor

    is_recurrent = hasattr(model.config, "num_core_layers")
    objective = Objective(model, is_recurrent)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, dtype != torch.float32, cache_enabled=False),
    ):
        objective("minimised", rows, Draw(Depth(5, 3), shallow), torch.zeros(BATCH).long())
    weights = {parameter.untyped_storage() for parameter in model.parameters()}
    return sum(storage.nbytes() for storage in storages - weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("injection", ["mix", "linear"])
@pytest.mark.parametrize("loss", ["last", "deep"])
def test_activations_are_what_a_real_step_keeps(
    tmp_path: Path, dtype: str, injection: str, loss: str
) -> None:
    model = recurrent("llama", injection=injection)
    model.config.save_pretrained(tmp_path)
    # The last iterations carry gradient, and with "first" the first one as well.
    settings = config(
        str(tmp_path), loss={"kind": loss, "shallow": "first"}, machine={"dtype": dtype}
    )
    found = plan.forecast(settings)
    real = bytes_kept(model, 1 if loss == "deep" else None, getattr(torch, dtype))
    assert found["backprop_depth"] == (4 if loss == "deep" else 3)
    assert found["memory"]["activations"] == pytest.approx(real, rel=0.01)
    kinds = found["activations"]
    assert kinds["none"] > kinds["iteration"] > kinds["all"]


def test_activations_of_the_static_twin_are_those_of_the_parent(shape: str) -> None:
    found = plan.forecast(config(shape, mode="static"))
    real = bytes_kept(parent_of("llama"), None, torch.float32)
    assert found["memory"]["activations"] == pytest.approx(real, rel=0.02)
    assert found["parameters"]["core"] == 0
    parent = sum(one.numel() for one in parent_of("llama").parameters())
    assert found["parameters"]["total"] == found["parameters"]["trained"] == parent


# ---- arithmetic


def test_memory_and_disk_follow_from_the_parameters(shape: str) -> None:
    found = plan.forecast(config(shape))
    total = found["parameters"]["total"]
    largest = max(one.numel() for one in recurrent("llama").parameters())
    assert found["memory"]["weights"] == 4 * total
    assert found["memory"]["gradients"] == 4 * (total + largest)
    assert found["memory"]["moments"] == 8 * total
    assert found["memory"]["sum"] == sum(found["memory"].values()) - found["memory"]["sum"]
    assert found["state"] == 12 * total
    assert found["disk"] == 3 * 12 * total + 4 * total


def test_muon_keeps_one_moment_of_the_layers_matrices(shape: str) -> None:
    found = plan.forecast(config(shape, optimizer={"name": "muon", "ema_decay": 0.9}))
    matrices = sum(
        one.numel()
        for one in recurrent("llama").model.layers.parameters()
        if one.dim() == 2 and min(one.shape) > 1
    )
    total = found["parameters"]["total"]
    assert found["memory"]["moments"] == 8 * total - 4 * matrices
    assert found["memory"]["average"] == 4 * total
    assert found["state"] == 4 * total + 4 * total + 8 * total - 4 * matrices


def test_processes_share_weights_and_gather_the_core_once(shape: str) -> None:
    batch = {"micro_batch_size": 1, "global_batch_size": 4}
    one, four, two_by_two = (
        plan.forecast(config(shape, batch=batch, gpus=gpus, machine={"replicas": replicas}))
        for gpus, replicas in ((1, 1), (4, 1), (4, 2))
    )
    for use in ("weights", "moments"):
        assert four["memory"][use] == one["memory"][use] // 4
        assert two_by_two["memory"][use] == one["memory"][use] // 2
    assert "gathered" not in one["memory"]
    parts = one["parameters"]
    layer = parts["prelude"] // 2
    root = parts["total"] - parts["prelude"] - parts["coda"]
    assert four["memory"]["gathered"] == 4 * (root + 2 * layer) + 8 * root
    assert (one["micro_batches"], four["micro_batches"]) == (4, 1)
    assert four["flops"] == one["flops"]


def test_a_teaching_parent_is_held_and_paid_for(shape: str) -> None:
    loss = {"kind": "deep+distil", "distil_weight": 0.25}
    alone = plan.forecast(config(shape, loss=loss))
    taught = plan.forecast(config(shape, loss=loss | {"parent_weight": 0.5}))
    parent = sum(one.numel() for one in parent_of("llama").parameters())
    assert taught["memory"]["parent"] == 4 * parent
    assert alone["memory"]["parent"] == 0
    assert taught["flops"] > alone["flops"]
    assert taught["memory"]["logits"] > alone["memory"]["logits"]


def test_adapters_train_little_and_freeze_the_rest_in_the_runs_type(shape: str) -> None:
    pytest.importorskip("peft")
    found = plan.forecast(config(shape, lora={"rank": 2}, machine={"dtype": "bfloat16"}))
    parts = found["parameters"]
    assert parts["trained"] == parts["adapters"] + parts["injection"]
    frozen = parts["total"] - parts["trained"]
    assert found["memory"]["weights"] == 4 * parts["trained"] + 2 * frozen
    assert found["memory"]["moments"] == 8 * parts["trained"]
    assert found["memory"]["activations"] > 0


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(1, 40),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    schedule=st.sampled_from(["none", "linear", "1-sqrt"]),
    fraction=st.floats(0.01, 1),
    until=st.floats(0.01, 0.99),
    doubling=st.booleans(),
)
def test_phases_lose_no_step_and_no_flops(
    steps: int,
    warmup: float,
    decay: float,
    schedule: Any,
    fraction: float,
    until: float,
    doubling: bool,
) -> None:
    model = recurrent("llama")
    this = plan.Subject(model, True, torch.float32, {}, costs_of(model), None)
    given_config = config(
        "any",
        budget={"steps": steps},
        optimizer={"warmup_fraction": warmup, "decay_fraction": decay},
        recurrence={"schedule": schedule, "schedule_fraction": fraction, "draws_per_step": 1},
        batch={
            "seq_schedule": "doubling" if doubling else "none",
            "seq_schedule_start": 8,
        },
        data={"phases": (f"{until}: math", "1: math general@2")},
    )
    rows, window, outputs = plan.phases(given_config, this, steps)
    plans = [step_plan(given_config, this.cap, step, steps) for step in range(steps)]
    ends = [row["last_step"] for row in rows]
    assert ends == sorted(set(ends))
    assert ends[-1] == steps
    assert sum(row["tokens"] for row in rows) == steps * BATCH * LENGTH
    for key, cost in (("flops", step_flops), ("flops_paper", paper_step_flops)):
        whole = sum(cost(given_config, this.costs, one) for one in plans)
        assert sum(row[key] for row in rows) == pytest.approx(whole, rel=1e-12)
    assert window == max(draw.depth.backprop_depth for one in plans for draw in one.draws)
    assert outputs == 1
    switch = min(steps, math.ceil(until * steps))
    for row in rows:
        assert row["data"] == ("math" if row["last_step"] <= switch else "math general@2")


# ---- the command


def test_a_plan_reads_well_and_as_json(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", shape, "--budget.steps", "4", "--gpus", "2"]) == 0
    text = capsys.readouterr().out
    assert "4 steps" in text
    assert "GiB" in text
    assert "hours" not in text
    assert max(map(len, text.splitlines()[2:])) <= 100
    assert cli.main(["plan", shape, "--budget.steps", "4", "--throughput", "1e9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 4
    assert found["hours"] > 0


def test_a_recipe_folder_stands_in_for_a_model_that_is_not_made_yet(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    Path(shape).rename(tmp_path / "recipes" / "mine")
    monkeypatch.chdir(tmp_path)
    here = Path("recipes/mine")
    assert plan.shape_directory(Path("out/mine/heal/final")) == here
    made = tmp_path / "out" / "mine"
    recurrent("llama").config.save_pretrained(made)
    assert plan.shape_directory(Path("out/mine")) == Path("out/mine")
    with pytest.raises(UserError, match=r"there is no config.json in out/other"):
        plan.shape_directory(Path("out/other"))


def test_the_parent_is_found_where_the_conversion_found_it(shape: str, tmp_path: Path) -> None:
    (Path(shape) / "parent").rename(tmp_path / "elsewhere")
    facts = {"parent": {"path": str(tmp_path / "elsewhere")}}
    (Path(shape) / "run.json").write_text(json.dumps(facts))
    assert plan.forecast(config(shape, mode="static"))["parameters"]["injection"] == 0


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ({"gpus": 2}, "cannot be shared equally by 2 processes"),
        ({"gpus": 3, "machine": {"replicas": 2}}, "machine.replicas 2 does not divide --gpus 3"),
        ({"recurrence": {"mean": 65}}, "must not exceed the cap of 64"),
        ({"data": {"phases": ("half: math", "1: general")}}, "does not read UNTIL: SOURCE"),
        ({"data": {"phases": ("0.5: math",)}}, "must end at 1, not at 0.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(shape: str, groups: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan.forecast(config(shape, **groups))


def test_what_is_no_model_is_refused_by_name(shape: str, tmp_path: Path) -> None:
    parent = Path(shape) / "parent"
    with pytest.raises(UserError, match="that of a llama, not of a recurrent checkpoint"):
        plan.forecast(config(str(parent)))
    with pytest.raises(UserError, match=r"there is no run.json in"):
        plan.forecast(config(str(parent), mode="static"))
    (parent / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is no recurrent checkpoint"):
        plan.forecast(config(str(parent), mode="static"))
    for text in ("{", '{"model_type": "unheard-of"}', '{"model_type": "rondo"}', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="describes no model"):
            plan.forecast(config(str(tmp_path)))
