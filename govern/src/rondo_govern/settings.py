"""Settings of `rondo policy`, `rondo keys` and `rondo audit`."""

from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field

from rondo.config import Config
from rondo_govern.efforts import Effort

Scope = Literal["generate", "metrics"]
Word = Annotated[str, tyro.conf.arg(metavar="FILE")]


class PolicyCheckConfig(Config):
    """Tell whether a policy holds, and what it gives whom."""

    words: ClassVar[tuple[str, ...]] = ("policy",)
    takes_recipe: ClassVar[bool] = False

    policy: tyro.conf.Positional[Word]
    """The policy, YAML."""
    model: str | None = None
    """A recurrent checkpoint whose cap the tiers must keep within."""


class PolicyExplainConfig(Config):
    """Tell what a policy gives a request, and why."""

    words: ClassVar[tuple[str, ...]] = ("policy",)
    takes_recipe: ClassVar[bool] = False

    policy: tyro.conf.Positional[Word]
    """The policy, YAML."""
    key: str = ""
    """Name of the key; without one, unless given."""
    tier: str | None = None
    """Tier; the key's unless given."""
    risk: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Risk classes that the request names."""
    num_recurrences: Annotated[int, Field(ge=1)] | None = None
    """Depth that the request asks for."""
    effort: Effort | None = None
    """reasoning_effort that it asks for."""
    waiting: int = Field(0, ge=0)
    """Requests that found no room."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Tell it as JSON."""


class KeysNewConfig(Config):
    """Make a secret for a key, tell it once, and keep its hash."""

    words: ClassVar[tuple[str, ...]] = ("keys", "name")
    takes_recipe: ClassVar[bool] = False

    keys: tyro.conf.Positional[Word]
    """The keys, YAML; made if there is none."""
    name: tyro.conf.Positional[str]
    """Name of the key, as the policy names it."""
    scopes: tuple[Scope, ...] = ("generate",)
    """What a new key may do; a key that is there keeps its own."""
    expires: str | None = None
    """Last day on which the secret holds, as 2027-01-31, in UTC."""


class KeysRevokeConfig(Config):
    """Revoke the secrets of a key, or one of them; a running server follows by itself."""

    words: ClassVar[tuple[str, ...]] = ("keys", "name")
    takes_recipe: ClassVar[bool] = False

    keys: tyro.conf.Positional[Word]
    """The keys, YAML."""
    name: tyro.conf.Positional[str]
    """Name of the key."""
    secret: int | None = None
    """Number of the secret; all of them unless given."""


class KeysListConfig(Config):
    """List keys and the state of their secrets."""

    words: ClassVar[tuple[str, ...]] = ("keys",)
    takes_recipe: ClassVar[bool] = False

    keys: tyro.conf.Positional[Word]
    """The keys, YAML."""


class AuditVerifyConfig(Config):
    """Tell whether an audit log is whole and unaltered, and if not, which line is to blame."""

    words: ClassVar[tuple[str, ...]] = ("log",)

    log: tyro.conf.Positional[Word]
    """The log; those that were rotated out of it are read, too."""
    head: str | None = None
    """Hash of a record that must be there, or be the one before the first, as it was noted
    elsewhere."""


class AuditUsageConfig(Config):
    """Sum up what was used, from a log that is verified on the way."""

    words: ClassVar[tuple[str, ...]] = ("log",)

    log: tyro.conf.Positional[Word]
    """The log."""
    by: str = "tenant,tier"
    """What to sum up by, of tenant, tier, key, risk, model and day, with commas between."""
    since: str | None = None
    """First day or moment, as 2026-11-30 or 2026-11-30T12:00:00Z, in UTC."""
    until: str | None = None
    """First day or moment that is left out."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Tell it as JSON."""


class AuditReplayConfig(Config):
    """Answer a record's request again, and compare the tokens."""

    words: ClassVar[tuple[str, ...]] = ("log",)

    log: tyro.conf.Positional[Word]
    """The log."""
    id: str
    """Id of the answer, as responses and records tell it."""
    model: str
    """The checkpoint that answered."""
    prompt: str | None = None
    """File with the prompt, where the log holds hashes only: a JSON list of tokens, or the
    request's body."""
    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""


class AuditReportConfig(Config):
    """Draw cost, depth and compliance by tenant, as one page."""

    words: ClassVar[tuple[str, ...]] = ("log",)

    log: tyro.conf.Positional[Word]
    """The log."""
    output: str = "audit.html"
    """The page."""
    since: str | None = None
    """First day or moment, in UTC."""
    until: str | None = None
    """First day or moment that is left out."""
    currency: str = ""
    """What prices are in; the log's unless given."""
    overwrite: bool = False
    """Replace a page that is there."""
