"""Writes cli.md from the code, so that it cannot rot; `--check` tells whether it has."""

import sys
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from rondo.cli import commands, usage
from rondo.config import Config

PAGE = Path(__file__).with_name("cli.md")


def rows(cls: type[Config], prefix: str = "") -> list[str]:
    """Return a table row per setting, nested ones after their group."""
    found = []
    for name, field in cls.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Config):
            found += rows(nested, f"{prefix}{name}.")
            continue
        flag = f"--{prefix}{name.removesuffix('_output')}".replace("_", "-")
        word = name.upper() if name in cls.words else f"`{flag}`"
        default = "required" if field.is_required() else f"`{_shown(field.default)}`"
        kind = _kind(field.annotation)
        found.append(
            f"| {word} | {kind} | {default} | {' '.join((field.description or '').split())} |"
        )
    return found


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def _kind(annotation: Any) -> str:
    if annotation is type(None):
        return "none"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_kind(one) for one in get_args(annotation) if one is not type(None))
    if get_origin(annotation) is tuple:
        return f"{_kind(get_args(annotation)[0])}, several"
    if args := get_args(annotation):
        if isinstance(args[0], (str, int)):
            return ", ".join(str(one) for one in args)
        return _kind(args[0])
    return getattr(annotation, "__name__", str(annotation))


def page() -> str:
    """Return the reference of all verbs."""
    parts = [
        "# Command line\nGenerated from the code by `make docs`.\n",
        f"```text\n{usage()}\n```\n",
    ]
    for verb, (cls, _) in commands().items():
        parts.append(f"## rondo {verb}\n{(cls.__doc__ or '').strip()}\n")
        table = ["| setting | kind | default | what |", "|---|---|---|---|", *rows(cls)]
        parts.append("\n".join(table) + "\n")
    parts.append(
        "A first word that ends in `.yaml` is a recipe: the same settings, with underscores, as "
        "YAML. Flags override it.\n\nExit codes: 0 done, 1 failed (a proof that does not hold), "
        "2 a mistake that can be mended, 130 stopped with Ctrl-C.\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            PAGE.read_text(encoding="utf-8") != page()
            and "docs/reference/cli.md is stale: make docs"
        )
    PAGE.write_text(page(), encoding="utf-8")
