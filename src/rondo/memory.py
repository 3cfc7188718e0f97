"""Whether a request fits into memory, told before anything is loaded.

Counted are weights, cache and logits, each as its upper bound. What passes through the layers is
left a tenth of what is free. A system that does not say what is free is believed to have enough.

A limit that a container sets is read where Linux keeps it (cgroups, both versions).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rondo.errors import UserError
from rondo.flops import Costs, kv_heads_of

SPARED = 0.9
# Stores of a `RecurrentCache` grow by a quarter, and a larger one is filled beside the old.
GROWTH = 1.25
# A KL of logits in float32: both, their exponential, their difference, and the product.
READOUT_COPIES = 5


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        depths: r of each row; with an exit, its cap.
        prompt: Tokens of a row's prompt.
        new: Tokens to generate at most.
        policy: Cache policy, or None for the plain cache of one fixed depth.
        readouts: Tokens of a row whose logits are held at once.
        branching: Whether the coda branches off at a shallower depth and keeps keys of its own.
    """

    depths: tuple[int, ...]
    prompt: int
    new: int
    policy: str | None = None
    readouts: int = 1
    branching: bool = False


@dataclass(frozen=True)
class Forecast:
    """Bytes that a request takes at most."""

    weights: int
    loading: int
    """Those of the weights while they are loaded, before they are rounded to int8."""
    cache: int
    logits: int

    @property
    def needed(self) -> int:
        """The most that is held at once."""
        return max(self.loading, self.weights + self.cache + self.logits)


@dataclass(frozen=True)
class Holder:
    """A model in which a request is held: what it is made of, in which types.

    Attributes:
        costs: What it is made of.
        kv_heads: Key/value heads of a layer.
        vocab_size: V.
        value_bytes: Bytes of a weight and of a cached value.
        int8: Whether the layers' matrices are rounded to int8.
        loaded: Whether the weights are in memory already, and need no more of it.
    """

    costs: Costs
    kv_heads: int
    vocab_size: int
    value_bytes: int
    int8: bool = False
    loaded: bool = False

    @classmethod
    def of(
        cls, costs: Costs, config: Any, dtype: torch.dtype, int8: bool, loaded: bool = False
    ) -> "Holder":
        """Read a `RecurrentConfig`."""
        heads = kv_heads_of(config.base_config)
        return cls(costs, heads, config.vocab_size, dtype.itemsize, int8, loaded)

    def forecast(self, request: Request) -> Forecast:
        """Return the bytes that a request takes."""
        whole = self.costs.total_parameters * self.value_bytes
        layers = self.costs.prelude_matmul + self.costs.core_matmul + self.costs.coda_matmul
        weights = whole - self.int8 * layers * (self.value_bytes - 1)
        rows, length = len(request.depths), request.prompt + request.new
        cache = length * sum(self.bytes_per_token(request, depth) for depth in request.depths)
        copies = READOUT_COPIES if request.readouts > 1 else 2
        per_value = 2 * self.value_bytes + 4 * copies
        logits = rows * request.readouts * self.vocab_size * per_value
        if self.loaded:
            return Forecast(0, 0, cache, logits)
        return Forecast(weights, whole, cache, logits)

    def bytes_per_token(self, request: Request, depth: int) -> int:
        """Return the cache bytes of a token that goes to a depth.

        `ragged` and `recompute` are counted as `full`: nothing promises that a token leaves early.
        """
        costs, width = self.costs, 2 * self.costs.kv_width * self.value_bytes
        branch = request.branching * width * costs.num_coda_layers
        match request.policy:
            case None:
                return costs.kv_bytes(depth, self.value_bytes)
            case "last":
                held = costs.kv_bytes(1, self.value_bytes)
            case "full-int8":
                residual = 2 * costs.kv_width + 2 * self.kv_heads * self.value_bytes
                later = (depth - 1) * costs.num_core_layers * residual
                # One iteration is held whole while it is read.
                reading = width * costs.num_core_layers * (depth > 1)
                held = costs.kv_bytes(1, self.value_bytes) + later + reading
            case _:
                held = costs.kv_bytes(depth, self.value_bytes)
        tables = 8 * (depth + 4)
        return int(GROWTH * (held + branch)) + tables


def check_memory(holder: Holder, request: Request, free: int | None) -> Forecast:
    """Return the forecast of a request that fits.

    Args:
        holder: The model.
        request: What is asked for.
        free: Bytes that are free, or None where that is not known.

    Raises:
        UserError: It does not fit; named is what would.
    """
    found = holder.forecast(request)
    if free is None or found.needed <= SPARED * free:
        return found
    parts = {"weights": found.weights, "cache": found.cache, "logits": found.logits}
    listed = ", ".join(f"{name} {in_words(count)}" for name, count in parts.items() if count)
    hints = list(_remedies(holder, request, SPARED * free))
    told = f"{' or '.join(hints)} would fit" if hints else "no depth or length would fit"
    raise UserError(
        f"this needs {in_words(found.needed)} ({listed}) and {in_words(free)} are free, of which "
        f"a tenth is kept for the layers: {told}"
    )


def _remedies(holder: Holder, request: Request, room: float) -> Iterator[str]:
    def fits(changed: Request) -> bool:
        return holder.forecast(changed).needed <= room

    deepest = max(request.depths)
    depth = largest(
        deepest - 1,
        lambda most: fits(replace(request, depths=tuple(min(r, most) for r in request.depths))),
    )
    if depth:
        yield f"--recurrences {depth}"
    if new := largest(request.new - 1, lambda most: fits(replace(request, new=most))):
        yield f"--max-new-tokens {new}"
    for policy in ("full-int8", "last"):
        alike = len(set(request.depths)) == 1 or policy == "last"
        if policy != request.policy and alike and fits(replace(request, policy=policy)):
            yield f"--cache {policy}"
            return


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to `most` that fits, 0 if none does; less fits always."""
    low, high = 0, max(most, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def in_words(count: float) -> str:
    """Return bytes as text, in GB, MB or kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    found = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
    available = 1024 * int(found["MemAvailable"].split()[0])
    own = Path("/proc/self/cgroup")
    groups = own.read_text(encoding="utf-8") if own.is_file() else ""
    return min([available, *group_rooms(Path("/sys/fs/cgroup"), groups)])


def group_rooms(root: Path, groups: str) -> Iterator[int]:
    """Yield the bytes left under each limit on this process's groups and those around them.

    Args:
        root: Where the groups are mounted.
        groups: What /proc/self/cgroup says: lines of number:controllers:path.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / controllers if controllers else root
        place = mount / path.lstrip("/")
        # Within a container the path may be told as the host sees it; the mount is its own then.
        for group in dict.fromkeys((place, *place.parents)):
            if group == mount or mount in group.parents:
                yield from _room(group, *_FILES[bool(controllers)])


_FILES = {
    False: ("memory.max", "memory.current", "inactive_file"),
    True: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _room(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    files = [group / name for name in (limit, usage, "memory.stat")]
    if not all(file.is_file() for file in files):
        return
    most, used, stat = (file.read_text(encoding="utf-8") for file in files)
    if most.strip() == "max":
        return
    # Files that were read are counted as used, and given back when memory is short.
    kept = dict(row.split() for row in stat.splitlines())
    yield max(0, int(most) - int(used) + int(kept.get(reclaimable, 0)))
