"""Deleting is a feature: the source stays within the lines that pyproject.toml grants it."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGET: dict[str, int] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["rondo"]
# Python only: report.html is a document that holds its charts and data, not code to be read.
FILES = sorted((ROOT / "src").rglob("*.py"))


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Each function or method, nested ones too, with its lines from `def` to its end."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            name = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            yield name, node.end_lineno - node.lineno + 1


def test_all_source_is_found() -> None:
    assert {path.name for path in FILES} >= {"__init__.py", "cli.py", "modeling_recurrent.py"}


def test_the_source_stays_within_its_lines() -> None:
    total = sum(map(lines_of, FILES))
    assert total <= BUDGET["max_source_lines"]


def test_each_file_stays_within_its_lines() -> None:
    limit = BUDGET["max_file_lines"]
    found = {str(path.relative_to(ROOT)): lines_of(path) for path in FILES}
    assert {name: count for name, count in found.items() if count > limit} == {}


def test_each_function_stays_within_its_lines() -> None:
    limit = BUDGET["max_function_lines"]
    found = dict(item for path in FILES for item in functions_of(path))
    assert {name: count for name, count in found.items() if count > limit} == {}
