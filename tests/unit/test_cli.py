"""The command line: what it loads, what it answers, and how recipes and flags combine."""

import importlib.metadata
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rondo import cli, config
from rondo.errors import ProofError, UserError

CONFIGS = {verb: cls for verb, (cls, _) in cli.commands().items()}


def run_python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True)


# ---- what loads

LIGHT = """
import contextlib, io, json, sys
import rondo.config
from rondo import cli

answers = {}
for verb in [None, *cli.commands()]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            code = cli.main(["--help"] if verb is None else [*verb.split(), "--help"])
        except SystemExit as leaving:
            code = leaving.code
    answers[verb or "rondo"] = [code, text.getvalue()]
heavy = {"torch", "transformers", "safetensors", "altair", "numpy"} & set(sys.modules)
json.dump({"answers": answers, "heavy": sorted(heavy)}, sys.stdout)
"""


def test_help_of_every_verb_loads_nothing_heavy() -> None:
    answer = run_python("-c", LIGHT)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["heavy"] == []
    code, text = found["answers"].pop("rondo")
    assert code == 0
    assert all(verb in text for verb in CONFIGS)
    assert found["answers"].keys() == CONFIGS.keys()
    for verb, (code, text) in found["answers"].items():
        assert code == 0
        assert f"usage: rondo {verb}" in text
        for name, field in CONFIGS[verb].model_fields.items():
            flag = "--json" if name == "json_output" else f"--{name.replace('_', '-')}"
            assert name in CONFIGS[verb].words or flag in text
            assert field.description, f"{verb} {name} has no docstring"


def test_python_m_rondo() -> None:
    answer = run_python("-m", "rondo", "--help")
    assert answer.returncode == 0
    assert answer.stdout.startswith("usage: rondo VERB")
    answer = run_python("-m", "rondo", "konvert")
    assert answer.returncode == 2
    assert "did you mean convert?" in answer.stderr
    assert answer.stdout == ""


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_no_verb_tells_the_verbs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    for verb, cls in CONFIGS.items():
        assert f"  {verb}" in told
        assert (cls.__doc__ or "?").splitlines()[0] in told


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        version = importlib.metadata.version("rondo-lm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from the source tree, not installed")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version


# ---- exit codes


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (None, 0, ""),
        (UserError("mend this"), 2, "rondo verify: error: mend this\n"),
        (ProofError("it does not hold"), 1, "rondo verify: failed: it does not hold\n"),
        (KeyboardInterrupt(), 130, "\nrondo verify: stopped\n"),
        (OSError(28, "No space left on device"), 2, "rondo verify: error: cannot write: "),
        (PermissionError(13, "Permission denied", "/x"), 2, "rondo verify: error: cannot write: "),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException | None,
    code: int,
    told: str,
) -> None:
    seen: list[config.Config] = []

    def command(settings: config.Config) -> None:
        seen.append(settings)
        if error is not None:
            raise error

    monkeypatch.setattr("rondo.report.run", command)
    monkeypatch.setitem(cli.COMMANDS, "verify", (config.VerifyConfig, "rondo.report:run"))
    assert cli.main(["verify", "some-model"]) == code
    assert seen == [config.VerifyConfig(model="some-model")]
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("a bug")])
def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def command(settings: config.Config) -> None:
        raise error

    monkeypatch.setattr("rondo.report.run", command)
    monkeypatch.setitem(cli.COMMANDS, "verify", (config.VerifyConfig, "rondo.report:run"))
    with pytest.raises(type(error), match=str(error.args[-1])):
        cli.main(["verify", "some-model"])


# ---- verbs of other distributions


class Point:
    """An entry point that notes when it is loaded."""

    def __init__(self, name: str, loads: Any):
        self.name, self.loads, self.loaded = name, loads, 0

    def load(self) -> Any:
        self.loaded += 1
        return self.loads


def test_verbs_of_other_distributions_are_found_and_ours_stay_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("rondo.report.run", lambda settings: seen.append(settings.model))
    points = [Point(name, (config.VerifyConfig, "rondo.report:run")) for name in ("check", "train")]
    monkeypatch.setattr(cli.importlib.metadata, "entry_points", lambda group: points)
    assert cli.main(["check", "some-model"]) == 0
    assert seen == ["some-model"]
    assert cli.commands()["train"][0] is config.TrainConfig
    assert points[1].loaded == 0


def test_a_verb_that_is_not_installed_says_how_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.metadata, "entry_points", lambda group: [])
    assert cli.main(["serve", "some-model"]) == 2
    told = capsys.readouterr().err
    assert told == 'rondo: error: serve is not installed: pip install "rondo-lm[serve]"\n'


# ---- recipes and flags


def parse(cls: type[config.Config], *words: str) -> Any:
    return config.parse(cls, list(words), prog="rondo")


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Return a function that writes a recipe."""

    def write(**fields: Any) -> str:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
        return str(tmp_path / "recipe.yaml")

    return write


def test_flags_alone() -> None:
    settings = parse(config.ConvertConfig, "a", "b", "--split", "drop", "--mixing", "0.5")
    assert settings == config.ConvertConfig(source="a", output_dir="b", split="drop", mixing=0.5)


def test_a_recipe_is_complete(recipe: Any) -> None:
    path = recipe(source="a", output_dir="b", split="0-2,2-4,4-6", untie=True)
    assert parse(config.ConvertConfig, path) == config.ConvertConfig(
        source="a", output_dir="b", split="0-2,2-4,4-6", untie=True
    )


def test_flags_override_a_recipe(recipe: Any) -> None:
    path = recipe(source="a", output_dir="b", split="drop", mixing=0.5, num_recurrences=7)
    settings = parse(config.ConvertConfig, path, "--split", "keep", "--mixing", "0.9")
    assert (settings.split, settings.mixing, settings.num_recurrences) == ("keep", 0.9, 7)
    assert (settings.source, settings.output_dir) == ("a", "b")


def test_words_override_a_recipe(recipe: Any) -> None:
    path = recipe(source="a", output_dir="b", split="drop")
    settings = parse(config.ConvertConfig, path, "c", "d", "--untie")
    assert (settings.source, settings.output_dir, settings.split) == ("c", "d", "drop")
    assert settings.untie


def test_a_switch_may_be_given_again_and_taken_back(recipe: Any) -> None:
    path = recipe(source="a", output_dir="b", untie=True)
    assert parse(config.ConvertConfig, path, "--untie").untie
    assert not parse(config.ConvertConfig, path, "--no-untie").untie


def test_several_words_in_a_recipe(recipe: Any) -> None:
    path = recipe(results=["out/a", "out/b"], title="both")
    assert parse(config.ReportConfig, path).results == ("out/a", "out/b")
    assert parse(config.ReportConfig, path, "--title", "x").results == ("out/a", "out/b")
    assert parse(config.ReportConfig, path, "out/c").results == ("out/c",)


def test_nested_settings(recipe: Any) -> None:
    path = recipe(model="m", recurrence={"mean": 3, "cap": 9}, budget={"steps": 5})
    settings = parse(
        config.TrainConfig, path, "--recurrence.mean", "6", "--optimizer.betas", "0.8", "0.9"
    )
    assert (settings.recurrence.mean, settings.recurrence.cap) == (6, 9)
    assert settings.budget.steps == 5
    assert settings.optimizer.betas == (0.8, 0.9)
    assert settings.optimizer.lr == config.OptimizerConfig().lr


def test_flags_are_checked_together_with_the_recipe(recipe: Any) -> None:
    path = recipe(model="m", recurrence={"mean": 3}, budget={"steps": 5})
    with pytest.raises(UserError, match=r"steps, tokens"):
        parse(config.TrainConfig, path, "--budget.tokens", "1000")
    with pytest.raises(UserError, match=r"minimum 4, mean 3"):
        parse(config.TrainConfig, path, "--recurrence.minimum", "4")
    with pytest.raises(UserError, match=r"no multiple"):
        parse(config.TrainConfig, path, "--recurrence.draws-per-step", "3")


def test_a_recipe_states_what_differs_from_another(recipe: Any, tmp_path: Path) -> None:
    base = Path(recipe(model="m", recurrence={"mean": 3, "cap": 9}, budget={"steps": 5}))
    twin = tmp_path / "twin.yaml"
    twin.write_text(f"extends: {base.name}\nmode: static\nrecurrence: {{cap: 7}}\n")
    settings = parse(config.TrainConfig, str(twin))
    assert (settings.model, settings.mode, settings.budget.steps) == ("m", "static", 5)
    assert (settings.recurrence.mean, settings.recurrence.cap) == (3, 7)
    twin.write_text("extends: twin.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        parse(config.TrainConfig, str(twin))
    twin.write_text("extends: nothing.yaml\n")
    with pytest.raises(UserError, match=r"cannot read the recipe .*nothing\.yaml"):
        parse(config.TrainConfig, str(twin))


def test_a_number_in_yaml_without_a_point(recipe: Any, tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-4 as a string.
    (tmp_path / "recipe.yaml").write_text("model: m\noptimizer: {lr: 1e-4}\n")
    settings = parse(config.TrainConfig, str(tmp_path / "recipe.yaml"))
    assert settings.optimizer.lr == 1e-4


def test_configs_never_change() -> None:
    settings = config.VerifyConfig(model="m")
    with pytest.raises(ValueError, match="frozen"):
        settings.model = "n"


def test_a_mistake_names_field_and_value() -> None:
    with pytest.raises(UserError, match=r"stride.*got 0"):
        config.ConvertConfig(source="a", stride=0)
    with pytest.raises(UserError, match=r"mean.*got 'x'"):
        config.TrainConfig(model="m", recurrence={"mean": "x"})
    with pytest.raises(UserError, match="strid: Extra inputs"):
        config.ConvertConfig(source="a", strid=3)
    with pytest.raises(UserError, match=r"source: Field required; .*stride"):
        config.ConvertConfig(stride=0)


# ---- the command that is recorded

paths = st.text("abc/-_. é'$", min_size=1, max_size=12).filter(
    lambda text: text.strip() == text and text[0] != "-" and not text.endswith((".yaml", ".yml"))
)
converts = st.builds(
    config.ConvertConfig,
    source=paths,
    output_dir=paths,
    split=st.sampled_from([None, "drop", "0-2,2-4,4-6"]),
    stride=st.integers(1, 5),
    injection=st.sampled_from([None, "mix", "linear", "add"]),
    mixing=st.none() | st.floats(0, 1),
    untie=st.booleans(),
    json_output=st.booleans(),
    seed=st.integers(-3, 3),
)
trains = st.builds(
    config.TrainConfig,
    model=paths,
    output_dir=paths,
    loss=st.builds(config.LossConfig, kind=st.sampled_from(["last", "deep", "deep+distil"])),
    data=st.builds(
        config.DataConfig,
        sources=st.lists(paths, min_size=1, max_size=3).map(tuple),
        phases=st.sampled_from([(), ("0.5: general@3 math", "1: math")]),
        streaming=st.booleans(),
    ),
    watch=st.builds(config.WatchConfig, telemetry=st.booleans(), data=st.none() | paths),
    recurrence=st.builds(
        config.RecurrenceConfig, mean=st.integers(1, 9), cap=st.none() | st.integers(1, 9)
    ),
    optimizer=st.builds(
        config.OptimizerConfig,
        lr=st.floats(1e-8, 1),
        betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    ),
    budget=st.one_of(
        st.builds(config.BudgetConfig),
        st.builds(config.BudgetConfig, steps=st.integers(1, 100)),
        st.builds(config.BudgetConfig, like=paths),
    ),
    resume=st.booleans(),
)
evals = st.builds(
    config.EvalConfig,
    model=paths,
    data=st.lists(paths, min_size=1, max_size=3).map(tuple),
    recurrences=st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    label=st.none() | paths,
)
reports = st.builds(
    config.ReportConfig, results=st.lists(paths, min_size=1, max_size=3).map(tuple), title=paths
)


@given(st.one_of(converts, trains, evals, reports))
def test_the_recorded_command_gives_the_same_settings(settings: config.Config) -> None:
    program, verb, *words = shlex.split(config.command_line(settings))
    assert program == "rondo"
    cls = CONFIGS[verb]
    assert cls is type(settings)
    assert config.parse(cls, words, prog=f"rondo {verb}") == settings


def test_the_recorded_command_names_only_what_was_chosen() -> None:
    settings = config.ConvertConfig(source="a b", output_dir="c", split="drop", untie=True)
    assert config.command_line(settings) == "rondo convert 'a b' c --split drop --untie"
    settings = config.ConvertConfig(source="a", dry_run=True, json_output=True)
    assert config.command_line(settings) == "rondo convert a --dry-run --json"


@given(st.one_of(converts, trains, evals, reports))
def test_a_dumped_config_is_a_recipe(settings: config.Config) -> None:
    text = yaml.safe_dump(json.loads(json.dumps(settings.model_dump(mode="json"))))
    assert type(settings)(**yaml.safe_load(text)) == settings
