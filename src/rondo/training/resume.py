"""Which settings a run goes on with, and whether its directory may be written."""

from pathlib import Path
from typing import Any

from rondo import provenance
from rondo.config import TrainConfig
from rondo.errors import UserError

# What may change between two parts of a run without changing what it computes.
FREE = (
    "output_dir",
    "resume",
    "overwrite",
    "safety.save_every",
    "safety.keep_last",
    "watch.",
    "machine.",
    "batch.micro_batch_size",
    "data.cache_dir",
)


def flattened(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return dotted settings as groups."""
    groups: dict[str, Any] = {}
    for name, value in flat.items():
        group, _, key = name.rpartition(".")
        (groups.setdefault(group, {}) if group else groups)[key] = value
    return groups


def resumed_config(config: TrainConfig) -> TrainConfig:
    """Return the config to go on with: `rondo train RUN --resume` takes the run's own.

    Raises:
        UserError: A setting is given that would make it another run.
    """
    given = Path(config.model)
    if not config.resume or not (given / "run.json").is_file():
        return config
    facts = provenance.read_json(given / "run.json")
    if facts.get("kind") != "run":
        return config
    asked = flattened(config.model_dump(mode="json", exclude_defaults=True, exclude={"model"}))
    fixed = sorted(name for name in asked if not name.startswith(FREE))
    if fixed:
        raise UserError(f"{given} goes on with its own settings: leave out {', '.join(fixed)}")
    stored = flattened(facts["config"])
    return TrainConfig(**nested({**stored, **asked, "output_dir": str(given), "resume": True}))


def stored_facts(config: TrainConfig, directory: Path) -> dict[str, Any] | None:
    """Return the run.json of a run that goes on, None for one that begins.

    Raises:
        UserError: The settings differ from those it was begun with, by name.
    """
    if not (config.resume and (directory / "run.json").is_file()):
        return None
    facts = provenance.read_json(directory / "run.json")
    stored = flattened(facts.get("config", {}))
    now = flattened(config.model_dump(mode="json"))
    changed = sorted(
        name for name in now if not name.startswith(FREE) and now[name] != stored.get(name)
    )
    if changed:
        raise UserError(
            f"{directory} was begun with another {', '.join(changed)}: resume with the same "
            "settings, or start anew with --overwrite"
        )
    return facts


def prepare_directory(config: TrainConfig) -> Path:
    """Return the run's directory, which may be begun or gone on in.

    Raises:
        UserError: It exists and is neither to be resumed nor replaced.
    """
    directory = Path(config.output_dir)
    if not (config.resume and (directory / "run.json").is_file()):
        provenance.claim_directory(config.output_dir, config.overwrite, spare=config.model)
    return directory
