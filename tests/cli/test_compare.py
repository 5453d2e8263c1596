"""``rgtg compare``."""

import json
import os
import signal
import sys

import pytest
import yaml

from helpers.command import verb
from helpers.naive import info
from helpers.tiny_models import tiny_reward_model, tiny_tokenizer
from rgtg.evaluation.compare import generate
from rgtg.models.loading.scorer_info import write_info
from rgtg.types.comparison import ComparedCompletion, ComparisonResult

run = verb("compare")


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


def test_results_settings_and_report_are_written(config, tmp_path):
    out = tmp_path / "out"
    ran = run("--config", config, "--output", out, "--json")
    assert ran.exit_code == 0, ran.stderr
    result = ComparisonResult.model_validate_json((out / "results.json").read_bytes())
    assert ComparisonResult.model_validate_json(ran.stdout) == result
    assert [row.label for row in result.methods] == ["policy", "pargs β=0", "pargs β=2"]
    assert (out / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
    written = {path.name for path in out.iterdir()}
    assert {"completions.jsonl", "parts", "report.html", "report.md", "results.json", "settings.json"} <= written
    assert len(list((out / "parts").iterdir())) == 3
    lines = [
        ComparedCompletion.model_validate_json(line) for line in (out / "completions.jsonl").read_text().splitlines()
    ]
    assert [(c.row, c.run_seed, c.prompt_index) for c in lines] == [
        (row.label, 7, i) for row in result.methods for i in (0, 1)
    ]
    assert [c.reward for c in lines] == [value for row in result.methods for value in row.rewards[0]]
    changed = run("--config", config, "--output", out, "--limit", 1)
    assert changed.exit_code == 2
    assert "made with another prompts" in changed.stderr
    table = run("--config", config, "--output", out, "--limit", 1, "--force")
    assert table.exit_code == 0, table.stderr
    for text in ("pargs β=2", "baseline: policy", "Budgets are not equal", "recommended", "written to"):
        assert text in table.stdout


def test_sigterm_exits_with_75_and_the_same_command_resumes(config, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    make, made = generate.complete, []

    def stop_at_the_second(*arguments, **settings):
        if len(made) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        made.append(make(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(generate, "complete", stop_at_the_second)
    stopped = run("--config", config, "--output", out, "--set", "seeds=[0,1]")
    assert stopped.exit_code == 75, stopped.output
    assert "resumes" in stopped.stderr
    assert not (out / "results.json").exists()
    assert len(list((out / "parts").glob("*.json"))) == 1
    monkeypatch.setattr(generate, "complete", make)
    results = []
    for folder in (out, whole):
        ran = run("--config", config, "--output", folder, "--set", "seeds=[0,1]", "--quiet")
        assert ran.exit_code == 0, ran.output
        results.append(json.loads((folder / "results.json").read_text()))
        for row in results[-1]["methods"]:
            row["seconds"] = row["tokens_per_second"] = 0
        results[-1]["provenance"]["settings"]["output"] = ""
    assert results[0] == results[1]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_zero_on_the_command_line_overrides_the_config(config, tmp_path):
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
def test_invalid_use_prints_one_message(config, tmp_path, arguments, code, message):
    ran = run("--config", config, "--output", tmp_path / "out", *arguments)
    assert ran.exit_code == code, ran.output
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_unwritable_output_is_an_error_before_the_work(config, tmp_path, monkeypatch):
    absent = ["--config", config, "--policy", "./absent"]
    ran = run(*absent, "--output", config)
    assert ran.exit_code == 1
    assert "choose another --output" in ran.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = run(*absent, "--output", tmp_path / "out")
    assert ran.exit_code == 2
    assert "pip install 'rgtg[report]'" in ran.stderr
