"""Incremental detokenization and retokenization give what the whole text gives."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, pre_tokenizers

from helpers.other_tokenizers import CORPUS, KINDS, byte_level, tokenizer_of, unigram
from rgtg.tokenization.encoding import decode_completion
from rgtg.tokenization.retokenizer import Detokenizer, Retokenizer, SpaceSplitter

ANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = [
    "the", " the", " then", "re", "s", " ", "  ", "\n", "\n\n", ".", ", and", " 12", "345", "'s", " isn't", "\t",
    "</s>",
]  # fmt: skip
ODD = [
    " é", "e\u0301", "\u0301", " 🙂", "👩‍👩‍👧", "🇫🇷", "中文", "한국", " हिन्दी", "שלום",
    "\u00a0", "ﬁ", "\u2028", "<s>", "İ", "ß", "�",
]  # fmt: skip
pieces = st.lists(st.sampled_from(WORDS + ODD) | st.text(max_size=4), min_size=1, max_size=12)
starts = st.sampled_from(
    ["Once upon a time, there was a", CORPUS[1], CORPUS[4], "a", "so the dog", "x  y   z the end of it"]
)


@pytest.mark.parametrize("kind", KINDS)
@ANY
@given(start=starts, steps=st.lists(pieces, min_size=1, max_size=6))
def test_a_growing_text_is_tokenized_as_the_whole_text(kind, start, steps):
    tokenizer = tokenizer_of(kind)
    retokenizer = Retokenizer(tokenizer)
    (reading,) = retokenizer.tokenize([start])
    for step in steps:
        texts = [reading.text + piece for piece in step]
        (tails,) = retokenizer.encode_continuations([reading], [texts])
        for text, tail in zip(texts, tails, strict=True):
            assert [*reading.ids[: tail.kept], *tail.ids] == tokenizer(text, add_special_tokens=False).input_ids
        reading = retokenizer.append(reading, texts[0], tails[0])


@pytest.mark.parametrize("kind", KINDS)
@ANY
@given(data=st.data())
def test_appended_tokens_decode_as_all_tokens_together(kind, data):
    tokenizer = tokenizer_of(kind)
    tokens = st.integers(0, len(tokenizer) - 1)
    prompt = data.draw(st.lists(tokens, min_size=1, max_size=10))
    detokenizer = Detokenizer(tokenizer)
    row = detokenizer.start(prompt)
    for candidates in data.draw(st.lists(st.lists(tokens, min_size=1, max_size=4), max_size=14)):
        ((first, *others),) = detokenizer.with_next([row], [candidates])
        for token, text in zip(candidates, [first, *others], strict=True):
            assert text == decode_completion(tokenizer, prompt, [*row.token_ids, token])
        row.token_ids.append(candidates[0])
        row.text = first


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
@ANY
@given(text=st.text("aé🙂中 ", min_size=1, max_size=12))
def test_characters_split_over_tokens_are_decoded(kind, text):
    """Random ids seldom give a character that is split over tokens; these texts do."""
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer("Once").input_ids
    detokenizer = Detokenizer(tokenizer)
    row = detokenizer.start(prompt)
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        ((said,),) = detokenizer.with_next([row], [[token]])
        assert said == decode_completion(tokenizer, prompt, [*row.token_ids, token])
        row.token_ids.append(token)
        row.text = said


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_last_words_are_tokenized_again(kind, monkeypatch):
    retokenizer = Retokenizer(tokenizer_of(kind))
    text = " ".join([CORPUS[0]] * 30)
    (reading,) = retokenizer.tokenize([text])
    read = []
    whole = retokenizer.encode
    monkeypatch.setattr(retokenizer, "encode", lambda texts: read.extend(texts) or whole(texts))
    for word in CORPUS[1].split():
        (tails,) = retokenizer.encode_continuations([reading], [[f"{reading.text} {word}", f"{reading.text}{word}"]])
        reading = retokenizer.append(reading, f"{reading.text} {word}", tails[0])
    assert max(map(len, read)) < 100


def test_texts_are_split_at_spaces_before_words():
    splitter = SpaceSplitter(tokenizer_of("byte-level"))
    assert splitter.last_splits("one two  three four é five") == (3, 14, 21)
    assert splitter.last_splits("one two") is None


def test_an_added_token_near_the_split_is_found():
    splitter = SpaceSplitter(tokenizer_of("byte-level"))
    assert splitter.has_added_token("so it ends</s> and goes on", 4)
    assert splitter.has_added_token("so it ends</s> and goes on", 12)
    assert not splitter.has_added_token("so it ends</s> and goes on", 20)


@pytest.mark.parametrize("pattern", [r"\s+$|\S+", r"(?<=a)b|.", r"\bword\b|.", r"(\w)\1|."])
def test_a_pre_tokenizer_that_looks_around_is_not_usable(pattern):
    odd = byte_level(300, pattern)
    assert not SpaceSplitter(odd).usable
    (reading,) = Retokenizer(odd).tokenize(["a text of some words, long enough to be cut"])
    ((tail,),) = Retokenizer(odd).encode_continuations([reading], [[reading.text + " here"]])
    assert tail.kept == 0
    assert tail.ids == odd(reading.text + " here", add_special_tokens=False).input_ids


def test_a_unigram_model_across_spaces_is_not_usable():
    whole = unigram()
    whole.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    assert not SpaceSplitter(whole).usable


def test_a_pre_tokenizer_across_words_is_not_usable():
    assert not SpaceSplitter(byte_level(300, r"\w+ \w+|.")).usable


def test_added_tokens_of_normalized_text_are_not_usable():
    late = unigram()
    assert SpaceSplitter(late).usable
    late.add_tokens([AddedToken("file", normalized=True)])  # NFKC makes one of the ligature in "\ufb01le"
    assert not SpaceSplitter(late).usable


def test_components_written_in_python_are_not_usable():
    class Mine:
        def pre_tokenize(self, text):
            text.split(lambda _, piece: piece.split(Regex(r"\s"), "isolated"))

    odd = byte_level(300)
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Mine())
    assert not SpaceSplitter(odd).usable
