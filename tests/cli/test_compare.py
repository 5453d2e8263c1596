"""``rgtg compare``."""

import json
import sys

import pytest
import typer
import yaml
from typer.testing import CliRunner

from conftest import tiny_reward_model, tiny_tokenizer
from naive import info
from rgtg.cli import compare
from rgtg.models.checkpoint import write_info
from rgtg.types import ComparisonResult

app = typer.Typer()
app.command()(compare.command)


@pytest.fixture
def config(tmp_path, policy_folder, scorer_folder):
    write_info(scorer_folder, info())
    tiny_reward_model(seed=7).save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("Hello", "A day")))
    values = {
        "policy": str(policy_folder), "scorer": str(scorer_folder), "reward": str(tmp_path / "judge"),
        "prompts": str(prompts), "max_new_tokens": 4, "bootstrap": 100, "device": "cpu", "seed": 7,
        "methods": [{"method": "policy"}, {"method": "pargs", "beta": [0, 2]}],
    }  # fmt: skip
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_results_settings_and_report(config, tmp_path):
    out = tmp_path / "out"
    ran = run("--config", config, "--output", out, "--json")
    assert ran.exit_code == 0, ran.stderr
    result = ComparisonResult.model_validate_json((out / "results.json").read_bytes())
    assert ComparisonResult.model_validate_json(ran.stdout) == result
    assert [row.label for row in result.methods] == ["policy", "pargs β=0", "pargs β=2"]
    assert (out / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json", "settings.json"]
    table = run("--config", config, "--output", out, "--limit", 1)
    assert table.exit_code == 0, table.stderr
    assert "pargs β=2" in table.stdout
    assert "written to" in table.stdout


def test_a_zero_on_the_command_line_beats_the_config(config, tmp_path):
    out = tmp_path / "out"
    ran = run("--config", config, "--output", out, "--seed", 0, "--set", "temperature=0", "--quiet")
    assert ran.exit_code == 0, ran.stderr
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["seed"], settings["temperature"]) == (0, 0)
    assert settings["methods"][1]["beta"] == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--limit", "0"], 2, "limit"),
        (["--set", "temprature=0"], 2, "did you mean temperature?"),
        (["--reward", "./absent"], 2, "no model folder ./absent"),
        (["--prompts", "absent.jsonl"], 2, "absent.jsonl: no such file"),
    ],
)
def test_wrong_use(config, tmp_path, arguments, code, message):
    ran = run("--config", config, "--output", tmp_path / "out", *arguments)
    assert ran.exit_code == code, ran.output
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out" / "results.json").exists()


def test_what_cannot_be_written_is_told_before_the_work(config, tmp_path, monkeypatch):
    absent = ["--config", config, "--policy", "./absent"]
    ran = run(*absent, "--output", config)
    assert ran.exit_code == 1
    assert "choose another --output" in ran.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = run(*absent, "--output", tmp_path / "out")
    assert ran.exit_code == 2
    assert "pip install 'rgtg[report]'" in ran.stderr
