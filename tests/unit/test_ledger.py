"""Work that a stop cannot undo."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.errors import UserError
from rondo.evaluation.ledger import Ledger
from rondo.processes import World

ALONE = World(0, 1, torch.device("cpu"))
SETTINGS = {"model": "a", "limit": 3}
BATCHES = [[1, 2], [3], [4, 5, 6]]


def ledger(tmp_path: Path, settings: dict[str, Any] = SETTINGS, **how: bool) -> Ledger:
    return Ledger(tmp_path / "eval", settings, ALONE, **how)


def run(one: Ledger, work: Any = sum, title: str = "sums") -> list[Any]:
    return one.run(title, BATCHES, list, work)[0]


class Stopped(Exception):
    pass


def stopping(calls: list[Any], after: int) -> Any:
    def work(batch: list[int]) -> int:
        if len(calls) == after:
            raise Stopped
        calls.append(batch)
        return sum(batch)

    return work


def test_results_come_in_the_order_of_the_batches(tmp_path: Path) -> None:
    found, seconds = ledger(tmp_path).run("sums", BATCHES, list, sum)
    assert found == [3, 3, 15]
    assert seconds > 0


def test_what_was_done_before_a_stop_is_not_done_again(tmp_path: Path) -> None:
    calls: list[Any] = []
    with pytest.raises(Stopped):
        run(ledger(tmp_path), stopping(calls, after=2))
    assert run(ledger(tmp_path, resume=True), stopping(calls, after=3)) == [3, 3, 15]
    assert calls == BATCHES


def test_a_line_cut_short_is_done_again(tmp_path: Path) -> None:
    run(ledger(tmp_path))
    (path,) = (tmp_path / "eval.unfinished").glob("rank-*.jsonl")
    path.write_text(path.read_text()[:-5])
    calls: list[Any] = []
    assert run(ledger(tmp_path, resume=True), stopping(calls, after=1)) == [3, 3, 15]
    assert calls == BATCHES[-1:]
    # And the new line did not grow into the torn one.
    again = ledger(tmp_path, resume=True)
    assert run(again, stopping(calls, after=1)) == [3, 3, 15]


def test_batches_of_another_title_or_content_are_done_themselves(tmp_path: Path) -> None:
    one = ledger(tmp_path)
    assert run(one) == [3, 3, 15]
    assert run(one, max, title="largest") == [2, 3, 6]
    assert one.run("sums", [[7]], list, sum)[0] == [7]


def test_the_same_content_twice_is_done_once(tmp_path: Path) -> None:
    calls: list[Any] = []
    one = ledger(tmp_path)
    assert one.run("sums", [[1], [1]], list, stopping(calls, after=1))[0] == [1, 1]
    assert len(calls) == 1


def test_a_stopped_evaluation_is_not_begun_anew_unasked(tmp_path: Path) -> None:
    run(ledger(tmp_path))
    with pytest.raises(UserError, match=r"was stopped: add --resume .*or --overwrite"):
        ledger(tmp_path)
    calls: list[Any] = []
    assert run(ledger(tmp_path, overwrite=True), stopping(calls, after=3)) == [3, 3, 15]
    assert calls == BATCHES


def test_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    run(ledger(tmp_path))
    with pytest.raises(UserError, match=r"had another limit \(3, now 4\)"):
        ledger(tmp_path, SETTINGS | {"limit": 4}, resume=True)


def test_settings_count_as_they_are_written(tmp_path: Path) -> None:
    run(ledger(tmp_path, SETTINGS | {"seeds": (0, 1)}))
    run(ledger(tmp_path, SETTINGS | {"seeds": (0, 1)}, resume=True))


def test_results_of_other_processes_are_taken_over(tmp_path: Path) -> None:
    one = ledger(tmp_path)
    run(one)
    first = tmp_path / "eval.unfinished" / "rank-0.jsonl"
    first.rename(first.with_name("rank-3.jsonl"))
    calls: list[Any] = []
    assert run(ledger(tmp_path, resume=True), stopping(calls, after=0)) == [3, 3, 15]


def test_nothing_is_left_when_it_is_finished(tmp_path: Path) -> None:
    one = ledger(tmp_path)
    run(one)
    one.finish()
    assert list(tmp_path.iterdir()) == []


def test_results_are_what_a_resumed_run_would_read(tmp_path: Path) -> None:
    found, _ = ledger(tmp_path).run("pairs", [[1]], list, lambda b: {"a": (1, 0.1 + 0.2)})
    (path,) = (tmp_path / "eval.unfinished").glob("rank-*.jsonl")
    assert found[0] == {"a": [1, 0.1 + 0.2]}
    assert json.loads(path.read_text())["value"] == found[0]


def test_a_ledger_with_nothing_in_it_is_left_without_a_trace(tmp_path: Path) -> None:
    ledger(tmp_path).leave_if_empty()
    assert list(tmp_path.iterdir()) == []
    run(ledger(tmp_path))
    ledger(tmp_path, resume=True).leave_if_empty()
    assert (tmp_path / "eval.unfinished").is_dir()


def test_a_resume_of_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger(tmp_path, resume=True)
    assert "nothing" in capsys.readouterr().err


def test_a_mistake_in_the_work_is_told_as_it_is(tmp_path: Path) -> None:
    def work(batch: list[int]) -> int:
        raise UserError("too long")

    with pytest.raises(UserError, match="too long"):
        run(ledger(tmp_path), work)
