"""``rgtg doctor``."""

import json

import typer
from typer.testing import CliRunner

import rgtg
from rgtg.cli import doctor

app = typer.Typer()
app.command()(doctor.command)


def test_reports_versions_devices_and_the_trial():
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["versions"]["rgtg"] == rgtg.__version__
    assert report["trial"] == "one-pass scores equal recomputed ones"
    assert "trial" in CliRunner().invoke(app, []).stdout
    assert CliRunner().invoke(app, ["--quiet"]).stdout == ""
