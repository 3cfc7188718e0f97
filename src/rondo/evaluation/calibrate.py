"""`rondo calibrate`: how early tokens may leave the loop, on a user's own texts.

Thresholds are chosen on one half of the documents, first on paper from one trajectory to the full
depth, then by executing the exits with the cache policy they will run with, since deeper tokens
see other keys then. The other half says whether they transfer, what they spend, checks included,
and whether a depth chosen without looking would have done as well.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rondo.config import EvalConfig
from rondo.config.calibrate import CalibrateConfig
from rondo.errors import UserError
from rondo.evaluation import exits
from rondo.evaluation.baselines import locate
from rondo.evaluation.comparisons import Array, Difference, Measured, compare, paired_bootstrap
from rondo.evaluation.exit_runs import Executed, Half, Setup, execute, follow
from rondo.evaluation.outcome import Json, finite
from rondo.evaluation.policies import blind_mixture
from rondo.evaluation.subject import load_subject
from rondo.evaluation.tasks import TextTask
from rondo.evaluation.texts import read_text
from rondo.modeling.exits_recurrent import CRITERIA, ExitRule
from rondo.provenance import choose_device, choose_dtype, hardware, read_json, record, write_json

FILE = "calibration.json"


def calibrate_rule(criterion: str, chosen: Half, tried: Half) -> Json:
    """Find a rule's threshold on one half of the documents, and try it on the other."""
    setup, measure, share = chosen.setup, chosen.measure, chosen.setup.config.share
    thresholds = exits.candidates(chosen.values[criterion], criterion)
    paper = exits.idealised(
        chosen.harm(chosen.said), chosen.values[criterion], thresholds,
        chosen.documents_N, len(chosen.documents),
    )  # fmt: skip
    increase, found = measure.increase(paper), dict[int, Executed]()

    def executed(level: int) -> float:
        tried_out = setup.rule(criterion, float(thresholds[level]))
        found[level] = execute(chosen, tried_out, f"{criterion}, choosing")
        return float(measure.increase(found[level].harm_D))

    level = exits.highest_that_holds(increase, share, executed)
    if level < 0:
        return {"criterion": criterion, "threshold": None, "executions": len(found)}
    own = found[level].harm_D
    shift = float(measure.increase(own) - increase[level])
    rule = setup.rule(criterion, float(thresholds[level]))
    result = execute(tried, rule, f"{criterion}, trying")
    return {
        "criterion": criterion,
        "threshold": rule.threshold,
        "threshold_interval": measure.thresholds_drawn(thresholds, paper, share, shift),
        "on_paper": float(increase[level]),
        "executions": len(found),
        "calibration": _known(measure.change(own)),
        "held_out": _known(change := tried.measure.change(result.harm_D)),
        "transfers": exits.transfers(change, share),
        "mean_recurrences": float(result.left_N.mean()),
        "left_at": (np.bincount(result.left_N, minlength=setup.depth + 1)[1:] / len(result.left_N))
        .tolist(),
        **_prices(rule, result, chosen, tried),
    }  # fmt: skip


def _prices(rule: ExitRule, result: Executed, chosen: Half, tried: Half) -> Json:
    """Hold what a rule spent on the held-out half against depths chosen without looking."""
    spent = tried.spent(rule, result.left_N)
    means = {how: float(spent_N.mean()) for how, spent_N in spent.items()}
    blind = {
        how: _against_blind(rule.criterion, how, result, tried.by_document(spent_N), tried)
        for how, spent_N in spent.items()
    }
    fixed = float(tried.costs[_shallowest(chosen) - 1])
    worse = {how for how, found in blind.items() if (found["high"] or 0) < 0}
    return {
        "flops_per_token": means,
        "flops_of_full": {how: mean / tried.costs[-1] for how, mean in means.items()},
        "pays": exits.pays(means, fixed, worse),
        "against_blind": blind,
    }


def _against_blind(criterion: str, how: str, result: Executed, spent_D: Array, tried: Half) -> Json:
    """Compare with the best mixture of two fixed depths that spends the same."""
    share = tried.setup.config.measure == "agreement"
    scale, weights = 100.0 if share else 1.0, tried.measure.weights
    better = -scale * tried.fixed
    mixture, _ = blind_mixture(better, tried.costs, spent_D, weights)
    measured = Measured(
        task="",
        depths=tuple(range(1, tried.setup.depth + 1)),
        better=better,
        weights=weights,
        flops=tuple(tried.costs),
        num_items=len(weights),
        sign=-1,
        unit="points" if share else "nats per token",
        scale=scale,
    )
    gap = paired_bootstrap(-scale * result.harm_D, mixture, weights)
    than = f"the best input-blind mixture of two depths of equal cost in {how}"
    found = compare("", f"The {criterion} exit", than, gap, measured)
    return _known(gap) | {"sentence": found.sentence}


def _shallowest(half: Half) -> int:
    """Return the shallowest fixed depth within the tolerance, the full one at most."""
    held = half.measure.increase(half.fixed) <= half.setup.config.share
    return int(held.argmax()) + 1


def _known(gap: Difference) -> Json:
    return {"value": gap.value, "low": finite(gap.low), "high": finite(gap.high)}


def halves(documents: Sequence[list[int]], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Split documents in two by their content, each once: a copy tells nothing of other texts."""
    by_hash = {hashlib.sha256(f"{seed} {ids}".encode()).hexdigest(): ids for ids in documents}
    ordered = [by_hash[key] for key in sorted(by_hash)]
    return ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]


def prepare(config: CalibrateConfig) -> tuple[Setup, list[Json], list[list[int]]]:
    """Load model and texts, and refuse what cannot be calibrated.

    Returns:
        The setup, what is said of each text, and the documents' tokens.

    Raises:
        UserError: Model, texts and settings do not go together.
    """
    if not Path(config.model).is_dir():
        raise UserError(f"thresholds are stored in the checkpoint, and {config.model} is none here")
    directory, device = locate(config.model), choose_device(config.device)
    fields = read_json(directory / "config.json")
    if fields.get("model_type") != "rondo":
        raise UserError(f"{config.model} is not a recurrent model: convert it first")
    depth = config.max_recurrences or fields["num_recurrences"]
    if not config.min_recurrences < depth <= fields["max_recurrences"]:
        raise UserError(
            f"the full depth of {depth} must lie above --min-recurrences {config.min_recurrences}, "
            f"and at most at the model's cap of {fields['max_recurrences']}: choose it with "
            "--max-recurrences"
        )
    stored, rules = fields.get("exit_rules") or {}, criteria(config, bool(fields.get("exit_gate")))
    there = [rule for rule in rules if key_of(config) in stored.get(rule, {})]
    if there and not config.overwrite:
        raise UserError(
            f"{config.model} has thresholds of {', '.join(there)} for {key_of(config)} already: "
            "add --overwrite"
        )
    dtype: Any = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    settings = EvalConfig(
        model=config.model, recurrences=(depth,), limit=config.limit, seq_len=config.seq_len,
        dtype=dtype,
    )  # fmt: skip
    subject = load_subject(directory, settings, device)
    texts = [read_text(TextTask("loss", spec), subject, settings) for spec in config.data]
    documents = [passage.ids for text in texts for passage in text.passages]
    return Setup(subject, depth, config), [text.described for text in texts], documents


def criteria(config: CalibrateConfig, gated: bool) -> tuple[str, ...]:
    """Return the rules to calibrate.

    Raises:
        UserError: The gate is asked for and the model has none.
    """
    if "gate" in config.criteria and not gated:
        raise UserError(
            f"{config.model} has no exit gate: train one with rondo train --mode gate, or leave "
            "gate out of --criteria"
        )
    has = [rule for rule in CRITERIA if gated or rule != "gate"]
    return tuple(rule for rule in has if rule in (config.criteria or has))


def key_of(config: CalibrateConfig) -> str:
    """Return under which name thresholds are stored."""
    return config.tolerance + ("" if config.measure == "loss" else " agreement")


@torch.inference_mode()
def calibrate(config: CalibrateConfig) -> Json:
    """Calibrate the exits of a checkpoint, and write nothing.

    Raises:
        UserError: Model, texts and settings do not go together.
    """
    setup, texts, documents = prepare(config)
    first, second = halves(documents, config.seed)
    if len(first) < 2:
        raise UserError(
            f"{' '.join(config.data)} holds {len(documents)} documents, too few for two halves: "
            "give 20 at least, of which intervals can be had"
        )
    rules = criteria(config, setup.subject.model.config.exit_gate)
    chosen = follow(setup, first, rules, "calibration half")
    tried = follow(setup, second, (), "held-out half")
    found = [calibrate_rule(rule, chosen, tried) for rule in rules]
    dtype = str(setup.subject.dtype).removeprefix("torch.")
    return {
        **record(config),
        "kind": "calibration",
        "conditions": {"device": hardware(setup.subject.device.type), "dtype": dtype},
        "texts": texts,
        "num_recurrences": setup.depth,
        "check_in_iterations": tried.check_in_iterations,
        "halves": {
            name: {
                "documents": len(half.documents),
                "tokens": len(half.documents_N),
                "loss": float(half.said.loss[-1].mean()),
            }
            for name, half in (("calibration", chosen), ("held_out", tried))
        },
        "fixed_within": _shallowest(chosen),
        "fixed": [
            {
                "num_recurrences": number + 1,
                "calibration": _known(chosen.measure.change(chosen.fixed[number])),
                "held_out": _known(tried.measure.change(tried.fixed[number])),
                "flops_per_token": float(tried.costs[number]),
                "flops_of_full": float(tried.costs[number] / tried.costs[-1]),
            }
            for number in range(setup.depth)
        ],
        "rules": found,
    }


def store(results: Json, config: CalibrateConfig) -> None:
    """Put the thresholds into the checkpoint's config.json, and the table beside it.

    Rules that got no threshold lose the one they had.
    """
    directory, key = locate(config.model), key_of(config)
    path = directory / FILE
    write_json(path, (read_json(path) if path.is_file() else {}) | {key: results})
    fields = read_json(directory / "config.json")
    stored = fields.get("exit_rules") or {}
    for rule in results["rules"]:
        entries = {
            name: one for name, one in stored.get(rule["criterion"], {}).items() if name != key
        }
        if rule["threshold"] is not None:
            entries[key] = _entry(rule, results, config)
        stored[rule["criterion"]] = entries
    fields["exit_rules"] = {rule: entries for rule, entries in stored.items() if entries} or None
    write_json(directory / "config.json", fields)


def _entry(rule: Json, results: Json, config: CalibrateConfig) -> Json:
    name = "loss_increase" if config.measure == "loss" else "disagreement"
    return {
        "criterion": rule["criterion"],
        "threshold": rule["threshold"],
        "min_recurrences": config.min_recurrences,
        "check_every": config.check_every,
        "max_recurrences": results["num_recurrences"],
        "cache_policy": config.cache_policy,
        name: [rule["held_out"][bound] for bound in ("value", "low", "high")],
        "mean_recurrences": rule["mean_recurrences"],
        "flops_of_full": rule["flops_of_full"],
        "pays": rule["pays"],
        "documents": [half["documents"] for half in results["halves"].values()],
        "date": results["date"],
    }


def table(results: Json) -> list[list[str]]:
    """Return the rows of a table of what the held-out half says, its header first."""
    lines = [["", "threshold", "95% interval", "change", "95% interval", "iterations",
              "decoding", "reading", "against blind", ""]]  # fmt: skip
    for row in results["fixed"]:
        cost, depth = f"{row['flops_of_full']:.0%}", row["num_recurrences"]
        note = "shallowest within" if depth == results["fixed_within"] else ""
        lines.append([f"r = {depth}", "", "", *_percent(row["held_out"]), f"{depth:.2f}", cost,
                      cost, "", note])  # fmt: skip
    for row in results["rules"]:
        if row["threshold"] is None:
            lines.append([row["criterion"], "none", *[""] * 7, "no threshold holds"])
            continue
        bounds, blind = row["threshold_interval"], row["against_blind"]["decoding"]
        lines.append([
            row["criterion"],
            f"{row['threshold']:.3g}",
            f"{bounds[0]:.3g} to {bounds[1]:.3g}" if bounds else "-",
            *_percent(row["held_out"]),
            f"{row['mean_recurrences']:.2f}",
            *(f"{row['flops_of_full'][how]:.0%}" for how in ("decoding", "reading")),
            f"{blind['value']:+.4f}",
            row["pays"],
        ])  # fmt: skip
    return lines


def _percent(change: Json) -> list[str]:
    """Write a change and its interval in percent."""
    known = change["low"] is not None
    around = f"{change['low']:+.2%} to {change['high']:+.2%}" if known else "-"
    return [f"{change['value']:+.2%}", around]


def sentences(results: Json, tolerance: str) -> Iterator[str]:
    """Say of each rule whether it transfers, what it spends, and what it must be held against."""
    full, within = results["num_recurrences"], results["fixed_within"]
    fixed = f"{results['fixed'][within - 1]['flops_of_full']:.0%}"
    for row in results["rules"]:
        name = row["criterion"]
        if row["threshold"] is None:
            yield f"{name}: no threshold above 0 keeps within {tolerance}; none is stored."
            continue
        change, around = _percent(row["held_out"])
        around = "too few documents for an interval" if around == "-" else f"95% interval {around}"
        cost, shares = row["flops_of_full"], enumerate(row["left_at"], 1)
        left = ", ".join(f"r = {depth}: {part:.0%}" for depth, part in shares if part)
        yield (
            f"{name}: {change} on held-out text ({around}), {tolerance} allowed: "
            f"{row['transfers']}. It {row['pays']}: {cost['decoding']:.0%} of the FLOPs of "
            f"r = {full} in decoding and {cost['reading']:.0%} in reading, where the fixed depth "
            f"r = {within} keeps the tolerance for {fixed}. Tokens leave at {left}. "
            f"{row['against_blind']['decoding']['sentence']}"
        )


def run(config: CalibrateConfig) -> None:
    """Run `rondo calibrate`.

    Raises:
        UserError: Model, texts and settings do not go together, or memory is too small.
    """
    try:
        results = calibrate(config)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device's memory is too small: give a smaller --batch-size or --seq-len, or "
            "--device cpu"
        ) from error
    store(results, config)
    if config.json_output:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return
    lines, (first, second) = table(results), results["halves"].values()
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    what = "loss" if config.measure == "loss" else "of the best tokens"
    print(
        f"{config.model}: exits within {config.tolerance} {what} of r = "
        f"{results['num_recurrences']}, chosen on {first['documents']} documents "
        f"({first['tokens']} tokens), measured on {second['documents']} others "
        f"({second['tokens']} tokens, {second['loss']:.4f} nats each); "
        f"FLOPs as shares of the full depth's, a check of the logits costs "
        f"{results['check_in_iterations']:.1f} iterations"
    )
    for cells in lines:
        print(
            "  " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        )
    print("\n".join(sentences(results, config.tolerance)))
    names = [row["criterion"] for row in results["rules"] if row["threshold"] is not None]
    where = f"exit_rules of {config.model}/config.json, as {key_of(config)!r}"
    print(f"{', '.join(names) or 'no rule'} stored in {where}; {FILE} beside it", file=sys.stderr)
