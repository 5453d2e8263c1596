"""``rgtg engines``, and the same table in docs/engines.md."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rgtg.cli.engines import carried
from rgtg.cli.main import app
from rgtg.config.engines import ENGINES, FEATURES, SCORERS, require_carried
from rgtg.decoding.methods import METHODS
from rgtg.errors import UsageError

PAGE = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")


def test_the_page_shows_the_table():
    rows = {}
    for line in PAGE.partition("## What each carries")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(ENGINES) + 1 and not cells[0].startswith(("**", "---")) and cells[0]:
            rows[cells[0]] = cells[1:]
    names = [name for group in carried().values() for name in group]
    assert list(rows) == names
    for name, cells in rows.items():
        for engine, cell in zip(ENGINES.values(), cells, strict=True):
            assert cell == (f"no: {engine.lacks[name]}" if name in engine.lacks else "yes"), (name, engine.name)
    for engine in ENGINES.values():
        assert re.search(rf"^\| {engine.name} \|", PAGE, re.M)


def test_everything_that_an_engine_lacks_is_something():
    known = {*METHODS, *SCORERS, *FEATURES}
    for engine in ENGINES.values():
        assert set(engine.lacks) <= known
    assert not ENGINES["torch"].lacks, "the torch engine is the reference"


def test_json_gives_every_reason():
    done = CliRunner().invoke(app, ["engines", "--json"])
    assert done.exit_code == 0, done.output
    found = {row["name"]: row for row in json.loads(done.stdout)["engines"]}
    assert list(found) == list(ENGINES)
    assert found["torch"]["installed"] is True
    assert found["torch"]["methods"] == dict.fromkeys(METHODS, "yes")
    assert "final states only" in found["llama-cpp"]["scorers"]["head on another layer"]


def test_the_table_is_shown():
    done = CliRunner().invoke(app, ["engines"])
    assert done.exit_code == 0, done.output
    for name in (*ENGINES, "best-of-n", "rgtg[llama-cpp]" if not ENGINES["llama-cpp"].installed else "llama-cpp"):
        assert name in " ".join(done.stdout.split())


def test_a_refusal_names_the_reason_and_the_way_out():
    with pytest.raises(UsageError, match=r"llama-cpp cannot carry drafts: .*; use the engine torch"):
        require_carried("llama-cpp", "drafts")
    require_carried("llama-cpp", "best-of-n")
