"""No command overwrites a file that it reads, under any name, with or without --force."""

import os

import pytest

from helpers.command import verb

run = verb()
MODELS = ("--policy", "p", "--scorer", "s")
JUDGE = ("judge", "--model", "m", "--output", "out")
AUDIT = ("audit", "--scorer", "s", "--output", "out")
TEXT = "all that there is\n"


@pytest.mark.parametrize(
    ("kept", "option", "arguments"),
    [
        *(
            (f"out.jsonl{beside}", "--prompts", ("generate", *MODELS, "--output", "out.jsonl", "--force", "--prompts"))
            for beside in ("", ".partial", ".errors.jsonl", ".job.json", ".settings.json")
        ),
        ("out.jsonl", "--config", ("generate", *MODELS, "--prompts", "p", "--output", "out.jsonl", "--config")),
        ("out.jsonl", "--input", ("score", "--scorer", "s", "--output", "out.jsonl", "--input")),
        ("out.jsonl.settings.json", "--input", ("score", "--scorer", "s", "--output", "out.jsonl", "--input")),
        ("out/verdicts.jsonl", "--a", (*JUDGE, "--b", "b", "--a")),
        ("out/answers.jsonl", "--completions", (*JUDGE, "--completions")),
        ("judge/cache", "--b", (*JUDGE, "--cache", "judge/cache", "--a", "a", "--b")),
        ("out/judge.json", "--prompt-file", (*JUDGE, "--a", "a", "--b", "b", "--prompt-file")),
        ("out/settings.json", "--pairs", (*JUDGE, "--pairs")),
        ("out/audit.json", "--pairs", (*AUDIT, "--pairs")),
        ("out/rollout-audit.json", "--rollouts-file", (*AUDIT, "--rollouts", "--rollouts-file")),
        ("out/completions.jsonl", "--prompts", ("compare", "--config", "c.yaml", "--output", "out", "--prompts")),
        ("out/sweep.json", "--prompts", ("sweep", *MODELS, "--target-kl", "1", "--output", "out", "--prompts")),
        ("out.json", "the comparison", ("report", "--output", "out.json")),
        ("page.md", "--audit", ("report", "c.yaml", "--output", "page.html", "--audit")),
    ],
)
def test_an_input_is_not_overwritten(tmp_path, monkeypatch, kept, option, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("policy: p\nreward: r\nmethods: [{method: policy}]\n")
    path = tmp_path / kept
    path.parent.mkdir(exist_ok=True)
    path.write_text("beta: 1\n" if option == "--config" else TEXT)
    before = path.read_text()
    os.symlink(path, tmp_path / "by-another-name")
    for name in (kept, "by-another-name"):
        ran = run(*arguments, name)
        assert ran.exit_code == 2, ran.output
        told = f"error: {option} {name} would be overwritten: it is "
        assert told in ran.stderr
        assert ran.stderr.endswith("; choose another output\n")
        assert path.read_text() == before
