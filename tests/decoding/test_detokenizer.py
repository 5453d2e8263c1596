"""Text while it is made: pieces joined are the text, and no piece is ever taken back."""

import random

import pytest

from helpers.other_tokenizers import CORPUS, tokenizer_of
from helpers.tiny_models import tiny_tokenizer
from rgtg.decoding.detokenizer import IncrementalDetokenizer
from rgtg.tokenization.encoding import decode_completion, encode_completion, encode_prompt

PROMPT = "Once upon a time"


def pieces_of(tokenizer, prompt_ids, ids, stop=(), text=None):
    stream = IncrementalDetokenizer(tokenizer, prompt_ids, stop)
    pieces = [stream.add(i) for i in ids]
    whole = decode_completion(tokenizer, prompt_ids, ids) if text is None else text
    return [*pieces, stream.end(whole)], whole


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-cl100k", "llama", "unigram", "word-piece"])
def test_pieces_joined_are_the_text(kind):
    tokenizer = tokenizer_of(kind)
    prompt_ids = encode_prompt(tokenizer, PROMPT)
    pieces, whole = pieces_of(tokenizer, prompt_ids, encode_completion(tokenizer, PROMPT, " ".join(CORPUS)))
    assert "".join(pieces) == whole
    assert sum(map(bool, pieces)) > 20


@pytest.mark.parametrize("kind", ["byte-level", "llama", "unigram", "word-piece"])
def test_pieces_of_random_tokens_joined_are_the_text(kind):
    tokenizer, draw = tokenizer_of(kind), random.Random(0)
    for _ in range(4):
        prompt_ids = [draw.randrange(len(tokenizer)) for _ in range(9)]
        ids = [draw.randrange(len(tokenizer)) for _ in range(300)]
        pieces, whole = pieces_of(tokenizer, prompt_ids, ids)
        assert "".join(pieces) == whole


def test_old_tokens_are_not_decoded_again():
    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer, self.longest, self.all_special_ids = tokenizer, 0, tokenizer.all_special_ids

        def convert_ids_to_tokens(self, token_id):
            return self.tokenizer.convert_ids_to_tokens(token_id)

        def decode(self, ids, **options):
            self.longest = max(self.longest, len(ids))
            return self.tokenizer.decode(ids, **options)

    counting = Counting(tokenizer_of("byte-level"))
    stream = IncrementalDetokenizer(counting, [5, 6, 7])
    for i in range(1000):
        stream.add(4 + i % 90)
    assert counting.longest < 120


def test_stop_texts_and_what_may_become_one_are_held_back():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("abcdeXYZ").input_ids
    stream = IncrementalDetokenizer(tokenizer, [5], ["deX", "cdq"])
    assert [stream.add(i) for i in ids[:6]] == ["a", "b", "", "", "c", ""]
    assert stream.end("abc") == ""
    stream = IncrementalDetokenizer(tokenizer, [5], ["deX"])
    assert [stream.add(i) for i in tokenizer("dead").input_ids] == ["", "", "dea", ""]
    assert stream.end("dead") == "d"
