"""A report as one self-contained page, and as Markdown beside its pictures."""

import html
import importlib.resources
import json
import re
from collections.abc import Iterable, Sequence

import jinja2

from rondo import plots
from rondo.report import words
from rondo.report.page import Page
from rondo.report.panels import PRICE, Panel
from rondo.report.parts import Figure, Line, Section, Table
from rondo.report.samples import Group

_STYLES = {"Yes": "yes", "Not shown": "open", "Not known": "open", "No": "no"}
_TIMES = {"prelude": "once", "core": "r times", "coda": "once"}


def to_html(page: Page) -> str:
    """Return the page; all text in it is escaped, since it comes from files."""
    # What a template lacks is a mistake of ours, not an empty place.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = importlib.resources.files("rondo.report").joinpath("report.html").read_text("utf-8")
    number_of = {figure.file: number for number, figure in enumerate(page.figures)}
    charts = [{"specs": figure.specs, "axes": figure.axes} for figure in page.figures]
    return environment.from_string(source).render(
        page=page,
        parts=[(part, page.split[part], _TIMES[part]) for part in _TIMES] if page.split else [],
        ranges=words.ranges,
        number_of=number_of,
        style=_STYLES,
        price=PRICE,
        # A name with "</script>" would end the element.
        charts=json.dumps(charts, allow_nan=False).replace("<", "\\u003c"),
        javascript=plots.javascript(),
    )


def to_markdown(page: Page) -> str:
    """Return the same story for a reader of plain text."""
    blocks = [f"# {escape(page.title)}", f"**{escape(page.headline)}**", escape(page.story)]
    if page.split:
        prelude, core, coda = (words.ranges(page.split[part]) for part in _TIMES)
        blocks.append(f"    prelude [{prelude}] --> core [{core}] x r --> coda [{coda}]")
    blocks += [escape(page.cost)]
    for panel in page.panels:
        blocks += _task(panel)
    for section in page.sections:
        blocks += _section(section)
    for group in page.samples:
        blocks += [*_samples(group), page.samples_note]
    blocks += ["## What to keep in mind", _bullets([*page.caveats, page.price_note])]
    names = dict.fromkeys(name for facts in page.models.values() for name in facts)
    facts = [[name, *(f.get(name, "-") for f in page.models.values())] for name in names]
    blocks += ["## Conditions", pipes(["", *page.models], facts)]
    commands = (f"    {' '.join(command.split())}" for command in page.commands)
    blocks += ["## How to repeat", "\n".join(commands)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _task(panel: Panel) -> Iterable[str]:
    yield f"## {escape(panel.task)}"
    yield escape(panel.about)
    for figure in panel.figures:
        yield _picture(figure)
    yield _bullets(f"{question} {word}: {rest}" for question, word, rest in panel.answers)
    for table in (*panel.tables, *panel.measures, panel.controls):
        yield from _table(table)


def _section(section: Section) -> Iterable[str]:
    yield f"## {escape(section.title)}"
    for figure in section.figures:
        yield _picture(figure)
    yield _bullets(section.notes)
    for table in section.tables:
        yield from _table(table)


def _samples(group: Group) -> Iterable[str]:
    yield f"## {group.title}"
    yield f"{len(group.samples)} of {group.total} are shown."
    for sample in group.samples:
        yield f"### {escape(sample.task)}, item {escape(sample.item)} ({escape(sample.model)})"
        yield quoted(sample.prompt)
        yield f"Wanted: {escape(sample.target)}"
        yield _bullets(
            f"r = {answer.depth}, {'right' if answer.right else 'wrong'}: {answer.text}"
            for answer in sample.answers
        )


def _picture(figure: Figure) -> str:
    return f"![{escape(figure.title)}]({figure.file})"


def _table(table: Table) -> Iterable[str]:
    if not table.lines:
        return
    yield f"### {escape(table.title)}"
    yield pipes(table.head, table.lines)


def pipes(head: Line, lines: Sequence[Line]) -> str:
    """Write a table in Markdown."""
    first, *rest = (f"| {' | '.join(map(escape, line))} |" for line in (head, *lines))
    return "\n".join([first, "|" + " --- |" * len(head), *rest])


def quoted(text: str) -> str:
    """Set text from files apart, line by line, as it stands."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {escape(text)}" for text in texts)


def escape(text: str) -> str:
    """Keep text from files literal in Markdown, and on one line."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", plain)
