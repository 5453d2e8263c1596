"""OpenAI's batch format: lines of custom_id, method, url and body, read as prompts with their own decoding settings.

A field that decoding here does not support is an error, unless it is null or has OpenAI's default value.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from rgtg.config import DecodingSettings
from rgtg.data.formats import json_name, require_prompt, to_chat
from rgtg.data.sources import RejectReason, RowError
from rgtg.tokenization.conversation import Message

Endpoint = Literal["chat", "completions"]
ENDPOINTS: dict[str, Endpoint] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_LINE = ("custom_id", "method", "url", "body")
# OpenAI's names of our settings, and our settings that a body may hold.
_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_OWN = set(DecodingSettings.model_fields) - {"method", "n", "seed"}
# Values that change nothing.
_DEFAULTS: dict[str, Any] = {
    "n": 1, "best_of": 1, "stream": False, "echo": False, "logprobs": False, "frequency_penalty": 0,
    "presence_penalty": 0, "logit_bias": {}, "tools": [], "store": False, "response_format": {"type": "text"},
}  # fmt: skip
# Why decoding here does not support a field of OpenAI's, and what to do instead.
_TEXT_ONLY = "the models here read and write text"
_NO_TOOLS = "replies are not parsed into tool calls; describe the tools in a message, and read the reply's text"
_NO_PENALTY = "tokens are not penalised by their counts; use logit_bias against single tokens"
REASONS = {
    "response_format": "replies are not constrained to a format; ask for it in a message, and check the reply",
    **dict.fromkeys(("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"), _NO_TOOLS),
    "tool_calls": _NO_TOOLS,
    "web_search_options": "nothing is looked up; put what the model should know into a message",
    "frequency_penalty": _NO_PENALTY,
    "presence_penalty": _NO_PENALTY,
    "audio": _TEXT_ONLY,
    "modalities": _TEXT_ONLY,
    "chat_template": "the models' own are used; set their variables with chat_template_kwargs",
    "suffix": "the models here continue a text; they do not fill a gap",
    "best_of": "use n, or guidance.method best-of-n with a scorer",
    "prediction": "drafts are a setting of rgtg generate (draft), not of a request",
    "reasoning_effort": "whether a model reasons is up to its chat template",
    "verbosity": "ask for a length in a message, or set max_tokens",
    "store": "requests are not stored",
    "metadata": "requests are not stored",
}


def not_supported(name: str) -> str:
    """Why a field of OpenAI's is refused."""
    return f"not supported: {REASONS[name]}" if name in REASONS else "not supported; leave it out"


@dataclass(frozen=True)
class BatchRequest:
    """What one line requests. ``settings`` are decoding settings under our names."""

    prompt: str | list[Message]
    endpoint: Endpoint
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    model: str | None = None


def is_batch_line(row: Any) -> bool:
    """Whether a row is a line of a batch rather than a prompt with other fields."""
    return isinstance(row, dict) and "body" in row and ("url" in row or "custom_id" in row)


def to_request(row: dict[str, Any]) -> BatchRequest:
    """Read one line; the caller checks its ``custom_id``.

    Raises:
        RowError: it is not a line of a batch, or requests something unsupported.
    """
    _reject(set(row) - set(_LINE), "")
    if row.get("method") != "POST":
        raise RowError(RejectReason.BAD_VALUE, f'method is {row.get("method")!r:.40}, expected "POST"')
    url, body = row.get("url"), row["body"]
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise RowError(RejectReason.BAD_VALUE, f"url is {url!r:.60}, expected {' or '.join(ENDPOINTS)}")
    if not isinstance(body, dict):
        raise RowError(RejectReason.WRONG_TYPE, f"body is {json_name(body)}, expected an object")
    asked = {name: value for name, value in body.items() if value is not None}
    model = asked.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise RowError(RejectReason.WRONG_TYPE, f"body.model is {json_name(model)}, expected text")
    endpoint = ENDPOINTS[url]
    prompt = _prompt(asked, endpoint)
    return BatchRequest(prompt, endpoint, _settings(asked), _seed(asked), model)


def _prompt(asked: dict[str, Any], endpoint: Endpoint) -> str | list[Message]:
    name = "messages" if endpoint == "chat" else "prompt"
    if name not in asked:
        raise RowError(RejectReason.MISSING_FIELD, f"body.{name}")
    value = asked.pop(name)
    if endpoint == "chat":
        return to_chat(value, "body.messages")
    if not isinstance(value, str):
        raise RowError(RejectReason.WRONG_TYPE, f"body.prompt is {json_name(value)}, expected one text")
    return require_prompt(value)


def _settings(asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in asked.items():
        if name == "seed" or _is_default(name, value):
            continue
        ours = _NAMES.get(name, name)
        if ours not in _OWN:
            _reject({name}, "body.")
        if ours in found and found[ours] != value:
            raise RowError(RejectReason.BAD_VALUE, f"body.{name} contradicts another limit on the length")
        found[ours] = [value] if ours == "stop" and isinstance(value, str) else value
    return found


def _is_default(name: str, value: Any) -> bool:
    return name in _DEFAULTS and type(value) in (type(_DEFAULTS[name]), float) and bool(value == _DEFAULTS[name])


def _seed(asked: dict[str, Any]) -> int | None:
    seed = asked.get("seed")
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise RowError(RejectReason.BAD_VALUE, f"body.seed is {seed!r:.40}, expected a whole number from 0 to 2⁶³ - 1")
    return seed


def _reject(names: set[str], where: str) -> None:
    if names:
        listed = ", ".join(f"{where}{name}" for name in sorted(names))
        reason = not_supported(next(iter(names)) if len(names) == 1 else "")
        raise RowError(RejectReason.UNSUPPORTED, f"{listed:.200}: {reason}")
