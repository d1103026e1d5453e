"""The OpenAPI description: FastAPI's, with the token, the guard's answers, and streams."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_GUARD: Final = {
    "400": "It cannot be done as asked",
    "401": "No token, or not the right one",
    "403": "A page of another origin",
    "408": "The body did not come in time",
    "413": "The body is too large",
    "421": "Another host was asked for",
    "431": "Too many or too large headers",
    "500": "Something went wrong here",
    "503": "The server is stopping",
}
_STREAMS: Final = ("/v1/chat/completions", "/v1/completions")


def described(api: FastAPI) -> dict[str, Any]:
    """The description, made once."""
    if api.openapi_schema is None:
        made = get_openapi(
            title="luthier",
            version="1",
            description="An OpenAI-compatible API before one local engine. Every path but /health needs a token.",
            routes=api.routes,
        )
        made.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in made["paths"].items():
            for operation in operations.values():
                _complete(path, operation)
        schemas = made["components"].get("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        api.openapi_schema = made
    return api.openapi_schema


def _complete(path: str, operation: dict[str, Any]) -> None:
    operation["security"] = [] if path == "/health" else [{"token": []}]
    answers = operation["responses"]
    answers.pop("422", None)
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}}
    for status, words in _GUARD.items():
        answers.setdefault(status, {"description": words, "content": refusal})
    for status, answer in answers.items():
        # FastAPI gives errors the form of the route's own answer.
        if int(status) >= 400 and path != "/health":
            answer["content"] = refusal
    if path in _STREAMS:
        answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
