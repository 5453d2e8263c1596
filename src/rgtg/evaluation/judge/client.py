"""A client for a judge behind an OpenAI-compatible endpoint. Answers are cached on disk and paid for once."""

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rgtg.config import JudgeSettings
from rgtg.errors import EndpointError, MissingExtraError, OutputError, UsageError
from rgtg.evaluation.judge.prompt import Message
from rgtg.types.judge import JudgeUsage

OPENAI = "https://api.openai.com/v1"
_CHARACTERS_PER_TOKEN = 4  # for estimates, and for servers that count no tokens
_CONNECT_SECONDS = 10.0


class CallFailedError(Exception):
    """One call failed after its retries; the next call may succeed."""


class CallRefusedError(CallFailedError):
    """The endpoint rejects this call, for example because its text is too long or a parameter is unknown."""


@dataclass(frozen=True, slots=True)
class JudgeAnswer:
    """The text of a judge's answer, and its tokens."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False


class AnswerCache:
    """Answers by the hash of their request, written to a JSONL file as they arrive.

    An incomplete line of a killed run is ignored, so that its call is made again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._answers: dict[str, JudgeAnswer] = {}
        self._file: Any = None
        if path.exists():
            self._read()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> JudgeAnswer | None:
        """The cached answer to a request, or None."""
        return self._answers.get(key)

    def put(self, key: str, answer: JudgeAnswer) -> None:
        """Store an answer.

        Raises:
            OutputError: the file cannot be written.
        """
        line = json.dumps({"key": key} | dataclasses.asdict(answer), ensure_ascii=False) + "\n"
        with self._lock:
            self._answers[key] = answer
            try:
                if self._file is None:
                    self._file = self._open()
                self._file.write(line.encode())
            except OSError as error:
                raise OutputError(f"cannot keep answers in {self.path}: {error.strerror or error}") from error

    def _open(self) -> Any:
        """Open for unbuffered appending, at the start of a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("ab", buffering=0)
        if file.tell() and not self.path.read_bytes().endswith(b"\n"):
            file.write(b"\n")
        return file

    def _read(self) -> None:
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError as error:
            raise UsageError(
                f"cannot read the answers kept in {self.path}: {error.strerror}; choose another --cache"
            ) from error
        for line in lines:
            try:
                row = json.loads(line)
                key = row.pop("key")
                self._answers[key] = JudgeAnswer(**row)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue


@dataclass
class JudgeClient:
    """Asks a judge and counts the cost. ``ask`` may be called from several threads.

    Raises:
        UsageError: a URL that contains a secret (it is written to files), or no key for OpenAI's own endpoint.
        MissingExtraError: the openai client is not installed.
    """

    settings: JudgeSettings
    cache: AnswerCache
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.url = endpoint_url(self.settings)
        self._key = _api_key(self.settings, self.url)
        self._lock = threading.Lock()
        self._paid: list[JudgeAnswer] = []
        self._reused: list[JudgeAnswer] = []
        self._retries = 0
        try:
            from openai import OpenAI, Timeout
        except ImportError as error:
            raise MissingExtraError("a judge needs the openai client: pip install 'rgtg[judge]'") from error
        seconds = self.settings.timeout
        self._client = OpenAI(
            api_key=self._key or "none",  # a local server needs no key, but the client requires one
            base_url=self.url,
            max_retries=self.settings.retries,
            timeout=Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
        )

    def ask(self, messages: list[Message]) -> JudgeAnswer:
        """The answer to a conversation, from the cache or from a call.

        Raises:
            EndpointError: no call can succeed: unreachable, wrong key, unknown model.
            CallFailedError: this call failed after its retries. It is a CallRefusedError if it was not retried.
        """
        key = request_key(self.settings, messages)
        if (kept := self.cache.get(key)) is not None:
            with self._lock:
                self._reused.append(kept)
            return kept
        if self.stopping.is_set():
            raise CallFailedError("stopped")
        answer = self._call(messages)
        self.cache.put(key, answer)
        with self._lock:
            self._paid.append(answer)
        return answer

    def has_answer(self, conversations: Iterable[Sequence[Message]]) -> bool:
        """Whether any of these conversations has an answer so far, from this run or an earlier one."""
        return any(self.cache.get(request_key(self.settings, messages)) is not None for messages in conversations)

    def usage(self) -> JudgeUsage:
        """What this run paid for, and what it found in the cache."""
        paid, reused = _tokens(self._paid), _tokens(self._reused)
        return JudgeUsage(
            calls=len(self._paid), cached=len(self._reused), retries=self._retries,
            prompt_tokens=paid[0], completion_tokens=paid[1],
            cached_prompt_tokens=reused[0], cached_completion_tokens=reused[1],
            estimated=sum(answer.estimated for answer in self._paid + self._reused), cost=cost(self.settings, *paid),
            total_cost=cost(self.settings, paid[0] + reused[0], paid[1] + reused[1]),
        )  # fmt: skip

    def failure(self, reason: str) -> EndpointError:
        """An error with the URL and the number of cached answers; it never contains the key."""
        kept = f"{len(self.cache)} answers are kept in {self.cache.path}; run the same command again to go on"
        return EndpointError(f"the judge at {self.url}: {self._without_key(reason)}. {kept}")

    def _call(self, messages: list[Message]) -> JudgeAnswer:
        import openai

        try:
            raw = self._client.chat.completions.with_raw_response.create(**request_body(self.settings, messages))
            answer = _answer(raw.parse(), messages)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self.failure(f"refused ({_one_line(error)}); is OPENAI_API_KEY right?") from error
        except openai.NotFoundError as error:
            raise self.failure(f"not found ({_one_line(error)}); are --base-url and --model right?") from error
        except openai.APITimeoutError as error:
            raise CallFailedError(f"no answer within {self.settings.timeout:g} s (--set timeout=SECONDS)") from error
        except openai.APIConnectionError as error:
            raise self.failure(f"cannot be reached ({error.__cause__ or error}); is it running?") from error
        except ValueError as error:
            raise CallFailedError("the response is not JSON") from error
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise CallRefusedError(self._without_key(_one_line(error))) from error
        except openai.OpenAIError as error:
            raise CallFailedError(self._without_key(_one_line(error))) from error
        with self._lock:
            self._retries += raw.retries_taken
        return answer

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def endpoint_url(settings: JudgeSettings) -> str:
    """The URL of the settings, or of OPENAI_BASE_URL, or OpenAI's own.

    Raises:
        UsageError: not a URL, or one with a password or a query, which would be written to files.
    """
    url = settings.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise UsageError("the judge's base URL must hold no password and no query: give the key in OPENAI_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"the judge's base URL {url!r} is not a URL; expected something like http://localhost:8000/v1")
    return url.rstrip("/")


def request_body(settings: JudgeSettings, messages: Sequence[Message]) -> dict[str, Any]:
    """The fields of one call; ``settings.request`` adds fields or replaces them."""
    fields = {
        "model": settings.model, "messages": list(messages), "temperature": settings.temperature,
        "max_tokens": settings.max_tokens, "seed": settings.seed,
    }  # fmt: skip
    body = {name: value for name, value in fields.items() if value is not None and name not in settings.request}
    return body | ({"extra_body": settings.request} if settings.request else {})


def request_key(settings: JudgeSettings, messages: Sequence[Message]) -> str:
    """Hash of model, prompt and parameters. It leaves out the server's address, because ports change."""
    body = json.dumps(request_body(settings, messages), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(body.encode()).hexdigest()


def estimated_tokens(messages: Sequence[Message]) -> int:
    """An estimate of a conversation's tokens: a quarter of its characters, rounded up.

    >>> estimated_tokens([{"role": "user", "content": "Hello"}])
    2
    """
    return sum(-(-len(message["content"]) // _CHARACTERS_PER_TOKEN) for message in messages)


def cost(settings: JudgeSettings, prompt_tokens: int, completion_tokens: int) -> float | None:
    """Price of the tokens, in the unit of the prices; None if no price is set."""
    if settings.price_in is None and settings.price_out is None:
        return None
    return (prompt_tokens * (settings.price_in or 0) + completion_tokens * (settings.price_out or 0)) / 1e6


def _answer(response: Any, messages: Sequence[Message]) -> JudgeAnswer:
    """The first choice of a response.

    Raises:
        CallFailedError: the response is not in the chat completions format.
    """
    try:
        choice = response.choices[0]
        text, finish_reason = choice.message.content or "", choice.finish_reason
        usage = response.usage
    except (AttributeError, IndexError, TypeError) as error:
        raise CallFailedError("the response is not in the chat completions format") from error
    if usage is None or usage.prompt_tokens is None or usage.completion_tokens is None:
        completion_tokens = estimated_tokens([{"role": "assistant", "content": text}])
        return JudgeAnswer(text, finish_reason, estimated_tokens(messages), completion_tokens, estimated=True)
    return JudgeAnswer(text, finish_reason, usage.prompt_tokens, usage.completion_tokens)


def _api_key(settings: JudgeSettings, url: str) -> str:
    key = settings.api_key.get_secret_value() if settings.api_key else os.environ.get("OPENAI_API_KEY", "")
    if not key.strip() and url == OPENAI:
        raise UsageError("a judge needs OPENAI_API_KEY in the environment, or the --base-url of your own server")
    return key.strip()


def _one_line(error: Exception) -> str:
    """A server's error message on one line, shortened."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} …"


def _tokens(answers: Sequence[JudgeAnswer]) -> tuple[int, int]:
    """Prompt and completion tokens."""
    return sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers)
