"""Tokens on disk: written once for what decides them, memory-mapped when read.

A source is some shards, KEY-00000.safetensors and on, and KEY.json, written last. The key hashes
the source's content, the tokenizer and the settings, so what is stale is never found. Files only
ever take their place whole, so that processes may write the same at the same time.
"""

import hashlib
import json
import os
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rondo.config import DataConfig
from rondo.data.sources import Source, file_hash, fingerprint, records
from rondo.data.tokens import Tokens, refuse_empty, tokenise
from rondo.errors import UserError
from rondo.provenance import read_json, write_json

# Goes up whenever the same settings would give other tokens, or other files.
FORMAT = 1
SHARD_TOKENS = 1 << 24

Shard = dict[str, torch.Tensor]


class CachedTokens:
    """The documents of a source as one line of tokens, in the order of the source.

    Attributes:
        sha256: Hash of the source.
        offsets: Where each document begins, and where the last one ends, (documents + 1,).
    """

    def __init__(self, shards: list[Shard], sha256: str):
        self.sha256 = sha256
        self._shards = shards
        sizes = torch.tensor([0, *(len(shard["tokens"]) for shard in shards)])
        self._starts = sizes.cumsum(0)
        pairs = zip(self._starts.tolist(), shards, strict=False)
        begins = [start + shard["offsets"][:-1] for start, shard in pairs]
        self.offsets = torch.cat([*begins, self._starts[-1:]])

    @property
    def num_tokens(self) -> int:
        """How many tokens there are, separators included."""
        return int(self.offsets[-1])

    def take(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens at places of the line, and which of them count, as int64."""
        tokens, counted = torch.empty_like(places), torch.ones_like(places)
        owner = torch.searchsorted(self._starts, places, right=True) - 1
        for number in owner.unique().tolist():
            shard, here = self._shards[number], owner == number
            inside = places[here] - self._starts[number]
            tokens[here] = shard["tokens"][inside].long()
            if "counted" in shard:
                counted[here] = shard["counted"][inside].long()
        return tokens, counted


def cached_tokens(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> CachedTokens:
    """Tokenise a source, or find it tokenised.

    Raises:
        UserError: The source does not fit the settings, or the cache cannot be written.
    """
    base = config.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rondo"
    root = Path(base).expanduser() / "tokens"
    try:
        root.mkdir(parents=True, exist_ok=True)
        sha256 = fingerprint(source, partial(_remembered_hash, root))
        settings = [config.format, config.loss_on, config.field]
        parts = [FORMAT, sha256, _tokenizer_hash(tokenizer), *settings]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        shards = _load(root, key)
        if shards is None:
            _write(root, key, source, config, tokenizer)
            shards = _load(root, key)
        assert shards is not None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot keep tokens in {root}: {error}; name another directory with data.cache_dir"
        ) from error
    return CachedTokens(shards, sha256)


def _load(root: Path, key: str) -> list[Shard] | None:
    """Map the shards of a source into memory; None where they are missing or damaged."""
    try:
        facts = read_json(root / f"{key}.json")
        shards = [_map(_shard(root, key, number)) for number in range(facts["shards"])]
        sizes = [len(shard["tokens"]) for shard in shards]
        whole = [int(shard["offsets"][-1]) for shard in shards] == sizes
        return shards if whole and sum(sizes) == facts["tokens"] else None
    except (UserError, OSError, SafetensorError, KeyError):
        return None


def _map(path: Path) -> Shard:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _shard(root: Path, key: str, number: int) -> Path:
    return root / f"{key}-{number:05d}.safetensors"


def _write(
    root: Path, key: str, source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = tokenise(records(source, config.field), config, tokenizer)
    sizes, num_documents, counted = [], 0, False
    with (
        tempfile.TemporaryDirectory(dir=root, prefix=".") as scratch,
        tqdm(documents, f"tokenise {source.name}", unit=" documents", disable=None) as bar,
    ):
        for number, shard in enumerate(_shards(bar)):
            save_file(shard, _shard(Path(scratch), key, number))
            sizes.append(len(shard["tokens"]))
            num_documents += len(shard["offsets"]) - 1
            counted = counted or "counted" not in shard or bool(shard["counted"].any())
        refuse_empty(source.path, num_documents, counted)
        for number in range(len(sizes)):
            _shard(Path(scratch), key, number).replace(_shard(root, key, number))
    write_json(root / f"{key}.json", {"shards": len(sizes), "tokens": sum(sizes)})


def _shards(documents: Iterable[Tokens]) -> Iterator[Shard]:
    """Gather documents until they fill a shard, so that no more than one is in memory."""
    tokens, counted, offsets = array("i"), array("b"), array("q", [0])
    for document in documents:
        tokens.extend(document.ids)
        counted.extend(document.counted or ())
        offsets.append(len(tokens))
        if len(tokens) >= SHARD_TOKENS:
            yield _tensors(tokens, counted, offsets)
            tokens, counted, offsets = array("i"), array("b"), array("q", [0])
    if tokens:
        yield _tensors(tokens, counted, offsets)


def _tensors(tokens: array, counted: array, offsets: array) -> Shard:
    shard = {
        "tokens": torch.frombuffer(tokens, dtype=torch.int32),
        "offsets": torch.frombuffer(offsets, dtype=torch.int64),
    }
    return shard | {"counted": torch.frombuffer(counted, dtype=torch.int8)} if counted else shard


def _remembered_hash(root: Path, path: Path) -> str:
    """Hash a file, or recall the hash that it had at this size and time."""
    stat = path.stat()
    state = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    note = root / f"{hashlib.sha256(state.encode()).hexdigest()}.hash.json"
    if note.is_file():
        return read_json(note)["sha256"]
    found = file_hash(path)
    # A file just written may be written again within the same tick of its clock.
    if time.time() - stat.st_mtime > 2:
        write_json(note, {"path": str(path.resolve()), "sha256": found})
    return found


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        found = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        listing = "".join(f"{file_hash(path)} {path.name}\n" for path in found)
    return hashlib.sha256(listing.encode()).hexdigest()
