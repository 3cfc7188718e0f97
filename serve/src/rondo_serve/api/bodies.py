"""What requests may say: OpenAI's fields, those of depth, and nothing unknown."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rondo.config.generate import Criterion
from rondo_serve.requests import Effort

MOST_STOPS = 4
# Turns of a conversation, and parts of one: more is no conversation.
MOST_ITEMS = 2048
WHOLE = 2**63 - 1

StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
# The first mistake is told: one error for each of a million items would stop the server.
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Iterations = Annotated[int, Field(ge=1, le=2**31 - 1)]
# What OpenAI's API knows and would change the answer: only the values that ask for nothing.
Nothing = Annotated[list[Any], Field(max_length=0)] | None
NoBias = Annotated[dict[str, Any], Field(max_length=0)] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None


class Body(BaseModel):
    """Strict: a number is no string, and a field that is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        # Likewise of many fields that are not known: one is told.
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        unknown = next(name for name in value if name not in cls.model_fields)
        known = {name: value[name] for name in cls.model_fields if name in value}
        return {unknown: value[unknown]} | known


class ExitBody(Body):
    """When a token leaves the loop before `num_recurrences`."""

    rule: Criterion = Field(description="What is read of the loop.")
    threshold: float | None = Field(
        None, ge=0, description="Leave below it; the checkpoint's calibrated one unless given."
    )
    tolerance: str | None = Field(
        None, description="Which calibrated threshold: the relative loss it tolerates, as 0.5%."
    )
    min_recurrences: Iterations | None = Field(None, description="Iterations every token takes.")
    check_every: Iterations | None = Field(None, description="Iterations between checks.")


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = Field(None, description="End with a chunk of usage.")
    include_obfuscation: bool | None = Field(None, description="Taken and ignored.")


class TextFormat(Body):
    """The only format of an answer."""

    type: Literal["text"]


class Asking(Body):
    """What both endpoints take."""

    model: str | None = Field(None, description="The model's name; the only one unless given.")
    stream: bool | None = Field(None, description="Send tokens as they come.")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128, description="Answers to each prompt.")
    stop: (
        StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)] | None
    ) = Field(None, description="Strings before which the text ends, four at most.")
    seed: int | None = Field(
        None,
        ge=-WHOLE - 1,
        le=WHOLE,
        description="Seed of the draws; drawn unless given, and told. A negative one stands for "
        "the one with the same lower 63 bits.",
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 takes the best token; the model's own unless given."
    )
    top_p: float | None = Field(None, ge=0, le=1, description="Nucleus.")
    top_k: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="How many of the best are drawn from; 0 takes all."
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Divides the odds of tokens that the text has already; the model's own "
        "unless given, 1 is none.",
    )
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of an answer.")
    num_recurrences: Iterations | None = Field(
        None, description="Iterations r of the core for each token; with an exit, the cap."
    )
    exit: ExitBody | None = Field(None, description="Let tokens leave the loop before r.")
    reasoning_effort: Effort | None = Field(
        None, description="Depth in OpenAI's words, where num_recurrences is not given."
    )
    token_recurrences: bool | None = Field(
        None, description="Tell each token's text and iterations, as streams always do."
    )
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: NoBias = None
    user: Any = None
    metadata: Any = Field(
        None, description="Its risk, if any, names risk classes; the rest is taken and ignored."
    )


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str | Annotated[list[TextPart], Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)]
    )
    name: str | None = None
    # What OpenAI's client sends back of its own answers: nothing, where there was nothing.
    refusal: None = None
    parsed: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None
    annotations: Nothing = None

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, value: Any) -> Any:
        # Told as what it is: a turn of tools has other roles and no content, too.
        if isinstance(value, dict) and (
            value.get("role") in ("tool", "function")
            or value.get("tool_calls")
            or value.get("function_call")
        ):
            raise PydanticCustomError("unsupported", "tools are not supported here")
        return value

    @property
    def turn(self) -> dict[str, str]:
        """What chat templates are given of it: they know no developer."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(Asking):
    """A conversation to continue."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "What is two and two?"}],
                    "num_recurrences": 4,
                    "max_completion_tokens": 16,
                }
            ]
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)]
    logprobs: bool | None = Field(None, description="Tell each token's logarithm of probability.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Of how many others, too.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most tokens of an answer, in OpenAI's newer word."
    )
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    verbosity: Any = None


class CompletionBody(Asking):
    """Texts to continue."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "Two and two is", "num_recurrences": 4, "max_tokens": 16},
                {
                    "prompt": "Two and two is",
                    "reasoning_effort": "high",
                    "exit": {"rule": "state_distance", "threshold": 0.05},
                    "max_tokens": 16,
                },
            ]
        }
    )

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    ) = Field(description="A text, texts, tokens, or lists of tokens.")
    logprobs: int | None = Field(
        None, ge=0, le=5, description="Tell each token's logarithm of probability, and of others."
    )
    echo: Annotated[bool, Field(json_schema_extra={"const": False})] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @field_validator("echo")
    @classmethod
    def _not_asked(cls, value: bool | None) -> bool | None:
        # A Literal would take 0 for false.
        if value:
            raise ValueError("must be false")
        return value


# Fields of OpenAI's that would change the answer.
UNSUPPORTED = frozenset(
    {
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "response_format",
        "modalities",
        "audio",
        "prediction",
        "web_search_options",
        "echo",
        "best_of",
        "suffix",
        "tool_calls",
        "refusal",
    }
)
