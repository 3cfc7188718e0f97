"""The figures: what they draw, and what they say."""

import colorsys
from collections.abc import Callable

import pytest

pytest.importorskip("altair")

import altair
from synthetic import make_result

from rondo import plots
from rondo.report.sources import Json, flatten

LAYERS = [
    {
        "layer": layer,
        "block_influence": 0.5 / (layer + 1),
        "angular_distance": 0.3 / (layer + 1),
        "part": "core" if layer in (4, 5, 6) else "prelude" if layer < 4 else "coda",
    }
    for layer in range(12)
]
CORES = [
    {
        "core": f"{start}-{start + 3}",
        "num_recurrences": depth,
        "mixing": mixing,
        "difference": (start - 4) ** 2 * depth * mixing * 0.1 - 0.03,
        "chosen": start == 4,
    }
    for start in range(2, 8)
    for depth in (2, 4)
    for mixing in (0.25, 0.5)
]
ABOUT = {"model": "ours", "role": "recurrent", "stage": "after"}


def nats_chart(*results: Json) -> Json:
    rows = flatten(results or [make_result(tasks={"math-test": {1: 2.0, 2: 1.9}})])
    return plots.depth_chart(rows, plots.measures_of({"kind": "loss"}, percent=False)[0])


def training_rows(model: str, role: str, start: float) -> list[Json]:
    about = ABOUT | {"model": model, "role": role, "kind": "training"}
    return [
        about | {"step": step, "tokens": step, "flops": 1e9 * step, "loss": start + 1 / step}
        for step in range(1, 41)
    ]


def checkpoints() -> Json:
    point = ABOUT | {"num_recurrences": 4, "value": 0.3}
    rows = [point | {"step": step, "flops": 1e19 * step} for step in (1, 2)]
    return plots.checkpoints_chart(rows, "gsm8k", "exact_match (%)")


@pytest.mark.parametrize(
    "draw",
    [
        nats_chart,
        checkpoints,
        lambda: plots.layer_chart(LAYERS),
        lambda: plots.core_chart(CORES),
        lambda: plots.training_chart(training_rows("ours", "recurrent", 2.0)),
        lambda: plots.states_chart(
            [ABOUT | point for point in make_result()["states"]["iterations"]], "step"
        ),
    ],
)
def test_figures_are_valid_and_described_by_their_title(draw: Callable[[], Json]) -> None:
    chart = draw()
    # What is drawn is not checked while a report is written, since that takes most of its time.
    altair.LayerChart.from_dict(chart, validate=True)
    assert chart["description"] == chart["title"]["text"]


def test_probe_figures_name_the_choice() -> None:
    assert "Layers 4 to 6 are the core" in plots.to_svg(plots.layer_chart(LAYERS))
    text = plots.to_svg(plots.core_chart(CORES))
    assert "Looping core 4-7 lowers the loss by up to 0.0300" in text


def test_bits_per_byte_are_the_loss_in_another_unit() -> None:
    rows = flatten([make_result(tasks={"math-test": {1: 2.0, 2: 1.9}})])
    one, other = (
        plots.depth_chart(rows, measure)["datasets"]["points"]
        for measure in plots.measures_of({"kind": "loss"}, percent=False)
    )
    for first, second in zip(one, other, strict=True):
        assert second["y"] == pytest.approx(0.47 * first["y"])
        assert second["high"] - second["y"] == pytest.approx(0.47 * (first["high"] - first["y"]))


def test_only_shares_are_drawn_in_percent() -> None:
    task = {"kind": "likelihood", "metric": "em", "higher_is_better": True, "chance": None}
    titles = [plots.measures_of(task, percent=percent)[0].title for percent in (True, False)]
    assert titles == ["em (%)", "em"]


@pytest.mark.parametrize(
    ("losses", "words"),
    [({1: 2.0, 2: 1.9}, "lowest at r = 2"), ({1: 2.0}, "the same at every depth")],
)
def test_a_figure_says_what_it_shows(losses: dict[int, float], words: str) -> None:
    chart = nats_chart(make_result(tasks={"math-test": losses}))
    assert chart["title"]["text"] == f"math-test: loss is {words} after training"


def test_a_figure_of_several_runs_says_which_one_its_title_is_about() -> None:
    first = make_result(tasks={"math-test": {1: 2.0, 2: 1.9, 4: 1.95}}, label="mine")
    second = make_result(tasks={"math-test": {1: 2.0, 2: 1.8, 4: 1.7}}, label="other")
    title = nats_chart(first, second)["title"]["text"]
    assert title == "math-test: loss is lowest at r = 2 after training (mine)"


def test_runs_of_the_same_role_get_lines_of_their_own() -> None:
    losses = {"math-test": {1: 2.0, 2: 1.9}}
    spec = nats_chart(
        *(make_result(tasks=losses, label=name) for name in "abcd"),
        make_result("static", tasks=losses),
        make_result("parent", tasks=losses),
    )
    encoding = next(one["encoding"] for one in spec["layer"] if "shape" in one["encoding"])
    colors, shapes = (encoding[channel]["scale"] for channel in ("color", "shape"))
    assert colors["domain"] == [*"abcd", "static twin", "parent"]
    assert len(set(colors["range"])) == len(set(shapes["range"])) == 6
    hues = [
        colorsys.rgb_to_hls(*(int(code[i : i + 2], 16) for i in (1, 3, 5)))[0]
        for code in colors["range"][:5]
    ]
    # A red run beside the orange of the static twin was taken for it.
    assert all(1 / 12 < abs(hue - hues[4]) < 11 / 12 for hue in hues[:4])
    assert {row["model"] for row in spec["datasets"]["loops"]} == set("abcd")


def test_the_random_twins_training_does_not_flatten_the_others() -> None:
    rows = [*training_rows("ours", "recurrent", 2.0), *training_rows("random", "random", 6.0)]
    spec = plots.training_chart(rows)
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert 1.9 < low < 2.03
    assert high < 2.3
    assert "Above the chart: random." in spec["title"]["subtitle"]


def test_a_logarithm_of_states_leaves_out_the_distance_of_the_last_to_itself() -> None:
    states = make_result()["states"]["iterations"]
    chart = plots.states_chart([ABOUT | point for point in states], "kl_to_last")
    drawn = [row["x"] for row in chart["datasets"]["points"]]
    assert drawn == list(range(1, len(states)))
