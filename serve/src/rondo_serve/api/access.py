"""Who asks: the key of a request, and the risk classes that it names."""

import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers

from rondo_govern.keys import Scope
from rondo_govern.quotas import Standing
from rondo_govern.rules import Denied
from rondo_serve.api.calls import Gate
from rondo_serve.api.errors import ApiError, closed, of_denied
from rondo_serve.api.replies import QuotaReply, Spending, UsageReply
from rondo_serve.governed import Governance
from rondo_serve.policy import Limits

RISK = "x-rondo-risk"


def key_of(governance: Governance, headers: Mapping[str, str], scope: Scope | None = None) -> str:
    """Return the name of the key that asks, empty where none is asked for.

    Args:
        governance: What the server is governed by.
        headers: The request's.
        scope: What the key must be for, None for any that holds.

    Raises:
        ApiError: There is no key, it does not hold, or it is not for that.
    """
    if governance.keys is None:
        return ""
    kind, _, secret = headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not secret:
        message = "a key is needed: send it as the header Authorization: Bearer KEY"
        raise of_denied(Denied(message, 401, "missing_api_key"))
    try:
        keyring, _ = governance.keys.value
        key = keyring.holder(secret.strip(), time.time())
        if scope is not None:
            key.may(scope)
    except Denied as error:
        raise of_denied(error) from error
    return key.name


def limits_of(governance: Governance, headers: Mapping[str, str]) -> Limits:
    """Return the bounds of depth of whoever asks.

    Raises:
        ApiError: There is no key, it does not hold, or it is of no tier.
    """
    key = key_of(governance, headers)
    try:
        return governance.limits_of(key)
    except Denied as error:
        raise of_denied(error) from error


def risks_of(headers: Headers, metadata: Any) -> frozenset[str]:
    """Return the risk classes that a request names, in its headers and in its metadata.

    Raises:
        ApiError: Its metadata's is no text.
    """
    # All of them: a proxy may have added one to what the client sent.
    told = headers.getlist(RISK)
    if isinstance(metadata, dict) and (risk := metadata.get("risk")) is not None:
        if not isinstance(risk, str):
            message = "metadata.risk must be the name of a risk class, or several with commas"
            raise ApiError(400, message, "metadata.risk", "invalid_value")
        told.append(risk)
    return frozenset(name.strip() for one in told for name in one.split(",") if name.strip())


def check_open(governance: Governance, gate: Gate) -> None:
    """Pass where requests are taken.

    Raises:
        ApiError: The server shuts down, or can record nothing until it is started again.
    """
    if gate.closing.is_set():
        raise closed()
    if governance.governor.log is not None and governance.governor.log.failed:
        raise ApiError(503, "the audit log has failed: the operator must restart", code="no_audit")


def usage_of(governance: Governance, headers: Mapping[str, str]) -> UsageReply:
    """Return what the key that asks has spent of its quotas.

    Raises:
        ApiError: There is no key, or it does not hold.
    """
    key = key_of(governance, headers)
    try:
        seat, standings = governance.governor.standing(key)
    except Denied as error:
        raise of_denied(error) from error
    quotas = [quota_of(one) for one in standings]
    return UsageReply(key=seat.key, tenant=seat.tenant, tier=seat.tier, quotas=quotas)


def quota_of(standing: Standing) -> QuotaReply:
    """Return what is told of a quota."""
    quota, told = standing.quota, {}
    for name in ("flops", "tokens"):
        if (limit := getattr(quota, name)) is not None:
            spent, held = getattr(standing, name), getattr(standing, f"held_{name}")
            told[name] = Spending(limit=limit, spent=spent, held=held)
    return QuotaReply(window=quota.window, ends=standing.ends, **told)
