"""The bytes that each token adds to a text: half characters, leading spaces, and nothing for special tokens."""

import json
import re
from typing import Any

_HEX = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Bytes and text of single tokens of one tokenizer, each worked out once.

    Bytes of a completion's tokens joined are its text in UTF-8 (a special token adds none), so a token that is half a
    character has bytes but no text of its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._added = {int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
        self._kinds = _decoders_of(tokenizer)
        self._of_char = _byte_of_char() if "ByteLevel" in self._kinds else {}
        self._known: dict[int, tuple[bytes, str]] = {}

    def of(self, token_id: int) -> bytes:
        """What the token adds to a text."""
        return self._look_up(token_id)[0]

    def text(self, token_id: int) -> str:
        """The token alone: U+FFFD where its bytes are no text, its name where it is a special token."""
        return self._look_up(token_id)[1]

    def _look_up(self, token_id: int) -> tuple[bytes, str]:
        if token_id not in self._known:
            self._known[token_id] = self._work_out(token_id)
        return self._known[token_id]

    def _work_out(self, token_id: int) -> tuple[bytes, str]:
        name = self.tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._special or name is None:
            return b"", name or ""
        added = self._added.get(token_id)
        raw = self._bytes_of(token_id, str(name)) if added is None else added.encode()
        return raw, raw.decode(errors="replace")

    def _bytes_of(self, token_id: int, name: str) -> bytes:
        if "ByteLevel" in self._kinds:
            return bytes(byte for char in name for byte in self._of_char.get(char, char.encode()))
        if "ByteFallback" in self._kinds and (found := _HEX.fullmatch(name)):
            return bytes([int(found[1], 16)])
        if self._kinds & {"Replace", "Metaspace"}:
            return name.replace("▁", " ").encode()
        if self._kinds == {"Fuse"}:
            return name.encode()
        text = str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        return b"" if "�" in text else text.encode()


def _decoders_of(tokenizer: Any) -> set[str]:
    """Names of the steps by which a fast tokenizer turns tokens into text; empty for others."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


def _byte_of_char() -> dict[str, bytes]:
    """GPT-2's printable character for each byte, read backwards."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: bytes([byte]) for byte, char in bytes_to_unicode().items()}
