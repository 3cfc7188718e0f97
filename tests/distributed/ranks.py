"""What each rank of `test_ranks.py` does; the first one writes what was found to a JSON file.

Nothing is asserted here: a rank that stops alone would leave the others waiting.
"""

import errno
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

from conftest import recurrent
from rondo.errors import UserError
from rondo.processes import World, barrier, gather, join, leave, total
from rondo.training import checkpoint
from rondo.training.distributed import clip_gradients, shard, trainable, whole_state

# Depth and window; llama's head is its own, qwen3's is its embedding.
DEPTHS = [(1, 1), (4, 4), (6, 2)]
FAMILIES = ["llama", "qwen3"]
ROWS, TOKENS = 8, 12
COLLECTIVES = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_"


class Objective(nn.Module):
    """Stands in for the trainer's: rows to a summed loss."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, rows: torch.Tensor, **options: Any) -> torch.Tensor:
        output = self.model.model(rows[:, :-1], **options)
        hidden = [output.last_hidden_state, *output.branches]
        logits = torch.cat([self.model.logits(one) for one in hidden]).float()
        labels = rows[:, 1:].repeat(len(hidden), 1)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def objective(family: str, seed: int = 0) -> Objective:
    """A tiny model, the same on every rank."""
    made = Objective(recurrent(family, injection="linear", max_recurrences=8))
    with torch.no_grad():
        torch.manual_seed(seed)
        for parameter in made.parameters() if seed else ():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def shard_over(world: World, root: Objective, replicas: int = 1) -> Objective:
    body = root.model.model
    shard(root, [*body.prelude, *body.coda], world, replicas)
    return root


def batch(step: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (ROWS, TOKENS + 1), generator=torch.manual_seed(100 + step))


def backward(world: World, root: Objective, rows: torch.Tensor, **options: Any) -> float:
    """Make the gradient of the mean loss over all rows, each rank on its share."""
    own = rows.chunk(world.size)[world.rank]
    loss = root(own, **({"num_recurrences": 4, "backprop_depth": 4} | options))
    (loss * world.size / (ROWS * TOKENS)).backward()
    return total(world, [float(loss.detach())])[0] / (ROWS * TOKENS)


def full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(root: Objective) -> dict[str, torch.Tensor]:
    found = {name: full(one.grad).clone() for name, one in trainable(root).items()}
    root.zero_grad()
    return found


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).norm() / other[key].norm()) for key in one)


def optimizers(root: Objective) -> list[torch.optim.Optimizer]:
    named = trainable(root.model)
    muon = [p for name, p in named.items() if ".layers." in name and p.ndim == 2]
    rest = [p for p in named.values() if not any(p is one for one in muon)]
    return [torch.optim.Muon(muon, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3)]


def train(world: World, root: Objective, moved_by: list[Any], steps: range) -> list[float]:
    norms = []
    for step in steps:
        backward(world, root, batch(step))
        norms.append(clip_gradients(root.parameters(), 0.5))
        for optimizer in moved_by:
            optimizer.step()
            optimizer.zero_grad()
    return norms


def weights(root: Objective) -> dict[str, torch.Tensor]:
    return {name: full(one.detach()).clone() for name, one in trainable(root.model).items()}


def alone(world: World) -> World:
    return World(0, 1, world.device)


def compare_gradients(world: World, replicas: int = 1) -> dict[str, float]:
    found = {}
    for family in FAMILIES:
        whole, split = objective(family), shard_over(world, objective(family), replicas=replicas)
        cases = [(r, k, kept, ()) for (r, k), kept in itertools.product(DEPTHS, [False, True])]
        for r, k, kept, branches in [*cases, (4, 2, True, (1,))]:
            options = {"num_recurrences": r, "backprop_depth": k, "output_recurrences": branches}
            losses = [
                backward(one, root, batch(), checkpoint_iterations=kept, **options)
                for one, root in ((alone(world), whole), (world, split))
            ]
            key = f"{family} r={r} k={k} checkpoint={kept} branches={branches}"
            found[key] = max(gap(gradients(split), gradients(whole)), abs(losses[0] - losses[1]))
    return found


def count_collectives(world: World) -> dict[str, list[int]]:
    """Gathers and scatters of one forward and backward, at several depths."""
    found = {}
    root = shard_over(world, objective("llama"))
    for r, kept in [(1, False), (4, False), (4, True)]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            options = {"num_recurrences": r, "backprop_depth": r}
            backward(world, root, batch(), checkpoint_iterations=kept, **options)
        names = [event.name for event in seen.events()]
        found[f"r={r} checkpoint={kept}"] = [names.count(name) for name in COLLECTIVES]
    return found


def compare_bfloat16(world: World) -> dict[str, Any]:
    whole, split = objective("llama"), shard_over(world, objective("llama"))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        backward(alone(world), whole, batch())
        backward(world, split, batch())
    held = {str(t.dtype) for p in trainable(split).values() for t in (p, p.grad)}
    return {"held": sorted(held), "gap": gap(gradients(split), gradients(whole))}


def compare_steps(world: World) -> dict[str, Any]:
    """Two steps of clipping, Muon and AdamW."""
    whole, split = objective("qwen3"), shard_over(world, objective("qwen3"))
    norms = train(alone(world), whole, optimizers(whole), range(2))
    return {
        "norms": [norms, train(world, split, optimizers(split), range(2))],
        "gap": gap(weights(split), weights(whole)),
        "moved": gap(weights(split), weights(objective("qwen3"))),
    }


def save_and_go_on(world: World, directory: Path) -> dict[str, Any]:
    """A run that is saved, and another that goes on from it over the same number of ranks."""
    root, other = objective("qwen3"), objective("qwen3", seed=1)
    shard_over(world, root)
    shard_over(world, other)
    moved_by, others = optimizers(root), optimizers(other)
    train(world, root, moved_by, range(2))
    ema = {name: one.detach().clone() for name, one in trainable(root.model).items()}
    # As validation does; the weights that it gathers are not the ones to save.
    with torch.no_grad():
        root(batch()[:2], num_recurrences=2, backprop_depth=2)
    checkpoint.save_state(directory, 2, root.model, moved_by, ema, {"rows": 16}, 2, world)
    train(world, root, moved_by, range(2, 4))

    loaded_ema = {name: one.detach().clone() for name, one in trainable(other.model).items()}
    before = gap({k: full(v) for k, v in loaded_ema.items()}, {k: full(v) for k, v in ema.items()})
    with torch.no_grad():
        stale = other(batch()[:2], num_recurrences=2, backprop_depth=2)
    state = checkpoint.load_latest(directory, other.model, others, loaded_ema, world, print)
    with torch.no_grad():
        fresh = other(batch()[:2], num_recurrences=2, backprop_depth=2)
    train(world, other, others, range(2, 4))
    expected, got = weights(root), weights(other)
    same = [torch.equal(expected[key], got[key]) for key in expected]
    same += [torch.equal(full(ema[key]), full(loaded_ema[key])) for key in ema]
    state_dict = whole_state(root.model)
    held = gather(world, len(state_dict))
    if world.first:
        root.model.save_pretrained(directory / "final", state_dict=state_dict)
        save_file(expected, directory / "expected.safetensors")
    return {
        "state": state,
        "same": all(same),
        "before": before,
        "moved_loss": abs(float(stale - fresh)),
        "whole_state": held,
    }


def load_what_one_process_saved(world: World, directory: Path, replicas: int) -> dict[str, Any]:
    root = shard_over(world, objective("qwen3", seed=1), replicas=replicas)
    moved_by = optimizers(root)
    state = checkpoint.load_latest(directory, root.model, moved_by, None, world, print)
    train(world, root, moved_by, range(2, 4))
    whole = objective("qwen3")
    train(alone(world), whole, optimizers(whole), range(4))
    saved = directory / f"by_{world.size}"
    if world.first:
        saved.mkdir()
    barrier(world)
    checkpoint.save_state(saved, 4, root.model, moved_by, None, {"rows": 32}, 2, world)
    return {"state": state, "gap": gap(weights(root), weights(whole))}


def save_what_does_not_divide(world: World, directory: Path) -> list[int]:
    """Three rows, and one, over the ranks: some hold less, some nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    shard(model, [], world, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    checkpoint.save_state(directory, 1, model, [optimizer], None, {}, 2, world)
    expected = {name: full(one.detach()) for name, one in trainable(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoint.load_latest(directory, model, [optimizer], None, world, print)
    return [int(torch.equal(full(p.detach()), expected[n])) for n, p in trainable(model).items()]


def fail_to_save(world: World, directory: Path) -> dict[str, Any]:
    """A disk that fills up for the last rank, and then a shard of its that is damaged."""
    model = nn.Linear(64, 64)
    shard(model, [], world, 1)

    def full_disk(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(step: int) -> str:
        try:
            checkpoint.save_state(directory, step, model, [], None, {"step": step}, 3, world)
        except UserError as error:
            return str(error)
        return "saved"

    told = [save(1), save(2)]
    writer: Any = checkpoint.dcp.HuggingFaceStorageWriter
    write = writer.write_data
    if world.rank == world.size - 1:
        writer.write_data = full_disk
    told.append(save(3))
    writer.write_data = write
    left = sorted(path.name for path in directory.iterdir())
    barrier(world)
    if world.first:
        last = sorted((directory / "step_000002").glob("*.safetensors"))[-1]
        last.write_bytes(last.read_bytes()[:-4])
    barrier(world)
    said: list[str] = []
    state = checkpoint.load_latest(directory, model, [], None, world, said.append)
    facts = {"told": told, "left": left, "state": state, "said": said}
    return {"ranks": gather(world, facts)}


def refuse_replicas(world: World) -> str:
    try:
        shard(nn.Linear(2, 2), [], world, 3)
    except UserError as error:
        return str(error)
    return ""


def place(directory: Path, name: str, world: World) -> Path:
    if world.first:
        (directory / name).mkdir()
    barrier(world)
    return directory / name


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    world = join("cpu", timeout_minutes=2)
    checks: dict[str, Callable[[], Any]] = {
        "total": lambda: total(world, [world.rank + 0.1, 2.0]),
        "gradients": lambda: compare_gradients(world, replicas=world.size // 2),
        "from_one": lambda: load_what_one_process_saved(
            world, directory / "one", replicas=world.size // 2
        ),
    }
    if world.size == 2:
        checks |= {
            "collectives": lambda: count_collectives(world),
            "bfloat16": lambda: compare_bfloat16(world),
            "steps": lambda: compare_steps(world),
            "resume": lambda: save_and_go_on(world, place(directory, "two", world)),
            "uneven": lambda: save_what_does_not_divide(world, place(directory, "uneven", world)),
            "failures": lambda: fail_to_save(world, place(directory, "failures", world)),
            "replicas": lambda: refuse_replicas(world),
        }
    found = {name: check() for name, check in checks.items()}
    if world.first:
        path = directory / f"found_by_{world.size}.json"
        path.write_text(json.dumps(found), encoding="utf-8")
    leave(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
