"""metrics.jsonl through stops, rollbacks and damage; the bar and the trackers that copy it."""

import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rondo.config import WatchConfig
from rondo.errors import UserError
from rondo.provenance import METRICS, read_metrics
from rondo.training.metrics import Metrics
from rondo.training.throughput import matmul_peak


def row(step: int, **more: Any) -> dict[str, Any]:
    """A line of the loop, as far as the bar reads it."""
    return {
        "step": step,
        "train/loss": 2.5 - step / 100,
        "train/skipped": False,
        "train/recurrence": 4.5,
        "perf/tokens_per_s": 1234.5,
        "perf/mfu": 0.314,
    } | more


def recorder(directory: Path, first: int = 0, tracker: Any = "none") -> Metrics:
    """Metrics of a run of ten steps."""
    return Metrics(directory, first, 10, WatchConfig(tracker=tracker), {"seed": 0})


def written(directory: Path, steps: range, **more: Any) -> Metrics:
    """Metrics that have seen some steps."""
    metrics = recorder(directory)
    for step in steps:
        metrics.write(row(step, **more))
    return metrics


def steps(directory: Path) -> list[Any]:
    """What the lines are about: a step's number, or an event's name."""
    return [line.get("event", line["step"]) for line in read_metrics(directory)]


def test_a_resumed_run_drops_the_steps_it_will_make_again(tmp_path: Path) -> None:
    written(tmp_path, range(1, 6)).close()
    metrics = recorder(tmp_path, first=3)
    metrics.write(row(4))
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert read_metrics(tmp_path)[0] == row(1)


def test_a_rollback_drops_steps_and_keeps_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = written(tmp_path, range(1, 6))
    metrics.event(5, "alarm", text="the state grows")
    metrics.event(2, "rollback", from_step=5, skipped_to_row=20)
    metrics.rewind(2)
    metrics.write(row(3))
    metrics.close()
    assert steps(tmp_path) == [1, 2, "alarm", "rollback", 3]
    assert read_metrics(tmp_path)[3] == {
        "step": 2,
        "event": "rollback",
        "from_step": 5,
        "skipped_to_row": 20,
    }
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "step 5: alarm: the state grows\n" in printed.err
    assert "step 2: rollback: from_step 5, skipped_to_row 20\n" in printed.err
    # Steps beyond where a run goes on are made again, with what they raise.
    recorder(tmp_path, first=2).close()
    assert steps(tmp_path) == [1, 2, "rollback"]


def test_a_line_is_there_as_soon_as_its_step_is_done(tmp_path: Path) -> None:
    metrics = written(tmp_path, range(1, 3))
    assert steps(tmp_path) == [1, 2]
    metrics.close()


def test_a_torn_last_line_is_forgotten(tmp_path: Path) -> None:
    written(tmp_path, range(1, 4)).close()
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[:-9])
    assert steps(tmp_path) == [1, 2]
    metrics = recorder(tmp_path, first=2)
    metrics.write(row(3))
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("damage", [b'{"step": 2, "tra', b"\0\0\0", b"\xff\xfe"])
def test_an_earlier_damaged_line_is_refused_by_number(tmp_path: Path, damage: bytes) -> None:
    written(tmp_path, range(1, 4)).close()
    path = tmp_path / METRICS
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is no JSON"):
        recorder(tmp_path, first=3)


def test_numbers_that_are_not_finite_are_spelled_and_the_json_stays_valid(tmp_path: Path) -> None:
    metrics = written(tmp_path, range(1, 2), **{"train/loss": math.nan, "loop/gain": math.inf})
    metrics.event(1, "alarm", gain=-math.inf)
    metrics.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / METRICS).read_text(encoding="utf-8").splitlines()
    step, event = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (step["train/loss"], step["loop/gain"], event["gain"]) == ("nan", "inf", "-inf")


class Screen(io.StringIO):
    """What a terminal would receive."""

    def isatty(self) -> bool:
        return True

    def last(self) -> str:
        """The line that stands last."""
        return self.getvalue().replace("\n", "\r").strip("\r").split("\r")[-1]


def wide_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Make stderr a wide terminal; in the test itself, since pytest replaces it after fixtures."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (300, 40))
    return screen


def test_the_bar_shows_what_a_run_is_watched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = wide_screen(monkeypatch)
    metrics = written(tmp_path, range(1, 4))
    metrics.write(row(4, **{"val/loss@r1": 2.75, "val/loss@r2": 2.5, "val/loss@r16": 2.25}))
    metrics.write(row(5))
    metrics.close()
    line = screen.last()
    assert " 5/10 [" in line
    assert "<" in line  # time left
    assert "loss 2.450, 2.750 at r=1, 2.250 at r=16, r 4.5, 1234 tokens/s, MFU 31%" in line


def test_the_bar_of_a_resumed_run_begins_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = wide_screen(monkeypatch)
    written(tmp_path, range(1, 5), **{"val/loss@r1": 2.75}).close()
    metrics = recorder(tmp_path, first=4)
    metrics.write(row(5))
    metrics.close()
    assert " 5/10 [" in screen.last()
    assert "loss 2.450, 2.750 at r=1, r 4.5" in screen.last()


def test_the_bar_goes_back_with_a_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = wide_screen(monkeypatch)
    metrics = written(tmp_path, range(1, 3), **{"val/loss@r1": 2.75})
    for step in range(3, 6):
        metrics.write(row(step, **{"val/loss@r1": 9.0}))
    metrics.rewind(2)
    metrics.write(row(3))
    metrics.close()
    assert " 3/10 [" in screen.last()
    assert "2.750 at r=1" in screen.last()


class FakeTracker(ModuleType):
    """A module with the interface that trackio and wandb share."""

    def __init__(self, failing: str = ""):
        super().__init__("fake")
        self.failing, self.calls = failing, []

    def _called(self, name: str, *facts: Any) -> None:
        self.calls.append((name, *facts))
        if self.failing == name:
            raise ConnectionError("the server is away")

    def init(self, **facts: Any) -> None:
        self._called("init", facts)

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self._called("log", step, numbers)

    def finish(self) -> None:
        self._called("finish")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_the_numbers_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, name, fake)
    metrics = recorder(tmp_path, tracker=name)
    metrics.write(row(1, **{"loop/gain": math.nan, "train/skipped": "spike"}))
    metrics.event(1, "alarm", text="not a step")
    metrics.close()
    (_, begun), (_, step, numbers), end = fake.calls
    assert begun == {
        "project": "rondo",
        "name": f"{tmp_path.parent.name}/{tmp_path.name}",
        "config": {"seed": 0},
        "resume": "never",
    }
    assert step == 1
    assert numbers == {k: v for k, v in row(1).items() if k != "train/skipped"}
    assert end == ("finish",)
    recorder(tmp_path, first=1, tracker=name).close()
    assert fake.calls[3][1]["resume"] == "allow"


def test_tensorboard_gets_the_numbers_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int):
            calls.append((log_dir, purge_step))

        def add_scalar(self, *facts: Any) -> None:
            calls.append(facts)

        def close(self) -> None:
            calls.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(module, "SummaryWriter", SummaryWriter, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    written(tmp_path, range(1, 3)).close()
    metrics = recorder(tmp_path, first=2, tracker="tensorboard")
    metrics.write(row(3))
    metrics.close()
    assert calls[0] == (str(tmp_path / "tensorboard"), 3)
    assert calls[1:-1] == [(name, value, 3) for name, value in row(3).items()]
    assert calls[-1] == "closed"


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_switched_off_and_training_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: str,
) -> None:
    fake = FakeTracker(failing)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    metrics = recorder(tmp_path, tracker="trackio")
    metrics.write(row(1))
    metrics.write(row(2))
    metrics.close()
    assert [one for one in steps(tmp_path) if one != "tracker off"] == [1, 2]
    (event,) = (line for line in read_metrics(tmp_path) if "event" in line)
    assert event["text"] == "ConnectionError: the server is away"
    assert fake.calls[-1][0] == failing
    assert [name for name, *_ in fake.calls].count(failing) == 1
    assert "tracker off: ConnectionError: the server is away\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("trackio", "trackio", r"'rondo-lm\[track\]'"),
        ("wandb", "wandb", "wandb"),
        ("tensorboard", "torch.utils.tensorboard", "tensorboard"),
    ],
)
def test_a_missing_tracker_is_refused_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}".replace("'", '"')):
        recorder(tmp_path, tracker=name)
    assert not list(tmp_path.iterdir())


def test_no_tracker_is_imported_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("trackio", "wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    written(tmp_path, range(1, 3)).close()


def test_the_peak_of_this_machine_is_a_plausible_rate_and_draws_from_no_stream() -> None:
    stream = torch.get_rng_state()
    # The slowest CPU that runs the tests makes more than one product a cycle of a slow clock.
    assert 1e9 < matmul_peak(torch.device("cpu"), torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), stream)
