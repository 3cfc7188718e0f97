"""Files that an operator writes: YAML that could be JSON, checked against a shape, strictly.

Nothing is guessed: a key that comes twice, a name that is not known, a word where a number belongs
are mistakes, and a file with one is refused whole.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml
from pydantic import StringConstraints

from rondo.config import explain
from rondo.errors import UserError

# More is no file that a person wrote.
MOST_BYTES = 4_000_000

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Sheet(pydantic.BaseModel):
    """Base of what a file holds: strict, frozen, and nothing unknown."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


S = TypeVar("S", bound=pydantic.BaseModel)


class _Loader(yaml.SafeLoader):
    """Reads what JSON could say too, and refuses what YAML passes over in silence."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            # A few nested ones stand for more than memory holds.
            problem = "aliases are not read"
        elif event.tag is not None:
            problem = "tags are not read"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            problem = None
            if key.tag != "tag:yaml.org,2002:str":
                problem = "this name is no text: put it into quotes"
            elif key.value in seen:
                problem = f"{key.value!r} is given twice"
            if problem is not None:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 010 for 8, 1:30 for 90, no for false, 5e15 for a text and a date for a date: read
# is what JSON could say.
_Loader.yaml_implicit_resolvers = {}
WHOLE = r"[-+]?(0|[1-9][0-9_]*)"
# A whole number is no other one, so it is asked for first.
for kind, pattern, first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", WHOLE, [*"-+0123456789"]),
    ("float", rf"({WHOLE}(\.[0-9]*)?|[-+]?\.[0-9]+)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"({pattern})\Z"), first)


def read_sheet(shape: type[S], path: Path, what: str) -> tuple[S, str]:
    """Read a file, and return what it holds with the SHA-256 of its bytes.

    Args:
        shape: What it must hold.
        path: The file.
        what: What it is called, as `policy`.

    Raises:
        UserError: It cannot be read, is no YAML, or does not have the shape.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    if len(raw) > MOST_BYTES:
        raise UserError(f"the {what} {path} is larger than {MOST_BYTES} bytes: split it")
    return parse_sheet(shape, raw, f"the {what} {path}"), hashlib.sha256(raw).hexdigest()


def parse_sheet(shape: type[S], raw: bytes, what: str) -> S:
    """Return what a file's bytes hold.

    Raises:
        UserError: They are no YAML, or do not have the shape.
    """
    try:
        # By way of JSON, where a list may stand for a tuple and nothing is infinite.
        told = json.dumps(yaml.load(raw, Loader=_Loader), allow_nan=False, ensure_ascii=False)
        return shape.model_validate_json(told.encode())
    except yaml.YAMLError as error:
        raise UserError(f"{what} is no YAML: {_line(str(error))}") from error
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply") from error
    except pydantic.ValidationError as error:
        raise UserError(f"{what} does not fit: {_line(explain(error))}") from error
    except ValueError as error:
        # Half a surrogate pair, or a number beyond what any machine holds.
        raise UserError(f"{what} holds what is no text or number: {error}") from error


def _line(text: str) -> str:
    return " ".join(text.split())
