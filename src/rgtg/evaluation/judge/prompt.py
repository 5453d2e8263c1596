"""The judge's prompt, and the strict parser of its verdicts."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, Self

from rgtg.errors import UsageError

Message = dict[str, str]
Verdict = Literal["first", "second", "tie"]

_PLACEHOLDERS = ("prompt", "first", "second")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_MARK = re.compile(r"\[\[([ABC])\]\]")
_OBJECT = re.compile(r"\{[^{}]*\}")
_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie", "tie": "tie"}


class NoVerdictError(ValueError):
    """An answer without exactly one verdict."""


@dataclass(frozen=True)
class JudgePrompt:
    """The question for the judge, with placeholders for the prompt and the two completions."""

    question: str
    reminder: str

    @classmethod
    def load(cls, path: Path | None = None) -> Self:
        """Read a prompt from a file, or the package's own prompt.

        Raises:
            UsageError: the file cannot be read, lacks a placeholder, or contains an unknown one.
        """
        folder = resources.files("rgtg.evaluation") / "judge" / "prompts"
        question = _read(path) if path else (folder / "pairwise.txt").read_text(encoding="utf-8")
        return cls(question.strip(), (folder / "reminder.txt").read_text(encoding="utf-8").strip())

    @property
    def fingerprint(self) -> str:
        """Start of the SHA-256 of question and reminder."""
        return hashlib.sha256(f"{self.question}\0{self.reminder}".encode()).hexdigest()[:16]

    def ask(self, prompt: str, first: str, second: str) -> list[Message]:
        """The messages of the first call. Braces in the texts are kept."""
        texts = {"prompt": prompt, "first": first, "second": second}
        return [{"role": "user", "content": _PLACEHOLDER.sub(lambda place: texts[place[1]], self.question)}]

    def ask_again(self, messages: list[Message], answer: str) -> list[Message]:
        """The same conversation, with the unusable answer and a reminder of what an answer must contain."""
        return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": self.reminder}]


def read_verdict(answer: str) -> Verdict:
    """The verdict in an answer: ``[[A]]``, ``[[B]]``, ``[[C]]``, or ``{"verdict": "A" | "B" | "C" | "tie"}``.

    The reasoning up to ``</think>`` is ignored. The same verdict may be repeated.

    Raises:
        NoVerdictError: no verdict, or different ones.

    >>> read_verdict("B is shorter and right. [[B]]")
    'second'
    >>> read_verdict('{"reason": "equal", "verdict": "tie"}')
    'tie'
    """
    conclusion = answer.rpartition("</think>")[2]
    found = {_VERDICTS[mark] for mark in _MARK.findall(conclusion)} | set(_json_verdicts(conclusion))
    if len(found) > 1:
        raise NoVerdictError(f"the answer holds {len(found)} verdicts")
    if not found:
        raise NoVerdictError("the answer is empty" if not conclusion.strip() else "the answer holds no verdict")
    return found.pop()


def _json_verdicts(answer: str) -> Iterator[Verdict]:
    for text in _OBJECT.findall(answer):
        try:
            verdict = json.loads(text).get("verdict")
        except ValueError:
            continue
        if verdict is None:
            continue
        if not isinstance(verdict, str) or verdict not in _VERDICTS:
            raise NoVerdictError(f"the answer's verdict is {verdict!r}, expected A, B, C or tie")
        yield _VERDICTS[verdict]


def _read(path: Path) -> str:
    try:
        question = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the judge's prompt {path}: {error}") from error
    places = set(_PLACEHOLDER.findall(question))
    wanted = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
    for name in _PLACEHOLDERS:
        if name not in places:
            raise UsageError(f"the judge's prompt {path} has no {{{name}}}; it must contain {wanted}")
    if unknown := sorted(places - set(_PLACEHOLDERS)):
        raise UsageError(f"the judge's prompt {path} has an unknown placeholder {{{unknown[0]}}}; known: {wanted}")
    return question
