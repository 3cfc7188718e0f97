"""The report, on synthetic results whose truth is known."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_file, make_result

pytest.importorskip("altair")

from rondo import plots, report
from rondo.config import ReportConfig
from rondo.errors import UserError
from rondo.evaluation.fits import depth_fit
from rondo.report import page, samples
from rondo.report.sources import flatten, load

Json = dict[str, Any]

GAIN = {"math-test": {1: 2.0, 2: 1.9, 4: 1.88, 8: 1.878}, "acc-arc": {1: 0.4, 2: 0.5, 4: 0.6}}
ONE = {"math-test": {1: 2.05}, "acc-arc": {1: 0.35}}
WORSE = {"math-test": {1: 3.1, 2: 3.2}, "acc-arc": {1: 0.3, 2: 0.25}}
RANDOM = {"math-test": {1: 6.1, 2: 6.2}, "acc-arc": {1: 0.25, 2: 0.25}}
SMALL = {"math-test": {1: 2.0}}


def make_files() -> tuple[Json, Json]:
    """Make two results.json: the trained model with what it is compared with, and the start."""
    compared = [
        make_result("recurrent", "after", GAIN),
        make_result("parent", "before", ONE),
        make_result("static", "after", {"math-test": {1: 1.95}, "acc-arc": {1: 0.45}}),
        make_result("random", "after", RANDOM),
    ]
    return make_file(*compared), make_file(make_result("recurrent", "before", WORSE))


def make_samples(result: Json) -> list[Json]:
    return [
        {
            "model": result["model"]["label"],
            "task": task,
            "item": item,
            "prompt": f"Question {item}",
            "target": "A",
            "answers": {depth: "A" if ones[item] else "B" for depth, ones in values.items()},
            "values": {depth: ones[item] for depth, ones in values.items()},
        }
        for task, facts in result["tasks"].items()
        for values in [result["items"][task]["values"]]
        for item in range(facts["items"])
    ]


def write(root: Path, *files: Json, lines: list[Json] | None = None) -> tuple[str, ...]:
    """Write files, each to a directory of its own, with samples beside the first."""
    names = []
    for number, content in enumerate(files):
        directory = root / f"eval-{number}"
        directory.mkdir(parents=True)
        (directory / "results.json").write_text(json.dumps(content))
        if lines and not number:
            text = "\n".join(json.dumps(line) for line in lines)
            (directory / "samples.jsonl").write_text(text + "\n")
        names.append(str(directory))
    return tuple(names)


def small(**changes: Any) -> Json:
    """Make a result that is quick to report."""
    return make_result("parent", "before", SMALL, **changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    files = make_files()
    results = write(root, *files, lines=make_samples(files[0]["results"][0]))
    report.run(ReportConfig(results=results, output_dir=str(root / "report")))
    return root / "report"


def own_text(output_dir: Path) -> str:
    """Return the page without the drawing library."""
    return (output_dir / "report.html").read_text().replace(plots.javascript(), "")


def charts_of(output_dir: Path) -> list[Json]:
    """Return what the page draws, in order."""
    text = own_text(output_dir).split('id="charts">')[1].split("</script>")[0]
    return json.loads(text)


def test_page_is_one_file_that_loads_nothing(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert len(text) < 5_000_000
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", text)
    assert not re.search(r"<(link|img|iframe|script[^>]*\ssrc)\b", text.split('id="charts"')[0])
    assert "default-src 'none'" in text
    assert "{{" not in own_text(written)
    assert "{%" not in own_text(written)


def test_page_begins_with_what_was_converted_what_it_cost_and_what_it_bought(written: Path) -> None:
    top = own_text(written).split("</header>")[0]
    assert "Depth helps on 2 of 2 tasks" in top
    assert "layers 12-17 became the core" in top
    assert "61,440 tokens of math (shipped sample) in 60 steps: 51T FLOPs, 120 s" in top
    assert own_text(written).index("does depth help?") < own_text(written).index("<h2>")


def test_every_task_has_its_chart_its_table_its_measures_and_its_controls(written: Path) -> None:
    panels = own_text(written).split('<section class="panel"')[1:]
    assert len(panels) == len(GAIN)
    for panel in panels:
        for part in ("<figure", "Table of this chart", "What depth does: recurrent, trained"):
            assert part in panel
        assert "What a gain must beat" in panel
        assert "blind depth" in panel
    rows = sum(len(result["rows"]) for file in make_files() for result in file["results"])
    assert own_text(written).count("data-price=") == rows


def test_page_follows_the_training_and_the_state(written: Path) -> None:
    text = own_text(written)
    assert "the state settles" in text
    assert "equal training FLOPs, against static twin" in text
    assert len(charts_of(written)) == text.count("<figure") == 3 + 1 + 3


def test_page_can_be_heard(written: Path) -> None:
    text = own_text(written)
    assert '<th scope="col">' in text
    assert "<th>" not in text
    titles = [next(iter(chart["specs"].values()))["description"] for chart in charts_of(written)]
    heard = re.findall(r'<figure [^>]*aria-label="([^"]+)"', text)
    assert heard == titles
    # Without a value the attribute means that a tile is not the current one.
    assert 'setAttribute("aria-current", "true")' in text
    assert 'toggleAttribute("aria' not in text


def test_csv_has_the_rows_that_came_in(written: Path) -> None:
    with (written / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    came_in = [row for file in make_files() for one in file["results"] for row in one["rows"]]
    assert len(rows) == len(came_in)
    for row, source in zip(rows, came_in, strict=True):
        plain = {key: value for key, value in source.items() if key != "seed_values"}
        assert {key: row[key] for key in plain} == {key: str(value) for key, value in plain.items()}
    assert {row["training_seed"] for row in rows} == {"0", ""}
    assert {row["items"] for row in rows} == {"60"}


def test_markdown_shows_every_figure_that_is_there(written: Path) -> None:
    text = (written / "report.md").read_text()
    shown = re.findall(r"\]\(([^)]+\.svg)\)", text)
    assert sorted(shown) == sorted(path.name for path in written.glob("*.svg"))
    assert len(shown) == 3 + 1 + 3
    assert "rondo report" in text
    assert "What a gain must beat" in text


def test_provenance_names_the_results(written: Path) -> None:
    run = json.loads((written / "run.json").read_text())
    assert run["kind"] == "report"
    assert [len(sha) for sha in run["results_sha256"].values()] == [64, 64]


def test_what_would_flatten_the_curves_is_named_but_not_drawn(written: Path) -> None:
    chart = charts_of(written)[0]["specs"]["nats per token"]
    drawn = {row["model"] for row in chart["datasets"]["points"]}
    assert drawn == {"recurrent, trained", "parent", "static twin"}
    assert re.search(r"random-init twin \(6\.\d+ to 6\.\d+\)", chart["title"]["subtitle"])
    panel = own_text(written).split('<section class="panel"')[1]
    assert "<td>random-init twin</td>" in panel


def test_what_was_not_trained_gets_a_figure_where_one_scale_cannot_hold_both(written: Path) -> None:
    loss, before, accuracy = (next(iter(c["specs"].values())) for c in charts_of(written)[:3])
    assert "after training" in loss["title"]["text"]
    assert {row["model"] for row in before["datasets"]["points"]} == {"recurrent, untrained"}
    assert "recurrent, untrained" in {row["model"] for row in accuracy["datasets"]["points"]}


def test_accuracies_are_drawn_in_percent_above_chance(written: Path) -> None:
    chart = charts_of(written)[2]["specs"]["acc_norm"]
    assert chart["datasets"]["chance"] == [{"y": 25.0}]
    ours = [row for row in chart["datasets"]["points"] if row["model"] == "recurrent, trained"]
    assert [row["y"] for row in ours] == pytest.approx([40, 50, 60])
    assert "highest at r = 4 after training" in chart["title"]["text"]


def test_the_fit_is_drawn_as_it_was_made(written: Path) -> None:
    result = make_files()[0]["results"][0]
    fit, _ = depth_fit(result, "math-test")
    assert fit is not None
    line = charts_of(written)[0]["specs"]["nats per token"]["datasets"]["fit"]
    assert {row["model"] for row in line} == {"recurrent, trained"}
    for row in line:
        assert row["y"] == pytest.approx(fit.predict(row["num_recurrences"]))
        assert row["flops_per_token"] == pytest.approx(2.7e8 + 4.2e7 * (row["num_recurrences"] - 1))


def test_a_chart_can_be_set_against_depth_flops_milliseconds_and_price(written: Path) -> None:
    axes = charts_of(written)[0]["axes"]
    assert {name: axis["field"] for name, axis in axes.items()} == {
        "depth": "num_recurrences",
        "FLOPs": "flops_per_token",
        "milliseconds": "ms_per_token",
        "price": "price",
    }


def test_price_is_that_of_a_million_tokens() -> None:
    (row,) = flatten([small()], price_per_hour=7.2)
    hours = 1e6 * row["ms_per_token"] / 1000 / 3600
    assert row["price"] == pytest.approx(7.2 * hours)


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)> | {{ title }} ' \" `x` \n# heading"
    result = make_result("recurrent", "before", {"acc": {1: 0.3, 2: 0.5}}, states=None)
    result["model"] |= {"label": hostile, "parent": hostile, "path": hostile}
    result["conditions"] |= {"command": hostile, "device": hostile}
    for group in ("tasks", "items"):
        result[group] = {hostile: result[group]["acc"]}
    for row in result["rows"]:
        row["task"] = hostile
    lines = [
        line | {"prompt": hostile, "target": hostile, "answers": {"1": hostile, "2": hostile}}
        for line in make_samples(result)
    ]
    results = write(tmp_path, make_file(result), lines=lines)
    report.run(ReportConfig(results=results, output_dir=str(tmp_path / "out"), title=hostile))
    text = own_text(tmp_path / "out")
    assert "onerror" in text
    assert "<img" not in text
    assert text.count("</script>") == 3
    text = (tmp_path / "out" / "report.md").read_text()
    quoted = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "<" not in quoted
    assert "\n# heading" not in text
    assert all("<img" not in path.read_text() for path in (tmp_path / "out").glob("*.svg"))


def test_equal_labels_are_told_apart_and_keep_their_samples(tmp_path: Path) -> None:
    twin = make_result("recurrent", "after", {"acc": {1: 0.3, 2: 0.5}}, label="mine")
    results = load(
        write(tmp_path, make_file(twin), make_file(twin, twin), lines=make_samples(twin))
    )
    assert [one["model"]["label"] for one in results] == ["mine", "mine (2)", "mine (3)"]
    assert [len(one["samples"]) for one in results] == [12, 0, 0]


def test_one_model_and_missing_times_are_enough(tmp_path: Path) -> None:
    result = small()
    result["rows"][0] |= {"ms_per_token": None, "stderr": None}
    results = write(tmp_path, make_file(result))
    report.run(ReportConfig(results=results, output_dir=str(tmp_path / "out")))
    (chart,) = charts_of(tmp_path / "out")
    assert list(chart["axes"]) == ["depth", "FLOPs"]
    assert "nothing was converted" in own_text(tmp_path / "out")


def test_tasks_need_not_be_the_same(tmp_path: Path) -> None:
    files = (make_file(small()), make_file(make_result("static", "after", {"acc": {1: 0.3}})))
    said = page.make_page(load(write(tmp_path, *files)), None, "rondo report")
    assert [panel.task for panel in said.panels] == ["math-test", "acc"]
    assert [len(panel.tables[0].lines) for panel in said.panels] == [1, 1]


def test_samples_are_those_that_change_balanced_between_better_and_worse(tmp_path: Path) -> None:
    result = make_result("recurrent", "after", {"acc": {1: 0.3, 2: 0.5}, "gen": {1: 0.9, 2: 0.3}})
    (loaded,) = load(write(tmp_path, make_file(result), lines=make_samples(result)))
    better, worse = samples.groups([loaded], 10)
    assert (better.total, worse.total) == (12, 36)
    assert (len(better.samples), len(worse.samples)) == (5, 5)
    assert {sample.task for sample in better.samples} == {"acc"}
    assert [answer.right for answer in better.samples[0].answers] == [False, True]
    assert [answer.right for answer in worse.samples[0].answers] == [True, False]
    better, worse = samples.groups([loaded], 40)
    assert (len(better.samples), len(worse.samples)) == (12, 28)


def test_long_samples_keep_their_begin_and_their_end(tmp_path: Path) -> None:
    result = make_result("recurrent", "after", {"acc": {1: 0.3, 2: 0.5}})
    lines = [line | {"prompt": f"begin{'x' * 9_000}end"} for line in make_samples(result)]
    (loaded,) = load(write(tmp_path, make_file(result), lines=lines))
    prompt = samples.groups([loaded], 1)[0].samples[0].prompt
    assert len(prompt) < 2_000
    assert prompt.startswith("begin")
    assert prompt.endswith("end")


def _break(complaint: str, directory: Path) -> None:
    path = directory / "results.json"
    content = json.loads(path.read_text())
    result = content["results"][0]
    match complaint:
        case "no results.json":
            path.unlink()
            return
        case "cannot read":
            path.write_text(path.read_text()[:100])
            return
        case "another version of rondo":
            content["format_version"] = 1
        case "lacks items":
            del result["items"]
        case "lacks model.role":
            del result["model"]["role"]
        case "other items":
            result["tasks"]["math-test"]["sha256"] = "1" * 64
        case "measured on other items":
            result["items"]["math-test"]["weights"][0] += 1
        case "is no sample":
            (directory / "samples.jsonl").write_text('{"model": "parent", "ta')
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "complaint",
    [
        "no results.json",
        "cannot read",
        "another version of rondo",
        "lacks items",
        "lacks model.role",
        "other items",
        "measured on other items",
        "is no sample",
    ],
)
def test_bad_results_are_refused_by_name(tmp_path: Path, complaint: str) -> None:
    first = make_file(make_result("recurrent", "after", SMALL))
    directories = write(tmp_path, first, make_file(small()))
    _break(complaint, Path(directories[1]))
    config = ReportConfig(results=directories, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=complaint) as error:
        report.run(config)
    assert directories[1] in str(error.value)
    if "items" in complaint and "lacks" not in complaint:
        assert directories[0] in str(error.value)
        assert "tokenizers" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval-0", "eval-1"]


def test_missing_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no directory"):
        load([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="no results given"):
        load([])


def test_output_is_replaced_only_on_demand_and_never_the_results(tmp_path: Path) -> None:
    directories = write(tmp_path, make_file(small()))
    output_dir = tmp_path / "out"
    config = ReportConfig(results=directories, output_dir=str(output_dir))
    report.run(config)
    (output_dir / "old.svg").write_text("of another report")
    with pytest.raises(UserError, match="--overwrite"):
        report.run(config)
    report.run(config.model_copy(update={"overwrite": True}))
    assert not (output_dir / "old.svg").exists()
    with pytest.raises(UserError, match="delete the source"):
        report.run(config.model_copy(update={"overwrite": True, "output_dir": directories[0]}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(UserError, match="nothing of ours"):
        report.run(
            config.model_copy(update={"overwrite": True, "output_dir": str(tmp_path / "mine")})
        )
