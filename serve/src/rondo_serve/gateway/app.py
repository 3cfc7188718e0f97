"""`rondo gateway`: opens the way to vLLM, answers until it is told to stop, and ends in order."""

import os
from typing import Any

import httpx
import torch
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from rondo.flops import costs_of
from rondo.generation import shape_of
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo_serve.api.access import check_open, key_of, usage_of
from rondo_serve.api.errors import handle_errors
from rondo_serve.api.guard import guard
from rondo_serve.api.replies import Health, UsageReply
from rondo_serve.config import GatewayConfig
from rondo_serve.gateway.service import KEY, Gateway
from rondo_serve.governed import govern, sheets_of
from rondo_serve.governed import told as told_of_governance
from rondo_serve.policy import Limits
from rondo_serve.serve import bound, log_to_stderr, serve, told_of

# Seconds to reach vLLM; how long an answer may take is a setting.
TIMEOUTS = httpx.Timeout(None, connect=10.0)


def run(config: GatewayConfig) -> None:
    """Stand in front of vLLM until SIGTERM or Ctrl-C.

    Raises:
        UserError: Model, policy, keys or log do not hold, or the address cannot be had.
    """
    shape = shape_of(config.model)
    cap = min(config.max_recurrences or shape.max_recurrences, shape.max_recurrences)
    limits = Limits(min(shape.num_recurrences, cap), cap)
    sheets = sheets_of(config, limits, shape)
    # Shapes are enough to count what a token costs.
    with torch.device("meta"):
        costs = costs_of(RecurrentForCausalLM(shape))
    with bound(config.host, config.port) as listener:
        log_to_stderr()
        config = config.model_copy(update={"host": listener.getsockname()[0]})
        about = {"dtype": "auto", "device": "vllm", "upstream": config.upstream}
        governance = govern(config, limits, costs, sheets, about)
        client = client_of(config.upstream, os.environ.get(KEY))
        context = config.max_context or shape.max_position_embeddings
        gateway = Gateway(config, governance, costs, context, client)
        told = [*told_of_governance(governance, config), *told_of(listener, config)]
        try:
            serve(make_app(gateway), gateway, listener, config.grace_seconds, told)
        finally:
            governance.governor.close()


def client_of(upstream: str, key: str | None, **more: Any) -> httpx.AsyncClient:
    """Return what asks vLLM.

    Args:
        upstream: Its address.
        key: The key that it asks for.
        more: What httpx takes.
    """
    headers = {"accept-encoding": "identity"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    return httpx.AsyncClient(
        base_url=upstream,
        headers=headers,
        timeout=TIMEOUTS,
        # How many there may be is counted before.
        limits=httpx.Limits(max_connections=None),
        # Neither proxies nor passwords of this machine's user.
        trust_env=False,
        **more,
    )


def make_app(gateway: Gateway) -> FastAPI:
    """Return the app of a gateway."""
    config = gateway.config
    # The pages of its document load scripts from other servers.
    app = FastAPI(title="Rondo", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = gateway
    handle_errors(app)
    guard(app, gateway.gate, config)
    route_texts(app, gateway)
    route_operation(app, gateway)
    return app


def route_texts(app: FastAPI, gateway: Gateway) -> None:
    """Add what reaches vLLM."""

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await gateway.answer(request, "chat/completions")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await gateway.answer(request, "completions")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        return await gateway.models(request)


def route_operation(app: FastAPI, gateway: Gateway) -> None:
    """Add what clients and operators ask the gateway itself."""

    @app.get("/v1/usage")
    async def usage(request: Request) -> UsageReply:
        return usage_of(gateway.governance, request.headers)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> Health:
        return Health()

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz")
    async def readyz() -> Health:
        check_open(gateway.governance, gateway.gate)
        await gateway.fetch("/health", 503)
        return Health()

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        key_of(gateway.governance, request.headers, "metrics")
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)
