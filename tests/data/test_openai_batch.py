"""OpenAI's batch format: what is read, renamed, or an error."""

import pytest

from rgtg.data.openai_batch import is_batch_line, to_request
from rgtg.data.sources import RowError

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def line(body, **fields):
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body} | fields


def test_chat_and_text_requests_are_read():
    chat = to_request(line(CHAT))
    assert (chat.prompt, chat.endpoint, chat.model) == (CHAT["messages"], "chat", "m")
    assert (chat.settings, chat.seed) == ({}, None)
    text = to_request(line({"prompt": "Once"}, url="/v1/completions"))
    assert (text.prompt, text.endpoint, text.model) == ("Once", "completions", None)


def test_settings_get_our_names_and_default_values_are_dropped():
    asked = {
        "max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.9, "stop": "\n", "seed": 7, "beta": 2.0,
        "top_k": None, "n": 1, "stream": False, "frequency_penalty": 0.0, "presence_penalty": 0,
        "logit_bias": {}, "user": None,
    }  # fmt: skip
    found = to_request(line(CHAT | asked))
    assert found.settings == {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"], "beta": 2.0}
    assert found.seed == 7
    assert to_request(line(CHAT | {"logit_bias": {"5": -100}})).settings == {"logit_bias": {"5": -100}}


def test_a_content_of_text_parts_is_text():
    two = [{"type": "text", "text": "Two and "}, {"type": "text", "text": "two?", "index": None}]
    assert to_request(line({"messages": [{"role": "user", "content": two}]})).prompt[0]["content"] == "Two and two?"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert to_request(line({"messages": parts})).prompt == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (line(CHAT | {"frequency_penalty": 0.5}), r"body\.frequency_penalty: not supported"),
        (line(CHAT | {"n": 2}), r"body\.n: not supported"),
        (line(CHAT | {"n": True}), r"body\.n: not supported"),
        (line(CHAT | {"stream": True}), r"body\.stream: not supported"),
        (line(CHAT | {"tools": [{}]}), r"body\.tools: not supported"),
        (line(CHAT | {"response_format": {"type": "json_object"}}), r"body\.response_format: .* not constrained to a"),
        (line(CHAT | {"method": "pargs"}), r"body\.method: not supported; leave it out"),
        (line(CHAT, extra=1), "extra: not supported"),
        (line(CHAT, method="GET"), 'method is .GET., expected "POST"'),
        (line(CHAT, url="/v1/embeddings"), "url is ./v1/embeddings., expected /v1/chat/completions or"),
        (line([]), "body is a list, expected an object"),
        (line({"model": "m"}), r"missing field: body\.messages"),
        (line({"messages": "Hi"}), r"body\.messages is text, expected messages"),
        (line({"messages": []}), "empty prompt"),
        (line({"messages": [{"role": "user"}]}), "message 1 of body.messages"),
        (line({"prompt": ["a", "b"]}, url="/v1/completions"), r"body\.prompt is a list, expected one text"),
        (line({"prompt": " "}, url="/v1/completions"), "empty prompt"),
        (line(CHAT | {"seed": -1}), r"body\.seed is -1, expected a whole number from 0"),
        (line(CHAT | {"model": 3}), r"body\.model is a number"),
        (line(CHAT | {"max_tokens": 3, "max_completion_tokens": 4}), "contradicts another limit"),
        (
            line({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "holds .image_url.: only text is read",
        ),
    ],
)
def test_unsupported_or_invalid_lines_are_errors(row, message):
    with pytest.raises(RowError, match=message):
        to_request(row)


def test_other_rows_are_not_batch_lines():
    assert is_batch_line(line(CHAT))
    assert not is_batch_line({"prompt": "a", "body": "b"})
    assert not is_batch_line({"prompt": "a", "custom_id": "b"})
    assert not is_batch_line(["body", "url"])
