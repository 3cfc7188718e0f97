"""Settings of an export."""

from typing import Annotated, ClassVar

import tyro
from pydantic import Field

from rondo.config.base import Config


class ExportConfig(Config):
    """Write one depth of a recurrent model as an ordinary model of its parent's family."""

    words: ClassVar[tuple[str, ...]] = ("model", "output_dir")

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint."""
    output_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT_DIR")]
    """Directory to write."""
    unrolled: int = Field(ge=1)
    """Depth: the core is written so many times, one after the other. 1 suits most models, more
    only an injection that passes the state on alone."""
    max_shard_gb: float = Field(5.0, gt=0)
    """A weight file takes no more gigabytes, unless a single tensor does."""
    seed: int = 0
    """Seed of the proof's tokens."""
    overwrite: bool = False
    """Replace an existing output directory."""
