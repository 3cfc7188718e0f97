"""Mistakes of the user: exit code 2, one line that names the thing, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tiny import (
    WIDTH,
    byte_tokenizer,
    edit_weights,
    json_of,
    parent_model,
    refusal,
    rondo,
    save_parent,
    tree,
)

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent that converts. Nobody may change it."""
    return save_parent(tmp_path_factory.mktemp("good") / "parent")


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    """A copy of the parent, for a test to damage."""
    return Path(shutil.copytree(good, tmp_path / "parent-of-the-test"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, wants it refused, and gives the one line."""

    def run(*words: object, names: tuple[object, ...]) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        code = rondo(*words)
        line = refusal(capsys)
        assert code == 2
        assert line.startswith(f"rondo {words[0]}: error: ")
        for name in names:
            assert str(name) in line
        assert tree(tmp_path) == before
        return line

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where nothing may be written."""
    return tmp_path / "below" / "out"


# ---- the source


def test_no_config(refused: Callable, tmp_path: Path, out: Path) -> None:
    (tmp_path / "pictures").mkdir()
    refused("convert", tmp_path / "pictures", out, names=(tmp_path / "pictures", "config.json"))


def test_a_file_as_source(refused: Callable, bad: Path, out: Path) -> None:
    weights = bad / "model.safetensors"
    refused("convert", weights, out, names=(weights, "not a model directory"))


def test_no_such_directory(refused: Callable, tmp_path: Path, out: Path) -> None:
    refused("convert", tmp_path / "gone", out, names=(tmp_path / "gone",))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no such id!"])
def test_no_such_hub_id(
    refused: Callable, out: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # As HF_HUB_OFFLINE=1 sets it when the library is first imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("convert", name, out, names=(name,))


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_damaged_config(refused: Callable, bad: Path, out: Path, text: str) -> None:
    (bad / "config.json").write_text(text, encoding="latin-1")
    refused("convert", bad, out, names=(bad / "config.json",))


FAMILIES = {
    "fancynew": "fancynew",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "mamba": "state-space",
    "jamba": "state-space",
    "bamba": "state-space",
    "qwen3_next": "linear_attention",
    "gpt2": "positions",
    "gpt_neox": "embed_tokens",
    "gemma3n": "share keys and values",
    "gemma3n_text": "share keys and values",
    "gemma4": "share keys and values",
    "gemma3": "multimodal",
    "llava": "multimodal",
    "vit": "no causal language model",
}


@pytest.mark.parametrize(("family", "reason"), FAMILIES.items())
def test_families_are_refused_from_the_config_alone(
    refused: Callable, tmp_path: Path, out: Path, family: str, reason: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": family}))
    line = refused("convert", model, out, names=(family, reason))
    assert "safetensors" not in line


def test_a_config_without_a_family(refused: Callable, tmp_path: Path, out: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"hidden_size": 32}))
    refused("convert", model, out, names=(model, "model_type"))


def test_a_converted_checkpoint_as_source(
    refused: Callable, good: Path, tmp_path: Path, out: Path
) -> None:
    assert rondo("convert", good, tmp_path / "converted") == 0
    line = refused("convert", tmp_path / "converted", out, names=("rondo", "already"))
    assert "multimodal" not in line


def edit_config(directory: Path, **fields: Any) -> None:
    config = json_of(directory / "config.json") | fields
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("method", ["gptq", "fp8", "something-new"])
def test_quantised_weights(refused: Callable, bad: Path, out: Path, method: str) -> None:
    edit_config(bad, quantization_config={"quant_method": method, "bits": 4})
    refused("convert", bad, out, names=("llama", "quantised"))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_hidden_layers": "six"}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "attention heads"),
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"hidden_act": "swoosh"}, "swoosh"),
        ({"dtype": "float99"}, "float99"),
    ],
)
def test_a_config_with_impossible_values(
    refused: Callable, bad: Path, out: Path, fields: dict, name: str
) -> None:
    edit_config(bad, **fields)
    refused("convert", bad, out, names=(name,))


def test_code_in_the_source_is_not_run_unasked(refused: Callable, bad: Path, out: Path) -> None:
    trap = bad.parent / "trap"
    edit_config(bad, model_type="fancy", auto_map={"AutoConfig": "configuration_fancy.Fancy"})
    (bad / "configuration_fancy.py").write_text(f"open({str(trap)!r}, 'w')\n")
    refused("convert", bad, out, names=(bad, "custom code"))
    assert not trap.exists()


def test_too_few_layers(refused: Callable, tmp_path: Path, out: Path) -> None:
    parent = save_parent(tmp_path / "short", num_hidden_layers=2)
    refused("convert", parent, out, names=("2 layers",))


# ---- the weights


@pytest.mark.parametrize("length", [0, 50, 60_000])
def test_truncated_weights(refused: Callable, bad: Path, out: Path, length: int) -> None:
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    refused("convert", bad, out, names=(weights, "fetch it again"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A parent in several weight files, for a test to damage."""
    directory = tmp_path / "sharded"
    parent_model().save_pretrained(directory, max_shard_size="50KB")
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_a_missing_shard(refused: Callable, sharded: Path, out: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    refused("convert", sharded, out, names=(lost.name, sharded))


def test_a_truncated_shard(refused: Callable, sharded: Path, out: Path) -> None:
    cut = sorted(sharded.glob("*.safetensors"))[-1]
    cut.write_bytes(cut.read_bytes()[:-100])
    refused("convert", sharded, out, names=(cut, "fetch it again"))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}'])
def test_a_damaged_index(refused: Callable, sharded: Path, out: Path, text: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    refused("convert", sharded, out, names=(index, "damaged"))


def test_an_index_that_points_into_the_wrong_file(
    refused: Callable, sharded: Path, out: Path
) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json_of(index)
    content["weight_map"][NORM] = next(
        file for file in content["weight_map"].values() if file != content["weight_map"][NORM]
    )
    index.write_text(json.dumps(content))
    refused("convert", sharded, out, names=(NORM,))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({NORM: torch.ones(WIDTH + 1)}),
        lambda tensors: tensors.update({NORM: torch.ones(WIDTH, 1)}),
    ],
)
def test_weights_of_another_shape(
    refused: Callable, bad: Path, out: Path, change: Callable
) -> None:
    edit_weights(bad, change)
    refused("convert", bad, out, names=(NORM, WIDTH))


def test_a_config_of_another_width(refused: Callable, bad: Path, out: Path) -> None:
    edit_config(bad, vocab_size=300)
    refused("convert", bad, out, names=(bad, 300, 260))


@pytest.mark.parametrize(("layers", "name"), [(5, "model.layers.5."), (7, "model.layers.6.")])
def test_a_config_of_another_depth(
    refused: Callable, bad: Path, out: Path, layers: int, name: str
) -> None:
    edit_config(bad, num_hidden_layers=layers)
    refused("convert", bad, out, names=(name, bad))


def test_a_tensor_too_many_and_one_too_few(refused: Callable, bad: Path, out: Path) -> None:
    edit_weights(bad, lambda tensors: tensors.update({"model.stray": torch.ones(2)}))
    refused("convert", bad, out, names=("model.stray", "LlamaForCausalLM"))
    edit_weights(bad, lambda tensors: (tensors.pop("model.stray"), tensors.pop(NORM)))
    refused("convert", bad, out, names=(NORM, "LlamaForCausalLM"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(
    good: Path, bad: Path, out: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    edit_weights(bad, lambda tensors: tensors[name].view(-1)[5].fill_(value))
    assert rondo("convert", bad, out) == 2
    line = refusal(capsys)
    assert name in line
    assert "NaN" in line
    assert not out.exists()
    assert not list(out.parent.glob(".*"))


def test_pickled_weights_are_never_opened(refused: Callable, bad: Path, out: Path) -> None:
    trap = bad.parent / "trap"

    class Trap:
        def __reduce__(self) -> tuple:
            return (open, (str(trap), "w"))

    torch.save({"x": Trap()}, bad / "pytorch_model.bin")
    (bad / "model.safetensors").unlink()
    refused("convert", bad, out, names=(bad, "safetensors"))
    assert not trap.exists()


def test_no_weights_at_all(refused: Callable, bad: Path, out: Path) -> None:
    (bad / "model.safetensors").unlink()
    refused("convert", bad, out, names=(bad, "safetensors"))


def test_no_tokenizer(refused: Callable, bad: Path, out: Path) -> None:
    (bad / "tokenizer.json").unlink()
    refused("convert", bad, out, names=(bad, "tokenizer.json"))
    refused("convert", bad, out, "--dry-run", names=(bad, "tokenizer.json"))


def test_a_damaged_gguf(refused: Callable, tmp_path: Path, out: Path) -> None:
    pytest.importorskip("gguf")
    refused("convert", tmp_path / "none.gguf", out, names=(tmp_path / "none.gguf",))
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 100)
    refused("convert", tmp_path / "junk.gguf", out, names=(tmp_path / "junk.gguf", "GGUF"))


# ---- the settings


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0-3,2-4,4-6", ("0-3,2-4,4-6", "overlaps")),
        ("0-3:2,3-6:2,5", ("overlaps",)),
        ("4-6,2-4,0-2", ("backwards",)),
        ("5,4,3", ("5,4,3", "backwards")),
        ("0-2,4-2,4-6", ("4-2", "empty")),
        ("0-2,2-4,4-7", ("4-7", "0-6")),
        ("0-2,2-4,6", ("6 layers",)),
        ("0-2,2-99999999999999999999,4-6", ("6 layers",)),
        ("", ("--split",)),
        ("0-2,,4-6", ("--split",)),
        ("0-2,2-2,4-6", ("2-2", "empty")),
        (",,", ("--split",)),
        ("0-2,2-4", ("2 parts",)),
        ("0-2,2-3,3-4,4-6", ("0-2,2-3,3-4,4-6", "4 parts")),
        ("0-2,2-4,4-6,", ("4 parts",)),
        ("0-2,2-4:0,4-6", ("2-4:0",)),
        ("0-2,two,4-6", ("two",)),
        ("0-2,-1,4-6", ("-1",)),
        ("0-2,2.5,4-6", ("2.5",)),
        ("0-\N{SUPERSCRIPT TWO},2-4,4-6", ("--split",)),
        ("Keep", ("Keep", "keep")),
    ],
)
def test_splits(refused: Callable, good: Path, out: Path, text: str, names: tuple) -> None:
    refused("convert", good, out, "--split", text, names=names)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--sizes", "2,2,3"], ("6 layers", "7")),
        (["--sizes", "1,2,2"], ("6 layers", "5", "drop")),
        (["--split", "drop", "--sizes", "3,3,3"], ("9 layers", "6")),
        (["--split", "stride", "--sizes", "1,3,1"], ("5",)),
        (["--sizes", "2,4"], ("2,4", "three")),
        (["--sizes", "0,3,3"], ("0,3,3", "positive")),
        (["--sizes=-1,4,3"], ("-1,4,3",)),
        (["--sizes", "a,b,c"], ("a,b,c",)),
        (["--sizes", ""], ("--sizes",)),
        (["--sizes", "\N{SUPERSCRIPT TWO},2,2"], ("--sizes",)),
        (["--split", "auto", "--sizes", "2,2,2"], ("--sizes", "auto")),
        (["--split", "0-2,2-4,4-6", "--sizes", "2,2,2"], ("--sizes",)),
        (["--preset", "olmo-2-1b"], ("olmo-2-1b", "16 layers", "6")),
        (["--preset", "tinyllama-1.1b"], ("22 layers", "6")),
        (["--preset", "olmo-2-1b", "--split", "keep"], ("olmo-2-1b", "--split")),
        (["--preset", "olmo-2-1b", "--sizes", "2,2,2"], ("olmo-2-1b", "--sizes")),
        (["--stride", "0"], ("stride", "0")),
        (["--num-recurrences", "0"], ("num_recurrences", "0")),
        (["--num-recurrences", "65"], ("65", "64", "--max-recurrences")),
        (["--max-recurrences", "3", "--num-recurrences", "4"], ("--num-recurrences 4", "3")),
        (["--mixing", "1.5"], ("mixing", "1.5")),
        (["--mixing", "nan"], ("mixing", "nan")),
        (["--mixing", "0.5", "--injection", "add"], ("--mixing",)),
        (["--mixing", "0.5", "--preset", "paper"], ("--mixing",)),
        (["--random-injection"], ("--random-injection", "mix")),
        (["--preset", "paper", "--injection", "add"], ("add",)),
    ],
)
def test_settings(refused: Callable, good: Path, out: Path, words: list[str], names: tuple) -> None:
    refused("convert", good, out, *words, names=names)


def test_json_is_for_a_dry_run(refused: Callable, good: Path, out: Path) -> None:
    refused("convert", good, out, "--json", names=("--json", "--dry-run"))


@pytest.mark.parametrize(
    ("probe", "names"),
    [
        (None, ("probe.json",)),
        ("{", ("probe.json",)),
        ("{}", ("probe.json",)),
        ('{"num_layers": 6}', ("probe.json",)),
        ('{"num_layers": 7, "choice": {}}', ("7", "6")),
    ],
)
def test_probes(
    refused: Callable, good: Path, tmp_path: Path, out: Path, probe: str | None, names: tuple
) -> None:
    (tmp_path / "probe").mkdir()
    if probe is not None:
        (tmp_path / "probe" / "probe.json").write_text(probe)
    words = ("--split", "auto", "--probe", tmp_path / "probe")
    refused("convert", good, out, *words, names=names)


def test_no_output(refused: Callable, good: Path) -> None:
    refused("convert", good, names=("--dry-run",))


# ---- where to write


def test_output_exists(refused: Callable, good: Path, bad: Path) -> None:
    refused("convert", good, bad, names=(bad, "--overwrite"))


@pytest.mark.parametrize("words", [(), ("--overwrite",)])
def test_output_is_a_file(
    refused: Callable, good: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused("convert", good, tmp_path / "notes.txt", *words, names=(tmp_path / "notes.txt",))


def test_output_below_a_file(refused: Callable, good: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    below = tmp_path / "notes.txt" / "deep" / "out"
    refused("convert", good, below, names=(tmp_path / "notes.txt",))


@pytest.mark.parametrize("where", ["itself", "above", "link"])
def test_overwrite_never_deletes_the_source(
    refused: Callable, bad: Path, tmp_path: Path, where: str
) -> None:
    target = {"itself": bad, "above": tmp_path, "link": tmp_path / "link"}[where]
    if where == "link":
        target.symlink_to(bad)
    refused("convert", bad, target, "--overwrite", names=(bad,))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from rondo.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_file_that_may_not_grow(good: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", LIMITED, "convert", good, tmp_path / "out"]
    answer = subprocess.run(words, capture_output=True, text=True)
    line = answer.stderr.strip()
    assert answer.returncode == 2, line
    assert line.startswith("rondo convert: error: cannot write")
    assert str(tmp_path) in line
    assert "\n" not in line
    assert tree(tmp_path) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that gives a disk of so many KiB. It needs root and leave to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk])
    if made.returncode:
        pytest.skip("nothing can be mounted here")

    def resize(kibibytes: int) -> Path:
        subprocess.run([mount, "-o", f"remount,size={kibibytes}k", disk], check=True)
        return disk

    yield resize
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_half_way(refused: Callable, good: Path, small_disk: Callable) -> None:
    out = small_disk(1024) / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    weights = (good / "model.safetensors").stat().st_size // 1024
    # Within the weights, or within one of the small files that follow them.
    for size in (weights // 2, weights + 12, weights + 28, weights + 44):
        disk = small_disk(size)
        refused("convert", good, out, "--overwrite", names=("cannot write", disk))


# ---- the command line itself


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert rondo("konvert", "a", "b") == 2
    told = capsys.readouterr().err
    assert "'konvert'" in told.splitlines()[0]
    assert "did you mean convert?" in told.splitlines()[0]
    assert rondo("xyzzy") == 2
    told = capsys.readouterr().err
    assert "'xyzzy'" in told
    assert "did you mean" not in told


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--spilt", "keep"], ("--spilt", "--split")),
        (["--num-recurences", "3"], ("--num-recurences", "--num-recurrences")),
        (["--injection", "lineal"], ("--injection", "lineal", "linear")),
        (["--stride", "two"], ("--stride", "two")),
        (["third-word"], ("third-word",)),
    ],
)
def test_flags(
    good: Path,
    tmp_path: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    names: tuple[str, ...],
) -> None:
    assert rondo("convert", good, out, *words) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    for name in names:
        assert name in told
    assert tree(tmp_path) == {}


def test_a_missing_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert rondo("convert") == 2
    assert "SOURCE" in capsys.readouterr().err


# ---- recipes


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("source: [", ("line 1",)),
        ("- a list", ("mapping",)),
        ("", ("mapping",)),
        ("output_dir: out", ("source", "required")),
        ("source: a\nsplitt: keep", ("splitt",)),
        ("source: a\nstride: 0", ("stride", "0")),
        ("source: a\nstride: two", ("stride", "two")),
        ("source: a\ninjection: lineal", ("injection", "lineal")),
        ("source: a\nsplit: 5", ("split", "5")),
    ],
)
def test_recipes(refused: Callable, tmp_path: Path, text: str, names: tuple) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    refused("convert", recipe, names=(recipe, *names))


def test_no_such_recipe(refused: Callable, tmp_path: Path) -> None:
    refused("convert", tmp_path / "none.yaml", names=(tmp_path / "none.yaml",))
