"""The figures: what they draw, and what they say."""

import pytest

pytest.importorskip("altair")

from synthetic import make_result

from rondo import plots
from rondo.report.sources import Json, flatten


def test_probe_figures_name_the_choice() -> None:
    layers = [
        {
            "layer": layer,
            "block_influence": 0.5 / (layer + 1),
            "angular_distance": 0.3 / (layer + 1),
            "part": "core" if layer in (4, 5, 6) else "prelude" if layer < 4 else "coda",
        }
        for layer in range(12)
    ]
    cores = [
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
    assert "Layers 4 to 6 are the core" in plots.to_svg(plots.layer_chart(layers))
    assert "Looping core 4-7 lowers the loss by up to 0.0300" in plots.to_svg(
        plots.core_chart(cores)
    )
    assert plots.to_png(plots.core_chart(cores)).startswith(b"\x89PNG")


def loss_rows(*results: Json) -> list[Json]:
    return flatten(results or [make_result(tasks={"math-test": {1: 2.0, 2: 1.9}})])


def test_bits_per_byte_are_the_loss_in_another_unit() -> None:
    nats, bits = plots.measures_of({"kind": "loss"})
    one, other = (
        plots.to_spec(plots.depth_chart(loss_rows(), measure))["datasets"]["points"]
        for measure in (nats, bits)
    )
    for first, second in zip(one, other, strict=True):
        assert second["y"] == pytest.approx(0.47 * first["y"])
        assert second["high"] - second["y"] == pytest.approx(0.47 * (first["high"] - first["y"]))


@pytest.mark.parametrize(
    ("losses", "words"),
    [({1: 2.0, 2: 1.9}, "lowest at r = 2"), ({1: 2.0}, "the same at every depth")],
)
def test_a_figure_says_what_it_shows(losses: dict[int, float], words: str) -> None:
    rows = loss_rows(make_result(tasks={"math-test": losses}))
    chart = plots.depth_chart(rows, plots.measures_of({"kind": "loss"})[0])
    assert f"loss is {words} after training" in plots.to_spec(chart)["title"]["text"]


def test_runs_of_the_same_role_get_lines_of_their_own() -> None:
    rows = loss_rows(
        *(make_result(tasks={"math-test": {1: 2.0, 2: 1.9}}, label=name) for name in "ab")
    )
    spec = plots.to_spec(plots.depth_chart(rows, plots.measures_of({"kind": "loss"})[0]))
    scales = [
        layer["encoding"]["color"]["scale"]
        for layer in spec["layer"]
        if "scale" in layer["encoding"].get("color", {})
    ]
    assert scales[0]["domain"] == ["a", "b"]
    assert len(set(scales[0]["range"])) == 2
    assert {row["model"] for row in spec["datasets"]["loops"]} == {"a", "b"}


def test_the_random_twins_training_does_not_flatten_the_others() -> None:
    def curve(model: str, role: str, start: float) -> list[Json]:
        about = {"model": model, "role": role, "stage": "after", "kind": "training"}
        return [
            about | {"step": step, "tokens": step, "flops": 1e9 * step, "loss": start + 1 / step}
            for step in range(1, 41)
        ]

    rows = [*curve("ours", "recurrent", 2.0), *curve("random", "random", 6.0)]
    spec = plots.to_spec(plots.training_chart(rows))
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert 1.9 < low < 2.03
    assert high < 2.3
    assert "Above the chart: random." in spec["title"]["subtitle"]


def test_a_logarithm_of_states_leaves_out_the_distance_of_the_last_to_itself() -> None:
    states = make_result()["states"]["iterations"]
    about = {"model": "ours", "role": "recurrent", "stage": "after"}
    chart = plots.states_chart([about | point for point in states], "kl_to_last")
    drawn = [row["x"] for row in plots.to_spec(chart)["datasets"]["points"]]
    assert drawn == list(range(1, len(states)))
