"""One model's part of results.json: what it is, under which conditions, and its rows."""

from collections.abc import Sequence
from typing import Any

import torch

from rondo.config import EvalConfig
from rondo.evaluation import baselines
from rondo.evaluation.baselines import Wanted
from rondo.evaluation.ledger import Ledger
from rondo.evaluation.outcome import Json, Outcome
from rondo.evaluation.subject import Subject
from rondo.evaluation.texts import bits_per_byte
from rondo.provenance import hardware, record

FORMAT_VERSION = 2
LABELS = {
    ("recurrent", "before"): "recurrent, untrained",
    ("recurrent", "after"): "recurrent, trained",
    ("static", "after"): "static twin",
    ("random", "after"): "random-init twin",
    ("parent", "before"): "parent",
}


def model_facts(
    subject: Subject, wanted: Wanted, first: Wanted, config: EvalConfig, samples: int
) -> Json:
    """Return what a report says about the model, read off its run.json.

    Args:
        subject: The model.
        wanted: As what it was asked for.
        first: The model it is set beside.
        config: What was asked for.
        samples: Answers drawn per item.
    """
    facts, training = subject.facts, subject.facts.get("training")
    role = baselines.role_of(wanted.directory, {"model_type": subject.model.config.model_type})
    stage = "after" if training or facts.get("imported") else "before"
    label = LABELS.get((role, stage), f"{role}, {stage} training")
    if samples > 1:
        role, label = "self-consistency", f"parent, self-consistency of {samples}"
    if wanted.role is None:
        stage, label = config.stage or stage, config.label or label
    settings = subject.model.config if subject.recurrent else None
    # What is given as the parent is that of the model asked about, wherever it lies now.
    of = baselines.facts_of(first.directory) if wanted.role else facts
    parent = facts.get("parent") or of.get("parent") or {}
    return {
        "path": wanted.name,
        "label": label,
        "role": role,
        "stage": stage,
        "parent": baselines.name_of(parent.get("name") or wanted.name),
        "parameters": subject.costs.total_parameters,
        "split": _split(settings) if settings else None,
        "injection": settings.injection if settings else None,
        "state_init": settings.state_init if settings else None,
        "max_recurrences": settings.max_recurrences if settings else None,
        "trained_recurrence": _trained_recurrence(subject),
        "training": training,
        "curve": baselines.training_curve(wanted.directory) if training else [],
        "history": facts.get("history", [facts["command"]] if "command" in facts else []),
    }


def _split(settings: Any) -> dict[str, list[int]]:
    core = settings.num_prelude_layers
    coda, layers = core + settings.num_core_layers, settings.source_layers
    return {"prelude": layers[:core], "core": layers[core:coda], "coda": layers[coda:]}


def _trained_recurrence(subject: Subject) -> float | None:
    """Return the mean depth that the loop was trained at, if it was."""
    if not subject.recurrent:
        return None
    if "training" in subject.facts:
        return float(subject.facts["training"]["recurrence"].split()[-1])
    return float(subject.model.config.num_recurrences) if subject.facts.get("imported") else None


def conditions(
    subject: Subject,
    config: EvalConfig,
    ledger: Ledger,
    seeds: Sequence[int],
    memory: int | None,
) -> Json:
    """Return under which conditions a model was measured.

    Args:
        subject: The model.
        config: What was asked for.
        ledger: Of the evaluation.
        seeds: Those that decided something.
        memory: The most bytes in use, where that can be told.
    """
    run = record(config)
    return {
        "command": run["command"],
        "date": run["date"],
        "device": hardware(subject.device.type),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "seq_len": config.seq_len,
        "batch_size": config.batch_size,
        "limit": config.limit,
        "num_processes": ledger.world.size,
        "seeds": list(seeds),
        "peak_memory_bytes": memory,
        "versions": run["versions"],
        "git": run["git"],
    }


def rows_of(outcome: Outcome, subject: Subject, milliseconds: dict[str, float]) -> list[Json]:
    """Return one row per metric and depth, each beside its costs.

    Args:
        outcome: What was measured.
        subject: The model.
        milliseconds: By depth, of a forward pass per token.
    """
    bytes_per_value = torch.empty(0, dtype=subject.dtype).element_size()
    samples = outcome.described.get("samples", 1)
    flops = {depth: _flops_per_token(outcome, subject, depth) for depth in subject.recurrences}
    shares = _shares_of_time(outcome, flops)
    rows = []
    for metric, scores in outcome.scores.items():
        for depth, score in scores.items():
            row = {
                "task": outcome.name,
                "metric": metric,
                "num_recurrences": depth,
                "value": score.value,
                "stderr": score.stderr,
                "seed_values": list(score.by_seed or (score.value,)),
                "flops_per_token": flops[depth] * samples,
                "kv_bytes_per_token": subject.costs.kv_bytes(depth, bytes_per_value),
                "ms_per_token": milliseconds[str(depth)] * samples,
                "seconds": outcome.seconds * shares[depth],
                "tokens_per_item": outcome.lengths[depth].per_item,
                "samples": samples,
            }
            if metric == "loss":
                row["bits_per_byte"] = bits_per_byte(score.value, outcome.described)
            rows.append(row)
    return rows


def _flops_per_token(outcome: Outcome, subject: Subject, depth: int) -> float:
    """Return the FLOPs of a whole forward pass, or those that generating executed."""
    lengths = outcome.lengths[depth]
    if outcome.described["kind"] == "generation":
        return subject.costs.generation_flops(depth, lengths.read, lengths.new)
    return subject.costs.forward_flops(depth, round(lengths.read))


def _shares_of_time(outcome: Outcome, flops: dict[int, float]) -> dict[int, float]:
    """Return what part of the time each depth would have taken alone, by its FLOPs."""
    work = {depth: flops[depth] * outcome.lengths[depth].per_item for depth in flops}
    # Texts are generated at each depth by itself; else one pass to the deepest serves all.
    whole = sum(work.values()) if outcome.described["kind"] == "generation" else max(work.values())
    return {depth: one / whole for depth, one in work.items()}


def told_apart(found: Sequence[tuple[Json, list[Json]]]) -> None:
    """Number models that would have one name, in their results and in the lines of samples."""
    seen: dict[str, int] = {}
    for result, samples in found:
        label = result["model"]["label"]
        seen[label] = seen.get(label, 0) + 1
        if seen[label] > 1:
            result["model"]["label"] = f"{label} ({seen[label]})"
        for line in samples:
            line["model"] = result["model"]["label"]
