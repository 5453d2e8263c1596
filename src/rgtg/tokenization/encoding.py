"""Text to token ids and back; whether two tokenizers are the same; which ids a tokenizer and a model know.

Training, audit and decoding share these functions, so that they see the same tokens. The prompt is encoded on its own,
with its special tokens, as in generation; the completion is what follows it.

The ids that a tokenizer has tokens for and those that a model has embeddings for often differ: embeddings are padded
beyond the tokenizer (to a multiple of 64 or 128, differently in models of one family), and tokens are added to a
tokenizer whose model is never resized.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rgtg.errors import DataError, TokenizerMismatchError, UnknownTokenError

PAD_TOKEN = "<|rgtg-pad|>"

PROBES = (
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
    """Fingerprint of what a tokenizer *does*: its vocabulary, its ids of probe texts, and its EOS.

    Names and files are not compared, because the same files can load as another class that gives other ids. The padding
    token is left out: a scorer may need one although the policy has none.
    """
    return fingerprint_tokenizer(tokenizer.get_vocab(), lambda text: tokenizer(text).input_ids, tokenizer.eos_token_id)


def fingerprint_tokenizer(
    vocabulary: Mapping[str, int], encode: Callable[[str], list[int]], eos_token_id: int | None
) -> str:
    """The fingerprint of `tokenizer_hash`, for an engine's own tokenizer (docs/head-format.md defines it).

    Args:
        vocabulary: id of each token.
        encode: text to ids, with special tokens.
        eos_token_id: of the token that ends a text, if there is one.
    """
    known = sorted((token, i) for token, i in vocabulary.items() if token != PAD_TOKEN)
    content = json.dumps([known, [list(encode(text)) for text in PROBES], eos_token_id])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers encode text in the same way."""
    return one is other or tokenizer_hash(one) == tokenizer_hash(other)


def require_same_tokenizer(policy_tokenizer: Any, scorer_tokenizer: Any) -> None:
    """Check that policy and scorer encode text in the same way.

    Raises:
        TokenizerMismatchError: they do not; the message shows the first probe text on which they differ.
    """
    if same_tokenizer(policy_tokenizer, scorer_tokenizer):
        return
    detail = f"vocabularies of {len(policy_tokenizer)} and {len(scorer_tokenizer)} tokens"
    for text in PROBES:
        ours, theirs = policy_tokenizer(text).input_ids, scorer_tokenizer(text).input_ids
        if ours != theirs:
            detail = f"{text!r} is {ours[:12]} to the policy and {theirs[:12]} to the scorer (first 12 ids)"
            break
    raise TokenizerMismatchError(
        f"policy and scorer have different tokenizers: {detail}. A scorer or draft model "
        "that reads the policy's tokens needs that tokenizer: train it from the policy's base model (rgtg train "
        "--base POLICY). A reward model may have another."
    )


def ensure_pad_token(tokenizer: Any, model: Any = None) -> None:
    """Give the tokenizer a padding token other than EOS; the model's embedding grows by a row only if it has to.

    Stock reward models score the last token that is not padding. If padding were EOS, they would skip a real EOS.
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
    """Token ids of a prompt. Special tokens are added unless a chat template has already written them (``templated``).

    A text that itself begins with BOS gets no second one.

    Raises:
        DataError: an empty prompt, or one that the tokenizer turns into no token.
    """
    if not prompt:
        raise DataError("the prompt is empty; give at least one character")
    (ids,) = encode_prompts(tokenizer, [prompt], templated=templated)
    if not ids:
        raise DataError(f"the tokenizer turns the prompt {prompt[:40]!r} into no token at all")
    return ids


def encode_prompts(tokenizer: Any, prompts: Sequence[str], *, templated: bool = False) -> list[list[int]]:
    """Token ids of several prompts in one call, which is faster; a prompt without any token gives an empty list."""
    rows: list[list[int]] = tokenizer(list(prompts), add_special_tokens=not templated).input_ids
    eos_id, eos = tokenizer.eos_token_id, tokenizer.eos_token or "\0"
    bos_id, bos = tokenizer.bos_token_id, tokenizer.bos_token or "\0"
    for prompt, ids in zip(prompts, rows, strict=True):
        # a text that begins with BOS itself (a chat that was rendered elsewhere) gets no second one
        if not templated and prompt.startswith(bos) and ids[:2] == [bos_id, bos_id] and _adds_bos(tokenizer):
            del ids[0]
        # BERT- and T5-like tokenizers add EOS to every text; it is removed, since the prompt is going to be continued
        while len(ids) > 1 and ids[-1] == eos_id and not prompt.endswith(eos):
            ids.pop()
    return rows


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins every text with BOS."""
    return list(tokenizer("a").input_ids)[:1] == [tokenizer.bos_token_id]


def encode_completion(
    tokenizer: Any,
    prompt: str,
    completion: str,
    *,
    templated: bool = False,
    append_eos: bool = True,
    prompt_ids: list[int] | None = None,
) -> list[int]:
    """Token ids of a completion that follows its prompt, with EOS at the end if ``append_eos``.

    Prompt and completion are encoded together. If the result starts with the prompt's own ids, the rest is the
    completion, and a SentencePiece tokenizer adds no space of its own. Otherwise a token crosses the border, which
    generation cannot produce, and the completion is encoded on its own. ``prompt_ids``, if the caller has them, saves
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


def adds_eos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself ends every text with EOS."""
    eos = getattr(tokenizer, "eos_token_id", None)
    return eos is not None and list(tokenizer("a").input_ids)[-1:] == [eos]


def decode_completion(tokenizer: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """Text of a completion after its prompt: with its leading space, without special tokens."""
    return decode_after(tokenizer, decoding_context(tokenizer, prompt_ids), completion_ids)


def decoding_context(tokenizer: Any, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
    """A prompt's last tokens and their text, which show whether a leading space belongs to the completion."""
    last = list(prompt_ids[-8:])
    return last, _text(tokenizer, last)


def decode_after(tokenizer: Any, context: tuple[list[int], str], completion_ids: Sequence[int]) -> str:
    """Like ``decode_completion``, with the prompt's ``decoding_context`` computed before."""
    last, before = context
    whole = _text(tokenizer, [*last, *completion_ids])
    if whole.startswith(before):
        return whole[len(before) :]
    return _text(tokenizer, list(completion_ids))  # the prompt ends inside a character, which the completion finishes


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def ids_without_token(tokenizer: Any, rows: int | None = None) -> tuple[int, tuple[int, ...]]:
    """How many ids a tokenizer uses: all its tokens have smaller ids; and the smaller ids without a token.

    Args:
        tokenizer: of any kind; None has a token for every embedding.
        rows: ids from here on have no embedding; None does not limit them.
    """
    if tokenizer is None:
        return rows or 0, ()
    ids = {int(i) for i in tokenizer.get_vocab().values()}
    size = max(ids, default=-1) + 1
    size = size if rows is None else min(size, rows)
    return size, tuple(i for i in range(size) if i not in ids and not _has_token(tokenizer, i))


def _has_token(tokenizer: Any, token_id: int) -> bool:
    """Whether an id that no entry of the vocabulary names has a token all the same: one of two with equal names."""
    try:
        token = tokenizer.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, ValueError, OverflowError, TypeError):
        return False
    return token is not None and token != tokenizer.unk_token


def embedding_rows(model: Any) -> int | None:
    """Number of tokens that a model has embeddings for; None if it does not tell."""
    try:
        embedding = model.get_input_embeddings()
        return int(embedding.weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError, IndexError):
        rows = getattr(getattr(model, "config", None), "vocab_size", None)
        return int(rows) if rows else None


def require_embeddings(ids: Sequence[int], rows: int | None, whose: str) -> None:
    """Check that a model has an embedding for each token.

    Args:
        ids: tokens of one text.
        rows: number of embeddings; None is not checked.
        whose: the model, in the message: ``the policy``, ``the scorer NAME``.

    Raises:
        UnknownTokenError: it has none for one of them.
    """
    if not ids or rows is None or (max(ids) < rows and min(ids) >= 0):
        return
    bad = next(i for i in ids if not 0 <= i < rows)
    raise UnknownTokenError(
        f"the text has token {bad}, and {whose} has embeddings for tokens 0 to {rows - 1}: leave out the text of that "
        "token, or give the model an embedding for it (model.resize_token_embeddings) and train and save it so"
    )
