"""`rondo convert` and `rondo verify` through the command line, on tiny models of four families."""

import datetime
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import (
    FAMILIES,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    byte_tokenizer,
    edit_weights,
    json_of,
    parent_model,
    refusal,
    rondo,
    save_parent,
    tree,
    weights_of,
)
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from rondo.convert import convert, verify
from rondo.convert.split import parse_split
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

IDS = torch.arange(40, 60).reshape(2, 10) * 4 % VOCAB
DEPTHS = [1, 2, 4, 8, 16, 32]
FILES = {
    "README.md",
    "body_recurrent.py",
    "cache_recurrent.py",
    "deltas_recurrent.py",
    "exits_recurrent.py",
    "generation_recurrent.py",
    "injection_recurrent.py",
    "inputs_recurrent.py",
    "loops_recurrent.py",
    "slots_recurrent.py",
    "speculation_recurrent.py",
    "stores_recurrent.py",
    "config.json",
    "configuration_recurrent.py",
    "generation_config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "modeling_recurrent.py",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
CORE_WEIGHT = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A parent of each family, and a llama with tied embeddings. Nobody may change them."""
    base = tmp_path_factory.mktemp("parents")
    saved = {family: save_parent(base / family, family) for family in FAMILIES}
    saved["tied"] = save_parent(base / "tied", "llama", tie_word_embeddings=True)
    return saved


@pytest.fixture(scope="module")
def llama(parents: dict[str, Path]) -> Path:
    """The plain parent."""
    return parents["llama"]


@pytest.fixture(scope="module")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain parent, converted by default. Nobody may change it."""
    directory = tmp_path_factory.mktemp("converted") / "model"
    assert rondo("convert", llama, directory) == 0
    return directory


def printed_json(capsys: pytest.CaptureFixture[str]) -> Any:
    """What the command printed, which must be JSON and nothing else."""
    return json.loads(capsys.readouterr().out)


@torch.inference_mode()
def logits(directory: Path, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model(IDS, **options).logits


@torch.inference_mode()
def by_hand(
    layers: tuple[list[int], list[int], list[int]],
    inject: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    start: Callable[[torch.Tensor], torch.Tensor],
    depth: int,
) -> torch.Tensor:
    """The definition of the method, over the plain parent's own modules."""
    parent = parent_model("llama")
    body = parent.model
    positions = torch.arange(IDS.shape[1])[None]

    def run(part: list[int], hidden: torch.Tensor) -> torch.Tensor:
        for index in part:
            hidden = body.layers[index](
                hidden, position_embeddings=body.rotary_emb(hidden, positions)
            )
        return hidden

    e = run(layers[0], body.embed_tokens(IDS))
    s = start(e)
    for _ in range(depth):
        s = run(layers[1], inject(s, e))
    return parent.lm_head(body.norm(run(layers[2], s)))


# ---- splits


@pytest.mark.parametrize(
    ("words", "prelude", "core", "coda"),
    [
        ("", [0, 1], [2, 3], [4, 5]),
        ("--split keep", [0, 1], [2, 3], [4, 5]),
        ("--split keep --sizes 1,3,2", [0], [1, 2, 3], [4, 5]),
        ("--split drop", [0], [3, 4], [5]),
        ("--split drop --sizes 2,2,1", [0, 1], [3, 4], [5]),
        ("--split stride", [0], [1, 3], [5]),
        ("--split stride --stride 3 --sizes 1,4,1", [0], [1, 4], [5]),
        ("--split 0-2,2-4,4-6", [0, 1], [2, 3], [4, 5]),
        ("--split 0+2,3,4-6", [0, 2], [3], [4, 5]),
        ("--split 0-3:2,3,4-6", [0, 2], [3], [4, 5]),
        ("--split 0,1-5:3,5", [0], [1, 4], [5]),
        ("--split 1,2+4,5", [1], [2, 4], [5]),
    ],
)
def test_splits(
    llama: Path, tmp_path: Path, words: str, prelude: list, core: list, coda: list
) -> None:
    assert rondo("convert", llama, tmp_path / "out", *words.split()) == 0
    config = json_of(tmp_path / "out" / "config.json")
    assert config["source_layers"] == [*prelude, *core, *coda]
    assert [config[f"num_{part}_layers"] for part in ("prelude", "core", "coda")] == [
        len(prelude),
        len(core),
        len(coda),
    ]
    facts = json_of(tmp_path / "out" / "run.json")
    told = parse_split(facts["plan"]["split"], LAYERS)
    assert [list(told.prelude), list(told.core), list(told.coda)] == [prelude, core, coda]
    kept = {*prelude, *core, *coda}
    assert facts["plan"]["dropped_layers"] == [i for i in range(LAYERS) if i not in kept]
    assert {name.split(".")[2] for name in facts["tensors"]["dropped"]} == {
        str(i) for i in range(LAYERS) if i not in kept
    }
    parent = parent_model("llama")
    parent.model.layers = nn.ModuleList(parent.model.layers[i] for i in config["source_layers"])
    with torch.inference_mode():
        cut = parent(IDS, use_cache=False).logits
    assert torch.equal(logits(tmp_path / "out", num_recurrences=1), cut)


def test_auto_takes_what_a_probe_chose(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("altair")
    probe = tmp_path / "probe"
    assert rondo("probe", llama, "--output-dir", probe, "--tokens", 512, "--seq-len", 64) == 0
    words = ("--split", "auto", "--probe", probe)
    assert rondo("convert", llama, tmp_path / "out", *words) == 0
    choice = json_of(probe / "probe.json")["choice"]
    plan = json_of(tmp_path / "out" / "run.json")["plan"]
    assert (plan["split"], plan["mixing"]) == (choice["split"], choice["mixing"])
    assert rondo("convert", llama, tmp_path / "own", *words, "--mixing", 0.9) == 0
    assert json_of(tmp_path / "own" / "run.json")["plan"]["mixing"] == 0.9


def test_auto_probes_where_no_probe_is_named(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rondo("convert", llama, tmp_path / "out", "--split", "auto") == 0
    assert "probing first" in capsys.readouterr().err
    facts = json_of(tmp_path / "out" / "run.json")
    assert parse_split(facts["plan"]["split"], LAYERS).layers == tuple(range(LAYERS))
    assert facts["plan"]["mixing"] in (0.25, 0.5)
    mixing = weights_of(tmp_path / "out")["model.injection.mixing"]
    assert torch.equal(mixing, torch.full((WIDTH,), facts["plan"]["mixing"]))


# ---- injection, initial state, presets


@pytest.mark.parametrize("state_init", ["input", "zeros", "normal"])
@pytest.mark.parametrize("injection", ["mix", "linear", "add"])
def test_injections_and_initial_states(
    llama: Path, tmp_path: Path, injection: str, state_init: str
) -> None:
    out = tmp_path / "out"
    words = ("--injection", injection, "--state-init", state_init)
    assert rondo("convert", llama, out, *words) == 0
    config = json_of(out / "config.json")
    assert (config["injection"], config["state_init"]) == (injection, state_init)
    model = AutoModelForCausalLM.from_pretrained(out)

    def inject(s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return s + e if injection == "add" else 0.25 * s + 0.75 * e

    def start(e: torch.Tensor) -> torch.Tensor:
        return model.model.initial_state(e, torch.arange(IDS.shape[1])[None], 0)

    for depth in (1, 3):
        expected = by_hand(([0, 1], [2, 3], [4, 5]), inject, start, depth)
        torch.testing.assert_close(
            logits(out, num_recurrences=depth), expected, rtol=1e-4, atol=1e-4
        )


def test_defaults_of_the_injection(llama: Path, tmp_path: Path) -> None:
    assert rondo("convert", llama, tmp_path / "add", "--injection", "add") == 0
    config = json_of(tmp_path / "add" / "config.json")
    assert (config["injection"], config["state_init"]) == ("add", "zeros")
    assert rondo("convert", llama, tmp_path / "linear", "--injection", "linear") == 0
    config = json_of(tmp_path / "linear" / "config.json")
    assert (config["injection"], config["state_init"]) == ("linear", "input")
    words = ("--mixing", 0.6, "--num-recurrences", 3, "--max-recurrences", 5)
    assert rondo("convert", llama, tmp_path / "mix", *words) == 0
    config = json_of(tmp_path / "mix" / "config.json")
    assert (config["injection"], config["state_init"]) == ("mix", "input")
    assert (config["num_recurrences"], config["max_recurrences"]) == (3, 5)
    mixing = weights_of(tmp_path / "mix")["model.injection.mixing"]
    assert torch.equal(mixing, torch.full((WIDTH,), 0.6))
    assert torch.equal(logits(tmp_path / "mix"), logits(tmp_path / "mix", num_recurrences=3))


def test_the_seed_draws_a_random_injection(llama: Path, tmp_path: Path) -> None:
    words = ("--injection", "linear", "--random-injection", "--seed")
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        assert rondo("convert", llama, tmp_path / name, *words, seed) == 0
    first, again, other = (
        weights_of(tmp_path / name)["model.injection.weight"]
        for name in ("first", "again", "other")
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_its_parent_at_depth_one(
    parents: dict[str, Path], tmp_path: Path, family: str
) -> None:
    before = tree(parents[family])
    assert rondo("convert", parents[family], tmp_path / "out") == 0
    ours, theirs = logits(tmp_path / "out", num_recurrences=1), logits(parents[family])
    assert torch.equal(ours, theirs)
    assert not torch.equal(logits(tmp_path / "out", num_recurrences=2), theirs)
    assert rondo("verify", tmp_path / "out") == 0
    assert tree(parents[family]) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_layers_dropped_and_a_linear_injection(
    parents: dict[str, Path], tmp_path: Path, family: str
) -> None:
    words = ("--split", "0,2-4,5", "--injection", "linear", "--state-init", "normal")
    assert rondo("convert", parents[family], tmp_path / "out", *words) == 0


def test_the_papers_start(parents: dict[str, Path], tmp_path: Path) -> None:
    assert rondo("convert", parents["tied"], tmp_path / "out", "--preset", "paper") == 0
    config = json_of(tmp_path / "out" / "config.json")
    assert (config["injection"], config["state_init"]) == ("linear", "normal")
    assert config["source_layers"] == [0, 3, 4, 5]
    assert config["num_core_layers"] == 2
    weights = weights_of(tmp_path / "out")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    injection = weights["model.injection.weight"]
    bound = (2 * WIDTH) ** -0.5
    assert injection.shape == (WIDTH, 2 * WIDTH)
    assert 0.9 * bound < float(injection.abs().max()) <= bound
    assert float(injection.mean().abs()) < 0.1 * bound


@pytest.mark.parametrize(
    ("preset", "depth", "layers"),
    [
        ("tinyllama-1.1b", 22, [*range(4), *range(10, 22)]),
        ("llama-3.2-1b", 16, [*range(4), *range(6, 16)]),
        ("olmo-2-1b", 16, [*range(4), *range(6, 16)]),
    ],
)
def test_named_presets(tmp_path: Path, preset: str, depth: int, layers: list[int]) -> None:
    family = "olmo2" if preset.startswith("olmo") else "llama"
    parent = save_parent(tmp_path / "parent", family, num_hidden_layers=depth)
    assert rondo("convert", parent, tmp_path / "out", "--preset", preset) == 0
    config = json_of(tmp_path / "out" / "config.json")
    assert config["source_layers"] == layers
    sizes = [config[f"num_{part}_layers"] for part in ("prelude", "core", "coda")]
    assert sizes == [4, len(layers) - 8, 4]
    assert config["injection"] == "mix"


def test_the_papers_preset_knows_the_papers_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"hidden_size": 2048, "intermediate_size": 16, "num_hidden_layers": 22}
    parent = save_parent(tmp_path / "TinyLlama-1.1B-copy", "llama", **shape)
    assert rondo("convert", parent, "--preset", "paper", "--dry-run", "--json") == 0
    assert printed_json(capsys)["split"] == "0-4,10-18,18-22"
    renamed = parent.rename(tmp_path / "other-name")
    assert rondo("convert", renamed, "--preset", "paper", "--dry-run", "--json") == 0
    assert printed_json(capsys)["split"] == "0-4,10-18,18-22"
    narrow = save_parent(tmp_path / "narrow", "llama", num_hidden_layers=22)
    assert rondo("convert", narrow, "--preset", "paper", "--dry-run", "--json") == 0
    assert printed_json(capsys)["split"] == "0-4,9-18,18-22"


# ---- deltas

IN_ORDER = "--split stride --delta-target in-order --delta-rank"


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_full_rank_in_order_gives_the_parent_back(
    parents: dict[str, Path], tmp_path: Path, family: str
) -> None:
    assert rondo("convert", parents[family], tmp_path / "out", *IN_ORDER.split(), WIDTH) == 0
    assert json_of(tmp_path / "out" / "config.json")["source_layers"] == [0, 1, 3, 5]
    theirs = logits(parents[family])
    ours = logits(tmp_path / "out", num_recurrences=2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # Its first iteration is the first half of the range, 1 and 2.
    parent = AutoModelForCausalLM.from_pretrained(parents[family], dtype=torch.float32)
    parent.model.layers = nn.ModuleList(parent.model.layers[index] for index in (0, 1, 2, 5))
    with torch.inference_mode():
        half = parent(IDS, use_cache=False).logits
    once = logits(tmp_path / "out", num_recurrences=1)
    torch.testing.assert_close(once, half, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, logits(tmp_path / "out", num_recurrences=3), atol=1e-2)


def test_a_stride_of_three_runs_in_order_in_three_iterations(tmp_path: Path) -> None:
    parent = save_parent(tmp_path / "parent", num_hidden_layers=8)
    words = [*IN_ORDER.split(), WIDTH, "--stride", 3, "--sizes", "1,6,1"]
    assert rondo("convert", parent, tmp_path / "out", *words) == 0
    ours = logits(tmp_path / "out", num_recurrences=3)
    torch.testing.assert_close(ours, logits(parent), rtol=1e-4, atol=1e-4)
    assert rondo("verify", tmp_path / "out") == 0


def test_by_group_one_iteration_needs_no_deltas(llama: Path, tmp_path: Path) -> None:
    words = ("--split", "stride")
    assert rondo("convert", llama, tmp_path / "with", *words, "--delta-rank", 4) == 0
    assert rondo("convert", llama, tmp_path / "without", *words) == 0
    ours, theirs = (logits(tmp_path / name, num_recurrences=1) for name in ("with", "without"))
    assert torch.equal(ours, theirs)
    plan = json_of(tmp_path / "with" / "run.json")["plan"]
    assert plan["mixing"] == 1.0
    assert plan["deltas"]["targets"] == [[1, 3], [2, 4]]
    assert plan["deltas"]["fit_error"][0] == [0.0, 0.0]
    assert json_of(tmp_path / "without" / "run.json")["plan"]["deltas"] is None


def test_where_nothing_is_replaced_deltas_start_as_no_difference(
    llama: Path, tmp_path: Path
) -> None:
    words = ("--sizes", "1,2,3")
    assert rondo("convert", llama, tmp_path / "without", *words) == 0
    more = ("--delta-rank", 3, "--delta-iterations", 3)
    assert rondo("convert", llama, tmp_path / "with", *words, *more) == 0
    plain, ours = (
        RecurrentForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("without", "with")
    )
    assert ours.config.num_delta_iterations == 3
    ids = torch.arange(3, 20)[None]
    for depth in (1, 2, 5):
        assert torch.equal(
            plain(ids, num_recurrences=depth).logits, ours(ids, num_recurrences=depth).logits
        )
    tensors = weights_of(tmp_path / "with")
    stem = "model.layers.2.mlp.up_proj.delta_"
    assert not tensors[f"{stem}up"].any()
    # Drawn, and for each iteration and layer anew.
    down = tensors[f"{stem}down"]
    assert down.shape[:2] == (3, 3)
    assert down.flatten(1).unique(dim=0).shape[0] == 3
    assert json_of(tmp_path / "with" / "run.json")["plan"]["mixing"] == 0.25


def test_what_deltas_are_stored(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert rondo("convert", llama, out, *IN_ORDER.split(), 4) == 0
    told = capsys.readouterr().out
    old, new, facts = weights_of(llama), weights_of(out), json_of(out / "run.json")
    # Core layer 3, stored second, stands for 2 and then for 4.
    name = "mlp.down_proj"
    up, down = (new[f"model.layers.2.{name}.delta_{part}"] for part in ("up", "down"))
    assert (up.shape, down.shape) == ((2, WIDTH, 4), (2, 4, 48))
    shared = f"model.layers.3.{name}.weight"
    for iteration, index in enumerate((2, 4)):
        difference = old[f"model.layers.{index}.{name}.weight"] - old[shared]
        values = torch.linalg.svdvals(difference)
        missed = torch.linalg.matrix_norm(difference - up[iteration] @ down[iteration])
        torch.testing.assert_close(missed, values[4:].norm(), rtol=1e-4, atol=1e-5)
    norm = "post_attention_layernorm"
    assert torch.equal(
        new[f"model.layers.2.{norm}.delta_weight"][1],
        old[f"model.layers.4.{norm}.weight"] - old[f"model.layers.3.{norm}.weight"],
    )
    stored = {name for name in new if ".delta_" in name}
    tensors, plan = facts["tensors"], facts["plan"]
    assert set(tensors["new"]) == stored | {"model.injection.mixing"}
    assert tensors["dropped"] == []
    assert {int(name.split(".")[2]) for name in tensors["fitted"]} == {2, 4}
    assert tensors["used"] + len(tensors["fitted"]) == len(old)
    assert plan["parameters"]["deltas"] == sum(new[name].numel() for name in stored)
    assert plan["parameters"]["total"] == sum(tensor.numel() for tensor in new.values())
    (first, unlike), last = plan["deltas"]["fit_error"]
    assert first == 0.0
    assert all(0.5 < error < 1 for error in (unlike, *last))
    card = (out / "README.md").read_text(encoding="utf-8")
    for line in (f"iteration 1, layers 1-3: 0.000 {unlike:.3f}", "iteration 2, layers 3-5: "):
        assert line in told
        assert line in card
    assert {"deltas_recurrent.py"} <= {path.name for path in out.iterdir()}


def test_deltas_of_a_sharded_parent_in_bfloat16(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent_model("llama").to(torch.bfloat16).save_pretrained(parent, max_shard_size="30KB")
    byte_tokenizer().save_pretrained(parent)
    assert rondo("convert", parent, tmp_path / "out", *IN_ORDER.split(), WIDTH) == 0
    assert {one.dtype for one in weights_of(tmp_path / "out").values()} == {torch.bfloat16}
    ours, theirs = logits(tmp_path / "out", num_recurrences=2), logits(parent)
    assert float((ours - theirs).std() / theirs.std()) < 0.05
    assert rondo("verify", tmp_path / "out") == 0


@pytest.mark.parametrize("injection", ["mix", "linear", "add"])
@pytest.mark.parametrize("resident", [True, False])
def test_deltas_are_proved_with_any_start(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, injection: str, resident: bool
) -> None:
    monkeypatch.setattr(verify, "fits_in_memory", lambda _: resident)
    words = ["--split", "stride", "--delta-rank", 4, "--injection", injection]
    words += ["--state-init", "normal"]
    assert rondo("convert", llama, tmp_path / "out", *words) == 0
    assert rondo("verify", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("name", "check"),
    [
        (CORE_WEIGHT, "r = 1 equals the parent's layers"),
        ("model.layers.1.mlp.up_proj.delta_up", "as near to the replaced layers"),
        ("model.layers.1.input_layernorm.delta_weight", "the checkpoint's weights"),
    ],
)
def test_verify_notices_altered_deltas(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, check: str
) -> None:
    assert rondo("convert", llama, tmp_path / "out", *IN_ORDER.split(), WIDTH) == 0
    edit_weights(tmp_path / "out", nudge(name, 0.3))
    capsys.readouterr()
    assert rondo("verify", tmp_path / "out") == 1
    assert check in refusal(capsys)


def test_deltas_against_another_parent(
    llama: Path, parents: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rondo("convert", llama, tmp_path / "out", *IN_ORDER.split(), 4) == 0
    capsys.readouterr()
    assert rondo("verify", tmp_path / "out", "--parent", parents["qwen3"]) == 1
    assert "the parent's weights are those converted" in refusal(capsys)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--delta-iterations 2", "--delta-rank"),
        ("--split drop --delta-rank 4 --delta-target group", "--split stride"),
        ("--split stride --delta-rank 4 --delta-iterations 3", "leave it out"),
        ("--split stride --delta-rank 33", "33 is beyond 32"),
        ("--split stride --stride 3 --delta-rank 4", "divides"),
        ("--split stride --stride 1 --delta-rank 4", "at least 2"),
        ("--split stride --delta-target group", "--delta-rank"),
        ("--stride 3", "--split stride"),
        ("--split keep --stride 3", "--split stride"),
        ("--probe somewhere", "--split auto"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, named: str
) -> None:
    assert rondo("convert", llama, tmp_path / "out", *words.split()) == 2
    assert named in refusal(capsys)
    assert tree(tmp_path) == {}


def test_deltas_cannot_change_the_kind_of_a_layer(
    parents: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--split", "stride", "--delta-rank", 4)
    assert rondo("convert", parents["gemma3_text"], tmp_path / "out", *words) == 2
    assert "layer_types" in refusal(capsys)


# ---- dry run


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(tmp_path)
    assert rondo("convert", llama, tmp_path / "new" / "out", "--split", "drop", "--dry-run") == 0
    assert tree(tmp_path) == before
    told = capsys.readouterr().out
    assert "0,3-5,5" in told
    assert "[P..CCE]" in told
    rows = [
        [float(word.replace(",", "")) for word in line.split()]
        for line in told.splitlines()
        if re.fullmatch(r"\s*\d+\s+\d+\s+[\d.e+,]+\s+[\d.e+,]+\s+[\d,]+", line)
    ]
    assert [row[0] for row in rows] == DEPTHS
    assert [row[1] for row in rows] == [2 + 2 * depth for depth in DEPTHS]
    kv_bytes_per_layer = 2 * KV_HEADS * HEAD_DIM * 4
    assert [row[4] for row in rows] == [kv_bytes_per_layer * (2 + 2 * r) for r in DEPTHS]


def test_the_plan_as_json(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rondo("convert", llama, "--dry-run", "--json") == 0
    plan = printed_json(capsys)
    parent = parent_model("llama")
    count = sum(parameter.numel() for parameter in parent.parameters())
    layer = sum(parameter.numel() for parameter in parent.model.layers[0].parameters())
    assert plan["split"] == "0-2,2-4,4-6"
    assert plan["parameters"]["total"] == count + WIDTH
    assert plan["parameters"]["core"] == 2 * layer
    assert sum(plan["parameters"].values()) == 2 * plan["parameters"]["total"]
    assert [row["num_recurrences"] for row in plan["depths"]] == DEPTHS
    for row in plan["depths"]:
        assert row["layer_flops_per_token"] == 2 * layer * (4 + 2 * row["num_recurrences"])
    flops = [row["forward_flops_per_token"] for row in plan["depths"]]
    core = flops[1] - flops[0]
    assert core > 0
    assert flops == [flops[0] + (depth - 1) * core for depth in DEPTHS]


def test_the_plan_stops_at_the_cap(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rondo("convert", llama, "--dry-run", "--json", "--max-recurrences", 8) == 0
    assert [row["num_recurrences"] for row in printed_json(capsys)["depths"]] == [1, 2, 4, 8]


def test_a_dry_run_does_not_mind_an_existing_output(
    llama: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(converted)
    assert rondo("convert", llama, converted, "--dry-run") == 0
    assert tree(converted) == before


# ---- sources


def test_sharding_of_the_source_does_not_matter(
    llama: Path, converted: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    parent_model("llama").save_pretrained(sharded, max_shard_size="50KB")
    byte_tokenizer().save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert rondo("convert", sharded, tmp_path / "out") == 0
    left, right = json_of(converted / "run.json"), json_of(tmp_path / "out" / "run.json")
    assert left["parent"]["hash"] == right["parent"]["hash"]
    ours, theirs = weights_of(tmp_path / "out"), weights_of(converted)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    index = json_of(tmp_path / "out" / "model.safetensors.index.json")
    assert index["weight_map"].keys() == ours.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(
        index["weight_map"].values()
    )
    assert rondo("verify", tmp_path / "out", "--parent", llama) == 0


@pytest.mark.parametrize("family", ["tied", "gemma3_text"])
def test_a_body_saved_on_its_own(parents: dict[str, Path], tmp_path: Path, family: str) -> None:
    body = tmp_path / "body"
    AutoModel.from_pretrained(parents[family]).save_pretrained(body)
    byte_tokenizer().save_pretrained(body)
    assert not any(name.startswith("model.") for name in weights_of(body))
    assert rondo("convert", body, tmp_path / "out") == 0
    assert torch.equal(logits(tmp_path / "out", num_recurrences=1), logits(parents[family]))


def test_a_body_without_a_head_to_tie_is_refused(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = tmp_path / "body"
    AutoModel.from_pretrained(llama).save_pretrained(body)
    byte_tokenizer().save_pretrained(body)
    assert rondo("convert", body, tmp_path / "out") == 2
    assert "lm_head.weight" in refusal(capsys)
    assert not (tmp_path / "out").exists()


def test_tied_embeddings(parents: dict[str, Path], tmp_path: Path) -> None:
    assert rondo("convert", parents["tied"], tmp_path / "tied") == 0
    assert "lm_head.weight" not in weights_of(tmp_path / "tied")
    plan = json_of(tmp_path / "tied" / "run.json")["plan"]
    assert plan["tied_embedding"] is True
    assert plan["parameters"]["head"] == 0

    assert rondo("convert", parents["tied"], tmp_path / "untied", "--untie") == 0
    weights = weights_of(tmp_path / "untied")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    plan = json_of(tmp_path / "untied" / "run.json")["plan"]
    assert plan["tied_embedding"] is False
    assert plan["parameters"]["head"] == VOCAB * WIDTH

    expected = logits(parents["tied"])
    assert torch.equal(logits(tmp_path / "tied", num_recurrences=1), expected)
    assert torch.equal(logits(tmp_path / "untied", num_recurrences=1), expected)


def test_a_tied_head_that_is_stored_all_the_same(parents: dict[str, Path], tmp_path: Path) -> None:
    parent = Path(shutil.copytree(parents["tied"], tmp_path / "parent"))
    edit_weights(
        parent,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    assert rondo("convert", parent, tmp_path / "out") == 0
    assert "lm_head.weight" not in weights_of(tmp_path / "out")
    tensors = json_of(tmp_path / "out" / "run.json")["tensors"]
    assert tensors["tied_or_computed"] == ["lm_head.weight"]


@pytest.mark.parametrize("injection", ["mix", "linear"])
def test_bfloat16_stays_bfloat16(tmp_path: Path, injection: str) -> None:
    parent = tmp_path / "parent"
    parent_model("llama").to(torch.bfloat16).save_pretrained(parent)
    byte_tokenizer().save_pretrained(parent)
    assert rondo("convert", parent, tmp_path / "out", "--injection", injection) == 0
    weights = weights_of(tmp_path / "out")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json_of(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    old = weights_of(parent)
    assert torch.equal(weights[CORE_WEIGHT], old[CORE_WEIGHT])
    depths = json_of(tmp_path / "out" / "run.json")["plan"]["depths"]
    assert depths[0]["kv_bytes_per_token"] == LAYERS * 2 * KV_HEADS * HEAD_DIM * 2


# ---- what is written


def test_what_a_checkpoint_holds(llama: Path, converted: Path) -> None:
    assert {path.name for path in converted.iterdir()} == FILES
    assert converted.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in converted.iterdir()} == {0o644}
    old, new = weights_of(llama), weights_of(converted)
    assert new.keys() == old.keys() | {"model.injection.mixing"}
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    text = "12 + 30 = 42 €, naïve"
    ids = AutoTokenizer.from_pretrained(converted)(text).input_ids
    assert ids == AutoTokenizer.from_pretrained(llama)(text).input_ids
    card = (converted / "README.md").read_text(encoding="utf-8")
    assert "[PPCCEE]" in card
    assert "r = 1 equals the parent" in card
    assert "FAILED" not in card


def test_what_run_json_records(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["convert", str(llama), str(tmp_path / "my out"), "--split", "drop", "--seed", "5"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/rondo", *words])
    assert rondo(*words) == 0
    facts = json_of(tmp_path / "my out" / "run.json")
    assert facts["kind"] == "convert"
    assert facts["command"] == f"rondo convert {llama} '{tmp_path}/my out' --split drop --seed 5"
    assert (facts["config"]["split"], facts["config"]["seed"]) == ("drop", 5)
    assert facts["config"]["num_recurrences"] is None
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert datetime.datetime.fromisoformat(facts["date"]).tzinfo is not None
    assert facts["hardware"].startswith(("cpu (", "cuda ("))
    parent = facts["parent"]
    assert (parent["path"], parent["num_layers"]) == (str(llama), LAYERS)
    assert re.fullmatch("[0-9a-f]{64}", parent["hash"])
    assert facts["plan"]["split"] == "0,3-5,5"
    assert facts["plan"]["dropped_layers"] == [1, 2]
    tensors = facts["tensors"]
    assert tensors["used"] + len(tensors["dropped"]) == len(weights_of(llama))
    assert tensors["new"] == ["model.injection.mixing"]
    assert len(facts["proof"]) >= 6
    assert all(check["passed"] and check["error"] <= check["allowed"] for check in facts["proof"])


def test_the_parents_path_is_recorded_absolute(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)
    assert rondo("convert", llama.name, tmp_path / "out") == 0
    monkeypatch.chdir(tmp_path)
    assert json_of(tmp_path / "out" / "run.json")["parent"]["path"] == str(llama)
    assert rondo("verify", "out") == 0


# ---- verify


def test_verify_repeats_the_proof(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(converted)
    assert rondo("verify", converted) == 0
    told = capsys.readouterr().out
    proof = json_of(converted / "run.json")["proof"]
    assert all(f"ok   {check['name']}" in told for check in proof)
    assert f"{len(proof)} checks passed" in told
    assert tree(converted) == before


def test_verify_as_json(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rondo("verify", converted, "--json") == 0
    checks = printed_json(capsys)
    assert [check["name"] for check in checks] == [
        check["name"] for check in json_of(converted / "run.json")["proof"]
    ]
    assert all(check["passed"] for check in checks)


def nudge(name: str, value: float = 1e-3) -> Callable[[dict[str, torch.Tensor]], None]:
    """Change one number of one tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] += value

    return change


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (nudge("model.layers.0.self_attn.q_proj.weight"), "r = 1 equals the parent"),
        (nudge(CORE_WEIGHT), "r = 1 equals the parent"),
        (nudge(CORE_WEIGHT, float("nan")), "r = 1 equals the parent"),
        (nudge("lm_head.weight"), "r = 1 equals the parent"),
        (nudge("model.injection.mixing"), "checkpoint"),
        (lambda tensors: tensors.pop(CORE_WEIGHT), "every tensor is used once"),
        (
            lambda tensors: tensors.update({"model.layers.9.stray": torch.ones(2)}),
            "every tensor is used once",
        ),
    ],
    ids=["prelude", "core", "nan", "head", "injection", "lost", "stray"],
)
def test_verify_notices_an_altered_checkpoint(
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, torch.Tensor]], None],
    check: str,
) -> None:
    altered = Path(shutil.copytree(converted, tmp_path / "altered"))
    edit_weights(altered, change)
    assert rondo("verify", altered) == 1
    assert check in capsys.readouterr().err


def test_a_failed_verification_speaks_of_the_checkpoint(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    altered = Path(shutil.copytree(converted, tmp_path / "altered"))
    edit_weights(altered, nudge(CORE_WEIGHT))
    before = tree(tmp_path)
    assert rondo("verify", altered) == 1
    message = refusal(capsys)
    assert "nothing was kept" not in message
    assert tree(tmp_path) == before


@pytest.mark.parametrize("layer", [0, 1])
def test_verify_notices_an_altered_parent(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layer: int
) -> None:
    parent = Path(shutil.copytree(llama, tmp_path / "parent"))
    assert rondo("convert", parent, tmp_path / "out", "--split", "0,2-4,4-6") == 0
    edit_weights(parent, nudge(f"model.layers.{layer}.mlp.up_proj.weight"))
    capsys.readouterr()
    assert rondo("verify", tmp_path / "out") == 1
    message = refusal(capsys)
    assert "the parent's weights are those converted" in message
    # Layer 1 was dropped: only the hash can tell.
    assert ("r = 1 equals the parent" in message) == (layer == 0)


def test_verify_finds_a_parent_that_moved(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = Path(shutil.copytree(llama, tmp_path / "parent"))
    assert rondo("convert", parent, tmp_path / "out") == 0
    moved = parent.rename(tmp_path / "moved")
    capsys.readouterr()
    assert rondo("verify", tmp_path / "out") == 2
    message = refusal(capsys)
    assert str(parent) in message
    assert "--parent" in message
    assert rondo("verify", tmp_path / "out", "--parent", moved) == 0


def test_verify_refuses_another_parent(
    parents: dict[str, Path], converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rondo("verify", converted, "--parent", parents["qwen3"]) == 1
    assert "the parent's weights are those converted" in refusal(capsys)


@pytest.mark.parametrize(
    "damage",
    [
        lambda weights: weights.write_bytes(weights.read_bytes()[:1000]),
        lambda weights: weights.unlink(),
        lambda weights: edit_weights(
            weights.parent, lambda tensors: tensors.update({CORE_WEIGHT: torch.ones(3, 3)})
        ),
        lambda weights: (weights.parent / "config.json").unlink(),
    ],
    ids=["truncated", "missing", "shape", "no-config"],
)
def test_verify_of_a_damaged_checkpoint(
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
) -> None:
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    damage(damaged / "model-00001-of-00001.safetensors")
    assert rondo("verify", damaged) == 2
    assert str(damaged) in refusal(capsys)


def test_verify_wants_an_output_of_convert(
    llama: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rondo("verify", llama) == 2
    assert "run.json" in refusal(capsys)
    trained = Path(shutil.copytree(converted, tmp_path / "trained"))
    (trained / "run.json").write_text('{"kind": "train"}')
    assert rondo("verify", trained) == 2
    assert "train" in refusal(capsys)
    (trained / "run.json").write_text("{")
    assert rondo("verify", trained) == 2
    assert "run.json" in refusal(capsys)


# ---- what goes wrong leaves nothing behind


def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {CORE_WEIGHT: tensors[CORE_WEIGHT] * 1.001}


def lose(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != CORE_WEIGHT}


def swap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    other = CORE_WEIGHT.replace("2", "3")
    return tensors | {CORE_WEIGHT: tensors[other], other: tensors[CORE_WEIGHT]}


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict], dict]], None]:
    """Return a function that has the next conversions write other tensors than planned."""
    write = convert.write_tensors

    def alter(change: Callable[[dict], dict]) -> None:
        monkeypatch.setattr(
            convert, "write_tensors", lambda tensors, path: write(change(tensors), path)
        )

    return alter


@pytest.mark.parametrize("change", [spoil, lose, swap])
def test_a_failed_proof_leaves_nothing(
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    writes: Callable,
    change: Callable,
) -> None:
    writes(change)
    assert rondo("convert", llama, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "r = 1 equals the parent" in message
    assert "Traceback" not in message
    assert tree(tmp_path) == {}


def test_overwrite_replaces_the_whole_directory(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert rondo("convert", llama, out) == 0
    (out / "stale.txt").write_text("of the old one")
    assert rondo("convert", llama, out, "--split", "drop") == 2
    assert (out / "stale.txt").exists()
    assert rondo("convert", llama, out, "--split", "drop", "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert json_of(out / "config.json")["source_layers"] == [0, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_may_be_filled(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert rondo("convert", llama, tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_parent_directories_are_made(llama: Path, tmp_path: Path) -> None:
    assert rondo("convert", llama, tmp_path / "a" / "b" / "out") == 0
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"out"}


def test_overwrite_keeps_the_old_when_the_new_fails(
    llama: Path, converted: Path, tmp_path: Path, writes: Callable
) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    before = tree(tmp_path)
    writes(spoil)
    assert rondo("convert", llama, out, "--overwrite") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["write_weights", "write_tensors", "copy_code", "record"])
def test_ctrl_c_leaves_nothing(
    llama: Path,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    overwrite: bool,
) -> None:
    if overwrite:
        shutil.copytree(converted, tmp_path / "out")
    before = tree(tmp_path)

    def stop(*_: object, **__: object) -> None:
        assert tree(tmp_path) != before, "nothing had been begun"
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, name, stop)
    words = ["--overwrite"] if overwrite else []
    assert rondo("convert", llama, tmp_path / "out", *words) == 130
    message = capsys.readouterr().err
    assert "stopped" in message
    assert "Traceback" not in message
    assert tree(tmp_path) == before


def test_the_old_stays_when_the_new_cannot_take_its_place(
    llama: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    before = tree(tmp_path)
    rename = Path.rename

    def stop_the_new_one(path: Path, target: Path) -> Path:
        if Path(target) == out and path.name != "old":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop_the_new_one)
    assert rondo("convert", llama, out, "--overwrite") == 130
    assert tree(tmp_path) == before
