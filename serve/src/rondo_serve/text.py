"""Tokens into text as they come, up to a string that ends it."""

from functools import lru_cache
from typing import Any

from rondo.terminal import Pieces
from rondo_serve.requests import Refused


class Writer:
    """The text of an answer, told as soon as it is certain.

    What was told together with the rest is `tokenizer.decode` of the tokens without special ones,
    cut before the first stop string. Of several that are there with the same token, the one that
    starts earliest cuts.

    Args:
        tokenizer: Whose tokens they are.
        stop: Strings before which the text ends.

    Attributes:
        stopped: Whether a stop string came. Nothing is told any more then.

    Raises:
        Refused: A stop string is empty.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        if "" in stop:
            raise Refused("a stop string is empty: leave it out, or say what ends the text", "stop")
        self.stopped = False
        self._pieces, self._special = Pieces(tokenizer), special_tokens(tokenizer)
        self._stop, self._held = stop, ""

    def push(self, token: int) -> str:
        """Return the text that a token makes certain, often none."""
        # A special token is no text, and must not come between two tokens that are: some
        # tokenizers drop the space that begins a text.
        if self.stopped or token in self._special:
            return ""
        return self._tell(self._pieces.push(token))

    def finish(self) -> str:
        """Return what was held back, at the end of the tokens."""
        told = "" if self.stopped else self._tell(self._pieces.rest())
        held, self._held = self._held, ""
        return told + held

    def _tell(self, new: str) -> str:
        """Return what can be told after new text, and hold back what may become a stop string."""
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(found)
        certain = min(found) if found else self._uncertain(text)
        self._held = "" if found else text[certain:]
        return text[:certain]

    def _uncertain(self, text: str) -> int:
        """Return the place from which on a text may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1)
        for place in range(max(0, len(text) - longest + 1), len(text)):
            tail = text[place:]
            if any(stop.startswith(tail) for stop in self._stop):
                return place
        return len(text)


@lru_cache(maxsize=8)  # each request asks, of the one tokenizer
def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that `decode` skips where special ones are not wanted."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {n for n, token in added if token.special}
