"""Ids with and without tokens, and texts whose tokens have no embedding."""

import pytest

from helpers.other_tokenizers import KINDS, tokenizer_of
from helpers.tiny_models import VOCAB, tiny_policy, tiny_tokenizer
from rgtg.errors import DataError, UnknownTokenError
from rgtg.tokenization.vocabulary import embedding_rows, ids_without_token, require_embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_all_ids_of_a_tokenizer_have_a_token(kind):
    tokenizer = tokenizer_of(kind)
    assert ids_without_token(tokenizer) == (len(tokenizer), ())
    assert ids_without_token(tokenizer, len(tokenizer) + 64) == (len(tokenizer), ())
    assert ids_without_token(tokenizer, len(tokenizer) - 3) == (len(tokenizer) - 3, ())


def test_without_a_tokenizer_every_embedding_is_a_token():
    assert ids_without_token(None, 70) == (70, ())


def test_an_id_that_shares_its_name_with_another_has_a_token():
    class Doubled:
        unk_token = "<unk>"

        def get_vocab(self):
            return {"<unk>": 0, "a": 2, "b": 5}  # 1 is an "a" too, and 3 and 4 are nothing

        def convert_ids_to_tokens(self, token_id):
            return {0: "<unk>", 1: "a", 2: "a", 3: None, 4: "<unk>", 5: "b"}[token_id]

    assert ids_without_token(Doubled()) == (6, (3, 4))


def test_a_text_is_readable_with_as_many_embeddings_as_its_largest_id_needs():
    require_embeddings([], 3, "the policy")
    require_embeddings([0, 2], 3, "the policy")
    require_embeddings([7], None, "the policy")
    with pytest.raises(UnknownTokenError, match=r"the text has token 3, and the scorer mine has embeddings"):
        require_embeddings([0, 3, 4], 3, "the scorer mine")
    with pytest.raises(DataError, match="the text has token -1"):
        require_embeddings([-1], 3, "the policy")


def test_the_rows_of_an_embedding():
    assert embedding_rows(tiny_policy()) == VOCAB == len(tiny_tokenizer())
    assert embedding_rows(object()) is None
