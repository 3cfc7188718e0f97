"""Deleting is a feature: the source stays within the lines that pyproject.toml grants it."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each distribution has a budget of its own.
DISTRIBUTIONS = [ROOT, ROOT / "serve", ROOT / "govern", ROOT / "vllm-plugin"]
NAMES = ["rondo", "rondo-serve", "rondo-govern", "rondo-vllm"]


def budget_of(distribution: Path) -> dict[str, int]:
    return tomllib.loads((distribution / "pyproject.toml").read_text())["tool"]["rondo"]


def files_of(distribution: Path) -> list[Path]:
    # Python only: a page is a document that holds its charts and data, not code to be read.
    return sorted((distribution / "src").rglob("*.py"))


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
    names = {path.name for distribution in DISTRIBUTIONS for path in files_of(distribution)}
    assert names >= {"__init__.py", "cli.py", "modeling_recurrent.py", "engine.py"}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=NAMES)
def test_the_source_stays_within_its_lines(distribution: Path) -> None:
    total = sum(map(lines_of, files_of(distribution)))
    assert total <= budget_of(distribution)["max_source_lines"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=NAMES)
def test_each_file_stays_within_its_lines(distribution: Path) -> None:
    limit = budget_of(distribution)["max_file_lines"]
    found = {str(path.relative_to(ROOT)): lines_of(path) for path in files_of(distribution)}
    assert {name: count for name, count in found.items() if count > limit} == {}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=NAMES)
def test_each_function_stays_within_its_lines(distribution: Path) -> None:
    limit = budget_of(distribution)["max_function_lines"]
    found = dict(item for path in files_of(distribution) for item in functions_of(path))
    assert {name: count for name, count in found.items() if count > limit} == {}
