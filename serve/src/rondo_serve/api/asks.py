"""From a body to what the engine is asked: defaults filled in, texts as tokens, bounds kept."""

import dataclasses
import json
import secrets
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from rondo.chat import chat_tokens
from rondo.data import encode
from rondo.decoding import spelled
from rondo.errors import UserError
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.exits_recurrent import ExitRule
from rondo.modeling.generation_recurrent import calibrated
from rondo_serve.api.bodies import WHOLE, Asking, ChatBody, CompletionBody, ExitBody
from rondo_serve.api.errors import ApiError
from rondo_serve.config import ServeConfig
from rondo_serve.requests import Ask, Sampling

# Answers to one request, however long the queue is.
MOST_ANSWERS = 128


@dataclass(frozen=True)
class Defaults:
    """How tokens are chosen where a request does not say."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, model: str) -> "Defaults":
        """Read those of a checkpoint: what its generation config says."""
        try:
            stored = json.loads((Path(model) / "generation_config.json").read_text())
        except (OSError, ValueError):
            return cls()
        if not isinstance(stored, dict):
            return cls()
        # A penalty is none of sampling's: the best token is taken after it, too.
        names = ["repetition_penalty"]
        if stored.get("do_sample"):
            names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: stored[name] for name in names if stored.get(name) is not None})


@dataclass(frozen=True)
class Asker:
    """Makes asks of bodies.

    Attributes:
        tokenizer: The model's.
        shape: The model's config.
        config: The server's settings.
        name: What the model is called.
        defaults: How tokens are chosen where a request does not say.
    """

    tokenizer: Any
    shape: RecurrentConfig
    config: ServeConfig
    name: str
    defaults: Defaults

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together at most."""
        return self.config.max_context or self.shape.max_position_embeddings

    def chat(self, body: ChatBody) -> list[Ask]:
        """Return the asks of a conversation.

        Raises:
            ApiError: The body asks for what cannot be.
        """
        self._check(body, 1)
        newer = body.max_completion_tokens
        if newer and body.max_tokens and newer != body.max_tokens:
            message = "max_tokens and max_completion_tokens mean the same and differ: leave one"
            raise ApiError(400, message, "max_completion_tokens")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        told = [one.turn for one in body.messages]
        try:
            prompt = chat_tokens(self.tokenizer, told)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            reason = " ".join(str(error).split())
            message = f"the model's chat template does not take these messages: {reason}"
            raise ApiError(400, message, "messages") from error
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        limit = ("max_completion_tokens", newer) if newer else ("max_tokens", body.max_tokens)
        return self._asks("chatcmpl", body, [prompt], limit, logprobs, "messages")

    def completion(self, body: CompletionBody) -> list[Ask]:
        """Return the asks of texts to continue, the choices of each one after another.

        Raises:
            ApiError: The body asks for what cannot be.
        """
        told = prompts_of(body.prompt)
        self._check(body, len(told))
        prompts = [self._tokens(prompt) for prompt in told]
        limit = ("max_tokens", body.max_tokens)
        return self._asks("cmpl", body, prompts, limit, body.logprobs, "prompt")

    def _check(self, body: Asking, num_prompts: int) -> None:
        """Refuse what can be refused before anything is read."""
        if body.model is not None and body.model != self.name:
            message = f"there is no model {body.model[:200]!r} here: there is {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        if body.num_recurrences is not None and body.reasoning_effort is not None:
            message = "num_recurrences and reasoning_effort both say how deep: leave one"
            raise ApiError(400, message, "reasoning_effort")
        if body.stream_options is not None and not body.stream:
            message = "stream_options goes with stream: true: leave it or stream"
            raise ApiError(400, message, "stream_options")
        if (body.n or 1) > self.config.max_choices:
            message = f"n is {body.n}, and {self.config.max_choices} answers are given to a prompt"
            raise ApiError(400, f"{message} at most: send several requests", "n")
        # What the queue never takes would be told to come back for ever.
        room = min(MOST_ANSWERS, self.config.max_queue + self.config.max_running)
        if (answers := (body.n or 1) * num_prompts) > room:
            param = "n" if num_prompts == 1 else "prompt"
            message = f"{answers} answers are asked for at once, and {room} are given at most"
            raise ApiError(400, f"{message}: send several requests", param)

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return encode(self.tokenizer, prompt)
        if (highest := max(prompt)) >= self.shape.vocab_size:
            message = f"there is no token {highest}: the model has {self.shape.vocab_size}"
            raise ApiError(400, message, "prompt")
        return prompt

    def _asks(
        self,
        kind: str,
        body: Asking,
        prompts: list[list[int]],
        limit: tuple[str, int | None],
        logprobs: int | None,
        param: str,
    ) -> list[Ask]:
        name = f"{kind}-{uuid.uuid4().hex}"
        rule = self._exit(body.exit)
        # Short enough that every language's numbers hold it.
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed & WHOLE
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        found: list[Ask] = []
        for prompt in prompts:
            new = self._room(prompt, *limit, param)
            for _ in range(body.n or 1):
                ask = Ask(
                    id=f"{name}-{len(found)}",
                    prompt=tuple(prompt),
                    max_new_tokens=new,
                    num_recurrences=body.num_recurrences,
                    effort=body.reasoning_effort,
                    exit=rule,
                    sampling=self._sampling(body, (seed + len(found)) % (WHOLE + 1), logprobs),
                    stop=stop,
                )
                found.append(ask)
        return found

    def _room(self, prompt: list[int], name: str, most: int | None, param: str) -> int:
        """Return how many tokens may follow a prompt."""
        if not prompt:
            raise ApiError(400, "the prompt holds no token: give a text", param)
        if most is not None and most > self.config.max_new_tokens:
            message = (
                f"{name} {most} is beyond the {self.config.max_new_tokens} that this server "
                "gives: ask for fewer"
            )
            raise ApiError(400, message, name)
        room = self.context - len(prompt)
        if room < (most or 1):
            message = (
                f"the prompt has {len(prompt)} tokens, which with {most or 1} new ones exceed the "
                f"{self.context} that the model takes: shorten it or ask for fewer"
            )
            raise ApiError(400, message, param, "context_length_exceeded")
        return most or min(self.config.default_new_tokens, room)

    def _sampling(self, body: Asking, seed: int, logprobs: int | None) -> Sampling:
        told = {name: getattr(body, name) for name in dataclasses.asdict(self.defaults)}
        given = {name: value for name, value in told.items() if value is not None}
        how = dataclasses.replace(self.defaults, **given)
        # Other servers write -1 for all.
        how = dataclasses.replace(how, top_k=max(0, how.top_k))
        return Sampling(**dataclasses.asdict(how), seed=seed, logprobs=logprobs)

    def _exit(self, body: ExitBody | None) -> ExitRule | None:
        """Return the rule of an exit, with the calibrated threshold unless one is given."""
        if body is None:
            return None
        if body.rule == "gate" and not self.shape.exit_gate:
            message = "the model has no exit gate: choose another rule"
            raise ApiError(400, message, "exit.rule")
        if body.threshold is not None and body.tolerance is not None:
            message = "exit.tolerance names a calibrated threshold: leave it or exit.threshold"
            raise ApiError(400, message, "exit.tolerance")
        own = {
            name: value
            for name in ("min_recurrences", "check_every")
            if (value := getattr(body, name)) is not None
        }
        if body.threshold is not None:
            return ExitRule(body.rule, body.threshold, **own)
        if not (self.shape.exit_rules or {}).get(body.rule):
            message = f"the model has no calibrated {body.rule} exit: give exit.threshold"
            raise ApiError(400, message, "exit.rule")
        param = "exit.rule" if body.tolerance is None else "exit.tolerance"
        try:
            tolerance = None if body.tolerance is None else spelled(body.tolerance)
            return dataclasses.replace(calibrated(self.shape, body.rule, tolerance), **own)
        except (ValueError, UserError) as error:
            raise ApiError(400, f"exit: {error}", param) from error


def prompts_of(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Any]:
    """Return the prompts that a completion's `prompt` holds, as texts or tokens."""
    if isinstance(prompt, str) or all_whole(prompt):
        return [prompt]
    return list(prompt)


def all_whole(items: Iterable[Any]) -> bool:
    """Return whether all of some items are whole numbers: one prompt, as tokens."""
    return all(isinstance(item, int) for item in items)
