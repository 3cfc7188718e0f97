"""What the results say about depth, in plain words with paired intervals; no gain is assumed.

Pure functions of results as `rondo eval` writes them: nothing is read, written or drawn here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rondo.evaluation.comparisons import NUM_RESAMPLES, Json, answer
from rondo.evaluation.controls import (
    EQUAL_FLOPS,
    Contest,
    checkpoint_contest,
    checkpoint_scores,
    contest,
    data_of,
    equal_flops_losses,
    find,
    lacking,
    present,
    rival,
    spoken,
    training_ratio,
    training_words,
)

Judgement = tuple[str, list[str]]

_DEPTH = "After training, does depth help?"
_STATIC = "Is the best depth better than the static twin"
_NO_AFTER = "Not known: no trained recurrent model is among the results."


@dataclass(frozen=True, slots=True)
class _Question:
    """A question, and what is compared to answer it on a task."""

    text: str
    tasks: Sequence[str | None]
    """None alone where the answer is about the trainings rather than a task."""
    meet: Callable[[str], Contest]
    of_depth: bool = True
    """Whether a yes claims a gain of depth."""

    def answers(self) -> list[str]:
        """Answer once per task, beginning with Yes, No, Not shown or Not known."""
        return [_said(task, self.meet(task or "")) for task in self.tasks] or [
            "Not known: no task in common."
        ]


def verdict(results: Sequence[Json]) -> list[str]:
    """Say in a line per question whether depth helped, and against what."""
    return [f"{question} {' '.join(answers)}" for question, answers in judge(results)]


def judge(results: Sequence[Json]) -> list[Judgement]:
    """Answer each question of the verdict once per task.

    Answers begin with Yes, No, Not shown or Not known. Where several results share a role, the
    first is judged, and further recurrent ones are set against it: the order is the user's. A
    difference below `comparisons.LEAST` is none, however sure.
    """
    judged = [(question.text, question.answers()) for question in _questions(results)]
    after = find(results, "recurrent", "after")
    if not after:
        judged.insert(0, (_DEPTH, [_NO_AFTER]))
    elif not rival(results, "static twin", after):
        reason = f"Not known: {lacking(results, 'static twin')}."
        judged.insert(1, ("Is the best depth better than plain training?", [reason]))
    for name in ("parent", "random twin", "self-consistency"):
        if present(results, name) and not rival(results, name, subject(results)):
            reason = f"Not known: {lacking(results, name)}."
            judged.append((f"Is the best depth better than the {name}?", [reason]))
    return judged


def headline(results: Sequence[Json]) -> str:
    """Sum the verdict over tasks up in one sentence; what is not known does not count."""
    after = find(results, "recurrent", "after")
    if not after:
        return "Not known whether depth helps after training: no trained recurrent model is here."
    depth, *static = [(question.text, question.answers()) for question in _first_two(results)]
    said = _sum_up(depth[1], "helps", "harms", "harms", "is not shown to help", " tasks")
    where = f" on {next(iter(after['tasks']))}" if len(depth[1]) == 1 else ""
    said = f"Depth {said}{where}" if said else "It is not known whether depth helps"
    if not static:
        return f"{said}; no static twin of its parent was measured."
    than = static[0][0].removeprefix("Is the best depth better than ").rstrip("?").replace(",", "")
    neither = f"is not shown to differ from {than}"
    beside = _sum_up(static[0][1], f"beats {than}", f"loses to {than}", "loses to it", neither)
    return f"{said}; " + (
        f"its best depth {beside}." if beside else f"beside {than} nothing is known."
    )


def _sum_up(
    answers: Sequence[str], good: str, bad: str, also_bad: str, neither: str, noun: str = ""
) -> str:
    """Count answers of yes and no in words, of those that are known; nothing where none is."""
    words = [_word(one) for one in answers]
    yes, no, unknown = (words.count(word) for word in ("Yes", "No", "Not known"))
    known = len(words) - unknown
    of = f" of {known}{noun}" + (f" ({unknown} not known)" if unknown else "")
    if not known:
        return ""
    if yes and no:
        return f"{good} on {yes} and {also_bad} on {no}{of}"
    verb, count = (good, yes) if yes else (bad, no) if no else (neither, "any")
    return verb if len(words) == 1 else f"{verb} on {count}{of}"


def claims_gain(results: Sequence[Json]) -> bool:
    """Whether the verdict answers any question about depth, beyond r = 1, with yes."""
    return any(
        one.startswith("Yes")
        for question in _questions(results)
        if question.of_depth
        for one in question.answers()
    )


def caveats(results: Sequence[Json]) -> list[str]:
    """Say what the intervals leave out, and where the conditions differ."""
    notes = _intervals(results)
    known = [one for _, answers in judge(results) for one in answers if _word(one) != "Not known"]
    if len(known) > 1:
        notes.append(
            f"The verdict makes {len(known)} comparisons, each at 95%: were there no differences "
            f"at all, about {0.05 * len(known):.1f} would seem to be one."
        )
    notes += _seeds(results)
    first, *others = [one for one in results if _is_run(one)] or [None]
    if first and others:
        notes.append(
            f"Of {len(others) + 1} trained recurrent models the verdict is about the first, "
            f"'{first['model']['label']}'."
        )
    limits = {limit for result in results if (limit := result["conditions"]["limit"])}
    if limits:
        count = " or ".join(f"{limit:,}" for limit in sorted(limits))
        notes.append(f"Only the first {count} items of each task or text were measured.")
    for key in ("dtype", "device", "seq_len", "limit"):
        values = dict.fromkeys(str(result["conditions"][key]) for result in results)
        if len(values) > 1:
            notes.append(f"Not all were evaluated with the same {key}: {'; '.join(values)}.")
    data = dict.fromkeys(data for result in results if (data := data_of(result)))
    if len(data) > 1:
        notes.append(f"Not all were trained on the same data: {'; '.join(data)}.")
    return notes


def subject(results: Sequence[Json]) -> Json:
    """Return the result that a report of these results is about."""
    after, before = (find(results, "recurrent", stage) for stage in ("after", "before"))
    return after or before or results[0]


def _questions(results: Sequence[Json]) -> Iterator[_Question]:
    """List what can be asked of these results, the weightiest first."""
    yield from _first_two(results)
    before, after = (find(results, "recurrent", stage) for stage in ("before", "after"))
    ours = after or before
    if not ours:
        return
    static, parent, random, votes = (
        rival(results, name, ours)
        for name in ("static twin", "parent", "random twin", "self-consistency")
    )
    if after and static:
        yield from _at_equal_flops(after, static)
        text = "At r = 1, is the trained model better than the static twin?"
        yield _asked(text, after, static, "the static twin", 1, 1)
    if after and parent:
        text = "At r = 1, is the trained model better than the parent?"
        yield _asked(text, after, parent, "the parent", 1, 1)
    if before:
        yield _asked("Before training, did depth help?", before, before, "r = 1", 2)
    if votes:
        text = "Is the best depth better than the parent with self-consistency?"
        tasks = [task for task in ours["tasks"] if task in votes["tasks"]]
        yield _asked(text, ours, votes, spoken("self-consistency", votes), tasks=tasks)
    if after and random:
        text = "Is the best depth better than the random twin, which began without the parent?"
        yield _asked(text, after, random, "the random twin")
    for other in results:
        if _is_run(other) and other is not after and after:
            label = f"'{other['model']['label']}'"
            yield _asked(f"Is the best depth better than that of {label}?", after, other, label)


def _first_two(results: Sequence[Json]) -> Iterator[_Question]:
    """List the questions that the headline sums up."""
    after = find(results, "recurrent", "after")
    if not after:
        return
    yield _asked(_DEPTH, after, after, "r = 1", 2)
    if static := rival(results, "static twin", after):
        words = training_words(after, static)
        words = f" ({words})" if "unknown" in words else f", {words}"
        yield _asked(f"{_STATIC}{words}?", after, static, "the static twin")


def _at_equal_flops(ours: Json, theirs: Json) -> Iterator[_Question]:
    """Ask for a matched comparison where the budgets differ: of checkpoints, else of losses."""
    ratio, _ = training_ratio(ours, theirs)
    if ratio is None or abs(ratio - 1) <= EQUAL_FLOPS:
        return
    text = "At equal training FLOPs, is the trained model better than the static twin?"
    both = [
        task for task in ours["tasks"] if all(checkpoint_scores(r, task) for r in (ours, theirs))
    ]
    if both:
        yield _Question(text, both, lambda task: checkpoint_contest(ours, theirs, task))
    else:
        # One run each has no interval, so that this is never a yes or a no.
        said = equal_flops_losses(ours, theirs).sentence.rstrip(".")
        said = said.removeprefix("Not known: ")
        yield _Question(text, [None], lambda _: said)


def _asked(
    text: str,
    ours: Json,
    theirs: Json,
    than: str,
    minimum: int = 1,
    maximum: float = float("inf"),
    tasks: Sequence[str] | None = None,
) -> _Question:
    """Ask whether our best depth within bounds is better than another model's best."""

    def meet(task: str) -> Contest:
        return contest(ours, theirs, task, than, minimum, maximum)

    # Another run that loops as well, or r = 1, tells nothing of depth.
    of_depth = ours is theirs or (maximum > 1 and theirs["model"]["role"] != "recurrent")
    return _Question(text, list(ours["tasks"]) if tasks is None else tasks, meet, of_depth)


def _said(task: str | None, found: Contest) -> str:
    """Answer in one sentence, with the interval and the price."""
    where = f" on {task}" if task else ""
    if isinstance(found, str):
        return f"Not known{where}: {found}."
    word, sentence = answer(*found)
    return f"{word}{where}: {sentence}."


def _is_run(result: Json) -> bool:
    return (result["model"]["role"], result["model"]["stage"]) == ("recurrent", "after")


def _word(said: str) -> str:
    """Return the word that an answer begins with."""
    return next(word for word in ("Yes", "Not shown", "Not known", "No") if said.startswith(word))


def _intervals(results: Sequence[Json]) -> list[str]:
    """Say what the intervals are made of."""
    tasks = {task: task in result["items"] for result in results for task in result["tasks"]}
    bare = [task for task, known in tasks.items() if not known]
    notes = []
    if len(bare) < len(tasks):
        notes.append(
            f"Intervals are a paired bootstrap over items ({NUM_RESAMPLES:,} resamples), widened "
            "where the best of several depths was picked."
        )
    if bare:
        notes.append(
            f"Of {', '.join(bare)} only values with standard errors are known, no items to pair: "
            "intervals take them as normal and independent, widened where the best of several "
            "depths was picked. On the same items that is too wide as a rule."
        )
    return notes


def _seeds(results: Sequence[Json]) -> list[str]:
    """Say how much luck of seeds the results could average over."""
    looped = [result["model"] for result in results if result["model"]["role"] == "recurrent"]
    trained = [model["training"]["seed"] for model in looped if model["training"]]
    seeds = {seed for seed in trained if seed is not None}
    notes = []
    if trained:
        count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds, of which the first counts"
        count = count if seeds else "a seed that is not known"
        notes.append(
            f"The loop was trained with {count}: intervals leave out the luck of training."
        )
    drawn = max(len(result["conditions"]["seeds"]) for result in results)
    if drawn > 1:
        notes.append(f"Where sampling or the initial state is random, {drawn} seeds are averaged.")
    elif drawn == 1 and any(model["state_init"] == "normal" for model in looped):
        notes.append(
            "The loop's initial state is random, and one seed of it was measured: intervals leave "
            "out its luck (rondo eval --seeds 0 1 2)."
        )
    return notes
