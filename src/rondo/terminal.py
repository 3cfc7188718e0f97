"""Tokens on a terminal as they come, each on a ground that tells how many iterations it took."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, TextIO

# Ground and letters in the 256 colours, from few iterations to the cap: lightness falls all the
# way, so the order is seen without colours too, and the letters are legible on any theme.
SCALE = ((229, 16), (186, 16), (150, 16), (114, 16), (72, 16), (67, 231), (61, 231), (54, 231))
RESET, DIM = "\x1b[0m", "\x1b[2m"
# What a decoder puts for bytes that are no character yet.
UNFINISHED = "\ufffd"


def has_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether to colour what is written to a stream (https://no-color.org)."""
    return stream.isatty() and not environ.get("NO_COLOR")


def shade(depth: int, cap: int) -> int:
    """Return the place in the scale of a depth from 1 to the cap."""
    return 0 if cap <= 1 else round((min(depth, cap) - 1) / (cap - 1) * (len(SCALE) - 1))


def paint(text: str, depth: int, cap: int) -> str:
    """Colour text by its depth; line ends stay outside, or the ground would run to the margin."""
    ground, letters = SCALE[shade(depth, cap)]
    start = f"\x1b[48;5;{ground};38;5;{letters}m"
    lines = text.split("\n")
    return "\n".join(f"{start}{line}{RESET}" if line else "" for line in lines)


def dim(text: str, colour: bool) -> str:
    """Return a remark beside the text, less bright where there is colour."""
    return f"{DIM}{text}{RESET}" if colour else text


def legend(cap: int) -> str:
    """Return the colours with the iterations that they stand for."""
    groups = groupby(range(1, cap + 1), lambda depth: shade(depth, cap))
    spans = [list(depths) for _, depths in groups]
    swatches = (
        paint(f" {span[0]} " if len(span) == 1 else f" {span[0]}-{span[-1]} ", span[0], cap)
        for span in spans
    )
    return "".join(swatches) + " iterations"


def runs(depths: Iterable[int]) -> str:
    """Return depths in a row as text, equal neighbours together: `3, 1 x4, 2`."""
    counted = [(depth, len(list(group))) for depth, group in groupby(depths)]
    return ", ".join(f"{depth} x{count}" if count > 1 else f"{depth}" for depth, count in counted)


class Pieces:
    """The text of tokens one by one, a character that several make together with its last.

    Args:
        tokenizer: Whose tokens they are.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._anchor = self._told = 0

    def push(self, token: int) -> str:
        """Return what a token adds to the text, nothing while a character is unfinished."""
        self._tokens.append(token)
        text = self._new()
        return "" if text.endswith(UNFINISHED) else self._tell(text)

    def rest(self) -> str:
        """Return what is left at the end."""
        return self._tell(self._new())

    def _new(self) -> str:
        # Tokens told before are decoded along: some tokenizers drop a space that begins a text.
        decode, tokens = self._tokenizer.decode, self._tokens
        before = decode(tokens[self._anchor : self._told])
        return decode(tokens[self._anchor :])[len(before) :]

    def _tell(self, text: str) -> str:
        self._anchor, self._told = self._told, len(self._tokens)
        return text


class TokenPrinter:
    """A streamer for `generate` that prints each token as it comes.

    Args:
        tokenizer: Whose tokens they are.
        ends: Tokens that end a text, which are not printed.
        depth_of: Iterations of the n-th new token, counted from 0.
        cap: The most iterations.
        out: Where to print.
        colour: Whether to colour by iterations.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Collection[int],
        depth_of: Callable[[int], int],
        cap: int,
        out: TextIO,
        colour: bool,
    ):
        self._pieces, self._ends, self._depth_of = Pieces(tokenizer), ends, depth_of
        self._cap, self._out, self._colour = cap, out, colour
        self._count = 0

    def put(self, value: Any) -> None:
        """Print the tokens (T,) of the one row; a prompt (1, T) is known already."""
        if value.dim() > 1:
            return
        for token in value.tolist():
            self._count += 1
            if token not in self._ends:
                self._write(self._pieces.push(token))

    def end(self) -> None:
        """Print what is left."""
        self._write(self._pieces.rest())

    def _write(self, text: str) -> None:
        if text and self._colour:
            text = paint(text, self._depth_of(self._count - 1), self._cap)
        self._out.write(text)
        self._out.flush()


def painted(tokenizer: Any, tokens: Sequence[int], depths: Sequence[int], cap: int) -> str:
    """Return the text of tokens, each coloured by its depth."""
    pieces = Pieces(tokenizer)
    found = [
        paint(pieces.push(token), depth, cap) for token, depth in zip(tokens, depths, strict=True)
    ]
    return "".join([*found, *(paint(pieces.rest(), depth, cap) for depth in depths[-1:])])
