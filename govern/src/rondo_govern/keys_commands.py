"""`rondo keys`: makes, revokes and lists the secrets of keys."""

import fcntl
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydantic

from rondo.errors import UserError
from rondo_govern.keys import Keys, add_secret, as_day, revoke, text_of, today_of
from rondo_govern.settings import KeysListConfig, KeysNewConfig, KeysRevokeConfig
from rondo_govern.sheets import Name, read_sheet
from rondo_govern.tables import aligned

COLUMNS = ("key", "scopes", "secret", "created", "expires", "state")


def run_new(config: KeysNewConfig) -> None:
    """Make a secret, and print it, alone, to stdout.

    Raises:
        UserError: The name or the day is none, or the file cannot be read or written.
    """
    today, scopes = today_of(time.time()), config.scopes
    check_new(config, today)
    with locked(Path(config.keys)) as path:
        keys = read_keys(path) if path.exists() else Keys({})
        noise = secrets.token_urlsafe(32)
        keys, secret = add_secret(keys, config.name, noise, scopes, today, config.expires)
        replace(path, text_of(keys))
    entry = keys.root[config.name]
    until = f"until {config.expires} has passed" if config.expires else "until it is revoked"
    print(
        f"secret {entry.secrets[-1].id} of key {config.name}, of scope "
        f"{' and '.join(entry.scopes)}: it holds {until}, and is told only now",
        file=sys.stderr,
    )
    print(secret)


def check_new(config: KeysNewConfig, today: str) -> None:
    """Check what is to be made.

    Raises:
        UserError: The name or the day is none.
    """
    try:
        pydantic.TypeAdapter(Name).validate_python(config.name)
    except pydantic.ValidationError as error:
        raise UserError(
            f"{config.name!r} cannot be the name of a key: take up to 64 letters, digits, points, "
            "hyphens and underscores, a letter or digit first"
        ) from error
    if not config.scopes:
        raise UserError("--scopes names none: give generate, metrics or both")
    if config.expires is None:
        return
    try:
        as_day(config.expires)
    except ValueError as error:
        raise UserError(f"--expires {error}") from error
    if config.expires < today:
        raise UserError(f"--expires {config.expires} has passed: today is {today}")


def run_revoke(config: KeysRevokeConfig) -> None:
    """Revoke secrets.

    Raises:
        UserError: There is no such key or secret, or the file cannot be read or written.
    """
    with locked(Path(config.keys)) as path:
        replace(path, text_of(revoke(read_keys(path), config.name, config.secret)))
    what = "all secrets" if config.secret is None else f"secret {config.secret}"
    print(f"{what} of key {config.name} revoked; a server that runs follows by itself")


def run_list(config: KeysListConfig) -> None:
    """Print a line for each secret.

    Raises:
        UserError: The file cannot be read.
    """
    keys, today = read_keys(Path(config.keys)), today_of(time.time())
    rows = [COLUMNS]
    for name, entry in keys.root.items():
        scopes = ",".join(entry.scopes)
        rows += [
            (name, scopes, str(one.id), one.created, one.expires or "-", one.state(today))
            for one in entry.secrets
        ]
    print("\n".join(aligned(rows)))


def read_keys(path: Path) -> Keys:
    """Read a file of keys.

    Raises:
        UserError: It cannot be read, or does not hold.
    """
    return read_sheet(Keys, path, "file of keys")[0]


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Give a file of keys to one writer at a time, and tell it where the file is.

    Raises:
        UserError: It cannot be written.
    """
    # Where the file is a link, what it leads to is replaced.
    path = path.resolve()
    try:
        # The folder is locked, not the file, which is another one afterwards.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield path
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write the file of keys {path}: {error.strerror}") from error


def replace(path: Path, text: str) -> None:
    """Put another file in the place of one, for the same readers; of a new one, the owner only."""
    fresh = path.with_name(f".{path.name}.new")
    # What a writer left that was killed.
    fresh.unlink(missing_ok=True)
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            if path.exists():
                there = path.stat()
                os.fchown(file.fileno(), there.st_uid, there.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(there.st_mode))
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
