"""Published rows through our report; the facts are of arXiv:2511.07384's plot data."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rondo import plots, verdict
from rondo.convert.split import drop_split, preset_split
from rondo.errors import UserError
from rondo.evaluation.controls import depth_controls
from rondo.evaluation.measures import depth_measures
from rondo.report import load, page, rendering, to_csv
from rondo.report.sources import flatten

Json = dict[str, Any]

# olmo_50k_steps.jsonl: accuracy and its standard error by test depth.
OLMO_8 = {
    "gsm8k_cot_sean": {
        "1": (0.2054586808, 0.0111291702),
        "2": (0.3760424564, 0.0133425321),
        "4": (0.4306292646, 0.013639286),
        "8": (0.4435178165, 0.0136843276),
        "16": (0.4359363154, 0.0136589681),
        "32": (0.4457922669, 0.0136913052),
    },
    "minerva_math": {
        "1": (0.1932, 0.0053985804),
        "2": (0.259, 0.0059030734),
        "4": (0.276, 0.0059871181),
        "8": (0.2816, 0.0060004259),
        "16": (0.284, 0.0060044339),
        "32": (0.2808, 0.0059804613),
    },
}
OLMO_STATIC = {
    "gsm8k_cot_sean": {"1": (0.3525398029, 0.0131599098)},
    "minerva_math": {"1": (0.2514, 0.0058186727)},
}
# Scores of checkpoints, by task, at test depth 8 and 1.
CURVE_8 = {
    "gsm8k_cot_sean": {"25000": 0.4071266111, "30000": 0.4101592115, "35000": 0.4086429113},
    "minerva_math": {"25000": 0.2496, "30000": 0.2574, "35000": 0.261},
}
CURVE_STATIC = {
    "gsm8k_cot_sean": {"5000": 0.2289613343, "10000": 0.2721758908},
    "minerva_math": {"5000": 0.1616, "10000": 0.182},
}
# File, mean, step and training FLOPs, to the ten digits published.
FLOPS = [
    ("tinyllama-1.1b", 4, 10_000, 4.4336432e19),
    ("tinyllama-1.1b", 16, 50_000, 8.480569261e20),
    ("llama-3.2-1b", 32, 48_000, 1.219880722e21),
    ("olmo-2-1b", 8, 48_000, 6.778173358e20),
]


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks/paper_tables.py"
    spec = importlib.util.spec_from_file_location("paper_tables", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_tables"] = module
    spec.loader.exec_module(module)
    return module


tables = _load()


def published(values: Json, curve: Json, depth: str) -> Json:
    """Write facts as the published file does."""
    return {
        "final": {
            task: {r: {"acc": a, "stderr": e, "chkpt": 48_000} for r, (a, e) in by_depth.items()}
            for task, by_depth in values.items()
        },
        "curve_every_5k": {task: {depth: by_step} for task, by_step in curve.items()},
    }


@pytest.fixture(scope="module")
def olmo() -> list[Json]:
    looped = published(OLMO_8, CURVE_8, "8")
    static = published(OLMO_STATIC, CURVE_STATIC, "1")
    found = [
        tables.result("olmo-2-1b", "recurrent", looped, 8),
        tables.result("olmo-2-1b", "static", static),
    ]
    # What is written is JSON, and must be all that is needed.
    return json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("name", "parent", "looped"),
    [
        ("tinyllama-1.1b", 1_100_048_384, 844_171_264),
        ("llama-3.2-1b", 1_235_814_400, 1_122_560_000),
        ("olmo-2-1b", 1_484_916_736, 1_359_071_232),
    ],
)
def test_base_models_have_their_published_sizes(name: str, parent: int, looped: int) -> None:
    assert tables.costs(name).total_parameters == parent
    assert tables.costs(name, tables.BASES[name].sizes).total_parameters == looped


@pytest.mark.parametrize("name", tables.BASES)
def test_layers_are_those_of_our_presets(name: str) -> None:
    base = tables.base_config(name)
    preset = preset_split(name, base.model_type, base.num_hidden_layers)
    assert drop_split(base.num_hidden_layers, tables.BASES[name].sizes) == preset


@pytest.mark.parametrize(("name", "mean", "step", "theirs"), FLOPS)
def test_training_flops_are_the_published_ones(
    name: str, mean: int, step: int, theirs: float
) -> None:
    ours = tables.spent(name, tables.BASES[name].sizes, mean, tables.MATH)[step]
    assert ours == pytest.approx(theirs, rel=1e-8)


def test_training_flops_without_a_loop_count_the_final_norm() -> None:
    assert tables.spent_without_loop("olmo-2-1b", 48_000) == 324_299_374_064_566_272_000


@pytest.mark.parametrize(
    ("file", "model", "schedule", "fraction"),
    [
        ("olmo_50k_steps", "4,6,4 75 sqrt (Train Recurrence=8)", "1-sqrt", 0.75),
        ("tinyllama_1_sqrt_app_fig", "4,8,4 100% linear (Train Recurrence=4)", "linear", 1.0),
        ("extend_prelude_coda", "7,8,7 (Train Recurrence=16)", "linear", 0.25),
    ],
)
def test_names_of_runs_tell_their_curriculum(
    file: str, model: str, schedule: str, fraction: float
) -> None:
    found = tables.curriculum_of(file, model)
    assert (found.schedule, found.fraction) == (schedule, fraction)


def test_published_accuracies_stand_in_the_table_as_they_are(olmo: list[Json]) -> None:
    lines = list(tables.accuracy_table("olmo-2-1b", olmo))
    assert lines[0][:3] == ["olmo-2-1b", "static twin", "35.3"]
    gsm8k = ["20.5", "37.6", "43.1", "44.4", "43.6", "44.6"]
    math = ["19.3", "25.9", "27.6", "28.2", "28.4", "28.1"]
    assert lines[1] == ["olmo-2-1b", "trained at r = 8", *gsm8k, *math]


def test_verdict_on_published_values_says_that_nothing_was_paired(olmo: list[Json]) -> None:
    said = " ".join(verdict.verdict(olmo))
    assert "Yes on gsm8k: r = 32, best of 5, is 24.0 points better than r = 1" in said
    assert said.count("with no items to pair") >= 4
    assert any(note.startswith("Of gsm8k, minerva_math only") for note in verdict.caveats(olmo))
    assert "trained with 0.48x its FLOPs (the paper's account)" in said


def test_depth_beyond_the_trained_one_neither_helps_nor_harms(olmo: list[Json]) -> None:
    found = {finding.name: finding for finding in depth_measures(olmo[0], "gsm8k")}
    assert found["stability"].value == pytest.approx(100 * (0.4457922669 - 0.4435178165))
    assert found["stability"].sentence.startswith(
        "Not shown: the gain of r = 32, beyond the trained"
    )
    assert found["knee"].value == 4


def test_equal_training_flops_are_met_by_the_latest_affordable_checkpoint(
    olmo: list[Json],
) -> None:
    names = ("gsm8k", "minerva_math")
    found = {
        task: next(one for one in depth_controls(olmo, task) if one.name.startswith("equal"))
        for task in names
    }
    # By step 30,000 it had spent 3.2e20, by 35,000 more than the static twin in all.
    assert "at step 30,000" in found["gsm8k"].sentence
    assert found["gsm8k"].value == pytest.approx(100 * (0.4101592115 - 0.3525398029))
    assert found["minerva_math"].sentence.startswith("Not shown")
    line = next(iter(tables.equal_flops_table("olmo-2-1b", olmo)))
    assert line[2] == "30,000"
    assert line[4:6] == ["41.0", "25.7"]


def test_findings_are_told_of_every_looped_model(olmo: list[Json]) -> None:
    lines = list(tables.findings_table("olmo-2-1b", olmo))
    assert [line[:5] for line in lines] == [
        ["olmo-2-1b", "gsm8k", "8", "Yes", "Yes"],
        ["olmo-2-1b", "minerva_math", "8", "Yes", "Yes"],
    ]


def test_report_tells_published_values_from_measured_ones(olmo: list[Json], tmp_path: Path) -> None:
    file = {"format_version": 2, "kind": "eval", "results": olmo}
    (tmp_path / "results.json").write_text(json.dumps(file))
    results = load([str(tmp_path)])
    said = page.make_page(results, None, "rondo report")
    text = rendering.to_markdown(said)
    assert "1,319 items" in text
    assert "as published, without items" in text
    assert "6.78e+20 FLOPs in the paper's account (loss last" in text
    assert "| trained at r = 8 | 32 | 44.6 \u00b1 1.4% |" in text
    assert "checkpoints-1-gsm8k.svg" in {figure.file for figure in said.figures}
    assert "report" in rendering.to_html(said)
    assert to_csv(flatten(results)).count("\n") == 1 + 12 + 2


def test_report_refuses_to_set_values_of_two_sources_side_by_side(
    olmo: list[Json], tmp_path: Path
) -> None:
    other = json.loads(json.dumps(olmo[1]))
    other["tasks"]["gsm8k"]["source"] = "another paper"
    file = {"format_version": 2, "kind": "eval", "results": [olmo[0], other]}
    (tmp_path / "results.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match="gsm8k was measured on other items"):
        load([str(tmp_path)])


def test_charts_hold_training_flops_beyond_64_bits() -> None:
    facts = {"model": "a", "role": "recurrent", "stage": "after", "num_recurrences": 8}
    rows = [facts | {"step": i, "flops": i * 2**70, "value": 0.1 * i} for i in (1, 2, 3)]
    chart = plots.checkpoints_chart(rows, "gsm8k", "exact_match (%)")
    assert "checkpoints against training FLOPs" in plots.to_svg(chart)
