"""Whatever is done to a log shows, and where; and the reader survives whatever it reads."""

import json
import random
import shutil
import threading
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from audit_logs import START, files_of, filled, line_of, lines_of, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rondo.errors import ProofError, UserError
from rondo_govern.audit import reading
from rondo_govern.audit.commands import run_verify
from rondo_govern.audit.log import AuditLog
from rondo_govern.audit.reading import Broken, read, verify
from rondo_govern.audit.records import GENESIS, digest_of, moment_of, parse_moment
from rondo_govern.settings import AuditVerifyConfig


def told(path: Path, head: str | None = None) -> list[tuple[str, int | None, str]]:
    """Return where which kind of finding is."""
    return [(f.file, f.line, f.what.split()[0].strip(":,")) for f in verify(path, head).findings]


def edit(file: Path, change: Callable[[list[bytes]], object]) -> None:
    lines = lines_of(file)
    change(lines)
    file.write_bytes(b"".join(lines))


def changed(line: bytes, **fields: object) -> bytes:
    """Return a line that says another thing, with the hash that it had."""
    return plain(json.loads(line) | fields) + b"\n"


def rehashed(line: bytes, **fields: object) -> bytes:
    return line_of(json.loads(line) | fields)


# ---- a good log


def test_a_good_log_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(tmp_path)
    verdict = verify(path)
    files = files_of(path)
    records = [record for file in files for record in map(json.loads, lines_of(file))]
    assert (verdict.found, verdict.findings, verdict.torn) == (0, [], 0)
    assert (verdict.records, verdict.segments) == (len(records), len(files))
    assert (verdict.first, *verdict.head) == (1, len(records), records[-1]["hash"])
    assert list(read(path)) == records
    run_verify(AuditVerifyConfig(log=str(path), head=records[7]["hash"]))
    assert capsys.readouterr().out == (
        f"{len(records)} records in {len(files)} files, whole and unaltered; head "
        f"{records[-1]['hash']} (seq {len(records)})\n"
        "the hash that was noted is that of record 8\n"
    )


def test_an_empty_log_is_whole(tmp_path: Path) -> None:
    path = filled(tmp_path, records=0)
    assert (verify(path).found, verify(path).head) == (0, (0, GENESIS))
    assert list(read(path)) == []


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for use in (verify, lambda path: list(read(path))):
        with pytest.raises(UserError, match="there is no audit log"):
            use(tmp_path / "none" / "audit.jsonl")
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        verify(tmp_path / "audit.jsonl")
    with pytest.raises(UserError, match="is no hash"):
        run_verify(AuditVerifyConfig(log=str(tmp_path / "audit.jsonl"), head="8F"))


def test_files_that_ended_before_are_left_out(tmp_path: Path) -> None:
    path = filled(tmp_path, records=60)
    records, firsts = list(read(path)), [json.loads(lines_of(f)[0]) for f in files_of(path)]
    for first, after in pairwise(firsts):
        for since in (moment_of(first), moment_of(after) - 0.001):
            assert list(read(path, since)) == records[first["seq"] - 1 :]
    assert list(read(path, START + 1e9)) == records[firsts[-1]["seq"] - 1 :]
    assert list(read(path, START - 1)) == records
    edit(path, lambda lines: lines.pop(1))
    with pytest.raises(Broken, match="missing"):
        list(read(path, START + 1e9))


def test_a_log_is_read_while_it_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log, done = AuditLog.open(path, fsync="off", rotate_bytes=800), threading.Event()

    def write() -> None:
        for number in range(300):
            log.append("taken", id=str(number))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        seqs = [record["seq"] for record in read(path)]
        assert seqs == list(range(1, len(seqs) + 1))
    writer.join()
    log.close()
    assert len(list(read(path))) == 300 + len(files_of(path)) - 1


def test_a_long_log_takes_no_memory(tmp_path: Path) -> None:
    path = filled(tmp_path, records=1500, rotate_bytes=400_000, text="x" * 700)
    assert sum(file.stat().st_size for file in files_of(path)) > 1_200_000
    tracemalloc.start()
    assert not verify(path).found
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_a_line_without_end_is_not_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path, records=3)
    monkeypatch.setattr(reading, "LONGEST", 400)
    assert not verify(path).found
    path.write_bytes(path.read_bytes() + b"x" * 1000)
    assert told(path) == [(LAST, 4, "altered"), (LAST, 5, "altered")]
    assert verify(path).torn == 200


# ---- what is done to it, and where it shows

FIRST, SECOND, LAST = "audit.000001.jsonl", "audit.000002.jsonl", "audit.jsonl"


def flipped(lines: list[bytes]) -> None:
    lines[4] = lines[4].replace(b'"depth":4', b'"depth":5')


def spaced(lines: list[bytes]) -> None:
    lines[4] = lines[4].replace(b'"depth":4', b'"depth": 4')


def twice(lines: list[bytes]) -> None:
    lines[4] = lines[4].replace(b'"depth":4', b'"depth":4,"depth":4')


ONE_LINE = {
    "a value": (flipped, [(5, "altered")]),
    "a blank": (spaced, [(5, "altered")]),
    "a key that comes twice": (twice, [(5, "altered")]),
    "a value with its hash": (
        lambda lines: lines.__setitem__(4, rehashed(lines[4], depth=99)),
        [(5, "altered")],
    ),
    "a number with its hash": (
        lambda lines: lines.__setitem__(4, rehashed(lines[4], seq=900)),
        [(5, "altered")],
    ),
    "a time with its hash": (
        lambda lines: lines.__setitem__(4, rehashed(lines[4], time="yesterday")),
        [(5, "altered")],
    ),
    "no number": (
        lambda lines: lines.__setitem__(4, rehashed(lines[4], seq=True)),
        [(5, "altered")],
    ),
    "the first": (lambda lines: lines.pop(0), [(1, "missing")]),
    "one amid": (lambda lines: lines.pop(4), [(5, "missing")]),
    "two amid": (lambda lines: lines.__delitem__(slice(4, 6)), [(5, "missing")]),
    "one again": (lambda lines: lines.insert(5, lines[4]), [(6, "duplicated")]),
    "one much later": (lambda lines: lines.insert(9, lines[1]), [(10, "duplicated")]),
    "two swapped": (
        lambda lines: lines.__setitem__(slice(4, 6), [lines[5], lines[4]]),
        [(5, "missing"), (6, "reordered")],
    ),
    "one moved on": (
        lambda lines: lines.insert(7, lines.pop(2)),
        [(3, "missing"), (8, "reordered")],
    ),
    "a foreign line": (lambda lines: lines.insert(4, b"hello\n"), [(5, "altered")]),
    "an empty line": (lambda lines: lines.insert(4, b"\n"), [(5, "altered")]),
    "a line in two": (
        lambda lines: lines.__setitem__(slice(4, 5), [lines[4][:9] + b"\n", lines[4][9:]]),
        [(5, "altered"), (6, "altered")],
    ),
    "two lines in one": (
        lambda lines: lines.__setitem__(slice(4, 6), [lines[4][:-1] + lines[5]]),
        [(5, "altered"), (6, "missing")],
    ),
    "two things": (
        lambda lines: (flipped(lines), lines.pop(8)),
        [(5, "altered"), (9, "missing")],
    ),
}


@pytest.mark.parametrize("what", ONE_LINE)
def test_the_line_that_was_touched_is_named(tmp_path: Path, what: str) -> None:
    path = filled(tmp_path)
    change, found = ONE_LINE[what]
    edit(tmp_path / FIRST, change)
    assert told(path) == [(FIRST, *one) for one in found]
    with pytest.raises(Broken, match=f"line {found[0][0]}: {found[0][1]}"):
        list(read(path))


def test_a_line_that_was_cut_off_the_end_is_missing(tmp_path: Path) -> None:
    path = filled(tmp_path)
    cut = 2
    edit(path, lambda lines: lines.__delitem__(slice(-cut, None)))
    assert told(path) == [(LAST, None, "missing")]
    assert verify(path).findings[0].seq == verify(path).head.seq + 1


def test_a_line_that_was_cut_in_half_is_missing(tmp_path: Path) -> None:
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    assert told(path) == [(LAST, None, "missing")]
    assert verify(path).torn > 0


def test_the_last_line_with_its_hash_differs_from_the_head(tmp_path: Path) -> None:
    path = filled(tmp_path)
    edit(path, lambda lines: lines.__setitem__(-1, rehashed(lines[-1], depth=99)))
    assert told(path) == [(LAST, len(lines_of(path)), "altered")]


def test_a_head_that_was_taken_or_altered_is_told(tmp_path: Path) -> None:
    path = filled(tmp_path)
    head = path.with_name("audit.jsonl.head")
    for bad in ("", "[]", '{"seq":1}', '{"seq":1,"hash":"x"}', '{"seq":"1","hash":"' + GENESIS):
        head.write_text(bad)
        assert told(path) == [("audit.jsonl.head", 1, "altered")]
    head.unlink()
    assert told(path) == [("audit.jsonl.head", None, "missing")]
    assert told(path, verify(path).head.hash) == []


def test_files_that_were_taken_are_missing(tmp_path: Path) -> None:
    path = filled(tmp_path, records=30)
    kept = {file: file.read_bytes() for file in files_of(path)}
    after = {FIRST: (SECOND, 1), SECOND: (LAST, 1), LAST: (SECOND, None)}
    assert len(kept) == 3
    for name, (file, line) in after.items():
        (tmp_path / name).unlink()
        assert told(path) == [(file, line, "missing")]
        (tmp_path / name).write_bytes(kept[tmp_path / name])
    for file in kept:
        file.unlink()
    assert told(path) == [(LAST, None, "missing")]


def test_a_file_that_was_renamed_is_told(tmp_path: Path) -> None:
    path = filled(tmp_path, records=30)
    (tmp_path / SECOND).rename(tmp_path / "audit.000009.jsonl")
    assert told(path) == [(LAST, 1, "renamed")]
    (tmp_path / FIRST).rename(tmp_path / "audit.000010.jsonl")
    assert told(path)[0] == ("audit.000009.jsonl", 1, "missing")


def test_lines_belong_to_their_file(tmp_path: Path) -> None:
    path = filled(tmp_path)
    one, two = lines_of(tmp_path / FIRST), lines_of(tmp_path / SECOND)
    for cut in (one[:-1], one + two[:1]):
        (tmp_path / FIRST).write_bytes(b"".join(cut))
        (tmp_path / SECOND).write_bytes(b"".join((one + two)[len(cut) :]))
        assert "reordered" in {kind for *_, kind in told(path)}
    (tmp_path / FIRST).write_bytes(b"".join(one[:2] + one[3:]))
    (tmp_path / SECOND).write_bytes(b"".join([*two[:4], one[2], *two[4:]]))
    assert told(path) == [(FIRST, 3, "missing"), (SECOND, 5, "reordered")]


def test_a_chain_made_anew_needs_a_hash_from_elsewhere(tmp_path: Path) -> None:
    path = filled(tmp_path)
    noted = verify(path).head.hash
    before, records = GENESIS, list(read(path))
    forged: dict[int, bytes] = {}
    for record in records:
        changes = {"depth": 99} if record["seq"] == 5 else {}
        forged[record["seq"]] = line_of(record | changes | {"prev": before})
        before = json.loads(forged[record["seq"]])["hash"]
    for file in files_of(path):
        file.write_bytes(b"".join(forged[json.loads(line)["seq"]] for line in lines_of(file)))
    assert told(path) == [(LAST, len(lines_of(path)), "altered")]
    path.with_name("audit.jsonl.head").write_text(json.dumps({"seq": len(records), "hash": before}))
    assert told(path) == []
    assert told(path, noted) == [(LAST, None, "missing")]
    assert told(path, before) == []


def test_old_files_may_go_if_their_last_hash_was_noted(tmp_path: Path) -> None:
    path = filled(tmp_path)
    noted = json.loads(lines_of(tmp_path / FIRST)[-1])
    (tmp_path / FIRST).unlink()
    assert told(path) == [(SECOND, 1, "missing")]
    assert told(path, noted["hash"]) == []
    assert verify(path, noted["hash"]).anchor == noted["seq"]
    left = [json.loads(line) for file in files_of(path) for line in lines_of(file)]
    assert list(read(path, moment_of(left[0]))) == left
    for since in (None, moment_of(left[0]) - 1):
        with pytest.raises(Broken, match="missing: records 1 to"):
            list(read(path, since))
    AuditLog.open(path).close()


def test_many_findings_are_counted(tmp_path: Path) -> None:
    path = filled(tmp_path, records=40, rotate_bytes=10**6)
    edit(path, lambda lines: lines.__setitem__(slice(None), [b"?\n"] * 40))
    with pytest.raises(ProofError) as error:
        run_verify(AuditVerifyConfig(log=str(path)))
    assert str(error.value).count("altered") == 20
    assert str(error.value).endswith("\n  and 20 more")


# ---- at random


TAMPERINGS = [
    "byte",
    "delete",
    "first",
    "last",
    "again",
    "swap",
    "value",
    "rehash",
    "cut",
    "move",
    "drop",
    "rename",
    "truncate",
    "all",
]


def tampering(draw: random.Random, path: Path) -> str:
    """Do something to a log that is whole, and return what."""
    files = files_of(path)
    file = draw.choice(files)
    lines = lines_of(file)
    at = draw.randrange(len(lines))
    other = draw.choice([number for number in range(len(lines)) if number != at])
    what = draw.choice(TAMPERINGS)
    match what:
        case "byte":
            raw = bytearray(file.read_bytes())
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            file.write_bytes(raw)
        case "delete" | "first" | "last":
            edit(file, lambda all_of: all_of.pop({"first": 0, "last": -1}.get(what, at)))
        case "again":
            edit(file, lambda all_of: all_of.insert(other, lines[at]))
        case "swap":
            lines[at], lines[other] = lines[other], lines[at]
            file.write_bytes(b"".join(lines))
        case "value" | "rehash":
            change = rehashed if what == "rehash" else changed
            lines[at] = change(lines[at], tenant="nobody")
            file.write_bytes(b"".join(lines))
        case "cut":
            file.write_bytes(b"".join(lines[:at]))
        case "truncate":
            file.write_bytes(file.read_bytes()[: -draw.randint(1, 300)])
        case "move":
            to = draw.choice([one for one in files if one != file])
            edit(file, lambda all_of: all_of.pop(at))
            edit(to, lambda all_of: all_of.insert(draw.randint(0, len(all_of)), lines[at]))
        case "drop":
            file.unlink()
        case "rename":
            # That the active one bears a number is what a crash amid rotation leaves.
            draw.choice(files[:-1]).rename(
                file.with_name(f"audit.{draw.randint(10, 99):06d}.jsonl")
            )
        case "all":
            first = draw.choice(files)
            first.write_bytes(b"".join(sorted(lines_of(first))))
    return what


def test_two_hundred_tamperings_are_all_found(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    filled(good, records=50)
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    draw, kinds = random.Random(11), set()
    for number in range(200):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        kind = tampering(draw, folder / LAST)
        if {file.name: file.read_bytes() for file in folder.iterdir()} == before:
            assert kind == "all"
            continue
        kinds.add(kind)
        verdict = verify(folder / LAST)
        assert verdict.findings, f"{number}: {kind}"
        names = {file.name for file in folder.iterdir()} | {LAST}
        assert all(finding.file in names for finding in verdict.findings)
        with pytest.raises(Broken):
            list(read(folder / LAST))
    assert kinds == set(TAMPERINGS)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("intact"), records=12, rotate_bytes=1500, note="né")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_bytes_are_never_taken_for_the_log(intact: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(files_of(intact)))
    before = file.read_bytes()
    start = data.draw(st.integers(0, len(before)))
    stop = data.draw(st.integers(start, min(len(before), start + 400)))
    put = data.draw(
        st.one_of(st.binary(max_size=60), st.sampled_from([b"\n", b"[" * 5000, b"9" * 5000]))
    )
    after = before[:start] + put + before[stop:]
    try:
        file.write_bytes(after)
        verdict = verify(intact)
        assert bool(verdict.findings or verdict.torn) == (after != before)
    finally:
        file.write_bytes(before)


@pytest.fixture(scope="module")
def any_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
NAMES = st.sampled_from(["seq", "time", "kind", "prev", "hash", "previous", "x"])
RECORDS = st.dictionaries(
    NAMES, JSON | st.sampled_from([1, 2, GENESIS, "2026-11-30T00:00:00.000Z"])
)


@settings(max_examples=80, deadline=None)
@given(
    lines=st.lists(
        st.binary(max_size=80)
        | RECORDS.map(lambda record: json.dumps(record).encode())
        | RECORDS.map(lambda record: line_of(record).rstrip(b"\n")),
        max_size=5,
    ),
    head=st.sampled_from([b'{"seq":0,"hash":"%s"}' % GENESIS.encode(), b""])
    | RECORDS.map(lambda record: json.dumps(record).encode()),
)
def test_whatever_is_read_is_no_more_than_a_finding(
    any_folder: Path, lines: list[bytes], head: bytes
) -> None:
    path = any_folder / LAST
    path.write_bytes(b"\n".join(lines) + b"\n")
    path.with_name(f"{LAST}.head").write_bytes(head)
    assert verify(path).found
    with pytest.raises(Broken):
        list(read(path))
    with pytest.raises(UserError):
        AuditLog.open(path)


# ---- small parts


def test_moments_are_read_as_people_write_them() -> None:
    assert parse_moment("2026-11-30") == parse_moment("2026-11-30T01:00:00+01:00")
    assert parse_moment("2026-11-30T00:00:01Z") - parse_moment("2026-11-30") == 1
    with pytest.raises(UserError, match="write 2026-11-30 or 2026-11-30T12:00:00Z"):
        parse_moment("tomorrow")


def test_tokens_have_one_digest() -> None:
    # printf '1 22 333' | sha256sum
    told = "dd42855f03ee838e8ac7b0a10fb2f1efb7bb17a51eb4041f67f4be84bc4c5bfd"
    assert digest_of([1, 22, 333]) == told
