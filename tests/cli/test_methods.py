"""``rgtg methods``: the table, on a terminal and as JSON."""

import json

from typer.testing import CliRunner

from rgtg.cli.main import app
from rgtg.decoding.methods import METHODS


def test_every_method_is_listed_on_one_line():
    shown = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    for name, method in METHODS.items():
        (line,) = [line for line in shown.stdout.splitlines() if line.split()[:1] == [name]]
        assert (method.scorer or "none") in line
        assert method.paper.split()[-1] in line


def test_json_has_every_field():
    rows = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)["methods"]
    assert [row["name"] for row in rows] == list(METHODS)
    assert rows[7]["clip"] is True
    assert rows[9] == rows[9] | {"name": "genarm", "top_k": None, "candidates": "all", "vocabulary": True}
