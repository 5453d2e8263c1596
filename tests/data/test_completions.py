"""Reading files of completions."""

import json

import pytest

from rgtg.data.completions import completion_source, completion_text, read_completions
from rgtg.errors import DataError, UsageError


def test_rows_keep_their_fields_and_their_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "text": "", "seed": 3}\n\n{"prompt": "b", "completion": "c", "text": "d"}\n')
    rows = read_completions(path)
    assert rows == [{"prompt": "a", "text": "", "seed": 3}, {"prompt": "b", "completion": "c", "text": "d"}]
    assert [completion_text(row) for row in rows] == ["", "d"]


def test_an_error_names_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "text": "b"}\n{"prompt": 3, "text": "b"}\n')
    with pytest.raises(DataError, match=r'rows\.jsonl:2: "prompt" must be a non-empty text'):
        read_completions(path)
    with pytest.raises(UsageError, match="no such file"):
        read_completions(tmp_path / "absent.jsonl")


def test_the_prompt_of_a_chat_is_its_messages(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    path = tmp_path / "rows.jsonl"
    rendered = {"prompt": "<s>[user] Hi", "messages": chat, "text": "a"}
    rows = [
        rendered,
        {"prompt": chat, "text": "a"},
        {"messages": chat, "completion": "a", "prompt": None},
        {"prompt": "b", "messages": None, "text": "a"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_completions(path)
    assert found == rows
    assert [completion_source(row) for row in found] == [chat, chat, chat, "b"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "messages": "b", "text": "c"}, "messages is text, expected messages"),
        ({"prompt": [{"role": "user"}], "text": "c"}, "message 1 of prompt is not"),
        ({"prompt": [{"role": "user", "content": "a"}], "chat_template_kwargs": 3, "text": "c"}, "expected an object"),
        ({"prompt": "a", "chat_template_kwargs": {"a": 1}, "text": "c"}, "belongs to a chat"),
    ],
)
def test_a_bad_chat_is_an_error_with_its_line(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{message}"):
        read_completions(path)
