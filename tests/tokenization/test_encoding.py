"""Text to token ids and back, comparing tokenizers, and ids without tokens or embeddings."""

import pytest

from helpers.chats import chat_tokenizer
from helpers.other_tokenizers import KINDS, tokenizer_of
from helpers.tiny_models import VOCAB, tiny_policy, tiny_tokenizer
from rgtg.errors import DataError, TokenizerMismatchError, UnknownTokenError
from rgtg.tokenization.encoding import (
    decode_completion,
    embedding_rows,
    encode_completion,
    encode_prompt,
    ensure_pad_token,
    ids_without_token,
    require_embeddings,
    require_same_tokenizer,
    tokenizer_hash,
)


def test_encode_then_decode(tokenizer):
    prompt = encode_prompt(tokenizer, "Hi you")
    completion = encode_completion(tokenizer, "Hi you", " there", append_eos=True)
    assert completion[-1] == tokenizer.eos_token_id
    assert decode_completion(tokenizer, prompt, completion) == " there"
    assert completion[:-1] == encode_completion(tokenizer, "Hi you", " there", append_eos=False)
    with pytest.raises(DataError, match="the prompt is empty"):
        encode_prompt(tokenizer, "")


def test_the_hash_ignores_the_padding_token_and_sees_added_tokens(tokenizer):
    other = tiny_tokenizer()
    other.pad_token = "<unk>"
    assert tokenizer_hash(tokenizer) == tokenizer_hash(other)
    other.add_tokens(["zzzz"])
    with pytest.raises(
        TokenizerMismatchError, match=r"vocabularies of 63 and 64 tokens|vocabularies of 64 and 65 tokens"
    ):
        require_same_tokenizer(tokenizer, other)


def test_the_padding_token_is_not_eos(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_a_text_that_begins_with_bos_gets_no_second_one(tokenizer):
    adds = chat_tokenizer()
    bos = adds.bos_token_id
    for text, count in (("<s>Hi", 1), ("Hi", 1), ("<s><s>Hi", 2), ("<s>", 1)):
        assert encode_prompt(adds, text)[: count + 1].count(bos) == count
        assert encode_prompt(adds, text + "a")[: count + 1].count(bos) == count
    assert encode_prompt(adds, "<s><s>Hi", templated=True) == adds("<s>Hi").input_ids
    assert encode_completion(adds, "<s>Hi", " you") == encode_completion(adds, "Hi", " you")
    # a tokenizer that adds none leaves the text as it is
    assert encode_prompt(tokenizer, "<s><s>Hi")[:2] == [tokenizer.bos_token_id] * 2


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
