"""Memory of rows: tables and pages for all the tokens they may have, and prefixes they share.

A row is given at the start all the pages that it may come to need, so that what is in flight always
has room to end. What it did not need is free when it ends.
"""

from collections.abc import Sequence

from rondo.data import common_length
from rondo_serve.engine.arena import Arena
from rondo_serve.engine.prefixes import STRIDE, Prefix, Prefixes
from rondo_serve.engine.rows import Row


class Places:
    """Who has which pages.

    Args:
        arena: Where they lie.
        shares_prefixes: Whether prefixes are kept for others.
        seeded: Whether the loop starts at noise that a seed decides.
    """

    def __init__(self, arena: Arena, shares_prefixes: bool, seeded: bool):
        self._arena, self._shares_prefixes, self._seeded = arena, shares_prefixes, seeded
        self._prefixes = Prefixes(arena.pages)

    def has_twin(self, row: Row, rows: Sequence[Row]) -> bool:
        """Return whether a row does better to wait for another that reads the same prompt."""
        if not (self._shares_prefixes and row.shares):
            return False
        key, prompt = row.key(self._seeded), row.ask.prompt
        return any(
            other.read < len(other.ask.prompt)
            and other.ask.prompt[:STRIDE] == prompt[:STRIDE]
            and other.key(self._seeded) == key
            and common_length(other.ask.prompt, prompt[:-1]) > other.read + STRIDE
            for other in rows
        )

    def give(self, row: Row) -> bool:
        """Give a row the pages of all the tokens it may have; return whether there were so many."""
        found = None
        if self._shares_prefixes and row.shares:
            found = self._prefixes.find(row.key(self._seeded), row.ask.prompt)
        # A prefix that is shared cannot be evicted: without it there may be more room.
        return bool(found and self._place(row, *found)) or self._place(row)

    def _place(self, row: Row, prefix: Prefix | None = None, cached: int = 0) -> bool:
        """Give a row tables, and pages for what the first tokens of a prefix do not have."""
        pages = self._arena.pages
        shared = list(prefix.pages) if prefix else []
        pages.hold(shared)
        needed = self._arena.shape.pages_for(row.length - cached, row.depth)
        if needed > pages.free + pages.spare:
            pages.release(shared)
            return False
        while needed > pages.free:
            self._prefixes.evict()
        row.pages = shared
        row.tables = self._arena.take_tables(1 + row.depth, row.length)
        if prefix is not None:
            self._arena.tables[row.tables, :cached] = prefix.tables[:, :cached]
        row.pages = shared + self._arena.fill(row.tables, cached, row.length)
        row.read = row.cached = cached
        return True

    def keep(self, row: Row) -> None:
        """Let others take what a row has read."""
        if not (self._shares_prefixes and row.shares):
            return
        tables = self._arena.tables[row.tables, : row.read]
        pages = (tables // self._arena.shape.page_units).unique().tolist()
        self._prefixes.keep(row.key(self._seeded), row.tokens[: row.read], tables, pages)

    def take_back(self, row: Row) -> None:
        """Free what a row has, but for what others hold."""
        self._arena.pages.release(row.pages)
        self._arena.return_tables(row.tables)
        row.pages, row.tables = [], []

    def forget_prefixes(self) -> None:
        """Keep no prefix any longer."""
        while self._prefixes.evict():
            pass
