"""The parts of a report, independent of HTML and Markdown: sections of text, tables, figures and completions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rgtg.report.number_format import number, spread
from rgtg.types.base import Interval

# Draws on a figure and its axes (one, or an array of them).
Draw = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, a smaller text beside it, marks, and a shade in [0, 1] (½ is no shade)."""

    text: str
    detail: str = ""
    marks: tuple[str, ...] = ()
    shade: float | None = None


def interval_cell(value: Interval, form: Callable[[float], str] = number) -> Cell:
    """A mean, with its interval as the smaller text."""
    return Cell(form(value.mean), detail=spread(value, form))


@dataclass(frozen=True)
class Table:
    """Rows under headings. ``strong`` rows are bold. A table with a summary is folded away under it."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    strong: frozenset[int] = frozenset()
    summary: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Text after a few bold words; soft text is an explanation."""

    text: str
    lead: str = ""
    soft: bool = False


@dataclass(frozen=True)
class Points:
    """A short list of findings, each with bold words and a text."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """A figure, drawn when the report is rendered; ``name`` is its file name beside a Markdown report."""

    name: str
    caption: str
    draw: Draw = field(repr=False)
    columns: int = 1
    height: float = 4.2


@dataclass(frozen=True)
class Card:
    """One completion: its method, its reward, and its words, each with whether the baseline lacks it."""

    label: str
    reward: str
    words: Sequence[tuple[str, bool]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Sample:
    """The completions of one prompt side by side, in named groups; ``trace`` is a document for the trace viewer."""

    prompt: str
    groups: Mapping[str, Sequence[Card]]
    trace: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Facts:
    """Names and values, such as the provenance of a result."""

    items: Sequence[tuple[str, str]]


Block = Table | Paragraph | Points | Figure | Sample | Facts


@dataclass(frozen=True)
class Section:
    """A part of the report with its own heading; ``key`` is its anchor."""

    key: str
    title: str
    blocks: Sequence[Block]
