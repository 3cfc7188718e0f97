"""What batching across depths is worth: one engine against waiting for the deepest.

    python benchmarks/serve_depths.py random                       (the paper's shape, 4, 8, 4)
    python benchmarks/serve_depths.py out/smollm2-135m/base --num-requests 16
    python benchmarks/serve_depths.py random --device cuda --width 2048 --num-requests 256

Requests of depth 2, 4, 8 and 16 in the proportions 50, 30, 15 and 5, so many in flight that one
takes the place of each that ends, through:

    rondo        the engine of `rondo serve`
    masked       the same, where rows start a token together and the next one when the deepest is
                 done; rows that are done stay in the passes, as a mask would keep them
    compacted    the same, but rows that are done leave the passes in between
    library@16   transformers' continuous batching, everything at the deepest
    library      the same, one depth after another, each with all places
    shallow      the engine again, every request at depth 2: what a shallow row is held against

Settings take turns, every second round backwards, and ratios are taken within a round; those by
work, the processors' seconds, mean more where others use the machine. A token's latency is the time
since the one before it, the first one's the time since the request was taken up; core passes and
their tokens are counted at the core's first layer, prompts included.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import continuous
import torch
from eval_sweep import random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from traffic import DEEPEST, SHALLOW, SHARES, Answer, Counts, Run, Traffic, page, record, report
from transformers import PreTrainedTokenizerFast

from rondo.data import load_tokenizer
from rondo.flops import costs_of
from rondo.generation import load_recurrent
from rondo_serve.engine.arena import shape_of
from rondo_serve.engine.engine import Engine, EngineSettings
from rondo_serve.engine.passes import Passes
from rondo_serve.engine.rows import Flight, Row
from rondo_serve.policy import Limits
from rondo_serve.requests import Ask, Event, Finished, Token

Batching = Literal["depths", "masked", "compacted"]


def traffic(flags: argparse.Namespace, vocabulary: int) -> Traffic:
    """Return random prompts, and depths in their proportions and in an order that looks random."""
    draw = random.Random(flags.seed)
    counts = {depth: round(flags.num_requests * share / 100) for depth, share in SHARES.items()}
    counts[DEEPEST] = max(1, counts[DEEPEST])
    counts[SHALLOW] = flags.num_requests - sum(counts.values()) + counts[SHALLOW]
    depths = [depth for depth, count in counts.items() for _ in range(count)]
    draw.shuffle(depths)
    # None shares a beginning with another, and none is a special token of a real vocabulary.
    prompts = [
        tuple(draw.randrange(vocabulary // 2, vocabulary) for _ in range(flags.prompt_tokens))
        for _ in depths
    ]
    return Traffic(prompts, depths, flags.new_tokens, flags.in_flight)


# ---- the model


def load(flags: argparse.Namespace) -> tuple[Any, Any]:
    """Return a model and its tokenizer."""
    if flags.model == "random":
        torch.manual_seed(flags.seed)
        dtype = torch.float32 if flags.dtype == "auto" else getattr(torch, flags.dtype)
        device = flags.device if flags.device != "auto" else "cpu"
        model: Any = random_model(flags.shape, flags.width)
        model = model.to(device, dtype).eval()
        tokenizer = words(model.config.vocab_size)
    else:
        model = load_recurrent(flags.model, flags.dtype, flags.device)
        tokenizer = load_tokenizer(Path(flags.model))
    return model, tokenizer


def words(count: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of so many words."""
    plain = Tokenizer(models.WordLevel({f"w{number}": number for number in range(count)}, "w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, clean_up_tokenization_spaces=False)


@contextmanager
def counted(model: Any) -> Iterator[Counts]:
    """Count what goes through the core's first layer."""
    passes = Counts()

    def count(module: Any, arguments: tuple[Any, ...]) -> None:
        passes.count += 1
        passes.tokens += arguments[0].shape[:-1].numel()

    hook = model.model.core[0].register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


# ---- the settings


class MaskedPasses(Passes):
    """Passes in which rows that are done take part until the deepest is.

    Such a row repeats its last iteration: that costs what one more would, and changes nothing. One
    whose text has ended leaves at once, which favours what is measured against.
    """

    def __init__(self, engine: "MaskedEngine", model: Any):
        super().__init__(model, engine.arena)
        self._engine = engine
        self._done: list[Flight] = []

    def iterate(self, flights: Sequence[Flight]) -> None:
        """Run one iteration of the core, for those that are done too."""
        answering = [one for one in flights if not one.is_prompt]
        if any(one.iteration == 0 for one in answering):
            self._done = []
        running = {id(row) for row in self._engine.running}
        self._done = [one for one in self._done if id(one.row) in running]
        super().iterate([*flights, *(copy.copy(one) for one in self._done)])
        for one in answering:
            if one.done:
                assert one.before is not None
                self._done.append(replace(one, iteration=one.iteration - 1, state=one.before))


class MaskedEngine(Engine):
    """An engine that keeps rows that are done in the passes."""

    def __init__(self, model: Any, *args: Any):
        super().__init__(model, *args)
        self.passes = MaskedPasses(self, model)

    @property
    def running(self) -> list[Row]:
        """The rows in flight."""
        return self._rows


def open_engine(
    model: Any, tokenizer: Any, wanted: Traffic, batching: Batching, favour: Any, flags: Any
) -> Engine:
    """Return an engine whose ticks are ours to call, with room for all that is in flight."""
    longest, shape = len(wanted.prompts[0]) + wanted.new_tokens, shape_of(model, costs_of(model))
    settings = EngineSettings(
        kv_bytes=(wanted.in_flight + 1) * shape.pages_for(longest, DEEPEST) * shape.page_bytes,
        max_context=longest,
        max_running=wanted.in_flight,
        max_queue=len(wanted.prompts),
        tick_tokens=flags.tick_tokens,
        prompt_chunk=flags.prompt_chunk,
        prefix_cache=False,
        favour=favour,
        max_seconds=3600.0,
        lockstep=batching != "depths",
    )
    kind = MaskedEngine if batching == "masked" else Engine
    return kind(model, tokenizer, Limits(default=SHALLOW, cap=DEEPEST), settings)


def through_engine(
    model: Any, tokenizer: Any, flags: Any, batching: Batching, favour: Any, wanted: Traffic
) -> Run:
    """Run the engine over all requests."""
    engine = open_engine(model, tokenizer, wanted, batching, favour, flags)
    answers = [Answer(depth) for depth in wanted.depths]
    left = set(range(len(answers)))

    def deliver(number: int, asked: float, event: Event) -> None:
        answer = answers[number]
        if isinstance(event, Token):
            answer.tokens.append(event.token)
            answer.stamps.append(time.perf_counter())
            return
        assert isinstance(event, Finished)
        assert event.reason == "length", event
        answer.taken_up = asked + event.receipt.queued
        left.discard(number)

    with counted(model) as passes:
        start, before = time.perf_counter(), time.process_time()
        for number, (prompt, depth) in enumerate(zip(wanted.prompts, wanted.depths, strict=True)):
            ask = Ask(str(number), prompt, wanted.new_tokens, num_recurrences=depth)
            engine.submit(ask, partial(deliver, number, time.perf_counter()))
        while left:
            engine.tick()
        seconds, worked = time.perf_counter() - start, time.process_time() - before
    return Run(seconds, worked, answers, passes)


def through_library(
    paged: dict[int, Any], flags: Any, depths: Sequence[int] | None, wanted: Traffic
) -> Run:
    """Run transformers' continuous batching, one depth after another.

    Args:
        paged: The model at each depth.
        flags: How it is measured.
        depths: Depth at which each request is run; its own unless given.
        wanted: What is asked for.
    """
    answers = [Answer(depth) for depth in wanted.depths]
    by_depth: dict[int, list[int]] = {}
    for number, depth in enumerate(depths or wanted.depths):
        by_depth.setdefault(depth, []).append(number)
    seconds, worked, total = 0.0, 0.0, Counts()
    longest = len(wanted.prompts[0]) + wanted.new_tokens
    for depth, numbers in sorted(by_depth.items()):
        with (
            continuous.serving(
                paged[depth], wanted.in_flight, longest, flags.tick_tokens
            ) as manager,
            counted(paged[depth]) as passes,
        ):
            before = time.process_time()
            took, found = continuous.answers(
                manager, [wanted.prompts[number] for number in numbers], wanted.new_tokens
            )
            worked += time.process_time() - before
        seconds += took
        total.count, total.tokens = total.count + passes.count, total.tokens + passes.tokens
        for number, one in zip(numbers, found, strict=True):
            answer = answers[number]
            answer.tokens, answer.stamps = one.generated_tokens, list(one.timestamps or ())
            answer.taken_up = one.lifespan[0]
    return Run(seconds, worked, answers, total)


def settings_of(
    model: Any, tokenizer: Any, flags: argparse.Namespace
) -> dict[str, Callable[[Traffic], Run]]:
    """Return what takes turns, by name."""
    engine = partial(through_engine, model, tokenizer, flags)
    found: dict[str, Callable[[Traffic], Run]] = {"rondo": partial(engine, "depths", "even")}
    for favour in flags.favours:
        found[f"rondo, {favour} first"] = partial(engine, "depths", favour)
    found["masked"] = partial(engine, "masked", "even")
    found["compacted"] = partial(engine, "compacted", "even")
    if not flags.no_library:
        paged = {depth: continuous.at_depth(model, depth) for depth in SHARES}
        found[f"library@{DEEPEST}"] = lambda wanted: through_library(
            paged, flags, [DEEPEST] * len(wanted.depths), wanted
        )
        found["library"] = lambda wanted: through_library(paged, flags, None, wanted)
    found["shallow"] = lambda wanted: engine("depths", "even", wanted.all_at(SHALLOW))
    return found


def in_turns(
    settings: dict[str, Callable[[Traffic], Run]], wanted: Traffic, rounds: int
) -> dict[str, list[Run]]:
    """Warm each setting up with a few requests, then run all in turn."""
    found: dict[str, list[Run]] = {name: [] for name in settings}
    with tqdm(total=(rounds + 1) * len(settings), disable=None) as bar:
        for number in range(rounds + 1):
            for name in settings if number % 2 else reversed(settings):
                bar.set_description(name)
                run = settings[name](wanted if number else wanted.first(4))
                if number:
                    found[name].append(run)
                bar.update()
    return found


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a recurrent checkpoint, or `random`")
    parser.add_argument("--shape", default="4,8,4", help="layers of a random model")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--num-requests", type=int, default=40)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--tick-tokens", type=int, default=256)
    parser.add_argument("--prompt-chunk", type=int, default=64)
    parser.add_argument("--favours", nargs="*", default=[], choices=["shallow", "deep"])
    parser.add_argument("--no-library", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output-dir", help="directory for the figures, JSON and Markdown")
    flags = parser.parse_args()
    model, tokenizer = load(flags)
    wanted = traffic(flags, model.config.vocab_size)
    found = report(in_turns(settings_of(model, tokenizer, flags), wanted, flags.rounds))
    found["requests by depth"] = {depth: wanted.depths.count(depth) for depth in SHARES}
    found["dtype"] = str(model.dtype).removeprefix("torch.")
    record("serve_depths", flags, flags.device, found, page)


if __name__ == "__main__":
    main()
