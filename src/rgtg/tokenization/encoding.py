"""Text to token ids and back, in one place: training, audit and decoding must read the same tokens.

A tokenizer is used as the policy uses it while generating: the prompt is encoded alone, with its special tokens,
and the completion is what follows it.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from rgtg.errors import DataError, TokenizerMismatchError, UsageError

PAD_TOKEN = "<|rgtg-pad|>"

_PROBES = (
    "Once upon a time, there was a little girl.",
    "  two leading spaces,\ttab\nnewline\n\nparagraph  end ",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2.5e-3]}",
    "Ünïcödé, naïve café, Straße, Ελληνικά, русский, עברית, العربية",
    "中文字符 日本語テキスト 한국어 ภาษาไทย हिन्दी",
    "emoji 🙂 👩‍👩‍👧‍👦 🇫🇷 ✨ 12345678901234567890",
    "\n\nHuman: How are you?\n\nAssistant: I'm fine; they've said \"don't\".",
)


def tokenizer_hash(tokenizer: Any) -> str:
    """Fingerprint of what a tokenizer *does*: its vocabulary, its reading of probe texts, and its EOS.

    Names and files are not compared: the same files can load as another class (and give other ids). The padding
    token is left out, since a scorer may need one where the policy has none.
    """
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if token != PAD_TOKEN}
    readings = [tokenizer(text).input_ids for text in _PROBES]
    what = json.dumps([sorted(vocabulary.items()), readings, tokenizer.eos_token_id])
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers read text in the same way."""
    return one is other or tokenizer_hash(one) == tokenizer_hash(other)


def require_same_tokenizer(policy_tokenizer: Any, scorer_tokenizer: Any) -> None:
    """Refuse a policy and a scorer that read text differently.

    Raises:
        TokenizerMismatchError: naming the first probe text on which they differ.
    """
    if same_tokenizer(policy_tokenizer, scorer_tokenizer):
        return
    detail = f"vocabularies of {len(policy_tokenizer)} and {len(scorer_tokenizer)} tokens"
    for text in _PROBES:
        ours, theirs = policy_tokenizer(text).input_ids, scorer_tokenizer(text).input_ids
        if ours != theirs:
            detail = f"{text!r} is {ours[:12]} to the policy and {theirs[:12]} to the scorer (first 12 ids)"
            break
    raise TokenizerMismatchError(
        f"policy and scorer have different tokenizers: {detail}. What scores or drafts the policy's own tokens needs "
        "its tokenizer: train it from the policy's own base model (rgtg train --base POLICY). A reward model may have "
        "another."
    )


def ensure_pad_token(tokenizer: Any, model: Any = None) -> None:
    """Give the tokenizer a padding token that is not its EOS, growing the model's embedding by one only if it must.

    Stock reward models read the last token that is not padding; if padding were EOS, they would skip a real EOS.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        for candidate in (tokenizer.unk_token, tokenizer.bos_token):
            if candidate is not None and candidate != tokenizer.eos_token:
                tokenizer.pad_token = candidate
                break
        else:
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if model is not None:
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def encode_prompt(tokenizer: Any, prompt: str, *, templated: bool = False) -> list[int]:
    """Token ids of a prompt, special tokens included unless a chat template has already written them.

    Raises:
        DataError: an empty prompt, or one the tokenizer turns into no token.
    """
    if not prompt:
        raise DataError("the prompt is empty; give at least one character")
    (ids,) = encode_prompts(tokenizer, [prompt], templated=templated)
    if not ids:
        raise DataError(f"the tokenizer turns the prompt {prompt[:40]!r} into no token at all")
    return ids


def encode_prompts(tokenizer: Any, prompts: Sequence[str], *, templated: bool = False) -> list[list[int]]:
    """The same for several prompts in one call, which is faster; one that turns into no token has an empty list."""
    rows: list[list[int]] = tokenizer(list(prompts), add_special_tokens=not templated).input_ids
    return [_open_ended(tokenizer, prompt, ids) for prompt, ids in zip(prompts, rows, strict=True)]


def _open_ended(tokenizer: Any, prompt: str, ids: list[int]) -> list[int]:
    """BERT- and T5-like tokenizers close every text; a prompt that is to be continued must stay open."""
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token or "\0"):
        ids = ids[:-1]
    return ids


def encode_source(tokenizer: Any, source: str | Sequence[dict[str, Any]]) -> tuple[str, list[int]]:
    """Text of a prompt, chat messages through the tokenizer's template, and its token ids.

    Raises:
        DataError: an empty prompt.
        UsageError: chat messages, and a tokenizer without a chat template.
    """
    if isinstance(source, str):
        return source, encode_prompt(tokenizer, source)
    text = render_chat(tokenizer, source, add_generation_prompt=True)
    return text, encode_prompt(tokenizer, text, templated=True)


def encode_completion(
    tokenizer: Any,
    prompt: str,
    completion: str,
    *,
    templated: bool = False,
    append_eos: bool = True,
    prompt_ids: list[int] | None = None,
) -> list[int]:
    """Token ids of a completion as it stands after its prompt, closed by EOS if asked for.

    Where encoding prompt and completion together keeps the prompt's own ids, what follows them is the completion
    (so a SentencePiece tokenizer adds no space of its own). Where a token would straddle the border, which no
    generation could produce, the completion is encoded alone. ``prompt_ids``, where the caller has them, saves
    encoding the prompt again.
    """
    if prompt_ids is None:
        prompt_ids = encode_prompt(tokenizer, prompt, templated=templated)
    whole = encode_prompt(tokenizer, prompt + completion, templated=templated)
    if whole[: len(prompt_ids)] == prompt_ids:
        ids = whole[len(prompt_ids) :]
    else:
        ids = list(tokenizer(completion, add_special_tokens=False).input_ids)
    eos = tokenizer.eos_token_id
    if append_eos and eos is not None and (not ids or ids[-1] != eos):
        ids = [*ids, eos]
    return ids


def decode_completion(tokenizer: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """Text that ``completion_ids`` add after the prompt, leading space kept, special tokens left out."""
    return decode_after(tokenizer, decoding_context(tokenizer, prompt_ids), completion_ids)


def decoding_context(tokenizer: Any, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
    """A prompt's last tokens, and their text: enough to know whether a leading space belongs to the completion."""
    last = list(prompt_ids[-8:])
    return last, _text(tokenizer, last)


def decode_after(tokenizer: Any, context: tuple[list[int], str], completion_ids: Sequence[int]) -> str:
    """``decode_completion`` where the prompt's ``decoding_context`` is known."""
    last, before = context
    whole = _text(tokenizer, [*last, *completion_ids])
    # Else the prompt ends in the middle of a character, which the completion closes.
    return whole[len(before) :] if whole.startswith(before) else _text(tokenizer, list(completion_ids))


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
    """Text of a list of chat messages through the tokenizer's own chat template.

    Raises:
        UsageError: the tokenizer has no chat template.
        DataError: the template refuses the messages, or tries what its sandbox forbids.
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
