"""Keys and values of tokens that differ in depth.

A token has one entry in each layer of prelude and coda, and one for each iteration that it took in
each layer of the core. Which entry stands for a token at an iteration is read from a table, so what
a token that left early shows to deeper readers is a matter of table cells, not of copies:

    full       every token has an entry of its own at every iteration
    ragged     deeper readers are shown the entry of the token's last iteration (arXiv:2610.09013)
    recompute  deeper readers are shown one more entry, projected from the token's last state
    last       a single entry, overwritten by each iteration; tokens that are read in one call see
               each other at the same iteration, later ones see them at their last
    full-int8  full, but from the second iteration on an entry is kept as what it adds to the one
               before it, in eight bits (the idea of arXiv:2610.10381)

Shapes: B rows, T tokens of this call, S tokens so far, H heads, d head dimension, E entries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from .configuration_recurrent import RecurrentConfig
from .inputs_recurrent import Selection
from .stores_recurrent import NOBODY, Entries, ResidualStore, Store

CACHE_POLICIES = ("full", "ragged", "recompute", "last", "full-int8")


class View:
    """The cache as the layers of one pass see it.

    Args:
        cache: The whole cache.
        write: Where the new keys and values go, (B, T).
        read: What stands for each token, (B, S).
        iteration: Iteration (1-based) of the pass, 0 outside the loop.
    """

    def __init__(
        self, cache: "RecurrentCache", write: torch.Tensor, read: torch.Tensor, iteration: int = 0
    ):
        self._cache = cache
        self._store = cache.stores[0]
        self.write = write.contiguous()  # another stride would be another program, too
        self.read = read
        self.iteration = iteration

    def turn_to(self, layer_idx: int) -> None:
        """Show this layer's keys and values from now on.

        A layer does know its number. But to a compiler every number is another program.
        """
        self._store = self._cache.stores[layer_idx]
        self._store.grow()

    @property
    def tables(self) -> list[torch.Tensor]:
        """What stands for each token at each iteration so far."""
        return self._cache.tables

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values (B, H, T, d) and return all of the rows, (B, H, S, d)."""
        return self._store.exchange(self, key_states, value_states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Stopped(Exception):
    """A layer has projected its keys and values, and need not go on."""


class Projection(View):
    """A view that takes a layer's keys and values and stops it before it attends."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values.

        Raises:
            Stopped: Always.
        """
        self._store.exchange(self, key_states, value_states)
        raise Stopped


class RecurrentCache(Cache):
    """A cache for batches whose rows, and whose tokens, differ in depth.

    Rows can be selected, repeated and reordered without copying an entry.

    Args:
        config: The model's config.
        policy: What deeper iterations read of a token, one of `CACHE_POLICIES`.

    Attributes:
        recurrences: Iteration at which each token was finished, (B, S); 0 for padding.
        executed: Iterations each token ran, (B, S): more than the former where `full` keeps a
            token that has its answer in the loop.
        num_checks: Passes of a token through coda and head beside the one that answers it.
        state: Last state of the last token, (B, D), for a warm start.

    Raises:
        ValueError: There is no such policy.
    """

    def __init__(self, config: RecurrentConfig, policy: str = "full"):
        if policy not in CACHE_POLICIES:
            raise ValueError(f"cache_policy must be one of {CACHE_POLICIES}, got {policy!r}")
        super().__init__(layers=[])
        self.policy = policy
        self._config = config
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        config = self._config
        self.length = 0
        self.num_checks = 0
        self.branch_at = 0
        self.state: torch.Tensor | None = None
        self.once = self.branch = torch.zeros(0, 0, dtype=torch.long)
        self.tables: list[torch.Tensor] = []
        self.recurrences = self.executed = self.once
        self._spaces = {name: Entries() for name in ("once", "first", "later")}
        first, later = self._spaces["first"], self._spaces["later"]
        core = range(config.num_prelude_layers, config.num_prelude_layers + config.num_core_layers)
        int8 = self.policy == "full-int8"
        self.stores = [
            Store(self._spaces["once"])
            if layer not in core
            else (ResidualStore(first, later) if int8 else Store(first))
            for layer in range(config.num_hidden_layers)
        ]

    # ---- what a call of the model does

    def begin(self, shape: Sequence[int], depth: int | torch.Tensor, device: Any) -> None:
        """Make room for the T tokens of a call of B rows that will run to a depth (each).

        Tokens that were given back by `rewind` are taken up again.

        Raises:
            ValueError: Tokens before them are missing at that depth, or the batch has changed.
        """
        batch, count = shape
        if not self.once.shape[1]:
            self.once = self.branch = torch.zeros(batch, 0, dtype=torch.long, device=device)
            self.recurrences = self.executed = self.once
        if len(self.once) != batch:
            raise ValueError(f"the cache holds {len(self.once)} rows, the call has {batch}")
        if self.policy.startswith("full"):
            self._check_depth(depth)
        if self.policy == "full-int8" and not isinstance(depth, int):
            raise ValueError("the cache policy full-int8 needs one depth for all rows")
        self.start, self.length = self.length, self.length + count
        if (more := self.length - self.once.shape[1]) > 0:
            new = self._spaces["once"].take(batch * more).view(batch, more).to(device)
            self.once = torch.cat([self.once, new], 1)
            zeros = torch.zeros_like(new)
            self.recurrences = torch.cat([self.recurrences, zeros], 1)
            self.executed = torch.cat([self.executed, zeros], 1)

    def _check_depth(self, depth: int | torch.Tensor) -> None:
        seen = self.executed[:, : self.length]
        missing = (seen < torch.as_tensor(depth, device=seen.device).reshape(-1, 1)) & (seen > 0)
        if not bool(missing.any()):
            return
        row = int(missing.any(1).nonzero()[0])
        deepest = int(torch.as_tensor(depth).reshape(-1).expand(len(seen))[row])
        raise ValueError(
            f"the cache holds {self.length} tokens, but only {int((seen[row] >= deepest).sum())} "
            f"of them at iteration {deepest}: continue at the depth the prompt was computed at, "
            "take the cache policy ragged, or start anew"
        )

    def outside(self, selection: Selection | None = None) -> View:
        """Return the view of the layers that are no part of the loop."""
        return self._view(View, self.once[:, : self.length], selection)

    def branching(self, iteration: int) -> View:
        """Return the view of a coda that branches off every token's way, and keeps its own.

        Raises:
            ValueError: Tokens were read without such a branch at this iteration.
        """
        if self.start > self.branch.shape[1] or (self.start and self.branch_at != iteration):
            raise ValueError(
                f"the cache holds {self.start} tokens that were not read with a contrast of depth "
                f"{iteration}: start anew"
            )
        self.branch_at = iteration
        if (more := self.length - self.branch.shape[1]) > 0:
            batch = len(self.branch)
            new = self._spaces["once"].take(batch * more).view(batch, more)
            self.branch = torch.cat([self.branch, new.to(self.branch)], 1)
        return self._view(View, self.branch[:, : self.length], None)

    def enter(
        self, iteration: int, selection: Selection | None = None, kind: type[View] = View
    ) -> View:
        """Return the view of an iteration (1-based) that the selected tokens run, or all.

        Raises:
            ValueError: The policy is full-int8 and not all tokens run it.
        """
        int8 = self.policy == "full-int8"
        if int8 and selection is not None:
            raise ValueError("the cache policy full-int8 needs one depth for all tokens")
        if len(self.tables) < iteration:
            self.tables.append(torch.full_like(self.once[:, : self.length], -1))
        table = self._widened(self.tables[iteration - 1])
        before = self.tables[max(iteration - 2, 0)]
        if self.policy == "last" and iteration > 1:
            table = before
        else:
            space = self._spaces["later" if int8 and iteration > 1 else "first"]
            new_BT = table[:, self.start :]
            if selection is None:
                new_BT.copy_(space.take(new_BT.numel()).view(new_BT.shape))
            else:
                where = selection.tokens(new_BT)
                new_BT[where] = space.take(len(where[0])).to(table)
            # Whoever has none of its own shows the one before, and padding shows nobody's.
            table = torch.where(table < 0, before, table) if iteration > 1 else table.clamp_min(0)
        self.tables[iteration - 1] = table
        return self._view(kind, table, selection, iteration)

    def finished(self, recurrences: int | torch.Tensor, executed: int | torch.Tensor) -> None:
        """Note at which iteration the tokens of this call were finished, and how many they ran.

        Args:
            recurrences: For all, by row (B,) or by token (B, T).
            executed: Likewise.
        """
        for store in self.stores:
            store.forget_scratch()  # nobody reads it before the next call makes it anew
        for noted, what in ((self.recurrences, recurrences), (self.executed, executed)):
            place = noted[:, self.start : self.length]
            new = torch.as_tensor(what, device=place.device)
            place.copy_(new[:, None] if new.dim() == 1 else new)

    def _widened(self, table: torch.Tensor) -> torch.Tensor:
        """Return a table with a column for each token so far, -1 where it has no entry yet."""
        return torch.nn.functional.pad(table, (0, self.length - table.shape[1]), value=-1)

    def _view(
        self, kind: type[View], table: torch.Tensor, selection: Selection | None, iteration: int = 0
    ) -> View:
        write = table[:, self.start :]
        if selection is None:
            return kind(self, write, table, iteration)
        taken = selection.take(write, spare=NOBODY)
        return kind(self, taken, table.index_select(0, selection.rows), iteration)

    # ---- what a decoding strategy does

    def rewind(self, count: int) -> None:
        """Let the next call be one of the last `count` tokens again, from where they stopped."""
        self.length -= count
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget tokens as the library asks for it: by a negative number, or 0.

        Raises:
            ValueError: The number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop() takes a negative number of tokens, got {tokens_to_remove}")
        self.forget(-tokens_to_remove)

    def forget(self, count: int) -> None:
        """Forget the last `count` tokens, and free their entries."""
        if not count:
            return
        kept = self.length - count
        self.state = None
        for name in ("once", "first", "later"):
            dropped = [table[:, kept:].flatten() for table in self._tables_of(name)]
            numbers = torch.cat(dropped).unique() if dropped else torch.zeros(0)
            self._spaces[name].give_back(numbers[numbers > NOBODY])
        self.once, self.branch = self.once[:, :kept], self.branch[:, :kept]
        self.tables = [table[:, :kept] for table in self.tables]
        self.recurrences, self.executed = self.recurrences[:, :kept], self.executed[:, :kept]
        self.length = kept

    def _tables_of(self, space: str) -> list[torch.Tensor]:
        """Return the tables whose cells are entries of a space."""
        if space == "once":
            return [self.once, self.branch]
        split = 1 if self.policy == "full-int8" else len(self.tables)
        return self.tables[:split] if space == "first" else self.tables[split:]

    def _take_rows(self, index: torch.Tensor) -> None:
        self.once, self.branch = self.once[index], self.branch[index]
        self.tables = [table[index] for table in self.tables]
        self.recurrences, self.executed = self.recurrences[index], self.executed[index]
        self.state = None if self.state is None else self.state[index]
        for store in self.stores:
            store.forget_scratch()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i continue what row beam_idx[i] held."""
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows of the batch."""
        self._take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        rows = torch.arange(len(self.recurrences), device=self.recurrences.device)
        self._take_rows(rows.repeat_interleave(repeats))

    # ---- what the library asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens so far."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many keys a call of so many tokens will see, and the place of the first."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no most."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in use, and of the tables that find them."""
        tables = [self.once, self.branch, *{id(one): one for one in self.tables}.values()]
        kept = sum(store.nbytes for store in self.stores)
        return kept + sum(table.nbytes for table in tables)
