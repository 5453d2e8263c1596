"""Renders sections as Markdown with figures in a folder beside it; every text is escaped."""

import re
from collections.abc import Sequence
from html import escape

from rgtg.report.document import Block, Card, Cell, Facts, Figure, Paragraph, Points, Sample, Section, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$!])")
_LINE_START = re.compile(r"^(\s*)([-+](?=[-\s]|$)|[>=]|\d+[.)](?=\s|$))", re.MULTILINE)


def render_markdown(title: str, intro: str, sections: Sequence[Section], pictures: str) -> str:
    """The report as text; ``pictures`` is the relative path of the folder of figures."""
    lead = [_text(line) for line in intro.splitlines() if line.strip()]
    parts = [f"# {_line(title)}", *lead]
    for section in sections:
        parts += [f"## {_line(section.title)}", *(_block(block, pictures) for block in section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures_of(sections: Sequence[Section]) -> list[Figure]:
    """All figures of a report, in order."""
    return [block for section in sections for block in section.blocks if isinstance(block, Figure)]


def _block(block: Block, pictures: str) -> str:
    match block:
        case Paragraph():
            return " ".join(
                part for part in (f"**{_line(block.lead)}**" if block.lead else "", _text(block.text)) if part
            )
        case Points():
            return "\n".join(f"- **{_line(lead)}:** {_line(text)}" for lead, text in block.items)
        case Table():
            return _table(block)
        case Figure():
            return f"![{_line(block.caption)}]({pictures}/{block.name}.png)"
        case Sample():
            parts = [f"> {_quoted(block.prompt)}"]
            for name, cards in block.groups.items():
                parts += [f"{_line(name)}:"] if name else []
                parts.append("\n".join(map(_card, cards)))
            return "\n\n".join(parts)
        case Facts():
            return "\n".join(f"- {_line(name)}: {_line(value)}" for name, value in block.items)


def _table(table: Table) -> str:
    rules = [":--", *("--:" for _ in table.headings[1:])]
    rows = [[_cell(cell, strong=i in table.strong) for cell in row] for i, row in enumerate(table.rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in ([_line(h) for h in table.headings], rules, *rows)]
    return "\n".join([f"{_line(table.summary)}:", "", *lines] if table.summary else lines)


def _cell(cell: Cell, *, strong: bool) -> str:
    text = _line(cell.text)
    if strong and text:
        text = f"**{text}**"
    detail = f"({_line(cell.detail)})" if cell.detail else ""
    return " ".join(part for part in (text, *(f"*{mark}*" for mark in cell.marks), detail) if part)


def _card(card: Card) -> str:
    """A bullet point. Words that the baseline lacks are bold, with white space outside the asterisks."""
    words = "".join(_bold(text) if new else _line(text) for text, new in card.words)
    notes = "".join(f" *({_line(note)})*" for note in card.notes)
    return f"- **{_line(card.label)}** {_line(card.reward)}: {words}{notes}"


def _bold(text: str) -> str:
    core = text.strip()
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{_line(before)}**{_line(core)}**{_line(after)}" if core else _line(text)


def _quoted(text: str) -> str:
    return "<br>".join(_text(line) for line in text.strip().splitlines())


def _line(text: str) -> str:
    """The text on one line."""
    return re.sub(r"\s*\n\s*", "<br>", _text(text))


def _text(text: str) -> str:
    """Escape Markdown and HTML."""
    plain = _SPECIAL.sub(r"\\\1", escape(text, quote=False))
    return _LINE_START.sub(lambda found: f"{found[1]}\\{found[2]}" if len(found[2]) == 1 else _listed(found), plain)


def _listed(found: re.Match[str]) -> str:
    """Escape a number that would start a list, before its point."""
    return f"{found[1]}{found[2][:-1]}\\{found[2][-1]}"
