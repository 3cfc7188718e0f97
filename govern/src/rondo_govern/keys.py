"""Keys: who may ask, and for what. Their file holds hashes of secrets, never a secret."""

import hashlib
import hmac
import json
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, RootModel, field_validator

from rondo.errors import UserError
from rondo_govern.rules import Denied
from rondo_govern.settings import Scope
from rondo_govern.sheets import Name, Sheet, read_sheet

State = Literal["in force", "expired", "revoked"]

HEAD = "# Written by `rondo keys`, which keeps no comments. Of secrets there are hashes only.\n"


def as_day(text: str) -> str:
    """Return a day as it is written.

    Raises:
        ValueError: It is none.
    """
    try:
        told = date.fromisoformat(text).isoformat()
    except ValueError:
        told = ""
    if told != text:
        raise ValueError(f"must be a day, as 2027-01-31, got {text[:40]!r}")
    return text


def as_hash(text: str) -> str:
    """Return a hash as it is written.

    Raises:
        ValueError: It is none. What it is instead is not told: it may be a secret.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError("must be a SHA-256, as rondo keys new writes it")
    return text


# Days are kept as texts: those of ISO 8601 are in order as they are.
Day = Annotated[str, AfterValidator(as_day)]


class Secret(Sheet):
    """What is kept of a secret."""

    id: Annotated[int, Field(ge=1)]
    """Its number, which the secret names."""
    sha256: Annotated[str, AfterValidator(as_hash)]
    """Hash of the whole text that a client sends."""
    created: Day
    """Day on which it was made, in UTC."""
    expires: Day | None = None
    """Last day on which it holds, in UTC."""
    revoked: bool = False
    """Whether it was taken back."""

    def state(self, today: str) -> State:
        """Return what has become of it."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires is not None and self.expires < today else "in force"


class Entry(Sheet):
    """A key: what it may do, and its secrets, of which several hold while clients change over."""

    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    """What it may do."""
    secrets: Annotated[tuple[Secret, ...], Field(min_length=1)]
    """In the order in which they were made."""

    @field_validator("secrets")
    @classmethod
    def _numbers_are_unlike(cls, secrets: tuple[Secret, ...]) -> tuple[Secret, ...]:
        ids = [one.id for one in secrets]
        for one in ids:
            if ids.count(one) > 1:
                raise ValueError(f"two secrets have the number {one}")
        return secrets


class Keys(RootModel[dict[Name, Entry]]):
    """A whole file of keys, by the names that the policy knows them by."""

    model_config = ConfigDict(frozen=True)


@dataclass(frozen=True)
class Key:
    """Who asks.

    Attributes:
        name: Name of the key.
        scopes: What it may do.
    """

    name: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> None:
        """Pass what the key may do.

        Raises:
            Denied: It may not.
        """
        if scope not in self.scopes:
            there = ", ".join(sorted(self.scopes))
            raise Denied(
                f"key {self.name} has the scope {there}, and this needs {scope}: ask the operator "
                "for a key that has it",
                code="scope",
            )


# No text is known that has this hash.
NOBODY = (Key("", frozenset()), Secret(id=1, sha256="0" * 64, created="1970-01-01"))


class Keyring:
    """Tells whose a secret is.

    Args:
        keys: What the file holds.
    """

    def __init__(self, keys: Keys):
        self._known = {
            stem_of(name, one.id): (Key(name, frozenset(entry.scopes)), one)
            for name, entry in keys.root.items()
            for one in entry.secrets
        }

    def holder(self, secret: str, now: float) -> Key:
        """Return whose a secret is.

        Args:
            secret: What a client sent.
            now: Seconds since 1970.

        Raises:
            Denied: Nobody's, or it was revoked, or has expired.
        """
        # Names and numbers are no secret, so they may be looked up; hashes are compared in a time
        # that tells nothing, once for every text, so that none tells whether a name is known.
        key, kept = self._known.get(secret.rpartition(".")[0], NOBODY)
        if not hmac.compare_digest(hash_of(secret), kept.sha256):
            message = "the API key is not valid: check it, or ask the operator for a new one"
            raise Denied(message, status=401, code="invalid_api_key")
        state = kept.state(today_of(now))
        if state != "in force":
            told = "was revoked" if state == "revoked" else f"expired after {kept.expires}"
            message = f"secret {kept.id} of key {key.name} {told}: ask the operator for a new one"
            raise Denied(message, status=401, code=state)
        return key


def read_keyring(path: Path) -> tuple[Keyring, str]:
    """Read a file of keys, and return them with the SHA-256 of its bytes.

    Raises:
        UserError: It cannot be read, or does not hold.
    """
    keys, sha256 = read_sheet(Keys, path, "file of keys")
    return Keyring(keys), sha256


def today_of(now: float) -> str:
    """Return the day of a moment, in UTC."""
    return datetime.fromtimestamp(now, UTC).date().isoformat()


def stem_of(name: str, number: int) -> str:
    """Return what a secret begins with: whose it is. A point and what is random follow."""
    return f"rondo-{name}.{number}"


def hash_of(secret: str) -> str:
    """Return what is kept of a secret.

    A fast hash is right for it. Slow ones make guessing dear where people choose the words; 256
    random bits cannot be guessed at any speed, and every request pays for the hash.
    """
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def add_secret(
    keys: Keys,
    name: str,
    noise: str,
    scopes: tuple[Scope, ...],
    created: str,
    expires: str | None = None,
) -> tuple[Keys, str]:
    """Return keys with one more secret, and the secret.

    Args:
        keys: Those that there are.
        name: Whose it is to be; a new key if there is none of that name.
        noise: What is random about it, without points.
        scopes: What a new key may do; one that is there keeps its own.
        created: Today.
        expires: Last day on which the secret holds.
    """
    entry = keys.root.get(name)
    before = entry.secrets if entry else ()
    number = 1 + max((one.id for one in before), default=0)
    secret = f"{stem_of(name, number)}.{noise}"
    one = Secret(id=number, sha256=hash_of(secret), created=created, expires=expires)
    entry = Entry(scopes=entry.scopes if entry else scopes, secrets=(*before, one))
    return Keys({**keys.root, name: entry}), secret


def revoke(keys: Keys, name: str, number: int | None = None) -> Keys:
    """Return keys with one secret of a key revoked, or all of them.

    Raises:
        UserError: There is no such key or secret.
    """
    if name not in keys.root:
        raise UserError(f"there is no key {name!r}: there are {', '.join(keys.root) or 'none'}")
    entry = keys.root[name]
    ids = [one.id for one in entry.secrets]
    if number is not None and number not in ids:
        raise UserError(f"key {name} has no secret {number}: there are {', '.join(map(str, ids))}")
    secrets = tuple(
        one.model_copy(update={"revoked": one.revoked or number in (None, one.id)})
        for one in entry.secrets
    )
    return Keys({**keys.root, name: entry.model_copy(update={"secrets": secrets})})


def text_of(keys: Keys) -> str:
    """Return the file that holds keys: a line for each secret."""
    lines = [HEAD if keys.root else HEAD + "{}\n"]
    for name, entry in keys.root.items():
        told = entry.model_dump(mode="json", exclude_none=True)
        # Every text is in quotes: a name may look like a number.
        lines.append(f"{json.dumps(name)}:\n  scopes: {json.dumps(told['scopes'])}\n  secrets:\n")
        lines += [f"    - {json.dumps(one)}\n" for one in told["secrets"]]
    return "".join(lines)
