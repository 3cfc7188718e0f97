"""Rows: nothing lost or doubled, boundaries kept, the same stream however it is asked for."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from conftest import BOS, EOS, byte_tokenizer, recurrent
from rondo import data
from rondo.config import DataConfig
from rondo.data.sources import Record
from rondo.data.tokens import tokenise
from rondo.errors import UserError

TOKENIZER = byte_tokenizer()
TEXTS = [f"document {index} " + "x" * (7 * index % 23) for index in range(25)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = byte_tokenizer()
CHAT.chat_template = TEMPLATE
# Each example builds what it needs; the folder only saves tokenising again.
shared = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25
)


def write(path: Path, rows: Sequence[Any], field: str = "text") -> Path:
    """Write JSON lines, of records or of texts."""
    records = [row if isinstance(row, dict) else {field: row} for row in rows]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path / "text.jsonl", TEXTS)


def rows_of(
    path: Path, seq_len: int = 15, seed: int = 0, tokenizer: Any = TOKENIZER, **fields: Any
) -> data.TrainingRows:
    text = {} if "phases" in fields else {"sources": (str(path),)}
    fields = {**text, "cache_dir": str(path.parent / "cache")} | fields
    return data.open_rows(DataConfig(**fields), tokenizer, seq_len, seed, 1000)


def whole(rows: data.Rows) -> torch.Tensor:
    """The rows with their last label as a token, where nothing is masked."""
    return torch.cat([rows.input_ids, rows.labels[:, -1:]], dim=1)


def equal(one: data.Rows, other: data.Rows) -> bool:
    positions = one.position_ids, other.position_ids
    return (
        torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.labels, other.labels)
        and (positions == (None, None) or torch.equal(*positions))
    )


# ---- wrapped and shuffled, as runs before this file were


def recomputed(texts: list[str], row_len: int, seed: int, epochs: int) -> torch.Tensor:
    """The stream in plain words: shuffle, join, cut, leave the tail."""
    tokens, parts = [data.encode(TOKENIZER, text) for text in texts], []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(texts), generator=generator).tolist()
        parts.append(data.packed_rows([tokens[number] for number in order], EOS, row_len))
    return torch.cat(parts)


@pytest.mark.parametrize(("seq_len", "seed"), [(15, 0), (8, 3), (200, 1)])
def test_rows_are_those_of_earlier_versions(text: Path, seq_len: int, seed: int) -> None:
    expected = recomputed(TEXTS, seq_len + 1, seed, epochs=3)
    rows = rows_of(text, seq_len, seed).batch(range(len(expected)))
    assert torch.equal(whole(rows), expected)
    assert torch.equal(rows.labels, expected[:, 1:])
    assert rows.position_ids is None
    assert rows.input_ids.dtype == rows.labels.dtype == torch.long


def test_a_sample_gives_the_rows_of_earlier_versions(tmp_path: Path) -> None:
    texts = list(data.read_documents("math-test").texts)
    config = DataConfig(sources=("math-test",), cache_dir=str(tmp_path))
    rows = data.open_rows(config, TOKENIZER, 255, 5, 100)
    assert torch.equal(whole(rows.batch(range(40))), recomputed(texts, 256, 5, epochs=1)[:40])
    documents = data.read_documents("math-test")
    (facts,) = rows.facts
    assert facts == {
        "name": "math-test",
        "path": "sample math-test",
        "sha256": documents.sha256,
        "tokens": sum(len(data.encode(TOKENIZER, text)) + 1 for text in texts),
        "weight": 1.0,
        "phase": 1,
    }


def test_each_epoch_holds_every_document_once_up_to_the_tail(text: Path) -> None:
    rows, per_epoch = rows_of(text), sum(len(data.encode(TOKENIZER, t)) + 1 for t in TEXTS) // 16
    orders = []
    for epoch in range(4):
        part = rows.batch(range(epoch * per_epoch, (epoch + 1) * per_epoch))
        orders.append(TOKENIZER.decode(whole(part).flatten()).split("</s>"))
        seen, tail = Counter(orders[-1][:-1]), orders[-1][-1]
        assert set(seen.values()) == {1}
        (lost,) = [set(TEXTS) - set(seen)]
        assert set(seen) <= set(TEXTS)
        # What is missing is the tail: less than a row, and the document it cuts.
        assert len(lost) <= 1 + 15 // 12
        assert any(text.startswith(tail) for text in lost) or not tail
    assert len({tuple(order) for order in orders}) == 4


def test_the_seed_changes_the_order(text: Path) -> None:
    one, other = (rows_of(text, seed=seed).batch(range(9)) for seed in (0, 1))
    assert not equal(one, other)


def test_the_global_random_state_neither_matters_nor_moves(text: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = rows_of(text).batch(range(40))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(rows_of(text).batch(range(40)), first)


def test_one_row_is_enough_and_less_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["xyz"])
    assert rows_of(path, 3).batch([0, 5]).input_ids.tolist() == [data.encode(TOKENIZER, "xyz")] * 2
    for call in (
        lambda: rows_of(path, 4),
        lambda: data.held_out_rows(str(path), DataConfig(), TOKENIZER, 4, 1),
    ):
        with pytest.raises(UserError, match=r"a\.jsonl holds 4 tokens.*sequence of 5.*seq-len"):
            call()


# ---- however it is asked for

SETTINGS: dict[str, dict[str, Any]] = {
    "wrapped": {},
    "documents": {"packing": "documents"},
    "streaming": {"streaming": True},
    "streaming documents": {"streaming": True, "packing": "documents"},
    "mixture": {"sources": ("{text}@2", "{other}")},
    "phases": {"phases": ("0.01: {text} {other}@3", "0.02: {other}", "1: {text}")},
    "streaming phases": {
        "phases": ("0.01: {text} {other}@3", "0.02: {other}", "1: {text}"),
        "streaming": True,
        "packing": "documents",
    },
}


def opened(text: Path, setting: str) -> data.TrainingRows:
    other = text.with_name("other.jsonl")
    if not other.exists():
        write(other, ["y" * (number % 5) for number in range(40)] + ["long " * 30])
    fields = dict(SETTINGS[setting])
    for name in fields.keys() & {"sources", "phases"}:
        fields[name] = tuple(each.format(text=text, other=other) for each in fields[name])
    return rows_of(text, **fields)


@shared
@pytest.mark.parametrize("setting", SETTINGS)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_the_stream_does_not_depend_on_the_batch_size(
    text: Path, setting: str, sizes: list[int]
) -> None:
    rows, taken, pieces = opened(text, setting), 0, []
    for size in sizes:
        pieces.append(rows.batch(range(taken, taken + size)))
        taken += size
    at_once = opened(text, setting).batch(range(taken))
    assert torch.equal(torch.cat([piece.input_ids for piece in pieces]), at_once.input_ids)
    assert torch.equal(torch.cat([piece.labels for piece in pieces]), at_once.labels)


@shared
@pytest.mark.parametrize("setting", SETTINGS)
@given(st.integers(0, 60), st.integers(0, 12), st.integers(1, 3), st.integers(1, 3))
def test_it_goes_on_anywhere_on_any_number_of_ranks(
    text: Path, setting: str, stop: int, read: int, before: int, after: int
) -> None:
    """Ranks read a part each, as do those that resume; the state is the same on all of them."""
    uninterrupted = opened(text, setting).batch(range(stop, stop + 12))
    ranks = [opened(text, setting) for _ in range(before)]
    for rank, rows in enumerate(ranks):
        rows.batch([0, *range(rank, max(0, stop - read), before)])
    states = [json.loads(json.dumps(rows.state(max(stop, 1)))) for rows in ranks]
    assert all(state == states[0] for state in states)
    assert bool(states[0]) == ("streaming" in setting)
    if stop:
        for rank in range(after):
            rows = opened(text, setting)
            rows.restore(states[0])
            own = list(range(rank, 12, after))
            part = rows.batch([stop + index for index in own])
            assert torch.equal(part.input_ids, uninterrupted.input_ids[own])
            assert torch.equal(part.labels, uninterrupted.labels[own])


@shared
@pytest.mark.parametrize("setting", ["wrapped", "documents", "mixture"])
@given(st.lists(st.integers(0, 90), min_size=1, max_size=9))
def test_cached_rows_are_functions_of_their_index(
    text: Path, setting: str, indices: list[int]
) -> None:
    rows = opened(text, setting)
    batch = rows.batch(indices)
    for place, index in enumerate(indices):
        one = rows.batch([index])
        assert torch.equal(one.input_ids[0], batch.input_ids[place])
        assert torch.equal(one.labels[0], batch.labels[place])


def test_a_mixture_takes_the_rows_of_its_sources(text: Path) -> None:
    rows, path = opened(text, "mixture"), text.with_name("other.jsonl")
    batch = rows.batch(range(60))
    ours, theirs = (rows_of(each).batch(range(40)).input_ids.tolist() for each in (text, path))
    found = batch.input_ids.tolist()
    assert [row for row in found if row in ours] == ours
    assert [row for row in found if row not in ours] == theirs[:20]
    assert [(one["name"], one["weight"]) for one in rows.facts] == [("text", 2.0), ("other", 1.0)]


def test_facts_of_phases(text: Path) -> None:
    facts = opened(text, "phases").facts
    found = [(one["name"], one["weight"], one["phase"]) for one in facts]
    assert found == [("text", 1, 1), ("other", 3, 1), ("other", 1, 2), ("text", 1, 3)]
    assert json.loads(json.dumps(facts)) == facts


# ---- streaming


def test_a_stream_is_the_source_in_order_over_and_over(text: Path) -> None:
    rows = rows_of(text, streaming=True)
    line = [token for text in TEXTS for token in (*data.encode(TOKENIZER, text), EOS)]
    number = 3 * len(line) // 16
    found = whole(rows.batch(range(number))).flatten().tolist()
    assert found == (line * 3)[: number * 16]
    assert rows.facts[0]["tokens"] is None
    assert not (text.parent / "cache").exists()


def test_a_stream_skips_without_tokenising(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = rows_of(text, streaming=True).state(20)
    rows, seen = rows_of(text, streaming=True), []

    def watched(records: Any, *rest: Any) -> Any:
        return tokenise((seen.append(record) or record for record in records), *rest)

    monkeypatch.setattr("rondo.data.rows.tokenise", watched)
    rows.restore(state)
    rows.batch([20])
    ((_, document, _),) = state.values()
    assert document > 5
    assert seen[0].fields == {"text": TEXTS[document]}


def test_a_stream_says_at_once_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["x"], field="body")
    with pytest.raises(UserError, match="line 1 has neither `text`"):
        rows_of(path, streaming=True)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        rows_of(path, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_gives_the_rows_of_its_file(
    text: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", text.parent / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = text.parent / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(text.read_bytes())
    spec = f"set=hub:{folder}@2"
    rows = rows_of(text, sources=(spec,), streaming=streaming)
    assert equal(rows.batch(range(30)), rows_of(text, streaming=streaming).batch(range(30)))
    held_out = data.held_out_rows(spec, DataConfig(streaming=streaming), TOKENIZER, 15, 4)
    assert equal(held_out, data.held_out_rows(str(text), DataConfig(), TOKENIZER, 15, 4))


# ---- held-out rows


def test_held_out_rows_are_the_first_in_order(text: Path) -> None:
    line = [token for text in TEXTS for token in (*data.encode(TOKENIZER, text), EOS)]
    for packing in ("wrapped", "documents"):
        config = DataConfig(packing=packing)
        rows = data.held_out_rows(str(text), config, TOKENIZER, 7, 5)
        assert rows.input_ids.tolist() == [line[8 * row : 8 * row + 7] for row in range(5)]
        assert (rows.position_ids is None) == (packing == "wrapped")
        short = data.held_out_rows(str(text), config, TOKENIZER, 7, 10_000)
        assert len(short.input_ids) == len(line) // 8


# ---- documents of a row


def documents_of(row: list[int]) -> list[int]:
    """The position of each token in what the row holds of its document."""
    places, place = [], 0
    for token in row:
        places.append(place)
        place = 0 if token == EOS else place + 1
    return places


@shared
@given(
    st.lists(st.text("abc ", max_size=30), min_size=1, max_size=12),
    st.sampled_from([2, 4, 8]),
    st.booleans(),
)
def test_boundaries_are_kept(
    tmp_path: Path, texts: list[str], pieces: int, streaming: bool
) -> None:
    path = write(tmp_path / "a.jsonl", [*texts, "the end of it"])
    open_rows = {"packing": "documents", "streaming": streaming, "cache_dir": str(tmp_path)}
    rows = rows_of(path, 8, **open_rows).batch(range(6))
    wrapped = rows_of(path, 8, **open_rows | {"packing": "wrapped"}).batch(range(6))
    cut = rows.cut(8 // pieces)
    assert torch.equal(rows.input_ids, wrapped.input_ids)
    assert torch.equal(cut.input_ids.flatten(), rows.input_ids.flatten())
    assert torch.equal(cut.labels.flatten(), rows.labels.flatten())
    assert torch.equal(wrapped.cut(4).labels, wrapped.labels.reshape(-1, 4))
    assert wrapped.cut(4).position_ids is None
    for each in (rows, cut):
        assert each.position_ids.tolist() == [documents_of(row) for row in each.input_ids.tolist()]
    # The separator is the last that is predicted, and it predicts nothing.
    masked = rows.labels == -100
    assert torch.equal(masked, rows.input_ids == EOS)
    assert torch.equal(rows.labels[~masked], wrapped.labels[~masked])


def test_a_document_longer_than_the_sequence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["x" * 50])
    rows = rows_of(path, 8, packing="documents").batch(range(5))
    assert rows.position_ids.tolist() == [list(range(8))] * 5
    assert (rows.labels != -100).all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_document_in_a_row_is_as_if_alone(tmp_path: Path, family: str) -> None:
    path = write(tmp_path / "a.jsonl", ["some words", "", "a", "and the rest of it, longer"])
    config = DataConfig(packing="documents")
    rows = data.held_out_rows(str(path), config, TOKENIZER, 36, 1)
    model = recurrent(family)
    line = rows.input_ids[0].tolist()
    starts = [place for place, position in enumerate(rows.position_ids[0]) if position == 0]
    assert len(starts) == 4
    with torch.no_grad():
        packed = model(
            rows.input_ids, position_ids=rows.position_ids, num_recurrences=3, use_cache=False
        ).logits[0]
        joined = model(rows.input_ids, num_recurrences=3, use_cache=False).logits[0]
        for start, stop in zip(starts, [*starts[1:], len(line)], strict=True):
            alone = model(rows.input_ids[:, start:stop], num_recurrences=3, use_cache=False).logits[
                0
            ]
            torch.testing.assert_close(packed[start:stop], alone, rtol=1e-4, atol=1e-4)
    # Where the document before is seen, the last one comes out otherwise.
    assert (packed[starts[-1] :] - joined[starts[-1] :]).abs().max() > 0.01


# ---- what counts


def documents(records: list[dict[str, Any]], tokenizer: Any = CHAT, **fields: Any) -> list[Any]:
    named = [Record(f"line {number}", record) for number, record in enumerate(records, 1)]
    return list(tokenise(named, DataConfig(**fields), tokenizer))


def shown(document: Any) -> tuple[str, str]:
    """The text of a document, and what of it counts."""
    counted = document.counted or [True] * len(document.ids)
    kept = [token for token, counts in zip(document.ids, counted, strict=True) if counts]
    return CHAT.decode(document.ids), CHAT.decode(kept)


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[number % 2], "content": content}
            for number, content in enumerate(contents)
        ]
    }


QUESTION = {"question": "the sum of 1, 1?", "answer": 2}


def test_text_that_answers() -> None:
    (document,) = documents([QUESTION], loss_on="answers")
    whole, counted = shown(document)
    assert whole == "Question: the sum of 1, 1?\nAnswer: 2</s>"
    assert counted == " 2</s>"
    (all_of_it,) = documents([QUESTION])
    assert (all_of_it.ids, all_of_it.counted) == (document.ids, None)
    # A text beside the pair is what all counts on, and the pair what answers do.
    (both,) = documents([{"text": "x", **QUESTION}], loss_on="answers")
    assert shown(both) == (whole, counted)
    assert shown(*documents([{"text": "x", **QUESTION}]))[0] == "x</s>"


def test_chats() -> None:
    long, unanswered = turns("hi", "the hello", "in", "an end"), turns("hi", "in", "who")
    pairs = [{"prompt": "p", "answer": "the a"}, {"prompt": "p", "completion": "c"}, QUESTION]
    records = [long, unanswered, *pairs]
    found = [shown(each) for each in documents(records, format="chat", loss_on="answers")]
    # The separator is the end of the last turn, not one more.
    assert found == [
        (
            "<user>hi</s>\n<assistant>the hello</s>\n<user>in</s>\n<assistant>an end</s>",
            "the hello</s>\nan end</s>",
        ),
        ("<user>hi</s>\n<assistant>in</s>\n<user>who</s>", "in</s>\n"),
        ("<user>p</s>\n<assistant>the a</s>", "the a</s>"),
        ("<user>p</s>\n<assistant>c</s>", "c</s>"),
        ("<user>the sum of 1, 1?</s>\n<assistant>2</s>", "2</s>"),
    ]
    for one, all_of_it in zip(
        documents(records, format="chat", loss_on="answers"),
        documents(records, format="chat"),
        strict=True,
    ):
        assert (all_of_it.ids, all_of_it.counted) == (one.ids, None)


@given(
    st.lists(st.tuples(st.text("theinr \n漢é🎼", max_size=9), st.text("anr 漢é🎼", max_size=9))),
)
def test_exactly_the_answers_count(pairs: list[tuple[str, str]]) -> None:
    record = turns("start", *(part for pair in pairs for part in pair[::-1]), "end")
    (document,) = documents([record], format="chat", loss_on="answers")
    answers = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
    assert shown(document)[1] == "</s>\n".join([*answers, ""]).removesuffix("\n")


def test_a_beginning_is_part_of_a_text_and_never_counts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    (document,) = documents([QUESTION], tokenizer, loss_on="answers")
    whole, counted = shown(document)
    assert (whole[:12], counted) == ("<s>Question:", " 2</s>")
    (document,) = documents([QUESTION], tokenizer, format="chat", loss_on="answers")
    whole, counted = shown(document)
    assert (whole[:6], counted) == ("<user>", "2</s>")


def test_a_template_without_an_end_of_its_own() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("</s>\n", "|")
    (document,) = documents([turns("a", "b")], tokenizer, format="chat", loss_on="answers")
    assert shown(document) == ("<user>a|<assistant>b|</s>", "b|</s>")


def test_many_spans_and_documents_keep_apart() -> None:
    records = [turns("q" * (number % 4), "a" * (number % 7)) for number in range(700)]
    found = documents(records, format="chat", loss_on="answers")
    assert [shown(each)[1] for each in found] == ["a" * (n % 7) + "</s>" for n in range(700)]


def test_prompts_stay_out_of_the_loss(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [turns("long " * 9, "yes"), turns("so", "no")])
    config = {"format": "chat", "loss_on": "answers", "packing": "documents"}
    for streaming in (False, True):
        rows = rows_of(path, 16, tokenizer=CHAT, streaming=streaming, **config).batch(range(4))
        kept = rows.labels[rows.labels != -100].tolist()
        assert set(CHAT.decode(kept).split("</s>")) <= {"yes", "no", "", "s", "es", "o", "ye", "n"}
        assert (rows.labels == -100).all(dim=1).any()
        assert (rows.labels != -100).any()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_that_answers_nothing(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path / "a.jsonl", [turns("who is there, and why?")] * 9)
    config = {"format": "chat", "loss_on": "answers", "streaming": streaming}
    with pytest.raises(UserError, match=r"a\.jsonl holds no answer"):
        rows_of(path, 16, tokenizer=CHAT, **config).batch(range(30))
    with pytest.raises(UserError, match=r"a\.jsonl holds no answer"):
        data.held_out_rows(str(path), DataConfig(**config), CHAT, 16, 4)


def test_a_stream_may_resume_after_its_last_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [turns("so", "yes"), *[turns("who is it?")] * 9])
    config = {"format": "chat", "loss_on": "answers", "streaming": True}
    state = rows_of(path, 16, tokenizer=CHAT, **config).state(3)
    rows = rows_of(path, 16, tokenizer=CHAT, **config)
    rows.restore(state)
    assert (rows.batch(range(3, 6)).labels == -100).all()
    assert (rows.batch(range(6, 20)).labels != -100).any()


@pytest.mark.parametrize(
    ("record", "fields", "told"),
    [
        ({"text": "x"}, {"loss_on": "answers"}, "line 1 has no `question` and `answer`"),
        ({"text": "x"}, {"field": "body"}, "neither `body` nor `question`"),
        ({"text": "x"}, {"format": "chat"}, "neither `messages`"),
        ({"messages": []}, {"format": "chat"}, "neither `messages`"),
        ({"messages": ["x"]}, {"format": "chat"}, "neither `messages`"),
        ({"messages": [{"role": "user"}]}, {"format": "chat"}, "neither `messages`"),
        ({"messages": 5}, {"format": "chat"}, "neither `messages`"),
        ({"question": "q", "answer": None}, {}, "neither `text` nor"),
        ({"prompt": ["q"], "answer": "a"}, {"format": "chat"}, "neither `messages`"),
    ],
)
def test_records_that_do_not_fit(record: dict[str, Any], fields: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        documents([record], **fields)


def test_templates_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="no chat template"):
        documents([turns("a", "b")], TOKENIZER, format="chat")
    tokenizer = byte_tokenizer()
    # Only the last answer is shown whole.
    tokenizer.chat_template = TEMPLATE.replace(
        "m.content", "m.content if loop.last or m.role == 'user' else '..'"
    )
    documents([turns("a", "b")], tokenizer, format="chat", loss_on="answers")
    documents([turns("a", "b", "c")], tokenizer, format="chat")
    with pytest.raises(UserError, match=r"cannot be used with data\.loss_on answers.*line 1"):
        documents([turns("a", "b", "c")], tokenizer, format="chat", loss_on="answers")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"line 1 does not fit .*roles must alternate"):
        documents([turns("a", "b")], tokenizer, format="chat")
    tokenizer.chat_template = "{{ 'a' + messages[0].content }}"
    with pytest.raises(UserError, match="line 1 does not fit"):
        documents([{"messages": [{"role": "user", "content": None}]}], tokenizer, format="chat")
