"""Every recipe is a config, can be planned offline from the repository root, and those that are
meant to run here run, with less of everything, on a tiny model."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny import json_of, rondo, save_parent
from transformers import AutoConfig

from rondo.cli import PASSED_ON, commands
from rondo.config import Config, ConvertConfig, TrainConfig, command_line, load_yaml, parse
from rondo.convert import plan as convert_plan
from rondo.convert.source import Source

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
TRAINED = [path for path in RECIPES if path.name != "convert.yaml"]
PAGES = [*RECIPES, *sorted((ROOT / "docs" / "guides").glob("*.md"))]
CONVERTED = [path for path in RECIPES if path.name == "convert.yaml"]
LAUNCH = re.compile(r"((srun )?torchrun [^|]*?-m )?rondo (?=[a-z])")
# Parameters of the recurrent model, as in arXiv:2511.07384, and of its parent.
COUNTS = {
    "smollm2-135m": (134_515_584, 134_515_008),
    "tinyllama-1.1b": (844_171_264, 1_100_048_384),
    "llama-3.2-1b": (1_385_228_288, 1_235_814_400),
    "olmo-2-1b": (1_359_071_232, 1_484_916_736),
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_each_model_has_its_five_runs() -> None:
    names = {"convert", "train", "heal", "task", "static", "random"}
    for model in COUNTS:
        own = {"gate"} if model == "smollm2-135m" else set()
        assert {path.stem for path in RECIPES if path.parent.name == model} == names | own
    others = {name_of(path) for path in RECIPES if path.parent.name not in COUNTS}
    assert others == {"domain/train", "lora/convert", "lora/train"}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_says_what_it_is_and_is_a_config(path: Path) -> None:
    cls: type[Config] = ConvertConfig if path.stem == "convert" else TrainConfig
    config = load_yaml(cls, path)
    comments = path.read_text(encoding="utf-8")
    for word in ("Purpose", "Launch", "Hardware", "Result"):
        assert f"# {word}:" in comments
    assert f"recipes/{path.parent.name}/{path.name}" in comments
    folder = {"domain": "smollm2-135m"}.get(path.parent.name, path.parent.name)
    if isinstance(config, TrainConfig):
        assert Path(config.model).parts[:2] == ("out", folder)
        assert Path(config.output_dir) == Path("out", path.parent.name, path.stem)
    if path.stem in ("static", "random"):
        main = load_yaml(TrainConfig, path.with_name("train.yaml"))
        different = {"mode": path.stem, "output_dir": f"out/{path.parent.name}/{path.stem}"}
        assert config == main.model_copy(update=different)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_that_are_shown_can_be_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = re.sub(r"\\\n#?\s*", "", path.read_text(encoding="utf-8"))
    lines = [re.sub(r"^#( Launch:)?\s*", "", line) for line in page.splitlines()]
    # A remark stands after several spaces.
    found = [re.split(r"\s{2,}", line)[0] for line in lines if LAUNCH.match(line)]
    assert found
    for line in found:
        verb, *words = shlex.split(LAUNCH.sub("", line))
        if words and f"{verb} {words[0]}" in commands():
            verb = f"{verb} {words.pop(0)}"
        if verb in PASSED_ON:
            continue
        config = parse(commands()[verb][0], words, prog="rondo")
        assert command_line(config).startswith(f"rondo {verb} ")


@pytest.mark.parametrize("path", CONVERTED, ids=name_of)
def test_the_shape_file_is_what_the_conversion_will_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"lora": "olmo-2-1b"}.get(path.parent.name, path.parent.name)
    parent = AutoConfig.from_pretrained(ROOT / "recipes" / folder / "parent")
    monkeypatch.setattr(convert_plan, "map_tensors", lambda *_: ({}, (), ()))
    source = Source(folder, path.parent, parent, {})
    made = convert_plan.make_plan(load_yaml(ConvertConfig, path), source)
    stored = AutoConfig.from_pretrained(path.parent)
    # Versions and names of files are not part of the shape.
    loose = {"transformers_version", "_name_or_path"}

    def shape(fields: dict[str, Any]) -> dict[str, Any]:
        base = {k: v for k, v in fields["base_config"].items() if k not in loose}
        return {k: v for k, v in fields.items() if k not in loose} | {"base_config": base}

    assert shape(stored.to_dict()) == shape(made.model.to_dict())


@pytest.mark.parametrize("path", TRAINED, ids=name_of)
def test_every_run_is_planned_from_the_root_of_the_repository(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if path.parent.name == "lora":
        pytest.importorskip("peft")
    monkeypatch.chdir(ROOT)
    budget = ("--budget.steps", 50, "--budget.tokens", "None")
    gpus = ("--gpus", 8 if path.parent.name.endswith("1b") else 1)
    # A real model in out/ would be planned in place of the recipe's shape.
    absent = str(load_yaml(TrainConfig, path).model).replace("out/", "nowhere/", 1)
    recipe = path.relative_to(ROOT)
    assert rondo("plan", recipe, absent, *budget, *gpus, "--throughput", 1e14, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 50
    assert found["phases"][-1]["last_step"] == 50
    parameters = found["parameters"]
    if path.parent.name == "lora":
        assert parameters["total"] - parameters["adapters"] == 1_484_918_784
        assert found["memory"]["sum"] < 14 * 2**30
    else:
        folder = path.parent.name if path.parent.name in COUNTS else "smollm2-135m"
        recurrent, parent = COUNTS[folder]
        gate = 576 + 2 if path.stem == "gate" else 0
        assert parameters["gate"] == gate
        assert parameters["total"] == (parent if path.stem == "static" else recurrent + gate)
        assert found["memory"]["sum"] < (80 if path.parent.name.endswith("1b") else 6) * 2**30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for the recipe's depths, and texts."""
    directory = tmp_path_factory.mktemp("recipes")
    save_parent(directory / "parent", tie_word_embeddings=True)
    for name in ("some", "more"):
        text = "\n\n".join(f"line {i} of {name} text" for i in range(90))
        (directory / f"{name}.txt").write_text(text)
    assert rondo("convert", directory / "parent", directory / "model", "--sizes", "2,2,2") == 0
    return directory


@pytest.mark.parametrize("stem", ["train", "static", "random", "heal", "task"])
def test_the_small_recipes_run_from_end_to_end(made: Path, tmp_path: Path, stem: str) -> None:
    recipe = ROOT / "recipes" / "smollm2-135m" / f"{stem}.yaml"
    flags = (
        *("--output-dir", tmp_path / "run"),
        *("--data.sources", made / "some.txt", f"twice={made / 'more.txt'}@2"),
        *("--data.cache-dir", tmp_path / "cache"),
        *("--watch.data", made / "some.txt", "--watch.every", 2, "--watch.rows", 2),
        *("--batch.seq-len", 16, "--budget.steps", 4),
        *("--machine.dtype", "float32"),
    )
    assert rondo("train", recipe, made / "model", *flags) == 0
    facts = json_of(tmp_path / "run" / "final" / "run.json")["training"]
    assert facts["steps"] == 4
    assert facts["tokens"] == 4 * 4 * 16
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4
    assert "val/loss@r1" in last


def test_what_was_planned_is_what_a_run_records(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "recipes" / "smollm2-135m" / "train.yaml"
    budget = ("--budget.steps", "None", "--budget.flops", 1e9)
    common = (made / "model", "--batch.seq-len", 16, *budget)
    assert rondo("plan", recipe, *common, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    flags = ("--data.sources", made / "some.txt", "--data.cache-dir", tmp_path / "cache")
    flags = (*flags, "--watch.data", "None", "--machine.dtype", "float32")
    assert rondo("train", recipe, *common, *flags, "--output-dir", tmp_path / "run") == 0
    facts = json_of(tmp_path / "run" / "final" / "run.json")["training"]
    for key in ("steps", "tokens", "flops", "flops_paper"):
        assert facts[key] == pytest.approx(planned[key], rel=1e-9), key
