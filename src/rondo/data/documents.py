"""What a record says: the text of a document, and which of it a training may count."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rondo.config import DataConfig
from rondo.data.sources import Record, file_hash, fingerprint, parse_source, records
from rondo.errors import UserError

PAIRS = (("prompt", "answer"), ("prompt", "completion"), ("question", "answer"))


@dataclass(frozen=True)
class Documents:
    """A named set of texts.

    Attributes:
        name: A sample's name, the NAME of NAME=PATH, or the file's stem.
        path: Where it was read.
        sha256: Hash of the file.
        texts: The documents.
    """

    name: str
    path: str
    sha256: str
    texts: tuple[str, ...]


def read_documents(spec: str) -> Documents:
    """Read a whole source, a field `text` or `question` and `answer` of its records.

    Raises:
        UserError: There is no such text, or it cannot be read.
    """
    source = parse_source(spec)
    texts = tuple(text_of(record, "text") for record in records(source, "text"))
    if not texts:
        raise UserError(f"{source.path} holds no text")
    return Documents(source.name, source.path, fingerprint(source, file_hash), texts)


class Document(NamedTuple):
    """A text and, unless all of it counts, the spans of characters that do."""

    text: str
    counted: list[tuple[int, int]] | None


def render(record: Record, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Make a document of a record.

    Raises:
        UserError: The record lacks the fields, or they do not fit the chat template.
    """
    answers = config.loss_on == "answers"
    if config.format == "chat":
        return _chat(record, tokenizer, answers)
    if not answers:
        return Document(text_of(record, config.field), None)
    if (pair := _pair(record, PAIRS[-1:])) is None:
        raise UserError(
            f"{record.where} has no `question` and `answer`, so data.loss_on answers finds "
            "nothing to count"
        )
    text, start = _question_and_answer(*pair)
    return Document(text, [(start, len(text))])


def text_of(record: Record, field: str) -> str:
    """Return the text of a record that is no chat.

    Raises:
        UserError: It has none.
    """
    if isinstance(text := record.fields.get(field), str):
        return text
    if pair := _pair(record, PAIRS[-1:]):
        return _question_and_answer(*pair)[0]
    raise UserError(f"{record.where} has neither `{field}` nor `question` and `answer`")


def _question_and_answer(question: str, answer: str) -> tuple[str, int]:
    """Return the text and where the answer begins, its space included."""
    prompt = f"Question: {question}\nAnswer:"
    return f"{prompt} {answer}", len(prompt)


def _pair(record: Record, names: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    for pair in names:
        first, second = (record.fields.get(name) for name in pair)
        if isinstance(first, str | int | float) and isinstance(second, str | int | float):
            return str(first), str(second)
    return None


def _chat(record: Record, tokenizer: PreTrainedTokenizerBase, answers: bool) -> Document:
    messages = _messages(record)

    def shown(count: int, prompt: bool = False) -> str:
        template: Any = tokenizer.apply_chat_template
        return template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    spans: list[tuple[int, int]] = []
    try:
        text = shown(len(messages))
        for number, message in enumerate(messages if answers else ()):
            if message["role"] == "assistant":
                before, after = shown(number, prompt=True), shown(number + 1)
                if not (text.startswith(after) and after.startswith(before)):
                    raise UserError(
                        "the chat template cannot be used with data.loss_on answers: it shows "
                        f"a turn otherwise where more follow ({record.where})"
                    )
                spans.append((len(before), len(after)))
    except (TemplateError, TypeError) as error:
        raise UserError(f"{record.where} does not fit the chat template: {error}") from error
    # The separator that follows every document is the end of the last turn.
    end = str(tokenizer.eos_token)
    if text.rstrip().endswith(end):
        text = text.rstrip().removesuffix(end)
    return Document(text, spans if answers else None)


def _messages(record: Record) -> list[dict[str, Any]]:
    messages: Any = record.fields.get("messages")
    if messages is None and (pair := _pair(record, PAIRS)):
        messages = [
            {"role": role, "content": content}
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
    whole = isinstance(messages, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
    )
    if not messages or not whole:
        raise UserError(
            f"{record.where} has neither `messages`, each with role and content, nor a `prompt` "
            "or `question` with its `answer` or `completion`"
        )
    return messages
