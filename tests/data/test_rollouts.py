"""Reading rollouts: fields, errors with file and line, and which completions end with EOS."""

import json

import pytest

from rgtg.data.rollouts import read_rollouts, tokenize_rollouts
from rgtg.errors import DataError, UsageError

GOOD = {"prompt": "so ", "text": "ab", "reward": 2, "finish_reason": "stop", "seed": 3}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def read(tmp_path, tokenizer):
    return lambda *rows, **settings: read_rollouts(write(tmp_path / "r.jsonl", *rows), tokenizer=tokenizer, **settings)


def test_both_names_of_the_text_are_read_and_repeated_rows_are_kept(read):
    rollouts = read(GOOD, {"prompt": "so ", "completion": "ab", "reward": -1.5}, GOOD)
    assert [(r.text, r.reward, r.finished) for r in rollouts.rows] == [
        ("ab", 2.0, True), ("ab", -1.5, True), ("ab", 2.0, True),
    ]  # fmt: skip
    assert rollouts.fingerprint == read(GOOD, {"prompt": "so ", "text": "ab", "reward": -1.5}, GOOD).fingerprint
    assert rollouts.fingerprint != read(GOOD).fingerprint


def test_a_truncated_completion_gets_no_eos(read, tokenizer):
    cut, empty = GOOD | {"finish_reason": "length"}, GOOD | {"text": ""}
    ids = tokenize_rollouts(read(GOOD, cut, empty).rows, tokenizer)
    text = tokenizer("ab").input_ids
    assert [r.completion_ids for r in ids] == [[*text, 2], text, [2]]
    assert ids[0].rows == [(tokenizer("so ").input_ids, [*text, 2])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ([1], "expected an object"),
        ({"prompt": "so ", "text": "a"}, "missing field: reward"),
        ({"prompt": "so ", "reward": 1}, r"text \(or completion\)"),
        (GOOD | {"text": 3}, "text is not text"),
        (GOOD | {"finish_reason": 3}, "finish_reason is not text"),
        (GOOD | {"reward": None}, "bad reward"),
        (GOOD | {"reward": True}, "bad reward"),
        ('{"prompt": "so ", "text": "a", "reward": Infinity}', "not a finite number"),
        (GOOD | {"prompt": ""}, "empty prompt"),
        (GOOD | {"text": "", "finish_reason": "length"}, "empty completion"),
        (GOOD | {"text": "a" * 40}, "too long"),
        (GOOD | {"text": "what?"}, "unknown token"),
    ],
)
def test_an_error_names_file_and_line(read, row, message):
    with pytest.raises(DataError, match=rf"r\.jsonl:2: .*{message}"):
        read(GOOD, row, max_length=20, embeddings=60)  # there is none for the question mark


def test_labels_must_lie_in_0_to_1_after_scaling(read):
    labels = [GOOD | {"reward": reward} for reward in (-1, 0.5, 3)]
    with pytest.raises(DataError, match=r"r\.jsonl:1: .*-1 is not in \[0, 1\]; scale rewards with"):
        read(*labels, labels=True)
    assert [r.reward for r in read(*labels, labels=True, reward_range=(-1.0, 3.0)).rows] == [0.0, 0.375, 1.0]
    with pytest.raises(DataError, match=r"r\.jsonl:3: .*3 is not in \[-1, 2\]"):
        read(*labels, labels=True, reward_range=(-1.0, 2.0))


def test_skip_leaves_bad_rows_out(read, tmp_path):
    with pytest.warns(UserWarning, match=r"left out 1 of 2 rows \(bad reward: 1\)"):
        assert len(read(GOOD, GOOD | {"reward": "high"}, on_bad="skip").rows) == 1
    with pytest.warns(UserWarning, match="left out 1 of 2 rows .*; they are in .*rejects.jsonl"):
        read(GOOD, GOOD | {"reward": "high"}, on_bad="skip", rejects=tmp_path / "rejects.jsonl")
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["line"] == 2
    with pytest.raises(DataError, match="Nothing is left"):
        read(GOOD | {"reward": "high"}, on_bad="skip")


def test_rejects_must_not_overwrite_the_source(tmp_path, tokenizer):
    path = write(tmp_path / "rejects.jsonl", GOOD, "{")
    before = path.read_text()
    with pytest.raises(UsageError, match="would overwrite the data"):
        read_rollouts(path, tokenizer=tokenizer, on_bad="skip", rejects=path)
    assert path.read_text() == before
