"""`rondo bench`: what it counts, how settings take turns, what it refuses. No time is asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import parent_of, recurrent
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rondo.cli import main
from rondo.config import BenchConfig
from rondo.evaluation import benchmark
from rondo.evaluation.benchmark import Setting, Timing, ratios, summary, with_ratios
from rondo.flops import costs_of, costs_of_parent

Json = dict[str, Any]
# The fewest that a recurrent model can have.
SHAPE = {"num_hidden_layers": 3}
FAST = ("--repeats", "2", "--prompt-tokens", "6", "--new-tokens", "3", "--dtype", "float32")


def tiny(**fields: Any) -> Any:
    return recurrent("llama", range(3), (1, 1, 1), overrides=SHAPE, max_recurrences=8, **fields)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a parent and the final of a run that began with it."""
    monkeypatch.chdir(tmp_path)
    parent_of("llama", **SHAPE).save_pretrained(tmp_path / "parent")
    tiny().save_pretrained(tmp_path / "out/run/final")
    facts = {"kind": "train", "parent": {"path": str(tmp_path / "parent"), "revision": None}}
    (tmp_path / "out/run/final/run.json").write_text(json.dumps(facts))
    return tmp_path


def bench(*words: str) -> int:
    return main(["bench", "out/run/final", *FAST, *words])


def read(made: Path, name: str = "out/bench-run") -> Json:
    return json.loads((made / name / "bench.json").read_text())


def test_each_depth_and_batch_size_is_set_beside_the_parent(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--recurrences", "3", "1", "3", "--batch-sizes", "2", "1") == 0
    found = read(made)
    keys = ("model", "num_recurrences", "batch_size")
    assert [tuple(row[key] for key in keys) for row in found["rows"]] == [
        ("parent", 1, 1),
        ("parent", 1, 2),
        *(("recurrent", depth, size) for size in (1, 2) for depth in (1, 3)),
    ]
    for row in found["rows"]:
        assert row["kv_bytes_per_token"] == row["kv_bytes_per_token_counted"]
        assert row["peak_memory_bytes"] is None
        for phase in (row["prefill"], row["decode"]):
            time = phase["ms_per_token"]
            assert 0 < time["min"] <= time["median"] <= time["max"]
            assert phase["tokens_per_s"] == pytest.approx(1000 / time["median"])
            assert phase["to_parent"]["time"] > 0
        if row["model"] == "parent":
            assert row["decode"]["to_parent"]["of_ideal"] == 1
    # Three layers, of which the core's one runs twice more.
    cached = [row["kv_bytes_per_token"] for row in found["rows"]]
    assert 3 * cached[3] == 5 * cached[2] == 5 * cached[0]
    assert found["conditions"]["prompt_tokens"] == 6
    assert found["conditions"]["peak_memory_bytes"] > 0
    assert json.loads((made / "out/bench-run/run.json").read_text())["kind"] == "bench"
    text = (made / "out/bench-run/bench.md").read_text()
    assert text.count("\n| ") == 2 + len(found["rows"])
    assert "| r = 3 |" in text
    printed = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in printed[1:-1]}) == 1
    assert len(printed) == 3 + len(found["rows"])


def test_json_is_all_that_is_printed(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--recurrences", "1", "--batch-sizes", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == read(made)


class Turns:
    """Stands for `measure`, and keeps what it was asked for."""

    def __init__(self, fail: BaseException | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.fail = fail

    def __call__(self, setting: Setting, prompt: torch.Tensor, new_tokens: int) -> Timing:
        if self.fail:
            raise self.fail
        self.asked.append((setting.num_recurrences, len(prompt)))
        return Timing(len(self.asked), 1.0, 1.0, None)


def setting(depth: int, size: int, name: str = "recurrent") -> Setting:
    model = tiny()
    return Setting(name, model, costs_of(model), depth, size, {"num_recurrences": depth})


def test_settings_take_turns_and_the_first_round_is_thrown_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = Turns()
    monkeypatch.setattr(benchmark, "measure", turns)
    settings = [setting(1, 2), setting(3, 2), setting(1, 4)]
    prompts = torch.zeros(4, 6, dtype=torch.long)
    found = benchmark.take_turns(settings, prompts, BenchConfig(model="m", repeats=2))
    forth = [(1, 2), (3, 2), (1, 4)]
    assert turns.asked == [*forth[::-1], *forth, *forth[::-1]]
    assert [[one.prefill_seconds for one in own] for own in found] == [[4, 9], [5, 8], [6, 7]]


def test_the_summary_is_made_of_medians_and_ranges() -> None:
    config = BenchConfig(model="m", prompt_tokens=10, new_tokens=5)
    timings = [Timing(prefill, 8.0, 64.0, peak) for prefill, peak in ((3, 5), (1, 9), (2, 7))]
    row = summary(setting(1, 2), timings, config, 4)
    assert row["first_token_ms"] == {"median": 2000, "min": 1000, "max": 3000}
    # Two rows of ten tokens each; then two rows of four steps each.
    assert row["prefill"]["ms_per_token"] == {"median": 100, "min": 50, "max": 150}
    assert row["prefill"]["tokens_per_s"] == 10
    assert row["decode"]["ms_per_step"]["median"] == 2000
    assert row["decode"]["ms_per_token"]["median"] == 1000
    assert row["decode"]["tokens_per_s"] == 1
    assert row["peak_memory_bytes"] == 9


def phase(milliseconds: float, flops: float, size: float | None) -> Json:
    return {
        "ms_per_token": {"median": milliseconds, "min": 0, "max": 99},
        "flops_per_token": flops,
        "bytes_per_token": size,
    }


def test_the_ideal_is_the_parents_time_in_proportion_to_flops() -> None:
    found = ratios(phase(6.0, 400, 300), phase(2.0, 100, 200))
    assert found == {
        "time": 3.0,
        "flops": 4.0,
        "of_ideal": pytest.approx(4 / 3),
        "bytes": 1.5,
        "of_ideal_bytes": 0.5,
    }
    assert ratios(phase(6.0, 100, None), phase(3.0, 100, None))["of_ideal"] == 0.5
    assert ratios(phase(6.0, 100, None), phase(3.0, 100, None))["of_ideal_bytes"] is None


def test_a_row_is_compared_with_the_parent_at_its_own_batch_size() -> None:
    rows = [
        {
            "model": name,
            "batch_size": size,
            "prefill": phase(time, 1, None),
            "decode": phase(1, 1, 1),
        }
        for name, size, time in (("parent", 1, 2.0), ("parent", 8, 1.0), ("recurrent", 8, 5.0))
    ]
    assert with_ratios(rows)[2]["prefill"]["to_parent"]["time"] == 5
    assert with_ratios(rows[2:])[0]["prefill"]["to_parent"] is None


@pytest.mark.parametrize("depth", [0, 1, 3])
@torch.no_grad()
def test_flops_and_bytes_are_those_of_the_passes_that_are_timed(depth: int) -> None:
    # Depth 0 stands for the parent.
    model = tiny(injection="linear") if depth else parent_of("llama", **SHAPE)
    costs = costs_of(model) if depth else costs_of_parent(model)
    options = {"num_recurrences": depth} if depth else {}
    config = BenchConfig(model="m", prompt_tokens=6, new_tokens=5)
    own = Setting("any", model, costs, depth or 1, 2, options)
    found = benchmark.flops_and_bytes(own, config, 4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as prefill:
        benchmark.measure(own, torch.ones(2, 6, dtype=torch.long), 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as whole:
        timing = benchmark.measure(own, torch.ones(2, 6, dtype=torch.long), 5)
    total, first = whole.get_total_flops(), prefill.get_total_flops()
    assert found["prefill_flops_per_token"] == pytest.approx(first / (2 * 6))
    assert found["decode_flops_per_token"] == pytest.approx((total - first) / (2 * 4))
    layers = [*model.base_model.layers]
    times = [1, depth or 1, 1]
    read = sum(
        4 * parameter.numel() * number
        for layer, number in zip(layers, times, strict=True)
        for parameter in layer.parameters()
        if parameter.dim() == 2
    )
    read += 4 * model.get_output_embeddings().weight.numel()
    if depth:
        read += 4 * depth * model.model.injection.weight.numel()
    # Each token attends to itself and what is before it: 7, 8, 9 and 10 tokens.
    held = timing.kv_bytes_per_token * 8.5
    assert found["decode_bytes_per_token"] == pytest.approx(read / 2 + held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["input", "normal"])
def test_the_cache_is_as_large_as_the_account_says(dtype: torch.dtype, start: str) -> None:
    model = tiny(state_init=start).to(dtype)
    own = Setting("any", model, costs_of(model), 3, 2, {"num_recurrences": 3, "state_seed": 1})
    timing = benchmark.measure(own, torch.ones(2, 6, dtype=torch.long), 4)
    assert timing.kv_bytes_per_token == costs_of(model).kv_bytes(3, dtype.itemsize)


@pytest.mark.parametrize(
    ("parent", "reason"),
    [
        ({"path": "/nowhere/parent"}, "/nowhere/parent"),
        ({"path": "smollm2"}, "rondo dequantize"),
        (None, "names none in a run.json"),
    ],
)
def test_a_parent_that_cannot_be_had_is_said_and_left_out(
    made: Path, parent: Json | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made / "out/run/final/run.json"
    if parent:
        run.write_text(json.dumps({"parent": parent}))
    else:
        run.unlink()
    assert bench("--recurrences", "1", "--batch-sizes", "1") == 0
    (row,) = read(made)["rows"]
    assert row["prefill"]["to_parent"] is None
    assert read(made)["parent"] is None
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert reason in said
    assert reason in read(made)["note"]
    assert reason in (made / "out/bench-run/bench.md").read_text()


def test_parent_none_leaves_it_out_and_another_place_is_found(made: Path) -> None:
    few = ("--recurrences", "1", "--batch-sizes", "1")
    assert bench(*few, "--parent", "none") == 0
    assert len(read(made)["rows"]) == 1
    (made / "parent").rename(made / "moved")
    assert bench(*few, "--parent", "moved", "--output-dir", "here") == 0
    assert read(made, "here")["parent"]["path"] == "moved"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--recurrences", "9"), "cap of 8"),
        (("--prompt-tokens", "254"), "context of 256"),
        (("--parent", "out/run/final"), "is a recurrent checkpoint"),
        (("--parent", "./nothing"), "no directory ./nothing"),
        (("--output-dir", "out/run"), "would delete the source"),
        (("--output-dir", "parent"), "exists already"),
        (("--new-tokens", "1"), "new_tokens"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    made: Path, words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(made.rglob("*"))
    assert bench(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line
    assert sorted(made.rglob("*")) == before


def test_a_parent_is_no_model_to_bench(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "parent", *FAST]) == 2
    assert "not a recurrent one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fail", "code", "word"),
    [(KeyboardInterrupt(), 130, "stopped"), (torch.OutOfMemoryError("full"), 2, "--batch-sizes")],
)
def test_what_is_cut_short_leaves_nothing(
    made: Path,
    fail: BaseException,
    code: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark, "measure", Turns(fail))
    before = sorted(made.rglob("*"))
    assert bench() == code
    assert word in capsys.readouterr().err
    assert sorted(made.rglob("*")) == before
