"""The OpenAPI document: bodies are read by hand, so they are written into it here."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from rondo_serve.api.bodies import ChatBody, CompletionBody
from rondo_serve.config import ServeConfig
from rondo_serve.governed import Governance

REF = "#/components/schemas/{model}"
HEADERS = {
    "x-request-id": {"schema": {"type": "string"}, "description": "The answer's id."},
    "x-rondo-recurrences-allowed": {
        "schema": {"type": "integer"},
        "description": "Depth r that was given.",
    },
    "x-rondo-adjusted": {
        "schema": {"type": "string"},
        "description": "What made it another than the one asked for, with commas between.",
    },
}
DESCRIPTION = (
    "OpenAI's API for a depth-recurrent model. A request says how deep it goes with "
    "`num_recurrences`, `exit` or `reasoning_effort`; an answer says what it took in `recurrence`."
)


class Documented(FastAPI):
    """An app whose document has the bodies of its requests, with this server's bounds.

    Args:
        governance: Bounds of depth.
        config: Other bounds.
        context: Tokens of prompt and answer together.
        **more: What FastAPI takes.
    """

    def __init__(self, governance: Governance, config: ServeConfig, context: int, **more: Any):
        super().__init__(
            title="Rondo",
            version="1",
            description=DESCRIPTION,
            # Their pages load scripts from other servers.
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            **more,
        )
        most = min(config.max_new_tokens, context - 1)
        self._bounds = {
            "max_tokens": (1, most),
            "max_completion_tokens": (1, most),
            "n": (1, config.max_choices),
        }
        # A policy takes any depth, and gives what it may.
        if governance.rules is None:
            limits = governance.limits
            self._bounds["num_recurrences"] = (limits.floor, limits.cap)

    def openapi(self) -> dict[str, Any]:
        """Return the document."""
        if self.openapi_schema:
            return self.openapi_schema
        document = super().openapi()
        bodies = (ChatBody, CompletionBody)
        _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=REF)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(found["$defs"])
        for body in bodies:
            for field, (least, most) in self._bounds.items():
                for one in schemas[body.__name__]["properties"].get(field, {}).get("anyOf", []):
                    if one.get("type") == "integer":
                        one |= {"minimum": least, "maximum": most}
        return document


def body_of(body: type[BaseModel]) -> dict[str, Any]:
    """Return what the document says of a route whose body is read by hand."""
    schema = {"$ref": REF.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answered(reply: type[BaseModel]) -> dict[str, Any]:
    """Return what the document says of an answer that may be a stream."""
    data = {"type": "string", "description": "A chunk as JSON, an error, or [DONE]."}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {
        "model": reply,
        "description": "The answer, or with stream: true its chunks as server-sent events.",
        "headers": HEADERS,
        "content": {"text/event-stream": {"itemSchema": event}},
    }
