"""Text to token ids and back, and comparing tokenizers."""

import pytest

from helpers.chats import chat_tokenizer
from helpers.tiny_models import tiny_tokenizer
from rgtg.errors import DataError, TokenizerMismatchError
from rgtg.tokenization.encoding import (
    decode_completion,
    encode_completion,
    encode_prompt,
    ensure_pad_token,
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
