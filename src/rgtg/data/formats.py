"""Convert one row of any accepted format to a pair or a prompt: plain text, chat messages, HH-style dialogues."""

import json
from collections.abc import Sequence
from typing import Any

from rgtg.data.sources import RejectReason, RowError
from rgtg.errors import DataError, UsageError, one_line
from rgtg.tokenization.conversation import (
    Message,
    RenderedReplies,
    TemplateKwargs,
    check_template_kwargs,
    render_replies,
    text_of_content,
)
from rgtg.types.generation import PreferencePair

HH_TURN = "\n\nAssistant:"
_NOT_A_REPLY = ("user", "human", "system")
_JSON_NAMES = {str: "text", list: "a list", dict: "an object", bool: "true/false", int: "a number", float: "a number"}


def to_pair(
    row: Any, tokenizer: Any = None, *, template_kwargs: TemplateKwargs | None = None, readable: bool = False
) -> PreferencePair:
    """Read one row as a preference pair.

    Args:
        row: its JSON value; fields other than prompt, chosen and rejected are ignored, except chat_template_kwargs
            and tools of chats.
        tokenizer: renders chat messages; plain text needs none.
        template_kwargs: variables of the chat template, for rows that have none of their own.
        readable: write chats as people read them, instead of rendering them.

    Raises:
        RowError: the row cannot be used.
        UsageError: the row holds chat messages, and there is no tokenizer with a chat template.
    """
    require_fields(row, ("chosen", "rejected"))
    try:
        if isinstance(row["chosen"], list) or isinstance(row.get("prompt"), list):
            return _readable_pair(row) if readable else _chat_pair(row, tokenizer, template_kwargs)
        return _text_pair(row)
    except RecursionError as error:
        raise RowError(RejectReason.WRONG_TYPE, "lists are nested too deeply") from error


def to_prompt(row: Any) -> str:
    """Read the prompt of a row of prompts, or of a plain-text or HH-style pair.

    Raises:
        RowError: the row has no prompt that is text.
    """
    require_fields(row, ())
    if "prompt" not in row and "chosen" in row:
        require_fields(row, ("chosen", "rejected"))
        prompt = _split_dialogue(_text(row, "chosen"), _text(row, "rejected"))[0]
    else:
        require_fields(row, ("prompt",))
        prompt = _text(row, "prompt")
    return require_prompt(prompt)


def require_prompt(prompt: str) -> str:
    """Return the prompt if it is not blank and can be encoded.

    Raises:
        RowError: it is blank or cannot be encoded.
    """
    if not prompt.strip():
        raise RowError(RejectReason.EMPTY_PROMPT)
    require_unicode("prompt", prompt)
    return prompt


def to_prompt_or_chat(row: Any) -> str | list[Message]:
    """Read the prompt of a row: text, or chat messages under ``prompt`` or (without a prompt) ``messages``.

    The prompt of a pair of chats is the messages that both sides share.

    Raises:
        RowError: the row has neither, or offers tools, which are not supported.
    """
    if not isinstance(row, dict):
        return to_prompt(row)
    if isinstance(row.get("prompt"), list):
        _refuse_tools(row)
        return to_chat(row["prompt"], "prompt")
    if row.get("prompt") is None and row.get("messages") is not None:
        _refuse_tools(row)
        return to_chat(row["messages"], "messages")
    if "prompt" not in row and isinstance(row.get("chosen"), list):
        _refuse_tools(row)
        require_fields(row, ("chosen", "rejected"))
        return to_chat(_chat_parts(row)[0], "chosen")
    return to_prompt(row)


def _refuse_tools(row: dict[str, Any]) -> None:
    if row.get("tools"):
        raise RowError(RejectReason.UNSUPPORTED, "tools: not supported; leave it out")


def to_template_kwargs(row: Any) -> dict[str, Any]:
    """Read a row's own ``chat_template_kwargs``: variables of the chat template, by name; empty without them.

    Raises:
        RowError: they are not an object.
    """
    value = row.get("chat_template_kwargs") if isinstance(row, dict) else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowError(RejectReason.WRONG_TYPE, f"chat_template_kwargs is {json_name(value)}, expected an object")
    # Parquet gives every row the names of all rows, null if it had none
    return {name: item for name, item in value.items() if item is not None}


def readable_prompt(prompt: "str | Sequence[Message]") -> str:
    r"""A prompt for people: text as it is, a conversation with its roles, a single question without.

    >>> readable_prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and two?"}])
    'System: Be brief.\n\nUser: Two and two?'
    """
    if isinstance(prompt, str):
        return prompt
    turns = [(str(message["role"]), _said(message)) for message in prompt]
    if [role for role, _ in turns] == ["user"]:
        return turns[0][1]
    return "\n\n".join(f"{role[:1].upper()}{role[1:]}: {text}" for role, text in turns)


def _said(message: Message) -> str:
    """A message's text, and the tools that it calls as JSON."""
    calls = message.get("tool_calls")
    text = text_of_content(message.get("content")) or ""
    return "\n".join(filter(None, [text, json.dumps(calls, ensure_ascii=False) if calls else ""]))


def to_chat(value: Any, name: str) -> list[Message]:
    """Read chat messages, at least one of which is not blank.

    Raises:
        RowError: all are blank, or the value is not a list of messages.
    """
    if not isinstance(value, list):
        raise RowError(RejectReason.WRONG_TYPE, f"{name} is {json_name(value)}, expected messages")
    messages = chat_messages(value, name)
    if not any(message["content"].strip() for message in messages):
        raise RowError(RejectReason.EMPTY_PROMPT)
    for i, message in enumerate(messages, start=1):
        for text in (message["role"], message["content"]):
            require_unicode(f"message {i} of {name}", text)
    return messages


def require_fields(row: Any, names: tuple[str, ...]) -> None:
    """Raise RowError if a row is not an object, lacks a field, or a field or its prompt is null."""
    if not isinstance(row, dict):
        raise RowError(RejectReason.WRONG_TYPE, f"the row is {json_name(row)}, expected an object")
    missing = [name for name in names if name not in row]
    if missing:
        raise RowError(RejectReason.MISSING_FIELD, ", ".join(missing))
    null = [name for name in ("prompt", *names) if name in row and row[name] is None]
    if null:
        raise RowError(RejectReason.NULL_FIELD, ", ".join(dict.fromkeys(null)))


def require_unicode(name: str, text: str) -> None:
    """Raise RowError for half a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            RejectReason.BAD_UTF8, f"{name} holds a lone surrogate at character {error.start + 1}"
        ) from error


def _text_pair(row: dict[str, Any]) -> PreferencePair:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    prompt = _text(row, "prompt") if "prompt" in row else None
    if prompt is None and (chosen.strip() or rejected.strip()):
        if chosen == rejected:
            raise RowError(RejectReason.EQUAL)
        prompt, chosen, rejected = _split_dialogue(chosen, rejected)
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not completion.strip():
            raise RowError(RejectReason.EMPTY_COMPLETION, name)
    if not (prompt or "").strip():
        raise RowError(RejectReason.EMPTY_PROMPT)
    return _pair(prompt or "", chosen, rejected)


def _split_dialogue(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two dialogues after their last HH_TURN into a shared prompt and two completions."""
    if HH_TURN not in chosen and HH_TURN not in rejected:
        raise RowError(RejectReason.MISSING_FIELD, f"prompt (and the texts hold no {HH_TURN!r} turn to split at)")
    end = chosen.rfind(HH_TURN) + len(HH_TURN)
    if rejected.rfind(HH_TURN) + len(HH_TURN) != end or chosen[:end] != rejected[:end]:
        raise RowError(RejectReason.NO_SHARED_PROMPT, f"the dialogues differ before their last {HH_TURN!r}")
    return chosen[:end], chosen[end:], rejected[end:]


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise RowError(RejectReason.WRONG_TYPE, f"{name} is {json_name(value)}, expected text")
    return value


def _chat_pair(row: dict[str, Any], tokenizer: Any, template_kwargs: TemplateKwargs | None) -> PreferencePair:
    prompt, chosen, rejected = _usable_chat_parts(row)
    kwargs = to_template_kwargs(row)
    if kwargs and tokenizer is not None:
        try:
            check_template_kwargs(tokenizer, kwargs)
        except UsageError as error:
            raise RowError(RejectReason.BAD_VALUE, one_line(error, 200)) from error
    rendered = _render(tokenizer, prompt, chosen, rejected, kwargs or template_kwargs)
    return _pair(rendered.prompt, *rendered.replies, templated=True)


def _readable_pair(row: dict[str, Any]) -> PreferencePair:
    prompt, chosen, rejected = _usable_chat_parts(row)
    return _pair(readable_prompt(prompt), _readable_reply(chosen), _readable_reply(rejected))


def _readable_reply(tail: list[Message]) -> str:
    return _said(tail[0]) if len(tail) == 1 else readable_prompt(tail)


def _usable_chat_parts(row: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages of the prompt, and those of both replies, none of which is empty."""
    _refuse_tools(row)
    prompt, chosen, rejected = _chat_parts(row)
    for name, tail in (("chosen", chosen), ("rejected", rejected)):
        _require_reply(name, tail)
    if not any(message["content"].strip() for message in prompt):
        raise RowError(RejectReason.EMPTY_PROMPT)
    return prompt, chosen, rejected


def _pair(prompt: str, chosen: str, rejected: str, *, templated: bool = False) -> PreferencePair:
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        require_unicode(name, text)
    if chosen == rejected:
        raise RowError(RejectReason.EQUAL)
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, prompt_templated=templated)


def _chat_parts(row: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages of the prompt, and those that each side adds."""
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if isinstance(row.get("prompt"), list):
        prompt = _messages(row, "prompt")
        return prompt, _without(prompt, chosen), _without(prompt, rejected)
    if chosen == rejected:
        raise RowError(RejectReason.EQUAL)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared in (0, len(chosen), len(rejected)):
        raise RowError(
            RejectReason.NO_SHARED_PROMPT, "chosen and rejected must share their leading messages, then differ"
        )
    if "prompt" in row and _text(row, "prompt") != chosen[shared - 1]["content"]:
        raise RowError(RejectReason.NO_SHARED_PROMPT, "prompt is not the last message that chosen and rejected share")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _without(prompt: list[Message], messages: list[Message]) -> list[Message]:
    """Drop the prompt from a full conversation; a reply without the prompt stays as it is."""
    return messages[len(prompt) :] if prompt and messages[: len(prompt)] == prompt else messages


def _messages(row: dict[str, Any], name: str) -> list[Message]:
    value = row[name]
    if not isinstance(value, list):
        raise RowError(RejectReason.WRONG_TYPE, f"{name} is {json_name(value)}, but the row's other side is messages")
    return chat_messages(value, name)


def chat_messages(value: list[Any], name: str) -> list[Message]:
    """Check chat messages: each needs a role, and a content that is text or text parts, which become one text.

    Null fields are dropped. Other fields (name, tool_calls) are left for the chat template.

    Raises:
        RowError: a message has no text, or holds something else.
    """
    return [_message(item, f"message {i} of {name}") for i, item in enumerate(value, start=1)]


def _message(value: Any, where: str) -> Message:
    # Parquet gives every message the fields of all messages, null if it had none.
    fields = {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}
    content = fields.get("content", "" if fields.get("tool_calls") else None)
    text = text_of_content(content)
    if isinstance(fields.get("role"), str) and text is not None:
        return fields | {"content": text}
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise RowError(RejectReason.UNSUPPORTED, f"{where} holds {kind!r:.40}: only text is read")
    raise RowError(RejectReason.WRONG_TYPE, f"{where} is not {{role: text, content: text or parts of text}}")


def _require_reply(name: str, tail: list[Message]) -> None:
    if not tail or not tail[-1]["content"].strip():
        raise RowError(RejectReason.EMPTY_COMPLETION, name)
    asked = next((message["role"] for message in tail if message["role"] in _NOT_A_REPLY), None)
    if asked is not None:
        raise RowError(RejectReason.NO_SHARED_PROMPT, f"{name} holds a {asked!r} message after the shared ones")


def _render(
    tokenizer: Any,
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    template_kwargs: TemplateKwargs | None,
) -> RenderedReplies:
    if tokenizer is None:
        raise UsageError("the row holds chat messages: give a tokenizer (--tokenizer DIR), whose template renders them")
    try:
        return render_replies(tokenizer, prompt, [chosen, rejected], template_kwargs=template_kwargs)
    except DataError as error:
        raise RowError(RejectReason.CHAT_TEMPLATE, one_line(error, 200)) from error


def json_name(value: Any) -> str:
    """JSON's name for the type of a value."""
    return "null" if value is None else _JSON_NAMES.get(type(value), type(value).__name__)
