"""Where text comes from: what a source is called, and its records, read one after the other.

The only file that imports datasets and pyarrow, each when a source asks for it.
"""

import gzip
import hashlib
import importlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rondo.errors import UserError

# Shipped with the package, with origin and licence beside them.
SAMPLES = ("math", "math-test", "general", "general-test")
KINDS = (".parquet", *(kind + end for kind in (".jsonl", ".txt") for end in ("", ".gz", ".zst")))
HUB = "hub:"


class Record(NamedTuple):
    """One record of a source: where it stands, to be told to the user, and its fields."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One text of a mixture.

    Attributes:
        name: The NAME of NAME=WHERE, or the file's stem.
        path: Where it lies; no two sources share it.
        files: What is read, in this order; none for a dataset of the datasets library.
        weight: Its share of the rows, relative to the others'.
    """

    name: str
    path: str
    files: tuple[Path, ...]
    weight: Fraction


def parse_source(spec: str) -> Source:
    """Read [NAME=]WHERE[@WEIGHT].

    Raises:
        UserError: There is no such text, or its weight is not positive.
    """
    where, weight, name = spec, Fraction(1), ""
    before, at, after = spec.rpartition("@")
    if at and not os.path.exists(spec):
        with suppress(ValueError, ZeroDivisionError):
            where, weight = before, Fraction(after)
    if weight <= 0:
        raise UserError(f"the weight of {spec} must be positive")
    # A path may hold an equals sign itself.
    while not _is_there(where) and "=" in where:
        part, _, where = where.partition("=")
        name = f"{name}={part}" if name else part
    if where.startswith(HUB):
        return Source(name or _hub_words(where)[0].rpartition("/")[2], where, (), weight)
    if where in SAMPLES:
        path = Path(str(files("rondo.samples"))) / f"{where}.jsonl.gz"
        return Source(name or where, f"sample {where}", (path,), weight)
    path = Path(where)
    if path.is_dir():
        found = tuple(sorted(each for each in path.iterdir() if _is_text(each)))
        if not found:
            raise UserError(f"the folder {path} holds no .jsonl, .txt or .parquet file")
        return Source(name or path.resolve().name, str(path), found, weight)
    if not path.is_file():
        raise UserError(
            f"there is no text {spec}: name a sample ({', '.join(SAMPLES)}), a .jsonl, .txt or "
            ".parquet file, a folder of them, or hub:REPO, as [NAME=]WHERE[@WEIGHT]"
        )
    if not path.name.endswith(KINDS):
        raise UserError(
            f"{path} is neither .jsonl nor .txt (nor either with .gz or .zst) nor .parquet"
        )
    return Source(name or path.name.split(".")[0], str(path), (path,), weight)


def _is_there(where: str) -> bool:
    return where in SAMPLES or where.startswith(HUB) or os.path.exists(where)


def _is_text(path: Path) -> bool:
    return path.is_file() and path.name.endswith(KINDS) and not path.name.startswith(".")


def records(source: Source, field: str, streaming: bool = False) -> Iterator[Record]:
    """Read the records of a source in order, none before it is asked for.

    Args:
        source: What is read.
        field: The field that blocks of a .txt file are given as.
        streaming: Read a dataset of the hub over the network, not from a copy made first.

    Raises:
        UserError: The source is damaged or cannot be reached.
    """
    if not source.files:
        yield from _hub_records(source, streaming)
    for path in source.files:
        if path.suffix == ".parquet":
            yield from _parquet_records(path)
        else:
            yield from _text_records(path, field)


def _text_records(path: Path, field: str) -> Iterator[Record]:
    lines_of_json = path.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")
    try:
        with _open(path) as lines:
            if lines_of_json:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        where = f"{path}, line {number}"
                        yield Record(where, _parse(where, line))
            else:
                for number, block in enumerate(_blocks(lines), 1):
                    yield Record(f"{path}, block {number}", {field: block})
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _open(path: Path) -> Any:
    # Lines of JSON may hold separators other than \n unescaped.
    text: Any = {"encoding": "utf-8-sig", "newline": "\n"}
    if path.suffix == ".zst":
        # Unlike the zstandard package, it notices a file that was cut short.
        raw = _import("pyarrow", path).input_stream(str(path), compression="zstd")
        return io.TextIOWrapper(raw, **text)
    return gzip.open(path, "rt", **text) if path.suffix == ".gz" else path.open(**text)


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if "\\ud" in line or "\\uD" in line:
            # Half a pair of surrogates is JSON, but no text that can be encoded.
            json.dumps(row, ensure_ascii=False).encode()
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from error
    return row if isinstance(row, dict) else {}


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Yield what stands between blank lines."""
    block: list[str] = []
    for line in chain(lines, [""]):
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).strip()
            block = []


def _parquet_records(path: Path) -> Iterator[Record]:
    pyarrow, parquet = _import("pyarrow", path), _import("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                yield Record(f"{path}, row {number}", row)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _hub_words(where: str) -> list[str]:
    words = where.removeprefix(HUB).split(":")
    if not words[0] or len(words) > 3:
        raise UserError(f"{where} does not name a dataset as hub:REPO[:CONFIG[:SPLIT]]")
    return [*words, "", ""][:3]


def _hub_records(source: Source, streaming: bool) -> Iterator[Record]:
    with _hub_dataset(source, streaming) as dataset:
        for number, row in enumerate(dataset, 1):
            yield Record(f"{source.path}, row {number}", row)


@contextmanager
def _hub_dataset(source: Source, streaming: bool) -> Iterator[Any]:
    """Open a dataset; what goes wrong while it is read is told in one sentence."""
    datasets = _import("datasets", source.path)
    repo, config, split = _hub_words(source.path)
    try:
        yield datasets.load_dataset(
            repo, config or None, split=split or "train", streaming=streaming
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot read {source.path}: {' '.join(str(error).split())}") from error


def _import(module: str, where: object) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'{where} needs more packages: pip install "rondo-lm[data]"') from error


def fingerprint(source: Source, hash_of: Callable[[Path], str]) -> str:
    """Return a hash that changes with the content of a source.

    Args:
        source: What is looked at.
        hash_of: Hashes a file; `file_hash`, or what remembers its answers.

    Raises:
        UserError: The source cannot be read.
    """
    if not source.files:
        with _hub_dataset(source, streaming=False) as dataset:
            return dataset._fingerprint
    if len(source.files) == 1:
        return hash_of(source.files[0])
    listing = "".join(f"{hash_of(path)} {path.name}\n" for path in source.files)
    return hashlib.sha256(listing.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
