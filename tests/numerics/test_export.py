"""An export against the recurrent model at its depth, on tiny models of many families."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import rondo.export
from conftest import VOCAB, WIDTH, byte_tokenizer, parent_of, recurrent
from rondo.config.export import ExportConfig
from rondo.convert.convert import convert_model
from rondo.errors import ProofError, UserError
from rondo.export import proof, run
from rondo.export.unroll import (
    irregular_fields,
    iterations_needed,
    layers_run,
    passage,
    plain_config,
)
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

RANK, SETS, SIZES = 3, 2, (1, 3, 2)
# Longer than the window of the sliding layers.
IDS = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :6] = 0
REQUIRED = ["llama", "olmo2", "gemma3_text", "qwen3"]
OTHERS = ["olmo3", "gemma2", "phi3", "granite", "smollm3", "cohere2"]
EYE = torch.eye(WIDTH)

disable_progress_bar()


def set_injection(model: Any, value: Tensor | float) -> Any:
    """Put a mixing, or a linear weight, into a model."""
    injection = model.model.injection
    with torch.no_grad():
        (injection.mixing if injection.kind == "mix" else injection.weight).copy_(
            torch.as_tensor(value)
        )
    return model


def passing_on(family: str, **fields: Any) -> Any:
    """The tiny model of a family, whose injection passes the state on alone."""
    return set_injection(recurrent(family, **fields), 1.0)


def with_deltas(family: str) -> Any:
    """The same with deltas large enough to tell."""
    plain = passing_on(family, sizes=SIZES)
    settings = plain.config.to_dict() | {"delta_rank": RANK, "num_delta_iterations": SETS}
    model = RecurrentForCausalLM(RecurrentConfig(**settings))
    model.load_state_dict(plain.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".delta_" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a model, exports it, and returns where to."""

    def save(model: Any, depth: int, **settings: Any) -> Path:
        model.save_pretrained(tmp_path / "recurrent")
        byte_tokenizer().save_pretrained(tmp_path / "recurrent")
        source, target = str(tmp_path / "recurrent"), tmp_path / "plain"
        run(ExportConfig(model=source, output_dir=str(target), unrolled=depth, **settings))
        return target

    return save


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    """Logits of all tokens that are no padding."""
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    return model(IDS, attention_mask=MASK, position_ids=positions, **options).logits[MASK == 1]


def plain_of(directory: Path) -> Any:
    """The export, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


# ---- parity


@pytest.mark.parametrize(
    ("family", "depth"),
    [*((family, depth) for family in REQUIRED for depth in (1, 2, 3)), *((o, 2) for o in OTHERS)],
)
def test_an_export_equals_the_recurrent_model_at_its_depth(
    family: str, depth: int, export: Callable[..., Path]
) -> None:
    model = passing_on(family)
    directory = export(model, depth)
    plain = plain_of(directory)
    assert type(plain) is type(parent_of(family))
    assert plain.config.num_hidden_layers == len(plain.model.layers) == 4 + 2 * depth
    assert "auto_map" not in (directory / "config.json").read_text()
    assert not list(directory.glob("*.py"))
    torch.testing.assert_close(
        logits(plain), logits(model, num_recurrences=depth), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", REQUIRED)
def test_a_trained_mixing_permits_r_1_to_the_last_bit(
    family: str, export: Callable[..., Path]
) -> None:
    model = recurrent(family)
    plain = plain_of(export(model, 1))
    assert torch.equal(logits(plain), logits(model, num_recurrences=1))


def test_the_layers_of_the_core_are_stored_once_for_each_iteration(
    export: Callable[..., Path],
) -> None:
    model = passing_on("llama", sizes=(1, 2, 3))
    ours, written = model.state_dict(), tensors_of(export(model, 3))
    order = [0, 1, 2, 1, 2, 1, 2, 3, 4, 5]
    for place, position in enumerate(order):
        for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            stored = ours[f"model.layers.{position}.{name}"]
            assert torch.equal(written[f"model.layers.{place}.{name}"], stored)
    assert len({name.split(".")[2] for name in written if ".layers." in name}) == len(order)


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("depth", [2, 5])
def test_deltas_are_folded_in_and_begin_again(
    family: str, depth: int, export: Callable[..., Path]
) -> None:
    model = with_deltas(family)
    directory = export(model, depth)
    assert not any(".delta_" in name for name in tensors_of(directory))
    torch.testing.assert_close(
        logits(plain_of(directory)), logits(model, num_recurrences=depth), rtol=1e-3, atol=1e-3
    )


def test_deltas_folded_into_few_bits_are_rounded_and_proved_apart(
    export: Callable[..., Path],
) -> None:
    directory = export(with_deltas("llama").to(torch.bfloat16), 2)
    assert {tensor.dtype for tensor in tensors_of(directory).values()} == {torch.bfloat16}
    facts = json.loads((directory / "run.json").read_text())
    assert [check["passed"] for check in facts["proof"]] == [True] * 3
    assert "rounding only" in facts["proof"][0]["name"]
    assert AutoConfig.from_pretrained(directory).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "value", "depth", "layers"),
    [
        ({"injection": "linear"}, torch.cat([EYE, 0 * EYE], 1), 3, 10),
        ({"injection": "linear"}, torch.cat([0.25 * EYE, 0.75 * EYE], 1), 1, 6),
        ({"injection": "linear", "state_init": "zeros"}, torch.cat([EYE + 1, EYE], 1), 1, 6),
        ({"injection": "linear", "state_init": "normal"}, torch.cat([0 * EYE, EYE], 1), 3, 6),
        ({"state_init": "normal"}, 0.0, 3, 6),
        ({"injection": "add", "state_init": "zeros"}, None, 1, 6),
    ],
)
def test_other_injections_that_a_plain_stack_can_stand_for(
    fields: dict[str, str],
    value: Any,
    depth: int,
    layers: int,
    export: Callable[..., Path],
) -> None:
    model = recurrent("llama", **fields)
    if value is not None:
        set_injection(model, value)
    plain = plain_of(export(model, depth))
    assert len(plain.model.layers) == layers
    torch.testing.assert_close(
        logits(plain), logits(model, num_recurrences=depth), rtol=1e-4, atol=1e-4
    )


def test_an_injection_without_state_leaves_the_deltas_of_the_last_iteration(
    export: Callable[..., Path],
) -> None:
    model = set_injection(with_deltas("llama"), 0.0)
    plain = plain_of(export(model, 2))
    assert len(plain.model.layers) == 6
    ours = logits(model, num_recurrences=2)
    torch.testing.assert_close(logits(plain), ours, rtol=1e-3, atol=1e-3)
    assert (ours - logits(model, num_recurrences=1)).abs().max() > 0.1


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "value", "depth", "said"),
    [
        ({}, 0.25, 2, r"cannot be unrolled to R = 2: its mix .* R = 1 can be written"),
        ({}, torch.ones(WIDTH).index_fill(0, torch.tensor(3), 0.999), 3, r"0\.999 \.\. 1"),
        ({"injection": "linear"}, torch.cat([EYE, 1e-3 * EYE], 1), 1, "no depth of it can be"),
        ({"injection": "linear"}, torch.cat([0.5 * EYE, 0.5 * EYE], 1), 2, r"\[I \| 0\]"),
        ({"injection": "add", "state_init": "zeros"}, None, 2, "adds it each time"),
        ({"injection": "add"}, None, 1, "state_init input"),
        ({"state_init": "zeros"}, 1.0, 3, "state_init zeros"),
        ({"state_init": "normal"}, 1.0, 1, "state_init normal"),
        ({"max_recurrences": 4}, 1.0, 5, "cap of 4"),
    ],
)
def test_what_no_plain_stack_does_is_refused_and_nothing_written(
    fields: dict[str, Any],
    value: Any,
    depth: int,
    said: str,
    export: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = recurrent("llama", **fields)
    if value is not None:
        set_injection(model, value)
    with pytest.raises(UserError, match=said) as refused:
        export(model, depth)
    assert depth > 4 or "rondo generate" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["recurrent"]


def test_a_damaged_checkpoint_is_refused(export: Callable[..., Path], tmp_path: Path) -> None:
    export(recurrent("llama"), 1)
    for weights in (tmp_path / "recurrent").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    settings = {"model": str(tmp_path / "recurrent"), "output_dir": str(tmp_path / "other")}
    with pytest.raises(UserError, match="cannot be read"):
        run(ExportConfig(**settings, unrolled=1))
    assert not (tmp_path / "other").exists()


def test_the_depths_that_an_injection_permits() -> None:
    def permitted(kind: str, start: str, **tensors: Tensor) -> list[tuple[int, ...] | None]:
        found = passage(kind, start, tensors)
        return [iterations_needed(found, depth) for depth in (1, 2, 3)]

    all_of_them, first, last, none = (
        [(1,), (1, 2), (1, 2, 3)],
        [(1,), None, None],
        [(1,), (2,), (3,)],
        [None] * 3,
    )
    ones, tenths = torch.ones(4), torch.full((4,), 0.1)
    assert permitted("mix", "input", mixing=ones) == all_of_them
    assert permitted("mix", "input", mixing=tenths) == first
    assert permitted("mix", "input", mixing=torch.tensor([1.0, 0.0])) == first
    assert permitted("mix", "normal", mixing=0 * ones) == last
    assert permitted("mix", "zeros", mixing=ones) == none
    assert permitted("add", "zeros") == first
    assert permitted("add", "input") == none
    eye = torch.eye(4)
    assert permitted("linear", "input", weight=torch.cat([eye, 0 * eye], 1)) == all_of_them
    assert permitted("linear", "zeros", weight=torch.cat([eye, 0 * eye], 1)) == none
    assert permitted("linear", "zeros", weight=torch.cat([eye, eye], 1)) == first
    assert permitted("linear", "normal", weight=torch.cat([eye, eye], 1)) == none
    assert permitted("linear", "input", weight=torch.cat([0.2 * eye, 0.8 * eye], 1)) == first
    assert permitted("linear", "input", weight=torch.full((4, 8), torch.nan)) == none


# ---- the directory


@pytest.mark.parametrize("family", ["gemma3_text", "smollm3", "qwen3"])
def test_per_layer_settings_follow_their_layers(family: str) -> None:
    config = recurrent(family).config
    plain = plain_config(config, [position for position, _ in layers_run(config, (1, 2))])
    order = [0, 1, 2, 3, 2, 3, 4, 5]
    base = parent_of(family).config
    for name in ("layer_types", "no_rope_layers"):
        if hasattr(base, name):
            assert getattr(plain, name) == [getattr(base, name)[position] for position in order]
    assert bool(irregular_fields(plain)) == (family != "qwen3")


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_tied_embeddings_stay_tied(family: str, export: Callable[..., Path]) -> None:
    tied = family == "qwen3"
    directory = export(recurrent(family), 1)
    plain = plain_of(directory)
    assert ("lm_head.weight" in tensors_of(directory)) == (not tied)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


def test_weights_are_parted_into_files_of_the_size_asked_for(
    export: Callable[..., Path],
) -> None:
    model = passing_on("llama")
    directory = export(model, 2, max_shard_gb=4e-5)
    files = sorted(directory.glob("*.safetensors"))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert all(file.stat().st_size < 50_000 for file in files)
    assert index["weight_map"].keys() == tensors_of(directory).keys()
    assert {*index["weight_map"].values()} == {file.name for file in files}
    assert torch.equal(
        logits(plain_of(directory)), logits(plain_of(export(model, 2, overwrite=True)))
    )
    assert [file.name for file in directory.glob("model*")] == ["model.safetensors"]


def test_the_size_is_told_beside_that_of_the_recurrent_model(
    export: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = passing_on("llama")
    directory = export(model, 3)
    sizes = json.loads((directory / "run.json").read_text())["sizes"]
    plain = plain_of(directory)
    count = sum(parameter.numel() for parameter in plain.parameters())
    core = sum(parameter.numel() for layer in model.model.core for parameter in layer.parameters())
    assert sizes["parameters"] == count == sizes["recurrent_parameters"] - WIDTH + 2 * core
    assert (sizes["layers"], sizes["recurrent_layers"]) == (10, 6)
    assert sizes["bytes"] == 4 * count
    assert f"parameters: {count:,}" in capsys.readouterr().out


# ---- the proof


def test_an_unfaithful_export_is_not_kept(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = rondo.export.write_plain

    def damage(plan: Any, directory: Path, limit: float) -> None:
        write(plan, directory, limit)
        file = directory / "model.safetensors"
        at = file.stat().st_size - 3
        content = bytearray(file.read_bytes())
        content[at] ^= 0x40
        file.write_bytes(content)

    monkeypatch.setattr(rondo.export, "write_plain", damage)
    with pytest.raises(ProofError, match=r"LlamaForCausalLM equals .* nothing was kept"):
        export(recurrent("llama"), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["recurrent"]


def test_models_too_large_for_memory_are_compared_from_their_files(
    export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "fits_in_memory", lambda plan: False)
    directory = export(passing_on("gemma3_text"), 2)
    facts = json.loads((directory / "run.json").read_text())
    assert all(check["passed"] for check in facts["proof"])


def test_an_export_can_be_made_recurrent_again(export: Callable[..., Path], tmp_path: Path) -> None:
    model = passing_on("gemma3_text")
    plain = export(model, 3)
    again = convert_model(str(plain), str(tmp_path / "again"), split="keep")
    loaded = RecurrentForCausalLM.from_pretrained(again, dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, num_recurrences=1), logits(plain_of(plain)))
    torch.testing.assert_close(
        logits(loaded, num_recurrences=1), logits(model, num_recurrences=3), rtol=1e-4, atol=1e-4
    )
