"""Settings of `rondo quantize`."""

from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field

from rondo.config.base import Config, Depths
from rondo.config.stages import Dtype


class QuantizeConfig(Config):
    """Measure what int8 weights cost in loss at every depth, and spare in bytes and time."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint, which stays as it is."""
    weights: Literal["int8"] = "int8"
    """Type of the layers' matrices: int8, one scale per row."""
    data: str = "math-test"
    """Held-out text: a shipped sample, or a .jsonl/.txt file."""
    recurrences: Depths = (1, 2, 4, 8)
    """Depths to measure."""
    limit: int | None = Field(None, ge=1)
    """Documents of the text, the first ones; 100 unless given."""
    seq_len: int = Field(512, ge=16)
    """Longer documents are cut here, or where the model's own length ends."""
    batch_size: int = Field(8, ge=1)
    """Sequences per forward pass, where the loss is measured."""
    prompt_tokens: int = Field(64, ge=1)
    """Tokens of the prompt (random ones) after which decoding is timed, one row alone."""
    new_tokens: int = Field(32, ge=2)
    """Tokens decoded after it."""
    repeats: int = Field(5, ge=0)
    """Timings of each setting, which take turns; 0 for none."""
    dtype: Dtype = "auto"
    """Of all that is not int8: auto is bfloat16 where the machine is faster in it, else float32."""
    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""
    seed: int = 0
    """Seed of the prompt and of a `normal` initial state."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print what was measured as JSON."""
