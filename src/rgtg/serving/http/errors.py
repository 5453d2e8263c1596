"""Errors of the HTTP API in OpenAI's shape: {"error": {"message", "type", "param", "code", "request_id"}}."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from rgtg.errors import (
    BusyError,
    DataError,
    DeadlineError,
    NonFiniteError,
    NotServingError,
    PromptTooLongError,
    RgtgError,
    StoppedError,
    UsageError,
)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "unavailable_error"}
# Decoding setting → the request field that sets it.
_PARAMS = {
    "max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "stop": "stop",
    "logit_bias": "logit_bias", "chat_template_kwargs": "chat_template_kwargs",
    **{name: f"guidance.{name}" for name in (
        "method", "beta", "top_k", "entropy_gate", "n", "segment_length", "min_segment", "entropy_threshold",
        "reward_threshold", "threshold_start", "retries", "scorers", "proposal", "resample_finished", "kl_budget",
        "value_threshold", "abstain_below",
    )},
}  # fmt: skip
# Fields that only one kind of request has.
_ONLY_IN = {
    "messages": "chats: /v1/chat/completions", "chat_template_kwargs": "chats: /v1/chat/completions",
    "top_logprobs": "chats: /v1/chat/completions", "prompt": "/v1/completions", "echo": "/v1/completions",
}  # fmt: skip
# Settings whose names are also ordinary words, so they are not replaced inside a message.
_WORDS = {"method", "scorers", "prompt", "n"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(description="invalid_request_error, authentication_error, rate_limit_error, server_error …")
    param: str | None = Field(description="the request field that caused the error")
    code: str | None = Field(description="for programs: unknown_parameter, context_length_exceeded, queue_full …")
    request_id: str = Field(description="also in the header x-request-id, and in the server's log")


class ErrorBody(BaseModel):
    """The body of every answer whose status is not 2xx."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error that the client receives."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def type(self) -> str:
        """OpenAI's ``type`` field."""
        if self.status_code in _TYPES:
            return _TYPES[self.status_code]
        return "server_error" if self.status_code >= 500 else "invalid_request_error"

    def response(self, request_id: str) -> JSONResponse:
        """The HTTP response."""
        detail = {"message": self.detail, "type": self.type, "param": self.param, "code": self.code}
        return JSONResponse({"error": detail | {"request_id": request_id}}, self.status_code, dict(self.headers or {}))


@dataclass(frozen=True)
class ParameterNames:
    """The field names that one request uses, where the API offers several.

    Attributes:
        prompt: field of the prompt, or of the text to score.
        max_tokens: field of the number of new tokens.
        beta: field of the guidance strengths.
    """

    prompt: str | None = None
    max_tokens: str = "max_tokens"
    beta: str = "guidance.beta"

    def param(self, setting: str | None) -> str | None:
        """The request field that sets a decoding setting."""
        own = {"prompt": self.prompt, "max_new_tokens": self.max_tokens, "beta": self.beta}
        return own[setting] if setting in own else _PARAMS.get(setting or "")

    def translate(self, message: str, setting: str | None) -> str:
        """An error message with the names of decoding settings replaced by the request's field names."""
        param = self.param(setting)
        if setting and param and setting not in _WORDS and param.endswith(setting):
            message = _replace_word(message, setting, param)
        message = _replace_word(message, "max_new_tokens", self.max_tokens)
        return message if param is None or param in message else f"{param}: {message}"


def _replace_word(text: str, word: str, other: str) -> str:
    return re.sub(rf"(?<![\w.-]){word}(?![\w-])", other, text)


def from_rgtg(error: RgtgError, names: ParameterNames | None = None) -> ApiError:
    """The API error for one of rgtg's errors, with the field names that the request used."""
    names, setting = names or ParameterNames(), getattr(error, "setting", None)
    message = names.translate(str(error), setting)
    match error:
        case BusyError():
            return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        case NotServingError() | StoppedError():
            return ApiError(503, message, code="not_serving", headers={"Retry-After": "5"})
        case DeadlineError():
            return ApiError(503, message, code="deadline_exceeded", headers={"Retry-After": "5"})
        case NonFiniteError():  # a retry would fail in the same way
            return ApiError(500, message, code="non_finite", headers={"x-should-retry": "false"})
        case PromptTooLongError():
            return ApiError(400, message, param=names.prompt, code="context_length_exceeded")
        case DataError():
            return ApiError(400, message, param=names.prompt, code="invalid_prompt")
        case UsageError():
            return ApiError(400, message, param=names.param(setting), code="invalid_value")
    return ApiError(500, message)


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The API error for the first of pydantic's ``errors()``."""
    first = errors[0]
    path = [part if isinstance(part, int) else part[:80] for part in first["loc"] if part != "body"]
    param = _dotted(path)
    match first["type"]:
        case "json_invalid":
            return ApiError(400, "the body is not JSON", code="invalid_json")
        case "extra_forbidden":
            return _unknown_parameter(path)
        case "missing" if not path:
            return ApiError(400, "the body is empty; expected a JSON object", code="invalid_json")
        case "missing":
            return ApiError(400, f"{param} is required", param=param, code="missing_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None, code="invalid_value")


def _unknown_parameter(path: Sequence[Any]) -> ApiError:
    name = str(path[-1])
    param = ".".join(filter(None, (_dotted(path[:-1]), name)))
    elsewhere = _PARAMS.get(name, "") if len(path) == 1 else ""
    hint = f"; did you mean {elsewhere}?" if elsewhere not in ("", name) else ""
    if len(path) == 1 and name in _ONLY_IN:
        hint = f"; it is for {_ONLY_IN[name]}"
    return ApiError(400, f"unknown parameter: {param}{hint}", param=param, code="unknown_parameter")


def _dotted(path: Sequence[Any]) -> str:
    """``messages[0].content`` for ("messages", 0, "content", "#text"); the tags of unions are left out."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() or part.isdecimal():
            name += f".{part}" if name else part
    return name


def to_api_error(request: Request, error: Exception) -> ApiError:
    """The API error for any exception."""
    match error:
        case ApiError():
            return error
        case RgtgError():
            return from_rgtg(error)
        case RequestValidationError():
            return from_validation(error.errors())
        case HTTPException(status_code=status):
            messages = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not allowed here"}
            return ApiError(status, messages.get(status, str(error.detail)), headers=error.headers)
    return ApiError(500, "the server failed")
