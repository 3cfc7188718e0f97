"""`rondo audit replay`: answers a recorded request again, and compares the tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from pydantic import ValidationError

from rondo.chat import chat_tokens
from rondo.data import encode
from rondo.errors import ProofError, UserError
from rondo.flops import kv_heads_of
from rondo.generation import shape_of
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.exits_recurrent import ExitRule
from rondo_govern.audit.reading import read
from rondo_govern.audit.records import digest_of
from rondo_govern.settings import AuditReplayConfig
from rondo_serve.api.asks import prompts_of
from rondo_serve.api.bodies import ChatBody, CompletionBody
from rondo_serve.config import ServeConfig
from rondo_serve.engine.arena import Shape
from rondo_serve.engine.opening import PROOF_NEW, PROOF_TOKENS, Opened, open_engine
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
        ProofError: The tokens differ, or the log is damaged.
    """
    model, found = shape_of(config.model), find(Path(config.log), config.id)
    if fingerprint(Path(config.model)) != found.ended["model_sha256"]:
        raise UserError(
            f"{config.model} is not the model that answered: its files hash to another "
            f"model_sha256 than {found.ended['model_sha256'][:12]}"
        )
    if not found.ended["new_tokens"]:
        raise UserError(f"{config.id} has no token to compare: it ended as {found.ended['reason']}")
    if found.ended["output_sha256"] is None or found.ended["prompt_sha256"] is None:
        raise UserError(f"{config.id} cannot be compared: its tokens were not told to the log")
    sampling = {name: told for name, told in found.taken["sampling"].items() if told is not None}
    if found.opened["device"] == "vllm" and sampling.get("temperature") != 0:
        raise UserError(f"{config.id} was drawn by vLLM: only those of temperature 0 come again")
    opened = open_engine(settings_of(config, model, found))
    prompt = prompt_of(config, found, opened)
    compare(config.id, found, answer(opened, ask_of(found, prompt, Sampling(**sampling))))


def find(log: Path, id: str) -> Recorded:
    """Return what a log tells of an answer; all of it is verified on the way.

    Raises:
        UserError: It tells nothing of it.
        ProofError: It is damaged.
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


def settings_of(config: AuditReplayConfig, model: RecurrentConfig, found: Recorded) -> ServeConfig:
    """Return the settings of an engine that rounds as the one that answered."""
    return ServeConfig(
        model=config.model,
        dtype=found.opened["dtype"],
        weights=found.opened.get("weights"),
        device=config.device,
        kv_memory=str(kv_bytes_of(model, found)),
        max_running=1,
        prefix_cache=False,
    )


def kv_bytes_of(model: RecurrentConfig, found: Recorded) -> int:
    """Return the memory that an answer's keys and values take: a server may run beside it."""
    base = model.base_config
    width = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    sizes = model.num_prelude_layers, model.num_core_layers, model.num_coda_layers
    shape = Shape(*sizes, kv_heads_of(base), width, torch.float32)
    tokens = found.ended["prompt_tokens"] + found.taken["max_new_tokens"]
    # The engine proves itself before, at the model's own depth.
    depth = max(found.ended["allowed"], model.num_recurrences)
    pages = shape.pages_for(max(tokens, PROOF_TOKENS + PROOF_NEW), depth)
    # A page is given to nobody.
    return (pages + 1) * shape.page_bytes


def prompt_of(config: AuditReplayConfig, found: Recorded, opened: Opened) -> tuple[int, ...]:
    """Return the tokens of the prompt, from the log or from a file.

    Raises:
        UserError: They are in neither, or are others than those that were answered.
    """
    if config.prompt is not None:
        prompts = prompts_in(Path(config.prompt), opened.tokenizer)
    elif (kept := found.taken.get("prompt") or found.ended.get("prompt")) is not None:
        prompts = [kept]
    else:
        raise UserError(
            f"{config.log} holds hashes only: give --prompt with the request's body, or log with "
            "--audit-texts"
        )
    for tokens in prompts:
        if digest_of(tokens) == found.ended["prompt_sha256"]:
            return tuple(tokens)
    raise UserError("the prompt is not the one that was answered: its tokens hash to another")


def prompts_in(path: Path, tokenizer: Any) -> list[list[int]]:
    """Return the prompts that a file holds, as tokens, or as the body of a request.

    Raises:
        UserError: It holds none.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the prompt {path}: {error}") from error
    try:
        match {"prompt": body} if isinstance(body, list) else body:
            case {"messages": told}:
                turns = ChatBody.model_validate({"messages": told}).messages
                return [chat_tokens(tokenizer, [one.turn for one in turns])]
            case {"prompt": told}:
                texts = prompts_of(CompletionBody.model_validate({"prompt": told}).prompt)
                return [encode(tokenizer, one) if isinstance(one, str) else one for one in texts]
    except ValidationError:
        pass
    except (TemplateError, TypeError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the chat template does not take the messages in {path}: {reason}"
        ) from error
    raise UserError(f"{path} holds neither a list of tokens nor the body of a request")


def ask_of(found: Recorded, prompt: tuple[int, ...], sampling: Sampling) -> Ask:
    """Return what was asked, at the depth and with the exit that were given."""
    told = found.ended["exit"]
    rule = None
    if told is not None:
        own = {name: told[name] for name in ("threshold", "min_recurrences", "check_every")}
        rule = ExitRule(told["rule"], **own)
    # What was cut off comes out again as far as it came.
    is_whole = found.ended["reason"] in ("stop", "length")
    most = found.taken["max_new_tokens"] if is_whole else found.ended["new_tokens"]
    return Ask(
        id="replay",
        prompt=prompt,
        max_new_tokens=most,
        num_recurrences=found.ended["allowed"],
        exit=rule,
        sampling=sampling,
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
