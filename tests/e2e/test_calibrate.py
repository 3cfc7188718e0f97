"""`rondo calibrate` in this process: what it stores, what it leaves alone, what it counts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import json_of, rondo, save_parent, tree
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from rondo.config.calibrate import CalibrateConfig
from rondo.errors import UserError
from rondo.evaluation import calibrate
from rondo.evaluation.exit_runs import execute, follow
from rondo.generation import load_recurrent
from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.modeling.exits_recurrent import CRITERIA, ExitRule
from rondo.modeling.generation_recurrent import calibrated
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

DEPTH = 3
UNGATED = [criterion for criterion in CRITERIA if criterion != "gate"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of different length, so that batches are padded."""
    path = tmp_path_factory.mktemp("text") / "mine.jsonl"
    lines = [json.dumps({"text": f"{n} and {n * n} " * (1 + n % 4)}) for n in range(24)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint. Nobody may change it."""
    base = tmp_path_factory.mktemp("models")
    parent = save_parent(base / "parent")
    how = ("--num-recurrences", DEPTH, "--injection", "linear")
    assert rondo("convert", parent, base / "model", *how) == 0
    return base / "model"


@pytest.fixture
def model(converted: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed, weights linked."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in converted.iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file)
        else:
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def settings(model: Path, text: str, **fields: object) -> CalibrateConfig:
    known = {"model": str(model), "data": (text,), "tolerance": "5%", "dtype": "float32"}
    return CalibrateConfig(**known | {"batch_size": 4} | fields)


def test_thresholds_are_stored_and_nothing_else_changes(
    model: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(model)
    calibrate.run(settings(model, text))
    printed = capsys.readouterr().out
    after = tree(model)
    assert {name for name in after if after[name] != before.get(name)} == {
        "config.json",
        "calibration.json",
    }
    fields, old = json_of(model / "config.json"), json.loads(before["config.json"] or b"")
    rules = fields.pop("exit_rules")
    assert fields == {name: value for name, value in old.items() if name != "exit_rules"}
    assert sorted(rules) == sorted(UNGATED)
    for name, entry in rules.items():
        assert set(entry) == {"5%"}
        assert entry["5%"]["threshold"] > 0
        assert name in printed
    found = json_of(model / "calibration.json")["5%"]
    assert {"command", "versions", "hardware", "git"} <= found.keys()
    assert [row["criterion"] for row in found["rules"]] == UNGATED
    for row in found["rules"]:
        assert row["calibration"]["value"] <= 0.05
        assert sum(row["left_at"]) == pytest.approx(1)
        depths = np.arange(1, DEPTH + 1) @ np.array(row["left_at"])
        assert row["mean_recurrences"] == pytest.approx(depths)
    # The checkpoint is as it was to all who read it: the proof, the config, and generation.
    assert rondo("verify", model) == 0
    config = AutoConfig.from_pretrained(model)
    config.save_pretrained(model / "again")
    assert json_of(model / "again" / "config.json")["exit_rules"] == rules
    loaded = load_recurrent(str(model), "float32", "cpu")
    assert calibrated(loaded.config, "kl", "5%").threshold == rules["kl"]["5%"]["threshold"]
    assert loaded.generate(torch.tensor([[5, 6, 7]]), exit="kl", max_new_tokens=3).shape == (1, 6)


def test_a_larger_tolerance_gives_no_smaller_threshold_and_both_are_kept(
    model: Path, text: str
) -> None:
    for tolerance in ("1%", "40%"):
        calibrate.run(settings(model, text, tolerance=tolerance, criteria=("entropy", "margin")))
    rules = json_of(model / "config.json")["exit_rules"]
    for entries in rules.values():
        found = [entries.get(key, {"threshold": 0})["threshold"] for key in ("1%", "40%")]
        assert found == sorted(found)
    assert list(json_of(model / "calibration.json")) == ["1%", "40%"]


def test_held_out_numbers_are_those_of_documents_read_alone(model: Path, text: str) -> None:
    config = settings(model, text, criteria=("kl", "state_distance"), max_recurrences=4)
    results = calibrate.calibrate(config)
    setup, _, documents = calibrate.prepare(config)
    _, second = calibrate.halves(documents, config.seed)
    loaded = setup.subject.model
    for row in results["rules"]:
        rule = ExitRule(row["criterion"], row["threshold"])
        loss, full, left = 0.0, 0.0, []
        for ids in second:
            tokens, cache = torch.tensor([ids]), RecurrentCache(loaded.config, "ragged")
            with torch.no_grad():
                answer = loaded(tokens[:, :-1], exit=rule, num_recurrences=4, past_key_values=cache)
                deepest = loaded(tokens[:, :-1], num_recurrences=4, use_cache=False)
            loss += float(_loss(answer.logits[0], tokens[0, 1:]))
            full += float(_loss(deepest.logits[0], tokens[0, 1:]))
            left += cache.recurrences[0].tolist()
        assert row["held_out"]["value"] == pytest.approx(loss / full - 1, abs=1e-5)
        assert row["mean_recurrences"] == pytest.approx(np.mean(left), abs=0.02)


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("criterion", UNGATED)
@pytest.mark.parametrize("tokens", [2, 3])
def test_a_first_token_leaves_where_it_would_on_paper(
    model: Path, text: str, criterion: str, tokens: int
) -> None:
    # It reads no other token, so that no cache policy can tell.
    how = {"max_recurrences": 9, "min_recurrences": 2, "check_every": 2, "batch_size": 64}
    setup, *_ = calibrate.prepare(settings(model, text, **how))
    documents = [[first, *range(3, 2 + tokens)] for first in range(3, 250)]
    with torch.inference_mode():
        half = follow(setup, documents, (criterion,), "")
        values = half.values[criterion]
        assert np.isinf(values[[0, 2, 4, 6, 8]]).all()
        number = 3 if criterion in ("kl", "argmax_stable") else 1
        threshold = 0.5 if criterion == "argmax_stable" else float(np.median(values[number]))
        result = execute(half, setup.rule(criterion, threshold), "")
    below = np.vstack([values[:-1] < threshold, np.ones(values.shape[1], dtype=bool)])
    first = np.unique(half.documents_N, return_index=True)[1]
    paper, left = below.argmax(0)[first] + 1, result.left_N[first]
    assert len(set(paper)) > 1
    # Rounding may decide for a token or two.
    assert (paper != left).sum() <= 2


@pytest.mark.parametrize("policy", ["ragged", "recompute"])
@pytest.mark.parametrize("criterion", ["entropy", "state_distance"])
def test_flops_of_reading_are_those_torch_counts(
    model: Path, text: str, policy: str, criterion: str
) -> None:
    config = settings(model, text, cache_policy=policy, criteria=(criterion,), batch_size=1)
    setup, _, documents = calibrate.prepare(config)
    with torch.inference_mode():
        half = follow(setup, documents[3:4], (criterion,), "")
        rule = setup.rule(criterion, float(np.median(half.values[criterion][0])))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = execute(half, rule, "")
    assert len(set(result.left_N)) > 1
    spent = half.spent(rule, result.left_N)
    assert counter.get_total_flops() == pytest.approx(spent["reading"].sum())
    saved = (result.left_N < DEPTH).sum() * setup.subject.costs.finish_flops(half.length)
    decoding = spent["reading"].sum() - (saved if rule.reads_logits else 0)
    assert spent["decoding"].sum() == pytest.approx(decoding)


def test_a_rule_that_cannot_hold_gets_none_and_loses_the_one_it_had(
    model: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = json_of(model / "config.json")
    fields["exit_rules"] = {"kl": {"5%": {"threshold": 1}}, "margin": {"5%": {"threshold": 2}}}
    (model / "config.json").write_text(json.dumps(fields))
    # With two iterations there is one check, and no divergence from the one before.
    calibrate.run(settings(model, text, criteria=("kl",), max_recurrences=2, overwrite=True))
    assert "kl: no threshold above 0 keeps within 5%; none is stored." in capsys.readouterr().out
    assert json_of(model / "config.json")["exit_rules"] == {"margin": {"5%": {"threshold": 2}}}


def test_agreement_is_stored_apart_from_loss(
    model: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"measure": "agreement", "tolerance": "20%", "criteria": ("state_distance",)}
    calibrate.run(settings(model, text, **how))
    assert "points" in capsys.readouterr().out
    found = json_of(model / "config.json")["exit_rules"]["state_distance"]
    assert list(found) == ["20% agreement"]
    entry, table = found["20% agreement"], json_of(model / "calibration.json")["20% agreement"]
    assert entry["disagreement"][0] == table["rules"][0]["held_out"]["value"]
    assert 0 <= table["rules"][0]["calibration"]["value"] <= 0.2
    # The full depth agrees with itself.
    assert table["fixed"][-1]["held_out"]["value"] == 0


def test_what_is_there_is_replaced_only_when_asked_to(
    model: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(model, text, criteria=("margin",), json_output=True)
    calibrate.run(config)
    assert json.loads(capsys.readouterr().out)["rules"][0]["criterion"] == "margin"
    with pytest.raises(UserError, match="margin for 5% already: add --overwrite"):
        calibrate.run(config)
    calibrate.run(settings(model, text, criteria=("margin",), overwrite=True))


def test_stopping_leaves_the_checkpoint_as_it_was(
    model: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(model)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RecurrentForCausalLM, "logits", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate.run(settings(model, text))
    assert tree(model) == before


def test_what_cannot_be_calibrated_is_refused(model: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no exit gate"):
        calibrate.run(settings(model, text, criteria=("gate",)))
    with pytest.raises(UserError, match="must lie above --min-recurrences 3"):
        calibrate.run(settings(model, text, min_recurrences=3))
    with pytest.raises(UserError, match="model's cap of 64"):
        calibrate.run(settings(model, text, max_recurrences=65))
    with pytest.raises(UserError, match="none here"):
        calibrate.run(settings(tmp_path / "nowhere", text))
    short = tmp_path / "short.txt"
    short.write_text("one\n\ntwo\n\nthree\n")
    with pytest.raises(UserError, match="3 documents, too few for two halves"):
        calibrate.run(settings(model, str(short)))
