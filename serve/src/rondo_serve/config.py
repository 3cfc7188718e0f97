"""Settings of `rondo serve`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

import tyro
from pydantic import Field, field_validator, model_validator

from rondo.config import Config
from rondo_govern.audit.log import Fsync
from rondo_govern.efforts import EFFORTS

Depth = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Favour = Literal["shallow", "even", "deep"]


class GovernanceConfig(Config):
    """What answers are governed by, alike for the server and the gateway."""

    policy: str | None = None
    """Policy, YAML: tiers, risk classes, quotas, overload; it says who is given which depth, and is
    read again when it changes."""
    keys: str | None = None
    """Keys that may ask, YAML, as rondo keys writes it, read again when it changes; anyone may
    unless given."""
    audit: str | None = None
    """Log of what was asked and answered, JSON lines; none unless given."""
    audit_fsync: Fsync = "interval"
    """When a record must be on the disk: before its answer ends, within --audit-seconds, or when
    the system likes."""
    audit_seconds: Seconds = 1.0
    """Seconds between two fsyncs of the log."""
    audit_rotate: str = "100MB"
    """Size from which on the log goes on in a new file."""
    audit_texts: bool = False
    """Keep prompts and answers in the log, as tokens, not their hashes alone."""

    @model_validator(mode="after")
    def _has_a_log(self) -> "GovernanceConfig":
        if self.audit is None and self.audit_texts:
            raise ValueError("--audit-texts keeps texts in a log: give --audit")
        return self

    @field_validator("audit_rotate")
    @classmethod
    def _is_rotated(cls, value: str) -> str:
        bytes_of(value)
        return value


class ListenConfig(GovernanceConfig):
    """What is alike for whatever listens: the server and the gateway."""

    model: str
    """The checkpoint that is served."""
    name: str | None = None
    """What the model is called; the directory's name unless given."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, of whom only --keys asks anything."""
    max_new_tokens: Count = 1024
    """Most tokens of an answer that can be asked for."""
    default_new_tokens: Count = 256
    """Tokens of an answer at most where the request does not say."""
    max_seconds: Seconds = 600.0
    """Seconds after which an answer is cut off as it stands."""
    grace_seconds: float = Field(30.0, ge=0)
    """Seconds that a shutdown waits for answers before it cuts them off as they stand."""
    max_body: Count = 1_000_000
    """Most bytes of a request."""
    max_connections: Count = 1024
    """Questions at once; more are answered 503."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask, as https://example.org; none unless given."""

    @property
    def model_name(self) -> str:
        """What the model is called."""
        return self.name or Path(self.model).resolve().name

    @model_validator(mode="after")
    def _default_is_allowed(self) -> "ListenConfig":
        if self.default_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"--default-new-tokens {self.default_new_tokens} is beyond --max-new-tokens "
                f"{self.max_new_tokens}"
            )
        return self


class ServeConfig(ListenConfig):
    """Serve a model over HTTP as OpenAI does, with depth as a field of the request."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one, which is told."""
    num_recurrences: Depth | None = None
    """Depth of a request that names none; the model's own unless given."""
    min_recurrences: Depth = 1
    """Shallowest depth that can be asked for."""
    max_recurrences: Depth | None = None
    """Deepest that can be asked for; the model's cap unless given."""
    efforts: dict[str, Depth] | None = None
    """Depths that reasoning_effort stands for, as low 2 medium 4 high 8; halves and doubles of
    the default for those that are not named."""
    favour: Favour = "even"
    """Who goes first where a tick cannot take all: those with few iterations left, those that
    waited longest, or those with many left."""
    max_running: Count = 32
    """Texts in flight at once."""
    max_queue: int = Field(128, ge=0)
    """Texts that wait; beyond them requests are answered 429."""
    max_context: Count | None = None
    """Tokens of prompt and answer together; what the model takes unless given."""
    max_choices: Count = 8
    """Most answers to one prompt (n)."""
    tick_tokens: Count | None = None
    """Tokens that one iteration takes at most, of prompts and answers together, but for a prompt
    whose exit reads logits, which is read at once; 64 on a CPU, 512 elsewhere unless given."""
    prompt_chunk: Count | None = None
    """Tokens of a prompt that enter at once; half of the former unless given."""
    kv_memory: str | None = None
    """Memory for keys and values, as 4GB or 500MB; a share of what is free unless given."""
    prefix_cache: bool = True
    """Keep what prompts have in common, by depth and exit, while there is room."""
    log_prompts: bool = False
    """Write prompts and answers to the log, which leaves them out otherwise."""
    weights: Literal["int8"] | None = None
    """Round the layers' matrices to int8; as they are unless given."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 where the machine is faster in it, float32 elsewhere."""
    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""

    @field_validator("efforts")
    @classmethod
    def _known(cls, value: dict[str, int] | None) -> dict[str, int] | None:
        if unknown := sorted(set(value or {}) - set(EFFORTS)):
            raise ValueError(f"there is no effort {unknown[0]!r}: there are {', '.join(EFFORTS)}")
        return value

    @field_validator("kv_memory")
    @classmethod
    def _is_size(cls, value: str | None) -> str | None:
        if value is not None:
            bytes_of(value)
        return value

    @model_validator(mode="after")
    def _in_order(self) -> "ServeConfig":
        depths = (self.min_recurrences, self.num_recurrences, self.max_recurrences)
        given = [depth for depth in depths if depth is not None]
        if given != sorted(given):
            raise ValueError(
                "--min-recurrences, --num-recurrences and --max-recurrences must not fall, got "
                + ", ".join(map(str, given))
            )
        depths = ("num_recurrences", "efforts")
        said = [name for name in depths if getattr(self, name) is not None]
        said += ["min_recurrences"] if self.min_recurrences > 1 else []
        if self.policy is not None and said:
            flag = said[0].replace("_", "-")
            raise ValueError(f"--policy says what --{flag} would: leave --{flag}")
        return self


class GatewayConfig(ListenConfig):
    """Put keys, policy, quotas and an audit log in front of vLLM."""

    words: ClassVar[tuple[str, ...]] = ("upstream",)

    upstream: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL")]
    """Where vLLM listens, as http://127.0.0.1:8000; the key it asks for, if any, is read from the
    environment variable RONDO_UPSTREAM_KEY."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one, which is told."""
    max_recurrences: Depth | None = None
    """Deepest that vLLM serves, where --hf-overrides sets less than the model's cap."""
    max_running: Count = 256
    """Answers that vLLM is believed to run at once; those beyond wait."""
    max_queue: int = Field(256, ge=0)
    """Answers that wait; beyond them requests are answered 429."""
    max_context: Count | None = None
    """Tokens of prompt and answer together, as vLLM's --max-model-len; what the model takes unless
    given."""

    @field_validator("upstream")
    @classmethod
    def _is_address(cls, value: str) -> str:
        wrong = ValueError(
            f"must be an address alone, as http://127.0.0.1:8000, got {value!r}; a key goes into "
            "RONDO_UPSTREAM_KEY"
        )
        try:
            found = urlsplit(value)
            # A port that is none shows only once it is read.
            good = found.scheme in ("http", "https") and found.hostname and found.port != 0
        except ValueError:
            raise wrong from None
        if not good or found.username or found.path.rstrip("/") or found.query or found.fragment:
            raise wrong
        return value.rstrip("/")


def bytes_of(text: str) -> int:
    """Read a size, `4GB`, `500MB`, `64kB` or bytes.

    Raises:
        ValueError: It is none.
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("", 1)):
        number = text.strip().removesuffix(unit)
        if unit and number == text.strip():
            continue
        try:
            found = int(float(number) * size)
        except (ValueError, OverflowError):
            break
        if found > 0:
            return found
        break
    raise ValueError(f"a size such as 4GB or 500MB is needed, not {text!r}")
