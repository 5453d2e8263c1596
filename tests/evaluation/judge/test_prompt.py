"""Prompts are filled and checked; verdicts are parsed strictly."""

import pytest

from rgtg.errors import UsageError
from rgtg.evaluation.judge.prompt import JudgePrompt, NoVerdictError, read_verdict


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("[[A]]", "first"),
        ("B is right, A is not.\n[[B]]", "second"),
        ("[[C]] since both fail. [[C]]", "tie"),
        ('{"verdict": "A"}', "first"),
        ('```json\n{"reason": "same", "verdict": "tie"}\n```', "tie"),
        ('[[B]] {"verdict": "B"}', "second"),
        ("<think>[[A]] or rather [[B]]?</think>[[B]]", "second"),
        ('{"score": 3} [[A]]', "first"),
    ],
)
def test_one_verdict_is_read(answer, verdict):
    assert read_verdict(answer) == verdict


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "is empty"),
        ("<think>[[A]]</think>", "is empty"),
        ("A is better", "no verdict"),
        ("[A]", "no verdict"),
        ("[[a]]", "no verdict"),
        ("[[D]]", "no verdict"),
        ("[[A]] no, [[B]]", "2 verdicts"),
        ('[[A]] {"verdict": "B"}', "2 verdicts"),
        ('{"verdict": "first"}', "verdict is 'first', expected A, B, C or tie"),
        ('{"verdict": 1}', "verdict is 1"),
        ('{"verdict": null}', "no verdict"),
        ('{verdict: "A"}', "no verdict"),
    ],
)
def test_other_answers_have_no_verdict(answer, why):
    with pytest.raises(NoVerdictError, match=why.replace("[", r"\[")):
        read_verdict(answer)


def test_braces_in_texts_are_kept():
    (message,) = JudgePrompt.load().ask("{first} {prompt}", "{second}", "{0} {nothing} {{}}")
    assert "<prompt>\n{first} {prompt}\n</prompt>" in message["content"]
    assert "<completion_A>\n{second}\n</completion_A>" in message["content"]
    assert "<completion_B>\n{0} {nothing} {{}}\n</completion_B>" in message["content"]


def test_a_reminder_keeps_the_conversation():
    prompt = JudgePrompt.load()
    first = prompt.ask("p", "a", "b")
    again = prompt.ask_again(first, "hm")
    assert [m["role"] for m in again] == ["user", "assistant", "user"]
    assert again[:2] == [*first, {"role": "assistant", "content": "hm"}]
    assert "[[C]]" in again[2]["content"]


def test_a_custom_prompt_is_used(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text('{prompt}|{first}|{second}|Say {"verdict": "A"} or {"verdict": "B"}.')
    prompt = JudgePrompt.load(own)
    assert prompt.ask("p", "x", "y")[0]["content"] == 'p|x|y|Say {"verdict": "A"} or {"verdict": "B"}.'
    assert prompt.fingerprint != JudgePrompt.load().fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt} {first}", r"has no \{second\}; it must contain \{prompt\}, \{first\}, \{second\}"),
        ("{prompt} {first} {second} {answer}", r"unknown placeholder \{answer\}"),
        (None, "cannot read the judge's prompt"),
    ],
)
def test_an_unusable_prompt_is_an_error(tmp_path, text, message):
    own = tmp_path / "own.txt"
    if text is not None:
        own.write_text(text)
    with pytest.raises(UsageError, match=message):
        JudgePrompt.load(own)
