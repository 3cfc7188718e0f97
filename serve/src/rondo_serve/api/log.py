"""One line of JSON for each request, without what was said unless the operator wants it."""

import json
import logging
from typing import Any

from rondo_serve.api.answers import recurrence_of
from rondo_serve.api.calls import Call

LOGGER = logging.getLogger("rondo_serve.requests")


def line_of(call: Call, model: str, prompts: list[str] | None) -> dict[str, Any]:
    """Return what is told of a call that has ended.

    Args:
        call: The call.
        model: The model's name.
        prompts: The prompts as texts, where they and the answers are told.
    """
    ends = [call.finished[index] for index in sorted(call.finished)]
    receipts = [end.receipt for end in ends]
    depth = recurrence_of(call.asks[0].effort, receipts)
    told: dict[str, Any] = {
        "id": call.id,
        "model": model,
        "asked": depth["asked"] or depth.get("effort"),
        "allowed": depth["allowed"],
        "mean": round(depth["mean"], 3),
        "prompt_tokens": sum(receipt.prompt_tokens for receipt in receipts),
        "cached_tokens": sum(receipt.cached_tokens for receipt in receipts),
        "new_tokens": sum(receipt.new_tokens for receipt in receipts),
        "flops": depth["flops"],
        "seconds": round(max(receipt.seconds for receipt in receipts), 4),
        "outcome": sorted({end.reason for end in ends}),
    }
    if prompts is not None:
        answers = ["".join(call.texts.get(index, [])) for index in range(len(ends))]
        told |= {"prompts": prompts, "answers": answers}
    return told


def line_of_refusal(status: int, outcome: str, code: str | None, model: str) -> dict[str, Any]:
    """Return what is told of a request that was not taken; its message may hold what was said."""
    return {"id": None, "model": model, "outcome": [outcome], "status": status, "code": code}


def write(line: dict[str, Any]) -> None:
    """Write a line."""
    LOGGER.info(json.dumps(line))
