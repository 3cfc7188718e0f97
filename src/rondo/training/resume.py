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
    "safety.",
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
