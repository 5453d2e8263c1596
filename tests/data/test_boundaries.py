"""Prompts and completions that lack a space between them."""

import pytest

from rgtg.data.boundaries import run_together


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("What is it?", "A cat."), ("Say hi", "hello"), ("Assistant:", "Sure"), ("It costs 3", "4 euros"),
        ("Was ist das?", "Über"), ("Что это?", "Кошка"), ("안녕하세요?", "네"), ("ما هذا؟ a", "قطة"), ("Well…", "yes"),
        ("Wait,", "what"),
    ],
)  # fmt: skip
def test_words_that_run_together(prompt, completion):
    assert run_together(prompt, completion)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("What is it?", " A cat."), ("What is it? ", "A cat."), ("What is it?\n", "A cat."), ("A:\t", "x"),
        ("\n\nHuman: Hi\n\nAssistant:", " Hello"), ("\n\nAssistant:", "\nHello"), ('He said "', "Hello"),
        ("f(", "x)"), ("See [", "1]"), ("“", "Hello"), ("it", "'s"), ("end", "."), ("", "Hi"), ("Hi", ""),
        ("这是什么?", "猫"), ("这是什么?", "A cat"), ("これは何ですか。", "猫です"), ("カタカナ", "ひらがな"),
        ("นี่คืออะไร", "แมว"),
        ("http://", "example"), ("a-", "b"), ("What is it?", "🙂 yes"), ("ນີ້ແມ່ນຫຍັງ", "ແມວ"), ("ｶﾀｶﾅ", "ｶﾀｶﾅ"),
    ],
)  # fmt: skip
def test_those_that_do_not(prompt, completion):
    assert not run_together(prompt, completion)
