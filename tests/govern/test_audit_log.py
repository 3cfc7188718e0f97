"""The audit log is written whole: chained, through crashes, full disks, rotation and threads."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from audit_logs import START, files_of, filled, follows, lines_of

from rondo.errors import UserError
from rondo_govern.audit.log import AuditError, AuditLog
from rondo_govern.audit.reading import verify


def whole(path: Path) -> list[dict]:
    return follows([line for file in files_of(path) for line in lines_of(file)])


def told(path: Path) -> dict:
    return json.loads(path.with_name("audit.jsonl.head").read_text())


# ---- the chain


def test_each_record_names_the_hash_of_the_one_before(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl", clock=lambda: START + 0.1239)
    assert log.append("opened", model="smol") == 1
    assert log.append("taken", id="a-1", stop=("\n", "né"), depths={10: 1, 4: 2}) == 2
    log.close()
    first, second = whole(tmp_path / "audit.jsonl")
    assert first["kind"] == "opened"
    assert first["time"] == "2026-11-30T00:53:20.123Z"
    assert second["depths"] == {"10": 1, "4": 2}
    assert second["stop"] == ["\n", "né"]
    assert log.head == (2, second["hash"])
    assert told(tmp_path / "audit.jsonl") == {"seq": 2, "hash": second["hash"]}


def test_what_is_no_proper_text_is_kept_and_read_again(tmp_path: Path) -> None:
    path = filled(tmp_path, records=2, stop=["\ud800", "\ud83d\ude00", "\u2028"])
    assert not verify(path).findings
    assert json.loads(lines_of(path)[0])["stop"] == ["\ud800", "\U0001f600", "\u2028"]


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = filled(tmp_path, records=3, rotate_bytes=10**6)
    log = AuditLog.open(path)
    assert log.cut == 0
    assert log.append("opened") == 4
    log.close()
    assert [record["seq"] for record in whole(path)] == [1, 2, 3, 4]


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    filled(tmp_path)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_after_the_end_nothing_is_added(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl")
    log.close()
    log.close()
    with pytest.raises(AuditError, match="closed"):
        log.append("late")


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl")
    with pytest.raises(UserError, match="another process writes to the audit log"):
        AuditLog.open(tmp_path / "audit.jsonl")
    log.close()
    AuditLog.open(tmp_path / "audit.jsonl").close()


def test_a_log_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        AuditLog.open(tmp_path / "none" / "audit.jsonl")
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        AuditLog.open(tmp_path / "audit.jsonl")


# ---- what a start finds


def test_an_incomplete_last_line_is_cut_off(tmp_path: Path) -> None:
    path = filled(tmp_path, records=3, rotate_bytes=10**6)
    before = path.read_bytes()
    path.write_bytes(before + before[:70])
    assert verify(path).torn == 70
    assert not verify(path).findings
    log = AuditLog.open(path)
    assert log.cut == 70
    assert path.read_bytes() == before
    log.append("opened", cut=log.cut)
    log.close()
    whole(path)


@pytest.mark.parametrize(
    "kind", ["altered", "before", "shorter", "empty", "gone", "headless", "head"]
)
def test_a_damaged_log_is_refused_and_left_as_it_is(tmp_path: Path, kind: str) -> None:
    path = filled(tmp_path, records=30)
    lines, head = lines_of(path), path.with_name("audit.jsonl.head")
    match kind:
        case "altered":
            path.write_bytes(path.read_bytes().replace(b"depth", b"death", 1))
        case "before":
            files_of(path)[-2].write_bytes(files_of(path)[-2].read_bytes()[:-2] + b" \n")
        case "shorter":
            path.write_bytes(b"".join(lines[:-1]))
        case "empty":
            path.write_bytes(b"")
        case "gone":
            files_of(path)[-2].unlink()
        case "headless":
            head.unlink()
        case _:
            head.write_text('{"seq": true}')
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"is damaged: audit\..*keep all its files"):
        AuditLog.open(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# ---- rotation


def test_rotation_keeps_the_chain(tmp_path: Path) -> None:
    path = filled(tmp_path, records=60)
    assert len(files_of(path)) > 4
    records = whole(path)
    for before, file in zip(files_of(path), files_of(path)[1:], strict=False):
        first = json.loads(lines_of(file)[0])
        assert (first["kind"], first["previous"]) == ("continued", before.name)
    assert sum(record["kind"] == "continued" for record in records) == len(files_of(path)) - 1
    assert not verify(path).findings


@pytest.mark.parametrize("left", ["nothing", "an empty file", "half a line"])
def test_a_crash_amid_rotation_is_mended(tmp_path: Path, left: str) -> None:
    path = filled(tmp_path, records=30)
    number = len(files_of(path))
    half = lines_of(path)[0][:40]
    path.rename(tmp_path / f"audit.{number:06d}.jsonl")
    if left != "nothing":
        path.write_bytes(half if left == "half a line" else b"")
    assert not verify(path).findings
    log = AuditLog.open(path)
    log.append("opened")
    log.close()
    assert not verify(path).findings
    assert whole(path)[-2]["previous"] == f"audit.{number:06d}.jsonl"


# ---- disks that fail


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let the system write no more, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 100])
def test_what_the_disk_has_no_room_for_is_undone(tmp_path: Path, room: int) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog.open(path, fsync="off")
    log.append("opened")
    before = path.read_bytes()
    with no_file_larger_than(len(before) + room), pytest.raises(AuditError, match="cannot write"):
        log.append("taken", id="a-1")
    assert path.read_bytes() == before
    assert log.append("taken", id="a-2") == 2
    log.close()
    assert [record.get("id") for record in whole(path)] == [None, "a-2"]


def test_a_rotation_without_room_is_undone(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog.open(path, fsync="off", rotate_bytes=100)
    log.append("opened")
    before = path.read_bytes()
    with no_file_larger_than(30), pytest.raises(AuditError, match="cannot begin a new"):
        log.append("taken")
    assert {file.name for file in tmp_path.glob("*.jsonl")} == {"audit.jsonl"}
    assert path.read_bytes() == before
    assert log.append("taken") == 3
    log.close()
    assert [record["kind"] for record in whole(path)] == ["opened", "continued", "taken"]


@pytest.mark.parametrize("fsync", ["each", "interval"])
def test_a_disk_that_fails_once_is_not_trusted_again(
    tmp_path: Path, fsync: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl", fsync=fsync, interval=0.0)

    def failing(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        seq = log.append("taken")
        if fsync == "each":
            with pytest.raises(AuditError, match="Input/output error"):
                log.durable(seq)
        log._thread.join()
    with pytest.raises(AuditError, match="restart with a sound disk"):
        log.append("taken")
    with pytest.raises(AuditError, match="restart with a sound disk"):
        log.close()
    assert told(tmp_path / "audit.jsonl")["seq"] == 0


# ---- threads


def test_threads_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog.open(path, rotate_bytes=20_000, interval=0.0)
    seqs: list[list[int]] = [[] for _ in range(8)]

    def write(number: int) -> None:
        for count in range(100):
            seqs[number].append(log.append("taken", id=f"{number}-{count}"))

    run_all(write)
    log.close()
    records = whole(path)
    assert len(files_of(path)) > 5
    assert len(records) == 800 + len(files_of(path)) - 1
    for number, own in enumerate(seqs):
        assert [records[seq - 1]["id"] for seq in own] == [f"{number}-{c}" for c in range(100)]


def run_all(target: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=target, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_share_the_way_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog.open(path, fsync="each")
    all_added, synced, real = threading.Event(), [], os.fsync

    def counted(file: int) -> None:
        if os.fstat(file).st_ino == path.stat().st_ino:
            synced.append(log.head.seq)
            # The first is slow, and the others wait for the next one together.
            assert all_added.wait(10)
        real(file)

    def write(_: int) -> None:
        seq = log.append("taken")
        if seq == 8:
            all_added.set()
        log.durable(seq)
        assert max(synced) >= seq

    monkeypatch.setattr(os, "fsync", counted)
    run_all(write)
    assert len(synced) <= 2
    log.close()
    assert told(path)["seq"] == 8


def test_a_file_is_not_closed_while_it_is_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    log = AuditLog.open(tmp_path / "audit.jsonl", fsync="each", rotate_bytes=100)
    begun, rotated, real = threading.Event(), threading.Event(), os.fsync

    def slow(file: int) -> None:
        if threading.current_thread() is log._thread:
            begun.set()
            assert rotated.wait(10)
        real(file)

    monkeypatch.setattr(os, "fsync", slow)
    log.append("opened")
    assert begun.wait(10)
    seq = log.append("taken")
    rotated.set()
    log.durable(seq)
    log.close()
    assert [record["kind"] for record in whole(tmp_path / "audit.jsonl")][1:] == [
        "continued",
        "taken",
    ]
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_head_follows_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog.open(path, interval=0.001)
    log.append("taken")
    deadline = time.monotonic() + 10
    while told(path)["seq"] < 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert told(path)["seq"] == 1
    log.close()


# ---- kill -9

WRITER = """
import os, sys
from pathlib import Path
from rondo_govern.audit.log import AuditLog
log = AuditLog.open(Path(sys.argv[1]), fsync=sys.argv[2], interval=0.002, rotate_bytes=30_000)
log.append("opened", cut=log.cut)
while True:
    seq = log.append("taken", prompt=list(range(200 + log.head.seq % 900)))
    log.durable(seq)
    os.write(1, b"%d\\n" % seq)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_nothing_is_lost_to_kills(tmp_path: Path, kills: int) -> None:
    path, draw = tmp_path / "audit.jsonl", random.Random(7)
    last = 0
    for number in range(kills):
        command = [sys.executable, "-c", WRITER, str(path), ("each", "interval", "off")[number % 3]]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(draw.randint(1, 120)):
                first = writer.stdout.readline()
                assert int(first) > last
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read()
        last = int([first, *rest.split(b"\n")[:-1]][-1])
        verdict = verify(path)
        assert not verdict.findings
        assert verdict.head.seq >= last
    AuditLog.open(path).close()
    assert len(whole(path)) >= last
    assert len(files_of(path)) > kills
