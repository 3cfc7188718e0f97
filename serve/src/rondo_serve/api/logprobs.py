"""Tokens as probabilities name them: their texts and bytes, and which of them an answer holds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rondo_serve.api.replies import ChatLogprob, ChatLogprobs, TextLogprobs, TopLogprob
from rondo_serve.requests import Finished, Token
from rondo_serve.text import special_tokens

# JSON has no infinity: what other servers say of a token that cannot come.
LEAST_LOGPROB = -9999.0
# How SentencePiece writes a byte that has no piece.
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Speller:
    """The texts and bytes of single tokens.

    Args:
        tokenizer: Whose tokens they are.

    Attributes:
        special: Tokens that are no text.
    """

    def __init__(self, tokenizer: Any):
        self.special = special_tokens(tokenizer)
        self._tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._by_letter: dict[str, int] = {}
        if isinstance(decoder, decoders.ByteLevel):
            self._by_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}

    def text(self, token: int) -> str:
        """Return the text of a token by itself."""
        return self._tokenizer.decode([token])

    def bytes(self, token: int) -> list[int] | None:
        """Return the bytes of a token, None where the tokenizer does not tell them."""
        text = self.text(token)
        return list(text.encode()) if "\ufffd" not in text else self._part(token)

    def name(self, token: int) -> str:
        r"""Return a text that tells parts of characters from each other: `bytes:\xe2`."""
        text = self.text(token)
        if "\ufffd" not in text or (found := self._part(token)) is None:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _part(self, token: int) -> list[int] | None:
        """Return the bytes of a token that is a part of a character."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if found := BYTE.fullmatch(piece):
            return [int(found[1], 16)]
        if self._by_letter and all(letter in self._by_letter for letter in piece):
            return [self._by_letter[letter] for letter in piece]
        return None


@dataclass
class Held:
    """Holds tokens back until there is text of them: those that end a text never are told.

    Attributes:
        waiting: Tokens whose text may still come.
        last: The last token.
    """

    waiting: list[Token] = field(default_factory=list)
    last: Token | None = None

    def push(
        self, tokens: Sequence[Token], special: frozenset[int], end: Finished | None = None
    ) -> list[Token]:
        """Return the tokens that the text holds now for certain.

        Args:
            tokens: The new ones.
            special: Tokens that are no text.
            end: The end, where it has come.
        """
        told: list[Token] = []
        for token in tokens:
            self.last = token
            if token.token in special:
                continue
            self.waiting.append(token)
            if token.text:
                told += self.waiting
                self.waiting = []
        if end is None:
            return told
        # The token that ended the text has none, and stands last.
        if end.reason == "stop" and self.waiting and self.waiting[-1] is self.last:
            self.waiting.pop()
        # Nothing is told at the end where a stop string cut it off.
        return told + self.waiting if end.text else told


def of_chat(tokens: Sequence[Token], speller: Speller) -> ChatLogprobs | None:
    """Return the probabilities of tokens, as conversations tell them, None where there are none."""
    told = [token for token in tokens if token.logprob is not None]
    if not told:
        return None

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": speller.text(token),
            "logprob": finite(logprob),
            "bytes": speller.bytes(token),
        }

    content = [
        ChatLogprob(
            **one(token.token, token.logprob),
            top_logprobs=[TopLogprob(**one(*other)) for other in token.top],
        )
        for token in told
    ]
    return ChatLogprobs(content=content, refusal=None)


def of_text(tokens: Sequence[Token], offset: int, speller: Speller) -> TextLogprobs | None:
    """Return the probabilities of tokens, as completions tell them, None where there are none.

    Args:
        tokens: The tokens.
        offset: Characters before the first.
        speller: Their texts.
    """
    told = [token for token in tokens if token.logprob is not None]
    if not told:
        return None
    offsets = []
    for token in told:
        offsets.append(offset)
        offset += len(token.text)
    return TextLogprobs(
        tokens=[speller.name(token.token) for token in told],
        token_logprobs=[finite(token.logprob) for token in told],
        top_logprobs=[
            {speller.name(other): finite(logprob) for other, logprob in token.top} for token in told
        ],
        text_offset=offsets,
    )


def finite(logprob: float | None) -> float:
    """Return a logarithm that JSON can hold."""
    return LEAST_LOGPROB if logprob is None or not logprob > LEAST_LOGPROB else logprob
