"""``rgtg judge``."""

import json
import signal
import subprocess
import sys
import time

import pytest

from helpers.command import verb
from helpers.judge_server import serve
from helpers.synthetic import write_rows
from rgtg.types.judge import JudgedPair, JudgeResult

KEY = "sk-secret-0123456789"
run = verb("judge")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def sides(tmp_path):
    for name in ("good", "bad"):
        rows = [{"prompt": f"Question {i}", "text": f"{name} {i}"} for i in range(20)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return ["--a", str(tmp_path / "good.jsonl"), "--b", str(tmp_path / "bad.jsonl")]


def prefers_good(shown, _number):
    return f"[[{'A' if shown[0].startswith('good') else 'B'}]]"


def test_files_table_and_json_are_written(tmp_path, sides):
    out = tmp_path / "out"
    with serve(prefers_good) as server:
        common = ["--model", "m", "--base-url", server.url, "--output", out, "--limit", 3, "--price-in", 1]
        shown = run(*common, *sides)
        assert shown.exit_code == 0, shown.stderr
        assert server.calls == 6
        printed = run(*common, *sides, "--json")
    assert "100.0% (100.0% to 100.0%)" in " ".join(shown.stdout.split())
    assert "6 calls (0 answers from the cache" in shown.stdout
    assert "cost" in shown.stdout
    result = JudgeResult.model_validate_json((out / "judge.json").read_bytes())
    assert JudgeResult.model_validate_json(printed.stdout) == result
    assert (result.usage.calls, result.usage.cached) == (0, 6)
    pairs = [JudgedPair.model_validate_json(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert [pair.prompt for pair in pairs] == ["Question 0", "Question 1", "Question 2"]
    names = sorted(path.name for path in out.iterdir())
    assert names == ["answers.jsonl", "judge.json", "settings.json", "verdicts.jsonl"]
    assert KEY not in "".join(path.read_text() for path in out.iterdir())


def test_a_key_in_the_settings_is_used_and_not_saved(tmp_path, sides):
    with serve(prefers_good) as server:
        common = ["--model", "m", "--base-url", server.url, "--output", tmp_path / "out", *sides]
        assert run(*common, "--set", "api_key=sk-other", "--quiet").exit_code == 0
        assert server.headers[0]["authorization"] == "Bearer sk-other"
    assert "sk-other" not in "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def test_failures_are_shown(tmp_path, sides):
    def vague(shown, number):
        return "Hm." if shown[0] == "good 0" else prefers_good(shown, number)

    with serve(vague) as server:
        ran = run("--model", "m", "--base-url", server.url, "--output", tmp_path / "out", *sides)
    assert ran.exit_code == 0, ran.stderr
    text = " ".join(ran.stdout.split())
    assert "no verdict: good against bad, 'Question 0': the answer holds no verdict" in text
    assert "1 questions without a verdict" in text


def test_a_dry_run_counts_and_writes_nothing(tmp_path, sides):
    ran = run("--model", "m", "--output", tmp_path / "out", "--dry-run", "--price-in", 1, "--price-out", 1, *sides)
    assert ran.exit_code == 0, ran.stderr
    assert "40 calls to make, 0 answers already there" in ran.stdout
    assert "at most 20,480 to write; costs at most" in ran.stdout
    planned = json.loads(run("--model", "m", "--output", tmp_path / "out", "--dry-run", "--json", *sides).stdout)
    assert (planned["calls"], planned["cost_at_most"]) == (40, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give the judge one of"),
        (["--a", "x.jsonl", "--b", "y.jsonl"], 2, "x.jsonl: no such file"),
        (["--set", "temprature=1"], 2, "did you mean temperature?"),
        (["--concurrency", "0"], 2, "concurrency = 0"),
        (["--base-url", "nowhere"], 2, "http://localhost:8000/v1"),
    ],
)
def test_invalid_use_prints_one_message(tmp_path, arguments, code, message):
    if "--base-url" in arguments:
        (tmp_path / "a.jsonl").write_text('{"prompt": "p", "text": "x"}\n')
        arguments = [*arguments, "--a", tmp_path / "a.jsonl", "--b", f"b={tmp_path / 'a.jsonl'}"]
    ran = run("--model", "m", "--output", tmp_path / "out", *arguments)
    assert ran.exit_code == code, ran.output
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_bad_rows_exit_with_3(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p"}\n')
    ran = run("--model", "m", "--output", tmp_path / "out", "--a", tmp_path / "a.jsonl", "--b", tmp_path / "a.jsonl")
    assert ran.exit_code == 3
    assert "a.jsonl:1:" in ran.stderr


def test_an_unreachable_endpoint_prints_one_line_with_its_url(tmp_path, sides):
    with serve(prefers_good) as server:
        pass
    ran = run("--model", "m", "--base-url", server.url, "--output", tmp_path / "out", "--set", "retries=0", *sides)
    assert ran.exit_code == 1
    assert server.url in ran.stderr
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_and_repeats_no_call(tmp_path, sides, how):
    def slow(shown, number):
        time.sleep(0.1)
        return prefers_good(shown, number)

    with serve(slow) as server:
        arguments = ["--model", "m", "--base-url", server.url, "--output", str(tmp_path / "out"), *sides]
        # A shell that runs the tests in the background has SIGINT ignored, and a child inherits that.
        heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        start = [sys.executable, "-c", f"{heard}; from rgtg.__main__ import main; main()", "judge"]
        running = subprocess.Popen([*start, *arguments, "--concurrency", "2"], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while server.calls < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(how)
        _, said = running.communicate(timeout=60)
        assert running.returncode == 75, said
        assert "answers are kept in" in said
        assert 5 <= server.calls < 40
        ran = run(*arguments)
        assert ran.exit_code == 0, ran.stderr
        assert server.calls == 40
