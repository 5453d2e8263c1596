"""Renders sections as one HTML page that loads nothing from outside; every text is escaped."""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from rgtg.report.document import Block, Card, Cell, Facts, Figure, Paragraph, Points, Sample, Section, Table
from rgtg.report.figures import as_svg
from rgtg.report.trace_viewer import viewer_script, viewer_style

# JSON inside a script element must not end the element or start a comment.
_MARKUP = re.compile("[<>&\u2028\u2029]")
_WORDY = 40  # a column with longer texts is prose, and is left-aligned


def render_html(title: str, intro: str, sections: Sequence[Section]) -> str:
    """The page as text.

    Raises:
        MissingExtraError: there is a figure, and matplotlib is not installed.
    """
    style = (resources.files("rgtg.report") / "style.css").read_text(encoding="utf-8")
    traced = any(isinstance(block, Sample) and block.trace for section in sections for block in section.blocks)
    script = f"<script>\n{viewer_script()}</script>\n" if traced else ""
    style += viewer_style() if traced else ""
    links = "".join(f'<a href="#{section.key}">{_text(section.title)}</a>' for section in sections)
    lead = "".join(f"<p>{_text(line)}</p>" for line in intro.splitlines() if line.strip())
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>\n{style}</style></head>\n"
        f"<body><h1>{_text(title)}</h1>{lead}<nav>{links}</nav>\n{body}\n{script}</body></html>\n"
    )


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section id="{section.key}"><h2>{_text(section.title)}</h2>\n{blocks}</section>'


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            lead = f"<b>{_text(block.lead)}</b> " if block.lead else ""
            soft = ' class="soft"' if block.soft else ""
            return f"<p{soft}>{lead}{_text(block.text)}</p>"
        case Points():
            items = "".join(f"<li><b>{_text(lead)}:</b> {_text(text)}</li>" for lead, text in block.items)
            return f'<ul class="points">{items}</ul>'
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Sample():
            prompt = f'<blockquote class="text">{_text(block.prompt)}</blockquote>'
            groups = "".join(_group(name, cards) for name, cards in block.groups.items())
            return f"{prompt}{groups}{_trace(block.trace) if block.trace else ''}"
        case Facts():
            return f"<dl>{''.join(f'<dt>{_text(k)}</dt><dd>{_text(v)}</dd>' for k, v in block.items)}</dl>"


def _table(table: Table) -> str:
    wordy = [any(len(row[i].text) > _WORDY for row in table.rows) for i in range(len(table.headings))]
    looks = [' class="words"' if words else "" for words in wordy]
    head = "".join(f"<th{look}>{_text(heading)}</th>" for heading, look in zip(table.headings, looks, strict=True))
    body = "".join(
        ('<tr class="strong">' if i in table.strong else "<tr>")
        + "".join(_cell(cell, look) for cell, look in zip(row, looks, strict=True))
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    whole = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if not table.summary:
        return whole
    return f"<details><summary>{_text(table.summary)}</summary>{whole}</details>"


def _cell(cell: Cell, look: str) -> str:
    marks = "".join(f'<span class="mark {_text(mark)}">{_text(mark)}</span>' for mark in cell.marks)
    detail = f"<small>{_text(cell.detail)}</small>" if cell.detail else ""
    return f"<td{look if cell.shade is None else _shaded(cell.shade)}>{_text(cell.text)}{marks}{detail}</td>"


def _shaded(shade: float) -> str:
    """Green above one half and red below, stronger with the distance."""
    colour, strength = ("good" if shade >= 0.5 else "bad"), 90 * abs(shade - 0.5)
    return f' class="shaded" style="background: color-mix(in srgb, var(--{colour}) {strength:.0f}%, transparent)"'


def _figure(figure: Figure) -> str:
    svg = as_svg(figure).replace("<svg", f'<svg role="img" aria-label="{_text(figure.caption)}"', 1)
    return f"<figure>{svg}<figcaption>{_text(figure.caption)}</figcaption></figure>"


def _group(name: str, cards: Sequence[Card]) -> str:
    title = f'<p class="group">{_text(name)}</p>' if name else ""
    return f'{title}<div class="cards">{"".join(map(_card, cards))}</div>'


def _card(card: Card) -> str:
    words = "".join(f"<mark>{_text(text)}</mark>" if new else _text(text) for text, new in card.words)
    notes = "".join(f" <small>({_text(note)})</small>" for note in card.notes)
    head = f"<header><span>{_text(card.label)}</span><span>{_text(card.reward)}</span></header>"
    return f'<div class="card">{head}<div class="text">{words}{notes}</div></div>'


def _trace(trace: Mapping[str, Any]) -> str:
    """A folded trace; the page's script draws it when it is opened."""
    data = _MARKUP.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(trace, ensure_ascii=False))
    return (
        f'<details class="tokens"><summary>Token by token</summary>'
        f'<script type="application/json" class="rgtg-trace">{data}</script></details>'
    )


def _text(value: str) -> str:
    return escape(value, quote=True)
