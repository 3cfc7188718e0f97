"""Text in: documents from shipped samples or the user's files, and token rows made of them."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rondo.errors import UserError

# Shipped with the package, with origin and licence beside them.
SAMPLES = ("math", "math-test", "general", "general-test")


@dataclass(frozen=True)
class Documents:
    """A named set of texts.

    Attributes:
        name: A sample's name, the NAME of NAME=PATH, or the file's stem.
        path: Where it was read.
        sha256: Hash of the file.
        texts: The documents.
    """

    name: str
    path: str
    sha256: str
    texts: tuple[str, ...]


def read_documents(spec: str) -> Documents:
    """Read a sample by name, or a file as PATH or NAME=PATH.

    JSON lines (.jsonl, .jsonl.gz) hold a field `text`, or `question` and `answer`; a .txt file
    (.txt.gz) is one document per block between blank lines.

    Raises:
        UserError: There is no such sample or file, or it cannot be read.
    """
    if spec in SAMPLES:
        path = files("rondo.samples").joinpath(f"{spec}.jsonl.gz")
        return _parse(spec, f"sample {spec}", f"{spec}.jsonl.gz", path.read_bytes())
    name, _, given = ("", "", spec) if Path(spec).is_file() else spec.rpartition("=")
    path = Path(given)
    if not path.is_file():
        raise UserError(
            f"there is no text {spec}: name a sample ({', '.join(SAMPLES)}) or a .jsonl or .txt "
            "file, as PATH or NAME=PATH"
        )
    stem = path.name.split(".")[0]
    return _parse(name or stem, str(path), path.name, path.read_bytes())


def _parse(name: str, where: str, file_name: str, raw: bytes) -> Documents:
    try:
        content = gzip.decompress(raw) if file_name.endswith(".gz") else raw
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {where}: {error}") from error
    kind = file_name.removesuffix(".gz")
    if kind.endswith(".jsonl"):
        texts = tuple(
            _fields(where, number, line)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        )
    elif kind.endswith(".txt"):
        texts = tuple(block.strip() for block in re.split(r"\n\s*\n", text) if block.strip())
    else:
        raise UserError(f"{where} is neither .jsonl nor .txt (nor either with .gz)")
    if not texts:
        raise UserError(f"{where} holds no text")
    return Documents(name, where, hashlib.sha256(raw).hexdigest(), texts)


def _fields(where: str, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {number} is no JSON: {error}") from error
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and {"question", "answer"} <= row.keys():
        return f"Question: {row['question']}\nAnswer: {row['answer']}"
    raise UserError(f"{where}, line {number} has neither `text` nor `question` and `answer`")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory.

    Raises:
        UserError: There is none.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        return tokenizer
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} has no tokenizer that can be loaded: {error}") from error


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


class TrainingRows:
    """An endless stream of token rows that is a function of its index.

    Row n depends on the seed and n only, so a run resumes by remembering how many rows it took,
    and the stream is the same whatever the batch size. Each epoch shuffles the documents anew.

    Args:
        texts: The documents.
        tokenizer: Encodes them, all at once.
        row_len: Tokens per row.
        seed: Seed of the shuffles.

    Raises:
        UserError: The documents do not fill one row.
    """

    def __init__(
        self, documents: Documents, tokenizer: PreTrainedTokenizerBase, row_len: int, seed: int
    ):
        self._tokens = [encode(tokenizer, text) for text in documents.texts]
        self._separator = separator_of(tokenizer)
        self._row_len = row_len
        self._seed = seed
        self.num_tokens = sum(len(tokens) + 1 for tokens in self._tokens)
        self.rows_per_epoch = self.num_tokens // row_len
        self._epoch, self._rows = -1, torch.empty(0)
        if self.rows_per_epoch == 0:
            raise UserError(
                f"{documents.path} holds {self.num_tokens} tokens, too few for one sequence of "
                f"{row_len}: give more text or a smaller --seq-len"
            )

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return row `index` of the stream, (row_len,)."""
        epoch, place = divmod(index, self.rows_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(len(self._tokens), generator=generator).tolist()
            shuffled = [self._tokens[document] for document in order]
            self._rows = packed_rows(shuffled, self._separator, self._row_len)
            self._epoch = epoch
        return self._rows[place]

    def batch(self, first: int, size: int) -> torch.Tensor:
        """Return rows first .. first + size - 1, (size, row_len)."""
        return torch.stack([self[index] for index in range(first, first + size)])


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
