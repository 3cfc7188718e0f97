"""Where the keys and values of a `RecurrentCache` lie: entries that are taken and given back.

Shapes: B rows, T tokens of this call, S tokens so far, H heads, d head dimension, E entries.
"""

from typing import Any

import torch

GROWTH = 256
# Entry 0 of every store belongs to no token: what nobody wants is written there.
NOBODY = 0


class Entries:
    """Numbers of the entries that are in use, alike in all layers that run together."""

    def __init__(self) -> None:
        self.capacity = 1
        self._free: list[int] = []

    def take(self, count: int) -> torch.Tensor:
        """Return the numbers of entries that were free, (count,)."""
        if (missing := count - len(self._free)) > 0:
            # A quarter more than there was, so that a long text is copied a few times only.
            more = max(missing, GROWTH, self.capacity // 4)
            self._free[:0] = range(self.capacity + more - 1, self.capacity - 1, -1)
            self.capacity += more
        left = len(self._free) - count
        taken = self._free[left:][::-1]
        del self._free[left:]
        return torch.tensor(taken, dtype=torch.long)

    def give_back(self, numbers: torch.Tensor) -> None:
        """Free entries."""
        self._free += reversed(numbers.tolist())

    @property
    def used(self) -> int:
        """How many are in use."""
        return self.capacity - 1 - len(self._free)


class Store:
    """Keys and values of one layer, each (E, H, d)."""

    def __init__(self, entries: Entries):
        self.entries = entries
        self.kept: list[torch.Tensor] = []

    def grow(self) -> None:
        """Make room for all entries that there are."""
        for number, kept in enumerate(self.kept):
            if len(kept) < self.entries.capacity:
                grown = kept.new_zeros(self.entries.capacity, *kept.shape[1:])
                grown[: len(kept)] = kept
                self.kept[number] = grown

    def _write(self, number: int, where: torch.Tensor, value: torch.Tensor) -> None:
        """Keep (B, H, T, d) in the entries (B, T) of a kept tensor."""
        while len(self.kept) <= number:
            shape = self.entries.capacity, value.shape[1], value.shape[3]
            self.kept.append(value.new_zeros(shape))
        self.kept[number].index_copy_(0, where.flatten(), value.transpose(1, 2).flatten(0, 1))

    def _read(self, number: int, where: torch.Tensor) -> torch.Tensor:
        """Return (B, H, S, d) of the entries (B, S)."""
        found = self.kept[number].index_select(0, where.flatten())
        return found.unflatten(0, where.shape).transpose(1, 2)

    def exchange(self, view: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """Keep the new keys and values (B, H, T, d) and return all, (B, H, S, d)."""
        self._write(0, view.write, keys)
        self._write(1, view.write, values)
        return self._read(0, view.read), self._read(1, view.read)

    def forget_scratch(self) -> None:
        """Forget what depends on which rows there are."""

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in use."""
        return self.entries.used * sum(kept[:1].nbytes for kept in self.kept)


class ResidualStore(Store):
    """Keys and values of one core layer: whole at the first iteration, then what each adds.

    What an iteration adds is taken to the entry before it as it will be read, so errors do not
    add up. A residual is 255 steps of a size that each head of each token has for itself.
    """

    def __init__(self, first: Entries, later: Entries):
        super().__init__(later)
        self.whole = Store(first)
        self.forget_scratch()

    def exchange(self, view: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """Keep the new keys and values (B, H, T, d) and return all, (B, H, S, d)."""
        if view.iteration == 1:
            now = self.whole.exchange(view, keys, values)
        else:
            start = view.read.shape[1] - keys.shape[2]
            now = self._before(view)
            for number, new in enumerate((keys, values)):
                residual = new - now[number][:, :, start:]
                step = residual.abs().amax(-1, keepdim=True) / 127
                step = step.clamp_min(torch.finfo(step.dtype).tiny)
                # A step that bfloat16 rounded down makes 128 of the largest, which is -128.
                steps = (residual.float() / step.float()).round().clamp(-127, 127)
                self._write(2 * number, view.write, steps.to(torch.int8))
                self._write(2 * number + 1, view.write, step)
            now = self._add(now, view.read)
        self._now = {"iteration": view.iteration, "entries": now}
        return now

    def grow(self) -> None:
        """Make room for all entries that there are."""
        super().grow()
        self.whole.grow()

    def forget_scratch(self) -> None:
        """Forget the entries of the iteration before."""
        self._now = {"iteration": 0}

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in use; not of one iteration's, held whole while it is read."""
        return super().nbytes + self.whole.nbytes

    def _before(self, view: Any) -> Any:
        """Return all keys and values of the iteration before, the new tokens' too."""
        if self._now["iteration"] == view.iteration - 1:
            return self._now["entries"]
        tables = view.tables
        now = self.whole._read(0, tables[0]), self.whole._read(1, tables[0])
        for table in tables[1 : view.iteration - 1]:
            now = self._add(now, table)
        return now

    def _add(self, now: Any, where: torch.Tensor) -> Any:
        return tuple(
            before + self._read(2 * number, where).to(before) * self._read(2 * number + 1, where)
            for number, before in enumerate(now)
        )
