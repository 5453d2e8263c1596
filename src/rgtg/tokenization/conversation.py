"""From a conversation to text and token ids, and how a finished reply ends: by its owner's chat template.

Policy, scorers, training, audit and server all read chats through this module, so that the same conversation is the
same tokens to all of them. A chat template is applied once and writes all special tokens itself.
"""

import hashlib
import itertools
import json
import re
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rgtg.errors import DataError, UsageError, one_line
from rgtg.tokenization.encoding import encode_completion, encode_prompt

Message = dict[str, Any]
# A prompt as the user gives it: plain text, or chat messages.
PromptSource = str | Sequence[Message]
# Extra variables of a chat template, such as enable_thinking.
TemplateKwargs = Mapping[str, Any]

# What transformers sets itself, what its apply_chat_template takes for other purposes, and functions of templates.
_RESERVED = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
    "messages", "padding", "processor_kwargs", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "tokenize", "tokenizer_kwargs", "tools", "truncation", "raise_exception", "strftime_now", "namespace", "range",
    "dict", "lipsum", "cycler", "joiner",
})  # fmt: skip
# Messages of other roles (tool) are left out by some templates without a word.
_USUAL_ROLES = ("system", "user", "assistant")
# Stand-ins for a message and a reply, to find out what a template does with them.
_QUESTION, _REPLY = "rgtgQuestion", "rgtgReply"


@dataclass(frozen=True)
class TurnEnd:
    """How a chat template ends a finished reply.

    Attributes:
        text: all that it writes after the reply, such as ``<end_of_turn>`` and a newline.
        closing: ``text`` up to the token that ends the reply: a policy that stops there never generates the rest. EOS
            after it if the template writes no more than white space.
        token_id: of that token; None if the template ends a reply in ordinary text.
    """

    text: str
    closing: str
    token_id: int | None


@dataclass
class _Facts:
    """What is known of one chat template.

    Attributes:
        variables: names that ``template_kwargs`` may give.
        takes_parts: whether it reads content as a list of parts rather than as text.
        omits_user: whether it leaves the user's messages out either way.
        omits_system: whether it leaves system messages out.
        turn_ends: how replies end, by template variables.
    """

    variables: frozenset[str]
    takes_parts: bool = False
    omits_user: bool = False
    omits_system: bool = False
    turn_ends: dict[str, TurnEnd | None] = field(default_factory=dict)


_known_templates: "weakref.WeakKeyDictionary[Any, dict[str, _Facts]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class RenderedReplies:
    """A prompt and replies to it as the chat template writes them.

    Attributes:
        prompt: what the rendered conversations and the prompt for generation share.
        replies: the rest of each conversation, with all that ends a reply.
    """

    prompt: str
    replies: list[str]


def text_of_content(content: Any) -> str | None:
    """A message's content as text: a text as it is, text parts joined; None for anything else.

    >>> text_of_content([{"type": "text", "text": "Two and "}, {"type": "text", "text": "two?"}])
    'Two and two?'
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    plain = [text for text in texts if isinstance(text, str)]
    return "".join(plain) if len(plain) == len(content) else None


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    template_kwargs: TemplateKwargs | None = None,
) -> str:
    """Text of chat messages, written by the tokenizer's own chat template.

    A template that reads content as a list of parts gets parts, others get text.

    Args:
        tokenizer: owner of the template.
        messages: with a content that is text, or text parts.
        add_generation_prompt: whether the text ends where the assistant's reply begins.
        template_kwargs: extra variables of the template; those that it does not read are left out here and refused by
            `check_template_kwargs`.

    Raises:
        UsageError: no chat template, one that is not valid, or one that leaves the user's message out.
        DataError: the template refuses the messages, leaves one of them out, or does what its sandbox forbids.
    """
    template = _template(tokenizer)
    facts = _facts(tokenizer, template)
    if facts.omits_user:
        raise UsageError("the tokenizer's chat template leaves the user's message out: set another chat_template")
    if facts.omits_system and any(message.get("role") == "system" for message in messages):
        raise DataError(
            "the tokenizer's chat template leaves out messages of the role 'system': give their text in the user's "
            "message"
        )
    if any(message.get("tool_calls") for message in messages) and "tool_calls" not in template:
        raise DataError("the tokenizer's chat template does not read tool_calls")
    kwargs = {name: value for name, value in (template_kwargs or {}).items() if name in facts.variables}
    text = _apply(tokenizer, messages, facts.takes_parts, add_generation_prompt, kwargs)
    for message in messages:
        if message.get("role") not in _USUAL_ROLES and not _is_written(message, text):
            raise DataError(f"the tokenizer's chat template leaves out messages of the role {message.get('role')!r}")
    return text


def template_fingerprint(tokenizer: Any) -> str | None:
    """Short hash of a tokenizer's chat template; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16] if template else None


def require_chat_template(tokenizer: Any, owner: str) -> None:
    """Refuse chats, before any work, for a model that cannot read them.

    Raises:
        UsageError: naming the model.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"there are chats among the prompts, and {owner} has no chat template: set one in its "
            "tokenizer_config.json, or give plain text"
        )


def _is_written(message: Message, text: str) -> bool:
    """Whether a rendered conversation holds a message's content, as it is or as JSON."""
    content = (text_of_content(message.get("content")) or "").strip()
    return content in text or json.dumps(content)[1:-1] in text


def check_template_kwargs(tokenizer: Any, template_kwargs: TemplateKwargs | None) -> None:
    """Refuse extra variables that the tokenizer's chat template does not read.

    Raises:
        UsageError: naming them, and those that the template reads.
    """
    if not template_kwargs:
        return
    known = _facts(tokenizer, _template(tokenizer)).variables
    if unknown := sorted(set(template_kwargs) - known):
        raise UsageError(
            f"the chat template does not read {', '.join(unknown)}; it reads {', '.join(sorted(known)) or 'none'}",
            setting="chat_template_kwargs",
        )


def encode_source(
    tokenizer: Any, source: PromptSource, *, template_kwargs: TemplateKwargs | None = None, templated: bool = False
) -> tuple[str, list[int]]:
    """Text and token ids of a prompt: text as it is (``templated``: already rendered), messages through the template.

    Raises:
        DataError: an empty prompt, or messages that the template refuses.
        UsageError: chat messages, and a tokenizer without a chat template.
    """
    if isinstance(source, str):
        return source, encode_prompt(tokenizer, source, templated=templated)
    text = render_chat(tokenizer, source, add_generation_prompt=True, template_kwargs=template_kwargs)
    return text, encode_prompt(tokenizer, text, templated=True)


# -- replies -----------------------------------------------------------------------------------------------------------


def render_replies(
    tokenizer: Any,
    messages: Sequence[Message],
    replies: Sequence[Sequence[Message]],
    *,
    append_eos: bool = True,
    template_kwargs: TemplateKwargs | None = None,
) -> RenderedReplies:
    """A prompt and finished replies to it, as the template writes each whole conversation.

    The prompt is what the whole conversations share with the prompt for generation, as in trl: templates of reasoning
    models open a ``<think>`` for generation that a finished reply does not have.

    Args:
        tokenizer: owner of the template.
        messages: of the prompt.
        replies: the messages of each reply, usually one of the assistant.
        append_eos: end a reply with EOS if the template does not end it.
        template_kwargs: extra variables of the template.

    Raises:
        DataError: the template refuses the messages, leaves a reply out, or writes the prompt differently once there
            is a reply.
        UsageError: no chat template.
    """
    opening = render_chat(tokenizer, messages, add_generation_prompt=True, template_kwargs=template_kwargs)
    wholes = [
        render_chat(tokenizer, [*messages, *reply], add_generation_prompt=False, template_kwargs=template_kwargs)
        for reply in replies
    ]
    prompt = _shared_text([opening, *wholes])
    last = str(text_of_content(messages[-1].get("content")) or "").strip() if messages else ""
    if not prompt or (last in opening and last not in prompt):
        raise DataError("the chat template writes the prompt differently once there is a reply")
    found = []
    for whole, reply in zip(wholes, replies, strict=True):
        text = whole[len(prompt) :]
        if not text.strip() and str(text_of_content(reply[-1].get("content")) or "").strip():
            raise DataError("the chat template leaves the reply out")
        closed = not append_eos or _is_closed(tokenizer, text, reply[-1], template_kwargs)
        found.append(text if closed else text + _eos(tokenizer))
    return RenderedReplies(prompt, found)


def encode_replies(
    tokenizer: Any, rendered: RenderedReplies, *, whole: bool = False
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a rendered prompt and of its replies, as the tokenizer encodes the whole conversation.

    Args:
        tokenizer: owner of the template.
        rendered: by `render_replies`.
        whole: keep what the template writes after the token that ends a reply (a newline), which a policy that stops
            there never generates.

    Returns:
        Ids of the prompt, and of each reply. Where a token crosses their border, it belongs to the replies.
    """
    texts = [reply if whole else cut_reply(tokenizer, reply) for reply in rendered.replies]
    prompt_ids = encode_prompt(tokenizer, rendered.prompt, templated=True)
    rows = [encode_prompt(tokenizer, rendered.prompt + text, templated=True) for text in texts]
    shared = min(_shared_length(prompt_ids, row) for row in rows)
    return prompt_ids[:shared], [row[shared:] for row in rows]


def encode_completed(
    tokenizer: Any,
    prompt: PromptSource,
    completion: str,
    *,
    finished: bool,
    append_eos: bool,
    templated: bool = False,
    whole: bool = False,
    template_kwargs: TemplateKwargs | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and its completion, as training reads them.

    Args:
        tokenizer: owner of the template.
        prompt: text, or chat messages to which the completion is the reply.
        completion: text.
        finished: whether it has ended. A finished reply ends as the chat template ends it, other completions with EOS.
        append_eos: whether finished completions of plain prompts end with EOS.
        templated: a chat template has written the prompt, special tokens included.
        whole: as in `encode_replies`; and a reply that the template does not end gets no EOS.
        template_kwargs: extra variables of the template.

    Raises:
        DataError: an empty prompt, or messages that the template refuses.
        UsageError: chat messages, and a tokenizer without a chat template.
    """
    if not isinstance(prompt, str) and finished:
        rendered = _with_reply(tokenizer, prompt, completion, whole, template_kwargs)
        prompt_ids, (ids,) = encode_replies(tokenizer, rendered, whole=whole)
        return prompt_ids, ids
    templated = templated or not isinstance(prompt, str)
    if templated and finished and (end := turn_end(tokenizer, template_kwargs=template_kwargs)) is not None:
        completion += end.text if whole else end.closing
        append_eos = False
    text, prompt_ids = encode_source(tokenizer, prompt, template_kwargs=template_kwargs, templated=templated)
    ids = encode_completion(
        tokenizer, text, completion, templated=templated, append_eos=append_eos and finished, prompt_ids=prompt_ids
    )
    return prompt_ids, ids


def completed_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    reply: str,
    *,
    finished: bool,
    whole: bool = False,
    template_kwargs: TemplateKwargs | None = None,
) -> str:
    """Text of a conversation with a reply; arguments and errors are those of `encode_completed`."""
    if not finished:
        opening = render_chat(tokenizer, messages, add_generation_prompt=True, template_kwargs=template_kwargs)
        return opening + reply
    rendered = _with_reply(tokenizer, messages, reply, whole, template_kwargs)
    (text,) = rendered.replies
    return rendered.prompt + (text if whole else cut_reply(tokenizer, text))


def _with_reply(
    tokenizer: Any, messages: Sequence[Message], reply: str, whole: bool, template_kwargs: TemplateKwargs | None
) -> RenderedReplies:
    message = {"role": "assistant", "content": reply}
    return render_replies(tokenizer, messages, [[message]], append_eos=not whole, template_kwargs=template_kwargs)


def turn_end(tokenizer: Any, *, template_kwargs: TemplateKwargs | None = None) -> TurnEnd | None:
    """How the tokenizer's chat template ends a finished reply; None without a template, or if it cannot be found."""
    try:
        facts = _facts(tokenizer, _template(tokenizer))
    except UsageError:
        return None
    key = repr(sorted((template_kwargs or {}).items(), key=str))
    if key not in facts.turn_ends:
        facts.turn_ends[key] = _find_turn_end(tokenizer, facts, template_kwargs)
    return facts.turn_ends[key]


def cut_reply(tokenizer: Any, reply: str) -> str:
    """A rendered reply up to the token that ends it; see `TurnEnd.closing`."""
    end = turn_end(tokenizer)
    if end is not None and end.text.startswith(end.closing) and reply.endswith(end.text):
        return reply[: len(reply) - len(end.text) + len(end.closing)]
    found = [match.end() for match in _special_tokens(tokenizer).finditer(reply)]
    return reply[: found[-1]] if found and not reply[found[-1] :].strip() else reply


def same_chat_template(one: Any, other: Any) -> bool:
    """Whether two tokenizers write the same text for a conversation; true if one of them has no chat template."""
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in (one, other)]
    return one is other or not all(templates) or _specimen(one) == _specimen(other)


def _specimen(tokenizer: Any) -> list[str]:
    """Some conversations as the template writes them, or its refusals."""
    user, reply = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _REPLY}
    conversations = [[user], [user, reply], [{"role": "system", "content": "rgtgSystem"}, user, reply, user]]
    written = []
    for messages in conversations:
        for opening in (False, True):
            try:
                written.append(render_chat(tokenizer, messages, add_generation_prompt=opening))
            except (DataError, UsageError) as error:
                written.append(str(error))
    return written


def _is_closed(tokenizer: Any, text: str, message: Message, template_kwargs: TemplateKwargs | None) -> bool:
    """Whether a template has ended a reply that it rendered, rather than stopped after its last word."""
    end = turn_end(tokenizer, template_kwargs=template_kwargs)
    if end is not None and end.text.strip() and text.rstrip().endswith(end.text.rstrip()):
        return True
    content = str(text_of_content(message.get("content")) or "").rstrip()
    if text.rstrip().endswith(content):
        return False
    found = [match.end() for match in _special_tokens(tokenizer).finditer(text)]
    return end is None or bool(end.text.strip()) or bool(found and not text[found[-1] :].strip())


def _find_turn_end(tokenizer: Any, facts: _Facts, template_kwargs: TemplateKwargs | None) -> TurnEnd | None:
    """Render a conversation with a stand-in for the reply, and look at what follows it."""
    kwargs = {name: value for name, value in (template_kwargs or {}).items() if name in facts.variables}
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _REPLY}]
    try:
        whole = _apply(tokenizer, messages, facts.takes_parts, False, kwargs)
    except DataError:
        return None
    _, found, text = whole.rpartition(_REPLY)
    if not found:
        return None
    if not text.strip():
        eos = _eos(tokenizer)
        return TurnEnd(text, text + eos, tokenizer.eos_token_id if eos else None)
    # the first run of special tokens: what follows it, after a newline perhaps, is not part of the reply's end
    bos, end, last = str(tokenizer.bos_token or "\0"), None, ""
    for match in _special_tokens(tokenizer).finditer(text):
        if match.group() == bos or (end is not None and match.start() != end):
            break
        end, last = match.end(), match.group()
    if end is None:
        return TurnEnd(text, text, None)
    return TurnEnd(text, text[:end], int(tokenizer.convert_tokens_to_ids(last)))


def _special_tokens(tokenizer: Any) -> "re.Pattern[str]":
    """Matches the tokens that a tokenizer has beside those of its vocabulary of text."""
    added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    known = sorted({*added, *map(str, tokenizer.all_special_tokens)}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) if known else r"(?!)")


def _eos(tokenizer: Any) -> str:
    return str(tokenizer.eos_token or "")


def _shared_text(texts: Sequence[str]) -> str:
    """The longest common beginning.

    >>> _shared_text(["<s>user<think>", "<s>user: four"])
    '<s>user'
    """
    shared = texts[0]
    for text in texts[1:]:
        shared = shared[: _shared_length(shared, text)]
    return shared


def _shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


# -- templates ---------------------------------------------------------------------------------------------------------


def _template(tokenizer: Any) -> str:
    """The chat template that a tokenizer uses without tools."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the data holds chat messages, but the tokenizer has no chat template: set one in its "
            "tokenizer_config.json, or give plain text"
        )
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several templates, and none of them is the default
        names = ", ".join(map(str, tokenizer.chat_template))
        raise UsageError(
            f"the tokenizer has several chat templates ({names}), and none is named default: name one so in its "
            "tokenizer_config.json"
        ) from error


def _facts(tokenizer: Any, template: str) -> _Facts:
    """What is known of a tokenizer's template; found out once."""
    known = _known_templates.setdefault(tokenizer, {})
    if template not in known:
        known[template] = _examine(tokenizer, template)
    return known[template]


def _examine(tokenizer: Any, template: str) -> _Facts:
    """Find out by trial how a template reads messages."""
    facts = _Facts(_variables(tokenizer, template))
    user = {"role": "user", "content": _QUESTION}

    def has(messages: Sequence[Message], takes_parts: bool) -> bool | None:
        try:
            return _QUESTION in _apply(tokenizer, messages, takes_parts, True, {})
        except DataError:  # it may need other messages
            return None

    as_text = has([user], False)
    if not as_text and has([user], True):
        facts.takes_parts = True
    elif as_text is False:
        facts.omits_user = True
    system = [{"role": "system", "content": _QUESTION}, {"role": "user", "content": "."}]
    facts.omits_system = has(system, facts.takes_parts) is False
    return facts


def _variables(tokenizer: Any, template: str) -> frozenset[str]:
    """Names that a template reads and that nothing else sets."""
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes
    from jinja2.ext import Extension

    class Generation(Extension):  # transformers' own block, which marks the assistant's tokens
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do", Generation]).parse(template)
    except TemplateSyntaxError:
        return frozenset()
    undeclared = meta.find_undeclared_variables(tree) - _RESERVED - set(tokenizer.special_tokens_map)
    return frozenset(undeclared - _assigned_first(tree, undeclared))


def _assigned_first(tree: Any, names: Collection[str]) -> set[str]:
    """Those of the names that a template assigns itself before it reads them, as in one branch of an if."""
    from jinja2 import nodes

    order: dict[str, str] = {}

    def walk(node: Any) -> None:
        if isinstance(node, nodes.Name):
            order.setdefault(node.name, node.ctx)
        elif isinstance(node, nodes.Assign | nodes.For):  # a value is read before its name is assigned
            value = node.node if isinstance(node, nodes.Assign) else node.iter
            walk(value)
            for child in node.iter_child_nodes():
                if child is not value:
                    walk(child)
        else:
            for child in node.iter_child_nodes():
                walk(child)

    walk(tree)
    return {name for name in names if order.get(name) != "load"}


def _apply(
    tokenizer: Any, messages: Sequence[Message], takes_parts: bool, add_generation_prompt: bool, kwargs: dict[str, Any]
) -> str:
    """Render messages, with their contents in the form that the template reads.

    Raises:
        DataError: a template is a program: it may refuse messages, or fail in any way.
        UsageError: it is not valid.
    """
    from jinja2 import TemplateSyntaxError

    shaped = [_shaped(message, takes_parts) for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(shaped, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs)
        )
    except TemplateSyntaxError as error:
        where = f"line {error.lineno}: {' '.join(str(error.message).split())[:200]}"
        raise UsageError(f"the tokenizer's chat template is not valid ({where}): set another chat_template") from error
    except Exception as error:
        raise DataError(f"the tokenizer's chat template refuses these messages: {one_line(error, 200)}") from error


def _shaped(message: Message, takes_parts: bool) -> Message:
    """A message with its content as text, or as a list of text parts."""
    text = text_of_content(message.get("content"))
    if text is None:
        return message
    return {**message, "content": [{"type": "text", "text": text}] if takes_parts else text}
