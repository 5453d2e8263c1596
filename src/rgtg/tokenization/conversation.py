"""From chat messages, or a plain prompt, to text and token ids."""

from collections.abc import Sequence
from typing import Any

from rgtg.errors import DataError, UsageError
from rgtg.tokenization.encoding import encode_prompt

# A prompt as the user gives it: plain text, or chat messages.
PromptSource = str | Sequence[dict[str, Any]]


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
    """Text of chat messages, written by the tokenizer's own chat template.

    Raises:
        UsageError: the tokenizer has no chat template.
        DataError: the template rejects the messages, or does what its sandbox forbids.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the data holds chat messages, but the tokenizer has no chat template: set one in its "
            "tokenizer_config.json, or give prompt, chosen and rejected as plain text"
        )
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses these messages: {error}") from error


def encode_source(tokenizer: Any, source: PromptSource) -> tuple[str, list[int]]:
    """Text and token ids of a prompt: plain text as it is, chat messages through the tokenizer's template.

    Raises:
        DataError: an empty prompt, or messages that the template rejects.
        UsageError: chat messages, and a tokenizer without a chat template.
    """
    if isinstance(source, str):
        return source, encode_prompt(tokenizer, source)
    text = render_chat(tokenizer, source, add_generation_prompt=True)
    return text, encode_prompt(tokenizer, text, templated=True)
