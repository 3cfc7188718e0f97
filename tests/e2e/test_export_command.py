"""`rondo export` through the command line, from a converted checkpoint to a plain one."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny import edit_weights, json_of, refusal, rondo, save_parent, tree

from rondo.export import proof

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# What an engine does that has never heard of us: no import of rondo, no remote code.
ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 12 + 30?"}])
ids = torch.tensor([prompt["input_ids"]])
out = model.generate(ids, do_sample=False, max_new_tokens=8, min_new_tokens=8)
assert not any(name.partition(".")[0] == "rondo" for name in sys.modules)
print(json.dumps([type(model).__name__, tokenizer.decode(out[0, ids.shape[1]:])]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with a chat template, and two conversions of it. Nobody may change them."""
    base = tmp_path_factory.mktemp("models")
    parent = save_parent(base / "parent", "gemma3_text")
    (parent / "chat_template.jinja").write_text(TEMPLATE)
    assert rondo("convert", parent, base / "passing", "--mixing", 1) == 0
    assert rondo("convert", parent, base / "usual") == 0
    return base


def test_an_export_answers_as_the_recurrent_model_does_without_us(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plain"
    assert rondo("export", models / "passing", target, "--unrolled", 3) == 0
    printed = capsys.readouterr().out
    assert "Gemma3ForCausalLM, 10 layers: 2 + 3 x 2 + 2" in printed
    assert "note: layer_types" in printed
    assert printed.splitlines()[-1] == f"wrote {target}: 2 checks passed"
    assert {path.name for path in target.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    command = [sys.executable, "-c", ELSEWHERE, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    family, text = json.loads(done.stdout)
    assert family == "Gemma3ForCausalLM"
    words = ["--prompt", "What is 12 + 30?", "--recurrences", 3, "--max-new-tokens", 8, "--json"]
    assert rondo("generate", models / "passing", "--chat", "--dtype", "float32", *words) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours["text"] == text


def test_what_travels_is_what_it_was(models: Path, tmp_path: Path) -> None:
    assert rondo("export", models / "usual", tmp_path / "plain", "--unrolled", 1) == 0
    travelled = FILES - {"README.md", "config.json", "model.safetensors", "run.json"}
    for name in travelled:
        assert (tmp_path / "plain" / name).read_bytes() == (models / "usual" / name).read_bytes()
    config = json_of(tmp_path / "plain" / "config.json")
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["model_type"] == "gemma3_text"
    assert config["dtype"] == json_of(models / "usual" / "config.json")["dtype"]
    assert not {"auto_map", "num_recurrences"} & config.keys()


def test_run_json_repeats_the_export(models: Path, tmp_path: Path) -> None:
    words = ("--unrolled", 2, "--max-shard-gb", 0.00005)
    assert rondo("export", models / "passing", tmp_path / "plain", *words) == 0
    facts = json_of(tmp_path / "plain" / "run.json")
    assert facts["kind"] == "export"
    assert facts["parent"]["path"] == str(models / "parent")
    assert facts["recurrent"]["path"] == str(models / "passing")
    shutil.copytree(tmp_path / "plain", tmp_path / "before")
    assert rondo(*shlex.split(facts["command"])[1:], "--overwrite") == 0
    before, after = tree(tmp_path / "before"), tree(tmp_path / "plain")
    assert before.keys() == after.keys()
    assert len(after) > len(FILES)
    assert [name for name in before if before[name] != after[name]] == ["run.json"]


@pytest.mark.parametrize(
    ("model", "words", "said"),
    [
        ("usual", ("--unrolled", "2"), "R = 1 can be written (--unrolled 1)"),
        ("passing", ("--unrolled", "65"), "cap of 64"),
        ("passing", ("--unrolled", "0"), "unrolled: Input should be greater than or equal to 1"),
        ("parent", ("--unrolled", "1"), "is a gemma3_text model, not a recurrent one"),
        ("nowhere", ("--unrolled", "1"), "there is no config.json"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    model: str,
    words: tuple[str, ...],
    said: str,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert rondo("export", models / model, tmp_path / "plain", *words) == 2
    assert said in refusal(capsys)
    assert not list(tmp_path.iterdir())


def test_what_stands_there_is_not_replaced_unasked(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert rondo("export", models / "usual", tmp_path, "--unrolled", 1) == 2
    assert "exists already" in refusal(capsys)
    assert rondo("export", models / "usual", models, "--unrolled", 1, "--overwrite") == 2
    assert "would delete the source" in refusal(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_proof_that_fails_leaves_nothing_and_exits_1(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(proof, "TOLERANCE", -1.0)
    assert rondo("export", models / "passing", tmp_path / "plain", "--unrolled", 2) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("rondo export: failed: the export is not faithful")
    assert last.endswith("nothing was kept")
    assert not list(tmp_path.iterdir())


def test_a_mixing_that_has_been_trained_forbids_more_than_one_iteration(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(models / "passing", trained)
    edit_weights(trained, lambda tensors: tensors["model.injection.mixing"].mul_(0.99))
    assert rondo("export", trained, tmp_path / "plain", "--unrolled", 2) == 2
    assert "mixing lies in 0.99 .. 0.99" in refusal(capsys)
    assert rondo("export", trained, tmp_path / "plain", "--unrolled", 1) == 0
    with safe_open(tmp_path / "plain" / "model.safetensors", framework="pt") as file:
        assert not any("injection" in name for name in file.keys())  # noqa: SIM118 (no mapping)
