"""What a finished run leaves: a checkpoint like the one it began with, its card and its facts."""

import shutil
from pathlib import Path
from typing import Any

import torch

from rondo import processes, provenance
from rondo.config import command_line
from rondo.loading import copy_code
from rondo.training import adapters, distributed
from rondo.training.setup import Run

# Files that hold weights of what the run began with, whatever their format.
WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack"}


@torch.no_grad()
def write_final(run: Run) -> None:
    """Write final/: weights (their average, if one was kept), code, tokenizer, card, run.json."""
    if run.ema is not None:
        for name, parameter in distributed.trainable(run.model).items():
            parameter.copy_(run.ema[name])
    state = distributed.whole_state(run.model)
    if run.config.lora.rank:
        state = adapters.folded(state, run.config.lora)
    if run.world.first:
        _write(run, state)
    processes.barrier(run.world)


def _write(run: Run, state: dict[str, torch.Tensor]) -> None:
    with provenance.staged(run.directory / "final") as partial:
        run.model.save_pretrained(partial, state_dict=state)
        written = {path.name for path in partial.iterdir()}
        for path in run.model_directory.iterdir():
            if path.is_file() and path.name not in written and not set(path.suffixes) & WEIGHTS:
                shutil.copyfile(path, partial / path.name)
        if run.config.mode != "static":
            copy_code(partial)  # not the code of an older checkpoint
        _describe(run, partial)


def _describe(run: Run, partial: Path) -> None:
    before = provenance.read_json(Path(run.config.model) / "run.json")
    training = training_facts(run, before)
    (partial / "README.md").write_text(model_card(run, training), encoding="utf-8")
    facts = {
        "kind": "train",
        "parent": before["parent"],
        "plan": before["plan"] if run.config.mode != "static" else None,
        "history": [*before.get("history", [before["command"]]), command_line(run.config)],
    }
    if run.config.mode == "gate":
        # The weights that answer are those of before, and so is what was spent on them.
        facts |= {key: before[key] for key in ("training",) if key in before} | {"gate": training}
    else:
        facts["training"] = training
    provenance.write_json(partial / "run.json", provenance.record(run.config, **facts))


def model_card(run: Run, training: dict[str, Any]) -> str:
    """Return the README.md of a trained checkpoint."""
    facts = "\n".join(f"| {key} | {value} |" for key, value in training.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [rondo]\n---\n"
        f"# Trained from {run.config.model}\n\n| training | |\n|---|---|\n{facts}\n\n"
        "What depth buys is measured, not assumed: `rondo eval` this directory beside its parent "
        "and its static twin. Conversion and commands are in `run.json`.\n"
    )


def training_facts(run: Run, before: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says about the training of a model with this run.json."""
    config, progress, setting = run.config, run.progress, run.config.recurrence
    loss, recurrence = config.loss.kind, f"{setting.distribution} {setting.mean}"
    if config.mode == "static":
        loss, recurrence = "last", "none"
    elif config.mode == "gate":
        loss, recurrence = "gate", f"fixed {setting.mean}"
    sources = run.rows.facts
    # What began with random weights stays their twin.
    random = config.mode == "recurrent" and before.get("training", {}).get("mode") == "random"
    return {
        "mode": "random" if random else config.mode,
        "tokens": progress.tokens,
        "steps": progress.step,
        "flops": progress.flops,
        "flops_paper": progress.flops_paper,
        "seconds": round(progress.seconds, 1),
        "loss": loss,
        "recurrence": recurrence,
        "optimizer": config.optimizer.name,
        "lr": config.optimizer.lr,
        "seed": config.seed,
        "data": ", ".join(source["name"] for source in sources),
        "data_sha256": ", ".join(str(source["sha256"]) for source in sources),
        "dtype": str(run.dtype).removeprefix("torch."),
        "num_processes": run.world.size,
        "skipped_steps": progress.skipped,
        "rollbacks": progress.rollbacks,
    }
