"""Where a text can be cut so that a tokenizer reads both parts as it reads the whole: before a word after a space.

The claim is made for tokenizers of the ``tokenizers`` library whose parts are known to work from left to right without
looking back, and only at a space between a visible character and an ASCII letter or digit:

- Where the pre-tokenizer always splits there (tried on samples), tokens never cross the place, and what follows it is
  encoded by itself.
- Where a BPE merges over spaces, let two encodings, one of a whole text and one of a window on a longer one, share a
  token. Merges are made in order of rank, so tokens side by side stay apart exactly if they stay apart as a pair; the
  tokens up to the shared one and those of the window from it on are therefore the encoding of the longer whole.
"""

import json
import re
from typing import Any

_PLACES = 3
# Characters that are searched for places.
_REACH = 400
_SAMPLES = ("alpha beta", "Beta 7", "7 beta", "12 34", ". beta", ") 7", "中 beta", "é beta", "🙂 beta", "'s beta")
_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Prepend", "Precompiled", "BertNormalizer",
    "Strip", "Replace", "Sequence",
}  # fmt: skip
_SPLITTERS = {
    "ByteLevel", "Split", "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Digits", "Punctuation",
    "CharDelimiterSplit", "UnicodeScripts", "Sequence",
}  # fmt: skip
_SPACES = {" {2,}", r"\s+", r"\s{2,}", r"[\r\n\t]", r"[\n\r\t]"}
_LOOKS_AROUND = re.compile(r"\(\?[=!<]|\\[bBAzZG]|[\^$]|\\[1-9]")
_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")


class SpaceCuts:
    """What is known of one tokenizer: whether it may be cut at spaces, and which texts are too special for it."""

    def __init__(self, tokenizer: Any) -> None:
        self.usable = cuts_at_spaces(tokenizer)
        added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
        self._longest = max(map(len, added), default=0)
        self._added = re.compile("|".join(map(re.escape, added)), re.IGNORECASE) if added else None
        unknown = getattr(tokenizer, "unk_token_id", None)
        self.unknown: int | None = unknown if self.usable and _merges_unknown(tokenizer) else None

    def plain(self, text: str, start: int) -> bool:
        """Whether no added token stands in the text from ``start`` on, or reaches into it."""
        if self._added is None:
            return True
        near = text[max(0, start - self._longest) :]
        return not self._added.search(near)

    def places(self, text: str) -> tuple[int, int, int] | None:
        """The last three places in a text where it may be cut, the earliest first."""
        found: list[int] = []
        place, first = len(text) - 1, max(1, len(text) - _REACH)
        while len(found) < _PLACES and (place := text.rfind(" ", first, place)) > 0:
            follows = text[place + 1]
            if text[place - 1].isprintable() and text[place - 1] != " " and follows.isascii() and follows.isalnum():
                found.append(place)
        return (found[2], found[1], found[0]) if len(found) == _PLACES else None


def cuts_at_spaces(tokenizer: Any) -> bool:
    """Whether the claim at the head of this file holds for a tokenizer, as far as its parts say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    try:
        normalizers, splitters = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    except Exception:  # a part written in Python cannot be looked into, and says so in its own way
        return False
    known = all(map(_known_normalizer, normalizers)) and all(map(_known_splitter, splitters))
    if not known or getattr(backend.model, "dropout", None) or _finds_added_tokens_late(tokenizer, normalizers):
        return False
    return _always_splits(tokenizer) or _merges_by_rank(backend.model, splitters)


def _parts(component: Any) -> list[dict[str, Any]]:
    """Settings of a component, and of all parts of a sequence."""
    return [] if component is None else _flat(json.loads(component.__getstate__()))


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    inner = state.get("normalizers") or state.get("pretokenizers") or []
    return [state, *(part for child in inner for part in _flat(child))]


def _known_normalizer(part: dict[str, Any]) -> bool:
    if part["type"] != "Replace":
        return part["type"] in _NORMALIZERS
    pattern = part["pattern"]
    return pattern.get("Regex") in _SPACES or len(pattern.get("String", "12")) == 1 or pattern.get("String") == "  "


def _known_splitter(part: dict[str, Any]) -> bool:
    if part["type"] != "Split" or "Regex" not in part["pattern"]:
        return part["type"] in _SPLITTERS
    return not _LOOKS_AROUND.search(_CLASS.sub("", part["pattern"]["Regex"].replace(r"(?!\S)", "")))


def _finds_added_tokens_late(tokenizer: Any, normalizers: list[dict[str, Any]]) -> bool:
    """Whether an added token may stand where the text does not show it: it is looked for in what normalizing leaves."""
    changes = {part["type"] for part in normalizers} - {"Prepend", "Replace", "Sequence"}
    return bool(changes) and any(token.normalized for token in tokenizer.added_tokens_decoder.values())


def _always_splits(tokenizer: Any) -> bool:
    """Whether no piece of the samples reaches over the space in them."""
    for sample in _SAMPLES:
        read = tokenizer(f"so {sample} so", add_special_tokens=False).encodings[0]
        place = len("so ") + sample.rindex(" ")
        left = [word for word, (_, end) in zip(read.word_ids, read.offsets, strict=True) if end <= place]
        right = [word for word, (_, end) in zip(read.word_ids, read.offsets, strict=True) if end > place]
        if not left or not right or None in left + right or left[-1] == right[0]:
            return False
    return True


def _merges_by_rank(model: Any, splitters: list[dict[str, Any]]) -> bool:
    """Whether a BPE reads a text as one chain of characters, of which words are no special part."""
    whole = all(
        part["type"] in ("Metaspace", "Digits", "Sequence")
        or (part["type"] == "Split" and "String" in part["pattern"])
        or (part["type"] == "ByteLevel" and not part["use_regex"])
        for part in splitters
    )
    wordless = not (
        getattr(model, "continuing_subword_prefix", None)
        or getattr(model, "end_of_word_suffix", None)
        or getattr(model, "ignore_merges", False)
    )
    return type(model).__name__ == "BPE" and whole and wordless


def _merges_unknown(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer.backend_tokenizer.model, "fuse_unk", False))
