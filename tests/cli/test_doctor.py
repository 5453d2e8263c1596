"""``rgtg doctor``."""

import json

import pytest
import typer
from typer.testing import CliRunner

import rgtg
from rgtg.cli import doctor

app = typer.Typer()
app.command()(doctor.run)


def test_versions_devices_and_the_trial_are_reported():
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["versions"]["rgtg"] == rgtg.__version__
    assert report["trial"] == "one-pass scores equal recomputed ones"
    assert "trial" in CliRunner().invoke(app, []).stdout
    assert CliRunner().invoke(app, ["--quiet"]).stdout == ""


def test_speed_times_a_policy_and_its_scorer(policy_folder, scorer_folder):
    timed = ["--speed", "--policy", str(policy_folder), "--prompt-length", "8", "--tokens", "4", "--set", "repeats=1"]
    result = CliRunner().invoke(app, [*timed, "--scorer", str(scorer_folder), "--json"])
    assert result.exit_code == 0, result.stderr
    unguided, guided = json.loads(result.stdout)["speed"]
    assert (unguided["name"], guided["name"]) == ("unguided", "guided")
    assert unguided["of_unguided"] == 1
    assert guided["megabytes_per_token"] > unguided["megabytes_per_token"]
    assert 0 < guided["limit_of_unguided"] < 1
    shown = CliRunner().invoke(app, timed)
    assert shown.exit_code == 0, shown.stderr
    assert "ms per" in shown.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speed"], "--speed needs --policy"),
        (["--top-k", "3"], "--top-k applies to --speed"),
        (["--speed", "--policy", "POLICY", "--prompt-length", "1000"], "exceed the policy's context of 128"),
    ],
)
def test_invalid_speed_options_are_errors(flags, message, policy_folder):
    flags = [str(policy_folder) if flag == "POLICY" else flag for flag in flags]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 2
    assert message in result.stderr
