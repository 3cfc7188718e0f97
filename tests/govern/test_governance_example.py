"""The worked example: it runs as its README says, and what stands there is what comes out."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig

from rondo import cli
from rondo.flops import Costs, costs_of
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo_govern.audit.reading import read
from rondo_govern.policy import read_policy
from rondo_govern.rules import Decision

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "governance"
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the example once; what it prints is kept beside the log."""
    folder = tmp_path_factory.mktemp("governance")
    command = [sys.executable, EXAMPLE / "simulate.py", "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    (folder / "told.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def machine() -> ModuleType:
    return loaded("machine")


def loaded(name: str) -> ModuleType:
    """Import a script of the example, under the name by which another one imports it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_tells_what_comes_out(out: Path) -> None:
    told = [line.strip() for line in (out / "told.txt").read_text().splitlines()]
    assert set(told) <= {line.strip() for line in README.splitlines()}


def test_the_readmes_commands_do_what_they_should(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^    rondo (.+)$", README, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["check", "verify", "usage", "report"]
    for command in commands:
        told = command.replace("out/governance/page.html", str(tmp_path / "page.html"))
        assert cli.main(shlex.split(told.replace("out/governance", str(out)))) == 0
    assert "whole and unaltered" in capsys.readouterr().out
    made = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert made == (EXAMPLE / "page.html").read_text(encoding="utf-8"), "make the page anew"


def test_the_same_seed_gives_the_same_bytes(out: Path, tmp_path: Path, machine: ModuleType) -> None:
    simulate = loaded("simulate")
    rules = simulate.watched(read_policy)
    simulate.day(simulate.traffic(seed=0), rules, tmp_path / "audit.jsonl")
    for name in ("audit.jsonl", "audit.jsonl.head"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    ward = simulate.CALLERS[0]
    assert next(simulate.moments(ward, seed=1)) != next(simulate.moments(ward, seed=0))


def test_the_day_has_what_the_example_is_to_show(out: Path) -> None:
    records = [*read(out / "audit.jsonl")]
    ends = [record for record in records if record["kind"] == "ended"]
    assert {record["tenant"] for record in ends} == {"hospital", "bank", "games-forum"}
    classes = {"clinical": 8, "credit": 4}
    assert {risk for record in ends for risk in record["risks"]} == set(classes)
    for record in ends:
        least = max((classes[risk] for risk in record["risks"]), default=1)
        assert all(int(depth) >= least for depth in record["depths"])
    lowered = [record for record in ends if "overload" in record["adjusted"]]
    assert len({record["tenant"] for record in lowered}) == 3
    deeper = [record for record in ends if record["risks"] == ["credit"]]
    assert any(len(record["depths"]) > 1 for record in deeper)
    assert "quota_exceeded" in {one["code"] for one in records if one["kind"] == "refused"}
    taken = [record["id"] for record in records if record["kind"] == "taken"]
    assert sorted(taken) == sorted(record["id"] for record in ends)
    assert {record["time"][:10] for record in records} == {"2026-11-30"}


@pytest.fixture(scope="module")
def costs() -> Costs:
    base = AutoConfig.from_pretrained(ROOT / "recipes" / "smollm2-135m" / "parent")
    sizes = {"num_prelude_layers": 12, "num_core_layers": 6, "num_coda_layers": 12}
    with torch.device("meta"):
        return costs_of(RecurrentForCausalLM(RecurrentConfig(base_config=base, **sizes)))


@pytest.mark.parametrize(("depth", "length"), [(1, 1), (4, 100), (16, 257)])
def test_flops_are_those_of_the_model(
    machine: ModuleType, costs: Costs, depth: int, length: int
) -> None:
    flops = costs.forward_flops(depth, length)
    assert machine.flops_of(depth, length, answers=True) == flops
    headless = flops - 2 * costs.head_matmul
    assert machine.flops_of(depth, length, answers=False) == headless


def test_what_is_computed_in_too_little_time_is_counted(machine: ModuleType) -> None:
    request = machine.Request("a-1", "bank", 0.0, 60.0, 3, None, frozenset(), [1, 1])
    decision = Decision(depth=4, floor=1)
    steps = [flops for _, flops in machine.steps_of(request, decision)]
    assert len(steps) == 4  # two tokens are read, and two answers
    for count in range(5):
        # A little more than so many tokens take.
        seconds = (sum(steps[:count]) + 1000) / machine.SLOT_FLOPS
        took, spent = machine.work(request, decision, seconds)
        assert took <= seconds
        assert (spent.flops, spent.iterations) == (float(sum(steps[:count])), 4 * count)
        assert spent.new_tokens == max(0, count - 2)
        assert spent.reason == ("length" if count == 4 else "cancelled")
        assert spent.flops <= machine.bound(decision, request.want(0))
