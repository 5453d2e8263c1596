"""One tokenizer's tokens as text, and text as another's tokens, while the text grows: exact, for the price of the new.

Both directions look at the newest few words only, and fall back to the whole text where that could differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rgtg.tokenization.encoding import decode_completion
from rgtg.tokenization.space_cuts import SpaceCuts

# Tokens of context that a candidate is decoded behind.
_CONTEXT = 8
# Characters behind a cut after which a nearer one is looked for.
_NEAR = 24


@dataclass
class CompletionText:
    """A completion as policy tokens and as text; ``before`` is the text of the prompt's last tokens."""

    prompt_ids: list[int]
    before: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""

    @property
    def context(self) -> list[int]:
        """The newest tokens, the prompt's included."""
        return [*self.prompt_ids[-_CONTEXT:], *self.token_ids[-_CONTEXT:]][-_CONTEXT:]


class Detokenizer:
    """Texts of completions that grow by one token, equal to ``decode_completion`` of all their tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # A decoder of the tokenizers library treats tokens one by one, but for a text's first and a run of bytes.
        self.local = hasattr(tokenizer, "backend_tokenizer")

    def start(self, prompt_ids: Sequence[int]) -> CompletionText:
        """The empty completion of a prompt."""
        return CompletionText(list(prompt_ids), self._decode([list(prompt_ids[-_CONTEXT:])])[0])

    def with_next(self, rows: Sequence[CompletionText], candidates: Sequence[Sequence[int]]) -> list[list[str]]:
        """Text of each row's completion with each of its candidates behind it."""
        windows = []
        for row, tokens in zip(rows, candidates, strict=True):
            context = row.context
            windows += [context, *([*context, token] for token in tokens)]
        decoded = iter(self._decode(windows))
        return [
            self._texts(row, tokens, [next(decoded) for _ in range(len(tokens) + 1)])
            for row, tokens in zip(rows, candidates, strict=True)
        ]

    def _texts(self, row: CompletionText, tokens: Sequence[int], decoded: list[str]) -> list[str]:
        before = decoded[0]
        # What the context says must be what the text ends with, in whole characters; then only the candidate is new.
        settled = self.local and before.strip() and not before.endswith("�")
        if settled and (row.before + row.text).endswith(before.lstrip(" ")):
            return [
                row.text + whole[len(before) :] if whole.startswith(before) else self._from_scratch(row, token)
                for token, whole in zip(tokens, decoded[1:], strict=True)
            ]
        return [self._from_scratch(row, token) for token in tokens]

    def _from_scratch(self, row: CompletionText, token: int) -> str:
        return decode_completion(self.tokenizer, row.prompt_ids, [*row.token_ids, token])

    def _decode(self, ids: list[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return texts


@dataclass
class Cut:
    """A place in a text that its tokens never cross: what is left of it keeps its tokens whatever is added."""

    start: int  # of the window that is encoded again: some words before the cut
    place: int  # of the cut
    kept: int  # tokens before it
    head: list[int]  # tokens of the window before it


@dataclass
class TokenizedText:
    """A text with its tokens (no special ones around them), and a cut near its end."""

    text: str
    ids: list[int]
    cut: Cut | None = None


@dataclass(frozen=True)
class TokenSuffix:
    """Tokens of a longer text: the first ``kept`` of the reading it grew from, then ``ids``."""

    kept: int
    ids: list[int]


class Retokenizer:
    """Tokens of texts that grow, equal to encoding each whole text from scratch."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.cuts = SpaceCuts(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of whole texts, without special ones around them."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """Texts from scratch."""
        return [TokenizedText(text, ids) for text, ids in zip(texts, self.encode(texts), strict=True)]

    def encode_continuations(
        self, readings: Sequence[TokenizedText], texts: Sequence[Sequence[str]]
    ) -> list[list[TokenSuffix]]:
        """Tokens of texts that each grew (or not) from a reading."""
        for reading in readings:
            self._look_for_cut(reading)
        pairs = [(reading, text) for reading, mine in zip(readings, texts, strict=True) for text in mine]
        windows = [self._window(reading, text) for reading, text in pairs]
        tails = [
            self._join(reading, start, ids)
            for (reading, _), (start, _), ids in zip(
                pairs, windows, self.encode([window for _, window in windows]), strict=True
            )
        ]
        again = [i for i, tail in enumerate(tails) if tail is None]
        for i, ids in zip(again, self.encode([pairs[i][1] for i in again]), strict=True):
            tails[i] = TokenSuffix(0, ids)
        found = iter(tails)
        return [[tail for tail in (next(found) for _ in mine) if tail is not None] for mine in texts]

    def append(self, reading: TokenizedText, text: str, tail: TokenSuffix) -> TokenizedText:
        """The reading of a text whose tokens ``encode_continuations`` gave."""
        return TokenizedText(text, [*reading.ids[: tail.kept], *tail.ids], reading.cut if tail.kept else None)

    def _window(self, reading: TokenizedText, text: str) -> tuple[int, str]:
        """Where encoding may start, and the text from there."""
        if reading.cut is not None and text.startswith(reading.text):
            start = reading.cut.start
            if self.cuts.plain(text, start):
                return start, text[start:]
        return 0, text

    def _join(self, reading: TokenizedText, start: int, ids: list[int]) -> TokenSuffix | None:
        """Tokens of the whole text from its window's; None where they do not meet at the cut."""
        if start == 0:
            return TokenSuffix(0, ids)
        cut = reading.cut
        assert cut is not None, "only a reading with a cut has a window"
        if ids[: len(cut.head)] != cut.head or self.cuts.unknown in ids:
            return None
        return TokenSuffix(cut.kept, ids[len(cut.head) :])

    def _look_for_cut(self, reading: TokenizedText) -> None:
        """Set the newest cut, if there is a better one than the reading has."""
        if not self.cuts.usable or (reading.cut is not None and len(reading.text) - reading.cut.place < _NEAR):
            return
        places = self.cuts.places(reading.text)
        if places is None or (reading.cut is not None and places[2] == reading.cut.place):
            return
        start, meeting, place = places
        read = self.tokenizer(
            reading.text[start:], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, ends = read["input_ids"], [end for _, end in read["offset_mapping"]]
        head, met = (sum(end <= at - start for end in ends) for at in (place, meeting))
        behind = len(ids) - head
        # The window's tokens must be the text's own from the meeting point on.
        if met < head and ends[head - 1] == place - start and reading.ids[-(len(ids) - met) :] == ids[met:]:
            reading.cut = Cut(start, place, len(reading.ids) - behind, ids[:head])
