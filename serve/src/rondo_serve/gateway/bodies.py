"""What the gateway reads of a body, and what becomes of it: all else goes on as it came."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from rondo_govern.efforts import Effort
from rondo_serve.api.asks import prompts_of
from rondo_serve.api.bodies import WHOLE, Iterations, StopText, Tokens
from rondo_serve.api.errors import ApiError

FIELD = "num_recurrences"
SAMPLING = ("temperature", "top_p", "top_k", "seed", "repetition_penalty")
# What a chat template may write out longer than it came.
TEMPLATED = ("tools", "documents", "chat_template", "chat_template_kwargs")
REFUSED = {
    "exit": "exits are not there behind vLLM",
    "use_beam_search": "vLLM's beams run at its own depth, whatever is allowed",
    "prompt_embeds": "how long such a prompt is cannot be told here",
}
# Ours: vLLM would ignore them, or they would call its answer by another name than the log's.
OURS = (FIELD, *REFUSED, "max_completion_tokens", "request_id")


class Onward(BaseModel):
    """Strict about what it reads, so that vLLM reads the same; open for all else."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Onward):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatOnward(Onward):
    """A conversation to continue.

    Attributes:
        around: Tokens that a chat template puts around messages, at most.
    """

    around: ClassVar[int] = 256
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    best_of: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    num_recurrences: Iterations | None = None
    reasoning_effort: Effort | None = None
    vllm_xargs: dict[str, Any] | None = None
    metadata: Any = None
    return_token_ids: bool | None = None
    exit: Any = None
    use_beam_search: Any = None
    prompt_embeds: Any = None
    # What the log tells: a number is no text here, which vLLM would read as one.
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-WHOLE - 1, le=WHOLE)
    seed: int | None = Field(None, ge=-WHOLE - 1, le=WHOLE)
    repetition_penalty: float | None = None
    stop: StopText | list[StopText] | None = None

    @property
    def num_prompts(self) -> int:
        """How many texts are continued."""
        return 1

    @property
    def most(self) -> int | None:
        """Most tokens of an answer that are asked for."""
        return self.max_completion_tokens or self.max_tokens


class TextOnward(ChatOnward):
    """Texts to continue."""

    # Where a tokenizer puts one before a text, the quotes stand for it.
    around: ClassVar[int] = 0
    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    )

    @property
    def num_prompts(self) -> int:
        """How many texts are continued."""
        return len(prompts_of(self.prompt))

    @property
    def most(self) -> int | None:
        """Most tokens of an answer that are asked for; vLLM reads no newer word here."""
        return self.max_tokens


def check(told: ChatOnward) -> None:
    """Refuse what would get around what is allowed, or cannot be counted.

    Raises:
        ApiError: It would.
    """
    for name, reason in REFUSED.items():
        if getattr(told, name):
            raise ApiError(400, f"{reason}: leave {name}", name, "unsupported")
    if (told.best_of or 1) > (told.n or 1):
        message = "more answers are not computed than are given: leave best_of or give n"
        raise ApiError(400, message, "best_of", "unsupported")
    newer = told.max_completion_tokens
    if newer and told.max_tokens and newer != told.max_tokens:
        message = "max_tokens and max_completion_tokens mean the same and differ: leave one"
        raise ApiError(400, message, "max_completion_tokens")


def depth_of(told: ChatOnward) -> int | None:
    """Return the depth that a body asks for, in our word or in vLLM's.

    Raises:
        ApiError: It asks for several, or for none that there is.
    """
    ours, theirs = told.num_recurrences, (told.vllm_xargs or {}).get(FIELD)
    if theirs is not None and (type(theirs) is not int or theirs < 1):
        param = f"vllm_xargs.{FIELD}"
        raise ApiError(400, f"{param} must be a whole number from 1 on", param, "invalid_value")
    if ours and theirs and ours != theirs:
        message = f"{FIELD} and vllm_xargs.{FIELD} mean the same and differ: leave one"
        raise ApiError(400, message, FIELD)
    if (ours or theirs) and told.reasoning_effort is not None:
        message = f"{FIELD} and reasoning_effort both say how deep: leave one"
        raise ApiError(400, message, "reasoning_effort")
    return ours or theirs


def prompt_bound(told: ChatOnward, context: int) -> int:
    """Return how many tokens a prompt has at most: none is less than a byte of the body."""
    if any((told.model_extra or {}).get(name) for name in TEMPLATED):
        return context
    size = len(told.model_dump_json(exclude_unset=True).encode())
    return min(size + told.around, context)


def onward(told: ChatOnward, depth: int, new_tokens: int, with_ids: bool) -> bytes:
    """Return the body that goes on.

    Args:
        told: The body that came; of fields that came twice, the last.
        depth: Depth that is allowed.
        new_tokens: Most tokens of an answer.
        with_ids: Whether vLLM is asked for the numbers of the tokens.
    """
    body = told.model_dump(exclude_unset=True)
    for name in OURS:
        body.pop(name, None)
    body["vllm_xargs"] = {**(told.vllm_xargs or {}), FIELD: depth}
    body["max_tokens"] = new_tokens
    if with_ids:
        body["return_token_ids"] = True
    if told.stream:
        counted = {"include_usage": True, "continuous_usage_stats": True}
        body["stream_options"] = {**(body.get("stream_options") or {}), **counted}
    return to_json(body)
