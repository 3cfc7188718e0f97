"""Files that are read again when they change: what is good takes effect, what is not does not."""

import os
import threading
from pathlib import Path

import pytest

from rondo.errors import UserError
from rondo_govern.keys import Keyring, read_keyring
from rondo_govern.keys_commands import run_new, run_revoke
from rondo_govern.rules import Denied
from rondo_govern.settings import KeysNewConfig, KeysRevokeConfig
from rondo_govern.watch import Watched


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def number(path: Path) -> int:
    """What a file holds, if it is a number."""
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} holds no number") from error


class Desk:
    """A watched file, what was told of it, and what changed."""

    def __init__(self, path: Path):
        self.path, self.clock = path, Clock()
        self.told: list[str] = []
        self.changed: list[int] = []
        self.loads = 0
        path.write_text("1")
        self.watched = Watched(path, self.load, self.told.append, clock=self.clock)
        self.watched.changed = self.changed.append

    def load(self, path: Path) -> int:
        self.loads += 1
        return number(path)

    def write(self, text: str) -> None:
        """Put another file in its place, as `mv` does."""
        fresh = self.path.with_name("fresh")
        fresh.write_text(text)
        fresh.replace(self.path)

    def later(self) -> int:
        self.clock.now += 1.0
        return self.watched.value


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "file")


def test_a_changed_file_takes_effect_at_the_next_look(desk: Desk) -> None:
    assert desk.watched.value == 1
    desk.write("2")
    desk.clock.now = 0.99
    assert desk.watched.value == 1
    desk.clock.now = 1.0
    assert desk.watched.value == 2
    assert (desk.watched.changes, desk.changed, desk.loads) == (1, [2], 2)
    desk.write("3")
    desk.clock.now = 1.99
    assert desk.watched.value == 2
    assert desk.later() == 3


def test_a_file_that_stays_is_not_read_again(desk: Desk) -> None:
    assert [desk.later() for _ in range(5)] == [1] * 5
    assert (desk.loads, desk.watched.changes, desk.told) == (1, 0, [])


def test_a_file_written_in_place_is_seen_though_its_size_is_the_same(desk: Desk) -> None:
    desk.path.write_text("2")
    os.utime(desk.path, ns=(1, 1))
    assert desk.later() == 2
    # What was put in its place with the time of the one before.
    desk.write("3")
    os.utime(desk.path, ns=(1, 1))
    assert desk.later() == 3


def test_a_bad_file_is_told_once_and_the_old_one_stays(desk: Desk) -> None:
    desk.write("two")
    assert [desk.later() for _ in range(4)] == [1] * 4
    assert desk.told == ["file holds no number; the one before stays in force"]
    assert (desk.watched.failures, desk.loads) == (1, 2)
    assert desk.watched.refused == "file holds no number"
    desk.write("three")
    assert desk.later() == 1
    assert (desk.watched.failures, len(desk.told)) == (2, 2)
    desk.write("3")
    assert desk.later() == 3
    assert (desk.watched.refused, desk.watched.failures) == (None, 2)
    assert (desk.watched.changes, desk.changed) == (1, [3])


def test_a_file_that_vanishes_leaves_its_value_in_force(desk: Desk) -> None:
    desk.path.unlink()
    assert [desk.later(), desk.later()] == [1, 1]
    assert (desk.watched.failures, len(desk.told)) == (1, 1)
    desk.path.write_text("2")
    assert desk.later() == 2
    assert desk.watched.refused is None


def test_a_half_written_file_settles(desk: Desk) -> None:
    with desk.path.open("w") as file:
        file.flush()
        assert desk.later() == 1
        assert desk.watched.refused is not None
        file.write("27")
    assert desk.later() == 27
    assert desk.watched.refused is None


def test_a_change_while_the_file_is_read_is_not_missed(tmp_path: Path) -> None:
    path, clock = tmp_path / "file", Clock()
    path.write_text("1")

    def load(path: Path) -> int:
        value = number(path)
        if value < 3:
            path.write_text(str(value + 1))
            os.utime(path, ns=(value, value))
        return value

    watched = Watched(path, load, print, clock=clock)
    seen = []
    for clock.now in (1.0, 2.0, 3.0):
        seen.append(watched.value)
    assert seen == [2, 3, 3]


def test_a_file_that_is_bad_at_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no number"):
        Watched(tmp_path / "file", number, print)


def test_one_thread_looks_and_the_others_do_not_wait(tmp_path: Path) -> None:
    path, clock = tmp_path / "file", Clock()
    path.write_text("1")
    begun, go_on = threading.Event(), threading.Event()
    loads: list[str] = []

    def load(path: Path) -> int:
        loads.append(threading.current_thread().name)
        if threading.current_thread().name == "slow":
            begun.set()
            assert go_on.wait(10)
        return number(path)

    watched = Watched(path, load, print, clock=clock)
    path.write_text("22")
    clock.now = 1.0
    slow = threading.Thread(target=lambda: watched.value, name="slow")
    slow.start()
    assert begun.wait(10)
    # It looks; whoever comes meanwhile has the old value, though another look would be due.
    clock.now = 5.0
    assert [watched.value for _ in range(3)] == [1, 1, 1]
    go_on.set()
    slow.join()
    assert watched.value == 22
    assert loads == [threading.current_thread().name, "slow"]


def test_a_loader_that_breaks_does_not_stop_the_looking(tmp_path: Path) -> None:
    path, clock = tmp_path / "file", Clock()
    path.write_text("1")

    def load(path: Path) -> int:
        if path.read_text() == "broken":
            raise RuntimeError("a fault of ours")
        return number(path)

    told: list[str] = []
    watched = Watched(path, load, told.append, clock=clock)
    path.write_text("broken")
    clock.now = 1.0
    assert watched.value == 1
    assert told == ["a fault of ours; the one before stays in force"]
    assert (watched.refused, watched.failures) == ("a fault of ours", 1)
    path.write_text("22")
    clock.now = 2.0
    assert watched.value == 22


def test_nobody_waits_for_a_file_that_a_thread_reads(tmp_path: Path) -> None:
    path, clock, may = tmp_path / "file", Clock(), threading.Event()
    path.write_text("1")

    def load(path: Path) -> int:
        if (found := number(path)) > 1:
            assert may.wait(10)
        return found

    read = threading.Event()
    watched = Watched(path, load, print, clock=clock, waits=False)
    watched.changed = lambda value: read.set()
    path.write_text("22")
    clock.now = 1.0
    assert [watched.value for _ in range(3)] == [1, 1, 1]
    may.set()
    assert read.wait(10)
    assert watched.value == 22


def test_keys_are_rotated_and_revoked_while_the_server_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, clock, told = tmp_path / "keys.yaml", Clock(), list[str]()

    def new() -> str:
        run_new(KeysNewConfig(keys=str(path), name="acme"))
        return capsys.readouterr().out.strip()

    def holders(*secrets: str) -> list[str]:
        clock.now += 1.0
        found = []
        for secret in secrets:
            ring: Keyring = watched.value[0]
            try:
                found.append(ring.holder(secret, 1.8e9).name)
            except Denied as denied:
                found.append(denied.code)
        return found

    first = new()
    watched = Watched(path, read_keyring, told.append, clock=clock)
    second = new()
    assert holders(first, second) == ["acme", "acme"]
    run_revoke(KeysRevokeConfig(keys=str(path), name="acme", secret=1))
    assert holders(first, second) == ["revoked", "acme"]
    # A file that does not hold does not let a revoked secret in again, nor lock anyone out.
    good = path.read_text()
    path.write_text(good.replace("true", "1"))
    assert holders(first, second) == ["revoked", "acme"]
    assert len(told) == 1
    assert "revoked: Input should be a valid boolean" in told[0]
    path.write_text(good)
    run_revoke(KeysRevokeConfig(keys=str(path), name="acme"))
    assert holders(first, second) == ["revoked", "revoked"]
    assert watched.value[1] != ""
