"""What answers say: OpenAI's fields, and the depth beside them. What is not set is left out."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from rondo_govern.rules import Adjustment

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str = Field(description="What is wrong, where, and what to do.")
    type: str
    param: str | None = Field(description="The field that is wrong.")
    code: str | None


class ErrorReply(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail


class ExitReply(BaseModel):
    """An exit as it was used."""

    rule: str
    threshold: float
    min_recurrences: int
    check_every: int


class RecurrenceReply(BaseModel):
    """The depth that answers asked for and took."""

    asked: int | None = Field(description="num_recurrences as it was asked for.")
    effort: str | None = Field(None, description="reasoning_effort as it was asked for.")
    allowed: int = Field(description="Depth r that was given: no token took more.")
    mean: float = Field(description="Mean iterations of the generated tokens.")
    max: int = Field(description="Iterations of the deepest.")
    by_depth: dict[str, int] = Field(description="Generated tokens by the iterations they took.")
    iterations: int = Field(description="Iterations of all tokens, those of the prompt too.")
    flops: float = Field(description="FLOPs executed.")
    floor: int | None = Field(None, description="Iterations that each token took at least.")
    tenant: str | None = Field(None, description="Who pays.")
    tier: str | None = Field(None, description="The policy's tier.")
    risks: list[str] | None = Field(None, description="Risk classes that applied.")
    adjusted: list[Adjustment] | None = Field(
        None, description="What made the depth another than the one asked for."
    )
    price: str | None = Field(None, description="Price of all iterations, as an exact decimal.")
    exit: ExitReply | None = None
    seed: int | None = Field(None, description="Seed of the draws.")
    ended_by: Literal["time", "shutdown", "cancelled"] | None = Field(
        None, description="What cut the answer off."
    )


class TokenReply(BaseModel):
    """A token with its depth."""

    text: str
    recurrences: int


class CachedTokens(BaseModel):
    """Where the prompt's keys and values came from."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(BaseModel):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """The token that came, and those that could have."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Those of an answer."""

    content: list[ChatLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Those of a completion."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(BaseModel):
    """What every choice and every piece of one may tell."""

    index: int
    finish_reason: FinishReason | None
    recurrence: RecurrenceReply | None = None
    recurrences: list[int] | None = Field(None, description="Iterations of this chunk's tokens.")
    tokens: list[TokenReply] | None = None


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Delta(BaseModel):
    """What a chunk adds to the model's turn."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(Choice):
    """An answer."""

    message: AnswerMessage
    logprobs: ChatLogprobs | None


class ChatPiece(Choice):
    """A piece of an answer."""

    delta: Delta
    logprobs: ChatLogprobs | None


class TextChoice(Choice):
    """A completion, or a piece of one."""

    text: str
    logprobs: TextLogprobs | None


class Reply(BaseModel):
    """What every body and every chunk tells."""

    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str


class ChatReply(Reply):
    """Answers to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    recurrence: RecurrenceReply


class ChatChunk(Reply):
    """A piece of one."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatPiece]
    usage: Usage | None = None
    recurrence: RecurrenceReply | None = None


class CompletionReply(Reply):
    """Continued texts, or a piece of one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage | None = None
    recurrence: RecurrenceReply | None = None


class Depths(BaseModel):
    """Depths that can be asked of a model."""

    default: int
    min: int
    max: int
    efforts: dict[str, int] = Field(description="What reasoning_effort stands for.")
    calibrated: dict[str, list[str]] = Field(
        description="Exit rules with thresholds of their own, by the loss they tolerate."
    )
    gate: bool = Field(description="Whether the model has a learned gate.")


class ModelReply(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["rondo"] = "rondo"
    max_model_len: int = Field(description="Tokens of prompt and answer together.")
    max_new_tokens: int = Field(description="Most tokens of an answer.")
    recurrence: Depths


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelReply]


class Spending(BaseModel):
    """What a key has spent of one quota."""

    limit: float
    spent: float
    held: float = Field(description="What requests in flight may still spend.")


class QuotaReply(BaseModel):
    """A quota, and how much of it is spent."""

    window: str
    ends: int = Field(description="When it begins anew, in seconds since 1970.")
    flops: Spending | None = None
    tokens: Spending | None = None


class UsageReply(BaseModel):
    """Whose a key is, and what it has spent."""

    key: str
    tenant: str
    tier: str
    quotas: list[QuotaReply]


class Health(BaseModel):
    """A state."""

    status: Literal["ok"] = "ok"


def dumped(reply: BaseModel) -> dict[str, Any]:
    """Return a reply as JSON holds it, without what was not told."""
    return reply.model_dump(mode="json", exclude_unset=True)
