"""vLLM answers as `generate` does, at each depth; in vLLM's own interpreter.

RONDO_VLLM_PYTHON names that interpreter, in whose environment vLLM and rondo-vllm are installed.
All engines run one after another in one process (`probe_engine.py`), since each takes half a minute
to start.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import torch

from conftest import VOCAB, byte_tokenizer, recurrent
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

PYTHON = os.environ.get("RONDO_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="RONDO_VLLM_PYTHON names no interpreter with vLLM"),
]
DEFAULT, CAP, BLOCK = 3, 6, 32
# Threads and memory are a small machine's, and its one memory node stands for two.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_SIM_MULTI_NUMA": "1",
}
# Prompts come in parts of 32 tokens, and four requests at once.
OPTIONS = {
    "max_model_len": 192,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": BLOCK,
}
# Each way into an iteration, and each first state, in some family.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"injection": "linear"},
    "olmo2": {"state_init": "normal", "state_std": 0.3},
    "gemma3_text": {},
    "mistral": {"injection": "add", "state_init": "zeros"},
    "smollm3": {},
    "granite": {},
}


@dataclass
class Request:
    prompt: list[int]
    depth: int | None = None
    new: int = 8

    @property
    def planned(self) -> dict[str, Any]:
        xargs = None if self.depth is None else {"num_recurrences": self.depth}
        return {"prompt": self.prompt, "new": self.new, "xargs": xargs}


@dataclass
class Engine:
    model: RecurrentForCausalLM
    rounds: list[list[Request]]
    options: dict[str, Any] = field(default_factory=dict)


def prompt(random: Random, length: int) -> list[int]:
    return [random.randrange(3, VOCAB) for _ in range(length)]


def tiny(family: str, **fields: Any) -> RecurrentForCausalLM:
    # vLLM's attention on a CPU wants heads of 32.
    depths = {"num_recurrences": DEFAULT, "max_recurrences": CAP}
    layers = [0, 1, 3, 5]
    model = recurrent(family, layers, (1, 2, 1), {"head_dim": 32}, **depths, **fields)
    return model.float()


@cache
def engines() -> dict[str, Engine]:
    """All engines that are started, by name."""
    random = Random(0)
    found = {}
    for family, fields in FAMILIES.items():
        requests = [Request(prompt(random, 5 + 9 * n), r) for n, r in enumerate((1, 4, 2, None))]
        found[family] = Engine(tiny(family, **fields), [requests])
    # More than fit at once, short and long, at all depths.
    mixed = [Request(prompt(random, random.randrange(1, 60)), r) for r in (6, 1, None, 2, 5, 1, 4)]
    mixed.append(Request(prompt(random, 1), 3, new=20))
    # A prompt that fills blocks, which a cache of prefixes would find again.
    same = prompt(random, 3 * BLOCK + 5)
    again = [[Request(same, depth)] for depth in (4, 1, 4, 2)]
    found["llama"].rounds += [mixed, *again, [Request([5, 6], CAP + 1)]]
    many = [Request(prompt(random, 50), r, new=60) for r in (1, 6, 2, 4)]
    found["sharded"] = Engine(
        tiny("llama"), [many], {"tensor_parallel_size": 2, "num_gpu_blocks_override": 11}
    )
    found["shallow"] = Engine(
        found["llama"].model,
        [[Request([7, 8, 9]), Request([7, 8, 9], 2)], [Request([5, 6], 3)]],
        {"hf_overrides": {"num_recurrences": 1, "max_recurrences": 2}},
    )
    deltas = {"hf_overrides": {"delta_rank": 2, "num_delta_iterations": 2}}
    found["deltas"] = Engine(found["llama"].model, [], deltas)
    found["stages"] = Engine(found["llama"].model, [], {"pipeline_parallel_size": 2})
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, engine in engines().items():
        found[name] = tmp_path_factory.mktemp("vllm") / name
        engine.model.save_pretrained(found[name])
        byte_tokenizer().save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def answers(checkpoints: dict[str, Path], tmp_path_factory: Any) -> dict[str, dict[str, Any]]:
    """What all engines answer, by name."""
    assert PYTHON is not None
    place = tmp_path_factory.mktemp("answers")
    plan = [
        {
            "model": str(checkpoints[name]),
            "options": OPTIONS | engine.options,
            "rounds": [[request.planned for request in each] for each in engine.rounds],
        }
        for name, engine in engines().items()
    ]
    (place / "plan.json").write_text(json.dumps(plan))
    script = Path(__file__).parent / "probe_engine.py"
    done = subprocess.run(
        [PYTHON, str(script), str(place / "plan.json"), str(place / "answers.json")],
        env=os.environ | ENVIRONMENT,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return dict(zip(engines(), json.loads((place / "answers.json").read_text()), strict=True))


@torch.no_grad()
def generated(model: RecurrentForCausalLM, request: Request) -> tuple[list[int], torch.Tensor]:
    """What `generate` says to a request, and the logarithms of its probabilities."""
    ids = torch.tensor([request.prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_recurrences=request.depth,
        max_new_tokens=request.new,
        eos_token_id=None,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, len(request.prompt) :]
    logprobs = torch.stack(output.logits)[:, 0].log_softmax(-1)
    return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0]


def assert_as_generated(model: Any, requests: list[Request], found: list[dict[str, Any]]) -> None:
    assert len(found) == len(requests)
    for request, answer in zip(requests, found, strict=True):
        tokens, logprobs = generated(model, request)
        assert answer["tokens"] == tokens, request
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_depths_in_one_batch_are_those_of_generate(family: str, answers: Any) -> None:
    engine = engines()[family]
    assert_as_generated(engine.model, engine.rounds[0], answers[family]["rounds"][0])


def test_more_requests_than_fit_keep_their_depths(answers: Any) -> None:
    engine = engines()["llama"]
    assert_as_generated(engine.model, engine.rounds[1], answers["llama"]["rounds"][1])


def test_the_same_prompt_at_one_depth_after_another_is_answered_anew(answers: Any) -> None:
    engine, found = engines()["llama"], answers["llama"]["rounds"]
    for requests, told in zip(engine.rounds[2:6], found[2:6], strict=True):
        assert_as_generated(engine.model, requests, told)
    assert found[2] == found[4]
    assert found[2] != found[3]


def test_a_depth_beyond_the_cap_is_refused(answers: Any) -> None:
    said = "num_recurrences must be a whole number between 1 and 6 here, got 7"
    assert answers["llama"]["rounds"][6] == said


def test_two_shards_that_run_out_of_room_answer_as_one_model(answers: Any) -> None:
    engine, found = engines()["sharded"], answers["sharded"]
    assert found["preemptions"] > 0, "the test has lost its grip: nobody was thrown out"
    assert_as_generated(engine.model, engine.rounds[0], found["rounds"][0])


def test_default_and_cap_can_be_set_at_the_start(answers: Any) -> None:
    engine, found = engines()["shallow"], answers["shallow"]
    told = [Request([7, 8, 9], 1), Request([7, 8, 9], 2)]
    assert_as_generated(engine.model, told, found["rounds"][0])
    assert "between 1 and 2 here, got 3" in found["rounds"][1]


def test_keys_and_values_have_room_for_the_cap(answers: Any) -> None:
    # Two layers beside the core, two in it, at most 6 or 2 times.
    deep, shallow = answers["llama"]["kv_tokens"], answers["shallow"]["kv_tokens"]
    assert deep * (2 + 2 * 6) == pytest.approx(shallow * (2 + 2 * 2), rel=1e-3)


@pytest.mark.parametrize(("name", "advice"), [("deltas", "rondo serve"), ("stages", "--tensor")])
def test_what_cannot_be_served_does_not_start(name: str, advice: str, answers: Any) -> None:
    assert "a model that loops cannot be served so: " in answers[name]["error"]
    assert advice in answers[name]["error"]


@pytest.fixture(scope="module")
def server(checkpoints: dict[str, Path], tmp_path_factory: Any) -> Iterator[httpx.Client]:
    assert PYTHON is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--model", str(checkpoints["llama"]), "--dtype", "float32"]
    command += ["--max-model-len", "128", "--served-model-name", "final"]
    place = tmp_path_factory.mktemp("server")
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, cwd=place, stdout=log, stderr=log
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        try:
            deadline = time.monotonic() + 300
            while not _is_up(client):
                assert process.poll() is None, (place / "log").read_text()[-8000:]
                assert time.monotonic() < deadline, (place / "log").read_text()[-8000:]
                time.sleep(0.5)
            yield client
        finally:
            process.terminate()
            process.wait(60)


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.ConnectError:
        return False


@pytest.mark.parametrize("depth", [None, 1, 5])
def test_the_server_takes_a_depth(depth: int | None, server: httpx.Client) -> None:
    request = Request([9, 8, 7, 6], depth)
    body: dict[str, Any] = {"model": "final", "prompt": request.prompt, "max_tokens": request.new}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    if depth is not None:
        body["vllm_xargs"] = {"num_recurrences": depth}
    reply = server.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    expected, _ = generated(engines()["llama"].model, request)
    assert reply.json()["choices"][0]["token_ids"] == expected


@pytest.mark.parametrize("depth", [0, 7, "4", 2.0])
def test_the_server_refuses_a_depth_in_one_sentence(depth: Any, server: httpx.Client) -> None:
    body = {"model": "final", "prompt": [5, 6], "vllm_xargs": {"num_recurrences": depth}}
    reply = server.post("/v1/completions", json=body)
    assert reply.status_code == 400
    said = f"num_recurrences must be a whole number between 1 and 6 here, got {depth!r}"
    assert reply.json()["error"]["message"] == said
