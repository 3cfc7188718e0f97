"""Settings of `rondo calibrate`."""

import re
from typing import Annotated, Any, ClassVar, Literal

import tyro
from pydantic import Field, field_validator, model_validator

from rondo.config.base import Config
from rondo.config.generate import Criterion, Depth
from rondo.config.stages import Dtype


class CalibrateConfig(Config):
    """Find how early tokens may leave the loop on your texts, and store it in the checkpoint."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint, whose config.json gets the thresholds."""
    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """Texts as you will use the model on (.jsonl/.txt files, or shipped samples); thresholds are
    chosen on one half of the documents and tried on the other."""
    tolerance: str = "0.5%"
    """What exits may cost against the full depth: relative loss, or share of tokens that differ."""
    measure: Literal["loss", "agreement"] = "loss"
    """What is kept within the tolerance: the loss, or the agreement with the full depth's best
    tokens."""
    max_recurrences: Depth | None = None
    """Iterations no token exceeds, the full depth; the model's own depth unless given."""
    min_recurrences: Depth = 1
    """Iterations every token takes."""
    check_every: Depth = 1
    """Iterations from one check to the next."""
    cache_policy: Literal["ragged", "recompute"] = "ragged"
    """What deeper iterations read of a token that left earlier: its last keys and values, or ones
    projected from its last state."""
    criteria: tuple[Criterion, ...] = ()
    """Rules to calibrate; all that the model has unless given."""
    limit: int | None = Field(None, ge=4)
    """Documents of each text, the first ones; 100 unless given."""
    seq_len: int = Field(512, ge=16)
    """Longer documents are cut here, or where the model's own length ends."""
    batch_size: int = Field(2, ge=1)
    """Sequences per forward pass; their logits are held at once, a few times over."""
    seed: int = 0
    """Seed of the split in halves and of a `normal` initial state."""
    dtype: Dtype = "auto"
    """auto is bfloat16 where the machine is faster in it, float32 elsewhere."""
    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the table as JSON."""
    overwrite: bool = False
    """Replace thresholds that the checkpoint has for this tolerance."""

    @property
    def share(self) -> float:
        """The tolerance as a share: 0.005 for 0.5%."""
        return share_of(self.tolerance)

    @field_validator("tolerance", mode="before")
    @classmethod
    def _one_spelling(cls, value: Any) -> str:
        return f"{100 * share_of(value):g}%"

    @model_validator(mode="after")
    def _room(self) -> "CalibrateConfig":
        if self.max_recurrences and self.max_recurrences <= self.min_recurrences:
            raise ValueError(
                f"with --max-recurrences {self.max_recurrences} and --min-recurrences "
                f"{self.min_recurrences} no token can leave early: raise the first"
            )
        return self


def spelled(tolerance: str) -> str:
    """Return a tolerance, `0.5%`, `0.005` or `0.5% agreement`, as checkpoints spell it.

    Raises:
        ValueError: It is none.
    """
    share, *measure = tolerance.split(maxsplit=1) or [""]
    return " ".join([f"{100 * share_of(share):g}%", *measure])


def share_of(value: Any) -> float:
    """Read a tolerance, "0.5%" or 0.005.

    Raises:
        ValueError: It is neither, or does not lie between 0 and 1.
    """
    found = re.fullmatch(r"(\d*\.?\d+(?:e-?\d+)?) ?(%?)", str(value).strip())
    if not found:
        raise ValueError(f"a tolerance is written 0.5% or 0.005, got {value!r}")
    share = float(found[1]) / (100 if found[2] else 1)
    if not 0 < share < 1:
        raise ValueError(f"a tolerance lies between 0 and 1 (100%), got {value!r}")
    return share
