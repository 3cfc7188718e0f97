"""Talk to a model in the terminal: depth per token in colour, and what each answer cost.

What was read stays in the cache between turns. Under a policy that lets later tokens go deeper
than earlier ones, so it does when the depth changes; under `full`, whose tokens stand at the depth
they were read at, another depth or exit starts anew.
"""

import contextlib
import importlib
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from rondo.config import ChatConfig
from rondo.data import common_length, encode, load_tokenizer
from rondo.decoding import Decoding
from rondo.errors import UserError
from rondo.generation import (
    Asked,
    Session,
    decode,
    open_session,
    plan_of,
    shape_of,
    summary,
    token_printer,
)
from rondo.memory import check_memory, free_memory
from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.terminal import dim, has_colour, legend, runs

HELP = """\
/depth N                   iterations of every token, or the cap of an exit
/exit RULE [THRESHOLD|%]   let tokens leave: kl, entropy, margin, argmax_stable, state_distance,
                           gate; with the checkpoint's threshold unless one is given
/exit off                  all tokens take the depth
/draft N, auto or off      draft tokens at a shallower depth and verify them
/reset                     forget the conversation
/quit                      leave, as Ctrl-D does; Ctrl-C stops an answer"""
NO_EXIT: dict[str, Any] = dict.fromkeys(
    ("exit", "threshold", "tolerance", "min_recurrences", "max_recurrences", "check_every")
)
# What is told at the start must fit; a conversation grows, and is asked about again.
FIRST_PROMPT = 64


def changed(config: ChatConfig, line: str) -> ChatConfig:
    """Return the settings after a command that changes some.

    Raises:
        UserError: There is no such command, or what it says does not go.
    """
    verb, *words = line.split()
    match verb, words:
        case "/depth", [depth]:
            new: dict[str, Any] = {"recurrences": depth, "max_recurrences": None}
        case "/exit", ["off"]:
            new = NO_EXIT | {"recurrences": config.recurrences or config.max_recurrences}
        case "/exit", [rule]:
            new = {"exit": rule, "threshold": None, "tolerance": None}
        case "/exit", [rule, share] if share.endswith("%"):
            new = {"exit": rule, "threshold": None, "tolerance": share}
        case "/exit", [rule, threshold]:
            new = {"exit": rule, "threshold": threshold, "tolerance": None}
        case "/draft", ["off"]:
            new = {"draft": None, "draft_tokens": None}
        case "/draft", [depth]:
            new = {"draft": depth if depth == "auto" else whole_number(depth)}
        case _:
            raise UserError(f"{line} is no command: /help lists them")
    return ChatConfig(**(config.model_dump() | new))


def whole_number(text: str) -> int:
    """Read a number.

    Raises:
        UserError: It is none.
    """
    if not text.isdecimal():
        raise UserError(f"a whole number is needed, not {text}")
    return int(text)


def chat_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Return a conversation as tokens, up to where the model is to answer.

    Without a chat template it is a text, a line for each message, that the model continues.
    """
    if tokenizer.chat_template is None:
        return encode(tokenizer, "".join(f"{one['content']}\n" for one in messages))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A chat template writes the beginning of the text itself.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Interruption:
    """Makes Ctrl-C a criterion that stops a generation; a second one breaks it off."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, ids: torch.Tensor, scores: Any) -> torch.Tensor:
        """Return for each row (B,) whether to stop."""
        return torch.full((len(ids),), self.wanted, device=ids.device)

    def __enter__(self) -> "Interruption":
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


@dataclass
class Chat:
    """A conversation."""

    session: Session
    shape: RecurrentConfig
    config: ChatConfig
    out: TextIO
    colour: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    cache: RecurrentCache | None = None
    read: list[int] = field(default_factory=list)
    """Tokens that the cache holds."""
    going: bool = True
    _key: Any = None

    @property
    def decoding(self) -> Decoding:
        """How tokens are made as things stand."""
        return chat_decoding(self.config, self.shape)

    def hear(self, line: str) -> None:
        """Obey a command, or answer."""
        try:
            self._obey(line) if line.startswith("/") else self._answer(line)
        except UserError as error:
            self._say(str(error))
        except KeyboardInterrupt:
            # Broken off in the middle of a pass: what the cache holds is not whole.
            self._forget_cache()
            self._say("\nbroken off")

    def show_legend(self) -> None:
        """Print what the colours mean, where tokens differ and there are any."""
        if self.colour and self.decoding.exit is not None:
            self.out.write(f"{legend(self.decoding.cap)}\n")

    def _obey(self, line: str) -> None:
        match line.strip():
            case "/help":
                self._say(HELP)
            case "/quit":
                self.going = False
            case "/reset":
                self.messages.clear()
                self._forget_cache()
                self._say("forgotten")
            case command:
                new = changed(self.config, command)
                decoding = chat_decoding(new, self.shape)
                self.config = new
                self._say(in_words(decoding))
                self.show_legend()

    def _answer(self, text: str) -> None:
        if not text.strip():
            return
        decoding, session = self.decoding, self.session
        system = [{"role": "system", "content": self.config.system}] if self.config.system else []
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = chat_tokens(session.tokenizer, [*system, *messages])
        if (room := self.shape.max_position_embeddings - len(prompt)) < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens and the model takes "
                f"{self.shape.max_position_embeddings}: /reset begins another"
            )
        new = min(self.config.max_new_tokens, room)
        cache = self._cache_for(decoding, prompt)
        free = free_memory(session.model.device)
        free = None if free is None else free + cache.nbytes
        check_memory(session.holder, decoding.request(len(prompt), new), free)
        shown = self.colour and decoding.exit is not None
        printer = token_printer(session, decoding, cache, len(prompt), shown, self.out)
        with Interruption() as stopping:
            (found,) = decode(session, decoding, prompt, cache, new, printer, stopping)
        self.read = [*prompt, *found.tokens][: cache.length]
        (told,) = Asked(session, decoding, prompt).answers([found])
        self.messages = [*messages, {"role": "assistant", "content": told["text"]}]
        self.out.write("\n")
        if decoding.exit is not None and not self.colour:
            self._say(f"iterations: {runs(found.recurrences)}")
        stopped = "; stopped" if stopping.wanted else ""
        self._say(summary(told) + stopped)

    def _cache_for(self, decoding: Decoding, prompt: list[int]) -> RecurrentCache:
        """Return the cache cut to what the prompt begins with, or a new one."""
        policy = decoding.policy
        assert policy is not None
        key = (policy, decoding.cap, decoding.exit) if policy.startswith("full") else policy
        # At least one token must be read to go on from.
        kept = min(common_length(self.read, prompt), len(prompt) - 1)
        if self.cache is None or key != self._key or not kept:
            self.cache, self._key = RecurrentCache(self.shape, policy), key
        else:
            self.cache.forget(self.cache.length - kept)
            self.cache.num_checks = 0
        return self.cache

    def _forget_cache(self) -> None:
        self.cache, self.read = None, []

    def _say(self, text: str) -> None:
        self.out.write(dim(text, self.colour) + "\n")


def chat_decoding(config: ChatConfig, shape: RecurrentConfig) -> Decoding:
    """Return how a chat makes tokens: by a cache that may go deeper later unless told otherwise.

    Raises:
        UserError: Settings and checkpoint do not go together.
    """
    depths = None if config.recurrences is None else (config.recurrences,)
    decoding = plan_of(config, shape, depths)
    return decoding if decoding.exit else replace(decoding, policy=config.cache or "ragged")


def in_words(decoding: Decoding) -> str:
    """Return how tokens are made, in one line."""
    text = f"depth {decoding.cap}"
    if (rule := decoding.exit) is not None:
        text = f"up to {decoding.cap} iterations, exit {rule.criterion} below {rule.threshold:g}"
    if (draft := decoding.config.draft) is not None:
        text += f", drafts at {'a chosen depth' if draft == 'auto' else f'depth {draft}'}"
    return f"{text}, cache {decoding.policy}"


def open_chat(config: ChatConfig, out: TextIO, colour: bool) -> Chat:
    """Load the model of a chat.

    Raises:
        UserError: It does not fit the settings or the memory.
    """
    shape = shape_of(config.model)
    decoding = chat_decoding(config, shape)
    tokenizer = load_tokenizer(Path(config.model))
    request = decoding.request(FIRST_PROMPT, config.max_new_tokens)
    return Chat(open_session(config, shape, tokenizer, request), shape, config, out, colour)


def run(config: ChatConfig) -> None:
    """Run `rondo chat`.

    Raises:
        UserError: The model does not fit the settings or the memory.
    """
    colour = has_colour(sys.stdout, os.environ)
    chat = open_chat(config, sys.stdout, colour)
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() a history
    print(f"{Path(config.model).name}: {in_words(chat.decoding)}; /help lists the commands")
    chat.show_legend()
    while chat.going:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")
            continue
        chat.hear(line)
