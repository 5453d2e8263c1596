"""``rgtg serve``: errors before and during its start."""

import socket

from helpers.command import verb

serve = verb("serve")


def test_a_missing_policy_is_an_error():
    ran = serve()
    assert ran.exit_code == 2
    assert "policy is required (--policy)" in ran.stderr


def test_invalid_options_are_errors(policy_folder):
    for options, says in (
        (["--scorer", "x"], "NAME=FOLDER"),
        (["--host", "0.0.0.0"], "--allow-public"),
        (["--max-queue", "-1"], "max_queue = -1"),
        (["--set", "max_bach=3"], "did you mean max_batch"),
    ):
        ran = serve("--policy", policy_folder, *options)
        assert ran.exit_code == 2
        assert says in ran.stderr


def test_an_address_in_use_is_an_error(policy_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ran = serve("--policy", policy_folder, "--port", taken.getsockname()[1])
    assert ran.exit_code == 2
    assert "cannot listen on 127.0.0.1" in ran.stderr
    assert "choose another" in ran.stderr


def test_models_that_cannot_be_loaded_are_errors(policy_folder, tmp_path):
    for options in (["--policy", tmp_path / "nothing"], ["--policy", policy_folder, "--scorer", f"x={tmp_path}/no"]):
        ran = serve(*options, "--port", 0, "--quiet")
        assert ran.exit_code == 2
        assert "no model folder" in ran.stderr
        assert ran.stdout == ""
