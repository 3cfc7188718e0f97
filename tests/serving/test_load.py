"""Many streams at once against a server: no wrong token, and nothing left behind."""

import asyncio
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.data import load_tokenizer
from rondo.generation import load_recurrent
from rondo.modeling.exits_recurrent import ExitRule

STREAMS, KINDS, NEW_TOKENS = 60, 14, 24
# Fewer places than clients, a queue that fills, and pages for few prefixes.
SIZE = ("--max-running=16", "--max-queue=24", "--kv-memory=6MB")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield importlib.import_module("serve_load")


@pytest.fixture(scope="module")
def checkpoint(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("load") / "tiny"
    bench.tiny_checkpoint(directory)
    return directory


def generated(checkpoint: Path, asked: list[Any]) -> list[list[str]]:
    """The tokens of what `generate()` answers, each alone."""
    model, tokenizer = load_recurrent(str(checkpoint), "float32", "cpu"), load_tokenizer(checkpoint)
    answers = []
    for kind in asked:
        ids = torch.tensor([kind.prompt])
        rule = kind.exit and ExitRule(kind.exit["rule"], kind.exit["threshold"])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=kind.new_tokens,
            do_sample=False,
            num_recurrences=kind.depth,
            **({"exit": rule} if rule else {}),
        )
        told = [token for token in out[0, ids.shape[1] :] if token != tokenizer.eos_token_id]
        answers.append([tokenizer.decode(token) for token in told])
    return answers


def test_no_stream_of_many_gets_a_wrong_token_and_nothing_is_left_behind(
    bench: Any, checkpoint: Path
) -> None:
    flags = bench.parser().parse_args([f"--streams={STREAMS}", f"--in-flight={STREAMS}"])
    vocabulary = range(len(bench.SPECIAL), flags.vocabulary)
    asked = bench.kinds(KINDS, NEW_TOKENS, vocabulary, flags.seed)
    greedy = [number for number, kind in enumerate(asked) if not kind.temperature]
    assert {bool(kind.exit) for kind in asked} == {True, False}
    assert len({kind.depth for kind in asked}) >= 3
    log = checkpoint.with_name("log")
    with bench.server(checkpoint, log, *SIZE) as (url, _):
        right = asyncio.run(bench.alone(url, asked))
        found = bench.one_round(url, asked, right, 0, flags)
    expected = generated(checkpoint, [asked[number] for number in greedy])
    assert [right[number].tokens for number in greedy] == expected
    assert found["faults"] == []
    assert found["ties"] <= 1
    assert set(found["left behind"].values()) == {0.0}
    assert found["refused for a full queue"] > 0, "the queue was to fill"
    assert set(found["streams by manner"]) == set(bench.MANNERS)
    assert "Traceback" not in log.read_text()


def test_a_wrong_answer_is_seen(bench: Any) -> None:
    kind = bench.Kind((5, 6), depth=4, new_tokens=3)
    right = bench.Answer(["a", "b", "c"], [4, 4, 4], [("x", 2.0), ("y", 1e-5), ("z", 2.0)])

    def verdict(manner: str, kind: Any = kind, **changes: Any) -> str | None:
        return bench.fault(kind, manner, right, dataclasses.replace(right, **changes), 1e-3)

    assert verdict("reads") is None
    assert verdict("vanishes", tokens=["a"], recurrences=[4]) is None
    assert verdict("reads", tokens=["a"], recurrences=[4]) == "1 tokens in place of 3"
    assert verdict("vanishes", tokens=["a", *"bcd"], recurrences=[4] * 4)
    assert verdict("reads", tokens=["a", "y", "q"]) == "tie"
    assert verdict("reads", tokens=["a", "b", "z"]) == "token 2 is 'z', not 'c'"
    assert verdict("reads", recurrences=[4, 3, 4]) == "token 1 took 3 iterations, not 4"
    sampled = dataclasses.replace(kind, temperature=0.5)
    assert verdict("reads", kind=sampled, tokens=["a", "y", "q"]) != "tie"
    assert verdict("reads", kind=dataclasses.replace(kind, depth=8)) is not None
    assert verdict("gone", error="500: no") == "500: no"
