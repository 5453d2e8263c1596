"""What a report is made of, before it is HTML or Markdown: sections of text, tables, figures and completions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Draws on the figure and its axes (one, or an array of them).
Draw = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller text beside it, marks, and a shade in [0, 1] (½ is none)."""

    text: str
    detail: str = ""
    marks: tuple[str, ...] = ()
    shade: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows under headings. ``strong`` rows stand out; a table with a summary is long, and folded away under it."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    strong: frozenset[int] = frozenset()
    summary: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Text, with a few words before it that stand out; soft text is an explanation."""

    text: str
    lead: str = ""
    soft: bool = False


@dataclass(frozen=True)
class Points:
    """A short list of findings, each a lead and a text."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """A figure that is drawn when it is rendered; ``name`` is that of its file beside a Markdown report."""

    name: str
    caption: str
    draw: Draw = field(repr=False)
    columns: int = 1
    height: float = 4.2


@dataclass(frozen=True)
class Card:
    """One completion: whose, its reward, and its words with whether the baseline's text lacks them."""

    label: str
    reward: str
    words: Sequence[tuple[str, bool]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Sample:
    """The completions of one prompt side by side; ``trace`` is a document of the playground's renderer."""

    prompt: str
    cards: Sequence[Card]
    trace: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Facts:
    """Names and values, such as where a result comes from."""

    items: Sequence[tuple[str, str]]


Block = Table | Paragraph | Points | Figure | Sample | Facts


@dataclass(frozen=True)
class Section:
    """A part of the report under its own heading; ``key`` is its anchor."""

    key: str
    title: str
    blocks: Sequence[Block]
