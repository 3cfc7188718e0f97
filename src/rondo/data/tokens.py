"""Documents as tokens: what a tokenizer puts around a text, and which tokens count."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rondo.config import DataConfig
from rondo.data.documents import Document, render
from rondo.data.sources import Record
from rondo.errors import UserError

# Documents that are encoded together; a fast tokenizer spreads them over the processors.
TOGETHER = 256


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory.

    Raises:
        UserError: There is none.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        return tokenizer
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{directory} has no tokenizer that can be loaded: {error}") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer that can give ids beyond a model's vocabulary.

    Raises:
        UserError: It can.
    """
    if (highest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise UserError(
            f"the tokenizer gives ids up to {highest}, but the model has {vocab_size} tokens: "
            "they do not belong together"
        )


class Tokens(NamedTuple):
    """A document's ids, its separator last, and which of them count unless all do."""

    ids: list[int]
    counted: list[bool] | None


def tokenise(
    records: Iterable[Record], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Tokens]:
    """Yield the documents of records as tokens.

    The ids do not depend on `loss_on`: a text is encoded as a whole, and a token counts if any of
    its characters does. The separator counts if the end of the text does.

    Raises:
        UserError: A record, the tokenizer or its template does not fit the settings.
    """
    answers, chat = config.loss_on == "answers", config.format == "chat"
    if chat and tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template, which data.format chat needs")
    if answers and not tokenizer.is_fast:
        raise UserError("data.loss_on answers needs a fast tokenizer (a tokenizer.json)")
    # A chat template writes its own beginning.
    start, end = [] if chat else beginning(tokenizer), separator_of(tokenizer)
    documents = (render(record, config, tokenizer) for record in records)
    while batch := list(islice(documents, TOGETHER)):
        texts = [document.text for document in batch]
        encoded = tokenizer(
            texts, add_special_tokens=False, verbose=False, return_offsets_mapping=answers
        )
        for number, document in enumerate(batch):
            counted = None
            if answers:
                flags = _counted(document, encoded["offset_mapping"][number])
                counted = [*(False for _ in start), *flags]
            yield Tokens([*start, *encoded["input_ids"][number], end], counted)


def _counted(document: Document, offsets: list[tuple[int, int]]) -> list[bool]:
    spans = document.counted or []
    marks = bytearray(len(document.text))
    for first, stop in spans:
        marks[first:stop] = bytes([1]) * len(marks[first:stop])
    closed = bool(spans) and spans[-1][1] >= len(document.text)
    return [*(1 in marks[first:stop] for first, stop in offsets), closed]


def refuse_empty(path: str, documents: int, counted: bool) -> None:
    """Refuse a source that nothing can be learned from.

    Raises:
        UserError: It has no documents, or no token that counts.
    """
    if not documents:
        raise UserError(f"{path} holds no text")
    if not counted:
        raise UserError(f"{path} holds no answer, so data.loss_on answers finds nothing to count")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's token ids, begun as the tokenizer begins a text (BOS, or nothing)."""
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*beginning(tokenizer), *bare]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return next(
        (whole[:start] for start in range(len(whole)) if whole[start : start + len(bare)] == bare),
        [],
    )


def packed_rows(token_lists: list[list[int]], separator: int, row_len: int) -> torch.Tensor:
    """Concatenate documents, a separator after each, and cut rows (N, row_len); the rest is left.

    Rows may begin within a document and hold several, as in arXiv:2511.07384.
    """
    stream = [token for tokens in token_lists for token in (*tokens, separator)]
    usable = len(stream) // row_len * row_len
    return torch.tensor(stream[:usable], dtype=torch.long).reshape(-1, row_len)


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a document.

    Raises:
        UserError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no eos_token to end documents with")
    return tokenizer.eos_token_id


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that fills up rows that ended: pad, or else eos."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def padded_batches(
    token_lists: list[list[int]], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Batch token lists of like length, right-padded.

    Yields:
        Their indices, ids (B, T), and a mask (B, T) of what is no padding.
    """
    order = sorted(range(len(token_lists)), key=lambda index: len(token_lists[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(token_lists[chosen[-1]])
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask = torch.zeros(len(chosen), longest, dtype=torch.long)
        for row, index in enumerate(chosen):
            tokens = token_lists[index]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        yield chosen, ids, mask


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two lists begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
