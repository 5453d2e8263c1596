"""``rgtg theory``."""

import json

import pytest

from helpers.command import verb
from rgtg.evaluation.theory import TheoryResult, exhibits

run = verb("theory")


def test_the_table_shows_the_four_exhibits():
    ran = run("--seed", 1)
    assert ran.exit_code == 0, ran.output
    for expected in (
        "equal full-sequence loss",
        "39 of 39",
        "ratio of two RLHF",
        "function of y_{<i}",
        "E[r | prefix]",
    ):
        assert expected in ran.stdout
    assert run("--quiet").stdout == ""


def test_json_is_the_result_and_depends_on_the_seed():
    plain = TheoryResult.model_validate_json(run("--json", "--seed", 1, "--set", "length=2").stdout)
    assert plain == exhibits(seed=1, length=2)
    assert plain.guidance != TheoryResult.model_validate_json(run("--json", "--seed", 2, "--set", "length=2").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "0"], "beta"),
        (["--beta", "nan"], "beta"),
        (["--length", "9"], "at most 300 completions"),
        (["--set", "lenght=2"], "did you mean length?"),
    ],
)
def test_invalid_settings_exit_with_2(arguments, message):
    ran = run(*arguments)
    assert ran.exit_code == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_json_has_the_version():
    assert json.loads(run("--json", "--length", 2).stdout)["version"] == 1
