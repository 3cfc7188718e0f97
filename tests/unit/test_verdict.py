import math
import re

import pytest
from synthetic import make_result, published

from rondo.evaluation.comparisons import Json, paired_bootstrap
from rondo.verdict import caveats, claims_gain, headline, judge, subject, verdict

TASKS = ("math-test", "wiki-test")
GAIN = {1: 1.50, 2: 1.44, 4: 1.43}
HARM = {1: 1.46, 2: 1.52, 4: 1.60}
NOTHING = {1: 1.50, 2: 1.5003, 4: 1.5002}
HELPS = "After training, does depth help?"


def make_results(after: dict[int, float], static: float = 1.47) -> list[Json]:
    before = {1: 2.13, 2: 2.09, 3: 2.10, 4: 2.11}
    return [
        make_result(tasks={task: after for task in TASKS}),
        make_result(stage="before", tasks={task: before for task in TASKS}),
        make_result("parent", tasks={task: {1: 2.13} for task in TASKS}),
        make_result("static", tasks={task: {1: static} for task in TASKS}),
    ]


def answer(results: list[Json], question: str = HELPS, task: str = "math-test") -> str:
    """Return what the verdict says to a question on a task."""
    answers = next(answers for asked, answers in judge(results) if asked.startswith(question))
    return next(one for one in answers if f" on {task}: " in one)


def test_verdict_tells_a_gain_with_its_size_and_price() -> None:
    said = answer(make_results(GAIN))
    assert said.startswith("Yes on math-test: r = 4, best of 2, is 0.0")
    assert "nats per token better than r = 1 (95% interval 0.0" in said
    assert "1.47x the FLOPs" in said


def test_interval_allows_for_the_choice_of_the_best_depth() -> None:
    result = make_result(tasks={"text": GAIN})
    items = result["items"]["text"]
    gap = paired_bootstrap(items["values"]["1"], items["values"]["4"], items["weights"], choices=2)
    assert f"(95% interval {gap.low:.4f} to {gap.high:.4f})" in answer([result], task="text")


def test_verdict_on_accuracies_speaks_of_points() -> None:
    result = make_result(tasks={"acc-x": {1: 0.3, 2: 0.5}, "gen-x": {1: 0.5, 2: 0.3}})
    assert answer([result], task="acc-x").startswith(
        "Yes on acc-x: r = 2 is 20.0 points better than r = 1"
    )
    assert answer([result], task="gen-x").startswith("No on gen-x: r = 2 is 20.0 points worse")


def test_verdict_says_where_depth_harms() -> None:
    said = answer(make_results(HARM))
    assert said.startswith("No on math-test")
    assert "worse than r = 1" in said


def test_verdict_sees_no_difference_in_noise() -> None:
    said = answer(make_results(NOTHING))
    assert said.startswith("Not shown on math-test")
    assert "which may be chance" in said


@pytest.mark.parametrize(("static", "word"), [(1.60, "Yes"), (1.30, "No")])
def test_verdict_compares_with_the_static_twin_both_ways(static: float, word: str) -> None:
    results = make_results(GAIN, static)
    assert answer(results, "Is the best depth better").startswith(f"{word} on")
    assert answer(results, "At r = 1, is the trained model better than the s").startswith(word)


def test_verdict_asks_the_weightiest_question_first_and_answers_for_each_task() -> None:
    lines = verdict(make_results({1: 1.5, 2: 1.47}))
    assert len(lines) == 5
    assert all(task in line for line in lines for task in TASKS)
    assert lines[0].startswith("After training, does depth help? Yes on math-test")
    assert lines[1].startswith("Is the best depth better than the static twin, at equal training")


def test_answers_begin_with_one_of_four_words() -> None:
    others = [make_result(role, tasks={"gen-x": {1: 0.2}}) for role in ("random", "static")]
    results = [make_result(tasks={"gen-x": {1: 0.1, 2: 0.4}, "text": GAIN}), *others]
    for _, answers in [*judge(results), *judge(others), *judge(make_results(NOTHING))]:
        assert answers
        assert all(re.match(r"(Yes|No|Not shown|Not known)( on |:)", one) for one in answers)


def test_verdict_names_unequal_training_cost() -> None:
    results = make_results(GAIN)
    assert any("at equal training FLOPs" in line for line in verdict(results))
    results[3]["model"]["training"] = results[3]["model"]["training"] | {"flops": 0.6 * 5.1e13}
    assert any("trained with 0.60x its FLOPs" in line for line in verdict(results))
    results[3]["model"]["training"] = None
    assert any("training FLOPs unknown" in line for line in verdict(results))


def test_verdict_says_what_is_missing() -> None:
    after, before, parent, _ = make_results(GAIN)
    assert "no static twin" in " ".join(verdict([after, before, parent]))
    assert "no trained recurrent model" in verdict([before, parent])[0]
    assert "no trained recurrent model" in verdict([parent])[0]


def test_verdict_survives_a_diverged_depth() -> None:
    results = make_results(GAIN)
    results[0]["items"]["math-test"]["values"]["4"][3] = math.nan
    assert "r = 2" in answer(results)
    results[0]["items"]["math-test"]["values"]["1"][3] = None
    assert answer(results).startswith("Not known on math-test")
    assert answer(results, task="wiki-test").startswith("Yes")


def test_verdict_draws_no_conclusion_from_few_items() -> None:
    result = make_result(tasks={"text": GAIN}, num_items=6)
    assert "6 items are too few" in verdict([result])[0]
    assert not claims_gain([result])


def test_verdict_compares_only_the_same_items() -> None:
    results = make_results(GAIN)
    results[3]["tasks"]["math-test"] = results[3]["tasks"]["math-test"] | {"sha256": "1" * 64}
    said = answer(results, "Is the best depth better")
    assert said.startswith("Not known on math-test: the static twin was not measured")


def test_self_consistency_is_asked_about_what_it_can_answer() -> None:
    ours = make_result(tasks={"gen-x": {1: 0.2, 2: 0.5}, "text": GAIN})
    votes = make_result("self-consistency", tasks={"gen-x": {1: 0.3}})
    (said,) = dict(judge([ours, votes]))[
        "Is the best depth better than the parent with self-consistency?"
    ]
    assert said.startswith("Yes on gen-x: r = 2, best of 2, is 20.0 points better than the parent")
    assert "of 3 samples" in said


def test_random_twin_is_met_at_its_best() -> None:
    results = [make_result(tasks={"text": GAIN}), make_result("random", tasks={"text": {2: 1.3}})]
    assert answer(results, "Is the best depth better than the random", "text").startswith("No")


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (
            make_results(GAIN),
            "Depth helps on 2 of 2 tasks; its best depth beats the static twin at equal training "
            "FLOPs on 2 of 2.",
        ),
        (
            make_results(HARM, static=1.3),
            "Depth harms on 2 of 2 tasks; its best depth loses to the static twin at equal "
            "training FLOPs on 2 of 2.",
        ),
        (
            [make_result(tasks={"text": GAIN}), make_result("static", tasks={"text": {1: 1.2}})],
            "Depth helps on text; its best depth loses to the static twin at equal training FLOPs.",
        ),
        (
            make_results(NOTHING)[:1],
            "Depth is not shown to help on any of 2 tasks; no static twin of its parent",
        ),
        (make_results(GAIN)[1:], "no trained recurrent model is here"),
    ],
)
def test_headline_sums_the_tasks_up(results: list[Json], sentence: str) -> None:
    said = headline(results)
    assert said.endswith(sentence) or sentence in said
    assert len(said.split()) <= 30


def test_headline_tells_losses_beside_gains_and_leaves_out_what_is_not_known() -> None:
    tasks = {"acc-a": {1: 0.4, 2: 0.6}, "acc-b": {1: 0.4, 2: 0.6}, "acc-c": {2: 0.4, 4: 0.6}}
    twin = make_result("static", tasks={"acc-a": {1: 0.3}, "acc-b": {1: 0.9}})
    said = headline([make_result(tasks=tasks), twin])
    assert said.startswith("Depth helps on 2 of 2 tasks (1 not known); its best depth beats the")
    assert said.endswith("FLOPs on 1 and loses to it on 1 of 2 (1 not known).")
    del tasks["acc-a"], tasks["acc-b"]
    assert headline([make_result(tasks=tasks)]).startswith("It is not known whether depth helps;")


def test_headline_of_differences_that_chance_explains_claims_neither_side() -> None:
    said = headline(make_results(NOTHING, static=1.5001))
    assert said.startswith("Depth is not shown to help on any of 2 tasks; its best depth is not ")
    assert said.endswith(
        "not shown to differ from the static twin at equal training FLOPs on any of 2."
    )


def test_a_difference_of_rounding_is_no_yes() -> None:
    result = make_result(tasks={"text": {1: 2.0, 2: 2.0}})
    items = result["items"]["text"]
    first = zip(items["values"]["1"], items["weights"], strict=True)
    items["values"]["2"] = [value - 1e-6 * weight for value, weight in first]
    said = answer([result], task="text")
    assert said.startswith("Not shown on text")
    assert "no difference that counts" in said
    assert not claims_gain([result])


def test_rivals_best_depth_is_paid_for_as_well() -> None:
    ours, twin = make_result(tasks={"text": GAIN}), make_result("random", tasks={"text": GAIN})
    pairs = [one["items"]["text"]["values"]["4"] for one in (twin, ours)]
    gap = paired_bootstrap(*pairs, ours["items"]["text"]["weights"], choices=9)
    said = answer([ours, twin], "Is the best depth better than the random", "text")
    assert f"(95% interval {gap.low:+.4f} to {gap.high:+.4f})" in said


def test_a_model_of_another_parent_answers_nothing() -> None:
    others = [make_result(role, tasks={"text": {1: 3.0}}) for role in ("parent", "static")]
    for one in others:
        one["model"]["parent"] = "Llama-70B"
    judged = judge([make_result(tasks={"text": GAIN}), *others])
    assert [question for question, _ in judged] == [
        HELPS,
        "Is the best depth better than plain training?",
        "Is the best depth better than the parent?",
    ]
    for _, (said,) in judged[1:]:
        assert said.startswith("Not known: the ")
        assert "of another parent (Llama-70B)" in said


def test_further_runs_are_set_against_the_first_each_at_its_best() -> None:
    first = make_result(tasks={"text": {1: 2.0, 2: 1.9}})
    other = make_result(tasks={"text": {1: 2.0, 2: 1.95, 4: 1.8}}, label="other run")
    said = answer([first, other], "Is the best depth better than that of 'other run'?", "text")
    assert said.startswith("No on text: r = 2, best of 2, is 0.0990 nats")
    assert "worse than 'other run' at its best (r = 4)" in said
    assert "the verdict is about the first, 'recurrent, trained'" in " ".join(
        caveats([first, other])
    )
    assert "is about the first" not in " ".join(caveats([first]))


MATCHED = "At equal training FLOPs, is the trained model better than the static twin?"


def test_budgets_that_differ_are_matched_by_checkpoints() -> None:
    ours = make_result(tasks={"gen-x": {1: 0.2, 2: 0.5}}, num_items=1000)
    twin = make_result("static", tasks={"gen-x": {1: 0.3}}, num_items=1000)
    assert MATCHED not in dict(judge([ours, twin]))
    twin["model"]["training"] = twin["model"]["training"] | {"flops": 0.5 * 5.1e13}
    for result, by_depth in ((ours, {"2": 0.2}), (twin, {"1": 0.3})):
        point = {"step": 1, "flops": 2e13, "scores": {"gen-x": by_depth}}
        result["model"]["checkpoints"] = [point]
    assert answer([ours, twin], MATCHED, "gen-x").startswith("No on gen-x: The checkpoint of")


def test_budgets_that_differ_are_matched_by_losses_without_a_claim() -> None:
    results = make_results(GAIN)
    results[3]["model"]["training"] = results[3]["model"]["training"] | {"flops": 0.5 * 5.1e13}
    (said,) = dict(judge(results))[MATCHED]
    assert said.startswith("Not known: At 5.10e+13 training FLOPs")
    assert "without an interval" in said


def test_a_claim_is_seen_wherever_depth_is_said_to_help() -> None:
    assert claims_gain(make_results(GAIN))
    nothing = [
        make_result(tasks={"text": NOTHING}),
        make_result("parent", tasks={"text": {1: 2.0}}),
    ]
    # At r = 1 the trained model is better than its parent, which is no gain of depth.
    assert answer(nothing, "At r = 1", "text").startswith("Yes")
    assert not claims_gain(nothing)
    assert claims_gain([make_result(stage="before", tasks={"text": GAIN})])
    assert not claims_gain(make_results(GAIN)[2:])


def test_caveats_count_comparisons_seeds_and_limits() -> None:
    results = make_results(GAIN)
    said = " ".join(caveats(results))
    assert "10 comparisons" in said
    assert "about 0.5 would" in said
    assert "trained with one seed" in said
    assert "Only the first" not in said
    for result in results:
        result["conditions"]["limit"] = 1000
    results[0]["conditions"]["seeds"] = [0, 1, 2]
    said = " ".join(caveats(results))
    assert "Only the first 1,000 items" in said
    assert "3 seeds are averaged" in said


def test_caveats_name_the_luck_of_a_random_start_and_of_an_unknown_seed() -> None:
    result = make_result(tasks={"text": GAIN})
    assert "initial state is random" not in " ".join(caveats([result]))
    result["model"]["state_init"] = "normal"
    result["model"]["training"] = result["model"]["training"] | {"seed": None}
    said = " ".join(caveats([result]))
    assert "initial state is random, and one seed of it was measured" in said
    assert "a seed that is not known" in said


@pytest.mark.parametrize(
    ("key", "other"), [("dtype", "bfloat16"), ("device", "cuda"), ("seq_len", 64), ("limit", 9)]
)
def test_caveats_name_conditions_that_differ(key: str, other: object) -> None:
    results = make_results(GAIN)
    assert not any(f"same {key}" in note for note in caveats(results))
    results[1]["conditions"][key] = other
    assert any(f"same {key}" in note and str(other) in note for note in caveats(results))


def test_caveats_name_data_that_differ() -> None:
    results = make_results(GAIN)
    results[3]["model"]["training"] = results[3]["model"]["training"] | {"data": "wiki"}
    assert any("wiki" in note for note in caveats(results))


def test_subject_is_the_trained_loop_then_any_loop_then_the_first() -> None:
    after, before, parent, static = make_results(GAIN)
    assert subject([parent, before, after]) is after
    assert subject([parent, before]) is before
    assert subject([static, parent]) is static


def test_verdict_on_published_values_says_that_nothing_was_paired() -> None:
    results = [
        published(make_result(tasks={"gen-x": {1: 0.2, 4: 0.5}}, num_items=200)),
        published(make_result("static", tasks={"gen-x": {1: 0.48}}, num_items=200)),
    ]
    assert answer(results, task="gen-x").startswith("Yes on gen-x: r = 4 is 30.0 points better")
    assert "with no items to pair" in answer(results, task="gen-x")
    static = answer(results, "Is the best depth better than the static twin", "gen-x")
    assert static.startswith("Not shown on gen-x")
    assert "with no items to pair), which may be chance" in static


def test_caveats_tell_published_values_from_items() -> None:
    measured = make_result(tasks={"gen-x": {1: 0.2, 4: 0.5}})
    bare = published(make_result(tasks={"acc-y": {1: 0.2, 4: 0.5}}))
    notes = caveats([measured, bare])
    assert any(note.startswith("Intervals are a paired bootstrap") for note in notes)
    assert any(note.startswith("Of acc-y only values") for note in notes)
    assert not any("paired bootstrap" in note for note in caveats([bare]))
    assert not any("no items to pair" in note for note in caveats([measured]))
