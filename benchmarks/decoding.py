"""What the benchmarks of decoding share: models, prompts, turns, and the record."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from rondo.data import encode, load_tokenizer
from rondo.generation import load_recurrent
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.provenance import hardware, versions

# Proportions of Llama 3.2 1B, split as the paper splits it but with every layer kept.
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
LARGE_SPLIT = (5, 6, 5)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the flags that all of them have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a recurrent checkpoint, or `1b` for random weights")
    parser.add_argument("--prompts", help="JSON lines with a field `question` or `text`")
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", help="file for the figures, JSON")
    return parser


def load(flags: argparse.Namespace) -> Any:
    """Load the checkpoint, or make a model of random weights."""
    if flags.model != "1b":
        return load_recurrent(flags.model, flags.dtype, flags.device)
    torch.manual_seed(0)
    prelude, core, coda = LARGE_SPLIT
    base = LlamaConfig(**LARGE)
    config = RecurrentConfig(
        base_config=base,
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        source_layers=list(range(prelude + core + coda)),
    )
    return RecurrentForCausalLM(config).eval()


def parent_of(model: Any) -> Any:
    """Return the parent of random weights, over the very same modules."""
    with torch.device("meta"):
        parent = LlamaForCausalLM(model.config.base_config)
    parent.model.embed_tokens, parent.lm_head = model.model.embed_tokens, model.lm_head
    parent.model.layers, parent.model.norm = model.model.layers, model.model.norm
    parent.model.rotary_emb = model.model.rotary_emb
    return parent.eval()


def prompts(flags: argparse.Namespace, model: Any) -> list[torch.Tensor]:
    """Return token ids (1, T) of prompts: questions of a file, or random ones."""
    if not flags.prompts:
        generator = torch.Generator().manual_seed(0)
        shape = (flags.num_prompts, 1, 64)
        ids = torch.randint(model.config.vocab_size, shape, generator=generator)
        return [one.to(model.device) for one in ids]
    tokenizer = load_tokenizer(Path(flags.model))
    with Path(flags.prompts).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(flags.num_prompts), lines, strict=False)]
    texts = [
        f"Question: {row['question']}\nAnswer:" if "question" in row else row["text"]
        for row in rows
    ]
    return [torch.tensor([encode(tokenizer, text)], device=model.device) for text in texts]


def in_turns(
    settings: dict[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Run each setting once to warm up, then all in turn, every second time backwards.

    Returns:
        Seconds of each run of a setting, and what the run returned.
    """
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    found: dict[str, list[Any]] = {name: [] for name in settings}
    with tqdm(total=(repeats + 1) * len(settings), disable=None) as bar:
        for repeat in range(repeats + 1):
            for name in settings if repeat % 2 else reversed(settings):
                start = time.perf_counter()
                result = settings[name]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
                    found[name].append(result)
                bar.update()
    return seconds, found


def spread(values: list[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def greedy(model: Any, ids: torch.Tensor, flags: argparse.Namespace, **how: Any) -> Any:
    """Continue a prompt by exactly so many tokens."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=flags.new_tokens,
        min_new_tokens=flags.new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        **how,
    )


def record(flags: argparse.Namespace, found: Any) -> None:
    """Print the figures, and write them with what they were measured on."""
    facts = {"arguments": vars(flags), "hardware": hardware(flags.device), "versions": versions()}
    text = json.dumps({**facts, "found": found}, indent=1)
    print(text)
    if flags.output:
        Path(flags.output).write_text(text + "\n", encoding="utf-8")
