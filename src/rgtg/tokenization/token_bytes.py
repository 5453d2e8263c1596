"""The bytes of each token of a vocabulary, as detokenization joins them."""

import json
import re
from typing import Any

_HEX = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Bytes and text of a tokenizer's single tokens, computed once per token.

    The joined bytes of a completion's tokens are its text in UTF-8. A token may hold part of a character, which has
    bytes but no text; a special token has no bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._added = {int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
        self._decoders = _decoder_types(tokenizer)
        self._byte_of_char = _byte_level_alphabet() if "ByteLevel" in self._decoders else {}
        self._cache: dict[int, tuple[bytes, str]] = {}

    def of(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text."""
        return self._lookup(token_id)[0]

    def text(self, token_id: int) -> str:
        """The text of the token alone: U+FFFD for bytes that are no text, its name for a special token."""
        return self._lookup(token_id)[1]

    def _lookup(self, token_id: int) -> tuple[bytes, str]:
        if token_id not in self._cache:
            name, added = self.tokenizer.convert_ids_to_tokens(token_id), self._added.get(token_id)
            if token_id in self._special or name is None:
                self._cache[token_id] = b"", name or ""
            else:
                raw = self._bytes_of(token_id, str(name)) if added is None else added.encode()
                self._cache[token_id] = raw, raw.decode(errors="replace")
        return self._cache[token_id]

    def _bytes_of(self, token_id: int, name: str) -> bytes:
        if "ByteLevel" in self._decoders:
            return bytes(byte for char in name for byte in self._byte_of_char.get(char, char.encode()))
        if "ByteFallback" in self._decoders and (found := _HEX.fullmatch(name)):
            return bytes([int(found[1], 16)])
        if self._decoders & {"Replace", "Metaspace"}:
            return name.replace("▁", " ").encode()
        if self._decoders == {"Fuse"}:
            return name.encode()
        text = str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        return b"" if "�" in text else text.encode()


def _decoder_types(tokenizer: Any) -> set[str]:
    """Types of the decoders by which a fast tokenizer turns tokens into text; empty for other tokenizers."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


def _byte_level_alphabet() -> dict[str, bytes]:
    """The byte that each printable character of GPT-2's byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: bytes([byte]) for byte, char in bytes_to_unicode().items()}
