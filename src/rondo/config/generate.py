"""Settings of `rondo generate` and `rondo chat`."""

from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field, model_validator

from rondo.config.base import Config, Depths
from rondo.config.stages import Dtype

Criterion = Literal["kl", "entropy", "margin", "argmax_stable", "state_distance", "gate"]
Policy = Literal["full", "ragged", "recompute", "last", "full-int8"]
EXCLUDING = (
    ("exit", "contrast"),
    ("draft", "exit"),
    ("draft", "contrast"),
    ("draft", "warm_start"),
)
Depth = Annotated[int, Field(ge=1)]


class DecodingConfig(Config):
    """What `generate` and `chat` have in common."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens to generate."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of sampling."""
    seed: int = 0
    """Seed of sampling and of a `normal` initial state."""
    exit: Criterion | None = None
    """Let each token leave the loop once this has settled; calibrated by `rondo calibrate`, or with
    --threshold."""
    tolerance: str | None = None
    """With --exit: relative loss that the checkpoint's rule was calibrated to, as '0.5%'; needed
    where it has several."""
    threshold: float | None = Field(None, ge=0)
    """With --exit: leave below this value, instead of a calibrated one."""
    min_recurrences: Depth | None = None
    """With --exit: iterations every token takes; 1 or as calibrated unless given."""
    max_recurrences: Depth | None = None
    """With --exit: iterations no token exceeds; the depth unless given."""
    check_every: Depth | None = None
    """With --exit: iterations from one check to the next; 1 or as calibrated unless given."""
    draft: Depth | Literal["auto"] | None = None
    """Draft tokens at this depth and verify several in one pass at the full one, which changes
    no answer; auto chooses the depth by what the prompt shows."""
    draft_tokens: Depth | None = None
    """With --draft: tokens of a draft; by what was accepted unless given."""
    contrast: Depth | None = None
    """Weigh the answer at the full depth against the one at this shallower depth."""
    contrast_strength: float | None = Field(None, ge=0)
    """With --contrast: weight of the shallower answer; 0.5 unless given."""
    cache: Policy | None = None
    """What deeper iterations read of a token that left earlier; ragged with exits and in chats,
    full otherwise. last keeps one iteration, full-int8 the differences of iterations in 8 bits."""
    warm_start: bool = False
    """Start each new token at the last state of the one before."""
    weights: Literal["int8"] | None = None
    """Round the layers' matrices to int8; as they are unless given."""
    dtype: Dtype = "auto"
    """auto is bfloat16 where the machine is faster in it, float32 elsewhere."""
    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""

    @model_validator(mode="after")
    def _belong(self) -> "DecodingConfig":
        for name, needed in {
            "tolerance": "exit",
            "threshold": "exit",
            "min_recurrences": "exit",
            "max_recurrences": "exit",
            "check_every": "exit",
            "draft_tokens": "draft",
            "contrast_strength": "contrast",
        }.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"--{name.replace('_', '-')} has no meaning without --{needed}")
        for one, other in EXCLUDING:
            if getattr(self, one) and getattr(self, other):
                raise ValueError(
                    f"--{one} and --{other.replace('_', '-')} exclude each other: leave one"
                )
        if self.draft and self.cache not in (None, "full", "ragged"):
            raise ValueError(f"--draft needs --cache full or ragged, not {self.cache}")
        if self.tolerance is not None and self.threshold is not None:
            raise ValueError("--tolerance names a calibrated threshold: leave it or --threshold")
        return self


class GenerateConfig(DecodingConfig):
    """Continue a prompt at one or several depths, or as deep as each token needs."""

    prompt: str = "Question: What is 12 + 30?\nAnswer:"
    """Text to continue."""
    recurrences: Depths | None = None
    """Depths, each answering the same prompt in one batch; the model's own unless given."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""
    show_depth: bool = False
    """Colour each token by the iterations it took; where there is no colour, list them."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object per depth."""

    @model_validator(mode="after")
    def _one_cap(self) -> "GenerateConfig":
        if self.recurrences and self.max_recurrences:
            raise ValueError("--recurrences is the cap of an exit too: leave --max-recurrences")
        return self


class ChatConfig(DecodingConfig):
    """Talk to a model in the terminal, each token coloured by the iterations it took."""

    max_new_tokens: int = Field(256, ge=1)
    """Tokens of an answer at most."""
    recurrences: Depth | None = None
    """Depth to begin with; the model's own unless given."""
    system: str | None = None
    """What the model is told before the conversation."""

    @model_validator(mode="after")
    def _one_cap(self) -> "ChatConfig":
        if self.recurrences and self.max_recurrences:
            raise ValueError("--recurrences is the cap of an exit too: leave --max-recurrences")
        return self
