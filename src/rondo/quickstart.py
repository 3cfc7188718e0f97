"""The whole chain on a real model. Each step is an ordinary command, shown as it is run."""

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rondo import cli, report, verdict
from rondo.config import (
    BudgetConfig,
    Config,
    ConvertConfig,
    DequantizeConfig,
    EvalConfig,
    GenerateConfig,
    OptimizerConfig,
    ProbeConfig,
    QuickstartConfig,
    RecurrenceConfig,
    ReportConfig,
    TrainConfig,
    command_line,
)
from rondo.errors import ProofError, UserError
from rondo.provenance import read_json, record, write_json

PROMPT = (
    "Question: Tom has 3 boxes with 4 apples each. He eats 2 apples. How many are left?\nAnswer:"
)
# Training runs at about this multiple of the rate of the short forward passes that were timed.
TRAINING_RATE = 1.1


@dataclass(frozen=True)
class Step:
    """One command of the chain.

    Attributes:
        title: What it does, in a few words.
        config: The command's settings.
        product: A file that exists once it is done; None where it only prints.
    """

    title: str
    config: Config
    product: Path | None

    @property
    def done(self) -> bool:
        """Whether an earlier run has done it."""
        return self.product is not None and self.product.is_file()


def steps(config: QuickstartConfig) -> Iterator[Step]:
    """Yield the chain, step by step; later steps read what earlier ones wrote."""
    out = Path(config.output_dir)
    # Under the model's own name, by which the report calls it.
    parent, recurrent = out / parent_name(config.source), out / "recurrent"
    if config.source == "smollm2" or config.source.endswith(".gguf"):
        yield Step(
            "take the parent out of its GGUF file",
            DequantizeConfig(source=config.source, output_dir=str(parent)),
            parent / "config.json",
        )
    else:
        parent = Path(config.source)
    yield Step(
        "probe: which layers can be looped",
        ProbeConfig(source=str(parent), output_dir=str(out / "probe"), tokens=1024),
        out / "probe" / "probe.json",
    )
    yield Step(
        "convert, and prove it",
        ConvertConfig(
            source=str(parent),
            output_dir=str(recurrent),
            split="auto",
            probe=str(out / "probe"),
            seed=config.seed,
        ),
        recurrent / "run.json",
    )
    yield evaluation(out, parent, "parent", config.seed)
    yield evaluation(out, recurrent, "before", config.seed)
    yield from training(config, out, recurrent)
    yield evaluation(out, out / "train" / "final", "after", config.seed)
    yield evaluation(out, out / "static" / "final", "static", config.seed)
    results = tuple(str(out / "eval" / name) for name in ("parent", "before", "static", "after"))
    yield Step(
        "report",
        ReportConfig(results=results, output_dir=str(out / "report"), overwrite=True),
        None,
    )
    yield Step(
        "generate: one prompt, four depths, one batch",
        GenerateConfig(
            model=str(out / "train" / "final"),
            prompt=PROMPT,
            recurrences=(1, 2, 4, 8),
            max_new_tokens=48,
            seed=config.seed,
        ),
        None,
    )


def parent_name(source: str) -> str:
    """Return the name of the directory a parent is taken out into."""
    return "SmolLM2-135M-Instruct" if source == "smollm2" else Path(source).stem


def training(config: QuickstartConfig, out: Path, recurrent: Path) -> Iterator[Step]:
    """Yield the two trainings: the recurrent model, and its twin for the same FLOPs."""
    common: dict[str, Any] = {
        "model": str(recurrent),
        "recurrence": RecurrenceConfig(distribution="uniform", mean=2, minimum=1),
        "optimizer": OptimizerConfig(lr=1e-4),
        "seed": config.seed,
        "resume": True,
    }
    yield Step(
        "train the recurrent model",
        TrainConfig(
            **common,
            output_dir=str(out / "train"),
            budget=BudgetConfig(flops=budget(config, out)),
        ),
        out / "train" / "final" / "run.json",
    )
    yield Step(
        "train the static twin with the same training FLOPs",
        TrainConfig(
            **common,
            output_dir=str(out / "static"),
            mode="static",
            budget=BudgetConfig(like=str(out / "train")),
        ),
        out / "static" / "final" / "run.json",
    )


def evaluation(out: Path, model: Path, name: str, seed: int) -> Step:
    """Return the step that measures one model."""
    directory = out / "eval" / name
    return Step(
        f"evaluate: {name}",
        EvalConfig(
            model=str(model),
            output_dir=str(directory),
            data=("math-test",),
            recurrences=(1, 2, 3, 4, 6, 8),
            limit=32,
            seq_len=256,
            seeds=(seed,),
            resume=True,
        ),
        directory / "results.json",
    )


def budget(config: QuickstartConfig, out: Path) -> float:
    """Return training FLOPs for half of the minutes at this machine's measured rate.

    A run that has begun keeps its own budget, so that going on is the same command.
    """
    begun = out / "train" / "run.json"
    if begun.is_file():
        return read_json(begun)["config"]["budget"]["flops"]
    (before,) = read_json(out / "eval" / "before" / "results.json")["results"]
    rate = max(1000 * row["flops_per_token"] / row["ms_per_token"] for row in before["rows"])
    return float(f"{rate * TRAINING_RATE * 60 * config.minutes / 2:.2g}")


def run(config: QuickstartConfig) -> None:
    """Run `rondo quickstart`.

    Raises:
        UserError: A step found something the user can mend.
        ProofError: The conversion is not faithful.
        KeyboardInterrupt: The user stopped; the next run goes on from there.
    """
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    remember(config, out)
    seconds: dict[str, float] = {}
    if (out / "times.json").is_file():
        seconds = read_json(out / "times.json")["seconds"]
    for number, step in enumerate(steps(config), 1):
        command = command_line(step.config)
        if step.done:
            print(f"\n[{number}] {step.title}: done before\n    $ {command}", flush=True)
            continue
        print(f"\n[{number}] {step.title}\n    $ {command}", flush=True)
        start = time.perf_counter()
        code = cli.main(shlex.split(command)[1:])
        stopped = code == 0 and step.product is not None and not step.done
        if code == 130 or stopped:
            print(f"the next `{command_line(config)}` goes on from here")
            raise KeyboardInterrupt
        if code:
            error = UserError if code == 2 else ProofError
            raise error(f"step {number} ({step.title}) did not succeed; see above")
        seconds[step.title] = round(seconds.get(step.title, 0) + time.perf_counter() - start, 1)
        write_json(out / "times.json", {"seconds": seconds})
    conclude(out, seconds)


def remember(config: QuickstartConfig, out: Path) -> None:
    """Write down the settings of the chain, and refuse to go on with others.

    Raises:
        UserError: The directory holds a chain of other settings, whose parts would be mixed.
    """
    settings = config.model_dump(mode="json", exclude={"output_dir"})
    file = out / "run.json"
    if not file.is_file():
        write_json(file, record(config, kind="quickstart", settings=settings))
    elif read_json(file).get("settings") != settings:
        raise UserError(
            f"{out} was made with other settings: choose another --output-dir, or delete it"
        )


def conclude(out: Path, seconds: dict[str, float]) -> None:
    """Say what was gained, and what was not."""
    names = ("parent", "before", "static", "after")
    results = report.load([str(out / "eval" / name) for name in names])
    print(f"\nWhat was gained ({sum(seconds.values()) / 60:.1f} minutes in all):")
    for line in verdict.verdict(results):
        print(f"  - {line}")
    print(f"\nOpen {out / 'report' / 'report.html'} in a browser.")
