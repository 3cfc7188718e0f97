"""The terminal: colours, characters of several tokens, commands, and turns that share a cache."""

import io
import signal
from typing import Any

import pytest
import torch

from conftest import EOS, byte_tokenizer, recurrent
from rondo import chat as chatting
from rondo.chat import Chat, Interruption, changed, chat_decoding, chat_tokens
from rondo.config import ChatConfig
from rondo.data import common_length
from rondo.flops import costs_of
from rondo.generation import Session, decode
from rondo.memory import Holder
from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.terminal import SCALE, Pieces, TokenPrinter, has_colour, legend, paint, painted, runs

TOKENIZER = byte_tokenizer()
MODEL = recurrent("llama", layers=range(3), sizes=(1, 1, 1), num_recurrences=4)


def start(**fields: Any) -> Chat:
    """A chat with a tiny model, without colour."""
    settings = {"model": "tiny", "max_new_tokens": 6} | fields
    costs = costs_of(MODEL)
    holder = Holder.of(costs, MODEL.config, torch.float32, int8=False, loaded=True)
    session = Session(MODEL, TOKENIZER, costs, frozenset({EOS}), holder)
    return Chat(session, MODEL.config, ChatConfig(**settings), io.StringIO(), False)


def heard(chat: Chat, line: str) -> str:
    """What a chat prints after a line."""
    chat.out = io.StringIO()
    chat.hear(line)
    return chat.out.getvalue()


def anew(chat: Chat, messages: list[dict[str, str]]) -> list[int]:
    """The answer to a conversation of which nothing is cached."""
    decoding = chat_decoding(chat.config, chat.shape)
    prompt = chat_tokens(TOKENIZER, messages)
    cache = RecurrentCache(chat.shape, str(decoding.policy))
    (found,) = decode(chat.session, decoding, prompt, cache, chat.config.max_new_tokens)
    return found.tokens


# ---- colours


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_that_do_not_refuse_it() -> None:
    assert has_colour(Terminal(), {})
    assert has_colour(Terminal(), {"NO_COLOR": ""})
    assert not has_colour(Terminal(), {"NO_COLOR": "1"})
    assert not has_colour(io.StringIO(), {})


def test_the_deepest_and_the_shallowest_have_the_ends_of_the_scale() -> None:
    for cap in (2, 5, 8, 32):
        assert paint("a", 1, cap).startswith(f"\x1b[48;5;{SCALE[0][0]};")
        assert paint("a", cap, cap).startswith(f"\x1b[48;5;{SCALE[-1][0]};")
    assert paint("a", 1, 1).startswith(f"\x1b[48;5;{SCALE[0][0]};")


def test_the_ground_does_not_run_over_the_end_of_a_line() -> None:
    painted_text = paint("a\n\nb", 1, 4)
    first, middle, last = painted_text.split("\n")
    assert first.endswith("\x1b[0m")
    assert last.endswith("\x1b[0m")
    assert middle == ""


def test_the_legend_names_every_depth_once() -> None:
    assert [f" {depth} " in legend(4) for depth in (1, 2, 3, 4)] == [True] * 4
    assert legend(32).count("-") == len(SCALE)
    assert legend(1).count("\x1b[48") == 1


def test_runs_of_equal_depths_are_told_together() -> None:
    assert runs([3, 1, 1, 1, 2]) == "3, 1 x3, 2"
    assert runs([]) == ""


# ---- characters


@pytest.mark.parametrize("text", ["the plain one", "na\u00efve \u20ac", "\u65e5\u672c \U0001f600!"])
def test_no_piece_of_a_character_is_printed(text: str) -> None:
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(TOKENIZER)
    told = [pieces.push(token) for token in tokens]
    assert "\ufffd" not in "".join(told)
    assert "".join(told) + pieces.rest() == text


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    broken = TOKENIZER("\u20ac", add_special_tokens=False)["input_ids"][:2]
    pieces = Pieces(TOKENIZER)
    assert [pieces.push(token) for token in broken] == ["", ""]
    assert "\ufffd" in pieces.rest()


def test_a_printer_leaves_out_the_prompt_and_the_end() -> None:
    out, asked = io.StringIO(), []
    ids = TOKENIZER("ab\u20acc", add_special_tokens=False)["input_ids"]
    printer = TokenPrinter(TOKENIZER, {EOS}, lambda n: asked.append(n) or 2, 4, out, True)
    printer.put(torch.tensor([ids]))
    for token in (*ids, EOS):
        printer.put(torch.tensor([token]))
    printer.end()
    assert out.getvalue() == "".join(paint(text, 2, 4) for text in ("a", "b", "\u20ac", "c"))
    assert asked == [0, 1, 4, 5]


def test_what_is_left_of_a_character_has_the_colour_of_the_last_token() -> None:
    out, asked = io.StringIO(), []
    broken = TOKENIZER("a\u20ac", add_special_tokens=False)["input_ids"][:-1]
    printer = TokenPrinter(TOKENIZER, {EOS}, lambda n: asked.append(n) or n + 1, 4, out, True)
    for token in broken:
        printer.put(torch.tensor([token]))
    printer.end()
    assert asked == [0, 2]
    assert out.getvalue() == painted(TOKENIZER, broken, [1, 2, 3], 4)


def test_painted_text_has_the_colour_of_each_token() -> None:
    ids = TOKENIZER("ab", add_special_tokens=False)["input_ids"]
    assert painted(TOKENIZER, ids, [1, 4], 4) == paint("a", 1, 4) + paint("b", 4, 4)


# ---- commands


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("/depth 2", {"recurrences": 2}),
        ("/exit kl", {"exit": "kl", "threshold": None}),
        ("/exit kl 5e-4", {"exit": "kl", "threshold": 5e-4}),
        ("/exit kl 0.5%", {"exit": "kl", "tolerance": "0.5%"}),
        ("/exit off", {"exit": None}),
        ("/draft 2", {"draft": 2}),
        ("/draft auto", {"draft": "auto"}),
        ("/draft off", {"draft": None, "draft_tokens": None}),
    ],
)
def test_a_command_changes_its_settings_and_no_others(line: str, fields: dict[str, Any]) -> None:
    config = ChatConfig(model="m", recurrences=3, max_new_tokens=5)
    assert changed(config, line) == config.model_copy(update=fields)


def test_an_exit_that_ends_leaves_its_cap_as_the_depth() -> None:
    config = ChatConfig(model="m", exit="kl", threshold=1.0, max_recurrences=6, check_every=2)
    assert changed(config, "/exit off") == ChatConfig(model="m", recurrences=6)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/depth", "no command"),
        ("/depth x", "integer"),
        ("/depth 0", "greater"),
        ("/depth 65", "cap of 64"),
        ("/exit nothing 1", "exit"),
        ("/exit kl", "no calibrated kl"),
        ("/exit gate 0.1", "no exit gate"),
        ("/draft 9", "beyond it"),
        ("/draft x", "whole number"),
        ("/quite", "/help"),
    ],
)
def test_a_command_that_does_not_go_changes_nothing(line: str, told: str) -> None:
    chat = start()
    before = chat.config
    text = heard(chat, line)
    assert told in text
    assert len(text.strip().splitlines()) == 1
    assert chat.config is before
    assert chat.going


def test_help_and_quit() -> None:
    chat = start()
    assert "/depth" in heard(chat, "/help")
    heard(chat, "/quit")
    assert not chat.going


# ---- turns


def test_two_lists_are_alike_up_to_where_they_differ() -> None:
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 4]) == 2
    assert common_length([], [1]) == 0


@pytest.mark.parametrize("policy", ["full", "ragged"])
@pytest.mark.parametrize("draft", [None, 1])
def test_a_cache_kept_between_turns_changes_no_answer(policy: str, draft: int | None) -> None:
    chat = start(cache=policy, draft=draft)
    heard(chat, "the inner one")
    kept = chat.cache
    heard(chat, "another")
    assert chat.cache is kept is not None
    assert chat.messages[-1]["content"] == TOKENIZER.decode(
        [token for token in anew(chat, chat.messages[:-1]) if token != EOS]
    )


def test_a_turn_reads_only_what_the_one_before_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, counts, begin = start(), [], RecurrentCache.begin

    def noted(cache: RecurrentCache, shape: Any, *more: Any) -> None:
        counts.append(shape[1])
        begin(cache, shape, *more)

    monkeypatch.setattr(RecurrentCache, "begin", noted)
    heard(chat, "the inner one")
    before, turn = list(chat.read), len(counts)
    heard(chat, "another")
    prompt = chat_tokens(TOKENIZER, chat.messages[:-1])
    assert counts[turn] == len(prompt) - common_length(before, prompt) < len(prompt) - 5


def test_under_full_another_depth_starts_anew_and_under_ragged_it_goes_on() -> None:
    for policy, same in (("full", False), ("ragged", True)):
        chat = start(cache=policy, recurrences=2)
        heard(chat, "the inner one")
        kept = chat.cache
        heard(chat, "/depth 4")
        heard(chat, "another")
        assert (chat.cache is kept) == same
        assert chat.cache is not None
        depths = set(chat.cache.recurrences[0].tolist())
        assert depths == ({2, 4} if same else {4})
        if not same:
            told = TOKENIZER.decode([t for t in anew(chat, chat.messages[:-1]) if t != EOS])
            assert chat.messages[-1]["content"] == told


def test_reset_forgets_what_was_said() -> None:
    chat = start()
    first = heard(chat, "the inner one").splitlines()[0]
    heard(chat, "another")
    heard(chat, "/reset")
    assert chat.messages == []
    assert heard(chat, "the inner one").splitlines()[0] == first


def test_iterations_are_listed_where_there_is_no_colour() -> None:
    chat = start(exit="state_distance", threshold=1e9, max_recurrences=4)
    assert "\niterations: 1" in heard(chat, "the inner one")
    assert "mean 1.0 of 4 iterations" in heard(chat, "another")


def test_tokens_are_coloured_where_they_may_differ() -> None:
    chat = start()
    chat.colour = True
    assert "\x1b[48" not in heard(chat, "the inner one")
    assert "\x1b[48" not in heard(chat, "/depth 4")
    assert legend(4) in heard(chat, "/exit state_distance 1e9")
    assert f"\x1b[48;5;{SCALE[0][0]};" in heard(chat, "another")


def test_a_conversation_that_is_too_long_is_not_answered() -> None:
    chat = start()
    assert "/reset" in heard(chat, "a " * 200)
    assert chat.messages == []


def test_an_answer_takes_no_more_than_the_room_that_is_left() -> None:
    chat = start(max_new_tokens=64)
    heard(chat, "a" * 250)
    assert chat.cache is not None
    assert chat.cache.length < 256


# ---- Ctrl-C


class Pressing(io.StringIO):
    """Presses Ctrl-C when a third piece is printed."""

    count = 0

    def write(self, text: str) -> int:
        self.count += 1
        if self.count == 3:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    chat = start(max_new_tokens=40, seed=1)
    chat.out = Pressing()
    chat.hear("the inner one")
    assert chat.out.getvalue().endswith("; stopped\n")
    assert chat.cache is not None
    assert len(chat.read) == chat.cache.length < 14 + 10
    assert chat.going
    assert "iterations" in heard(chat, "another")


def test_a_second_ctrl_c_breaks_it_off_and_the_first_one_after_is_a_new_one() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping(torch.zeros(2, 3), None).tolist() == [True, True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_was_broken_off_is_not_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = start()
    heard(chat, "the inner one")

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chatting, "decode", broken)
        assert "broken off" in heard(chat, "another")
    assert chat.cache is None
    assert len(chat.messages) == 2
    assert "iterations" in heard(chat, "another")
