"""Incremental detokenization, and retokenization with another tokenizer, of texts that grow a token at a time.

A scorer with a tokenizer of its own reads the text of the policy's tokens. `Detokenizer` turns the policy's tokens into
text, `Retokenizer` turns the text into the scorer's tokens. Both process only the last few words and give exactly what
the whole text gives; where that cannot be guaranteed, they process the whole text.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rgtg.tokenization.encoding import decode_completion

# Tokens of context that are decoded in front of a candidate.
_CONTEXT = 8
# Characters after a split point before a newer one is looked for.
_MIN_DISTANCE = 24
# How many split points a window needs, and how many of a text's last characters are searched for them.
_SPLIT_POINTS = 3
_SEARCH_CHARACTERS = 400


@dataclass
class CompletionText:
    """A completion as policy tokens and as text. ``prompt_end`` is the text of the prompt's last tokens."""

    prompt_ids: list[int]
    prompt_end: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""

    @property
    def context(self) -> list[int]:
        """The newest tokens, those of the prompt included."""
        return [*self.prompt_ids[-_CONTEXT:], *self.token_ids[-_CONTEXT:]][-_CONTEXT:]


class Detokenizer:
    """Texts of completions that grow by one token, equal to ``decode_completion`` of all their tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Fast tokenizers decode tokens independently, except the first token of a text and runs of byte tokens.
        self._is_fast = hasattr(tokenizer, "backend_tokenizer")

    def start(self, prompt_ids: Sequence[int]) -> CompletionText:
        """The empty completion of a prompt."""
        return CompletionText(list(prompt_ids), self._decode([list(prompt_ids[-_CONTEXT:])])[0])

    def with_next(self, rows: Sequence[CompletionText], candidates: Sequence[Sequence[int]]) -> list[list[str]]:
        """For each row, the texts of its completion followed by each of its candidate tokens."""
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
        """Texts of a row's candidates; ``decoded`` holds its context alone, then with each candidate."""
        context = decoded[0]
        # The candidate's text can be cut off the window's only if the context decodes to the end of the text, in whole
        # characters.
        in_step = self._is_fast and context.strip() and not context.endswith("�")
        if not in_step or not (row.prompt_end + row.text).endswith(context.lstrip(" ")):
            return [self._decode_all(row, token) for token in tokens]
        return [
            row.text + window[len(context) :] if window.startswith(context) else self._decode_all(row, token)
            for token, window in zip(tokens, decoded[1:], strict=True)
        ]

    def _decode_all(self, row: CompletionText, token: int) -> str:
        return decode_completion(self.tokenizer, row.prompt_ids, [*row.token_ids, token])

    def _decode(self, ids: list[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return texts


@dataclass
class SplitPoint:
    """A position in a text that no token crosses, now or when the text grows: the tokens before it do not change."""

    window_start: int  # where encoding starts again, some words before the split point
    position: int  # of the split point in the text
    tokens_before: int  # tokens of the text before the split point
    window_ids: list[int]  # tokens of the window before the split point


@dataclass
class TokenizedText:
    """A text with its tokens, without special tokens around them, and a split point near its end."""

    text: str
    ids: list[int]
    split: SplitPoint | None = None


@dataclass(frozen=True)
class TokenSuffix:
    """Tokens of a longer text: the first ``kept`` tokens of the text that it continues, then ``ids``."""

    kept: int
    ids: list[int]


class Retokenizer:
    """Tokens of texts that grow, equal to encoding each whole text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.splitter = SpaceSplitter(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of whole texts, without special tokens around them."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """Encode whole texts, which can then be continued."""
        return [TokenizedText(text, ids) for text, ids in zip(texts, self.encode(texts), strict=True)]

    def encode_continuations(
        self, readings: Sequence[TokenizedText], texts: Sequence[Sequence[str]]
    ) -> list[list[TokenSuffix]]:
        """Tokens of ``texts[i]``, each of which continues ``readings[i]`` (or is another text: exact, but slower)."""
        # 1. a window of each text, from a split point of its reading on
        for reading in readings:
            self._update_split(reading)
        pairs = [(reading, text) for reading, mine in zip(readings, texts, strict=True) for text in mine]
        windows = [self._window(reading, text) for reading, text in pairs]
        # 2. encode all windows together, and attach them to the tokens before the split point
        encoded = self.encode([window for _, window in windows])
        suffixes = [
            self._attach(reading, start, ids)
            for (reading, _), (start, _), ids in zip(pairs, windows, encoded, strict=True)
        ]
        # 3. encode whole texts where that failed
        failed = [i for i, suffix in enumerate(suffixes) if suffix is None]
        for i, ids in zip(failed, self.encode([pairs[i][1] for i in failed]), strict=True):
            suffixes[i] = TokenSuffix(0, ids)
        found = iter(suffixes)
        return [[suffix for suffix in (next(found) for _ in mine) if suffix is not None] for mine in texts]

    def append(self, reading: TokenizedText, text: str, suffix: TokenSuffix) -> TokenizedText:
        """The longer text whose tokens ``encode_continuations`` gave."""
        return TokenizedText(text, [*reading.ids[: suffix.kept], *suffix.ids], reading.split if suffix.kept else None)

    def _window(self, reading: TokenizedText, text: str) -> tuple[int, str]:
        """Where encoding may start, and the text from there."""
        if reading.split is not None and text.startswith(reading.text):
            start = reading.split.window_start
            if not self.splitter.has_added_token(text, start):
                return start, text[start:]
        return 0, text

    def _attach(self, reading: TokenizedText, start: int, ids: list[int]) -> TokenSuffix | None:
        """Tokens of the whole text, given its window's tokens; None if the window differs before the split point."""
        if start == 0:
            return TokenSuffix(0, ids)
        split = reading.split
        assert split is not None, "a window starts at a split point"
        if ids[: len(split.window_ids)] != split.window_ids or self.splitter.unknown_id in ids:
            return None
        return TokenSuffix(split.tokens_before, ids[len(split.window_ids) :])

    def _update_split(self, reading: TokenizedText) -> None:
        """Move the split point to the last one of the text, if that is far enough from its present one."""
        old = reading.split
        if not self.splitter.usable or (old is not None and len(reading.text) - old.position < _MIN_DISTANCE):
            return
        places = self.splitter.last_splits(reading.text)
        if places is None or (old is not None and places[2] == old.position):
            return
        start, meeting, position = places
        window = self.tokenizer(
            reading.text[start:], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, ends = window["input_ids"], [end for _, end in window["offset_mapping"]]
        before_split, before_meeting = (sum(end <= at - start for end in ends) for at in (position, meeting))
        # From the meeting point on, the window must have the same tokens as the whole text.
        if (
            before_meeting < before_split
            and ends[before_split - 1] == position - start
            and reading.ids[-(len(ids) - before_meeting) :] == ids[before_meeting:]
        ):
            tokens_before = len(reading.ids) - (len(ids) - before_split)
            reading.split = SplitPoint(start, position, tokens_before, ids[:before_split])


_SAMPLES = ("alpha beta", "Beta 7", "7 beta", "12 34", ". beta", ") 7", "中 beta", "é beta", "🙂 beta", "'s beta")
_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Prepend", "Precompiled", "BertNormalizer",
    "Strip", "Replace", "Sequence",
}  # fmt: skip
_PRE_TOKENIZERS = {
    "ByteLevel", "Split", "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Digits", "Punctuation",
    "CharDelimiterSplit", "UnicodeScripts", "Sequence",
}  # fmt: skip
_SPACE_PATTERNS = {" {2,}", r"\s+", r"\s{2,}", r"[\r\n\t]", r"[\n\r\t]"}
_LOOKS_AROUND = re.compile(r"\(\?[=!<]|\\[bBAzZG]|[\^$]|\\[1-9]")
_CHARACTER_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")


class SpaceSplitter:
    """Finds spaces at which a text can be split so that a tokenizer encodes both parts as it encodes the whole.

    Only a space between a visible character and an ASCII letter or digit counts, and only for a tokenizer of the
    ``tokenizers`` library whose parts are known to work from left to right without looking back:

    - If the pre-tokenizer always splits at such a space (checked on samples), no token crosses it, and the text after
      it is encoded on its own.
    - If a BPE merges across spaces, compare the tokens of the text so far with those of a window of the longer text.
      Merges are made in order of rank, so two neighbors stay separate exactly if they stay separate as a pair. If both
      encodings share a token, then the text's tokens up to it and the window's tokens from it on are the encoding of
      the longer text.

    Attributes:
        usable: whether this holds for the tokenizer.
        unknown_id: the unknown token, if the tokenizer fuses neighbors of it; windows with it cannot be used.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.usable = _splits_at_spaces(tokenizer)
        added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
        self._longest = max(map(len, added), default=0)
        self._added = re.compile("|".join(map(re.escape, added)), re.IGNORECASE) if added else None
        fuses_unknown = self.usable and getattr(tokenizer.backend_tokenizer.model, "fuse_unk", False)
        self.unknown_id: int | None = getattr(tokenizer, "unk_token_id", None) if fuses_unknown else None

    def has_added_token(self, text: str, start: int) -> bool:
        """Whether an added token is in the text from ``start`` on, or reaches into it."""
        return self._added is not None and bool(self._added.search(text[max(0, start - self._longest) :]))

    def last_splits(self, text: str) -> tuple[int, int, int] | None:
        """The last three spaces at which a text can be split, the earliest first; None if there are fewer."""
        found: list[int] = []
        place, first = len(text) - 1, max(1, len(text) - _SEARCH_CHARACTERS)
        while len(found) < _SPLIT_POINTS and (place := text.rfind(" ", first, place)) > 0:
            after = text[place + 1]
            if text[place - 1].isprintable() and text[place - 1] != " " and after.isascii() and after.isalnum():
                found.append(place)
        return (found[2], found[1], found[0]) if len(found) == _SPLIT_POINTS else None


def _splits_at_spaces(tokenizer: Any) -> bool:
    """Whether the rules of `SpaceSplitter` hold for a tokenizer, according to its components."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    try:
        normalizers, splitters = _components(backend.normalizer), _components(backend.pre_tokenizer)
    except Exception:  # a component written in Python cannot be inspected, and raises an error of its own
        return False
    known = all(map(_is_known_normalizer, normalizers)) and all(map(_is_known_pre_tokenizer, splitters))
    if not known or getattr(backend.model, "dropout", None) or _hides_added_tokens(tokenizer, normalizers):
        return False
    return _splits_every_sample(tokenizer) or _is_plain_bpe(backend.model, splitters)


def _components(component: Any) -> list[dict[str, Any]]:
    """Settings of a component and, if it is a sequence, of all its parts."""
    return [] if component is None else _flatten(json.loads(component.__getstate__()))


def _flatten(state: dict[str, Any]) -> list[dict[str, Any]]:
    inner = state.get("normalizers") or state.get("pretokenizers") or []
    return [state, *(part for child in inner for part in _flatten(child))]


def _is_known_normalizer(part: dict[str, Any]) -> bool:
    if part["type"] != "Replace":
        return part["type"] in _NORMALIZERS
    pattern = part["pattern"]
    replaced = pattern.get("String")
    return pattern.get("Regex") in _SPACE_PATTERNS or replaced == "  " or (replaced is not None and len(replaced) == 1)


def _is_known_pre_tokenizer(part: dict[str, Any]) -> bool:
    if part["type"] != "Split" or "Regex" not in part["pattern"]:
        return part["type"] in _PRE_TOKENIZERS
    return not _LOOKS_AROUND.search(_CHARACTER_CLASS.sub("", part["pattern"]["Regex"].replace(r"(?!\S)", "")))


def _hides_added_tokens(tokenizer: Any, normalizers: list[dict[str, Any]]) -> bool:
    """Whether an added token may be found in the normalized text that the original text does not show."""
    changes = {part["type"] for part in normalizers} - {"Prepend", "Replace", "Sequence"}
    return bool(changes) and any(token.normalized for token in tokenizer.added_tokens_decoder.values())


def _splits_every_sample(tokenizer: Any) -> bool:
    """Whether the pre-tokenizer splits each sample at its last space."""
    for sample in _SAMPLES:
        encoding = tokenizer(f"so {sample} so", add_special_tokens=False).encodings[0]
        place = len("so ") + sample.rindex(" ")
        left = [word for word, (_, end) in zip(encoding.word_ids, encoding.offsets, strict=True) if end <= place]
        right = [word for word, (_, end) in zip(encoding.word_ids, encoding.offsets, strict=True) if end > place]
        if not left or not right or None in left + right or left[-1] == right[0]:
            return False
    return True


def _is_plain_bpe(model: Any, splitters: list[dict[str, Any]]) -> bool:
    """Whether a tokenizer is a BPE that merges across the whole text, without splitting it into words first."""
    whole_text = all(
        part["type"] in ("Metaspace", "Digits", "Sequence")
        or (part["type"] == "Split" and "String" in part["pattern"])
        or (part["type"] == "ByteLevel" and not part["use_regex"])
        for part in splitters
    )
    marks_words = (
        getattr(model, "continuing_subword_prefix", None)
        or getattr(model, "end_of_word_suffix", None)
        or getattr(model, "ignore_merges", False)
    )
    return type(model).__name__ == "BPE" and whole_text and not marks_words
