"""`rondo audit replay`: answers a recorded request again, and compares the tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rondo.chat import chat_tokens
from rondo.data import encode
from rondo.errors import ProofError, UserError
from rondo.modeling.exits_recurrent import ExitRule
from rondo_govern.audit.reading import read
from rondo_govern.audit.records import digest_of
from rondo_govern.settings import AuditReplayConfig
from rondo_serve.config import ServeConfig
from rondo_serve.engine.opening import Opened, open_engine
from rondo_serve.governed import fingerprint
from rondo_serve.requests import Ask, Event, Finished, Sampling, Token


@dataclass(frozen=True)
class Recorded:
    """What a log tells of an answer.

    Attributes:
        opened: Of the server that gave it.
        taken: Of its request.
        ended: Of the answer.
    """

    opened: dict[str, Any]
    taken: dict[str, Any]
    ended: dict[str, Any]


def run(config: AuditReplayConfig) -> None:
    """Replay a record, and tell whether the tokens are the same.

    Raises:
        UserError: There is no such record, or model and prompt are not those of the record.
        ProofError: The tokens differ.
    """
    found = find(Path(config.log), config.id)
    if fingerprint(Path(config.model)) != found.ended["model_sha256"]:
        raise UserError(
            f"{config.model} is not the model that answered: its files hash to another "
            f"model_sha256 than {found.ended['model_sha256'][:12]}"
        )
    if not found.ended["new_tokens"]:
        raise UserError(f"{config.id} has no token to compare: it ended as {found.ended['reason']}")
    opened = open_engine(settings_of(config, found))
    prompt = prompt_of(config, found, opened)
    tokens = answer(opened, ask_of(found, prompt))[: found.ended["new_tokens"]]
    compare(config.id, found, tokens)


def find(log: Path, id: str) -> Recorded:
    """Return what a log tells of an answer; all of it is verified on the way.

    Raises:
        UserError: It tells nothing of it, or is damaged.
    """
    opened: dict[str, Any] = {}
    found: Recorded | None = None
    taken: dict[str, Any] = {}
    for record in read(log):
        if record["kind"] == "opened":
            opened = record
        # A response's id stands for its first answer.
        elif record.get("id") in (id, f"{id}-0") and record["kind"] == "taken":
            taken = record
        elif taken and record.get("id") == taken["id"] and record["kind"] == "ended":
            found = Recorded(opened, taken, record)
    if found is None:
        raise UserError(f"there is no answer {id} in {log}" + (": it never ended" * bool(taken)))
    return found


def settings_of(config: AuditReplayConfig, found: Recorded) -> ServeConfig:
    """Return the settings of an engine that rounds as the one that answered."""
    return ServeConfig(
        model=config.model,
        dtype=found.opened["dtype"],
        weights=found.opened.get("weights"),
        device=config.device,
        max_running=1,
        prefix_cache=False,
    )


def prompt_of(config: AuditReplayConfig, found: Recorded, opened: Opened) -> tuple[int, ...]:
    """Return the tokens of the prompt, from the log or from a file.

    Raises:
        UserError: They are in neither, or are others than those that were answered.
    """
    if config.prompt is not None:
        tokens = tokens_in(Path(config.prompt), opened.tokenizer)
    elif (kept := found.taken.get("prompt")) is not None:
        tokens = kept
    else:
        raise UserError(
            f"{config.log} holds hashes only: give --prompt with the request's body, or log with "
            "--audit-texts"
        )
    if digest_of(tokens) != found.taken["prompt_sha256"]:
        raise UserError("the prompt is not the one that was answered: its tokens hash to another")
    return tuple(tokens)


def tokens_in(path: Path, tokenizer: Any) -> list[int]:
    """Return the prompt that a file holds, as tokens, or as the body of a request.

    Raises:
        UserError: It holds none.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the prompt {path}: {error}") from error
    match body:
        case list() if all(isinstance(token, int) for token in body):
            return body
        case {"messages": list(messages)}:
            return chat_tokens(tokenizer, messages)
        case {"prompt": str(text)}:
            return encode(tokenizer, text)
        case {"prompt": list(tokens)}:
            return tokens
    raise UserError(f"{path} holds neither a list of tokens nor the body of a request")


def ask_of(found: Recorded, prompt: tuple[int, ...]) -> Ask:
    """Return what was asked, at the depth and with the exit that were given."""
    told = found.ended["exit"]
    rule = None
    if told is not None:
        own = {name: told[name] for name in ("threshold", "min_recurrences", "check_every")}
        rule = ExitRule(told["rule"], **own)
    return Ask(
        id="replay",
        prompt=prompt,
        max_new_tokens=found.taken["max_new_tokens"],
        num_recurrences=found.ended["allowed"],
        exit=rule,
        sampling=Sampling(**found.taken["sampling"]),
        stop=tuple(found.taken["stop"]),
    )


def answer(opened: Opened, ask: Ask) -> list[int]:
    """Return the tokens that an engine answers with, the only one in its batch."""
    events: list[Event] = []
    opened.engine.submit(ask, events.append)
    while not any(isinstance(event, Finished) for event in events):
        opened.engine.tick()
    return [event.token for event in events if isinstance(event, Token)]


def compare(id: str, found: Recorded, tokens: list[int]) -> None:
    """Tell whether tokens are those of a record.

    Raises:
        ProofError: They are not.
    """
    told = f"{len(tokens)} tokens at depth {found.ended['allowed']}"
    if digest_of(tokens) == found.ended["output_sha256"]:
        print(f"{id}: the same {told}")
        return
    how = f"computed in {found.opened['dtype']} on {found.opened['device']}, maybe in other company"
    kept = found.ended.get("output")
    if kept is None:
        raise ProofError(f"{id}: {told} hash to another answer than the log's, {how}")
    both = zip(kept, tokens, strict=False)
    at = next((n for n, (old, new) in enumerate(both) if old != new), min(len(kept), len(tokens)))
    raise ProofError(
        f"{id}: of {len(kept)} tokens the first {at} are the same, and the next differs; the log's "
        f"were {how}"
    )
