"""`rondo generate` and `rondo chat` as a user runs them, and what they say it cost."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, json_of, refusal, rondo, save_parent
from torch.utils.flop_counter import FlopCounterMode

from rondo import generation, terminal
from rondo.config import GenerateConfig
from rondo.decoding import Decoding, decoding_of, drafting_flops, executed_flops, flops_by_token
from rondo.flops import costs_of
from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.modeling.exits_recurrent import ExitRule

PROMPT = ("--prompt", "a line", "--max-new-tokens", 9, "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint with two calibrated exits, one of them to two tolerances."""
    directory = tmp_path_factory.mktemp("generate")
    save_parent(directory / "parent")
    out = directory / "model"
    words = ("--sizes", "2,2,2", "--mixing", "0.3", "--num-recurrences", 4)
    assert rondo("convert", directory / "parent", out, *words) == 0
    rule = {"threshold": 0.2, "min_recurrences": 2, "check_every": 1, "max_recurrences": 6}
    rules = {
        "kl": {"0.5%": rule, "1%": rule | {"threshold": 1e9}},
        "state_distance": {"2% agreement": rule | {"cache_policy": "recompute"}},
    }
    facts = json_of(out / "config.json") | {"exit_rules": rules}
    (out / "config.json").write_text(json.dumps(facts))
    return out


def rows(capsys: pytest.CaptureFixture[str], model: Path, *words: object) -> list[dict[str, Any]]:
    """What `rondo generate --json` answers."""
    capsys.readouterr()
    assert rondo("generate", model, *PROMPT, *words, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def decoding(model: Path, **fields: Any) -> Decoding:
    """The settings of a call, resolved."""
    config = GenerateConfig(model=str(model), **fields)
    return decoding_of(config, generation.shape_of(str(model)), config.recurrences)


# ---- answers


def test_depths_in_one_batch_are_those_of_single_calls(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    together = rows(capsys, model, "--recurrences", 1, 3, 6)
    assert [one["num_recurrences"] for one in together] == [1, 3, 6]
    for one in together:
        (alone,) = rows(capsys, model, "--recurrences", one["num_recurrences"])
        for name in ("text", "tokens", "recurrences"):
            assert alone[name] == one[name]
        assert alone["executed_flops"] == pytest.approx(one["executed_flops"])
        assert set(one["recurrences"]) == {one["num_recurrences"]}
        assert one["full_depth_share"] == 1


def test_an_exit_that_nobody_takes_is_the_full_depth(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (plain,) = rows(capsys, model, "--recurrences", 5)
    exits = ("--exit", "state_distance", "--max-recurrences", 5)
    (none,) = rows(capsys, model, *exits, "--threshold", 0)
    (most,) = rows(capsys, model, *exits, "--threshold", 1e9, "--min-recurrences", 2)
    assert none["text"] == plain["text"]
    assert set(none["recurrences"]) == {5}
    assert none["executed_flops"] == plain["executed_flops"]
    assert set(most["recurrences"]) == {2}
    assert most["executed_flops"] < plain["executed_flops"]
    assert most["full_depth_share"] < 1


@pytest.mark.parametrize("draft", [(2, "--draft-tokens", 3), ("auto",)])
def test_drafts_change_no_answer_and_are_reported(
    model: Path, capsys: pytest.CaptureFixture[str], draft: tuple[object, ...]
) -> None:
    (plain,) = rows(capsys, model, "--recurrences", 6)
    (drafted,) = rows(capsys, model, "--recurrences", 6, "--draft", *draft)
    assert plain["drafts"] is None
    assert drafted["text"] == plain["text"]
    drafts = drafted["drafts"]
    assert 0 < drafts["acceptance"] <= 1
    assert drafts["depth"] in ((2,) if draft[0] == 2 else (1, 2, 4))
    assert 1 <= drafts["tokens_per_round"] <= drafts["mean_tokens"]
    if draft[0] == 2:
        assert drafts["mean_tokens"] <= 3
    assert drafted["executed_flops"] > plain["executed_flops"]


def test_a_seed_says_what_is_sampled(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(seed: int) -> str:
        return rows(capsys, model, "--temperature", 1, "--seed", seed)[0]["text"]

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize("policy", ["full", "ragged", "recompute", "last", "full-int8"])
def test_every_cache_policy_answers(
    model: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    (plain,) = rows(capsys, model)
    (one,) = rows(capsys, model, "--cache", policy)
    assert one["recurrences"] == plain["recurrences"]
    if policy in ("full", "ragged", "recompute"):
        assert one["text"] == plain["text"]
    (exiting,) = rows(capsys, model, "--cache", policy, "--exit", "entropy", "--threshold", 5)
    assert min(exiting["recurrences"]) >= 1


def test_contrast_warm_start_and_int8_are_passed_on(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (plain,) = rows(capsys, model)
    (weak,) = rows(capsys, model, "--contrast", 1, "--contrast-strength", 0)
    assert weak["text"] == plain["text"]
    (strong,) = rows(capsys, model, "--contrast", 1, "--contrast-strength", 50)
    assert strong["text"] != plain["text"]
    (warm,) = rows(capsys, model, "--warm-start")
    assert warm["tokens"] > 0
    pytest.importorskip("torchao")
    (rounded,) = rows(capsys, model, "--weights", "int8")
    assert rounded["executed_flops"] == pytest.approx(plain["executed_flops"], rel=0.3)


# ---- exits of the checkpoint


def test_a_calibrated_exit_brings_its_threshold_its_cap_and_its_policy(model: Path) -> None:
    found = decoding(model, exit="kl", tolerance="0.005")
    assert found.exit == ExitRule("kl", 0.2, min_recurrences=2)
    assert (found.depths, found.policy) == ((6,), "ragged")
    other = decoding(model, exit="state_distance", min_recurrences=3)
    assert other.exit == ExitRule("state_distance", 0.2, min_recurrences=3)
    assert other.policy == "recompute"
    own = decoding(model, exit="kl", threshold=0.1, recurrences=(3, 5))
    assert own.exit == ExitRule("kl", 0.1)
    assert (own.depths, own.policy) == ((3, 5), "ragged")
    assert decoding(model, exit="state_distance", tolerance="2% agreement").cap == 6


def test_a_plain_depth_needs_no_cache_of_ours(model: Path) -> None:
    assert decoding(model).policy is None
    assert decoding(model, recurrences=(1, 2)).policy == "full"
    assert decoding(model, draft=2).policy == "full"


# ---- refusals


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--exit", "kl", "--threshold", 1, "--contrast", 1), "--exit and --contrast"),
        (("--exit", "kl", "--threshold", 1, "--draft", 1), "--draft and --exit"),
        (("--draft", 1, "--contrast", 1), "--draft and --contrast"),
        (("--draft", 1, "--warm-start"), "--draft and --warm-start"),
        (("--tolerance", "1%"), "without --exit"),
        (("--exit", "kl", "--tolerance", "1%", "--threshold", 1), "leave it or --threshold"),
        (("--exit", "kl", "--tolerance", "3%"), "calibrated to 0.5%, 1%, not to --tolerance 3%"),
        (("--exit", "kl", "--tolerance", "much"), "much"),
        (("--exit", "kl"), "choose one with --tolerance"),
        (("--exit", "margin"), "rondo calibrate"),
        (("--exit", "gate", "--threshold", 1), "no exit gate"),
        (("--exit", "kl", "--threshold", 1, "--min-recurrences", 5), "beyond the depth of 4"),
        (("--exit", "kl", "--threshold", 1, "--max-recurrences", 65), "cap of 64"),
        (("--recurrences", 65), "cap of 64"),
        (("--draft", 4), "needs a depth beyond it"),
        (("--contrast", 3, "--recurrences", 3), "needs a depth beyond it"),
        (("--draft", "auto", "--recurrences", 1), "needs a depth beyond it"),
        (("--draft", 1, "--recurrences", 2, 3), "a single number"),
        (("--cache", "full-int8", "--recurrences", 2, 3), "a single number"),
        (("--draft", 1, "--cache", "last"), "--cache full or ragged"),
        (("--draft-tokens", 2), "without --draft"),
        (("--contrast-strength", 2), "without --contrast"),
        (("--max-new-tokens", 128), "--max-new-tokens 122 fits"),
        (("--prompt", "a" * 128), "shorten it"),
        (("--prompt", ""), "empty"),
        (("--chat",), "no chat template"),
    ],
)
def test_what_does_not_go_is_refused_in_one_sentence_before_the_weights_are_read(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    told: str,
) -> None:
    monkeypatch.delattr(generation, "load_recurrent")
    assert rondo("generate", model, "--prompt", "a line", *words) == 2
    assert told in refusal(capsys)


def test_what_cannot_fit_is_refused_before_the_weights_are_read(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(generation, "load_recurrent")
    monkeypatch.setattr(generation, "free_memory", lambda device: 600_000)
    words = ("--prompt", "a line", "--max-new-tokens", 100, "--dtype", "float32")
    assert rondo("generate", model, *words, "--recurrences", 60) == 2
    text = refusal(capsys)
    assert "--recurrences" in text
    assert "--max-new-tokens" in text
    for verb in ("generate", "chat"):
        monkeypatch.setattr(generation, "free_memory", lambda device: 1000)
        assert rondo(verb, model) == 2
        assert "no depth or length would fit" in refusal(capsys)


def test_a_damaged_config_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "model")
    facts = json_of(tmp_path / "model" / "config.json") | {"num_core_layers": 9}
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts))
    assert rondo("generate", tmp_path / "model") == 2
    assert "config.json" in refusal(capsys)
    assert rondo("chat", model.parent / "parent") == 2
    assert "convert it first" in refusal(capsys)


# ---- what is shown


def test_depths_are_listed_where_there_is_no_colour(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (told,) = rows(capsys, model)
    assert rondo("generate", model, *PROMPT, "--show-depth") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.startswith("a line" + told["text"])
    assert f"iterations: 4 x{len(told['recurrences'])}" in out
    assert "mean 4.0 of 4 iterations" in out
    assert "100% of full depth" in out


@pytest.mark.parametrize("depths", [(5,), (2, 5)])
def test_tokens_are_coloured_by_what_each_took(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    depths: tuple[int, ...],
) -> None:
    exits = ("--exit", "kl", "--threshold", 0.02, "--recurrences", *depths)
    found = rows(capsys, model, *exits)
    assert len({depth for one in found for depth in one["recurrences"]}) > 1
    asked = generation.ask(
        GenerateConfig(
            model=str(model),
            prompt="a line",
            max_new_tokens=9,
            dtype="float32",
            exit="kl",
            threshold=0.02,
            recurrences=depths,
        )
    )
    decoded = asked.decode(asked.cache())
    monkeypatch.setattr(generation, "has_colour", lambda *_: True)
    assert rondo("generate", model, *PROMPT, *exits, "--show-depth") == 0
    out = capsys.readouterr().out
    assert out.startswith(terminal.legend(5))
    for row in decoded:
        tokens = row.text(asked.session.ends)
        took = row.recurrences[: len(tokens)]
        assert terminal.painted(asked.session.tokenizer, tokens, took, 5) in out


def test_a_chat_answers_what_is_piped_into_it(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "a line\n/depth 2\nanother\n/exit state_distance\nmore\n/depth 99\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert rondo("chat", model, "--max-new-tokens", 5, "--dtype", "float32") == 0
    out = capsys.readouterr().out
    assert "mean 4.0 of 4 iterations" in out
    assert "mean 2.0 of 2 iterations" in out
    assert "exit state_distance below 0.2" in out
    assert "cap of 64" in out


# ---- what it cost


def counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def generated(model: Path, prompt: int, new: int, **options: Any) -> tuple[Any, int, Any]:
    """A model's output, the FLOPs that torch counts for it, and its costs."""
    loaded = generation.load_recurrent(str(model), "float32", "cpu")
    loaded.set_attn_implementation("eager")
    ids = torch.arange(3, 3 + prompt)[None] % VOCAB
    found: list[Any] = []
    flops = counted(
        lambda: found.append(
            loaded.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                return_dict_in_generate=True,
                pad_token_id=2,
                **options,
            )
        )
    )
    return found[0], flops, costs_of(loaded)


RULES = (
    None,
    ExitRule("state_distance", 0.35),
    ExitRule("entropy", 5.04),
    ExitRule("kl", 0.01),
)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("policy", ["ragged", "full"])
@pytest.mark.parametrize(("prompt", "new"), [(30, 1), (5, 12)])
def test_executed_flops_are_those_torch_counts(
    model: Path, rule: ExitRule | None, policy: str, prompt: int, new: int
) -> None:
    options = {"exit": rule, "cache_policy": policy, "num_recurrences": 5}
    output, flops, costs = generated(model, prompt, new, **options)
    cache: RecurrentCache = output.past_key_values
    told = executed_flops(costs, cache, prompt)
    assert told.shape == (1, prompt + new - 1)
    # The rotary embedding is a product of matrices in some versions, and is not counted.
    assert float(told.sum()) == pytest.approx(flops, rel=1e-2)
    if rule is not None and policy == "ragged":
        assert len(set(cache.executed[0].tolist())) > 1


def test_a_second_call_counts_what_it_read_itself(model: Path) -> None:
    loaded = generation.load_recurrent(str(model), "float32", "cpu")
    loaded.set_attn_implementation("eager")
    ids = torch.arange(3, 33)[None]
    cache = RecurrentCache(loaded.config, "ragged")
    options = {"past_key_values": cache, "num_recurrences": 3, "pad_token_id": 2}
    options |= {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    loaded.generate(ids[:, :10], **options)
    start = cache.length
    cache.forget(start - 10)
    flops = counted(lambda: loaded.generate(ids, **options))
    told = executed_flops(costs_of(loaded), cache, 30, start=10)
    assert told.shape == (1, 25)
    assert float(told.sum()) == pytest.approx(flops, rel=2e-3)


@pytest.mark.parametrize("draft", [1, 2, "auto"])
def test_drafts_cost_what_torch_counts(model: Path, draft: Any) -> None:
    prompt, new, depth = 20, 18, 6
    options = {"draft_recurrences": draft, "draft_tokens": 3, "num_recurrences": depth}
    output, flops, costs = generated(model, prompt, new, **options)
    plain = flops_by_token(costs, torch.full((1, prompt + new - 1), depth), 0, prompt)
    extra = drafting_flops(costs, output.drafting, depth, prompt, new - 1)
    assert extra > 0
    assert float(plain.sum()) + extra == pytest.approx(flops, rel=0.02)
