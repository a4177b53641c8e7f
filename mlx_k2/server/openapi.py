"""The OpenAPI document of the server, made from the types of the request bodies. Knows no HTTP."""

from typing import Any

import msgspec

from mlx_k2 import __version__
from mlx_k2.server.chat_request import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from mlx_k2.server.messages_request import CountRequest, MessagesRequest
from mlx_k2.server.responses_request import ResponsesRequest

_SCHEMA_PATH = "#/components/schemas/{name}"
_ERROR_TEXTS = {
    "400": "The request cannot be served; the error names the field.",
    "401": "The key is missing or wrong.",
    "403": "The Host or Origin header is not allowed.",
    "404": "There is no such path, model or request.",
    "405": "The path has another method.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is compressed.",
    "429": "The queue is full; retry-after has the expected wait in seconds.",
    "500": "Unexpected error in the server.",
    "503": "The model is loading, or the stages start again; retry-after has the seconds to wait.",
}
_MESSAGES_ERROR_TEXTS = {
    "429": "The key has sent too many of these requests in a second.",
    "529": _ERROR_TEXTS["429"],
}
_POSTS: dict[str, tuple[str, type[msgspec.Struct] | None]] = {
    "/v1/chat/completions": ("Answer a conversation.", ChatRequest),
    "/v1/completions": ("Continue a text.", CompletionRequest),
    "/v1/messages": ("Answer a conversation in the format of Anthropic's API.", MessagesRequest),
    "/v1/messages/count_tokens": ("Return the number of tokens of a prompt.", CountRequest),
    "/v1/responses": ("Answer a conversation in the format of OpenAI's newer API.", ResponsesRequest),
    "/v1/requests/{id}/cancel": ("End a running request.", None),
    "/tokenize": ("Return token ids.", TokenizeRequest),
    "/detokenize": ("Return the text of token ids.", DetokenizeRequest),
}
_GETS = {
    "/health": "Return 200 if a request would be accepted now, else 503; no body.",
    "/metrics": "Return metrics in Prometheus' text format.",
    "/openapi.json": "Return this document.",
    "/v1/model-files": "Return the model's config, tokenizer and template, as base64.",
    "/v1/models": "Return the served model.",
    "/v1/models/{name}": "Return one model.",
    "/v1/responses/{id}": "Return a stored response.",
    "/v1/status": "Return the state, the stages and the running requests.",
    "/v1/status/events": "Return the status as server-sent events, at most 2 a second.",
}


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    types = [kind for _, kind in _POSTS.values() if kind is not None]
    _, schemas = msgspec.json.schema_components(types, ref_template=_SCHEMA_PATH)
    paths: dict[str, Any] = {path: {"get": _operation(path, text)} for path, text in _GETS.items()}
    for path, (text, kind) in _POSTS.items():
        operation = _operation(path, text)
        if kind is not None:
            content = {"application/json": {"schema": {"$ref": _SCHEMA_PATH.format(name=kind.__name__)}}}
            operation["requestBody"] = {"required": True, "content": content}
        paths[path] = {"post": operation}
    paths["/v1/responses/{id}"]["delete"] = _operation("/v1/responses/{id}", "Forget a stored response.")
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-k2", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": _ERROR_SCHEMA, "MessagesError": _MESSAGES_ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MESSAGES_ERROR_SCHEMA = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}


def _operation(path: str, text: str) -> dict[str, Any]:
    is_messages = path.startswith("/v1/messages")
    schema = {"$ref": _SCHEMA_PATH.format(name="MessagesError" if is_messages else "Error")}
    texts = _ERROR_TEXTS | _MESSAGES_ERROR_TEXTS if is_messages else _ERROR_TEXTS
    errors = {
        status: {"description": meaning, "content": {"application/json": {"schema": schema}}}
        for status, meaning in texts.items()
    }
    names = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return {"summary": text, "parameters": parameters, "responses": {"200": {"description": "Success."}} | errors}
