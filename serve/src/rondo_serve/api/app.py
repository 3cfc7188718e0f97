"""The routes."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo_govern.rules import Denied
from rondo_serve.api import log
from rondo_serve.api.access import check_open, key_of, limits_of, risks_of, usage_of
from rondo_serve.api.answers import Kind, Teller
from rondo_serve.api.asks import Asker, Defaults
from rondo_serve.api.bodies import Asking, ChatBody, CompletionBody
from rondo_serve.api.calls import Call, Engine, Gate
from rondo_serve.api.document import Documented, answered, body_of
from rondo_serve.api.errors import ApiError, closed, documented, handle_errors, of_engine
from rondo_serve.api.guard import guard
from rondo_serve.api.logprobs import Speller
from rondo_serve.api.metrics import Metrics
from rondo_serve.api.page import Page
from rondo_serve.api.reading import read
from rondo_serve.api.replies import (
    ChatReply,
    CompletionReply,
    Depths,
    Health,
    ModelList,
    ModelReply,
    UsageReply,
)
from rondo_serve.config import ServeConfig
from rondo_serve.governed import Governance
from rondo_serve.policy import Allowed
from rondo_serve.requests import Ask, Busy, Closed, Finished, Refused

ASKING = documented(400, 401, 403, 404, 408, 413, 429, 500, 503)
READING = documented(401, 403, 503)

B = TypeVar("B", bound=Asking)


class Stream(StreamingResponse):
    """A stream that cancels its call however it ends, also where it never began."""

    def __init__(self, teller: Teller, headers: dict[str, str]):
        super().__init__(
            teller.chunks(),
            media_type="text/event-stream",
            headers=headers | {"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._call = teller.call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.cancel()


@dataclass
class Service:
    """What the routes share."""

    engine: Engine
    asker: Asker
    speller: Speller
    governance: Governance
    metrics: Metrics
    gate: Gate
    # One thread: tokenizers are not made for several at once.
    worker: ThreadPoolExecutor
    created: int

    async def answer(
        self, request: Request, body: type[B], asks_of: Callable[[B], list[Ask]], kind: Kind
    ) -> Response:
        """Answer a request for text.

        Raises:
            ApiError: It cannot be answered.
        """
        key = None
        try:
            if self.gate.closing.is_set():
                raise closed()
            key = key_of(self.governance, request.headers, "generate")
            told = await read(request, body, self.asker.config.max_body, self.worker)
            loop = asyncio.get_running_loop()
            asks = await loop.run_in_executor(self.worker, asks_of, told)
            risks = risks_of(request.headers, told.metadata)
            call = self._call([replace(ask, key=key, risks=risks) for ask in asks])
            try:
                call.submit()
            except (Refused, Denied, Busy, Closed) as error:
                raise of_engine(error) from error
        except ApiError as error:
            name, status = self.asker.name, error.status
            note_refusal(self.governance, self.metrics, name, key, status, error.code)
            raise
        teller = Teller(
            call,
            kind,
            self.speller,
            self.asker.name,
            tokens=bool(told.token_recurrences),
            usage=bool(told.stream_options and told.stream_options.include_usage),
            n=told.n or 1,
        )
        headers = {"x-request-id": call.id} | headers_of(call.allowed)
        if told.stream:
            return Stream(teller, headers)
        return JSONResponse(await while_there(request, teller), headers=headers)

    def _call(self, asks: list[Ask]) -> Call:
        durable = self.governance.governor.durable if self.governance.waits else None
        keeps = self.asker.config.log_prompts
        return Call(self.engine, asks, self._ended, keeps_texts=keeps, durable=durable)

    def _ended(self, call: Call, index: int, end: Finished) -> None:
        self.metrics.finished(end)
        if not call.done:
            return
        prompts = None
        if self.asker.config.log_prompts:
            prompts = [self.asker.tokenizer.decode(ask.prompt) for ask in call.asks]
        log.write(log.line_of(call, self.asker.name, prompts))

    def model(self, request: Request) -> ModelReply:
        """Return what is told of the model to whoever asks.

        Raises:
            ApiError: There is no key, or it does not hold.
        """
        shape, limits = self.asker.shape, limits_of(self.governance, request.headers)
        return ModelReply(
            id=self.asker.name,
            object="model",
            created=self.created,
            owned_by="rondo",
            max_model_len=self.asker.context,
            max_new_tokens=min(self.asker.config.max_new_tokens, self.asker.context - 1),
            recurrence=Depths(
                default=limits.default,
                min=limits.floor,
                max=limits.cap,
                efforts=dict(limits.depths),
                calibrated={rule: list(of) for rule, of in (shape.exit_rules or {}).items()},
                gate=shape.exit_gate,
            ),
        )


def headers_of(allowed: Sequence[Allowed]) -> dict[str, str]:
    """Return the headers that tell what a request was given, before anything is generated."""
    told = {"x-rondo-recurrences-allowed": str(max(one.depth for one in allowed))}
    if (grant := allowed[0].grant) is not None and grant.decision.adjusted:
        told["x-rondo-adjusted"] = ",".join(grant.decision.adjusted)
    return told


def note_refusal(
    governance: Governance,
    metrics: Metrics,
    model: str,
    key: str | None,
    status: int,
    code: str | None,
) -> None:
    """Take note of a request that was refused.

    Args:
        governance: Records it, where its key is known to be good.
        metrics: Count it.
        model: The model's name.
        key: Name of the key, None where none was found to be good.
        status: HTTP status of the answer.
        code: Its word for what is wrong.
    """
    outcome = outcome_of(status)
    if key is not None:
        governance.refuse(key, code or outcome, status)
    metrics.refused(outcome)
    log.write(log.line_of_refusal(status, outcome, code, model))


def outcome_of(status: int) -> str:
    """Return what metrics call a request that was not taken."""
    return {429: "busy", 503: "closed", 500: "error", 502: "error"}.get(status, "refused")


async def while_there(request: Request, teller: Teller) -> dict[str, Any]:
    """Return a whole body, and cancel its call when the client leaves.

    Raises:
        ApiError: An answer failed.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        teller.call.cancel()

    leaving = asyncio.create_task(left())
    try:
        return await teller.body()
    finally:
        leaving.cancel()
        teller.call.cancel()


def make_app(
    engine: Engine,
    tokenizer: Any,
    shape: RecurrentConfig,
    governance: Governance,
    config: ServeConfig,
) -> FastAPI:
    """Return the app over an engine that runs.

    Args:
        engine: Who answers.
        tokenizer: The model's.
        shape: The model's config.
        governance: What it is governed by.
        config: The server's settings.
    """
    service = Service(
        engine,
        Asker(tokenizer, shape, config, config.model_name, Defaults.of(config.model)),
        Speller(tokenizer),
        governance,
        Metrics(engine, governance),
        Gate(),
        ThreadPoolExecutor(1, "tokenizer"),
        int(time.time()),
    )

    app = Documented(governance, config, service.asker.context)
    app.state.service = service
    handle_errors(app)
    guard(app, service.gate, config)
    route_texts(app, service)
    route_models(app, service)
    route_operation(app, service)
    return app


def route_texts(app: FastAPI, service: Service) -> None:
    """Add what continues texts."""

    @app.post(
        "/v1/chat/completions",
        summary="Continue a conversation",
        responses={200: answered(ChatReply), **ASKING},
        openapi_extra=body_of(ChatBody),
    )
    async def chat(request: Request) -> Response:
        return await service.answer(request, ChatBody, service.asker.chat, "chat")

    @app.post(
        "/v1/completions",
        summary="Continue texts",
        responses={200: answered(CompletionReply), **ASKING},
        openapi_extra=body_of(CompletionBody),
    )
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionBody, service.asker.completion, "text")


def route_models(app: FastAPI, service: Service) -> None:
    """Add what tells of the model."""

    @app.get("/v1/models", summary="List the models: one", responses=READING)
    async def models(request: Request) -> ModelList:
        return ModelList(data=[service.model(request)])

    @app.get(
        "/v1/models/{model:path}",
        summary="Tell of a model",
        responses=documented(404, 401, 403, 503),
    )
    async def model(model: str, request: Request) -> ModelReply:
        told = service.model(request)
        if model != service.asker.name:
            message = f"there is no model {model[:200]!r} here: there is {service.asker.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return told

    @app.get("/v1/usage", summary="Tell what a key has spent of its quotas", responses=READING)
    async def usage(request: Request) -> UsageReply:
        return usage_of(service.governance, request.headers)


def route_operation(app: FastAPI, service: Service) -> None:
    """Add what operators and browsers ask for."""
    page = Page.of()

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Whether the process is alive", responses=READING)
    async def healthz() -> Health:
        return Health()

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="Whether requests are taken", responses=READING)
    async def readyz() -> Health:
        if service.engine.failure is not None:
            raise ApiError(503, f"the engine has failed: {service.engine.failure}")
        check_open(service.governance, service.gate)
        return Health()

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Metrics."}

    @app.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: text, **READING},
    )
    async def metrics(request: Request) -> Response:
        key_of(service.governance, request.headers, "metrics")
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page.html, media_type="text/html; charset=utf-8", headers=page.headers)
