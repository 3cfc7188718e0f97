"""What a report says of one task, and how it writes numbers."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from synthetic import make_result

pytest.importorskip("altair")

from rondo.evaluation import states
from rondo.evaluation.controls import depth_controls
from rondo.report import page, panels, rendering, words
from rondo.report.sections import BEHAVIOURS
from rondo.report.sources import Json, flatten_checkpoints

GAIN = {"math-test": {1: 2.0, 2: 1.9, 4: 1.88}, "acc-arc": {1: 0.4, 2: 0.5, 4: 0.6}}
ONE = {"math-test": {1: 2.05}, "acc-arc": {1: 0.35}}


def make_page(*results: Json) -> page.Page:
    return page.make_page([{"samples": []} | one for one in results], None, "rondo report")


def test_a_tile_is_green_only_where_depth_beats_the_static_twin() -> None:
    twins = {"math-test": {1: 1.85}, "acc-arc": {1: 0.45}}
    results = [make_result("recurrent", "after", GAIN), make_result("static", "after", twins)]
    tiles = rendering.to_html(make_page(*results)).split("</nav>")[0].split('<a href="#task-')[1:]
    assert '<span class="word no">beats twin: No</span>' in tiles[0]
    assert '<span class="word yes">beats twin: Yes</span>' in tiles[1]
    assert all('<span class="mark">depth helps: Yes</span>' in tile for tile in tiles)
    (alone,) = make_page(make_result("recurrent", "after", {"acc": {1: 0.4, 2: 0.6}})).panels
    assert alone.marks == [("depth helps", "Yes")]


def test_a_tile_sets_a_twin_of_another_budget_at_equal_cost() -> None:
    results = [
        make_result("recurrent", "after", GAIN),
        make_result("static", "after", ONE),
    ]
    results[1]["model"]["training"]["flops"] *= 2
    assert make_page(*results).panels[0].marks[0] == ("beats twin", "Not known")


def test_a_tile_does_not_hide_a_loss_to_a_twin_of_another_budget() -> None:
    twin = make_result("static", "after", {"math-test": {1: 1.7}, "acc-arc": {1: 0.9}})
    twin["model"]["training"]["flops"] /= 2
    marks = make_page(make_result("recurrent", "after", GAIN), twin).panels[0].marks
    assert marks[0] == ("beats twin", "No")


def test_a_gain_without_its_controls_is_refused() -> None:
    results = [make_result(role, tasks=GAIN) for role in ("recurrent", "static", "parent")]
    findings = depth_controls(results, "math-test")
    panels.demand_controls("math-test", findings)
    for name in ("blind depth", "static twin", "parent"):
        others = [found for found in findings if found.name != name]
        with pytest.raises(AssertionError, match=name):
            panels.demand_controls("math-test", others)
    silent = [replace(found, value=None, sentence="") for found in findings]
    with pytest.raises(AssertionError, match="without its controls"):
        panels.demand_controls("math-test", silent)


def make_scored() -> Json:
    """Make a result with checkpoints, on a task that is scored and one of loss."""
    result = make_result("recurrent", "after", {"gen": {1: 0.1, 2: 0.3}, "math-test": {1: 2.0}})
    result["model"]["checkpoints"] = [
        {"step": step, "flops": 1e12 * step, "scores": {"gen": {"1": 0.1, "2": step / 100}}}
        for step in (10, 20)
    ]
    return result


def test_checkpoints_have_their_table_and_their_rows() -> None:
    gen = make_page(make_scored()).panels[0]
    assert [figure.file for figure in gen.figures] == [
        "depth-1-gen-after.svg",
        "checkpoints-1-gen.svg",
    ]
    assert [line[1:] for line in gen.tables[1].lines] == [
        ["10", "1e+13", "2", "10.0%"],
        ["20", "2e+13", "2", "20.0%"],
    ]
    rows = flatten_checkpoints([make_scored()])
    assert [(row["checkpoint_step"], row["num_recurrences"], row["value"]) for row in rows] == [
        (10, 1, 0.1),
        (10, 2, 0.1),
        (20, 1, 0.1),
        (20, 2, 0.2),
    ]
    assert {row["trained_recurrence"] for row in rows} == {2.0}


def test_figures_of_a_task_offer_named_measures_only() -> None:
    offered = [
        {*figure.specs} for panel in make_page(make_scored()).panels for figure in panel.figures
    ]
    assert offered == [{"exact_match"}, {"exact_match"}, {"nats per token", "bits per byte"}]


def test_only_shares_are_written_in_percent() -> None:
    assert words.score(0.5, "exact_match", 0.01) == "50.0 \u00b1 1.0%"
    assert words.score(0.5, "bits_per_byte", 0.01) == "0.5000 \u00b1 0.0100"
    result = make_result("recurrent", "after", {"acc": {1: 0.5, 2: 0.6}})
    for one in (result["tasks"]["acc"], *result["rows"]):
        one["metric"] = "word_perplexity"
    (panel,) = make_page(result).panels
    assert "%" not in panel.glance + panel.tables[0].lines[0][2]
    (spec,) = panel.figures[0].specs.values()
    assert [row["y"] for row in spec["datasets"]["points"]] == [0.5, 0.6]
    assert "%" not in json.dumps(spec["layer"])


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        ((-0.07582, -3.83, 3.678, "points"), "-0.1 (-3.8 to 3.7) points"),
        ((-0.01, -3.83, 3.678, "points"), "0.0 (-3.8 to 3.7) points"),
        ((19.0, 12.5, 26.0, "points"), "19.0 (12.5 to 26.0) points"),
        ((0.018234, 0.0082, 0.0281, "nats per token"), "0.018 (0.008 to 0.028) nats per token"),
        ((16.0, 8.0, 16.0, "recurrences"), "16 (8 to 16) recurrences"),
        ((4.0, 4.0, 4.0, ""), "4 (4 to 4)"),
        ((1.23456, None, None, "nats"), "1.235 nats"),
        ((1.5500000012, 1.55, 1.5500000013, ""), "1.5500 (1.5500 to 1.5500)"),
        ((1234.5, 900.0, 1500.0, ""), "1234 (900 to 1500)"),
        ((None, None, None, "points"), "not known"),
    ],
)
def test_values_have_the_digits_that_they_are_known_to(finding: tuple[Any, ...], text: str) -> None:
    assert words.interval(*finding) == text


def test_every_behaviour_of_a_state_has_its_words() -> None:
    assert {*BEHAVIOURS} == {*re.findall(r"- (\w+):", states.behaviour.__doc__ or "")}


def test_what_is_missing_or_single_is_said_in_words() -> None:
    result = make_result("recurrent", "after", {"math-test": {1: 2.0}})
    result["tasks"]["math-test"]["num_fewshot"] = 1
    result["model"]["training"]["seed"] = None
    said = make_page(result)
    assert "1 solved example before each" in said.panels[0].about
    assert said.cost.endswith("seed not known).")
    assert said.samples_note == ""
    result["conditions"]["seeds"] = [0, 1, 2]
    line = {"model": "", "task": "", "item": 0, "prompt": "", "target": "", "answers": {}}
    said = make_page(result | {"samples": [line | {"values": {"1": 0.0, "2": 1.0}}]})
    assert said.samples_note.startswith("Of 3 seeds these are the answers of the first")
    assert said.samples_note in rendering.to_html(said)
    assert said.samples_note in rendering.to_markdown(said)


def test_a_diverged_depth_is_left_out_of_figures_but_not_of_tables() -> None:
    result = make_result(
        "recurrent", "before", {"math-test": {1: 2.0, 2: 2.1, 4: 2.2}}, states=None
    )
    result["rows"][2] |= {
        "value": None,
        "stderr": None,
        "bits_per_byte": None,
        "seed_values": [None],
    }
    result["items"]["math-test"]["values"]["4"][3] = None
    (panel,) = make_page(result).panels
    spec = panel.figures[0].specs["nats per token"]
    assert [row["num_recurrences"] for row in spec["datasets"]["points"]] == [1, 2]
    assert [line[2] for line in panel.tables[0].lines][2] == "no finite value"
