"""Continue a prompt: at several depths in one batch, as deep as each token needs, or by drafts."""

import json
import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import StoppingCriteriaList

from rondo.config import DecodingConfig, GenerateConfig
from rondo.data import encode, load_tokenizer, pad_token
from rondo.decoding import Decoding, decoding_of, drafting_flops, executed_flops, flops_by_token
from rondo.errors import UserError
from rondo.flops import Costs, costs_of
from rondo.loading import load_model
from rondo.memory import Holder, Request, check_memory, free_memory
from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.modeling.speculation_recurrent import Drafting
from rondo.provenance import choose_device, choose_dtype, read_json
from rondo.quantization import quantize
from rondo.terminal import TokenPrinter, dim, has_colour, legend, painted, runs


def load_recurrent(path: str, dtype: str, device: str) -> Any:
    """Load a recurrent checkpoint for inference.

    Raises:
        UserError: The directory holds none.
    """
    check_kind(path)
    where = choose_device(device)
    model = load_model(RecurrentForCausalLM, Path(path), choose_dtype(dtype, where))
    return model.to(where).eval()


def check_kind(path: str) -> None:
    """Refuse a directory that holds no recurrent checkpoint.

    Raises:
        UserError: It holds none.
    """
    kind = read_json(Path(path) / "config.json").get("model_type")
    if kind != "rondo":
        raise UserError(f"{path} is a {kind} model, not a recurrent one: convert it first")


def check_cap(deepest: int, cap: int, model: str | Path) -> None:
    """Refuse depths that a model was not made for.

    Raises:
        UserError: The deepest is beyond the cap.
    """
    if deepest > cap:
        raise UserError(
            f"--recurrences {deepest} is beyond the model's cap of {cap} "
            f"(max_recurrences in {model}/config.json)"
        )


# ---- what is loaded


@dataclass(frozen=True)
class Session:
    """A loaded model with what is needed to generate."""

    model: Any
    tokenizer: Any
    costs: Costs
    ends: frozenset[int]
    """Tokens that end a text."""
    holder: Holder


def shape_of(path: str) -> RecurrentConfig:
    """Read the config of a recurrent checkpoint.

    Raises:
        UserError: It is none, or damaged.
    """
    check_kind(path)
    try:
        return RecurrentConfig.from_pretrained(path)
    except (ValueError, TypeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}/config.json describes no model: {reason}") from error


def check_length(shape: RecurrentConfig, prompt: int, new: int) -> None:
    """Refuse what is longer than the model's positions.

    Raises:
        UserError: It is.
    """
    most = shape.max_position_embeddings
    if prompt >= most:
        raise UserError(f"the prompt has {prompt} tokens, and the model takes {most}: shorten it")
    if prompt + new > most:
        raise UserError(
            f"a prompt of {prompt} tokens and {new} new ones exceed the {most} that the model "
            f"takes: --max-new-tokens {most - prompt} fits"
        )


def plan_of(
    config: DecodingConfig, shape: RecurrentConfig, recurrences: tuple[int, ...] | None
) -> Decoding:
    """Return how tokens are made, within the model's cap.

    Raises:
        UserError: Settings and checkpoint do not go together.
    """
    decoding = decoding_of(config, shape, recurrences)
    check_cap(decoding.cap, shape.max_recurrences, config.model)
    return decoding


def open_session(
    config: DecodingConfig, shape: RecurrentConfig, tokenizer: Any, request: Request
) -> Session:
    """Load a model if what is asked of it fits.

    Raises:
        UserError: It does not fit, or cannot be loaded.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    with torch.device("meta"):
        costs = costs_of(RecurrentForCausalLM(shape))
    int8 = config.weights == "int8"
    check_memory(Holder.of(costs, shape, dtype, int8), request, free_memory(device))
    model = load_recurrent(config.model, str(dtype).removeprefix("torch."), config.device)
    if config.weights:
        quantize(model, config.weights)
    torch.manual_seed(config.seed)
    told = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])} - {None}
    loaded = Holder.of(costs, shape, dtype, int8, loaded=True)
    return Session(model, tokenizer, costs, frozenset(ends), loaded)


# ---- the generation


@dataclass(frozen=True)
class Decoded:
    """A row of what was generated.

    Attributes:
        tokens: New tokens, what ended them included.
        recurrences: Iterations that each of them took.
        flops: FLOPs that were executed for the row.
        full_flops: FLOPs of the same tokens at the full depth, without checks and drafts.
        seconds: Time of the whole batch.
        drafting: What is known of the drafts, or None.
    """

    tokens: list[int]
    recurrences: list[int]
    flops: float
    full_flops: float
    seconds: float
    drafting: Drafting | None

    def text(self, ends: Collection[int]) -> list[int]:
        """Return the tokens that are text."""
        return self.tokens[:-1] if self.tokens[-1] in ends else self.tokens


@torch.inference_mode()
def decode(
    session: Session,
    decoding: Decoding,
    prompt: list[int],
    cache: RecurrentCache | None,
    new: int,
    streamer: Any = None,
    stopping: Any = None,
) -> list[Decoded]:
    """Continue a prompt in a row for each depth.

    Args:
        session: The model.
        decoding: How.
        prompt: Its tokens; those that the cache holds are not read again.
        cache: A cache, or None for the plain one.
        new: Tokens to generate at most.
        streamer: Where new tokens are put, or None.
        stopping: Called with (ids, scores), returns (B,) whether to stop; or None.
    """
    model, rows = session.model, len(decoding.depths)
    ids = torch.tensor([prompt], device=model.device).repeat(rows, 1)
    read_before = 0 if cache is None else cache.length
    start = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        pad_token_id=pad_token(session.tokenizer),
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([] if stopping is None else [stopping]),
        return_dict_in_generate=True,
        **decoding.options(),
    )
    seconds = time.perf_counter() - start
    length, drafting = len(prompt), getattr(output, "drafting", None)
    width = output.sequences.shape[1] - 1 - read_before
    depths = torch.tensor(decoding.depths)[:, None].expand(rows, width)
    full = flops_by_token(session.costs, depths, 0, length, read_before)
    flops, took = full, depths[:, length - 1 - read_before :]
    if cache is not None:
        flops = executed_flops(session.costs, cache, length, read_before)
        took = cache.recurrences[:, length - 1 :]
    found = []
    for row, tokens in enumerate(output.sequences[:, length:].tolist()):
        count = until_end(tokens, session.ends)
        read = slice(length - read_before + count - 1)
        spent, most = (float(one[row, read].sum()) for one in (flops, full))
        if drafting is not None:
            spent += drafting_flops(session.costs, drafting, decoding.cap, length, count - 1)
        recurrences = took[row, :count].tolist()
        found.append(Decoded(tokens[:count], recurrences, spent, most, seconds, drafting))
    return found


def until_end(tokens: list[int], ends: Collection[int]) -> int:
    """Return how many tokens there are up to the first that ends a text, itself included."""
    return next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))


@dataclass(frozen=True)
class Asked:
    """A prompt with a model that is ready to continue it."""

    session: Session
    decoding: Decoding
    prompt: list[int]

    def decode(self, cache: RecurrentCache | None, streamer: Any = None) -> list[Decoded]:
        """Continue the prompt."""
        new = self.decoding.config.max_new_tokens
        return decode(self.session, self.decoding, self.prompt, cache, new, streamer)

    def cache(self) -> RecurrentCache | None:
        """Make the cache that the decoding needs."""
        policy = self.decoding.policy
        return None if policy is None else RecurrentCache(self.session.model.config, policy)

    def answers(self, decoded: list[Decoded]) -> list[dict[str, Any]]:
        """Describe what was generated, one dict per depth."""
        model, tokenizer = self.session.model, self.session.tokenizer
        length, ends = len(self.prompt), self.session.ends
        return [
            answer(model, tokenizer, depth, length, one.text(ends)) | measured(one)
            for depth, one in zip(self.decoding.depths, decoded, strict=True)
        ]


def ask(config: GenerateConfig) -> Asked:
    """Load what a prompt needs, after everything that can be refused without it.

    Raises:
        UserError: The request does not fit the checkpoint or the memory.
    """
    shape = shape_of(config.model)
    decoding = plan_of(config, shape, config.recurrences)
    tokenizer = load_tokenizer(Path(config.model))
    prompt = prompt_tokens(config, tokenizer)
    check_length(shape, len(prompt), config.max_new_tokens)
    request = decoding.request(len(prompt), config.max_new_tokens)
    return Asked(open_session(config, shape, tokenizer, request), decoding, prompt)


def prompt_tokens(config: GenerateConfig, tokenizer: Any) -> list[int]:
    """Return the prompt's tokens.

    Raises:
        UserError: It is empty, or there is no chat template.
    """
    if not config.prompt:
        raise UserError("the prompt is empty: give some text with --prompt")
    if not config.chat:
        return encode(tokenizer, config.prompt)
    if tokenizer.chat_template is None:
        raise UserError(f"{config.model} has no chat template: leave --chat")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": config.prompt}], tokenize=False, add_generation_prompt=True
    )
    # A chat template writes the beginning of the text itself.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def generate(config: GenerateConfig) -> list[dict[str, Any]]:
    """Answer the prompt at each depth.

    Returns:
        One dict per depth: the text, its tokens, their iterations and the FLOPs they took.

    Raises:
        UserError: The request does not fit the checkpoint or the memory.
    """
    asked = ask(config)
    return asked.answers(asked.decode(asked.cache()))


def answer(model: Any, tokenizer: Any, depth: int, length: int, row: list[int]) -> dict[str, Any]:
    """Describe the continuation of a prompt of `length` tokens, up to where it ended itself."""
    ends = [place for place, token in enumerate(row) if token == tokenizer.eos_token_id]
    tokens = row[: ends[0]] if ends else row
    return {
        "num_recurrences": depth,
        "text": tokenizer.decode(tokens),
        "tokens": len(tokens),
        "flops_per_token": costs_of(model).forward_flops(depth, seq_len=length + len(tokens)),
    }


def measured(one: Decoded) -> dict[str, Any]:
    """Describe what an answer took; the iterations are those of every token, of its end too."""
    drafts = None
    if one.drafting is not None:
        rounds = max(1, one.drafting.rounds)
        drafts = {
            "depth": one.drafting.depth,
            "mean_tokens": one.drafting.drafted / rounds,
            "acceptance": one.drafting.acceptance,
            "tokens_per_round": one.drafting.emitted / rounds,
        }
    return {
        "recurrences": one.recurrences,
        "mean_recurrences": sum(one.recurrences) / len(one.recurrences),
        "executed_flops": one.flops,
        "full_depth_share": one.flops / one.full_flops,
        "seconds": one.seconds,
        "tokens_per_second": len(one.tokens) / one.seconds,
        "drafts": drafts,
    }


def summary(found: dict[str, Any]) -> str:
    """Return in one line what an answer took."""
    parts = [
        f"mean {found['mean_recurrences']:.1f} of {found['num_recurrences']} iterations",
        f"{found['executed_flops']:.3g} FLOPs executed, "
        f"{found['full_depth_share']:.0%} of full depth",
        f"{found['tokens']} tokens in {found['seconds']:.1f} s, "
        f"{found['tokens_per_second']:.1f} a second",
    ]
    if drafts := found["drafts"]:
        parts.insert(
            1,
            f"drafts of {drafts['mean_tokens']:.1f} tokens at depth {drafts['depth']}, "
            f"{drafts['acceptance']:.0%} accepted",
        )
    return "; ".join(parts)


def run(config: GenerateConfig) -> None:
    """Run `rondo generate`.

    Raises:
        UserError: The request does not fit the checkpoint or the memory.
    """
    if config.json_output:
        for one in generate(config):
            print(json.dumps(one, ensure_ascii=False))
        return
    asked = ask(config)
    colour = has_colour(sys.stdout, os.environ)
    shown = config.show_depth and colour
    cap = asked.decoding.cap
    if shown:
        print(legend(cap))
    print(config.prompt, end="", flush=True)
    if len(asked.decoding.depths) == 1:
        (one,) = _run_live(asked, shown)
        print("\n")
        _print_cost(config, one, colour)
        return
    decoded = asked.decode(asked.cache())
    found = asked.answers(decoded)
    print()
    for one, row in zip(found, decoded, strict=True):
        print(
            f"\n--- r = {one['num_recurrences']} ({one['tokens']} tokens, "
            f"{one['flops_per_token']:.3g} FLOPs per token)"
        )
        text = one["text"].strip()
        if shown:
            tokens = row.text(asked.session.ends)
            depths = row.recurrences[: len(tokens)]
            text = painted(asked.session.tokenizer, tokens, depths, cap)
        print(text)
        if config.show_depth or config.exit:
            _print_cost(config, one, colour)
    print(f"\n{len(found)} depths in one batch, {found[0]['seconds']:.1f} s")


def _run_live(asked: Asked, shown: bool) -> list[dict[str, Any]]:
    cache = asked.cache()
    length = len(asked.prompt)
    printer = token_printer(asked.session, asked.decoding, cache, length, shown, sys.stdout)
    return asked.answers(asked.decode(cache, printer))


def token_printer(
    session: Session,
    decoding: Decoding,
    cache: RecurrentCache | None,
    prompt: int,
    shown: bool,
    out: TextIO,
) -> TokenPrinter:
    """Return what prints the tokens after a prompt of so many as they come, coloured if shown."""

    def depth_of(place: int) -> int:
        # Without exits all take the depth, and drafts have not reached it yet when they are told.
        if cache is None or decoding.exit is None:
            return decoding.cap
        return int(cache.recurrences[0, prompt - 1 + place])

    return TokenPrinter(session.tokenizer, session.ends, depth_of, decoding.cap, out, shown)


def _print_cost(config: GenerateConfig, one: dict[str, Any], colour: bool) -> None:
    if config.show_depth and not colour:
        print(f"iterations: {runs(one['recurrences'])}")
    print(dim(summary(one), colour))
