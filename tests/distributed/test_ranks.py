"""Several processes do what one does: gradients, steps, states that load on any number of ranks.

Each number of ranks is launched once, as a user launches it; `ranks.py` is what they run.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import Objective, objective, optimizers, train, weights
from safetensors.torch import load_file

from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.processes import World, join, leave, total
from rondo.training.checkpoint import load_latest, save_state
from rondo.training.distributed import shard, whole_state

ALONE = World(0, 1, torch.device("cpu"))
HERE = Path(__file__).parent


def launch(directory: Path, size: int) -> dict[str, Any]:
    """Let the ranks do their checks beside a state that one process saved; return the findings."""
    one = directory / "one"
    one.mkdir()
    root = objective("qwen3")
    moved_by = optimizers(root)
    train(ALONE, root, moved_by, range(2))
    save_state(one, 2, root.model, moved_by, None, {"rows": 16}, 2, ALONE)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    done = subprocess.run(
        [sys.executable, *words, str(HERE / "ranks.py"), str(directory)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((directory / f"found_by_{size}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("two")
    return directory, launch(directory, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("four")
    return directory, launch(directory, 4)


Found = tuple[Path, dict[str, Any]]


def loaded(directory: Path) -> tuple[Objective, list[Any], Any]:
    """A model of other weights in one process, restored from a state."""
    root = objective("qwen3", seed=1)
    moved_by, said = optimizers(root), []
    state = load_latest(directory, root.model, moved_by, None, ALONE, said.append)
    assert not said
    return root, moved_by, state


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Muon orthogonalises in bfloat16, which lets a last bit of a gradient show."""
    return ranks.gap(one, other) < 2e-3


def test_gradients_are_those_of_one_process(two: Found) -> None:
    gaps = two[1]["gradients"]
    assert len(gaps) == 14
    assert {key: gap for key, gap in gaps.items() if not gap < 2e-6} == {}


def test_depth_costs_no_communication(two: Found) -> None:
    counts = two[1]["collectives"]
    # Four layers outside the loop are gathered forward and backward, the root once for both.
    assert set(map(tuple, counts.values())) == {(9, 5)}


def test_bfloat16_is_the_affair_of_autocast_alone(two: Found) -> None:
    assert two[1]["bfloat16"]["held"] == ["torch.float32"]
    assert two[1]["bfloat16"]["gap"] < 0.01


def test_clipping_muon_and_adamw_move_shards_as_they_move_the_whole(two: Found) -> None:
    one, many = two[1]["steps"]["norms"]
    # The first is that of a gradient; the second has Muon's bfloat16 behind it.
    assert many[0] == pytest.approx(one[0], rel=1e-5)
    assert many[1] == pytest.approx(one[1], rel=1e-3)
    assert min(one) > 0.5
    assert two[1]["steps"]["gap"] < 2e-3 < two[1]["steps"]["moved"]


def test_a_state_goes_on_bit_for_bit_on_as_many_ranks(two: Found) -> None:
    found = two[1]["resume"]
    assert found["state"] == {"rows": 16}
    assert found["same"]
    # Otherwise it would have been the same without loading.
    assert found["before"] > 1e-3
    assert found["moved_loss"] > 1e-3


def test_a_state_of_two_ranks_goes_on_in_one_process(two: Found) -> None:
    directory = two[0] / "two"
    root = objective("qwen3", seed=1)
    moved_by = optimizers(root)
    ema = {name: torch.zeros_like(one) for name, one in weights(root).items()}
    assert load_latest(directory, root.model, moved_by, ema, ALONE, print) == {"rows": 16}
    torch.testing.assert_close(ema, weights(root), rtol=0, atol=0)
    train(ALONE, root, moved_by, range(2, 4))
    assert close(weights(root), load_file(directory / "expected.safetensors"))


def test_a_state_of_one_process_goes_on_over_two_ranks_and_back(two: Found) -> None:
    assert two[1]["from_one"]["state"] == {"rows": 16}
    assert two[1]["from_one"]["gap"] < 2e-3
    root, moved_by, state = loaded(two[0] / "one" / "by_2")
    through = objective("qwen3")
    train(ALONE, through, optimizers(through), range(5))
    train(ALONE, root, moved_by, range(4, 5))
    assert state == {"rows": 32}
    assert close(weights(root), weights(through))


def test_the_first_rank_has_the_whole_model_to_save(two: Found) -> None:
    first, second = two[1]["resume"]["whole_state"]
    assert second == 0 < first
    model = RecurrentForCausalLM.from_pretrained(two[0] / "two" / "final")
    expected = load_file(two[0] / "two" / "expected.safetensors")
    torch.testing.assert_close(weights(Objective(model)), expected, rtol=0, atol=0)


def test_weights_with_fewer_rows_than_ranks_are_saved(two: Found) -> None:
    assert two[1]["uneven"] == [1, 1, 1, 1]
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    assert load_latest(two[0] / "uneven", model, [optimizer], None, ALONE, print) == {}
    assert float(optimizer.state[model[1].weight]["step"]) == 1


def test_a_disk_that_is_full_for_one_rank_is_full_for_all(two: Found) -> None:
    for facts in two[1]["failures"]["ranks"]:
        assert facts["told"][:2] == ["saved", "saved"]
        assert facts["told"][2].startswith("cannot save step 3 in ")
        assert "No space left on device" in facts["told"][2]
        assert facts["left"] == ["step_000001", "step_000002"]


def test_a_shard_that_is_damaged_is_passed_over_by_all_ranks(two: Found) -> None:
    first, second = two[1]["failures"]["ranks"]
    assert first["state"] == second["state"] == {"step": 1}
    assert second["said"] == []
    assert ["step_000002" in one and "shard-00002" in one for one in first["said"]] == [True]


def test_sums_are_over_ranks(two: Found) -> None:
    assert two[1]["total"] == pytest.approx([1.2, 4.0], rel=1e-12)


def test_replicas_that_do_not_divide_are_refused(two: Found) -> None:
    assert two[1]["replicas"].startswith("machine.replicas 3 does not divide the 2 processes")


@pytest.mark.slow
def test_replicas_of_shards_do_what_one_process_does(four: Found) -> None:
    gaps = four[1]["gradients"]
    assert {key: gap for key, gap in gaps.items() if not gap < 2e-6} == {}
    assert four[1]["from_one"]["state"] == {"rows": 16}
    assert four[1]["from_one"]["gap"] < 2e-3
    root, _, state = loaded(four[0] / "one" / "by_4")
    through = objective("qwen3")
    train(ALONE, through, optimizers(through), range(4))
    assert state == {"rows": 32}
    assert close(weights(root), weights(through))


def test_one_process_needs_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Left over from a scheduler, and no word of torchrun.
    monkeypatch.setenv("WORLD_SIZE", "8")
    world = join("cpu")
    assert (world.rank, world.size, world.first) == (0, 1, True)
    root = objective("llama")
    before = weights(root)
    shard(root, list(root.model.model.layers), world, replicas=3)
    torch.testing.assert_close(weights(root), before, rtol=0, atol=0)
    assert total(world, [1, 0.5]) == [1.0, 0.5]
    assert whole_state(root.model).keys() == root.model.state_dict().keys()
    assert math.isfinite(ranks.backward(world, root, ranks.batch()))
    leave(world)
