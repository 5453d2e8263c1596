"""Stop texts, which may hold special tokens: these are left out of a completion's text, and found by their ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MarkedText:
    """A completion's text with some of its special tokens written out.

    Attributes:
        text: with the special tokens.
        marks: start and length of each special token in it.
    """

    text: str
    marks: tuple[tuple[int, int], ...] = ()

    def visible(self, at: int) -> int:
        """How many characters before position ``at`` are not of special tokens.

        >>> MarkedText("ab<end>c", marks=((2, 5),)).visible(8)
        3
        """
        return at - sum(max(0, min(at, start + length) - start) for start, length in self.marks)


class StopTexts:
    """Texts that end a completion.

    A special token of the tokenizer has no text of its own, since decoding leaves special tokens out. Those whose name
    occurs in a stop text are put back where they stand, so that the stop text is found, in whole or as a part of a
    longer one (such as ``<|im_end|>`` before a new line).

    Attributes:
        texts: as they were given.
        special: names of the special tokens that occur in them, by id.
        tokens: special tokens that are a whole stop text.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        """``tokenizer`` is not needed if there are no texts."""
        self.texts = list(texts)
        known = special_tokens(tokenizer) if self.texts else {}
        self.special = {i: name for i, name in known.items() if any(name in text for text in self.texts)}
        self.tokens = frozenset(i for i, name in self.special.items() if name in self.texts)

    def __bool__(self) -> bool:
        return bool(self.texts)

    def mark(self, text: str, places: Sequence[tuple[int, int]]) -> MarkedText:
        """Write special tokens into a completion's text.

        Args:
            text: without special tokens.
            places: for each token of ``special`` in the completion, how many characters come before it, and its id.
        """
        parts, marks, done, length = [], [], 0, 0
        for place, token in places:
            place, name = max(place, done), self.special[token]
            marks.append((length + place - done, len(name)))
            parts += [text[done:place], name]
            length, done = length + place - done + len(name), place
        return MarkedText("".join([*parts, text[done:]]), tuple(marks))

    def find(self, marked: MarkedText, held: int = 0) -> int | None:
        """How many visible characters come before the first stop text that ends after ``held`` characters."""
        starts = (marked.text.find(text, max(held - len(text) + 1, 0)) for text in self.texts)
        found = [at for at in starts if at >= 0]
        return marked.visible(min(found)) if found else None

    def certain(self, text: str, marked: MarkedText) -> str:
        """The part of an unfinished text that later tokens cannot change: no half character, no half stop text."""
        safe = marked.text.rstrip("�")
        held = max((n for s in self.texts for n in range(1, len(s)) if safe.endswith(s[:n])), default=0)
        return text[: marked.visible(len(safe) - held)].rstrip("�")


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Names of the tokens that decoding leaves out of a text, by id."""
    named = {int(i): str(tokenizer.convert_ids_to_tokens(i)) for i in tokenizer.all_special_ids}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return named | {int(i): str(token.content) for i, token in added.items() if token.special}
