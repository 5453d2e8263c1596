import json

import pytest

from rgtg.config import DemoSettings
from rgtg.demo.run import make_data, method_runs, prepare_folder, save_data
from rgtg.errors import UsageError


def test_no_message_is_in_two_parts_of_the_data(tmp_path):
    data = make_data(DemoSettings(corpus=300, pairs=100, audit_pairs=50, prompts=20))
    parts = [
        [prompt for prompt, _ in data.corpus],
        [pair.prompt for pair in data.pairs],
        [pair.prompt for pair in data.audit_pairs],
        [customer.prompt for customer in data.unseen],
    ]
    together = [prompt for part in parts for prompt in part]
    assert [len(part) for part in parts] == [300, 100, 50, 20]
    assert len(set(together)) == len(together)
    save_data(tmp_path, data)
    first = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    assert set(first) == {"prompt", "chosen", "rejected"}
    assert not list(tmp_path.glob("*.tmp"))


def test_each_method_has_its_own_scorer_and_every_beta():
    runs = method_runs([1.0, 2.0])
    assert [run.label for run in runs if run.method == "pargs"] == ["pargs β=1", "pargs β=2"]
    assert {run.method: run.scorer for run in runs} == {
        "policy": None, "args": "full-bt", "args-sample": "full-bt", "pargs": "prefix-bt",
        "pargs-greedy": "prefix-bt", "best-of-n": "full-bt",
    }  # fmt: skip


def test_an_earlier_demo_is_cleared(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    prepare_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["thesis.tex"], ["settings.json", "thesis.tex"], ["policy"]])
def test_a_folder_with_other_files_is_an_error_and_unchanged(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="not an earlier demo"):
        prepare_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_an_output_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        prepare_folder(tmp_path / "out")
