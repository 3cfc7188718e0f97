"""Keys: whose a secret is, what a file of them may hold, and the commands that write it."""

import errno
import hashlib
import hmac
import json
import os
import re
import stat
import threading
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rondo.errors import UserError
from rondo_govern.keys import (
    Keyring,
    Keys,
    Scope,
    add_secret,
    hash_of,
    read_keyring,
    revoke,
    text_of,
)
from rondo_govern.keys_commands import locked, read_keys, replace, run_list, run_new, run_revoke
from rondo_govern.rules import Denied
from rondo_govern.settings import KeysListConfig, KeysNewConfig, KeysRevokeConfig
from rondo_govern.sheets import parse_sheet

NOISE = "n" * 43
HASH = "0123456789abcdef" * 4
NOW = datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()
GOOD = f"acme: {{scopes: [generate], secrets: [{{id: 1, sha256: {HASH}, created: 2026-11-30}}]}}"


def made(*names: str, expires: str | None = None) -> tuple[Keys, list[str]]:
    """Keys with a secret for each of the names, in that order."""
    keys, told = Keys({}), []
    for number, name in enumerate(names):
        scopes: tuple[Scope, ...] = ("generate",)
        noise = f"{number:x}".rjust(43, "n")
        keys, secret = add_secret(keys, name, noise, scopes, "2026-11-30", expires)
        told.append(secret)
    return keys, told


def denial(keyring: Keyring, secret: str, now: float = NOW) -> tuple[int, str, str]:
    with pytest.raises(Denied) as caught:
        keyring.holder(secret, now)
    return caught.value.status, caught.value.code, str(caught.value)


def test_a_secret_is_its_keys() -> None:
    keys, secrets = made("acme", "a.b", "a.b.1", "a.b")
    assert secrets[1].startswith("rondo-a.b.1.")
    keyring = Keyring(keys)
    names = [keyring.holder(secret, NOW).name for secret in secrets]
    assert names == ["acme", "a.b", "a.b.1", "a.b"]
    assert keyring.holder(secrets[0], NOW).scopes == {"generate"}


def test_only_the_hash_of_the_whole_secret_is_kept() -> None:
    keys, (secret,) = made("acme")
    assert keys.root["acme"].secrets[0].sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert NOISE[:20] not in text_of(keys)


BAD = [
    "",
    "rondo-acme.1." + "x" * 43,
    "rondo-acme.2." + NOISE,
    "rondo-nobody.1." + NOISE,
    "rondo-acme.1",
    "rondo-acme..1." + NOISE,
    "acme",
    HASH,
    "Bearer \ud800 \x00 ünïcode",
    "rondo-acme.\u0661." + NOISE,
    "x" * 100_000,
]


@pytest.mark.parametrize("secret", BAD, ids=range(len(BAD)))
def test_unknown_and_wrong_secrets_are_told_alike(secret: str) -> None:
    keyring = Keyring(made("acme")[0])
    told = denial(keyring, secret)
    assert told == denial(keyring, "rondo-acme.1." + "w" * 43)
    assert told[:2] == (401, "invalid_api_key")


@settings(deadline=None)
@given(st.text() | st.from_regex(r"rondo-acme\.[0-9]+\.[A-Za-z0-9_-]{43}", fullmatch=True))
def test_no_other_text_lets_anyone_in(secret: str) -> None:
    keys, (good,) = made("acme")
    if secret != good:
        assert denial(Keyring(keys), secret)[:2] == (401, "invalid_api_key")


def test_hashes_are_compared_once_in_constant_time_whatever_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys, (good, late, spare) = made("acme", "beta", "beta")
    keyring = Keyring(revoke(keys, "beta", 1))
    compared: list[int] = []
    real = hmac.compare_digest

    def counted(one: Any, other: Any) -> bool:
        compared.append(len(one) - len(other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for secret in (good, late, spare, *BAD):
        compared.clear()
        try:
            keyring.holder(secret, NOW)
        except Denied:
            assert secret not in (good, spare)
        # Of one length, too: unlike ones are told apart at once.
        assert compared == [0]


def test_a_secret_holds_to_the_end_of_its_last_day() -> None:
    keys, (secret,) = made("acme", expires="2027-01-31")
    keyring = Keyring(keys)
    end = datetime(2027, 2, 1, tzinfo=UTC).timestamp()
    assert keyring.holder(secret, end - 1).name == "acme"
    status, code, message = denial(keyring, secret, end)
    assert (status, code) == (401, "expired")
    assert "2027-01-31" in message
    # Who has the name only is told nothing of it.
    assert denial(keyring, secret[:-1] + "_", end)[1] == "invalid_api_key"


def test_rotation_two_secrets_hold_until_the_first_is_revoked() -> None:
    keys, (old, new) = made("acme", "acme")
    both = Keyring(keys)
    assert both.holder(old, NOW) == both.holder(new, NOW)
    after = revoke(keys, "acme", 1)
    assert denial(Keyring(after), old)[:2] == (401, "revoked")
    assert denial(Keyring(after), old[:-1] + "_")[1] == "invalid_api_key"
    assert Keyring(after).holder(new, NOW).name == "acme"
    assert keys.root["acme"].secrets[0].revoked is False
    assert denial(Keyring(revoke(after, "acme")), new)[1] == "revoked"


def test_numbers_are_never_given_twice_and_a_key_keeps_its_scopes() -> None:
    keys, _ = made("acme", "acme")
    keys, secret = add_secret(revoke(keys, "acme"), "acme", NOISE, ("metrics",), "2026-12-01")
    assert [one.id for one in keys.root["acme"].secrets] == [1, 2, 3]
    assert Keyring(keys).holder(secret, NOW).scopes == {"generate"}


def test_a_key_may_what_its_scopes_say() -> None:
    key = Keyring((keys := made("acme"))[0]).holder(keys[1][0], NOW)
    key.may("generate")
    with pytest.raises(
        Denied, match="key acme has the scope generate, and this needs metrics"
    ) as e:
        key.may("metrics")
    assert (e.value.status, e.value.code) == (403, "scope")


# --- the file ---

MISTAKES = {
    "": "Input should be an object",
    "[]": "Input should be an object",
    "acme: 1": "acme",
    GOOD + "\n" + GOOD: "'acme' is given twice",
    GOOD.replace("id: 1", "id: 1, id: 2"): "'id' is given twice",
    GOOD.replace("acme", "1"): "put it into quotes",
    GOOD.replace("acme", "a b"): "a b",
    GOOD.replace("id: 1", "id: true"): "id: Input should be a valid integer",
    GOOD.replace("id: 1", "id: 1.0"): "id",
    GOOD.replace("id: 1", "id: '1'"): "id",
    GOOD.replace("id: 1", "id: 0"): "id",
    GOOD.replace("id: 1, ", ""): "id: Field required",
    GOOD.replace(HASH, HASH[1:]): "sha256",
    GOOD.replace(HASH, HASH + "0"): "sha256",
    GOOD.replace(HASH, HASH.upper()): "sha256",
    GOOD.replace(HASH, f'"{HASH}\\n"'): "sha256",
    GOOD.replace(HASH, "1" * 64): "sha256",
    GOOD.replace("created: 2026-11-30", "created: 2026-13-30"): "must be a day",
    GOOD.replace("created: 2026-11-30", "created: '20261130'"): "must be a day",
    GOOD.replace("created: 2026-11-30", "created: '0'"): "must be a day",
    GOOD.replace("created: 2026-11-30", "created: 2026-11-30T00:00:00"): "must be a day",
    GOOD.replace("created: 2026-11-30", "created: 0"): "created",
    GOOD.replace("id: 1", "id: 1, expires: soon"): "must be a day",
    GOOD.replace("id: 1", "id: 1, revoked: 1"): "revoked",
    GOOD.replace("id: 1", "id: 1, revoked: 'false'"): "revoked",
    GOOD.replace("id: 1", "id: 1, revokd: true"): "revokd",
    GOOD.replace("scopes:", "tier: free, scopes:"): "tier",
    GOOD.replace("[generate]", "[]"): "scopes",
    GOOD.replace("[generate]", "[admin]"): "scopes",
    GOOD.replace("[generate]", "generate"): "scopes",
    re.sub(r"secrets: \[.*\]", "secrets: []", GOOD): "secrets",
    GOOD.replace("[{", "[{id: 1, sha256: " + HASH + ", created: 2026-01-01}, {"): "the number 1",
}


def parsed(raw: bytes) -> Keys:
    return parse_sheet(Keys, raw, "the file of keys")


def test_a_good_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(GOOD)
    keyring, sha256 = read_keyring(tmp_path / "keys.yaml")
    assert sha256 == hashlib.sha256(GOOD.encode()).hexdigest()
    assert denial(keyring, "rondo-acme.1." + NOISE)[1] == "invalid_api_key"


@pytest.mark.parametrize("raw", MISTAKES, ids=range(len(MISTAKES)))
def test_a_file_with_a_mistake_is_refused_in_one_line(raw: str) -> None:
    with pytest.raises(UserError, match=re.escape(MISTAKES[raw])) as caught:
        parsed(raw.encode())
    assert "\n" not in str(caught.value)


days = st.dates(date(1970, 1, 1), date(2999, 12, 31)).map(date.isoformat)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True) | st.sampled_from(
    ["5e15", "1", "null", "true", "no", "1_0", "0x1f", "1.5", "2026-11-30", "e1", "1e1"]
)
kept = st.fixed_dictionaries(
    {
        "id": st.integers(1, 40),
        "sha256": st.text("0123456789abcdef", min_size=64, max_size=64) | st.just("1" * 64),
        "created": days,
    },
    optional={"expires": days, "revoked": st.booleans()},
)
entries = st.fixed_dictionaries(
    {
        "scopes": st.lists(st.sampled_from(["generate", "metrics"]), min_size=1, max_size=3),
        "secrets": st.lists(kept, min_size=1, max_size=3, unique_by=lambda one: one["id"]),
    }
)
trees = st.dictionaries(names, entries, max_size=3)


@settings(deadline=None)
@given(trees)
def test_what_is_written_is_read_as_it_was(tree: dict[str, Any]) -> None:
    keys = parsed(json.dumps(tree).encode())
    text = text_of(keys)
    assert parsed(text.encode()) == keys
    assert text_of(parsed(text.encode())) == text
    # And by who reads YAML as everybody does.
    assert set(yaml.safe_load(text)) == set(tree)


# Whatever YAML holds, and what nearly belongs there.
words = st.sampled_from(
    ["acme", "scopes", "secrets", "generate", "id", "sha256", "created", "expires", "revoked", HASH]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | words
junk = st.recursive(
    scalars | days,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


def holds(tree: Any) -> bool:
    """The format once more, in plain words."""

    def day(value: Any) -> bool:
        if type(value) is not str or not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
            return False
        try:
            return bool(date(*map(int, value.split("-"))))
        except ValueError:
            return False

    def one(value: Any) -> bool:
        return (
            type(value) is dict
            and {"id", "sha256", "created"} <= set(value)
            and set(value) <= {"id", "sha256", "created", "expires", "revoked"}
            and type(value["id"]) is int
            and value["id"] >= 1
            and type(value["sha256"]) is str
            and re.fullmatch(r"[0-9a-f]{64}", value["sha256"]) is not None
            and day(value["created"])
            and (value.get("expires") is None or day(value["expires"]))
            and type(value.get("revoked", False)) is bool
        )

    return type(tree) is dict and all(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name)
        and type(entry) is dict
        and set(entry) == {"scopes", "secrets"}
        and type(entry["scopes"]) is list
        and entry["scopes"] != []
        and all(scope in ("generate", "metrics") for scope in entry["scopes"])
        and type(entry["secrets"]) is list
        and entry["secrets"] != []
        and all(map(one, entry["secrets"]))
        and len({secret["id"] for secret in entry["secrets"]}) == len(entry["secrets"])
        for name, entry in tree.items()
    )


def accepted(raw: bytes) -> bool:
    """Whether a file is read; what is wrong with it is one line, and what is read is good."""
    try:
        keys = parsed(raw)
    except UserError as error:
        told = str(error)
    else:
        assert holds(json.loads(keys.model_dump_json()))
        return True
    assert "\n" not in told
    return False


@st.composite
def nearly_good(draw: st.DrawFn) -> Any:
    """A good tree of which one part was replaced, dropped or added."""
    tree: Any = draw(st.dictionaries(names, entries, min_size=1, max_size=2))
    at: Any = tree
    while True:
        spot = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[spot], dict | list) or not at[spot] or draw(st.booleans()):
            break
        at = at[spot]
    how = draw(st.sampled_from(["replace", "drop", "add", "leave"]))
    if how == "replace":
        at[spot] = draw(junk)
    elif how == "drop":
        del at[spot]
    elif how == "add" and isinstance(at, dict):
        at[draw(words | st.text(max_size=4))] = draw(junk)
    return tree


@settings(deadline=None)
@given(nearly_good() | junk)
def test_a_tree_is_accepted_if_and_only_if_it_is_good(tree: Any) -> None:
    assert accepted(json.dumps(tree).encode()) == holds(tree)


@settings(deadline=None)
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.tuples(st.integers(0, len(GOOD)), st.integers(0, 3), st.binary(max_size=3)).map(
        lambda cut: GOOD.encode()[: cut[0]] + cut[2] + GOOD.encode()[cut[0] + cut[1] :]
    )
)
def test_no_bytes_crash_the_parser(raw: bytes) -> None:
    accepted(raw)


# --- the commands ---


def new(path: Path, capsys: pytest.CaptureFixture[str], **how: Any) -> str:
    run_new(KeysNewConfig(keys=str(path), **{"name": "acme", **how}))
    out, err = capsys.readouterr()
    assert out.strip() not in err
    return out


def test_new_prints_the_secret_alone_and_keeps_it_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.yaml"
    out = new(path, capsys, expires="2999-01-31")
    assert re.fullmatch(r"rondo-acme\.1\.[A-Za-z0-9_-]{43}\n", out)
    assert out.strip().rpartition(".")[2] not in path.read_text()
    assert hash_of(out.strip()) in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_keyring(path)[0].holder(out.strip(), NOW).name == "acme"
    other = new(path, capsys).strip()
    assert other.startswith("rondo-acme.2.")
    assert read_keyring(path)[0].holder(out.strip(), NOW).name == "acme"
    assert list(tmp_path.iterdir()) == [path]


def test_revoke_and_list_tell_states_and_no_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.yaml"
    first = new(path, capsys).strip()
    second = new(path, capsys).strip()
    run_revoke(KeysRevokeConfig(keys=str(path), name="acme", secret=1))
    assert denial(read_keyring(path)[0], first)[1] == "revoked"
    keys, _ = add_secret(read_keys(path), "beta", NOISE, ("metrics",), "2020-01-01", "2020-02-01")
    replace(path, text_of(keys))
    capsys.readouterr()
    run_list(KeysListConfig(keys=str(path)))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    today = datetime.now(UTC).date().isoformat()
    assert rows[1] == ["acme", "generate", "1", today, "-", "revoked"]
    assert rows[2] == ["acme", "generate", "2", today, "-", "in", "force"]
    assert rows[3] == ["beta", "metrics", "1", "2020-01-01", "2020-02-01", "expired"]
    run_revoke(KeysRevokeConfig(keys=str(path), name="acme"))
    assert denial(read_keyring(path)[0], second)[1] == "revoked"


def test_readers_stay_who_they_were_and_links_stay_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").mkdir()
    path = tmp_path / "real" / "keys.yaml"
    new(path, capsys)
    path.chmod(0o640)
    link = tmp_path / "keys.yaml"
    link.symlink_to(path)
    new(link, capsys)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert len(read_keys(path).root["acme"].secrets) == 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"name": "a b"}, "'a b' cannot be the name of a key"),
        ({"name": ""}, "'' cannot be the name"),
        ({"name": "x" * 65}, "cannot be the name"),
        ({"expires": "2020-01-01"}, "--expires 2020-01-01 has passed"),
        ({"expires": "31.1.2027"}, "--expires must be a day, as 2027-01-31"),
        ({"expires": "2027-02-30"}, "--expires must be a day"),
        ({"scopes": ()}, "--scopes names none"),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        new(tmp_path / "keys.yaml", capsys, **how)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_mistakes_in_what_is_revoked_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.yaml"
    with pytest.raises(UserError, match=f"cannot read the file of keys {path}"):
        run_revoke(KeysRevokeConfig(keys=str(path), name="acme"))
    assert not path.exists()
    new(path, capsys)
    before = path.read_bytes()
    with pytest.raises(UserError, match="there is no key 'acmé': there are acme"):
        run_revoke(KeysRevokeConfig(keys=str(path), name="acmé"))
    with pytest.raises(UserError, match="key acme has no secret 7: there are 1"):
        run_revoke(KeysRevokeConfig(keys=str(path), name="acme", secret=7))
    assert path.read_bytes() == before


def test_a_damaged_file_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(GOOD + "\nbeta: {}")
    with pytest.raises(UserError, match="beta"):
        new(path, capsys)
    assert path.read_text() == GOOD + "\nbeta: {}"


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.yaml"
    new(path, capsys)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*: No space left"):
        new(path, capsys)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert capsys.readouterr().out == ""


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    replace(path, text_of(made("acme")[0]))

    def write(name: str) -> None:
        for _ in range(5):
            with locked(path) as there:
                keys, _ = add_secret(read_keys(there), name, NOISE, ("generate",), "2026-11-30")
                replace(there, text_of(keys))

    writers = [threading.Thread(target=write, args=(f"k{number}",)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    there = read_keys(path).root
    assert {name: len(entry.secrets) for name, entry in there.items()} == {
        "acme": 1,
        **{f"k{number}": 5 for number in range(4)},
    }
