"""The demo's gold reward: a rule on the sentences of a finished reply (docs/demo.md has the table)."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from rgtg.demo import sentences

_SLOTS = {
    r"\{name\}": rf"(?P<name>{'|'.join(sentences.NAMES)})",
    r"\{product\}": rf"(?P<product>(?:{'|'.join(sentences.COLOURS)}) (?:{'|'.join(sentences.THINGS)}))",
}


class CustomerLike(Protocol):
    """What the rule must know about a customer."""

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
    """A parsed reply: the kind of each sentence (None if it is unknown), and the names, products and remedies in it."""

    kinds: list[str | None] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    remedies: list[tuple[str, str]] = field(default_factory=list)  # remedy, product
    repeated: int = 0

    def count(self, kind: str | None) -> int:
        """Number of sentences of one kind."""
        return self.kinds.count(kind)


def parse_reply(text: str) -> ParsedReply:
    """Parse a reply into its sentences.

    >>> parse_reply(" Thank you for your message. We will repair blue.").kinds
    ['thanks', None]
    """
    parts = [part for part in re.split(r"(?<=\.)\s+", text.strip()) if part]
    reply = ParsedReply(repeated=len(parts) - len(set(parts)))
    for part in parts:
        kind, slots = _classify(part)
        reply.kinds.append(kind)
        if name := slots.get("name"):
            reply.names.append(name)
        if product := slots.get("product"):
            reply.products.append(product)
            if kind in sentences.REMEDIES:
                reply.remedies.append((kind, product))
    return reply


# Each entry is a line of the table in docs/demo.md: its name, and its points.
RULES: dict[str, Callable[[ParsedReply, CustomerLike], float]] = {
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


def gold_reward(customer: CustomerLike, text: str, *, finished: bool = True) -> float:
    """Points of a reply: the sum of ``RULES``, minus one if the reply is empty or was cut off at the token limit.

    Args:
        customer: who is answered.
        text: the reply.
        finished: whether the reply ended by itself. The last sentence of an unfinished reply is usually unknown too.
    """
    reply = parse_reply(text)
    unusable = not reply.kinds or not finished
    return sum(rule(reply, customer) for rule in RULES.values()) - 1.0 * unusable


def _remedy_points(reply: ParsedReply, customer: CustomerLike) -> float:
    different = {remedy for remedy, _ in reply.remedies}
    if not different:
        return 0.0
    if len(different) > 1:
        return -2.0
    if different != {customer.remedy}:
        return -1.0
    return 2.0 if all(product == customer.product for _, product in reply.remedies) else 0.5


@cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((kind, _compile(text)) for kind, texts in sentences.SENTENCES.items() for text in texts)


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for slot, expression in _SLOTS.items():
        pattern = pattern.replace(slot, expression)
    return re.compile(pattern)


@cache
def _classify(sentence: str) -> tuple[str | None, dict[str, str]]:
    for kind, pattern in _patterns():
        if match := pattern.fullmatch(sentence):
            return kind, match.groupdict()
    return None, {}
