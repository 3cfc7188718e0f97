"""Report: directories with a results.json -> report.html, report.md with SVG, results.csv.

Every number comes from the results. The page is one file that loads nothing from anywhere; what
it says in words comes from `rondo.verdict` and `rondo.evaluation`, what it draws from
`rondo.plots`.
"""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from rondo.config import ReportConfig, command_line
from rondo.errors import UserError
from rondo.provenance import claim_directory, record, staged, write_json
from rondo.report.sources import Json, flatten, flatten_checkpoints, load

__all__ = ["load", "run"]


def run(config: ReportConfig) -> None:
    """Write the report of the given results.

    Raises:
        UserError: The results cannot be read or compared, or the output may not be written.
    """
    # Here, so that results can be read without the extra that figures need.
    from rondo.report import card, page, rendering

    results = load(config.results)
    for directory in (*config.results, *filter(None, [config.card])):
        claim_directory(config.output_dir, config.overwrite, spare=directory)
    if config.card and not (Path(config.card) / "config.json").is_file():
        raise UserError(
            f"--card {config.card} holds no config.json; name the directory of a checkpoint"
        )
    # All is built before anything is written, so that a failure leaves nothing half-done.
    said = page.make_page(
        results, config.title, command_line(config), config.price_per_hour, config.samples
    )
    readme = card.updated(Path(config.card), results) if config.card else ""
    files = {
        "report.html": rendering.to_html(said),
        "report.md": rendering.to_markdown(said),
        "results.csv": to_csv(
            [*flatten(results, said.price_per_hour), *flatten_checkpoints(results)]
        ),
        **{figure.file: figure.svg for figure in said.figures},
    }
    sources = {name: _sha256(Path(name) / "results.json") for name in config.results}
    with staged(config.output_dir) as partial:
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        write_json(partial / "run.json", record(config, kind="report", results_sha256=sources))
    if config.card:
        card.write(Path(config.card), readme)
    print(f"wrote {config.output_dir}/report.html; open it in a browser")


def to_csv(rows: Sequence[Json]) -> str:
    """Return all rows with all their conditions; a task may have columns that another lacks."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        lists = {
            name: " ".join(map(str, value))
            for name, value in row.items()
            if isinstance(value, list | tuple)
        }
        writer.writerow(row | lists)
    return text.getvalue()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
