"""What prompts have in common: computed once, for those who ask at the same depth and exit.

Keys and values of a prefix are those of the depth it was computed at: a deeper request finds too
few iterations there, and a shallower one a coda that ran on other states. So they are found by the
whole of what decides them, and tokens are compared one by one, not by a hash alone.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rondo.data import common_length
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
        self._by_start: dict[Hashable, list[Prefix]] = {}
        self._kept: OrderedDict[Prefix, None] = OrderedDict()

    def keep(
        self, key: Hashable, tokens: Sequence[int], tables: torch.Tensor, pages: Sequence[int]
    ) -> None:
        """Keep a prefix and hold its pages, in place of those that it goes on from.

        One that is too short to be found is not kept.

        Args:
            key: What decides keys and values beside the tokens.
            tokens: Its tokens.
            tables: See `Prefix`.
            pages: The pages that its entries lie in.
        """
        if len(tokens) < STRIDE:
            return
        prefix = Prefix(key, tuple(tokens), tables, tuple(pages))
        starts = list(_starts(key, prefix.tokens))
        for shorter in {one for start in starts for one in self._by_start.get(start, ())}:
            if common_length(shorter.tokens, prefix.tokens) == len(shorter.tokens):
                self._drop(shorter)
        self._pages.hold(prefix.pages, prefix=True)
        self._kept[prefix] = None
        for start in starts:
            self._by_start.setdefault(start, []).append(prefix)

    def find(self, key: Hashable, tokens: Sequence[int]) -> tuple[Prefix, int] | None:
        """Return the prefix with the most of these tokens, and how many; None if there is none.

        The last token is never among them: its logits are wanted.
        """
        for start in reversed(list(_starts(key, tokens[:-1]))):
            found = [
                (common_length(one.tokens, tokens[:-1]), one)
                for one in self._by_start.get(start, ())
            ]
            same, prefix = max(found, key=lambda one: one[0], default=(0, None))
            if prefix is not None and same >= STRIDE:
                self._kept.move_to_end(prefix)
                return prefix, same
        return None

    def _drop(self, prefix: Prefix) -> None:
        del self._kept[prefix]
        self._pages.release(prefix.pages, prefix=True)
        for start in _starts(prefix.key, prefix.tokens):
            alike = self._by_start[start]
            alike.remove(prefix)
            if not alike:
                del self._by_start[start]

    def evict(self) -> bool:
        """Drop the prefix that was not used for longest; return whether there was any."""
        if not self._kept:
            return False
        self._drop(next(iter(self._kept)))
        return True


def _starts(key: Hashable, tokens: Sequence[int]) -> Iterator[Hashable]:
    """Yield a name for each start of the tokens whose length is a multiple of the stride."""
    chained = hash(key)
    for stop in range(STRIDE, len(tokens) + 1, STRIDE):
        chained = hash((chained, tuple(tokens[stop - STRIDE : stop])))
        yield key, stop, chained
