"""Bytes of single tokens, whose concatenation is the text."""

import pytest

from helpers.other_tokenizers import CORPUS, tokenizer_of
from helpers.tiny_models import tiny_tokenizer
from rgtg.tokenization.encoding import decode_completion, encode_completion, encode_prompt
from rgtg.tokenization.token_bytes import TokenBytes

PROMPT = "Once upon a time"


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-cl100k", "byte-level-bos", "llama", "unigram"])
@pytest.mark.parametrize("text", CORPUS)
def test_bytes_joined_are_the_text(kind, text):
    tokenizer = tokenizer_of(kind)
    token_bytes = TokenBytes(tokenizer)
    prompt_ids = encode_prompt(tokenizer, PROMPT)
    ids = encode_completion(tokenizer, PROMPT, text)
    assert b"".join(token_bytes.of(i) for i in ids).decode() == decode_completion(tokenizer, prompt_ids, ids)


def test_part_of_a_character_has_bytes_and_no_text():
    tokenizer = tokenizer_of("byte-level")
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer("✨", add_special_tokens=False).input_ids
    assert len(ids) > 1
    assert b"".join(token_bytes.of(i) for i in ids) == "✨".encode()
    assert "�" in token_bytes.text(ids[0])


def test_byte_fallback_tokens():
    tokenizer = tokenizer_of("llama")
    token_bytes = TokenBytes(tokenizer)
    assert token_bytes.of(tokenizer.convert_tokens_to_ids("<0xE2>")) == b"\xe2"


def test_special_tokens_have_a_name_and_no_bytes():
    token_bytes = TokenBytes(tiny_tokenizer())
    assert (token_bytes.of(2), token_bytes.text(2)) == (b"", "</s>")
    assert (token_bytes.of(4), token_bytes.text(4)) == (b" ", " ")


def test_ids_outside_the_vocabulary_are_empty():
    token_bytes = TokenBytes(tiny_tokenizer())
    assert (token_bytes.of(10_000), token_bytes.text(10_000)) == (b"", "")


def test_other_tokenizers_decode_the_token():
    tokenizer = tokenizer_of("word-piece")
    token_bytes = TokenBytes(tokenizer)
    (token,) = tokenizer("the", add_special_tokens=False).input_ids
    assert token_bytes.of(token) == b"the"
