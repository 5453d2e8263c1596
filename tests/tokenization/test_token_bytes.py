"""Bytes of single tokens: joined, they are the text, whatever the tokenizer."""

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
    known = TokenBytes(tokenizer)
    prompt_ids = encode_prompt(tokenizer, PROMPT)
    ids = encode_completion(tokenizer, PROMPT, text)
    assert b"".join(known.of(i) for i in ids).decode() == decode_completion(tokenizer, prompt_ids, ids)


def test_half_a_character_has_bytes_and_no_text():
    tokenizer = tokenizer_of("byte-level")
    known = TokenBytes(tokenizer)
    ids = tokenizer("✨", add_special_tokens=False).input_ids
    assert len(ids) > 1
    assert b"".join(known.of(i) for i in ids) == "✨".encode()
    assert "�" in known.text(ids[0])


def test_bytes_written_in_hexadecimal():
    tokenizer = tokenizer_of("llama")
    known = TokenBytes(tokenizer)
    assert known.of(tokenizer.convert_tokens_to_ids("<0xE2>")) == b"\xe2"


def test_special_tokens_have_a_name_and_add_nothing():
    known = TokenBytes(tiny_tokenizer())
    assert (known.of(2), known.text(2)) == (b"", "</s>")
    assert (known.of(4), known.text(4)) == (b" ", " ")


def test_tokens_that_are_not_there():
    known = TokenBytes(tiny_tokenizer())
    assert (known.of(10_000), known.text(10_000)) == (b"", "")


def test_other_tokenizers_by_their_own_decoding():
    tokenizer = tokenizer_of("word-piece")
    known = TokenBytes(tokenizer)
    (token,) = tokenizer("the", add_special_tokens=False).input_ids
    assert known.of(token) == b"the"
