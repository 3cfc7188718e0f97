"""Text as it is told token by token, against the whole text at once."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import BOS, EOS, byte_tokenizer
from rondo_serve.requests import Refused
from rondo_serve.text import Writer


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges end inside a character, as those of many vocabularies do."""
    symbols = {chr(byte): _symbol(byte) for byte in range(256)}
    merges = [
        (symbols["\xe2"], symbols["\x82"]),
        (symbols["a"], symbols["\xe2"]),
        (symbols["\xa9"], symbols["b"]),
        (symbols["\xf0"], symbols["\x9f"]),
        (symbols["\xac"], symbols["\xf0"] + symbols["\x9f"]),
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "</s>", *alphabet, *(left + right for left, right in merges), "<tool>"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<tool>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _symbol(byte: int) -> str:
    """What byte-level BPE writes for a byte: the n-th of those it cannot show is U+0100 + n."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in shown:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in shown].index(byte))


def spacing_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that writes spaces at the beginning of words and drops one that begins a text."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581a", "\u2581b", "a", "b", "\u2581", "\u00e9", "\u2581."]
    vocabulary: Any = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "merged bytes": merging_tokenizer(),
    "spaces": spacing_tokenizer(),
}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
# Few letters, so that stop strings overlap with the text, each other and themselves.
LETTERS = "ab\u00e9\u20ac\U0001f600 "


def tokens_of(data: st.DataObject, tokenizer: Any) -> list[int]:
    """Text, broken characters and special tokens in any order."""
    text = st.text(LETTERS, max_size=8).map(
        lambda one: tokenizer.encode(one, add_special_tokens=False)
    )
    anything = st.lists(st.integers(0, len(tokenizer) - 1), max_size=3)
    return [token for part in data.draw(st.lists(text | anything, max_size=5)) for token in part]


def whole(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def cut(text: str, stop: tuple[str, ...]) -> str:
    return text[: min([text.find(one) for one in stop if one in text], default=len(text))]


def told(tokenizer: Any, stop: tuple[str, ...], tokens: list[int]) -> tuple[str, list[int], bool]:
    """What a writer tells up to where it stops, the tokens it took for that, whether it stopped."""
    writer, found, taken = Writer(tokenizer, stop), "", []
    for token in tokens:
        found += writer.push(token)
        taken.append(token)
        if writer.stopped:
            break
    found += writer.finish()
    assert not writer.finish(), "what was held back was told twice"
    return found, taken, writer.stopped


@each_tokenizer
@given(data=st.data())
def test_all_that_is_told_is_the_text_of_all_tokens(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokens_of(data, tokenizer)
    assert told(tokenizer, (), tokens) == (whole(tokenizer, tokens), tokens, False)


@each_tokenizer
@given(data=st.data(), stop=st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3))
def test_the_text_ends_before_the_first_stop_string(
    name: str, data: st.DataObject, stop: list[str]
) -> None:
    tokenizer, stops = TOKENIZERS[name], tuple(stop)
    tokens = tokens_of(data, tokenizer)
    found, taken, stopped = told(tokenizer, stops, tokens)
    text = whole(tokenizer, taken)
    assert found == cut(text, stops)
    assert stopped == any(one in text for one in stops)
    # It did not come too late either, but where a character was unfinished.
    before = whole(tokenizer, taken[:-1])
    assert before.endswith("\ufffd") or not any(one in before for one in stops)


@given(text=st.text(LETTERS, min_size=1, max_size=12), data=st.data())
def test_a_part_of_the_text_stops_it_wherever_tokens_end(text: str, data: st.DataObject) -> None:
    """The same, with stop strings that do come."""
    start = data.draw(st.integers(0, len(text) - 1))
    stop = (text[start : data.draw(st.integers(start + 1, len(text)))],)
    for name in ("bytes", "merged bytes"):
        tokens = TOKENIZERS[name].encode(text, add_special_tokens=False)
        found, _, stopped = told(TOKENIZERS[name], stop, tokens)
        assert stopped
        assert found == text[: text.find(stop[0])]


@given(text=st.text(LETTERS, max_size=12), data=st.data())
def test_text_that_begins_no_stop_string_is_told_at_once(text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS["bytes"]
    stop = tuple(data.draw(st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=2)))
    writer, found, taken = Writer(tokenizer, stop), "", []
    for token in tokenizer.encode(text, add_special_tokens=False):
        found += writer.push(token)
        taken.append(token)
        now = whole(tokenizer, taken)
        if writer.stopped or now.endswith("\ufffd"):
            continue
        tails = [now[place:] for place in range(len(now) + 1)]
        held = next(tail for tail in tails if not tail or any(s.startswith(tail) for s in stop))
        assert found + held == now


def test_what_only_began_a_stop_string_is_told_at_the_end() -> None:
    tokenizer = TOKENIZERS["bytes"]
    writer = Writer(tokenizer, ("the end", "es"))
    parts = [writer.push(token) for token in tokenizer.encode("see the en")]
    assert "".join(parts) == "see "
    assert not writer.stopped
    assert writer.finish() == "the en"


def test_an_unfinished_character_is_told_at_the_end_behind_what_was_held_back() -> None:
    tokenizer = TOKENIZERS["bytes"]
    tokens = [*tokenizer.encode("e"), *tokenizer.convert_tokens_to_ids([_symbol(0xE2)])]
    assert told(tokenizer, ("en",), tokens) == ("e\ufffd", tokens, False)
    assert told(tokenizer, ("e\ufffd",), tokens) == ("", tokens, True)


def test_nothing_is_told_after_a_stop_string() -> None:
    tokenizer = TOKENIZERS["bytes"]
    writer = Writer(tokenizer, ("b",))
    assert "".join(writer.push(token) for token in tokenizer.encode("abcab")) == "a"
    assert writer.stopped
    assert writer.finish() == ""


def test_of_stop_strings_that_one_token_brings_the_earliest_start_cuts() -> None:
    tokenizer = TOKENIZERS["bytes"]
    the = tokenizer.convert_tokens_to_ids("the")
    assert told(tokenizer, ("he", "th"), [the])[0] == ""
    assert told(tokenizer, ("e", "he"), [the])[0] == "t"


def test_special_tokens_are_no_text_and_do_not_take_the_space_of_the_next_word() -> None:
    tokenizer = TOKENIZERS["spaces"]
    a, b = (tokenizer.convert_tokens_to_ids(piece) for piece in ("\u2581a", "\u2581b"))
    assert told(tokenizer, (), [a, BOS, b, EOS])[0] == "a b"
    # One that the tokenizer names nowhere, and inside a character.
    tokenizer = TOKENIZERS["merged bytes"]
    e_acute = tokenizer.convert_tokens_to_ids([_symbol(0xC3), _symbol(0xA9)])
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    assert told(tokenizer, (), [e_acute[0], tool, e_acute[1]])[0] == "\u00e9"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(Refused, match="stop string is empty"):
        Writer(TOKENIZERS["bytes"], ("a", ""))


def test_a_token_costs_no_more_at_the_end_of_a_long_text() -> None:
    """Counted in tokens that are decoded, since a clock would tell of other things too."""
    tokenizer, decoded = TOKENIZERS["bytes"], []

    class Counting:
        all_special_ids = tokenizer.all_special_ids
        added_tokens_decoder = tokenizer.added_tokens_decoder

        def decode(self, tokens: list[int]) -> str:
            decoded.append(len(tokens))
            return tokenizer.decode(tokens)

    writer = Writer(Counting(), ("zz",))
    for token in tokenizer.encode("ab\u20ac z" * 400):
        writer.push(token)
    assert max(decoded) <= 6
