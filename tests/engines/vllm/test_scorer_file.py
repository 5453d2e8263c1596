"""The file of scorers: names, folders, and what is wrong with it in one line."""

import json

import pytest

from helpers.random_heads import write_random_head
from rgtg.engines.vllm.scorer_file import VARIABLE, scorers_of_server
from rgtg.errors import RgtgError


@pytest.fixture
def scorer_file(tmp_path, policy_folder, monkeypatch):
    write_random_head(tmp_path / "heads" / "helpful", policy_folder)
    path = tmp_path / "scorers.json"

    def write(content):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv(VARIABLE, str(path))
        return scorers_of_server()

    return write


def test_folders_are_relative_to_the_file(scorer_file, tmp_path):
    absolute = str(tmp_path / "heads" / "helpful")
    for folder in ("heads/helpful", absolute):
        found = scorer_file({"helpful": folder})
        assert found["helpful"].folder == absolute
        assert found["helpful"].on_policy_states
        assert found["helpful"].scores_vocabulary


def test_yaml_is_read_too(scorer_file):
    assert list(scorer_file("nice.1: heads/helpful\n")) == ["nice.1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid YAML"),
        ("[1]", "must hold settings"),
        ("{}", "names no scorers"),
        ({"a b": "heads/helpful"}, "'a b' is no name"),
        ("1: heads/helpful", "1 is no name"),
        ({"a": 3}, "a must name a folder, not 3"),
        ({"a": "heads"}, "no rgtg.json"),
        ({"a": "heads/absent"}, "there is no such folder"),
    ],
)
def test_damaged_files_are_named(scorer_file, content, message):
    with pytest.raises(RgtgError, match=message) as caught:
        scorer_file(content)
    assert "\n" not in str(caught.value)


def test_the_variable_must_be_set(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RgtgError, match=f"set {VARIABLE}"):
        scorers_of_server()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent.json"))
    with pytest.raises(RgtgError, match="cannot read"):
        scorers_of_server()
