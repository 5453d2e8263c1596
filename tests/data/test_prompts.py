"""Files of prompts: which rows are read, their ids, and bad rows."""

import json

import pytest

from rgtg.data.prompts import raise_for_bad_rows, read_prompt_rows, read_prompts
from rgtg.errors import DataError, UsageError

CHAT = [{"role": "user", "content": "Hi"}]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def request(custom_id, **body):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"} | body}


@pytest.fixture
def read(tmp_path):
    return lambda *rows: read_prompt_rows(write(tmp_path / "p.jsonl", *rows))


def test_texts_chats_pairs_and_requests_are_read_with_their_ids(read):
    found = read(
        {"prompt": "a", "id": "x", "other": 1}, {"prompt": CHAT, "custom_id": "y"}, {"messages": CHAT, "id": 7}, "",
        {"chosen": "\n\nHuman: q\n\nAssistant: b", "rejected": "\n\nHuman: q\n\nAssistant: c"}, request("z", seed=3),
    )  # fmt: skip
    assert [(row.number, row.id) for row in found.rows] == [(1, "x"), (2, "y"), (3, "7"), (5, "row-5"), (6, "z")]
    assert [row.prompt for row in found.rows] == ["a", CHAT, CHAT, "\n\nHuman: q\n\nAssistant:", "Once"]
    assert [row.endpoint for row in found.rows] == [None] * 4 + ["completions"]
    assert found.rows[-1].seed == 3
    assert not found.bad


def test_bad_rows_are_returned_separately_with_their_ids(read):
    found = read(
        {"prompt": "a", "id": "x"}, "{", {"prompt": 3, "id": "y"}, {"prompt": "b", "id": "x"},
        {"prompt": "c", "id": [1]},
        request("z", echo=True), {"custom_id": None, "url": "", "body": {}}, request("w", temperature=-1),
        {"prompt": "d", "id": "\ud800"}, {"prompt": "e", "id": "row-11"}, {"prompt": "f"},
    )  # fmt: skip
    assert [row.id for row in found.rows] == ["x", "row-11"]
    assert [(row.number, row.id, row.reason) for row in found.bad] == [
        (2, None, "not JSON"), (3, "y", "wrong type"), (4, "x", "duplicate id"), (5, None, "wrong type"),
        (6, "z", "unsupported field"), (7, None, "missing field"), (8, "w", "bad value"), (9, None, "bad UTF-8"),
        (11, None, "duplicate id"),
    ]  # fmt: skip
    assert "temperature = -1" in found.bad[6].error
    assert found.total == 11
    with pytest.raises(DataError, match=r"(?s)cannot use 9 of 11 rows .*p\.jsonl:2: not JSON.* and 4 more"):
        raise_for_bad_rows(found.source, found.bad, found.total)


def test_every_reader_of_prompts_reads_text_parts_and_the_prompts_of_chat_pairs(read, tmp_path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    told = [*CHAT, {"role": "assistant", "content": "a"}], [*CHAT, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": parts}, {"messages": parts}, {"chosen": told[0], "rejected": told[1]}]
    assert [row.prompt for row in read(*rows).rows] == [CHAT] * 3
    assert read_prompts(tmp_path / "p.jsonl") == [CHAT] * 3


def test_names_and_tools_of_messages_are_kept_and_other_parts_are_refused(read):
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    asked = {"role": "user", "name": "Ann", "content": "Hi"}
    chat = [asked, {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "name": "f", "content": "4", "tool_call_id": "x"}]  # fmt: skip
    image = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}]
    found = read({"prompt": chat}, {"prompt": image}, {"prompt": [{"role": "user", "content": []}]},
                 {"prompt": [{"content": "a"}]}, {"messages": CHAT, "tools": [{}]})  # fmt: skip
    assert found.rows[0].prompt == [chat[0], {"role": "assistant", "tool_calls": calls, "content": ""}, chat[2]]
    problems = [bad.error for bad in found.bad]
    assert "message 1 of prompt holds 'image_url': only text is read" in problems[0]
    assert all("is not {role: text, content: text or parts of text}" in problem for problem in problems[1:3])
    assert "tools: not supported" in problems[3]


def test_a_row_may_have_variables_of_the_chat_template(read):
    given = {"enable_thinking": False}
    found = read({"prompt": CHAT, "chat_template_kwargs": given | {"other": None}},
                 {"prompt": CHAT, "chat_template_kwargs": None}, {"prompt": "a", "chat_template_kwargs": given},
                 {"prompt": CHAT, "chat_template_kwargs": [1]}, request("b", chat_template_kwargs=given))  # fmt: skip
    assert [row.settings for row in found.rows] == [{"chat_template_kwargs": given}, {}]
    assert ["plain text" in bad.error for bad in found.bad] == [True, False, True]
    assert "chat_template_kwargs is a list, expected an object" in found.bad[1].error


def test_plain_prompts_become_chats(tmp_path):
    def read(*rows, **options):
        return read_prompt_rows(write(tmp_path / "p.jsonl", *rows), **options)

    rows, given = [{"prompt": "a"}, {"prompt": CHAT}, request("z")], {"enable_thinking": False}
    made = read(*rows, chats=True, system="s")
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
    assert [row.prompt for row in made.rows] == [[system, user], CHAT, "Once"]
    assert len({one.fingerprint for one in (made, read(*rows), read(*rows, chats=True))}) == 3
    # a row may have variables of the chat template then
    own = read({"prompt": "a", "chat_template_kwargs": given}, {"prompt": " "}, chats=True)
    assert [(row.prompt, row.settings) for row in own.rows] == [([user], {"chat_template_kwargs": given})]
    assert [bad.reason for bad in own.bad] == ["empty prompt"]
    assert read(*rows[1:], chats=True).rows == read(*rows[1:]).rows
    with pytest.raises(UsageError, match="a system message goes before plain-text prompts"):
        read(*rows[1:], chats=True, system="s")


def test_row_settings_are_checked_and_equal_ones_are_shared(read):
    found = read(request("a", max_tokens=5), request("b", max_tokens=5), request("c", max_tokens=6))
    assert [row.settings for row in found.rows] == [{"max_new_tokens": n} for n in (5, 5, 6)]
    assert found.rows[0].settings is found.rows[1].settings


def test_a_file_that_asks_for_several_models_is_an_error(read):
    assert read(request("a", model="m"), request("b", model="m"), request("c")).models == ["m"]
    with pytest.raises(DataError, match="asks for several models: m, n"):
        read(request("a", model="m"), request("b", model="n"))


def test_the_fingerprint_depends_on_ids_prompts_settings_and_order(read):
    def of(*rows):
        return read(*rows).fingerprint

    one, two = {"prompt": "a"}, {"prompt": "b"}
    assert of(one, two) == of(one | {"other": 1}, two)
    different = [
        of(one, two), of(two, one), of(one, two | {"id": 1}), of(one, {"prompt": "c"}), of(one, "{"), of(one),
        of(request("a")), of(request("a", seed=1)), of(request("a", max_tokens=1)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    rows = [{"id": 5, "prompt": None, "messages": CHAT, "extra": 1.5}, {"id": None, "prompt": "a", "messages": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_prompt_rows(path)
    assert [(row.id, row.prompt) for row in found.rows] == [("5", CHAT), ("row-2", "a")]


def test_progress_is_reported(tmp_path):
    told = []
    path = write(tmp_path / "p.jsonl", *({"prompt": f"{i}"} for i in range(2500)))
    read_prompt_rows(path, progress=lambda done, total: told.append((done, total)))
    size = path.stat().st_size
    assert len(told) == 3
    assert told[-1] == (size, size)
    assert 0 < told[0][0] < told[1][0] < size
