"""Whether the tokenizer that transformers makes of a GGUF file encodes text as llama.cpp does."""

from typing import Any, Protocol

from rgtg.errors import TokenizerMismatchError
from rgtg.tokenization.encoding import PROBES


class Tokenizing(Protocol):
    """What the comparison needs of a model."""

    name_or_path: str

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text."""
        ...


def require_same_tokens(model: Tokenizing, tokenizer: Any) -> None:
    """Check on probe texts, and on a chat, that both tokenizers give the same ids.

    Raises:
        TokenizerMismatchError: they differ; the message shows the first text on which they do.
    """
    for text in [*PROBES, *_chats(tokenizer)]:
        for special in (False, True):
            ours = list(tokenizer(text, add_special_tokens=special).input_ids)
            theirs = model.tokenize(text, special=special)
            if ours != theirs:
                at = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                raise TokenizerMismatchError(
                    f"{model.name_or_path}: transformers makes another tokenizer of this file than llama.cpp does: "
                    f"{text[:40]!r} differs at token {at}: {ours[at : at + 4]} and {theirs[at : at + 4]}. Heads and "
                    "scorers would read other tokens than those they were trained with; use --engine torch with the "
                    "original checkpoint"
                )


def _chats(tokenizer: Any) -> list[str]:
    """A chat as the file's own template writes it; none without a template that takes it."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    try:
        messages = [{"role": "user", "content": "How are you?\n\nI'm 42."}]
        return [str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))]
    except Exception:  # a template is a program: it may reject this chat, and take others
        return []
