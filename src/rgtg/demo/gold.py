"""The demo's gold reward: a rule that reads a finished reply, sentence by sentence (docs/demo.md has the table)."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from rgtg.demo import sentences as words

_SLOTS = {
    r"\{name\}": rf"(?P<name>{'|'.join(words.NAMES)})",
    r"\{product\}": rf"(?P<product>(?:{'|'.join(words.COLOURS)}) (?:{'|'.join(words.THINGS)}))",
}


class Addressee(Protocol):
    """What the rule must know of a customer."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def product(self) -> str: ...  # noqa: D102
    @property
    def remedy(self) -> str: ...  # noqa: D102
    @property
    def at_fault(self) -> bool: ...  # noqa: D102


@dataclass
class ParsedReply:
    """What a reply says: the kind of each sentence in order (None where it is not understood), and who and what."""

    kinds: list[str | None] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    remedies: list[tuple[str, str]] = field(default_factory=list)  # remedy, product
    repeated: int = 0

    def count(self, kind: str | None) -> int:
        """Sentences of one kind."""
        return self.kinds.count(kind)


def parse_reply(text: str) -> ParsedReply:
    """Parse a reply into its sentences.

    >>> parse_reply(" Thank you for your message. We will repair blue.").kinds
    ['thanks', None]
    """
    parts = [part for part in re.split(r"(?<=\.)\s+", text.strip()) if part]
    reading = ParsedReply(repeated=len(parts) - len(set(parts)))
    for part in parts:
        kind, slots = _understand(part)
        reading.kinds.append(kind)
        if name := slots.get("name"):
            reading.names.append(name)
        if product := slots.get("product"):
            reading.products.append(product)
            if kind in words.REMEDIES:
                reading.remedies.append((kind, product))
    return reading


# One line of the table in docs/demo.md each: what it is called, and its points.
RULES: dict[str, Callable[[ParsedReply, Addressee], float]] = {
    "name": lambda r, c: (c.name in r.names) - 1.0 * any(name != c.name for name in r.names),
    "apology": lambda r, c: 1.0 * (c.at_fault and r.count("apology") > 0),
    "rude": lambda r, _: -1.5 * (r.count("reproach") + r.count("dismissal")),
    "remedy": lambda r, c: _remedy_points(r, c),
    "other product": lambda r, c: -1.0 * any(product != c.product for product in r.products),
    "promise": lambda r, _: -2.0 * r.count("promise"),
    "time": lambda r, _: 0.5 * (r.count("time") > 0),
    "closing": lambda r, _: 0.5 * (r.kinds[-1:] == ["closing"]),
    "not understood": lambda r, _: -1.0 * r.count(None),
    "said twice": lambda r, _: -0.5 * r.repeated,
}


def gold_reward(customer: Addressee, text: str, *, finished: bool = True) -> float:
    """Points of a reply: the sum of ``RULES``, less one where it is empty or had not ended at the token limit.

    Args:
        customer: whom it answers.
        text: the reply.
        finished: whether the writer ended it; an unfinished reply's last sentence usually is not understood either.
    """
    reading = parse_reply(text)
    unusable = not reading.kinds or not finished
    return sum(rule(reading, customer) for rule in RULES.values()) - 1.0 * unusable


def _remedy_points(reading: ParsedReply, customer: Addressee) -> float:
    different = {remedy for remedy, _ in reading.remedies}
    if not different:
        return 0.0
    if len(different) > 1:
        return -2.0
    if different != {customer.remedy}:
        return -1.0
    return 2.0 if all(product == customer.product for _, product in reading.remedies) else 0.5


@cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((kind, _compile(text)) for kind, texts in words.SENTENCES.items() for text in texts)


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for slot, expression in _SLOTS.items():
        pattern = pattern.replace(slot, expression)
    return re.compile(pattern)


@cache
def _understand(sentence: str) -> tuple[str | None, dict[str, str]]:
    for kind, pattern in _patterns():
        if match := pattern.fullmatch(sentence):
            return kind, match.groupdict()
    return None, {}
