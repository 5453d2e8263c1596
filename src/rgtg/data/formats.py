"""One row of any accepted format to a PreferencePair: plain text, chat messages, or HH-style whole dialogues."""

from typing import Any

from rgtg.data.sources import Reason, RowProblem
from rgtg.errors import UsageError
from rgtg.tokenization.conversation import render_chat
from rgtg.types.generation import PreferencePair

HH_TURN = "\n\nAssistant:"
_NOT_A_REPLY = ("user", "human", "system")
_JSON_NAMES = {str: "text", list: "a list", dict: "an object", bool: "true/false", int: "a number", float: "a number"}
Message = dict[str, Any]


def to_pair(row: Any, tokenizer: Any = None) -> PreferencePair:
    """Read one row as a pair of texts.

    Args:
        row: the row's JSON value; fields other than prompt, chosen and rejected are not read.
        tokenizer: renders chat messages; plain text needs none.

    Raises:
        RowProblem: the row is unusable, with the reason.
        UsageError: the row holds chat messages, and there is no tokenizer with a chat template.
    """
    require_fields(row, ("chosen", "rejected"))
    try:
        if isinstance(row["chosen"], list) or isinstance(row.get("prompt"), list):
            return _chat_pair(row, tokenizer)
        return _text_pair(row)
    except RecursionError as error:
        raise RowProblem(Reason.WRONG_TYPE, "lists are nested too deeply") from error


def to_prompt(row: Any) -> str:
    """The prompt of a row of prompts, or of a plain-text or HH-style pair.

    Raises:
        RowProblem: the row has no prompt that is text.
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
    """The prompt, where it says something and can be encoded."""
    if not prompt.strip():
        raise RowProblem(Reason.EMPTY_PROMPT)
    require_unicode("prompt", prompt)
    return prompt


def to_prompt_or_chat(row: Any) -> str | list[Message]:
    """The prompt of a row: text, or chat messages under ``prompt`` or (without a prompt) ``messages``.

    Raises:
        RowProblem: the row has neither.
    """
    if isinstance(row, dict) and isinstance(row.get("prompt"), list):
        return to_chat(row["prompt"], "prompt")
    if isinstance(row, dict) and row.get("prompt") is None and row.get("messages") is not None:
        return to_chat(row["messages"], "messages")
    return to_prompt(row)


def to_chat(value: Any, name: str) -> list[Message]:
    """Chat messages of which one at least says something.

    Raises:
        RowProblem: they do not, or are no messages.
    """
    if not isinstance(value, list):
        raise RowProblem(Reason.WRONG_TYPE, f"{name} is {json_name(value)}, expected messages")
    messages = chat_messages(value, name)
    if not any(message["content"].strip() for message in messages):
        raise RowProblem(Reason.EMPTY_PROMPT)
    for i, message in enumerate(messages, start=1):
        for text in (message["role"], message["content"]):
            require_unicode(f"message {i} of {name}", text)
    return messages


def require_fields(row: Any, names: tuple[str, ...]) -> None:
    """Refuse a row that is no object, lacks one of ``names``, or holds null in it or in its prompt."""
    if not isinstance(row, dict):
        raise RowProblem(Reason.WRONG_TYPE, f"the row is {json_name(row)}, expected an object")
    missing = [name for name in names if name not in row]
    if missing:
        raise RowProblem(Reason.MISSING_FIELD, ", ".join(missing))
    null = [name for name in ("prompt", *names) if name in row and row[name] is None]
    if null:
        raise RowProblem(Reason.NULL_FIELD, ", ".join(dict.fromkeys(null)))


def require_unicode(name: str, text: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(Reason.BAD_UTF8, f"{name} holds a lone surrogate at character {error.start + 1}") from error


def _text_pair(row: dict[str, Any]) -> PreferencePair:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    prompt = _text(row, "prompt") if "prompt" in row else None
    if prompt is None and (chosen.strip() or rejected.strip()):
        if chosen == rejected:
            raise RowProblem(Reason.EQUAL)
        prompt, chosen, rejected = _split_dialogue(chosen, rejected)
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not completion.strip():
            raise RowProblem(Reason.EMPTY_COMPLETION, name)
    if not (prompt or "").strip():
        raise RowProblem(Reason.EMPTY_PROMPT)
    return _pair(prompt or "", chosen, rejected)


def _split_dialogue(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Cut two whole dialogues after their last HH_TURN, which must end the same text in both."""
    if HH_TURN not in chosen and HH_TURN not in rejected:
        raise RowProblem(Reason.MISSING_FIELD, f"prompt (and the texts hold no {HH_TURN!r} turn to split at)")
    end = chosen.rfind(HH_TURN) + len(HH_TURN)
    if rejected.rfind(HH_TURN) + len(HH_TURN) != end or chosen[:end] != rejected[:end]:
        raise RowProblem(Reason.NO_SHARED_PROMPT, f"the dialogues differ before their last {HH_TURN!r}")
    return chosen[:end], chosen[end:], rejected[end:]


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise RowProblem(Reason.WRONG_TYPE, f"{name} is {json_name(value)}, expected text")
    return value


def _chat_pair(row: dict[str, Any], tokenizer: Any) -> PreferencePair:
    prompt, chosen, rejected = _chat_parts(row)
    for name, tail in (("chosen", chosen), ("rejected", rejected)):
        _require_reply(name, tail)
    if not any(message["content"].strip() for message in prompt):
        raise RowProblem(Reason.EMPTY_PROMPT)
    opening = _render(tokenizer, prompt, add_generation_prompt=True)
    replies = [_render_reply(tokenizer, opening, prompt, tail) for tail in (chosen, rejected)]
    return _pair(opening, *replies, templated=True)


def _pair(prompt: str, chosen: str, rejected: str, *, templated: bool = False) -> PreferencePair:
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        require_unicode(name, text)
    if chosen == rejected:
        raise RowProblem(Reason.EQUAL)
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, prompt_templated=templated)


def _chat_parts(row: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Messages of the prompt, and what each side adds to them."""
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if isinstance(row.get("prompt"), list):
        prompt = _messages(row, "prompt")
        return prompt, _without(prompt, chosen), _without(prompt, rejected)
    if chosen == rejected:
        raise RowProblem(Reason.EQUAL)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared in (0, len(chosen), len(rejected)):
        raise RowProblem(Reason.NO_SHARED_PROMPT, "chosen and rejected must share their leading messages, then differ")
    if "prompt" in row and _text(row, "prompt") != chosen[shared - 1]["content"]:
        raise RowProblem(Reason.NO_SHARED_PROMPT, "prompt is not the last message that chosen and rejected share")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _without(prompt: list[Message], messages: list[Message]) -> list[Message]:
    """Drop the prompt from a full conversation; a bare reply stays as it is."""
    return messages[len(prompt) :] if prompt and messages[: len(prompt)] == prompt else messages


def _messages(row: dict[str, Any], name: str) -> list[Message]:
    value = row[name]
    if not isinstance(value, list):
        raise RowProblem(Reason.WRONG_TYPE, f"{name} is {json_name(value)}, but the row's other side is messages")
    return chat_messages(value, name)


def chat_messages(value: list[Any], name: str) -> list[Message]:
    """Chat messages, each with a role and a content that are text; fields that hold null are left out."""
    for i, message in enumerate(value, start=1):
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            raise RowProblem(Reason.WRONG_TYPE, f"message {i} of {name} is not {{role: text, content: text}}")
    # Parquet gives every message the fields of all messages, null where it had none.
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _require_reply(name: str, tail: list[Message]) -> None:
    if not tail or not tail[-1]["content"].strip():
        raise RowProblem(Reason.EMPTY_COMPLETION, name)
    asked = next((message["role"] for message in tail if message["role"] in _NOT_A_REPLY), None)
    if asked is not None:
        raise RowProblem(Reason.NO_SHARED_PROMPT, f"{name} holds a {asked!r} message after the shared ones")


def _render_reply(tokenizer: Any, opening: str, prompt: list[Message], tail: list[Message]) -> str:
    """What the reply adds to the rendered prompt, closed by EOS where the template closes no turn."""
    whole = _render(tokenizer, [*prompt, *tail], add_generation_prompt=False)
    if not whole.startswith(opening):
        raise RowProblem(Reason.CHAT_TEMPLATE, "the template writes the prompt differently once there is a reply")
    reply = whole[len(opening) :]
    if not reply.strip():
        raise RowProblem(Reason.CHAT_TEMPLATE, "the template leaves the reply out")
    # Only here is it known whether the text ends with the reply itself or with the template's own mark.
    closed = not reply.rstrip().endswith(tail[-1]["content"].rstrip())
    return reply if closed or not tokenizer.eos_token else reply + str(tokenizer.eos_token)


def _render(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool) -> str:
    if tokenizer is None:
        raise UsageError("the row holds chat messages: give a tokenizer (--tokenizer DIR), whose template renders them")
    try:
        return render_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    except UsageError:
        raise
    except Exception as error:  # a template is a program: it may refuse roles, or fail in any way
        raise RowProblem(Reason.CHAT_TEMPLATE, " ".join(str(error).split())[:200]) from error


def json_name(value: Any) -> str:
    """What JSON calls a value of this kind."""
    return "null" if value is None else _JSON_NAMES.get(type(value), type(value).__name__)
