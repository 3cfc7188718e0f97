"""The report, on synthetic results whose truth is known."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("altair")

from rondo import plots, report
from rondo.config import ReportConfig
from rondo.errors import UserError
from rondo.verdict import paired_bootstrap, verdict

Json = dict[str, Any]
DATASETS = ("math-test", "general-test")
SPLIT = {"prelude": [*range(12)], "core": [*range(12, 18)], "coda": [*range(18, 30)]}
TRAINING = {
    "mode": "recurrent",
    "tokens": 61_440,
    "steps": 60,
    "flops": 5.1e13,
    "seconds": 120.0,
    "loss": "last",
    "recurrence": "fixed 2",
    "seed": 0,
    "data": "math (shipped sample)",
}


def make_result(
    role: str,
    stage: str,
    losses: dict[int, float],
    label: str | None = None,
    datasets: tuple[str, ...] = DATASETS,
    num_documents: int = 60,
) -> Json:
    """Make what `rondo eval` writes, with mean loss `losses[r]` on the first dataset.

    Documents differ much and models on one document little, as in real data. On the further
    datasets every loss is 1 higher and each loop costs 0.02 more.
    """
    rows, documents = [], {}
    for number, dataset in enumerate(datasets):
        rng = np.random.default_rng(number)
        tokens = rng.integers(80, 400, num_documents)
        document = rng.normal(0, 0.3, num_documents)
        by_depth = {}
        for depth, loss in losses.items():
            own = np.random.default_rng([depth, len(role), number]).normal(0, 0.02, num_documents)
            means = loss + number + 0.02 * number * (depth - 1) + document + own - own.mean()
            by_depth[str(depth)] = (means * tokens).tolist()
            value = float((means * tokens).sum() / tokens.sum())
            flops = 2.7e8 + 4.2e7 * (depth - 1)
            rows.append(
                {
                    "dataset": dataset,
                    "metric": "loss",
                    "num_recurrences": depth,
                    "value": value,
                    "stderr": float(means.std() / math.sqrt(num_documents)),
                    "bits_per_byte": value * 0.47,
                    "flops_per_token": flops,
                    "kv_bytes_per_token": 23_040 + 4_608 * (depth - 1),
                    "ms_per_token": flops / 2.6e8,
                }
            )
        documents[dataset] = {"tokens": tokens.tolist(), "loss": by_depth}
    recurrent = role in ("recurrent", "random")
    training = TRAINING | {"mode": "recurrent" if recurrent else role}
    return {
        "format_version": 1,
        "kind": "eval",
        "model": {
            "path": f"out/{role}",
            "label": label or f"{role}, {stage} training",
            "role": role,
            "stage": stage,
            "parent": "SmolLM2-135M-Instruct",
            "parameters": 134_515_584,
            "split": SPLIT if recurrent else None,
            "injection": "mix" if recurrent else None,
            "state_init": "input" if recurrent else None,
            "training": training if stage == "after" else None,
        },
        "conditions": {
            "command": f"rondo eval out/{role} --output-dir out/eval-{role}-{stage}",
            "date": "2026-11-24T08:00:00Z",
            "device": "cpu (AMD EPYC, 2 threads)",
            "dtype": "float32",
            "seq_len": 512,
            "seed": 0,
            "versions": {"rondo": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
            "git": "abc1234",
        },
        "datasets": {
            name: {
                "path": f"{name}.jsonl",
                "sha256": "0" * 64,
                "documents": num_documents,
                "tokens": sum(documents[name]["tokens"]),
                "bytes": 61_000,
            }
            for name in datasets
        },
        "rows": rows,
        "documents": documents,
    }


def make_results(
    after: dict[int, float], static: float = 1.47, datasets: tuple[str, ...] = DATASETS
) -> list[Json]:
    before = {1: 2.13, 2: 2.09, 3: 2.10, 4: 2.11}
    return [
        make_result("recurrent", "after", after, datasets=datasets),
        make_result("recurrent", "before", before, datasets=datasets),
        make_result("parent", "before", {1: 2.13}, "parent", datasets),
        make_result("static", "after", {1: static}, "static twin", datasets),
    ]


def write(root: Path, results: list[Json]) -> tuple[str, ...]:
    names = []
    for number, result in enumerate(results):
        directory = root / f"eval-{number}"
        directory.mkdir(parents=True)
        (directory / "results.json").write_text(json.dumps(result))
        names.append(str(directory))
    return tuple(names)


GAIN = {1: 1.50, 2: 1.44, 4: 1.43}
HARM = {1: 1.46, 2: 1.52, 4: 1.60}
NOTHING = {1: 1.50, 2: 1.5003, 4: 1.5002}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    output_dir = root / "report"
    results = write(root, make_results(GAIN))
    report.run(ReportConfig(results=results, output_dir=str(output_dir)))
    return output_dir


def own_text(output_dir: Path) -> str:
    """Return the page without the drawing library."""
    return (output_dir / "report.html").read_text().replace(plots.javascript(), "")


def answer(results: list[Json], question: str, dataset: str = "math-test") -> str:
    """Return what the verdict says to a question on a dataset."""
    line = next(line for line in verdict(results) if line.startswith(question))
    return re.search(rf"(Yes|No|Not shown) on {dataset}: .*?\.(?= |$)", line)[0]


def test_verdict_tells_a_gain_with_its_size_and_price() -> None:
    said = answer(make_results(GAIN), "After training, does depth help?")
    assert said.startswith("Yes on math-test: the loss of r = 4, the best of 2 depths, lies 0.0")
    assert "below that of r = 1" in said
    assert "1.47x the FLOPs" in said


def test_verdict_says_where_depth_harms() -> None:
    said = answer(make_results(HARM), "After training, does depth help?")
    assert said.startswith("No on math-test")
    assert "above that of r = 1" in said


def test_verdict_sees_no_difference_in_noise() -> None:
    said = answer(make_results(NOTHING), "After training, does depth help?")
    assert said.startswith("Not shown on math-test")
    assert "which may be chance" in said


@pytest.mark.parametrize(("static", "word"), [(1.60, "Yes"), (1.30, "No")])
def test_verdict_compares_with_the_static_twin_both_ways(static: float, word: str) -> None:
    results = make_results(GAIN, static)
    assert answer(results, "Is the best depth better").startswith(f"{word} on")
    assert answer(results, "At r = 1, is the trained model better than the s").startswith(word)


def test_verdict_answers_for_each_dataset_in_five_lines() -> None:
    lines = verdict(make_results({1: 1.5, 2: 1.47}))
    assert len(lines) == 5
    assert all(dataset in line for line in lines for dataset in DATASETS)
    assert "Yes on math-test" in lines[0]
    assert "general-test" in lines[0]


def test_verdict_names_unequal_training_cost() -> None:
    results = make_results(GAIN)
    assert any("at equal training FLOPs" in line for line in verdict(results))
    results[3]["model"]["training"]["flops"] *= 0.6
    assert any("trained with 0.60x its FLOPs" in line for line in verdict(results))
    results[3]["model"]["training"] = None
    assert any("training FLOPs unknown" in line for line in verdict(results))


def test_verdict_says_what_is_missing() -> None:
    after, before, parent, _ = make_results(GAIN)
    assert "no static twin" in " ".join(verdict([after, before, parent]))
    assert "no trained recurrent model" in verdict([before, parent])[0]
    assert "no trained recurrent model" in verdict([parent])[0]


def test_verdict_survives_a_diverged_depth() -> None:
    results = make_results(GAIN)
    results[0]["documents"]["math-test"]["loss"]["4"][3] = math.nan
    assert "r = 2" in answer(results, "After training, does depth help?")
    results[0]["documents"]["math-test"]["loss"]["1"][3] = math.nan
    assert "Not known on math-test" in verdict(results)[0]


def test_verdict_draws_no_conclusion_from_few_documents() -> None:
    result = make_result("recurrent", "after", GAIN, num_documents=6)
    assert "6 documents are too few" in verdict([result])[0]


def test_bootstrap_interval_matches_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(300, 60, 400)
    change = rng.normal(10, 10, 400)
    gap = paired_bootstrap(base + change, base, [100] * 400)
    half_width = 1.96 * change.std() / 20 / 100
    assert gap.value == pytest.approx(change.mean() / 100)
    assert gap.high - gap.value == pytest.approx(half_width, rel=0.15)
    assert gap.value - gap.low == pytest.approx(half_width, rel=0.15)
    wider = paired_bootstrap(base + change, base, [100] * 400, choices=5)
    assert wider.low < gap.low
    assert wider.high > gap.high


def test_page_is_one_file_that_loads_nothing(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert len(page) < 5_000_000
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", page)
    assert not re.search(r"<(link|img|iframe|script[^>]*\ssrc)\b", page.split('id="specs"')[0])
    assert "default-src 'none'" in page
    assert "$" not in page.split("<script")[0].replace("$schema", "")


def test_page_states_the_verdict_and_every_row(written: Path) -> None:
    page = own_text(written)
    assert "After training, does depth help?" in page
    assert page.count("<tr>") == 1 + sum(len(result["rows"]) for result in make_results(GAIN))
    assert page.count("<figure") == 3 * len(DATASETS)


def test_csv_has_the_rows_that_came_in(written: Path) -> None:
    with (written / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    came_in = [row for result in make_results(GAIN) for row in result["rows"]]
    assert len(rows) == len(came_in)
    for row, source in zip(rows, came_in, strict=True):
        assert {key: row[key] for key in source} == {key: str(source[key]) for key in source}
    assert {row["training_seed"] for row in rows} == {"0", ""}
    assert {row["dataset_documents"] for row in rows} == {"60"}


def test_markdown_shows_every_figure_that_is_there(written: Path) -> None:
    text = (written / "report.md").read_text()
    shown = re.findall(r"\]\(([^)]+\.svg)\)", text)
    assert sorted(shown) == sorted(path.name for path in written.glob("*.svg"))
    assert len(shown) == 3 * len(DATASETS)
    assert "rondo report" in text


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)> | $title ' \" `x` \n# heading"
    results = make_results(GAIN, datasets=("math-test",))
    for result in results:
        result["model"] |= {"label": hostile, "parent": hostile, "path": hostile}
        result["conditions"] |= {"command": hostile, "device": hostile}
        for key in ("datasets", "documents"):
            result[key] = {hostile + name: value for name, value in result[key].items()}
        for row in result["rows"]:
            row["dataset"] = hostile + row["dataset"]
    directories = write(tmp_path, results)
    report.run(ReportConfig(results=directories, output_dir=str(tmp_path / "out"), title=hostile))
    page = own_text(tmp_path / "out")
    assert "<img" not in page
    assert page.count("</script>") == 3
    text = (tmp_path / "out" / "report.md").read_text()
    quoted = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "<" not in quoted
    assert "\n# heading" not in text
    assert all("<img" not in path.read_text() for path in (tmp_path / "out").glob("*.svg"))


def test_equal_labels_are_told_apart(tmp_path: Path) -> None:
    twins = [make_result("recurrent", "after", GAIN, label="mine") for _ in range(2)]
    labels = [result["model"]["label"] for result in report.load(write(tmp_path, twins))]
    assert labels == ["mine", "mine (2)"]


def test_one_model_and_missing_times_are_enough(tmp_path: Path) -> None:
    result = make_result("parent", "before", {1: 2.1}, datasets=("math-test",))
    for row in result["rows"]:
        row |= {"ms_per_token": None, "stderr": 0.0}
    directories = write(tmp_path, [result])
    report.run(ReportConfig(results=directories, output_dir=str(tmp_path / "out")))
    assert "ms per token|loss" not in (tmp_path / "out" / "report.html").read_text()


def test_diverged_rows_are_left_out_of_figures_but_not_of_tables(tmp_path: Path) -> None:
    results = make_results(GAIN, datasets=("math-test",))
    results[0]["rows"][2] |= {"value": math.nan, "bits_per_byte": math.nan}
    directories = write(tmp_path, results)
    report.run(ReportConfig(results=directories, output_dir=str(tmp_path / "out")))
    assert "| nan \u00b1 0.0" in (tmp_path / "out" / "report.md").read_text()


def _break(name: str, directory: Path) -> None:
    path = directory / "results.json"
    result = json.loads(path.read_text())
    match name:
        case "no results.json":
            path.unlink()
        case "cannot read":
            path.write_text("{")
        case "format_version 2":
            path.write_text(json.dumps(result | {"format_version": 2}))
        case "lacks documents":
            del result["documents"]
            path.write_text(json.dumps(result))
        case "other documents":
            result["datasets"]["math-test"]["sha256"] = "1" * 64
            path.write_text(json.dumps(result))


@pytest.mark.parametrize(
    "complaint",
    ["no results.json", "cannot read", "format_version 2", "lacks documents", "other documents"],
)
def test_bad_results_are_refused_by_name(tmp_path: Path, complaint: str) -> None:
    directories = write(tmp_path, make_results(GAIN))
    _break(complaint, Path(directories[1]))
    config = ReportConfig(results=directories, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=complaint) as error:
        report.run(config)
    assert directories[1] in str(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no directory"):
        report.load([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="no results given"):
        report.load([])


def test_output_is_replaced_only_on_demand(tmp_path: Path) -> None:
    directories = write(tmp_path, make_results(GAIN, datasets=("math-test",))[3:])
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    (output_dir / "mine.txt").write_text("keep")
    config = ReportConfig(results=directories, output_dir=str(output_dir))
    with pytest.raises(UserError, match="--overwrite"):
        report.run(config)
    report.run(config.model_copy(update={"overwrite": True}))
    assert (output_dir / "report.html").exists()
    assert (output_dir / "mine.txt").read_text() == "keep"


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
