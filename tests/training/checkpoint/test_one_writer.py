"""Two runs never share an output folder."""

import pytest

from helpers.command import verb
from rgtg.errors import UsageError
from rgtg.training.train import _locked_output, train_scorer
from rgtg.utils.files import LOCK_FILE, lock_folder
from training.checkpoint.test_resume import die_at, settings, world  # noqa: F401  # a fixture

pytest.importorskip("fcntl")
KINDS = {
    "a model": {},
    "an adapter": {"trunk": "shared"},
    "a head": {"trunk": "own", "head": "state", "layer": 1, "width": 8},
}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_on_the_same_output_raises_an_error(world, monkeypatch, kind, resume):  # noqa: F811
    run, refused = settings(**KINDS[kind], resume=resume, train={"max_steps": 4, "logging_steps": 1}), []

    def start_another():
        with pytest.raises(UsageError, match="another process is writing out: wait for it, or give another --output"):
            train_scorer(run)
        refused.append((world / "out" / LOCK_FILE).exists())

    die_at(monkeypatch, 2, start_another)
    assert train_scorer(run).steps == 4
    assert refused == [True]
    assert not (world / "out" / LOCK_FILE).exists()


def test_the_command_reports_a_locked_output_in_one_line(world):  # noqa: F811
    given = ["--pairs", "pairs.jsonl", "--base", "policy", "--output", "out", "--resume"]
    with lock_folder(world / "out"):
        result = verb("train")(*given)
        assert list((world / "out").iterdir()) == [world / "out" / LOCK_FILE]
    assert result.exit_code == 2
    assert [line for line in result.stderr.splitlines() if line] == [
        "error: another process is writing out: wait for it, or give another --output"
    ]


def test_the_main_process_locks_the_output_for_all(world, monkeypatch):  # noqa: F811
    with _locked_output(settings()):
        monkeypatch.setenv("RANK", "1")
        with _locked_output(settings()):
            assert (world / "out" / LOCK_FILE).exists()
        assert (world / "out" / LOCK_FILE).exists()
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UsageError, match="another process"), _locked_output(settings()):
            pass
