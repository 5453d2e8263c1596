"""Which ids a tokenizer has tokens for, and which of them a model has embeddings for.

The two often differ: embeddings are padded beyond the tokenizer (to a multiple of 64 or 128, differently in models of
one family), and tokens are added to a tokenizer whose model is never resized.
"""

from collections.abc import Sequence
from typing import Any

from rgtg.errors import UnknownTokenError


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
