"""Tokens on disk: found again, never stale, whole or rebuilt."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from conftest import EOS, byte_tokenizer
from rondo.config import DataConfig
from rondo.data import cache, encode
from rondo.data.cache import CachedTokens, cached_tokens
from rondo.data.sources import parse_source
from rondo.errors import UserError

TOKENIZER = byte_tokenizer()
TEXTS = [f"the text {number} " + "an " * (number % 7) for number in range(40)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "body": text[::-1]}) for text in TEXTS))
    return path


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were tokenised, one for each time."""
    seen: list[str] = []
    write = cache._write

    def watched(root: Path, key: str, source: Any, *rest: Any) -> None:
        seen.append(source.name)
        write(root, key, source, *rest)

    monkeypatch.setattr(cache, "_write", watched)
    return seen


def tokens_of(
    path: Path, tokenizer: PreTrainedTokenizerFast = TOKENIZER, **fields: Any
) -> CachedTokens:
    fields = {"cache_dir": str(path.parent / "cache")} | fields
    return cached_tokens(parse_source(str(path)), DataConfig(**fields), tokenizer)


def line(tokens: CachedTokens) -> list[int]:
    return tokens.take(torch.arange(tokens.num_tokens))[0].tolist()


EXPECTED = [token for text in TEXTS for token in (*encode(TOKENIZER, text), EOS)]


@pytest.mark.parametrize("shard_tokens", [1, 100, 1 << 24])
def test_a_cache_holds_the_documents_in_order(
    text: Path, monkeypatch: pytest.MonkeyPatch, shard_tokens: int
) -> None:
    monkeypatch.setattr(cache, "SHARD_TOKENS", shard_tokens)
    for tokens in (tokens_of(text), tokens_of(text)):
        assert line(tokens) == EXPECTED
        lengths = [len(encode(TOKENIZER, text)) + 1 for text in TEXTS]
        assert tokens.offsets.diff().tolist() == lengths
        places = torch.randperm(tokens.num_tokens).reshape(-1, 1)
        assert torch.equal(tokens.take(places)[0], torch.tensor(EXPECTED)[places])
    shards = list((text.parent / "cache" / "tokens").glob("*.safetensors"))
    assert len(shards) == {1: 40, 1 << 24: 1}.get(shard_tokens, len(shards))
    assert not list((text.parent / "cache" / "tokens").glob(".*"))


def test_it_is_read_once(text: Path, builds: list[str]) -> None:
    for _ in range(3):
        tokens_of(text)
    assert builds == ["text"]


def test_nothing_stale_is_found(text: Path, builds: list[str]) -> None:
    before = tokens_of(text)
    text.write_text(text.read_text().replace("text 7", "text 8", 1))
    after = tokens_of(text)
    assert before.sha256 != after.sha256
    assert line(before) != line(after)
    changes = [{"field": "body"}, {"cache_dir": str(text.parent / "other")}]
    for number, change in enumerate(changes, 3):
        tokens_of(text, **change)
        assert len(builds) == number
    other = byte_tokenizer()
    other.eos_token = "<s>"
    assert line(tokens_of(text, other))[-1] != EOS
    other = byte_tokenizer()
    other.chat_template = "{{ messages }}"
    tokens_of(text, other)
    assert len(builds) == 6
    tokens_of(text)
    assert len(builds) == 6


def test_what_counts_is_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a", "messages": []}))
    everything, answers = tokens_of(path), tokens_of(path, loss_on="answers")
    assert line(everything) == line(answers)
    counted = [tokens.take(torch.arange(21))[1].tolist() for tokens in (everything, answers)]
    assert counted == [[1] * 21, [0] * 18 + [1] * 3]
    with pytest.raises(UserError, match="no chat template"):
        tokens_of(path, format="chat")


def test_packing_and_seed_do_not_matter_to_it(text: Path, builds: list[str]) -> None:
    tokens_of(text)
    tokens_of(text, packing="documents")
    assert len(builds) == 1


def test_a_content_is_hashed_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    plain = cache.file_hash

    def watched(path: Path) -> str:
        hashed.append(path.name)
        return plain(path)

    monkeypatch.setattr(cache, "file_hash", watched)
    # A file just written is not trusted to be finished.
    tokens_of(text)
    tokens_of(text)
    assert hashed.count("text.jsonl") == 2
    os.utime(text, (time.time() - 60,) * 2)
    tokens_of(text)
    tokens_of(text)
    assert hashed.count("text.jsonl") == 3
    os.utime(text, (time.time() - 50,) * 2)
    tokens_of(text)
    assert hashed.count("text.jsonl") == 4


def damage_shard(root: Path) -> None:
    path = sorted(root.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-4])


def empty_shard(root: Path) -> None:
    sorted(root.glob("*.safetensors"))[0].write_bytes(b"")


def other_shard(root: Path) -> None:
    first, second = sorted(root.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())


def lose_shard(root: Path) -> None:
    sorted(root.glob("*.safetensors"))[0].unlink()


def damage_index(root: Path) -> None:
    next(path for path in root.glob("*.json") if "hash" not in path.name).write_text("{")


@pytest.mark.parametrize(
    "damage", [damage_shard, empty_shard, other_shard, lose_shard, damage_index]
)
def test_what_is_damaged_is_rebuilt(
    text: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    monkeypatch.setattr(cache, "SHARD_TOKENS", 300)
    tokens_of(text)
    damage(text.parent / "cache" / "tokens")
    assert line(tokens_of(text)) == EXPECTED
    assert len(builds) == 2


def test_it_is_mapped_not_read(text: Path) -> None:
    tokens = tokens_of(text)
    (shard,) = (text.parent / "cache" / "tokens").glob("*.safetensors")
    # Another process puts the same file there anew: what is open stays as it was.
    spare = shard.with_suffix(".spare")
    spare.write_bytes(shard.read_bytes())
    shard.rename(shard.with_suffix(".old"))
    spare.rename(shard)
    shard.write_bytes(b"")
    assert line(tokens) == EXPECTED
    # What is in memory is the file.
    mapped = tokens_of(text)
    raw = shard.read_bytes()
    tokens_at = raw.index(load_file(shard)["tokens"].numpy().tobytes())
    with shard.open("r+b") as file:
        file.seek(tokens_at)
        file.write(bytes([7, 0, 0, 0]))
    assert line(mapped) == [7, *EXPECTED[1:]]


def test_a_failure_leaves_nothing(text: Path) -> None:
    text.write_text(text.read_text() + "\n{")
    with pytest.raises(UserError, match="line 41 is no JSON"):
        tokens_of(text)
    root = text.parent / "cache" / "tokens"
    assert list(root.iterdir()) == []


def test_a_cache_that_cannot_be_written(text: Path) -> None:
    (text.parent / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep tokens in .*data\.cache_dir"):
        tokens_of(text, cache_dir=str(text.parent / "file"))


def test_where_it_lies(text: Path, monkeypatch: pytest.MonkeyPatch, builds: list[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(text.parent / "xdg"))
    tokens_of(text, cache_dir=None)
    assert list((text.parent / "xdg" / "rondo" / "tokens").glob("*.safetensors"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(text.parent / "home"))
    tokens_of(text, cache_dir=None)
    assert list((text.parent / "home" / ".cache" / "rondo" / "tokens").glob("*.safetensors"))
