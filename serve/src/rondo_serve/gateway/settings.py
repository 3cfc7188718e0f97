"""Settings of `rondo gateway`."""

from typing import Annotated, ClassVar
from urllib.parse import urlsplit

import tyro
from pydantic import Field, field_validator, model_validator

from rondo_serve.config import Count, GovernanceConfig, Seconds


class GatewayConfig(GovernanceConfig):
    """Put keys, policy, quotas and an audit log in front of vLLM."""

    words: ClassVar[tuple[str, ...]] = ("upstream",)

    upstream: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL")]
    """Where vLLM listens, as http://127.0.0.1:8000; the key it asks for, if any, is read from the
    environment variable RONDO_UPSTREAM_KEY."""
    model: str
    """The checkpoint that vLLM serves; its weights are not loaded."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one, which is told."""
    name: str | None = None
    """What the log calls the model; the directory's name unless given."""
    max_running: Count = 256
    """Answers that vLLM is believed to run at once; those beyond wait."""
    max_queue: int = Field(256, ge=0)
    """Answers that wait; beyond them requests are answered 429."""
    max_new_tokens: Count = 1024
    """Most tokens of an answer that can be asked for."""
    default_new_tokens: Count = 256
    """Tokens of an answer at most where the request does not say."""
    max_seconds: Seconds = 600.0
    """Seconds after which an answer is cut off."""
    grace_seconds: float = Field(30.0, ge=0)
    """Seconds that a shutdown waits for answers before it cuts them off."""
    max_body: Count = 1_000_000
    """Most bytes of a request."""
    max_connections: Count = 1024
    """Questions at once; more are answered 503."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask, as https://example.org; none unless given."""

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

    @model_validator(mode="after")
    def _in_order(self) -> "GatewayConfig":
        if self.default_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"--default-new-tokens {self.default_new_tokens} is beyond --max-new-tokens "
                f"{self.max_new_tokens}"
            )
        return self
