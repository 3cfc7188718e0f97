"""Texts in and token rows out: nothing lost, nothing that depends on how it is asked for."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rondo import data
from rondo.errors import UserError

EOS = 1
documents = st.lists(st.lists(st.integers(2, 99), max_size=12), max_size=12)


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    pieces = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", **special)


TOKENIZER = byte_tokenizer(eos_token="<eos>")


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, packed where its name says so."""
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


# ---- reading


@pytest.mark.parametrize("name", data.SAMPLES)
def test_shipped_samples(name: str) -> None:
    found = data.read_documents(name)
    assert found.name == name
    assert len(found.texts) > 20
    assert all(text.strip() for text in found.texts)
    assert data.read_documents(name) == found


def test_samples_for_training_and_for_measuring_do_not_overlap() -> None:
    for name in ("math", "general"):
        train, held_out = data.read_documents(name), data.read_documents(f"{name}-test")
        assert not set(train.texts) & set(held_out.texts)


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_json_lines(tmp_path: Path, packed: str) -> None:
    rows = [
        {"text": "one\n\ntwo"},
        {"question": "1 + 1?", "answer": 2},
        {"text": "three", "question": "?", "answer": "!"},
        {"text": None, "question": "q", "answer": "a"},
    ]
    content = "\n\n".join(json.dumps(row) for row in rows) + "\n"
    path = write(tmp_path / f"some.name.jsonl{packed}", content)
    found = data.read_documents(str(path))
    assert found.texts == (
        "one\n\ntwo",
        "Question: 1 + 1?\nAnswer: 2",
        "three",
        "Question: q\nAnswer: a",
    )
    assert (found.name, found.path) == ("some", str(path))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    "content",
    [
        "a\nb\n\n\nc d\n\n",
        "\n\na\nb\n\nc d",
        "a\nb\n \t\nc d\n",
        "a\r\nb\r\n\r\nc d\r\n",
    ],
)
def test_plain_text(tmp_path: Path, packed: str, content: str) -> None:
    path = write(tmp_path / f"notes.txt{packed}", content)
    texts = data.read_documents(str(path)).texts
    assert [text.split() for text in texts] == [["a", "b"], ["c", "d"]]


def test_line_separators_of_unicode_end_no_json_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x1cf"
    row = json.dumps({"text": text}, ensure_ascii=False)
    path = write(tmp_path / "web.jsonl", f"{row}\r\n{row}\n")
    assert data.read_documents(str(path)).texts == (text, text)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert data.read_documents(str(write(tmp_path / "a.txt", "\ufeffhi"))).texts == ("hi",)
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "hi"}')
    assert data.read_documents(str(path)).texts == ("hi",)


def test_a_file_may_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "hi")
    found = data.read_documents(f"held out={path}")
    assert (found.name, found.path, found.texts) == ("held out", str(path), ("hi",))
    assert data.read_documents(f"={path}").name == "a"


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    path = write(tmp_path / "lr=3" / "a=b.txt", "hi")
    found = data.read_documents(str(path))
    assert (found.name, found.path) == ("a=b", str(path))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "x", "neither .jsonl nor .txt"),
        ("a.gz", "x", "neither .jsonl nor .txt"),
        ("empty.txt", "", "holds no text"),
        ("blank.txt", " \n\n \n", "holds no text"),
        ("empty.jsonl", "\n", "holds no text"),
        ("empty.jsonl.gz", "", "holds no text"),
        ("latin.txt", b"na\xefve", "cannot read"),
        ("bad.jsonl", '{"text": "a"}\n\n{', "line 3 is no JSON"),
        ("list.jsonl", "[1]", "line 1 has neither"),
        ("number.jsonl", "5", "line 1 has neither"),
        ("half.jsonl", '{"text": "a"}\n{"question": "q"}', "line 2 has neither"),
        ("typed.jsonl", '{"text": 5}', "line 1 has neither"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=told) as caught:
        data.read_documents(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"no gzip at all",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:10] + b"\xff" * 40,
        lambda raw: raw[:-8] + bytes(8),
    ],
    ids=["other", "cut", "garbled", "checksum"],
)
def test_damaged_gzip(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"text": "hello"}\n' * 40)))
    with pytest.raises(UserError, match="cannot read"):
        data.read_documents(str(path))


@pytest.mark.parametrize("spec", ["maths", "", "=", "name=none.txt", "{tmp}", "{tmp}/none.jsonl"])
def test_no_such_text(tmp_path: Path, spec: str) -> None:
    spec = spec.format(tmp=tmp_path)
    with pytest.raises(UserError, match=r"there is no text .*math-test") as caught:
        data.read_documents(spec)
    assert spec in str(caught.value)


# ---- the tokenizer


def test_load_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "good")
    loaded = data.load_tokenizer(tmp_path / "good")
    text = "naïve 12 + 30"
    assert data.encode(loaded, text) == data.encode(TOKENIZER, text)
    assert loaded.decode(data.encode(loaded, text)) == text
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no tokenizer"):
        data.load_tokenizer(tmp_path / "none")


def test_encode_adds_no_special_tokens() -> None:
    assert data.encode(TOKENIZER, "") == []
    assert len(data.encode(TOKENIZER, "x" * 300)) == 300


def test_separator() -> None:
    assert data.separator_of(TOKENIZER) == EOS
    with pytest.raises(UserError, match="eos_token"):
        data.separator_of(byte_tokenizer())


# ---- packing


@given(documents, st.integers(1, 9))
def test_packing_loses_the_tail_and_nothing_else(
    token_lists: list[list[int]], row_len: int
) -> None:
    rows = data.packed_rows(token_lists, EOS, row_len)
    stream = [token for tokens in token_lists for token in (*tokens, EOS)]
    packed = rows.flatten().tolist()
    assert rows.shape == (len(stream) // row_len, row_len)
    assert rows.dtype == torch.long
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) < row_len


@given(documents, st.integers(1, 5))
def test_batches_hold_every_list_once(token_lists: list[list[int]], batch_size: int) -> None:
    seen: list[int] = []
    lengths: list[int] = []
    for chosen, ids, mask in data.padded_batches(token_lists, batch_size):
        assert 1 <= len(chosen) <= batch_size
        assert ids.shape == mask.shape
        assert ids.shape[1] == max(len(token_lists[index]) for index in chosen)
        for index, row, real in zip(chosen, ids, mask, strict=True):
            length = len(token_lists[index])
            assert row[:length].tolist() == token_lists[index]
            assert real.tolist() == [1] * length + [0] * (len(real) - length)
            assert not row[length:].any()
            lengths.append(length)
        seen += chosen
    assert sorted(seen) == list(range(len(token_lists)))
    assert lengths == sorted(lengths)


# ---- the training stream


def make_documents(texts: list[str]) -> data.Documents:
    return data.Documents("name", "some/path", "0" * 64, tuple(texts))


TEXTS = [f"document {index} " + "x" * (7 * index % 23) for index in range(25)]


def training_rows(row_len: int = 16, seed: int = 0) -> data.TrainingRows:
    return data.TrainingRows(make_documents(TEXTS), TOKENIZER, row_len, seed)


def test_a_row_is_a_function_of_its_index() -> None:
    rows = training_rows()
    count = 3 * rows.rows_per_epoch
    forward = [rows[index] for index in range(count)]
    assert all(row.shape == (16,) for row in forward)
    # Backwards in one instance, at random in another, alone in a third.
    assert all(torch.equal(rows[index], forward[index]) for index in reversed(range(count)))
    other = training_rows()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3)).tolist()
    assert all(torch.equal(other[index], forward[index]) for index in order)
    assert torch.equal(training_rows()[count - 1], forward[count - 1])


def test_the_global_random_state_neither_matters_nor_moves() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = training_rows().batch(0, 40)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(training_rows().batch(0, 40), first)


@given(st.integers(0, 120), st.integers(1, 40))
def test_a_batch_is_its_items(first: int, size: int) -> None:
    rows, other = training_rows(), training_rows()
    batch = rows.batch(first, size)
    assert batch.shape == (size, 16)
    assert torch.equal(batch, torch.stack([other[index] for index in range(first, first + size)]))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_the_stream_does_not_depend_on_the_batch_size(sizes: list[int]) -> None:
    rows, taken, pieces = training_rows(), 0, []
    for size in sizes:
        pieces.append(rows.batch(taken, size))
        taken += size
    assert torch.equal(torch.cat(pieces), training_rows().batch(0, taken))


def documents_of(rows: data.TrainingRows, epoch: int) -> list[str]:
    """The documents that lie whole within an epoch's rows, in order."""
    start = epoch * rows.rows_per_epoch
    stream = rows.batch(start, rows.rows_per_epoch).flatten().tolist()
    whole = stream[: len(stream) - stream[::-1].index(EOS)]
    return TOKENIZER.decode(whole).split("<eos>")[:-1]


def test_each_epoch_holds_every_document_once_up_to_the_tail() -> None:
    rows = training_rows()
    tail = rows.num_tokens - rows.rows_per_epoch * 16
    assert 0 <= tail < 16
    orders = [documents_of(rows, epoch) for epoch in range(4)]
    for order in orders:
        assert max(Counter(order).values()) == 1
        lost = set(TEXTS) - set(order)
        assert set(order) <= set(TEXTS)
        assert sum(len(text) + 1 for text in lost) < tail + max(map(len, TEXTS)) + 1
        assert len(lost) <= tail
    assert len({tuple(order) for order in orders}) == 4


def test_the_seed_changes_the_order() -> None:
    assert documents_of(training_rows(seed=0), 0) != documents_of(training_rows(seed=1), 0)
    assert documents_of(training_rows(seed=0), 1) != documents_of(training_rows(seed=1), 0)


def test_counts() -> None:
    rows = training_rows(row_len=10)
    assert rows.num_tokens == sum(len(text) + 1 for text in TEXTS)
    assert rows.rows_per_epoch == rows.num_tokens // 10


def test_one_row_is_enough_and_less_is_refused() -> None:
    rows = data.TrainingRows(make_documents(["abc"]), TOKENIZER, 4, 0)
    assert rows.rows_per_epoch == 1
    assert rows[0].tolist() == rows[5].tolist() == [*data.encode(TOKENIZER, "abc"), EOS]
    with pytest.raises(UserError, match=r"some/path holds 4 tokens.*sequence of 5.*--seq-len"):
        data.TrainingRows(make_documents(["abc"]), TOKENIZER, 5, 0)
