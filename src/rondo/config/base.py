"""How settings are read: from flags, from a YAML recipe, or from both."""

import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
import tyro
import yaml
from pydantic import Field

from rondo.errors import UserError


class Config(pydantic.BaseModel):
    """Base of all stage configs: unknown keys are errors, values never change."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    # Fields that are given as words, not as flags.
    words: ClassVar[tuple[str, ...]] = ()
    # Name of a nested group, as its settings are called: `recurrence.mean`.
    group: ClassVar[str] = ""
    # Whether a first word that ends in .yaml is a recipe, not a word.
    takes_recipe: ClassVar[bool] = True

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except pydantic.ValidationError as error:
            raise UserError(explain(error, type(self).group)) from error


C = TypeVar("C", bound=Config)
Depths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


def load_yaml(cls: type[C], path: Path) -> C:
    """Read a recipe. One that `extends` another states only what differs from it.

    Raises:
        UserError: The file is missing, is no YAML mapping, or does not fit the config.
    """
    fields = _fields(path, ())
    try:
        return cls(**fields)
    except UserError as error:
        raise UserError(f"the recipe {path} does not fit: {error}") from error


def _fields(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise UserError(f"the recipe {path} must be a YAML mapping of settings")
    if path in seen:
        raise UserError(f"the recipe {path} extends itself")
    if (base := fields.pop("extends", None)) is None:
        return fields
    return _merged(_fields(path.parent / str(base), (*seen, path)), fields)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping of settings over another, group by group."""
    both = {
        key: _merged(base[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **over, **both}


def explain(error: pydantic.ValidationError, group: str = "") -> str:
    """Put what pydantic found into one line: where, what, and the value that was given."""
    found = []
    for item in error.errors():
        where = ".".join([*([group] if group else []), *map(str, item["loc"])]) or "settings"
        message = item["msg"].removeprefix("Value error, ")
        told = item["type"] in ("extra_forbidden", "missing", "value_error")
        found.append(f"{where}: {message}" + ("" if told else f" (got {item['input']!r})"))
    return "; ".join(found)


def parse(cls: type[C], argv: list[str], prog: str) -> C:
    """Read flags; a first word that ends in .yaml is a recipe, which flags then override.

    So is a run that goes on: `train RUN --resume` begins with the settings it has.
    """
    default: Any = None
    if argv and "--resume" in argv and (fields := _settings_of_run(Path(argv[0]))):
        default, argv = cls(**fields), argv[1:]
        argv = [*(str(getattr(default, word)) for word in cls.words), *argv]
    elif cls.takes_recipe and argv and argv[0].endswith((".yaml", ".yml")):
        default = load_yaml(cls, Path(argv[0]))
        argv = argv[1:]
        # The recipe has given the words already; asking for them again would be absurd.
        given = [str(one) for word in cls.words for one in _as_words(getattr(default, word))]
        if not (argv and not argv[0].startswith("-")):
            argv = [*given, *argv]
    options = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(cls, args=argv, default=default, prog=prog, config=options)


def _settings_of_run(directory: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # no run, or a damaged one: what reads it next says so
    if facts.get("kind") != "run":
        return None
    return {**facts["config"], "output_dir": str(directory), "overwrite": False}


def command_line(config: Config) -> str:
    """Return the command that a config amounts to, fit to be pasted into a shell.

    It names what differs from the defaults, so it is the same whether the settings came from
    flags, from a recipe or from Python.
    """
    name = type(config).__name__.removesuffix("Config")
    verb = re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()
    words = [
        str(word) for name in config.words for word in _as_words(getattr(config, name)) if word
    ]
    return shlex.join(["rondo", *verb.split(), *words, *_flags(config, "", set(config.words))])


def _as_words(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _flags(config: Config, prefix: str, skipped: set[str]) -> list[str]:
    flags: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name in skipped or value == field.default:
            continue
        # The one flag whose name would hide a method of the base class.
        flag = f"--{prefix}{name.removesuffix('_output').replace('_', '-')}"
        if isinstance(value, Config):
            flags += _flags(value, f"{prefix}{name}.".replace("_", "-"), set())
        elif isinstance(value, bool):
            last = flag.removeprefix(f"--{prefix}")
            flags.append(flag if value else f"--{prefix}no-{last}")
        else:
            flags += [flag, *(str(word) for word in _as_words(value))]
    return flags
