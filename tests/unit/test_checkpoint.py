"""A run's state on disk, in one process: whole, checked, and never at the cost of the last one."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rondo.errors import UserError
from rondo.processes import World
from rondo.training import checkpoint
from rondo.training.checkpoint import load_latest, save_state, step_directories

ALONE = World(0, 1, torch.device("cpu"))


def make(seed: int, width: int = 4) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """A model with a frozen weight, moved by Muon and AdamW."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    model[2].bias.requires_grad_(False)
    rest = [model[0].bias, model[1].weight, model[1].bias, model[2].weight]
    groups = [{"params": rest[:2]}, {"params": rest[2:], "lr": 0.5}]
    return model, [torch.optim.Muon([model[0].weight]), torch.optim.AdamW(groups)]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(5, model[0].in_features)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def save(directory: Path, step: int, made: Any, keep_last: int = 2, ema: Any = None) -> None:
    save_state(directory, step, *made, ema, {"step": step}, keep_last, ALONE)


def load(directory: Path, made: Any, ema: Any = None) -> tuple[Any, list[str]]:
    said: list[str] = []
    return load_latest(directory, *made, ema, ALONE, said.append), said


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made[0].state_dict().items()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    through, stopped, resumed = make(0), make(0), make(1)
    train(*through, range(6))
    train(*stopped, range(3))
    save(tmp_path, 3, stopped)
    # The groups are those of the new run, in an order of its own; only the moments come back.
    groups = [{"params": [resumed[0][2].weight, resumed[0][1].bias], "lr": 0.5}]
    groups += [{"params": [resumed[0][1].weight, resumed[0][0].bias]}]
    resumed[1][1] = torch.optim.AdamW(groups)
    state, said = load(tmp_path, resumed)
    assert (state, said) == ({"step": 3}, [])
    # What is frozen comes from the checkpoint that the run began with.
    resumed[0][2].bias.data.copy_(stopped[0][2].bias)
    train(*resumed, range(3, 6))
    torch.testing.assert_close(weights(resumed), weights(through), rtol=0, atol=0)
    assert [group["lr"] for group in resumed[1][1].param_groups] == [0.5, 1e-3]


def test_a_run_that_rolls_back_forgets_moments_too(tmp_path: Path) -> None:
    made, through = make(0), make(0)
    train(*made, range(2))
    save(tmp_path, 2, made)
    train(*made, range(10, 14))
    assert load(tmp_path, made)[0] == {"step": 2}
    train(*made, range(2, 5))
    train(*through, range(5))
    torch.testing.assert_close(weights(made), weights(through), rtol=0, atol=0)


def test_the_first_state_may_have_no_moments(tmp_path: Path) -> None:
    save(tmp_path, 0, make(0))
    other = make(1)
    load(tmp_path, other)
    assert [len(optimizer.state) for optimizer in other[1]] == [0, 0]


def test_averaged_weights_are_saved_beside_the_weights(tmp_path: Path) -> None:
    made, names = make(0), [n for n, p in make(0)[0].named_parameters() if p.requires_grad]
    ema = {name: torch.full_like(made[0].get_parameter(name), 0.25) for name in names}
    save(tmp_path, 1, made, ema=ema)
    back = {name: torch.zeros_like(tensor) for name, tensor in ema.items()}
    load(tmp_path, make(1), back)
    torch.testing.assert_close(back, ema, rtol=0, atol=0)
    with pytest.raises(UserError, match="belongs to another model"):
        load(tmp_path, make(1))


def test_nothing_on_disk_is_pickled_and_frozen_weights_stay_out(tmp_path: Path) -> None:
    made = make(0)
    train(*made, range(1))
    save(tmp_path, 1, made)
    (directory,) = step_directories(tmp_path)
    assert names(directory) == [
        "checksums.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "state.json",
    ]
    sums = json.loads((directory / "checksums.json").read_text())
    assert sorted(sums) == names(directory)[1:]
    header = (directory / names(directory)[1]).read_bytes()
    length = int.from_bytes(header[:8], "little")
    held = json.loads(header[8 : 8 + length])
    assert {"weights.0.weight", "optimizer.0.weight.momentum_buffer"} <= held.keys()
    assert not any("2.bias" in key for key in held if key != "__metadata__")


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    made = make(0)
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, step, made)
    assert [path.name for path in step_directories(tmp_path)] == ["step_999999", "step_1000000"]
    save(tmp_path, 1_000_001, made, keep_last=1)
    assert names(tmp_path) == ["step_1000001"]


def test_a_damaged_state_is_passed_over_and_then_replaced(tmp_path: Path) -> None:
    made = make(0)
    save(tmp_path, 1, made)
    save(tmp_path, 2, make(2))
    save(tmp_path, 3, make(3))
    two, three = step_directories(tmp_path)
    flip_a_byte(next(three.glob("*.safetensors")))
    other = make(1)
    state, said = load(tmp_path, other)
    assert state == {"step": 2}
    assert [str(three) in one and "shard-00001" in one for one in said] == [True]
    torch.testing.assert_close(weights(other)["0.weight"], weights(make(2))["0.weight"])
    # The damaged one is not counted among those to keep, nor in the way of its successor.
    save(tmp_path, 2, make(4), keep_last=1)
    assert step_directories(tmp_path) == [two]
    load(tmp_path, other)
    torch.testing.assert_close(weights(other)["0.weight"], weights(make(4))["0.weight"])


@pytest.mark.parametrize("name", ["state.json", "checksums.json", "*.safetensors"])
@pytest.mark.parametrize("how", ["flip", "remove", "empty"])
def test_damage_is_seen_wherever_it_is(tmp_path: Path, name: str, how: str) -> None:
    save(tmp_path, 1, make(0))
    (path,) = (tmp_path / "step_000001").glob(name)
    {"flip": flip_a_byte, "remove": Path.unlink, "empty": lambda p: p.write_bytes(b"")}[how](path)
    said: list[str] = []
    with pytest.raises(UserError, match="every saved state"):
        load_latest(tmp_path, *make(1), None, ALONE, said.append)
    assert [path.name in one for one in said] == [True]


def test_another_models_state_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, make(0))
    wider = make(1, width=5)
    before = weights(wider)
    with pytest.raises(UserError, match="belongs to another model"):
        load(tmp_path, wider)
    torch.testing.assert_close(weights(wider), before, rtol=0, atol=0)


def test_a_run_without_states_has_none(tmp_path: Path) -> None:
    (tmp_path / "step_none").mkdir()
    assert load(tmp_path, make(0)) == (None, [])


@pytest.mark.parametrize("moment", ["_publish", "write_json", "step_directories"])
def test_a_kill_leaves_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, 1, make(0), keep_last=1)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, make(2), keep_last=1)
    assert (tmp_path / ".step_000002").exists() == (moment != "step_directories")
    state, said = load(tmp_path, make(1))
    assert (state, said) == ({"step": 2 if moment == "step_directories" else 1}, [])
    save(tmp_path, 3, make(3), keep_last=1)
    assert names(tmp_path) == ["step_000003"]


def test_a_full_disk_is_one_sentence_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, make(0))

    def full(self: Any, *args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dcp.HuggingFaceStorageWriter, "write_data", full)
        with pytest.raises(UserError, match=r"cannot save step 2 in .*: No space left"):
            save(tmp_path, 2, make(2))
    assert names(tmp_path) == ["step_000001"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        with pytest.raises(UserError, match="No space left"):
            save(tmp_path, 2, make(2))
    assert names(tmp_path) == ["step_000001"]
    assert load(tmp_path, make(1)) == ({"step": 1}, [])


FILLS_THE_DISK = """
import resource, sys, torch
from pathlib import Path
from rondo.errors import UserError
from rondo.training.checkpoint import save_state
from rondo.processes import World
run = Path(sys.argv[1])
def save(step):
    save_state(run, step, model, [], None, {}, 2, World(0, 1, torch.device("cpu")))
model = torch.nn.Linear(100, 100)
save(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    save(2)
except UserError as error:
    print(error)
"""


def test_a_file_that_the_system_cuts_off_is_one_sentence(tmp_path: Path) -> None:
    words = [sys.executable, "-c", FILLS_THE_DISK, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot save step 2 in {tmp_path}: File too large; ")
    assert names(tmp_path) == ["step_000001"]
