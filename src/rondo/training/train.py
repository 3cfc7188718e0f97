"""The training loop: one process, top to bottom.

Depth, data and initial noise of a step are functions of the seed and the step alone, so a run
that was stopped repeats what it would have done. The same loop trains the static twin: the
parent itself, from the parent's own weights, on the same rows.
"""

import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rondo import provenance
from rondo.config import TrainConfig, command_line
from rondo.errors import UserError
from rondo.training import checkpoint, losses, optim
from rondo.training.budget import MicroBatch, micro_batch, step_flops
from rondo.training.metrics import Metrics
from rondo.training.recurrence import step_generator
from rondo.training.setup import Progress, Run, setup

# A run whose every step is refused is not saved by patience.
MAX_SKIPPED_IN_A_ROW = 20


def micro_loss(
    run: Run, batch: MicroBatch, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a micro-batch minimises and the loss of its last iteration."""
    inputs, labels = rows[:, :-1].to(run.device), rows[:, 1:].to(run.device)
    # Without the cache: weights cast under no_grad for the first iterations would be reused in
    # the last ones, cut off from their gradient (pytorch/pytorch#65766).
    mixed = (
        nullcontext()
        if run.dtype == torch.float32
        else torch.autocast(run.device.type, run.dtype, cache_enabled=False)
    )
    with mixed:
        if run.config.mode == "static":
            logits = run.model(inputs, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            return loss, loss
        output = run.model.model(
            inputs,
            num_recurrences=batch.depth.num_recurrences,
            backprop_depth=batch.depth.backprop_depth,
            output_recurrences=() if batch.shallow is None else (batch.shallow,),
            state_seed=batch.state_seed,
        )
        last = losses.next_token_loss(output.last_hidden_state, labels, run.model.logits)
        shallow = None
        if batch.shallow is not None:
            shallow = losses.next_token_loss(output.branches[0], labels, run.model.logits)
        return losses.combine(last, shallow, run.config.deep_weight), last


def train_step(run: Run) -> dict[str, Any]:
    """Make one optimizer step and return its metrics."""
    config, progress, started = run.config, run.progress, time.perf_counter()
    num_micro = config.global_batch_size // config.micro_batch_size
    objective = last_loss = 0.0
    depths = []
    for micro_step in range(num_micro):
        batch = micro_batch(config, run.cap, progress.step, micro_step, run.total_steps)
        # A parent's dropout draws from torch's own stream, which is thus a function of the step.
        generator = step_generator(config.seed, progress.step, micro_step)
        torch.manual_seed(generator.initial_seed())
        first = progress.rows + micro_step * config.micro_batch_size
        loss, last = micro_loss(run, batch, run.rows.batch(first, config.micro_batch_size))
        (loss / num_micro).backward()
        objective += float(loss.detach()) / num_micro
        last_loss += float(last.detach()) / num_micro
        depths.append(batch.depth.num_recurrences)
    grad_norm = float(
        nn.utils.clip_grad_norm_(run.model.parameters(), config.optimizer.max_grad_norm)
    )
    factor = optim.learning_rate_factor(
        progress.step,
        run.total_steps,
        config.optimizer.warmup_fraction,
        config.optimizer.decay_fraction,
    )
    finite = math.isfinite(grad_norm) and math.isfinite(objective)
    if finite:
        optim.set_learning_rate(run.optimizers, factor)
        for optimizer in run.optimizers:
            optimizer.step()
    run.model.zero_grad(set_to_none=True)
    tokens = config.global_batch_size * config.seq_len
    progress.flops += step_flops(config, run.costs, run.cap, progress.step, run.total_steps)
    progress.step += 1
    progress.rows += config.global_batch_size
    progress.tokens += tokens
    progress.skipped += not finite
    progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
    seconds = time.perf_counter() - started
    progress.seconds += seconds
    return {
        "step": progress.step,
        "train/loss": last_loss if finite else str(last_loss),
        "train/objective": objective if finite else str(objective),
        "train/grad_norm": grad_norm if finite else str(grad_norm),
        "train/skipped": not finite,
        "train/lr_factor": factor,
        "train/recurrence": sum(depths) / len(depths),
        "train/tokens": progress.tokens,
        "train/flops": progress.flops,
        "perf/seconds": progress.seconds,
        "perf/tokens_per_s": tokens / seconds,
    }


@contextmanager
def stop_at_step_end() -> Iterator[list[int]]:
    """Turn Ctrl-C and SIGTERM into a wish that the loop honours between two steps.

    A second Ctrl-C stops at once; the last saved state is whole all the same.
    """
    wishes: list[int] = []

    def wish(number: int, frame: Any) -> None:
        if wishes and number == signal.SIGINT:
            raise KeyboardInterrupt
        wishes.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, wish) for number in signals]
    try:
        yield wishes
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def save(run: Run) -> None:
    """Save a state to resume from."""
    checkpoint.save_state(
        run.directory,
        run.progress.step,
        run.model,
        run.optimizers,
        asdict(run.progress),
        run.config.keep_last,
    )


def loop(run: Run) -> None:
    """Train until the last step.

    Raises:
        UserError: Step after step gave a non-finite loss or gradient.
        KeyboardInterrupt: The user stopped; the state is saved.
    """
    metrics = Metrics(run.directory, run.progress.step, run.total_steps)
    try:
        with stop_at_step_end() as wishes:
            while run.progress.step < run.total_steps:
                metrics.write(train_step(run))
                if run.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                    raise UserError(
                        f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a non-finite loss or gradient; "
                        "no such step reached the weights. Lower the learning rate and start anew"
                    )
                if wishes or run.progress.step % run.config.save_every == 0:
                    save(run)
                if wishes:
                    raise KeyboardInterrupt
    finally:
        metrics.close()


def write_final(run: Run) -> None:
    """Write final/, a checkpoint like the one the run began with, and its run.json."""
    final = run.directory / "final"
    partial = run.directory / ".final"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    run.model.save_pretrained(partial)
    weights = {path.name for path in partial.iterdir()}
    for path in run.model_directory.iterdir():
        skipped = path.name.startswith("model") and ".safetensors" in path.name
        if path.is_file() and path.name not in weights and not skipped:
            shutil.copyfile(path, partial / path.name)
    (partial / "README.md").write_text(model_card(run), encoding="utf-8")
    before = provenance.read_json(Path(run.config.model) / "run.json")
    facts = {
        "kind": "train",
        "parent": before["parent"],
        "plan": before["plan"] if run.config.mode == "recurrent" else None,
        "history": [*before.get("history", [before["command"]]), command_line(run.config)],
        "training": training_facts(run),
    }
    provenance.write_json(partial / "run.json", provenance.record(run.config, **facts))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def model_card(run: Run) -> str:
    """Return the README.md of a trained checkpoint."""
    facts = "\n".join(f"| {key} | {value} |" for key, value in training_facts(run).items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [rondo]\n---\n"
        f"# Trained from {run.config.model}\n\n| training | |\n|---|---|\n{facts}\n\n"
        "What depth buys is measured, not assumed: `rondo eval` this directory beside its parent "
        "and its static twin. Conversion and commands are in `run.json`.\n"
    )


def training_facts(run: Run) -> dict[str, Any]:
    """Return what a report says about the training."""
    config, progress, setting = run.config, run.progress, run.config.recurrence
    return {
        "mode": config.mode,
        "tokens": progress.tokens,
        "steps": progress.step,
        "flops": progress.flops,
        "seconds": round(progress.seconds, 1),
        "loss": config.loss if config.mode == "recurrent" else "last",
        "recurrence": f"{setting.distribution} {setting.mean}"
        if config.mode == "recurrent"
        else ("none"),
        "optimizer": config.optimizer.name,
        "lr": config.optimizer.lr,
        "seed": config.seed,
        "data": run.data["name"],
        "data_sha256": run.data["sha256"],
        "dtype": str(run.dtype).removeprefix("torch."),
        "skipped_steps": progress.skipped,
    }


def resumed_config(config: TrainConfig) -> TrainConfig:
    """Return the config to go on with: `rondo train RUN --resume` takes the run's own.

    Raises:
        UserError: The run was made with other settings.
    """
    given = Path(config.model)
    if config.resume and (given / "run.json").is_file():
        facts = provenance.read_json(given / "run.json")
        if facts.get("kind") == "run":
            stored: dict[str, Any] = facts["config"]
            asked = config.model_dump(
                exclude_defaults=True, exclude={"model", "output_dir", "resume"}
            )
            if asked:
                raise UserError(
                    f"{given} goes on with its own settings: leave out {', '.join(sorted(asked))}"
                )
            stored |= {"output_dir": str(given), "resume": True}
            return TrainConfig(**stored)
    return config


def check_same_run(config: TrainConfig, directory: Path) -> None:
    """Refuse to go on with a run under other settings, which would be neither run.

    Raises:
        UserError: Settings differ, by name.
    """
    stored = provenance.read_json(directory / "run.json")["config"]
    free = {"output_dir", "resume", "overwrite", "save_every", "keep_last", "device"}
    now = config.model_dump(mode="json")
    changed = sorted(key for key in now if key not in free and now[key] != stored.get(key))
    if changed:
        raise UserError(
            f"{directory} was begun with another {', '.join(changed)}: resume with the same "
            "settings, or start anew with --overwrite"
        )


def prepare_directory(config: TrainConfig) -> Path:
    """Return the run's directory, ready to begin or to go on in.

    Raises:
        UserError: It exists and is neither to be resumed nor replaced.
    """
    directory = Path(config.output_dir)
    begun = (directory / "run.json").is_file()
    if config.resume and begun:
        check_same_run(config, directory)
        return directory
    provenance.claim_directory(config.output_dir, config.overwrite, spare=config.model)
    return directory


def begin(run: Run) -> None:
    """Create or restore the run's directory and state."""
    states = checkpoint.step_directories(run.directory)
    if run.config.resume and states:
        stored = provenance.read_json(run.directory / "run.json")
        if stored["data"]["sha256"] != run.data["sha256"]:
            raise UserError(
                f"the text {run.data['path']} has changed since {run.directory} was begun: put it "
                "back, or start anew with --overwrite"
            )
        # What was measured or laid out at the start holds to the end.
        run.total_steps, run.dtype = stored["total_steps"], getattr(torch, stored["dtype"])
        state = checkpoint.load_state(states[-1], run.model, run.optimizers)
        run.progress = Progress(**state)
        print(f"resumed from step {run.progress.step} of {run.total_steps}")
        return
    shutil.rmtree(run.directory, ignore_errors=True)
    run.directory.mkdir(parents=True)
    facts = {
        "kind": "run",
        "data": run.data,
        "total_steps": run.total_steps,
        "dtype": str(run.dtype).removeprefix("torch."),
    }
    provenance.write_json(run.directory / "run.json", provenance.record(run.config, **facts))


def run(config: TrainConfig) -> None:
    """Run `rondo train`.

    Raises:
        UserError: Something the user can mend.
        KeyboardInterrupt: The user stopped; the state is saved.
    """
    config = resumed_config(config)
    directory = prepare_directory(config)
    if config.resume and (directory / "final" / "run.json").is_file():
        print(f"{config.output_dir} is finished already: {directory / 'final'}")
        return
    torch.manual_seed(config.seed)
    this = setup(config)
    begin(this)
    tokens = this.total_steps * config.global_batch_size * config.seq_len
    print(
        f"{config.mode}: {this.total_steps} steps of {config.global_batch_size} x "
        f"{config.seq_len} tokens ({tokens:,}), {this.data['name']} text of "
        f"{this.data['tokens']:,} tokens, {this.device} in {this.dtype}"
    )
    try:
        loop(this)
    except KeyboardInterrupt:
        print(
            f"stopped after step {this.progress.step}; go on with: rondo train "
            f"{config.output_dir} --resume"
        )
        raise
    write_final(this)
    print(
        f"wrote {directory / 'final'}: {this.progress.tokens:,} tokens, "
        f"{this.progress.flops:.3g} FLOPs, {this.progress.seconds:.0f} s"
    )
