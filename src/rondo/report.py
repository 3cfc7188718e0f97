"""Report: directories with a results.json -> report.html, report.md with SVG, results.csv.

Every number comes from the results. The page is one file that loads nothing from anywhere; what
it says in words comes from `rondo.verdict`, what it draws from `rondo.plots`.
"""

import csv
import html
import importlib.resources
import io
import json
import re
import shlex
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rondo.config import ReportConfig
from rondo.errors import UserError
from rondo.verdict import Json, Judgement, caveats, judge, subject
from rondo.verdict import verdict as verdict

FORMAT_VERSION = 1
_KEYS = ("model", "conditions", "datasets", "rows", "documents")
_MODEL = ("role", "stage", "parent", "path", "parameters", "injection", "state_init")
_TRAINING = ("mode", "tokens", "steps", "flops", "seconds", "loss", "recurrence", "seed", "data")
_CONDITIONS = ("seed", "seq_len", "dtype", "device", "date", "git", "command")
# What answers begin with ("No" last, as others begin with it), and the style of each.
_ANSWERS = {"Yes": "yes", "Not shown": "open", "Not known": "open", "No": "no"}
_COLUMNS = (
    "model",
    "dataset",
    "r",
    "loss \u00b1 stderr",
    "bits/byte",
    "FLOPs/token",
    "KV bytes/token",
    "ms/token",
    "training tokens",
    "training FLOPs",
    "seed",
    "dtype",
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: still for Markdown, and in the variants between which the page switches."""

    kind: str
    file: str
    svg: str
    specs: Json


@dataclass(frozen=True, slots=True)
class Page:
    """What the report says, in plain text, whatever it is written in."""

    title: str
    split: Json | None
    story: list[str]
    judgements: list[Judgement]
    caveats: list[str]
    figures: list[Figure]
    table: list[Sequence[str]]
    datasets: list[str]
    models: dict[str, dict[str, str]]
    commands: list[str]


def run(config: ReportConfig) -> None:
    """Write the report of the given results.

    Raises:
        UserError: The results cannot be read or compared, or the output exists.
    """
    output_dir = Path(config.output_dir)
    if output_dir.is_file():
        raise UserError(f"{output_dir} is a file; name a directory with --output-dir")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not config.overwrite:
        raise UserError(f"{output_dir} exists; pass --overwrite or name another --output-dir")
    results = load(config.results)
    title = ["--title", config.title] if config.title else []
    words = ["rondo", "report", *config.results, "--output-dir", config.output_dir, *title]
    # All is built before anything is written, so that a failure leaves nothing half-done.
    files = build(results, config.title, shlex.join(words))
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (output_dir / name).write_text(text, encoding="utf-8")


def load(directories: Sequence[str]) -> list[Json]:
    """Read the results of one or more `rondo eval`, and make sure that they can be compared.

    Raises:
        UserError: A directory or file is missing or unreadable, or the documents differ.
    """
    if not directories:
        raise UserError("no results given; name directories written by rondo eval")
    results = [_read(Path(directory)) for directory in directories]
    labels: list[str] = []
    for directory, result in zip(directories, results, strict=True):
        _check_same_documents(results[0], result, directories[0], directory)
        label = str(result["model"]["label"])
        labels.append(label)
        # Lines of the same name would merge in the figures.
        if (count := labels.count(label)) > 1:
            result["model"]["label"] = f"{label} ({count})"
    return results


def build(results: Sequence[Json], title: str | None, command: str) -> dict[str, str]:
    """Return the text of every file of the report by its name."""
    # Here, so that a verdict can be had without the extra that figures need.
    from rondo import plots

    rows = flatten(results)
    figures: list[Figure] = []
    for number, dataset in enumerate(results[0]["datasets"], 1):
        here = [row for row in rows if row["dataset"] == dataset]
        name = f"{number}-{re.sub(r'[^a-z0-9]+', '-', dataset.lower()).strip('-')[:40]}"
        # On one scale the step that training makes would flatten what depth does.
        for stage in ("after", "before"):
            at_stage = [row for row in here if row["stage"] == stage]
            charts = {
                f"{x}|{y}": plots.depth_chart(at_stage, y, x)
                for x in plots.X_AXES
                for y in plots.Y_AXES
                if plots.can_draw(at_stage, y, x)
            }
            if charts:
                figures.append(_figure("depth", f"depth-{name}-{stage}.svg", charts))
        if plots.can_draw(here):
            charts = {"": plots.compute_chart(here)}
            figures.append(_figure("compute", f"compute-{name}.svg", charts))
    page = Page(
        title=title or f"What depth buys {subject(results)['model']['parent']}",
        split=subject(results)["model"]["split"],
        story=_story(results),
        judgements=judge(results),
        caveats=caveats(results),
        figures=figures,
        table=[_COLUMNS, *map(_cells, rows)],
        datasets=_datasets(results),
        models=_models(rows),
        commands=_commands(results, command),
    )
    return {
        "report.html": _html(page, plots.javascript()),
        "report.md": _markdown(page),
        "results.csv": _csv(rows),
        **{figure.file: figure.svg for figure in figures},
    }


def _figure(kind: str, file: str, charts: Json) -> Figure:
    from rondo import plots

    svg = plots.to_svg(next(iter(charts.values())))
    return Figure(kind, file, svg, {name: plots.to_spec(c) for name, c in charts.items()})


def flatten(results: Iterable[Json]) -> list[Json]:
    """Return every row of every result with all its conditions, each as one flat dict."""
    rows = []
    for result in results:
        model, conditions = result["model"], result["conditions"]
        training = model["training"] or {}
        facts = {"model": model["label"]}
        facts |= {key: model[key] for key in _MODEL}
        facts |= {f"training_{key}": training.get(key) for key in _TRAINING}
        facts |= {key: conditions[key] for key in _CONDITIONS}
        facts["versions"] = ", ".join(f"{k} {v}" for k, v in conditions["versions"].items())
        for row in result["rows"]:
            dataset = result["datasets"][row["dataset"]]
            text = {f"dataset_{key}": dataset[key] for key in ("documents", "tokens", "sha256")}
            rows.append({"model": model["label"]} | row | facts | text)
    return rows


def _read(directory: Path) -> Json:
    path = directory / "results.json"
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; name directories written by rondo eval")
    if not path.is_file():
        raise UserError(f"{directory} holds no results.json; run rondo eval to write one")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); run rondo eval again") from error
    version = result.get("format_version") if isinstance(result, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}, not {FORMAT_VERSION}; run rondo eval again"
        )
    if missing := [key for key in _KEYS if not result.get(key)]:
        raise UserError(f"{path} lacks {', '.join(missing)}; run rondo eval again")
    return result


def _check_same_documents(first: Json, other: Json, first_name: str, other_name: str) -> None:
    hashes = [{k: v["sha256"] for k, v in result["datasets"].items()} for result in (first, other)]
    tokens = [{k: v["tokens"] for k, v in result["documents"].items()} for result in (first, other)]
    if hashes[0] != hashes[1] or tokens[0] != tokens[1]:
        raise UserError(
            f"{other_name} was evaluated on other documents ({', '.join(hashes[1])}) than "
            f"{first_name} ({', '.join(hashes[0])}); run rondo eval on both with the same data"
        )


def _story(results: Sequence[Json]) -> list[str]:
    """Tell what was converted, and what was trained at what cost."""
    model = subject(results)["model"]
    story = [f"{model['parent']} was evaluated; nothing was converted."]
    if model["split"]:
        story = [
            f"{model['parent']} was made depth-recurrent: its layers "
            f"{_ranges(model['split']['core'])} became the core, which runs r times "
            f"({model['injection']} injection, state starts from {model['state_init']}, "
            f"{model['parameters']:,} parameters)."
        ]
    for result in results:
        if training := result["model"]["training"]:
            depth = f", recurrence: {training['recurrence']}" if result["model"]["split"] else ""
            story.append(
                f"{result['model']['label']}: {training['mode']} training on "
                f"{training['tokens']:,} tokens of {training['data']} in {training['steps']:,} "
                f"steps, {_si(training['flops'])} FLOPs, {training['seconds']:,.0f} s (loss: "
                f"{training['loss']}{depth}, seed {training['seed']})."
            )
    return story


def _csv(rows: Sequence[Json]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cells(row: Json) -> list[str]:
    """Write one row of the table of numbers, in the order of the columns."""
    return [
        row["model"],
        row["dataset"],
        str(row["num_recurrences"]),
        f"{_number(row['value'], '.4f')} \u00b1 {_number(row['stderr'], '.4f')}",
        _number(row["bits_per_byte"], ".4f"),
        _si(row["flops_per_token"]),
        _number(row["kv_bytes_per_token"], ","),
        _number(row["ms_per_token"], ".3g"),
        _number(row["training_tokens"], ","),
        _si(row["training_flops"]),
        str(row["seed"]),
        row["dtype"],
    ]


def _models(rows: Sequence[Json]) -> dict[str, Json]:
    """Return each model's conditions, which all its rows share."""
    names = (*_MODEL, *(f"training_{key}" for key in _TRAINING), *_CONDITIONS, "versions")
    return {
        row["model"]: {
            name.replace("_", " "): _plain(row[name]) for name in names if row[name] is not None
        }
        for row in rows
    }


def _datasets(results: Sequence[Json]) -> list[str]:
    return [
        f"{name}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, "
        f"{facts['bytes']:,} bytes, {facts['path']}, sha256 {facts['sha256']}."
        for name, facts in results[0]["datasets"].items()
    ]


def _commands(results: Sequence[Json], command: str) -> list[str]:
    """List the commands that lead here, each once."""
    found = []
    for result in results:
        found += [*result["model"].get("history", []), result["conditions"]["command"]]
    return list(dict.fromkeys([*found, command]))


def _html(page: Page, javascript: str) -> str:
    template = importlib.resources.files("rondo").joinpath("report.html").read_text("utf-8")
    specs = json.dumps([figure.specs for figure in page.figures], allow_nan=False)
    return string.Template(template).substitute(
        title=html.escape(page.title),
        story=html.escape(page.story[0]),
        diagram=_diagram(page.split) if page.split else "",
        training=_list(page.story[1:]),
        verdict="".join(_judgement(*judgement) for judgement in page.judgements),
        caveats=_list(page.caveats),
        depth=_figures(page, "depth"),
        compute=_figures(page, "compute"),
        table=_table(page.table),
        datasets=_list(page.datasets),
        conditions="".join(_card(model, facts) for model, facts in page.models.items()),
        commands="\n".join(map(html.escape, page.commands)),
        # A name with "</script>" would end the element.
        specs=specs.replace("<", "\\u003c"),
        javascript=javascript,
    )


def _diagram(split: Json) -> str:
    """Draw the layers as blocks in three groups; the page's style does the rest."""
    times = {"prelude": "once", "core": "r times", "coda": "once"}
    return "".join(
        f'<li class="{part}" style="flex-grow:{len(split[part])}">'
        f'<span class="blocks">{"<i></i>" * len(split[part])}</span>'
        f"<b>{part}</b> layers {_ranges(split[part])}, {count}</li>"
        for part, count in times.items()
    )


def _judgement(question: str, answers: Sequence[str]) -> str:
    items = []
    for answer in answers:
        word = next(word for word in _ANSWERS if answer.startswith(word))
        rest = html.escape(answer.removeprefix(word).lstrip(": "))
        items.append(f'<p><span class="{_ANSWERS[word]}">{word}</span> {rest}</p>')
    return f"<li><h3>{html.escape(question)}</h3>{''.join(items)}</li>"


def _figures(page: Page, kind: str) -> str:
    """Place figures with their still picture, which shows where scripts do not run."""
    return "".join(
        f'<figure data-figure="{number}"><figcaption></figcaption>'
        f'<div class="chart">{figure.svg}</div><div class="legend"></div></figure>'
        for number, figure in enumerate(page.figures)
        if figure.kind == kind
    )


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        for tag, line in zip(["th", *["td"] * (len(lines) - 1)], lines, strict=True)
    )
    rows = "".join(f"<tr>{line}</tr>" for line in body)
    return f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"


def _card(model: str, facts: dict[str, str]) -> str:
    pairs = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in facts.items()
    )
    return f"<details open><summary>{html.escape(model)}</summary><dl>{pairs}</dl></details>"


def _list(texts: Iterable[str]) -> str:
    return "".join(f"<li>{html.escape(text)}</li>" for text in texts)


def _markdown(page: Page) -> str:
    blocks = [f"# {_escape(page.title)}", _escape(page.story[0])]
    if page.split:
        prelude, core, coda = (_ranges(page.split[part]) for part in ("prelude", "core", "coda"))
        blocks.append(f"    prelude [{prelude}] --> core [{core}] x r --> coda [{coda}]")
    blocks += [_bullets(page.story[1:]), "## Verdict"]
    for question, answers in page.judgements:
        blocks += [f"**{_escape(question)}**", _bullets(answers)]
    blocks.append(_bullets(page.caveats))
    for heading, kind in (("Loss against depth", "depth"), ("Loss against compute", "compute")):
        blocks.append(f"## {heading}")
        blocks += [f"![{heading}]({figure.file})" for figure in page.figures if figure.kind == kind]
    blocks += ["## Every number", _pipes(page.table)]
    names = dict.fromkeys(name for facts in page.models.values() for name in facts)
    facts = [[name, *(f.get(name, "-") for f in page.models.values())] for name in names]
    blocks += ["## Conditions", _pipes([["", *page.models], *facts]), _bullets(page.datasets)]
    commands = (f"    {' '.join(command.split())}" for command in page.commands)
    blocks += ["## How to repeat", "\n".join(commands)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _pipes(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(map(_escape, line))} |" for line in lines)
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *body])


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {_escape(text)}" for text in texts)


def _escape(text: str) -> str:
    """Keep text from files literal in Markdown, and on one line."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", plain)


def _ranges(layers: Sequence[int]) -> str:
    """Write layer indices briefly, such as 4-9 or 12, 14, 16."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) or "none"


def _si(value: float | None) -> str:
    """Write a count with three digits and a metric prefix, such as 51.2T."""
    if value is None:
        return "-"
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g}{prefix}"
    return f"{value:.3g}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plain(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
