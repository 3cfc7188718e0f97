"""Where keys and values lie: pages of one size, taken by whatever needs them.

A token has one entry for the layers of prelude and coda together, and one for each of its
iterations in the layers of the core. The two kinds of entry differ in size, so a page, the unit of
allocation, is cut into entries of one kind when it is taken and of any kind the next time. That
way a load of shallow requests and one of deep ones both find the memory they need.

Which entry stands for a token at an iteration is read from a table, as in `RecurrentCache`: what a
token that left early shows to deeper readers is a matter of table cells.

Shapes: U units (the keys and values of a token in one layer), H heads, d head dimension.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rondo.flops import Costs, kv_heads_of

# Tokens in a page, of the kind of entry that needs more of it.
PAGE_TOKENS = 16
# Tokens by which tables grow.
TABLE_STEP = 256


@dataclass(frozen=True)
class Shape:
    """What a token takes in each layer, and in how many.

    Attributes:
        num_prelude: Layers before the core.
        num_core: Layers of the core.
        num_coda: Layers after it.
        heads: Key/value heads of a layer.
        head_dim: Values of a head.
        dtype: Of a value.
    """

    num_prelude: int
    num_core: int
    num_coda: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_once(self) -> int:
        """Layers that a token passes once."""
        return self.num_prelude + self.num_coda

    @property
    def page_units(self) -> int:
        """Units of a page."""
        return PAGE_TOKENS * max(self.num_once, self.num_core)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return 2 * self.page_units * self.heads * self.head_dim * self.dtype.itemsize

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Unit of each layer within an entry."""
        coda = range(self.num_prelude, self.num_once)
        return (*range(self.num_prelude), *range(self.num_core), *coda)

    def entry_units(self, core: bool) -> int:
        """Units of an entry, of the core or of the layers around it."""
        return self.num_core if core else self.num_once

    def pages_for(self, tokens: int, depth: int) -> int:
        """Return the pages of so many tokens that go to a depth."""
        once = -(-tokens // self.tokens_per_page(False))
        return once + depth * -(-tokens // self.tokens_per_page(True))

    def tokens_per_page(self, core: bool) -> int:
        """Return how many tokens have their entries in a page."""
        return self.page_units // max(1, self.entry_units(core))


def shape_of(model: Any, costs: Costs) -> Shape:
    """Return what a token takes of a model's keys and values."""
    heads = kv_heads_of(model.config.base_config)
    return Shape(
        num_prelude=costs.num_prelude_layers,
        num_core=costs.num_core_layers,
        num_coda=costs.num_coda_layers,
        heads=heads,
        head_dim=costs.kv_width // heads,
        dtype=model.dtype,
    )


class Pages:
    """Which pages are held: by rows, and by prefixes that are kept for others.

    Args:
        total: How many there are. Page 0 is never given: what nobody wants is read from there.
    """

    def __init__(self, total: int):
        self.total = total
        self._free = list(range(total, 0, -1))
        self._by_rows = [0] * (total + 1)
        self._by_prefixes = [0] * (total + 1)
        self._spare = 0

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def spare(self) -> int:
        """Pages that would be free if no prefix were kept."""
        return self._spare

    def take(self, count: int) -> list[int]:
        """Return pages that were free, held once by a row."""
        assert count <= len(self._free), "whoever takes pages has asked whether they are free"
        taken = [self._free.pop() for _ in range(count)]
        self.hold(taken)
        return taken

    def hold(self, pages: Iterable[int], prefix: bool = False) -> None:
        """Hold pages once more, for a row or for a prefix."""
        for page in pages:
            self._count(page, prefix, 1)

    def release(self, pages: Iterable[int], prefix: bool = False) -> None:
        """Hold pages once less; those without a holder are free."""
        for page in pages:
            self._count(page, prefix, -1)
            if not self._by_rows[page] and not self._by_prefixes[page]:
                self._free.append(page)

    def _count(self, page: int, prefix: bool, change: int) -> None:
        self._spare -= self._is_spare(page)
        holders = self._by_prefixes if prefix else self._by_rows
        holders[page] += change
        assert holders[page] >= 0, f"page {page} is released by nobody"
        self._spare += self._is_spare(page)

    def _is_spare(self, page: int) -> bool:
        return bool(self._by_prefixes[page]) and not self._by_rows[page]


class Arena:
    """The pages' memory, and a table of entries for each iteration of each row.

    Args:
        shape: What a token takes.
        total: Pages.
        device: Where it lies.
    """

    def __init__(self, shape: Shape, total: int, device: torch.device):
        self.shape, self.device = shape, device
        self.pages = Pages(total)
        units = (total + 1) * shape.page_units
        # Zeros: page 0 is read where a row has no token, and no mask takes NaN away.
        room = (units, shape.heads, shape.head_dim)
        self.keys = torch.zeros(room, dtype=shape.dtype, device=device)
        self.values = torch.zeros(room, dtype=shape.dtype, device=device)
        self.tables = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._free_tables: list[int] = []

    def take_tables(self, count: int, length: int) -> list[int]:
        """Return tables that nobody uses, with a cell for each of `length` tokens.

        Args:
            count: How many: the first is for what runs once, one more for each iteration.
            length: Tokens of the row at most.
        """
        height, width = self.tables.shape
        if (missing := count - len(self._free_tables)) > 0 or length > width:
            # Somewhat more than is missing, so that they are copied a few times only.
            more = max(missing, height // 4) if missing > 0 else 0
            wider = -(-max(0, length - width) // TABLE_STEP) * TABLE_STEP
            self.tables = torch.nn.functional.pad(self.tables, (0, wider, 0, more))
            self._free_tables += range(height + more - 1, height - 1, -1)
        return [self._free_tables.pop() for _ in range(count)]

    def return_tables(self, tables: Sequence[int]) -> None:
        """Give tables back."""
        self._free_tables += reversed(tables)

    def fill(self, tables: Sequence[int], start: int, stop: int) -> list[int]:
        """Give the tokens [start, stop) entries in new pages, and return these.

        Args:
            tables: Those of a row.
            start: First token.
            stop: One after the last.
        """
        count, taken = stop - start, []
        for core, numbers in ((False, tables[:1]), (True, tables[1:])):
            each = -(-count // self.shape.tokens_per_page(core))
            pages = self.pages.take(each * len(numbers))
            taken += pages
            first = torch.tensor(pages, device=self.device).view(len(numbers), each, 1)
            within = torch.arange(self.shape.tokens_per_page(core), device=self.device)
            entries = first * self.shape.page_units + within * self.shape.entry_units(core)
            self.tables[numbers, start:stop] = entries.flatten(1)[:, :count].int()
        return taken

    def lend(self, tables: Sequence[int], places: torch.Tensor, iteration: int) -> None:
        """Let tokens show their entry of an iteration (1-based) to deeper readers.

        Args:
            tables: Those of a row.
            places: The tokens, (n,).
            iteration: Their last.
        """
        deeper = torch.tensor(tables[iteration + 1 :], device=places.device)
        self.tables[deeper[:, None], places] = self.tables[tables[iteration], places]
