"""Incremental detokenization: text of a completion while its tokens come, in parts that later tokens cannot change."""

import re
from collections.abc import Sequence
from typing import Any

from rgtg.decoding.stop_texts import StopTexts
from rgtg.tokenization.encoding import decode_after, decoding_context

# Tokens that are decoded anew with each one that comes; more context than any tokenizer's spacing rules look back.
_WINDOW = 16
# SentencePiece's name of a byte. A run of them is decoded as one: a byte too many turns all of it into U+FFFD.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class IncrementalDetokenizer:
    """Turns tokens into text; the parts joined, and the rest at the end, are the completion's text.

    Each new token decodes only the last tokens again; all of them, where a tokenizer's text is not the sum of its
    parts.

    Example:
        >>> stream = IncrementalDetokenizer(tokenizer, prompt_ids, stop=["."])  # doctest: +SKIP
        >>> "".join(stream.add(i) for i in done.token_ids) + stream.end(done.text) == done.text  # doctest: +SKIP
        True
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, StopTexts(tokenizer, stop)
        self._special = set(tokenizer.all_special_ids)
        self._before = list(prompt_ids[-_WINDOW:])  # tokens that are not decoded again
        self._context = decoding_context(tokenizer, self._before)
        self._tokens: list[int] = []  # tokens that are
        self._done = ""  # text of the completion's tokens in _before
        self._places: list[tuple[int, int]] = []  # special tokens of stop texts: characters before each, and its id
        self._shown = ""

    def add(self, token_id: int) -> str:
        """Text that is final since this token came; empty while a character or a stop text may be incomplete."""
        self._tokens.append(token_id)
        if token_id in self.stop.special:
            text = self._done + decode_after(self.tokenizer, self._context, self._tokens)
            self._places.append((len(text.rstrip("�")), token_id))
            return ""
        if token_id in self._special or _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(token_id))):
            return ""  # a special token adds nothing, and does not end a run of bytes
        tail = decode_after(self.tokenizer, self._context, self._tokens)
        new = self._show(self._certain(self._done + tail))
        if len(self._tokens) > 2 * _WINDOW and not tail.endswith("�"):
            self._move_on(tail)
        return new

    def end(self, text: str) -> str:
        """The rest, once the whole text is known."""
        return text[len(self._shown) :]

    def _certain(self, text: str) -> str:
        """The part before a stop text, or before what may become one."""
        marked = self.stop.mark(text, self._places)
        cut = self.stop.find(marked, len(self._shown))
        return self.stop.certain(text, marked) if cut is None else text[:cut]

    def _show(self, safe: str) -> str:
        """What ``safe`` adds; nothing where it takes back what was shown (it may hold back a stop text)."""
        new = safe[len(self._shown) :] if safe.startswith(self._shown) else ""
        self._shown += new
        return new

    def _move_on(self, tail: str) -> None:
        """Stop decoding older tokens again, if the text stays the same."""
        before, rest = [*self._before, *self._tokens[:_WINDOW]], self._tokens[_WINDOW:]
        head = decode_after(self.tokenizer, self._context, self._tokens[:_WINDOW])
        context = decoding_context(self.tokenizer, before)
        if not head.endswith("�") and head + decode_after(self.tokenizer, context, rest) == tail:
            self._before, self._tokens, self._done = before[-_WINDOW:], rest, self._done + head
            self._context = context
