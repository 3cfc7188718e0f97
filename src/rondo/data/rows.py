"""Rows of tokens: what one forward takes, as a stream that is a function of seed and index."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rondo.config import DataConfig
from rondo.data.cache import CachedTokens, cached_tokens
from rondo.data.mixture import Mixture, read_mixture
from rondo.data.sources import Source, parse_source, records
from rondo.data.tokens import Tokens, refuse_empty, tokenise
from rondo.errors import UserError


@dataclass(frozen=True)
class Rows:
    """What one forward takes.

    Attributes:
        input_ids: Tokens, (B, T).
        labels: The token that follows each position, -100 where none counts, (B, T).
        position_ids: Positions that begin anew with each document, (B, T), by which the masks
            keep documents apart; None where they simply run on.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None

    def cut(self, seq_len: int) -> "Rows":
        """Return the same tokens in the same order as (B * T / seq_len, seq_len)."""
        rows = self._each(lambda one: one.reshape(-1, seq_len))
        if rows.position_ids is None:
            return rows
        return replace(rows, position_ids=_positions(rows.position_ids))

    def take(self, indices: Sequence[int]) -> "Rows":
        """Return some of the rows."""
        return self._each(lambda one: one[list(indices)])

    def to(self, device: torch.device) -> "Rows":
        """Return the rows on a device."""
        return self._each(lambda one: one.to(device))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Rows":
        positions = None if self.position_ids is None else change(self.position_ids)
        return Rows(change(self.input_ids), change(self.labels), positions)


def _positions(places: torch.Tensor) -> torch.Tensor:
    """Return positions in what a row holds of a document, from places in the document."""
    return torch.minimum(places, torch.arange(places.shape[-1], device=places.device))


def _rows(block: torch.Tensor, packing: str) -> Rows:
    """Make rows of a block (3, B, T + 1): tokens, their places in their documents, what counts."""
    tokens, places, counted = block
    ignored = counted[:, 1:] == 0
    if packing == "documents":
        ignored |= places[:, 1:] == 0
    return Rows(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].masked_fill(ignored, -100),
        _positions(places[:, :-1]) if packing == "documents" else None,
    )


def _refuse_short(path: str, num_tokens: int, row_len: int) -> None:
    if num_tokens < row_len:
        raise UserError(
            f"{path} holds {num_tokens} tokens, too few for one sequence of {row_len}: give more "
            "text or a smaller --batch.seq-len"
        )


class ShuffledRows:
    """Rows of a tokenised source; each epoch shuffles its documents anew and leaves its tail.

    A row is a function of seed and number. It may begin within a document and hold several, as in
    arXiv:2511.07384.

    Raises:
        UserError: The documents do not fill one row.
    """

    def __init__(self, tokens: CachedTokens, row_len: int, seed: int, path: str):
        self._tokens, self._row_len, self._seed = tokens, row_len, seed
        self._lengths = tokens.offsets.diff()
        self._rows_per_epoch = tokens.num_tokens // row_len
        self._epoch, self._order, self._ends = -1, self._lengths, self._lengths
        self.facts = {"sha256": tokens.sha256, "tokens": tokens.num_tokens}
        _refuse_short(path, tokens.num_tokens, row_len)

    def row(self, number: int) -> torch.Tensor:
        """Return row `number` of the stream, (3, row_len)."""
        epoch, place = divmod(number, self._rows_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self._lengths), generator=generator)
            self._ends = self._lengths[self._order].cumsum(0)
            self._epoch = epoch
        line = torch.arange(place * self._row_len, (place + 1) * self._row_len)
        turn = torch.searchsorted(self._ends, line, right=True)
        document = self._order[turn]
        places = line - (self._ends[turn] - self._lengths[document])
        tokens, counted = self._tokens.take(self._tokens.offsets[document] + places)
        return torch.stack([tokens, places, counted])


class StreamedRows:
    """Rows of a source that is read over and over in its own order, one after the other.

    Args:
        read: Yields the documents of the source, (3, n) each, without the first so many.
        row_len: Tokens per row.
        path: The source, to be named in messages.
    """

    def __init__(self, read: Callable[[int], Iterator[torch.Tensor]], row_len: int, path: str):
        self._read, self._row_len, self._path = read, row_len, path
        self.facts = {"sha256": None, "tokens": None}
        self.restore(0, 0, 0)

    def row(self, number: int) -> torch.Tensor:
        """Return row `number`, (3, row_len); a number may not be lower than the last one."""
        assert number >= self._next - 1, f"row {number} has gone by, the next is {self._next}"
        while self._next <= number:
            parts, missing = [], self._row_len
            while missing:
                if not self._rest.shape[1]:
                    self._document, self._rest = next(self._documents)
                part, self._rest = self._rest[:, :missing], self._rest[:, missing:]
                parts.append(part)
                missing -= part.shape[1]
            self._row = torch.cat(parts, dim=1)
            self._next += 1
        return self._row

    def state(self, number: int) -> list[int]:
        """Return the document and the token in it with which row `number` begins."""
        if number > self._next:
            self.row(number - 1)
        assert number == self._next, f"row {number} has gone by, the next is {self._next}"
        if not self._rest.shape[1]:
            return [self._document + 1, 0]
        return [self._document, int(self._rest[1, 0])]

    def restore(self, number: int, document: int, token: int) -> None:
        """Stand before row `number`, which begins with this token."""
        self._next, self._row = number, torch.empty(0)
        self._documents = self._endless(document)
        self._document, self._rest = next(self._documents)
        self._rest = self._rest[:, token:]

    def _endless(self, first: int) -> Iterator[tuple[int, torch.Tensor]]:
        while True:
            documents, counted = first, first > 0
            for document in self._read(first):
                counted = counted or bool(document[2].any())
                yield documents, document
                documents += 1
            refuse_empty(self._path, documents, counted)
            first = 0


class TrainingRows:
    """A stream of rows that is a function of seed and index, whatever the batches and processes.

    Attributes:
        facts: Name, path, sha256, tokens, weight and phase of each source. What streams has no
            sha256 and no number of tokens, and must be asked for in order.
    """

    def __init__(
        self,
        mixture: Mixture,
        readers: dict[str, ShuffledRows | StreamedRows],
        packing: str,
        facts: list[dict[str, Any]],
    ):
        self.facts = facts
        self._mixture, self._readers, self._packing = mixture, readers, packing

    def batch(self, indices: Sequence[int]) -> Rows:
        """Return the rows of these indices."""
        places = [self._mixture.place(index) for index in indices]
        rows = [self._readers[path].row(number) for path, number in places]
        return _rows(torch.stack(rows, dim=1), self._packing)

    def state(self, next_row: int) -> dict[str, Any]:
        """Return where a stream stands just before a row; nothing for what does not stream."""
        taken = self._mixture.taken(next_row)
        return {
            path: [taken[path], *reader.state(taken[path])]
            for path, reader in self._readers.items()
            if isinstance(reader, StreamedRows)
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where a state was taken; documents before it are read, but not tokenised."""
        for path, (number, document, token) in state.items():
            reader = self._readers[path]
            assert isinstance(reader, StreamedRows)
            reader.restore(number, document, token)


def open_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    seed: int,
    total_rows: int,
) -> TrainingRows:
    """Open the sources of a training, tokenised first unless they stream.

    Args:
        config: What is read.
        tokenizer: Encodes it.
        seq_len: Tokens that each row gives to the model; its last label is one more.
        seed: Seed of the shuffles.
        total_rows: Rows of the training, which phases are fractions of.

    Raises:
        UserError: A source cannot be read, or does not fit the settings.
    """
    mixture = read_mixture(config, total_rows)
    readers: dict[str, ShuffledRows | StreamedRows] = {}
    for path, source in mixture.sources.items():
        if config.streaming:
            readers[path] = StreamedRows(_reader(source, config, tokenizer), seq_len + 1, path)
        else:
            tokens = cached_tokens(source, config, tokenizer)
            readers[path] = ShuffledRows(tokens, seq_len + 1, seed, path)
    facts = [
        {
            "name": source.name,
            "path": source.path,
            **readers[source.path].facts,
            "weight": float(source.weight),
            "phase": number,
        }
        for number, phase in enumerate(mixture.phases, 1)
        for source in phase.sources
    ]
    return TrainingRows(mixture, readers, config.packing, facts)


def held_out_rows(
    spec: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seq_len: int, count: int
) -> Rows:
    """Return the first rows of a source in its own order, fewer where its text is short.

    Raises:
        UserError: The source cannot be read, or does not fill one row.
    """
    source = parse_source(spec)
    found, missing = [], count * (seq_len + 1)
    for document in _reader(source, config, tokenizer)(0):
        found.append(document[:, :missing])
        missing -= found[-1].shape[1]
        if not missing:
            break
    block = torch.cat(found, dim=1) if found else torch.empty(3, 0)
    refuse_empty(source.path, len(found), bool(block[2].any()))
    _refuse_short(source.path, block.shape[1], seq_len + 1)
    usable = block.shape[1] // (seq_len + 1) * (seq_len + 1)
    return _rows(block[:, :usable].reshape(3, -1, seq_len + 1), config.packing)


def _reader(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Callable[[int], Iterator[torch.Tensor]]:
    def read(first: int) -> Iterator[torch.Tensor]:
        kept = islice(records(source, config.field, config.streaming), first, None)
        return map(_block, tokenise(kept, config, tokenizer))

    return read


def _block(document: Tokens) -> torch.Tensor:
    length = len(document.ids)
    counted = [1] * length if document.counted is None else document.counted
    return torch.stack(
        [torch.tensor(document.ids), torch.arange(length), torch.tensor(counted).long()]
    )
