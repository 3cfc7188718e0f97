"""Runs in vLLM's interpreter: starts engines one after another, and writes what they answer.

    python probe_engine.py PLAN ANSWERS

The plan is a list of engines, each with `model`, `options` of `LLM`, and `rounds`: lists of
requests that are handed over together. A request has `prompt`, `new` and maybe `xargs`. The answer
to each is its tokens and their logprobs; to a round that is refused, the words of the refusal; to
an engine that does not start, its error.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError


def answer(engine: dict[str, Any]) -> dict[str, Any]:
    try:
        llm = LLM(
            model=engine["model"],
            dtype="float32",
            seed=0,
            disable_log_stats=False,
            **engine["options"],
        )
    except Exception as error:
        return {"error": str(error)}
    config = llm.llm_engine.vllm_config
    answered = {
        "rounds": [ask(llm, requests) for requests in engine["rounds"]],
        "kv_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        "preemptions": counted(llm, "vllm:num_preemptions"),
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return answered


def ask(llm: LLM, requests: list[dict[str, Any]]) -> list[dict[str, Any]] | str:
    prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=request["new"],
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            extra_args=request.get("xargs"),
        )
        for request in requests
    ]
    try:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    except VLLMValidationError as error:
        return str(error)
    return [told(output.outputs[0]) for output in outputs]


def told(completion: Any) -> dict[str, Any]:
    tokens = list(completion.token_ids)
    pairs = zip(tokens, completion.logprobs, strict=True)
    return {"tokens": tokens, "logprobs": [logprobs[token].logprob for token, logprobs in pairs]}


def counted(llm: LLM, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


if __name__ == "__main__":
    plan, answers = map(Path, sys.argv[1:])
    answers.write_text(json.dumps([answer(engine) for engine in json.loads(plan.read_text())]))
