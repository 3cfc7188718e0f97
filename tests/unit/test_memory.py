"""The forecast of memory: what a request takes, what of it would fit, what is free."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import recurrent
from rondo.errors import UserError
from rondo.flops import costs_of
from rondo.memory import (
    GROWTH,
    SPARED,
    Holder,
    Request,
    check_memory,
    free_memory,
    group_rooms,
    in_words,
    largest,
)

MODEL = recurrent("llama", layers=range(3), sizes=(1, 1, 1))
HOLDER = Holder.of(costs_of(MODEL), MODEL.config, torch.float32, int8=False)
LONG = Request((8,), prompt=100, new=900, policy="full")


@pytest.mark.parametrize("policy", ["full", "ragged", "recompute", "last", "full-int8"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_cache_holds_no_more_than_is_forecast_and_not_much_less(policy: str, depth: int) -> None:
    new, prompt = 20, 30
    output = MODEL.generate(
        torch.arange(3, 3 + prompt)[None],
        num_recurrences=depth,
        cache_policy=policy,
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
    )
    held = output.past_key_values.nbytes
    forecast = HOLDER.forecast(Request((depth,), prompt, new, policy)).cache
    assert held <= forecast
    # Beside the spare quarter: the last token is not read, and full-int8 reads one whole.
    assert forecast <= held * GROWTH * (1.6 if policy == "full-int8" else 1.15)


def test_the_plain_cache_of_one_depth_is_what_the_costs_say() -> None:
    request = Request((3,), 30, 20)
    assert HOLDER.forecast(request).cache == 50 * HOLDER.costs.kv_bytes(3, 4)


def test_residuals_take_nothing_at_one_iteration_and_less_than_the_whole_later() -> None:
    def cache(policy: str, depth: int) -> int:
        return HOLDER.forecast(replace(LONG, policy=policy, depths=(depth,))).cache

    assert cache("full-int8", 1) == cache("full", 1) == cache("last", 1)
    # Four bytes of a value become one, and one step for the eight values of a head.
    assert cache("full-int8", 21) < 0.55 * cache("full", 21)


def test_weights_are_those_the_model_holds_and_none_once_it_is_loaded() -> None:
    stored = sum(parameter.nbytes for parameter in MODEL.parameters())
    assert HOLDER.forecast(LONG).weights == HOLDER.forecast(LONG).loading == stored
    assert replace(HOLDER, loaded=True).forecast(LONG).weights == 0
    rounded = replace(HOLDER, int8=True).forecast(LONG)
    assert rounded.weights < stored == rounded.loading


def test_rows_add_up_by_their_depths() -> None:
    both = HOLDER.forecast(replace(LONG, depths=(2, 8))).cache
    alone = [HOLDER.forecast(replace(LONG, depths=(depth,))).cache for depth in (2, 8)]
    assert both == sum(alone)


def test_logits_of_a_whole_prompt_and_a_branch_take_more() -> None:
    assert HOLDER.forecast(replace(LONG, readouts=100)).logits > 100 * HOLDER.vocab_size * 20
    assert HOLDER.forecast(replace(LONG, branching=True)).cache > HOLDER.forecast(LONG).cache


def numbers_after(flag: str, text: str) -> int:
    words = text.replace(",", " ").split()
    return int(words[words.index(flag) + 1])


def test_a_request_that_cannot_fit_is_told_the_largest_that_would() -> None:
    free = HOLDER.forecast(LONG).needed // 2
    with pytest.raises(UserError, match="would fit") as refused:
        check_memory(HOLDER, LONG, free)
    message = str(refused.value)
    depth = numbers_after("--recurrences", message)
    new = numbers_after("--max-new-tokens", message)
    assert "--cache full-int8" in message or "--cache last" in message
    fits = (replace(LONG, depths=(depth,)), replace(LONG, new=new))
    beyond = (replace(LONG, depths=(depth + 1,)), replace(LONG, new=new + 1))
    assert all(HOLDER.forecast(one).needed <= SPARED * free for one in fits)
    assert all(HOLDER.forecast(one).needed > SPARED * free for one in beyond)


def test_a_model_that_does_not_fit_at_all_is_told_so() -> None:
    with pytest.raises(UserError, match="no depth or length would fit"):
        check_memory(HOLDER, LONG, free=1000)


def test_what_fits_or_cannot_be_told_is_let_through() -> None:
    assert check_memory(HOLDER, LONG, None) == HOLDER.forecast(LONG)
    assert check_memory(HOLDER, LONG, 10**12) == HOLDER.forecast(LONG)


def test_a_policy_that_rows_of_several_depths_cannot_have_is_not_offered() -> None:
    request = replace(LONG, depths=(4, 8))
    with pytest.raises(UserError) as refused:
        check_memory(HOLDER, request, HOLDER.forecast(request).needed // 2)
    assert "full-int8" not in str(refused.value)
    assert "--cache last" in str(refused.value)


@pytest.mark.parametrize("most", [0, 1, 7, 8])
@pytest.mark.parametrize("limit", [0, 1, 5, 8, 9])
def test_the_largest_that_fits_is_found(most: int, limit: int) -> None:
    assert largest(most, lambda number: number <= limit) == min(most, limit)


def test_bytes_are_said_in_units() -> None:
    told = [in_words(count) for count in (12, 4_500, 2_000_000, 8_123_000_000)]
    assert told == ["12 bytes", "4.5 kB", "2 MB", "8.12 GB"]


# ---- what is free


def group(place: Path, limit: str, used: int, files: int = 0, version: int = 2) -> None:
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    place.mkdir(parents=True, exist_ok=True)
    (place / names[0]).write_text(f"{limit}\n")
    (place / names[1]).write_text(f"{used}\n")
    (place / "memory.stat").write_text(f"anon 5\n{names[2]} {files}\n")


def test_every_limit_around_a_process_counts_and_read_files_are_given_back(tmp_path: Path) -> None:
    group(tmp_path / "slice", "1000", 700, files=100)
    group(tmp_path / "slice" / "run", "max", 300)
    group(tmp_path / "other", "10", 10)
    assert list(group_rooms(tmp_path, "0::/slice/run\n")) == [400]
    group(tmp_path / "slice" / "run", "500", 300)
    assert sorted(group_rooms(tmp_path, "0::/slice/run\n")) == [200, 400]


def test_a_group_named_as_the_host_sees_it_is_looked_up_at_the_mount(tmp_path: Path) -> None:
    group(tmp_path, "900", 100)
    assert list(group_rooms(tmp_path, "0::/docker/abc\n")) == [800]


def test_groups_of_the_first_version_are_read_too(tmp_path: Path) -> None:
    group(tmp_path / "memory" / "job", "800", 900, version=1)
    lines = "9:name=systemd:/\n4:memory:/job\n1:cpu:/job\n"
    assert list(group_rooms(tmp_path, lines)) == [0]


def test_no_groups_no_limit(tmp_path: Path) -> None:
    assert list(group_rooms(tmp_path, "0::/\n")) == []
    assert list(group_rooms(tmp_path, "")) == []


def test_the_machine_has_some_memory_free() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50
    assert free_memory(torch.device("meta")) is None
