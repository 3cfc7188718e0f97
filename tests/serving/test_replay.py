"""An answer that a log tells of comes out again, and what is not that answer is told from it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from engines import Heard
from governing import Site

from conftest import byte_tokenizer, recurrent
from rondo.chat import chat_tokens
from rondo.cli import main
from rondo.data import encode
from rondo.errors import ProofError, UserError
from rondo.generation import shape_of
from rondo.modeling.exits_recurrent import ExitRule
from rondo_govern.audit.log import AuditLog
from rondo_govern.audit.records import digest_of
from rondo_govern.settings import AuditReplayConfig
from rondo_serve import replay
from rondo_serve.api.asks import Asker, Defaults
from rondo_serve.api.bodies import ChatBody
from rondo_serve.config import ServeConfig
from rondo_serve.engine.opening import open_engine
from rondo_serve.governed import Governed, govern, ruling_of, sheets_of
from rondo_serve.requests import Ask, Sampling

TOKENIZER = byte_tokenizer()
TEXT = "Two and two is"
MESSAGES = [{"role": "user", "content": "the answer"}]
PROMPT = tuple(encode(TOKENIZER, TEXT))
RISKS = {"unsure": {"escalation": {"rule": "state_distance", "threshold": 0.22}}}
ASKS = [
    Ask("greedy", PROMPT, 8, 3, key="acme"),
    Ask("sampled", PROMPT, 12, 4, sampling=Sampling(1.3, 0.9, 40, 2**40), key="acme"),
    Ask("penalty", PROMPT, 9, 2, sampling=Sampling(repetition_penalty=1.8), key="acme"),
    Ask("entropy", PROMPT, 8, 8, exit=ExitRule("entropy", 5.38, 2, 2), key="acme"),
    Ask("distance", PROMPT, 8, 8, exit=ExitRule("state_distance", 0.22), key="acme"),
    Ask("clamped", PROMPT, 8, 40, key="acme"),
    Ask("unsure", PROMPT, 8, 2, key="acme", risks=frozenset({"unsure"})),
    Ask("chat", tuple(chat_tokens(TOKENIZER, MESSAGES)), 5, 3, key="acme"),
    Ask("cut off", PROMPT, 60, 5, sampling=Sampling(1.0, seed=5), key="acme"),
    Ask("never begun", PROMPT, 4, 3, key="acme"),
]
WHOLE = [ask.id for ask in ASKS[:-1]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("served") / "tiny")


def saved(path: Path, **fields: Any) -> Path:
    """Save a tiny model."""
    recurrent("llama", **{"num_recurrences": 3, "max_recurrences": 8} | fields).save_pretrained(
        path
    )
    byte_tokenizer().save_pretrained(path)
    return path


@dataclass
class Logged:
    """A log that a real engine wrote, and what it answered."""

    log: Path
    model: Path
    tokens: dict[str, list[int]]

    def replay(self, id: str, **settings: Any) -> None:
        plain = {"log": str(self.log), "id": id, "model": str(self.model), "device": "cpu"}
        replay.run(AuditReplayConfig(**plain | settings))

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        files = [*sorted(self.log.parent.glob("audit.0*.jsonl")), self.log]
        assert len(files) > 1
        lines = [line for file in files for line in file.read_text().splitlines()]
        found = [json.loads(line) for line in lines]
        return [record for record in found if kind in (None, record["kind"])]

    def forged(self, folder: Path, alter: Callable[[dict[str, Any]], Any]) -> "Logged":
        """Write the records again, altered, so that their chain holds."""
        log = AuditLog.open(folder / "audit.jsonl", fsync="off")
        for record in self.records():
            if record["kind"] != "continued":
                alter(record)
                own = {n: v for n, v in record.items() if n not in ("seq", "time", "prev", "hash")}
                log.append(own.pop("kind"), **own)
        log.close()
        return replace(self, log=folder / "audit.jsonl")


def written(folder: Path, model: Path, texts: bool) -> Logged:
    """Let an engine answer in company, some cut off, and close its log."""
    site = Site(folder)
    site.rule(risks={"casual": {}, "high": {"floor": 3}, **RISKS})
    config = site.config(
        model=str(model), dtype="float32", device="cpu", kv_memory="4MB", audit_rotate="6kB"
    )
    found = open_engine(config)
    engine, sheets = found.engine, sheets_of(config, found.limits, found.shape)
    about = found.about | {"weights": None}
    governance = govern(config, found.limits, engine.costs, sheets, about)
    engine.policy = Governed(governance.governor, ruling_of(found.shape), texts)
    heard = {ask.id: Heard() for ask in ASKS}
    first, *rest = ASKS
    # One that a stop string ends, known from what it says without.
    engine.submit(first, heard[first.id])
    while engine.tick():
        pass
    stop = heard[first.id].text[2:4]
    stopped = Ask("stopped", PROMPT, 8, 3, stop=(stop,), key="acme")
    heard["stopped"] = Heard()
    for ask in (stopped, *rest):
        engine.submit(ask, heard[ask.id])
    engine.cancel("never begun")
    while engine.tick():
        if len(heard["cut off"].tokens) == 3:
            engine.cancel("cut off")
    governance.governor.close()
    assert heard["stopped"].end.reason == "stop"
    assert heard["cut off"].end.reason == "cancelled"
    tokens = {id: one.tokens for id, one in heard.items()}
    assert 3 <= len(tokens["cut off"]) < 60
    return Logged(site.log, model, tokens)


@pytest.fixture(scope="module")
def logged(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    return written(tmp_path_factory.mktemp("texts"), checkpoint, texts=True)


@pytest.fixture(scope="module")
def hashed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    return written(tmp_path_factory.mktemp("hashes"), checkpoint, texts=False)


# ---- the same


@pytest.mark.parametrize("id", [*WHOLE, "stopped"])
def test_an_answer_comes_out_again(
    logged: Logged, id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logged.replay(id)
    count = len(logged.tokens[id])
    (ended,) = [one for one in logged.records("ended") if one["id"] == id]
    told = f"{id}: the same {count} tokens at depth {ended['allowed']}\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("id", "body"),
    [
        ("greedy", list(PROMPT)),
        ("greedy", {"model": "tiny", "prompt": TEXT, "max_tokens": 8}),
        ("greedy", {"prompt": list(PROMPT)}),
        # Of several, the one that this answer is to.
        ("greedy", {"prompt": ["Another", TEXT]}),
        ("greedy", {"prompt": [[5, 6], list(PROMPT)]}),
        ("chat", {"messages": MESSAGES, "num_recurrences": 3}),
    ],
)
def test_where_the_log_holds_hashes_only_a_file_holds_the_prompt(
    hashed: Logged, tmp_path: Path, id: str, body: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps(body))
    hashed.replay(id, prompt=str(path))
    assert "the same" in capsys.readouterr().out


def test_a_chat_is_read_from_its_body_as_the_server_read_it(
    hashed: Logged, checkpoint: Path, tmp_path: Path
) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "end"}]
    turns = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    body = {"messages": turns}
    config = ServeConfig(model=str(checkpoint))
    # What each turn is called shows.
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    asker = Asker(tokenizer, shape_of(str(checkpoint)), config, "tiny", Defaults())
    (ask,) = asker.chat(ChatBody.model_validate(body))
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps(body))
    assert replay.prompts_in(path, tokenizer) == [list(ask.prompt)]


# ---- not the same


def refused(logged: Logged, id: str, **settings: Any) -> str:
    """Why a replay cannot be, in one sentence."""
    with pytest.raises(UserError) as caught:
        logged.replay(id, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (json.dumps([1, 2, 3]), "the prompt is not the one that was answered"),
        (json.dumps({"prompt": TEXT + "?"}), "the prompt is not the one that was answered"),
        (json.dumps({"prompt": [TEXT + "!", "?"]}), "the prompt is not the one that was answered"),
        (json.dumps({"messages": MESSAGES}), "the prompt is not the one that was answered"),
        (json.dumps({"text": TEXT}), "holds neither a list of tokens nor the body of a request"),
        (json.dumps([1.5]), "holds neither a list of tokens nor the body of a request"),
        (json.dumps({"messages": [{"role": "user"}]}), "holds neither a list of tokens nor the"),
        ("{", "cannot read the prompt"),
        (None, "cannot read the prompt"),
    ],
)
def test_another_prompt_is_refused(
    hashed: Logged, tmp_path: Path, text: str | None, told: str
) -> None:
    path = tmp_path / "prompt.json"
    if text is not None:
        path.write_text(text)
    assert told in refused(hashed, "greedy", prompt=str(path))


def test_what_cannot_be_replayed_is_told_so(
    logged: Logged, hashed: Logged, checkpoint: Path, tmp_path: Path
) -> None:
    assert "holds hashes only: give --prompt" in refused(hashed, "greedy")
    assert refused(logged, "nobody").startswith("there is no answer nobody in ")
    told = "never begun has no token to compare: it ended as cancelled"
    assert refused(logged, "never begun") == told
    other = saved(tmp_path / "other", num_recurrences=2)
    assert f"{other} is not the model that answered" in refused(logged, "greedy", model=str(other))
    assert "there is no" in refused(logged, "greedy", model=str(tmp_path / "nowhere"))
    assert "there is no audit log" in refused(logged, "greedy", log=str(tmp_path / "none.jsonl"))


def test_a_request_that_never_ended_is_told_so(logged: Logged, tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl", fsync="off")
    log.append("taken", id="one")
    log.close()
    told = refused(replace(logged, log=tmp_path / "audit.jsonl"), "one")
    assert told == f"there is no answer one in {tmp_path / 'audit.jsonl'}: it never ended"


def differs(logged: Logged, id: str, **settings: Any) -> str:
    with pytest.raises(ProofError) as caught:
        logged.replay(id, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("last", [True, False])
def test_a_log_that_was_altered_is_not_replayed(logged: Logged, tmp_path: Path, last: bool) -> None:
    for file in logged.log.parent.glob("audit*"):
        shutil.copy(file, tmp_path)
    path = tmp_path / ("audit.jsonl" if last else "audit.000001.jsonl")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"tenant":"acme-corp"', b'"tenant":"somebody."', 1))
    told = differs(replace(logged, log=tmp_path / "audit.jsonl"), "greedy")
    assert told.startswith(f"{path.name}, line ")
    assert "altered" in told


def test_a_token_that_was_forged_with_all_hashes_is_found(logged: Logged, tmp_path: Path) -> None:
    def alter(record: dict[str, Any]) -> None:
        if record["kind"] == "ended" and record["id"] == "sampled":
            record["output"][5] += 1
            record["output_sha256"] = digest_of(record["output"])

    told = differs(logged.forged(tmp_path, alter), "sampled")
    assert told.startswith(
        f"sampled: of {len(logged.tokens['sampled'])} tokens the first 5 are the same"
    )
    assert "computed in float32 on cpu" in told


@pytest.mark.parametrize(
    ("id", "kind", "alter"),
    [
        ("sampled", "taken", lambda it: it["sampling"].update(seed=1)),
        ("sampled", "taken", lambda it: it["sampling"].update(temperature=0.1)),
        ("greedy", "ended", lambda it: it.update(allowed=1)),
        ("entropy", "ended", lambda it: it.update(exit=None)),
        ("entropy", "ended", lambda it: it["exit"].update(min_recurrences=7)),
        ("penalty", "taken", lambda it: it["sampling"].update(repetition_penalty=1.0)),
        ("stopped", "taken", lambda it: it.update(stop=[])),
    ],
)
def test_another_way_to_the_answer_is_found(
    hashed: Logged, tmp_path: Path, id: str, kind: str, alter: Callable[[dict[str, Any]], Any]
) -> None:
    """So what a record tells is what decided its tokens."""
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps(PROMPT))
    forged = hashed.forged(
        tmp_path, lambda it: alter(it) if (it.get("id"), it["kind"]) == (id, kind) else None
    )
    assert "hash to another answer than the log's" in differs(forged, id, prompt=str(path))


@pytest.mark.parametrize("id", ["stopped", "greedy"])
def test_an_answer_that_was_shortened_with_all_hashes_is_found(
    logged: Logged, tmp_path: Path, id: str
) -> None:
    def alter(record: dict[str, Any]) -> None:
        if record["kind"] == "ended" and record["id"] == id:
            kept = record["output"][:-1]
            record |= {"output": kept, "output_sha256": digest_of(kept), "new_tokens": len(kept)}

    count = len(logged.tokens[id]) - 1
    told = differs(logged.forged(tmp_path, alter), id)
    assert told.startswith(f"{id}: of {count} tokens the first {count} are the same")


def test_what_a_gateway_was_not_told_cannot_be_compared(logged: Logged, tmp_path: Path) -> None:
    def alter(record: dict[str, Any]) -> None:
        if record["kind"] == "ended":
            record["output_sha256"] = None

    told = refused(logged.forged(tmp_path, alter), "greedy")
    assert told == "greedy cannot be compared: its tokens were not told to the log"


# ---- the command


def test_the_command_says_how_it_went(
    logged: Logged, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(log: Path, id: str) -> tuple[int, str]:
        words = ["audit", "replay", str(log), "--id", id, "--model", str(logged.model)]
        code = main([*words, "--device", "cpu"])
        out, err = capfd.readouterr()
        return code, out.strip() if code == 0 else err.strip().splitlines()[-1]

    assert run(logged.log, "greedy")[0] == 0
    code, told = run(logged.log, "nobody")
    assert code == 2
    assert told.startswith("rondo audit replay: error: there is no answer nobody in ")

    def alter(record: dict[str, Any]) -> None:
        if record["kind"] == "ended":
            record["output_sha256"] = "0" * 64

    code, told = run(logged.forged(tmp_path, alter).log, "greedy")
    assert code == 1
    assert "greedy: of 8 tokens the first 8 are the same" in told
