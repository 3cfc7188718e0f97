"""Loss on held-out text at every depth asked for, from one trajectory of the core.

The model runs to the deepest r once; coda and head branch off at each depth on the way.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from rondo.config import EvalConfig
from rondo.data import Documents, encode, load_tokenizer, padded_batches, read_documents
from rondo.errors import UserError
from rondo.flops import Costs, costs_of, costs_of_parent
from rondo.loading import load_model
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.provenance import (
    choose_device,
    choose_dtype,
    claim_directory,
    hardware,
    read_json,
    record,
    staged,
    write_json,
)

FORMAT_VERSION = 1
TIMED_TOKENS = 512


class Subject:
    """A model to measure: recurrent, or a parent or static twin, which know one depth only.

    Args:
        config: What is asked for.

    Raises:
        UserError: The directory holds no model, or the depths are beyond its cap.
    """

    def __init__(self, config: EvalConfig):
        self.directory = Path(config.model)
        fields = read_json(self.directory / "config.json")
        self.facts = (
            read_json(self.directory / "run.json")
            if (self.directory / "run.json").is_file()
            else {}
        )
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.device)
        self.recurrent = fields.get("model_type") == "rondo"
        self.seed = config.seed
        if self.recurrent:
            model = load_model(RecurrentForCausalLM, self.directory, self.dtype)
        else:
            model = load_model(
                AutoModelForCausalLM,
                self.directory,
                self.dtype,
                trust_remote_code=config.trust_remote_code,
            )
        self.model = model.to(self.device).eval()
        self.costs: Costs = costs_of(self.model) if self.recurrent else costs_of_parent(self.model)
        self.recurrences: tuple[int, ...] = (1,)
        if self.recurrent:
            self.recurrences = tuple(sorted(set(config.recurrences)))
            cap = self.model.config.max_recurrences
            if self.recurrences[-1] > cap:
                raise UserError(
                    f"--recurrences {self.recurrences[-1]} is beyond the model's cap of {cap} "
                    "(max_recurrences in its config.json)"
                )

    def hidden_states(
        self, ids: torch.Tensor, mask: torch.Tensor | None, recurrences: Sequence[int]
    ) -> tuple[torch.Tensor, ...]:
        """Return normed hidden states (B, T, D) at each depth."""
        if not self.recurrent:
            output = self.model.base_model(ids, attention_mask=mask, use_cache=False)
            return (output.last_hidden_state,)
        return self.model.model(
            ids,
            attention_mask=mask,
            num_recurrences=max(recurrences),
            output_recurrences=tuple(recurrences),
            state_seed=self.seed,
        ).branches

    def token_losses(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Return the loss (nats) of each predicted token, (B, T - 1), at each depth; 0 at padding.

        Args:
            ids: Token ids, (B, T), right-padded.
            mask: 1 for tokens, (B, T).
        """
        ids, mask = ids.to(self.device), mask.to(self.device)
        targets = torch.where(mask[:, 1:].bool(), ids[:, 1:], -100)
        if not self.recurrent:
            all_logits = self.model(ids, attention_mask=mask, use_cache=False).logits
            return [_losses(all_logits[:, :-1], targets)]
        found = []
        for hidden in self.hidden_states(ids, mask, self.recurrences):
            rows = [
                _losses(self.model.logits(row[:-1])[None], target[None])
                for row, target in zip(hidden, targets, strict=True)
            ]
            found.append(torch.cat(rows))
        return found

    def milliseconds_per_token(self) -> dict[int, float]:
        """Return the time of a forward pass per token at each depth, the better of two."""
        length = min(TIMED_TOKENS, 256)
        ids = torch.arange(TIMED_TOKENS, device=self.device).reshape(-1, length)
        ids = ids % self.model.config.vocab_size
        found = {}
        for depth in self.recurrences:
            times = []
            for _ in range(2):
                self._wait()
                start = time.perf_counter()
                hidden = self.hidden_states(ids, None, (depth,))[0]
                self.model.get_output_embeddings()(hidden)
                self._wait()
                times.append(time.perf_counter() - start)
            found[depth] = 1000 * min(times) / TIMED_TOKENS
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    ).reshape(targets.shape)


def document_losses(
    subject: Subject, tokenizer: Any, documents: Documents, config: EvalConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure one text.

    Returns:
        The documents' description, and per document: predicted tokens and summed loss by depth.
    """
    token_lists, num_bytes = [], 0
    for text in documents.texts[: config.max_documents]:
        tokens = encode(tokenizer, text)[: config.seq_len]
        if len(tokens) > 1:
            token_lists.append(tokens)
            # The first token has nothing before it and is not predicted.
            num_bytes += len(tokenizer.decode(tokens[1:]).encode())
    if not token_lists:
        raise UserError(f"{documents.path} holds no document of two tokens or more")
    sums: dict[int, list[float]] = {r: [0.0] * len(token_lists) for r in subject.recurrences}
    batches = list(padded_batches(token_lists, config.batch_size))
    for chosen, ids, mask in tqdm(batches, desc=documents.name, unit="batch", disable=None):
        for depth, losses in zip(subject.recurrences, subject.token_losses(ids, mask), strict=True):
            for index, total in zip(chosen, losses.double().sum(dim=1).tolist(), strict=True):
                sums[depth][index] = total
    counts = [len(tokens) - 1 for tokens in token_lists]
    described = {
        "path": documents.path,
        "sha256": documents.sha256,
        "documents": len(counts),
        "tokens": sum(counts),
        "bytes": num_bytes,
    }
    # JSON has no NaN: a loss that is none is null, and a report says so.
    loss = {str(r): [_finite(total) for total in sums[r]] for r in sums}
    return described, {"tokens": counts, "loss": loss}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def rows_for(
    name: str,
    described: dict[str, Any],
    found: dict[str, Any],
    subject: Subject,
    milliseconds: dict[int, float],
    seq_len: int,
) -> list[dict[str, Any]]:
    """Return one row per depth: loss with standard error over documents, beside its costs."""
    rows = []
    for depth in subject.recurrences:
        losses = [math.nan if one is None else one for one in found["loss"][str(depth)]]
        total = sum(losses)
        rows.append(
            {
                "dataset": name,
                "metric": "loss",
                "num_recurrences": depth,
                "value": _finite(total / described["tokens"]),
                "stderr": ratio_stderr(losses, found["tokens"]),
                "bits_per_byte": _finite(total / math.log(2) / described["bytes"]),
                "flops_per_token": subject.costs.forward_flops(depth, seq_len),
                "kv_bytes_per_token": subject.costs.kv_bytes(
                    depth, torch.empty(0, dtype=subject.dtype).element_size()
                ),
                "ms_per_token": milliseconds[depth],
            }
        )
    return rows


def ratio_stderr(losses: Sequence[float], tokens: Sequence[int]) -> float | None:
    """Return the standard error of summed loss over summed tokens, documents being the sample.

    None for a single document, which says nothing about others, and for losses that are none.
    """
    n = len(losses)
    if n < 2 or not math.isfinite(sum(losses)):
        return None
    mean = sum(losses) / sum(tokens)
    residuals = [loss - mean * count for loss, count in zip(losses, tokens, strict=True)]
    return math.sqrt(sum(r * r for r in residuals) * n / (n - 1)) / sum(tokens)


def model_facts(subject: Subject, config: EvalConfig) -> dict[str, Any]:
    """Return what a report says about the model, read off its run.json."""
    facts, training = subject.facts, subject.facts.get("training")
    role = training["mode"] if training else "recurrent" if subject.recurrent else "parent"
    trained = training or facts.get("imported")
    stage = config.stage or ("after" if trained else "before")
    names = {
        ("recurrent", "before"): "recurrent, untrained",
        ("recurrent", "after"): "recurrent, trained",
        ("static", "after"): "static twin",
        ("random", "after"): "random-init twin",
        ("parent", "before"): "parent",
    }
    split = None
    if subject.recurrent:
        settings = subject.model.config
        layers = settings.source_layers
        core = settings.num_prelude_layers
        coda = core + settings.num_core_layers
        split = {"prelude": layers[:core], "core": layers[core:coda], "coda": layers[coda:]}
    parent = facts.get("parent", {}).get("name") or config.model
    history = facts.get("history", [facts["command"]] if "command" in facts else [])
    return {
        "path": config.model,
        "label": config.label or names.get((role, stage), f"{role}, {stage} training"),
        "role": role,
        "stage": stage,
        "parent": Path(parent).name,
        "parameters": subject.costs.total_parameters,
        "split": split,
        "injection": subject.model.config.injection if subject.recurrent else None,
        "state_init": subject.model.config.state_init if subject.recurrent else None,
        "training": training,
        "history": history,
    }


@torch.inference_mode()
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a model and return what goes into results.json.

    Raises:
        UserError: The model or a text cannot be read, or a depth is beyond the cap.
    """
    texts = [read_documents(spec) for spec in config.data]
    if len({text.name for text in texts}) < len(texts):
        raise UserError("two texts have the same name: tell them apart as NAME=PATH")
    subject = Subject(config)
    tokenizer = load_tokenizer(subject.directory)
    milliseconds = subject.milliseconds_per_token()
    datasets, documents, rows = {}, {}, []
    for text in texts:
        described, found = document_losses(subject, tokenizer, text, config)
        datasets[text.name], documents[text.name] = described, found
        rows += rows_for(text.name, described, found, subject, milliseconds, config.seq_len)
    run = record(config)
    return {
        "format_version": FORMAT_VERSION,
        "kind": "eval",
        "model": model_facts(subject, config),
        "conditions": {
            "command": run["command"],
            "date": run["date"],
            "device": hardware(subject.device.type),
            "dtype": str(subject.dtype).removeprefix("torch."),
            "seq_len": config.seq_len,
            "seed": config.seed,
            "versions": run["versions"],
            "git": run["git"],
        },
        "datasets": datasets,
        "rows": rows,
        "documents": documents,
    }


def run(config: EvalConfig) -> None:
    """Run `rondo eval`.

    Raises:
        UserError: The model or a text cannot be read, or the output exists.
    """
    claim_directory(config.output_dir, config.overwrite, spare=config.model)
    results = evaluate(config)
    with staged(config.output_dir) as partial:
        write_json(partial / "results.json", results)
        write_json(partial / "run.json", record(config, kind="eval"))
    print(f"{results['model']['label']} ({config.model}), nats per token")
    print("  text            r      loss    stderr  bits/byte   FLOPs/token   ms/token")
    for row in results["rows"]:
        value, stderr, bits = (
            "-" if row[key] is None else f"{row[key]:.4f}"
            for key in ("value", "stderr", "bits_per_byte")
        )
        print(
            f"  {row['dataset']:<14}{row['num_recurrences']:>3}{value:>10}{stderr:>10}"
            f"{bits:>11}{row['flops_per_token']:>14.4g}"
            f"{row['ms_per_token']:>11.2f}"
        )
    print(f"wrote {config.output_dir}/results.json")
