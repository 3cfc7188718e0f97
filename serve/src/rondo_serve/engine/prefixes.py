"""What prompts have in common: computed once, for those who ask at the same depth and exit.

Keys and values of a prefix are those of the depth it was computed at: a deeper request finds too
few iterations there, and a shallower one a coda that ran on other states. So they are found by the
whole of what decides them, and tokens are compared one by one, not by a hash alone.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rondo.chat import common_length
from rondo_serve.engine.arena import Pages

# A prefix is found by its first tokens up to a multiple of this.
STRIDE = 16


@dataclass(eq=False)
class Prefix:
    """Tokens whose keys and values are kept.

    Attributes:
        key: What decides them beside the tokens.
        tokens: The tokens.
        tables: Their entries, for what runs once and for each iteration, (1 + r, tokens).
        pages: Pages that are held.
    """

    key: Hashable
    tokens: tuple[int, ...]
    tables: torch.Tensor
    pages: tuple[int, ...]


class Prefixes:
    """The prefixes that are kept, the one that was used last at the end.

    Args:
        pages: Where their pages are held and released.
    """

    def __init__(self, pages: Pages):
        self._pages = pages
        self._by_start: dict[Hashable, Prefix] = {}
        self._kept: OrderedDict[Prefix, None] = OrderedDict()

    def keep(
        self, key: Hashable, tokens: Sequence[int], tables: torch.Tensor, pages: Sequence[int]
    ) -> Prefix | None:
        """Keep a prefix, and hold its pages once more; None where it is too short to be found.

        Args:
            key: What decides keys and values beside the tokens.
            tokens: Its tokens.
            tables: See `Prefix`.
            pages: The pages that its entries lie in.
        """
        if len(tokens) < STRIDE:
            return None
        prefix = Prefix(key, tuple(tokens), tables, tuple(pages))
        self._pages.hold(prefix.pages)
        self._kept[prefix] = None
        for start in _starts(key, prefix.tokens):
            self._by_start[start] = prefix
        return prefix

    def find(self, key: Hashable, tokens: Sequence[int]) -> tuple[Prefix, int] | None:
        """Return the prefix with the most of these tokens, and how many; None if there is none.

        The last token is never among them: its logits are wanted.
        """
        for start in reversed(list(_starts(key, tokens[:-1]))):
            prefix = self._by_start.get(start)
            if prefix is None or prefix not in self._kept:
                continue
            same = common_length(prefix.tokens, tokens[:-1])
            if same >= STRIDE:
                self._kept.move_to_end(prefix)
                return prefix, same
        return None

    def drop(self, prefix: Prefix) -> None:
        """Keep a prefix no longer, if it is kept at all."""
        if prefix not in self._kept:
            return
        del self._kept[prefix]
        self._pages.release(prefix.pages)
        for start in _starts(prefix.key, prefix.tokens):
            if self._by_start.get(start) is prefix:
                del self._by_start[start]

    def evict(self) -> bool:
        """Drop the prefix that was not used for longest; return whether there was any."""
        if not self._kept:
            return False
        self.drop(next(iter(self._kept)))
        return True

    @property
    def pages(self) -> set[int]:
        """The pages that are held here; may be asked for from another thread."""
        return {page for prefix in list(self._kept) for page in prefix.pages}

    @property
    def evictable(self) -> int:
        """Pages that would be free if nothing were kept: those that nobody else holds."""
        held = Counter(page for prefix in self._kept for page in prefix.pages)
        return sum(self._pages.holders(page) == count for page, count in held.items())


def _starts(key: Hashable, tokens: Sequence[int]) -> Iterator[Hashable]:
    """Yield a name for each start of the tokens whose length is a multiple of the stride."""
    chained = hash(key)
    for stop in range(STRIDE, len(tokens) + 1, STRIDE):
        chained = hash((chained, tuple(tokens[stop - STRIDE : stop])))
        yield key, stop, chained
