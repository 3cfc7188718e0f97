"""Loss on held-out texts, or on the answers in them alone, at every depth."""

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from rondo.config import DataConfig, EvalConfig
from rondo.data import encode, parse_source, records, text_of, tokenise
from rondo.errors import UserError
from rondo.evaluation.ledger import Ledger
from rondo.evaluation.outcome import Lengths, Outcome, Score, finite, ratio, ratio_stderr
from rondo.evaluation.subject import Passage, Subject
from rondo.evaluation.tasks import TextTask

DOCUMENTS = 100


class Text(NamedTuple):
    """A text as passages, and what is said of it in results.json."""

    described: dict[str, Any]
    passages: list[Passage]


def read_text(task: TextTask, subject: Subject, config: EvalConfig) -> Text:
    """Read a text and cut it into the passages to measure.

    Raises:
        UserError: It cannot be read, or holds nothing to predict.
    """
    tokenizer, source = subject.tokenizer, parse_source(task.spec)
    # Of a text a part says as much; a task is measured whole.
    limit = config.limit or (None if task.answers else DOCUMENTS)
    found = islice(records(source, "text"), limit)
    length = min(config.seq_len, subject.max_length)
    if task.answers:
        settings = DataConfig(sources=(task.spec,), loss_on="answers")
        # Without the separator, which says nothing of the answer.
        whole = [
            Passage(one.ids[:-1], (one.counted or []).index(True))
            for one in tokenise(found, settings, tokenizer)
        ]
        passages = [_ending(one, length) for one in whole]
    else:
        whole = [Passage(encode(tokenizer, text_of(one, "text")), 1) for one in found]
        passages = [Passage(one.ids[:length], 1) for one in whole]
    cut = sum(len(one.ids) > length for one in whole)
    passages = [one for one in passages if len(one.ids) > one.start]
    if not passages:
        raise UserError(f"{source.path} holds no document of two tokens or more")
    predicted = sum(len(one.ids) - one.start for one in passages)
    decode: Any = tokenizer.decode
    content = json.dumps([[one.ids, one.start] for one in passages])
    described = {
        "kind": "loss",
        "metric": "loss",
        "higher_is_better": False,
        "chance": None,
        "source": source.path,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "items": len(passages),
        "num_fewshot": 0,
        "suite": task.suite,
        "truncated": cut,
        "tokens": predicted,
        # The first token has nothing before it and is not predicted.
        "bytes": sum(len(decode(one.ids[one.start :]).encode()) for one in passages),
    }
    return Text(described, passages)


def _ending(passage: Passage, length: int) -> Passage:
    """Cut a passage to a length, before what is to be predicted as long as that is enough."""
    spare = min(max(0, len(passage.ids) - length), max(0, passage.start - 1))
    return Passage(passage.ids[spare:][:length], max(1, passage.start - spare))


def measure_text(
    subject: Subject, task: TextTask, text: Text, ledger: Ledger, config: EvalConfig, seed: int
) -> Outcome:
    """Measure one text at every depth."""
    described, passages = text
    # Passages of like length share a batch, the longest first: what memory lacks shows at once.
    order = sorted(range(len(passages)), key=lambda index: -len(passages[index].ids))
    batches = [
        order[start : start + config.batch_size]
        for start in range(0, len(order), config.batch_size)
    ]

    def work(batch: list[int]) -> list[list[float | None]]:
        predictions = subject.predict([passages[index] for index in batch], seed)
        return [[finite(-one.logprob) for one in by_depth] for by_depth in predictions]

    def key(batch: list[int]) -> Any:
        return [str(subject.directory), seed, [passages[index] for index in batch]]

    found, seconds = ledger.run(task.name, batches, key, work)
    sums: dict[int, list[float | None]] = {r: [None] * len(passages) for r in subject.recurrences}
    for batch, losses in zip(batches, found, strict=True):
        for index, by_depth in zip(batch, losses, strict=True):
            for depth, loss in zip(subject.recurrences, by_depth, strict=True):
                sums[depth][index] = loss
    weights = [len(one.ids) - one.start for one in passages]
    num_tokens = sum(len(one.ids) for one in passages)
    scores = {r: Score(ratio(sums[r], weights), ratio_stderr(sums[r], weights)) for r in sums}
    return Outcome(
        name=task.name,
        described=described,
        scores={"loss": scores},
        items={"weights": weights, "values": {str(r): values for r, values in sums.items()}},
        samples=[],
        seconds=seconds,
        lengths=dict.fromkeys(subject.recurrences, Lengths(1.0, num_tokens / len(passages), 0.0)),
    )


def bits_per_byte(value: float | None, described: dict[str, Any]) -> float | None:
    """Return a loss in nats per token in the unit that tokenizers share."""
    if value is None:
        return None
    return value * described["tokens"] / math.log(2) / described["bytes"]


def first_tokens(texts: Sequence[Text], num_tokens: int, batch_len: int = 256) -> list[list[int]]:
    """Return so many tokens of the beginnings of documents, no more than `batch_len` of each."""
    found, left = [], num_tokens
    for text in texts:
        for passage in text.passages:
            ids = passage.ids[: min(batch_len, left)]
            if len(ids) < 2:
                break
            found.append(ids)
            left -= len(ids)
    return found
