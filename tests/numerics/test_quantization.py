"""Weights in int8: what is rounded and what is not, and what that does at every depth."""

import gc
import importlib
import json
import sys
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from conftest import PAD, VOCAB, byte_tokenizer, parent_of, recurrent
from rondo.config.quantize import QuantizeConfig
from rondo.errors import UserError
from rondo.evaluation import quantized
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.quantization import Footprint, quantize, weight_bytes

IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
# Plain; tied with norms on queries and keys; biases; fused matrices; a parent with a cap on logits.
families = pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "phi3", "gemma2"])


def in_int8(model: RecurrentForCausalLM) -> Footprint:
    """Quantize a model, where torchao is installed."""
    pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra int8)")
    return quantize(model, "int8")


def with_deltas() -> Any:
    """A tiny model with deltas large enough to tell."""
    plain = recurrent("qwen2")
    fields = plain.config.to_dict() | {"delta_rank": 3, "num_delta_iterations": 2}
    model = RecurrentForCausalLM(RecurrentConfig(**fields))
    model.load_state_dict(plain.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".delta_" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@torch.no_grad()
def take_rounded(plain: nn.Module, model: RecurrentForCausalLM, names: tuple[str, ...]) -> None:
    """Give a plain model the values that int8 stands for, each within half a step of its own."""
    for name in names:
        weight, rounded = plain.get_parameter(name), model.get_parameter(name)
        values = cast(Any, rounded).dequantize()
        half_a_step = weight.abs().amax(1, keepdim=True) / 127.5 / 2
        assert ((values - weight).abs() <= 1.001 * half_a_step).all(), name
        weight.copy_(values)


@torch.no_grad()
def logits(model: Any, depth: Any) -> torch.Tensor:
    return model(IDS, num_recurrences=depth).logits


def linear_weights(model: RecurrentForCausalLM) -> set[str]:
    """Names of the weights of all linear layers but the head, told by their names alone."""
    endings = ("proj.weight", "o_proj.weight")
    return {name for name, _ in model.named_parameters() if name.endswith(endings)}


@families
@pytest.mark.parametrize("injection", ["mix", "linear"])
def test_all_matrices_of_layers_are_rounded_and_nothing_else(family: str, injection: str) -> None:
    model = recurrent(family, injection=injection)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    names = in_int8(model).names
    assert set(names) == linear_weights(model)
    for name, parameter in model.named_parameters():
        if name in names:
            assert weight_bytes(model.get_submodule(name.removesuffix(".weight"))) < 0.6 * (
                before[name].nbytes
            )
        else:
            assert type(parameter.data) is torch.Tensor, name
            assert torch.equal(parameter, before[name]), name


@families
@pytest.mark.parametrize("depth", [1, 4, [3, 1, 2]])
def test_logits_are_those_of_the_rounded_weights(family: str, depth: Any) -> None:
    model, plain = recurrent(family), recurrent(family)
    exact = logits(plain, depth)
    take_rounded(plain, model, in_int8(model).names)
    ours = logits(model, depth)
    torch.testing.assert_close(ours, logits(plain, depth), rtol=1e-3, atol=1e-4)
    assert 0 < (ours - exact).norm() / exact.norm() < 0.15


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_of_a_core_with_deltas_what_iterations_share_is_rounded(depth: int) -> None:
    model, plain = with_deltas(), with_deltas()
    deltas = {n: p.clone() for n, p in model.named_parameters() if ".delta_" in n}
    names = in_int8(model).names
    assert "model.layers.2.mlp.up_proj.weight" in names
    for name, delta in deltas.items():
        assert torch.equal(model.get_parameter(name), delta), name
    take_rounded(plain, model, names)
    torch.testing.assert_close(logits(model, depth), logits(plain, depth), rtol=1e-3, atol=1e-4)


def test_a_tied_head_stays_tied_and_exact() -> None:
    model = recurrent("qwen3")
    head = model.lm_head.weight.clone()
    in_int8(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, head)


def test_bytes_are_counted_as_they_are_stored() -> None:
    model = recurrent("qwen3")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = in_int8(model)
    values = sum(shapes[name].numel() for name in found.names)
    rows = sum(shapes[name][0] for name in found.names)
    assert found.before == 4 * sum(shape.numel() for shape in shapes.values())
    # A scale per row, of four bytes, and one more where torchao keeps a zero beside it.
    assert found.after in [found.before - 3 * values + each * rows for each in (4, 5)]
    assert found.after == weight_bytes(model)
    assert found.share == found.after / found.before


@pytest.mark.parametrize("make", [lambda: recurrent("llama"), with_deltas])
def test_the_memory_of_the_old_weights_is_given_back(make: Any) -> None:
    model = make()
    old = [weakref.ref(model.model.layers[i].mlp.up_proj.weight) for i in (0, 2, 5)]
    in_int8(model)
    gc.collect()
    assert [one() for one in old] == [None] * 3


def test_experts_that_are_stacked_are_left() -> None:
    model = recurrent("mixtral")
    names = in_int8(model).names
    assert names
    assert not any(".mlp." in name for name in names)


def test_bfloat16_stays_the_type_of_the_rest() -> None:
    model = recurrent("llama").bfloat16()
    exact = logits(model, 3)
    in_int8(model)
    ours = logits(model, 3)
    assert ours.dtype == model.dtype == torch.bfloat16
    assert (ours - exact).norm() / exact.norm() < 0.15


@pytest.mark.parametrize("make", [lambda: recurrent("llama"), with_deltas])
def test_rows_of_any_depth_are_continued_as_alone(make: Any) -> None:
    model, depths = make(), [1, 3, 2]
    in_int8(model)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    mask = torch.ones_like(IDS)
    together = model.generate(IDS, attention_mask=mask, num_recurrences=depths, **how)
    for row, depth in enumerate(depths):
        one = slice(row, row + 1)
        alone = model.generate(IDS[one], attention_mask=mask[one], num_recurrences=depth, **how)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_a_model_is_quantized_once() -> None:
    model = recurrent("llama")
    in_int8(model)
    with pytest.raises(UserError, match="quantized already"):
        quantize(model, "int8")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_no_checkpoint_of_int8_weights_is_written(tmp_path: Path) -> None:
    model = recurrent("llama")
    in_int8(model)
    with pytest.raises(RuntimeError):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_without_torchao_the_way_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model = recurrent("llama")
    before = weight_bytes(model)
    with pytest.raises(UserError, match=r'torchao: pip install "rondo-lm\[int8\]"'):
        quantize(model, "int8")
    assert weight_bytes(model) == before


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny recurrent checkpoint, and beside it a text of twelve documents."""
    recurrent("llama", max_recurrences=8).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    texts = [{"text": f"{number} and {number} is {2 * number}. " * 3} for number in range(12)]
    lines = "".join(json.dumps(one) + "\n" for one in texts)
    (tmp_path / "text.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path / "model"


def settings(checkpoint: Path, **fields: Any) -> QuantizeConfig:
    plain = {"recurrences": (1, 3), "repeats": 0, "dtype": "float32", "device": "cpu"}
    where = {"model": str(checkpoint), "data": str(checkpoint.with_name("text.jsonl"))}
    return QuantizeConfig(**where | plain | fields)


@torch.no_grad()
def loss_by_hand(model: Any, file: Path, depth: int) -> float:
    """Nats per token over the documents of a file, one by one."""
    total, count, tokenizer = 0.0, 0, byte_tokenizer()
    for line in file.read_text(encoding="utf-8").splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        said = model(ids[:, :-1], num_recurrences=depth).logits[0].log_softmax(-1)
        total -= said.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return total / count


def test_the_loss_at_every_depth_is_told_before_and_after(checkpoint: Path) -> None:
    pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra int8)")
    results = quantized.measure(settings(checkpoint))
    model = RecurrentForCausalLM.from_pretrained(checkpoint).eval()
    data, rows = checkpoint.with_name("text.jsonl"), results["rows"]
    assert [row["num_recurrences"] for row in rows] == [1, 3]
    for key in ("before", "after"):
        for row in rows:
            by_hand = loss_by_hand(model, data, row["num_recurrences"])
            assert row["loss"][key] == pytest.approx(by_hand, abs=1e-5)
        if key == "before":
            size = quantize(model, "int8")
    for row in rows:
        loss = row["loss"]
        assert loss["difference"] == pytest.approx(loss["after"] - loss["before"])
        assert loss["low"] <= loss["difference"] <= loss["high"]
        assert row["decode_ms_per_token"] is None
    assert results["bytes"] == {"before": size.before, "after": size.after}


def test_the_verb_prints_a_table_or_json(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra int8)")
    fields = {"repeats": 1, "prompt_tokens": 4, "new_tokens": 3}
    quantized.run(settings(checkpoint, **fields))
    told = capsys.readouterr().out.splitlines()
    assert "42 matrices in int8" in told[0]
    assert [line.split()[0] for line in told[-3:]] == ["r", "1", "3"]
    quantized.run(settings(checkpoint, json_output=True, **fields))
    results = json.loads(capsys.readouterr().out)
    times = results["rows"][1]["decode_ms_per_token"]
    assert times["before"]["median"] > 0
    assert times["after"]["median"] > 0


def test_a_depth_beyond_the_cap_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="beyond the model's cap of 8"):
        quantized.measure(settings(checkpoint, recurrences=(2, 16)))


def test_a_model_without_a_loop_is_refused(checkpoint: Path) -> None:
    parent_of("llama").save_pretrained(checkpoint.with_name("parent"))
    byte_tokenizer().save_pretrained(checkpoint.with_name("parent"))
    with pytest.raises(UserError, match="not a recurrent model"):
        quantized.measure(settings(checkpoint, model=str(checkpoint.with_name("parent"))))


def test_a_shift_that_all_documents_share_has_a_narrow_interval() -> None:
    weights = list(range(10, 30))
    before = np.vstack([3.0 * np.array(weights), 2.0 * np.array(weights)])
    after = before + np.array([[0.0], [0.1]]) * np.array(weights)
    same, worse = quantized.compared(before, after, weights)
    assert same["difference"] == same["low"] == same["high"] == 0
    assert worse["before"] == pytest.approx(2.0)
    assert worse["after"] == pytest.approx(2.1)
    assert worse["low"] == pytest.approx(0.1)
    assert worse["high"] == pytest.approx(0.1)


def test_a_loss_that_is_no_number_is_told_as_none() -> None:
    before = np.full((1, 12), 1.0)
    row = quantized.compared(before, before * np.nan, [1] * 12)[0]
    assert row["before"] == 1.0
    assert {row[key] for key in ("after", "difference", "low", "high")} == {None}
    few = quantized.compared(before[:, :3], before[:, :3], [1] * 3)[0]
    assert few["difference"] == 0
    assert few["low"] is None
    json.dumps([row, few], allow_nan=False)


def test_settings_are_read_without_torchao() -> None:
    assert importlib.import_module("rondo.config.quantize").QuantizeConfig(model="x").repeats == 5
