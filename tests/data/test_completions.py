"""Reading files of completions."""

import pytest

from rgtg.data.completions import completion_text, read_completions
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
