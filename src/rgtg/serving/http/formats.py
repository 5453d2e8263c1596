"""How choices are written: OpenAI's chat completions and its legacy completions, whole and in chunks."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rgtg.serving.http.responses import (
    Answer,
    Chat,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatMessage,
    Delta,
    Finish,
    GuidanceReport,
    Text,
    TextChoice,
    Usage,
)
from rgtg.serving.http.serialize import LegacyLogprobs, chat_logprobs
from rgtg.tokenization.token_bytes import TokenBytes
from rgtg.types.generation import StepTrace


@dataclass(frozen=True)
class Piece:
    """What is to be written of a choice: all of it, or what is new.

    Attributes:
        index: of the choice.
        text: of it.
        steps: for log-probabilities.
        finish: why it ended; None: it goes on.
        guidance: how it came about, or its trace's new steps; None: nothing was asked for.
        first: the choice begins.
    """

    index: int
    text: str
    steps: Sequence[StepTrace] = ()
    finish: Finish | None = None
    guidance: GuidanceReport | None = None
    first: bool = False


class Format(Protocol):
    """One endpoint's way to write."""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Answer:
        """An answer with all choices."""
        ...

    def chunk(self, piece: Piece | None, usage: Usage | None) -> Answer:
        """An event of a stream: a piece, or the usage at its end."""
        ...


@dataclass
class _Head:
    model: str
    known: TokenBytes
    top: int | None  # candidates per token; None: no log-probabilities
    with_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def usage_of_chunk(self, usage: Usage | None) -> dict[str, Usage | None]:
        """OpenAI sends a null with every chunk where the usage is to come."""
        return {"usage": usage} if self.with_usage else {}


def _guidance(piece: Piece) -> dict[str, GuidanceReport]:
    return {"guidance": piece.guidance} if piece.guidance is not None else {}


@dataclass
class ChatFormat(_Head):
    """``/v1/chat/completions``."""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Chat:
        """An answer with all choices."""
        choices = [
            ChatChoice(
                index=piece.index,
                message=ChatMessage(content=piece.text, refusal=None),
                logprobs=None if self.top is None else chat_logprobs(piece.steps, self.known, self.top),
                finish_reason=piece.finish or "stop",
                **_guidance(piece),
            )
            for piece in pieces
        ]
        return Chat(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def chunk(self, piece: Piece | None, usage: Usage | None) -> ChatChunk:
        """An event of a stream."""
        choices = [] if piece is None else [self._choice(piece)]
        return ChatChunk(
            id=self.id, created=self.created, model=self.model, choices=choices, **self.usage_of_chunk(usage)
        )

    def _choice(self, piece: Piece) -> ChatChunkChoice:
        delta = {"role": "assistant", "content": piece.text} if piece.first else {"content": piece.text}
        shown = self.top is not None and piece.steps
        return ChatChunkChoice(
            index=piece.index,
            delta=Delta.model_validate(delta if piece.text or piece.first else {}),
            logprobs=chat_logprobs(piece.steps, self.known, self.top or 0) if shown else None,
            finish_reason=piece.finish,
            **_guidance(piece),
        )

    @property
    def id(self) -> str:
        """Of the answer."""
        return f"chatcmpl-{self.number}"


@dataclass
class TextFormat(_Head):
    """``/v1/completions``."""

    _logprobs: dict[int, LegacyLogprobs] = field(default_factory=dict, init=False)

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Text:
        """An answer with all choices."""
        choices = [self._choice(piece) for piece in pieces]
        return Text(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def chunk(self, piece: Piece | None, usage: Usage | None) -> Text:
        """An event of a stream."""
        choices = [] if piece is None else [self._choice(piece)]
        return Text(id=self.id, created=self.created, model=self.model, choices=choices, **self.usage_of_chunk(usage))

    def _choice(self, piece: Piece) -> TextChoice:
        logprobs = None
        if self.top is not None and (piece.steps or piece.finish is None):
            counted = self._logprobs.setdefault(piece.index, LegacyLogprobs(self.known, self.top))
            logprobs = counted.add(piece.steps)
        return TextChoice(
            index=piece.index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish, **_guidance(piece)
        )

    @property
    def id(self) -> str:
        """Of the answer."""
        return f"cmpl-{self.number}"
