"""The section on depth in a model card: of the checkpoint that was measured, and of no other."""

import json
from pathlib import Path

import pytest
from synthetic import make_file, make_result

pytest.importorskip("altair")

from rondo import report
from rondo.config import ReportConfig
from rondo.errors import UserError
from rondo.report import card
from rondo.report.sources import Json

SMALL = {"math-test": {1: 2.0}}
GAIN = {"math-test": {1: 2.0, 2: 1.9}, "acc-arc": {1: 0.4, 2: 0.5}}
FRONT = "---\nlibrary_name: transformers\ntags: [rondo]\n---\n# A model\n\nText.\n"


def measured_on(directory: Path, *results: Json) -> list[Json]:
    """Say that the first of results was measured on a checkpoint."""
    results[0]["model"]["path"] = str(directory)
    return list(results)


def test_model_card_gets_its_section_once_and_keeps_the_rest(tmp_path: Path) -> None:
    results = measured_on(tmp_path, make_result("recurrent", "after", GAIN))
    readme = tmp_path / "README.md"
    readme.write_text(FRONT)
    card.write(tmp_path, card.updated(tmp_path, results))
    first = readme.read_text()
    assert first.startswith(FRONT)
    assert "Depth helps on 2 of 2 tasks" in first
    loss = results[0]["rows"][0]["value"]
    assert f"| math-test: loss (nats) | {loss:.4f} \u00b1" in first
    assert "| acc-arc: acc\\_norm | 40.0 \u00b1 6.4% |" in first
    readme.write_text(first.replace("Depth helps on", "Old words on") + "\n## Later\n")
    card.write(tmp_path, card.updated(tmp_path, results))
    assert readme.read_text() == first + "\n## Later\n"


def test_model_card_gives_what_each_task_costs(tmp_path: Path) -> None:
    tasks = GAIN
    (result,) = measured_on(tmp_path, make_result("recurrent", "after", tasks))
    for row in result["rows"]:
        row["flops_per_token"] *= 2 if row["task"] == "acc-arc" else 1
    text = card.updated(tmp_path, [result])
    assert "| FLOPs per token, math-test | 270M | 312M |" in text
    assert "| FLOPs per token, acc-arc | 540M | 624M |" in text
    assert "| KV bytes per token | 23k | 27.6k |" in text


def test_model_card_with_half_a_section_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{FRONT}\n{card.BEGIN}\n")
    with pytest.raises(UserError, match="only one of"):
        card.updated(tmp_path, measured_on(tmp_path, make_result("parent", tasks=SMALL)))


def test_model_card_is_of_the_checkpoint_that_was_measured(tmp_path: Path) -> None:
    worse = make_result("recurrent", "after", {"math-test": {1: 2.0, 2: 2.3}}, label="other")
    worse["model"]["training"] |= {"tokens": 777}
    first = make_result("recurrent", "after", {"math-test": GAIN["math-test"]})
    text = card.updated(tmp_path, [first, *measured_on(tmp_path, worse)])
    assert "Depth harms on math-test" in text
    assert "Trained on 777 tokens" in text
    assert f"{worse['rows'][1]['value']:.4f} \u00b1" in text
    assert f"{first['rows'][1]['value']:.4f}" not in text
    text = card.updated(
        tmp_path,
        [first, *measured_on(tmp_path, make_result("parent", tasks=SMALL))],
    )
    assert "Depth" not in text
    assert "| task | r = 1 |\n" in text
    assert "Nothing was trained" in text


def test_card_of_what_was_not_measured_is_refused(tmp_path: Path) -> None:
    other = make_result("parent", tasks=SMALL)
    (tmp_path / "results.json").write_text(json.dumps(make_file(other)))
    (tmp_path / "model").mkdir()
    config = ReportConfig(
        results=(str(tmp_path),), output_dir=str(tmp_path / "out"), card=str(tmp_path / "model")
    )
    with pytest.raises(UserError, match=r"no config\.json"):
        report.run(config)
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"was measured here \(out/parent\)"):
        report.run(config)
    assert not (tmp_path / "out").exists()
    (result,) = measured_on(tmp_path / "model", other)
    (tmp_path / "results.json").write_text(json.dumps(make_file(result)))
    report.run(config)
    assert card.BEGIN in (tmp_path / "model" / "README.md").read_text()
