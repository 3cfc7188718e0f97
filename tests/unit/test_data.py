"""Texts in and token rows out: nothing lost, nothing that depends on how it is asked for."""

import gzip
import hashlib
import json
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from conftest import BOS, EOS, byte_tokenizer
from rondo import data
from rondo.errors import UserError

TOKENIZER = byte_tokenizer()
documents = st.lists(st.lists(st.integers(2, 99), max_size=12), max_size=12)


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, packed where its name says so."""
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(raw))
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


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
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


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
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
        ("half.jsonl", r'{"text": "\ud83d"}', "line 1 is no JSON"),
        ("a.parquet", "PAR1 and more", "cannot read"),
        ("empty.jsonl.zst", "", "holds no text"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=told) as caught:
        data.read_documents(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


DAMAGES = {
    "other": lambda raw: b"not packed at all",
    "cut": lambda raw: raw[: len(raw) // 2],
    "garbled": lambda raw: raw[:10] + b"\xff" * 40,
    "checksum": lambda raw: raw[:-8] + bytes(8),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_damaged_archives(tmp_path: Path, packed: str, damage: str) -> None:
    rows = "".join(json.dumps({"text": hashlib.sha256(bytes([n])).hexdigest()}) for n in range(99))
    path = write(tmp_path / f"a.jsonl{packed}", rows)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError, match="cannot read"):
        data.read_documents(str(path))


@pytest.mark.parametrize("cut", [0, 100])
def test_parquet(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"row {number}" for number in range(600)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(600)}), path)
    if not cut:
        assert data.read_documents(str(path)).texts == tuple(texts)
        return
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + bytes(cut) + raw[8 + cut :])
    with pytest.raises(UserError, match=f"cannot read {path}"):
        data.read_documents(str(path))


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt.gz", "a.jsonl", "c.txt"):
        write(tmp_path / "all" / name, name if "txt" in name else json.dumps({"text": name}))
    write(tmp_path / "all" / ".hidden.txt", "no")
    write(tmp_path / "all" / "README.md", "no")
    write(tmp_path / "all" / "sub" / "d.txt", "no")
    found = data.read_documents(f"{tmp_path}/all/")
    assert (found.name, found.texts) == ("all", ("a.jsonl", "b.txt.gz", "c.txt"))
    (tmp_path / "all" / "c.txt").rename(tmp_path / "all" / "d.txt")
    moved = data.read_documents(f"{tmp_path}/all/")
    assert (moved.texts, moved.sha256 == found.sha256) == (found.texts, False)
    write(tmp_path / "all" / "d.txt", "C.txt")
    assert data.read_documents(f"{tmp_path}/all/").sha256 != moved.sha256


def test_a_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the folder {tmp_path} holds no"):
        data.read_documents(str(tmp_path))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_a_dataset(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.jsonl", '{"text": "a"}\n{"text": "b"}')
    write(tmp_path / "set" / "test.jsonl", '{"text": "c"}')
    where = f"hub:{tmp_path}/set"
    found = data.read_documents(where)
    assert (found.name, found.path, found.texts) == ("set", where, ("a", "b"))
    assert found.sha256
    assert data.read_documents(f"it={where}:default:test").texts == ("c",)
    assert data.read_documents(f"it={where}::test").name == "it"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("hub:", "does not name a dataset"),
        ("hub:a:b:c:d", "does not name a dataset"),
        ("hub:{tmp}/none", "cannot read hub:.*none"),
        ("hub:{tmp}:other", "cannot read .*other"),
        ("hub:{tmp}::valid", "cannot read .*valid"),
        ("hub:{tmp}::bad", "cannot read"),
    ],
)
def test_datasets_that_cannot_be_read(tmp_path: Path, spec: str, told: str) -> None:
    write(tmp_path / "train.jsonl", '{"text": "a"}')
    write(tmp_path / "bad.jsonl", "no JSON")
    with pytest.raises(UserError, match=told) as caught:
        data.read_documents(spec.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst", "hub:a/b"])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    spec = name if name.startswith("hub:") else str(write(tmp_path / name, "x"))
    with pytest.raises(UserError, match=r'pip install "rondo-lm\[data\]"'):
        data.read_documents(spec)


@pytest.mark.parametrize("weight", ["0", "-1", "-0.5"])
def test_weights_are_positive(weight: str) -> None:
    with pytest.raises(UserError, match=f"the weight of math@{weight} must be positive"):
        data.read_documents(f"math@{weight}")


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
    assert BOS not in data.encode(TOKENIZER, "x")


def test_separator() -> None:
    assert data.separator_of(TOKENIZER) == EOS
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        data.separator_of(tokenizer)


def test_a_tokenizer_beyond_the_model_is_refused() -> None:
    data.check_tokenizer(TOKENIZER, 264)
    with pytest.raises(UserError, match=r"ids up to 263.*263 tokens"):
        data.check_tokenizer(TOKENIZER, 263)


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
