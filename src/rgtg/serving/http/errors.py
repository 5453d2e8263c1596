"""Every refusal and failure in OpenAI's shape: {"error": {"message", "type", "param", "code", "request_id"}}."""

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
# What requests call settings of decoding.
_PARAMS = {
    "max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "stop": "stop",
    **{name: f"guidance.{name}" for name in (
        "method", "beta", "top_k", "entropy_gate", "n", "segment_length", "min_segment", "entropy_threshold",
        "reward_threshold", "threshold_start", "retries", "scorers",
    )},
}  # fmt: skip
# Settings whose names are words of other meaning too, which texts keep.
_WORDS = {"method", "scorers", "prompt", "n"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(description="invalid_request_error, authentication_error, rate_limit_error, server_error …")
    param: str | None = Field(description="the field of the request that is at fault")
    code: str | None = Field(description="for programs: unknown_parameter, context_length_exceeded, queue_full …")
    request_id: str = Field(description="also in the header x-request-id, and in the server's log")


class ErrorBody(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail


class ApiError(HTTPException):
    """A refusal or failure that a client is told."""

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
        self.message, self.param, self.code = message, param, code

    @property
    def kind(self) -> str:
        """OpenAI's ``type``."""
        if self.status_code in _TYPES:
            return _TYPES[self.status_code]
        return "server_error" if self.status_code >= 500 else "invalid_request_error"

    def body(self, request_id: str) -> dict[str, Any]:
        """The answer's JSON."""
        detail = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": detail | {"request_id": request_id}}

    def response(self, request_id: str) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(request_id), self.status_code, dict(self.headers or {}))


@dataclass(frozen=True)
class Written:
    """What a client has written: its names for what a request may call one way or another.

    Attributes:
        prompt: the field of the prompt, or of what else is read.
        length: of the number of new tokens.
        strengths: of the betas.
    """

    prompt: str | None = None
    length: str = "max_tokens"
    strengths: str = "guidance.beta"

    def param(self, setting: str | None) -> str | None:
        """The field that sets a setting of decoding."""
        own = {"prompt": self.prompt, "max_new_tokens": self.length, "beta": self.strengths}
        return own[setting] if setting in own else _PARAMS.get(setting or "")

    def text(self, text: str, setting: str | None) -> str:
        """A refusal in these names: of the setting that is at fault, and of the length."""
        param = self.param(setting)
        if setting and param and setting not in _WORDS and param.endswith(setting):
            text = _renamed(text, setting, param)
        text = _renamed(text, "max_new_tokens", self.length)
        return text if param is None or param in text else f"{param}: {text}"


def _renamed(text: str, name: str, other: str) -> str:
    """A text with a name, where it stands alone, in other words."""
    return re.sub(rf"(?<![\w.-]){name}(?![\w-])", other, text)


def from_rgtg(error: RgtgError, written: Written | None = None) -> ApiError:
    """What a client is told of an error of ours, in the names that it used."""
    written, setting = written or Written(), getattr(error, "setting", None)
    text = written.text(str(error), setting)
    match error:
        case BusyError():
            return ApiError(429, text, code="queue_full", headers={"Retry-After": "1"})
        case NotServingError() | StoppedError():
            return ApiError(503, text, code="not_serving", headers={"Retry-After": "5"})
        case DeadlineError():
            return ApiError(503, text, code="deadline_exceeded", headers={"Retry-After": "5"})
        case NonFiniteError():  # the same request would fail again
            return ApiError(500, text, code="non_finite", headers={"x-should-retry": "false"})
        case PromptTooLongError():
            return ApiError(400, text, param=written.prompt, code="context_length_exceeded")
        case DataError():
            return ApiError(400, text, param=written.prompt, code="invalid_prompt")
        case UsageError():
            return ApiError(400, text, param=written.param(setting), code="invalid_value")
    return ApiError(500, text)


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body, in a line; ``errors`` are pydantic's."""
    first = errors[0]
    where = [part if isinstance(part, int) else part[:80] for part in first["loc"] if part != "body"]
    param = _dotted(where)
    match first["type"]:
        case "json_invalid":
            return ApiError(400, "the body is not JSON", code="invalid_json")
        case "extra_forbidden":
            return _unknown(where)
        case "missing" if not where:
            return ApiError(400, "the body is empty; expected a JSON object", code="invalid_json")
        case "missing":
            return ApiError(400, f"{param} is required", param=param, code="missing_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None, code="invalid_value")


def _unknown(where: Sequence[Any]) -> ApiError:
    name = str(where[-1])
    param = ".".join(filter(None, (_dotted(where[:-1]), name)))
    elsewhere = _PARAMS.get(name, "") if len(where) == 1 else ""
    hint = f"; did you mean {elsewhere}?" if elsewhere else ""
    return ApiError(400, f"unknown parameter: {param}{hint}", param=param, code="unknown_parameter")


def _dotted(where: Sequence[Any]) -> str:
    """messages[0].content of ("messages", 0, "content", "#text"): the kinds of a union are left out."""
    name = ""
    for part in where:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier():
            name += f".{part}" if name else part
    return name


def request_id_of(request: Request) -> str:
    """The id that the outermost layer gave the request."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def told(request: Request, error: Exception) -> ApiError:
    """What a client is told of anything that was raised."""
    match error:
        case ApiError():
            return error
        case RgtgError():
            return from_rgtg(error)
        case RequestValidationError():
            return from_validation(error.errors())
        case HTTPException(status_code=status):
            words = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not allowed here"}
            return ApiError(status, words.get(status, str(error.detail)), headers=error.headers)
    return ApiError(500, "the server failed")
