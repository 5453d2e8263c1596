"""``rgtg report``."""

import json

import pytest

from helpers.command import verb
from helpers.made_report import audit, judged, rollout_audit, steered

run = verb("report")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results.json").write_text(steered().model_dump_json())
    (tmp_path / "audit.json").write_text(audit().model_dump_json())
    (tmp_path / "rollout-audit.json").write_text(rollout_audit().model_dump_json())
    (tmp_path / "judge.json").write_text(judged(("policy", "pargs β=2", 0.2)).model_dump_json())
    return tmp_path


def test_a_folder_gives_a_page_and_markdown(folder):
    ran = run(folder, "--audit", f"mine={folder / 'audit.json'}", "--judge", folder, "--title", "Mine",
              "--audit", f"mine={folder / 'rollout-audit.json'}")  # fmt: skip
    assert ran.exit_code == 0, ran.stderr
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h1>Mine</h1>" in page
    assert "Win rates, by judge-8b" in page
    assert "<b>mine:</b> Fit." in page
    assert "<b>mine:</b> Orders well." in page
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# Mine\n")
    assert (folder / "report-figures" / "frontier.png").exists()


def test_a_file_and_another_output_can_be_given(folder):
    out = folder / "elsewhere" / "page.html"
    ran = run(folder / "results.json", "--output", out, "--audit", folder / "audit.json", "--json")
    assert json.loads(ran.stdout) == {"written": [str(out), str(out.with_suffix(".md"))]}
    assert "<b>s:</b> Fit." in out.read_text(encoding="utf-8")
    assert not (folder / "report.html").exists()


def test_invalid_files_are_errors_and_nothing_is_written(folder):
    (folder / "bad.json").write_text('{"version": 1}')
    (folder / "human.json").write_text(judged(("chosen", "rejected", 0.6), kind="agreement").model_dump_json())
    two = ["--audit", folder / "audit.json", "--audit", folder / "audit.json"]
    for arguments, message in (
        (["--audit", folder / "bad.json"], "bad.json is not what rgtg audit writes: scorer"),
        (["--audit", folder / "absent.json"], "cannot read"),
        (["--judge", folder / "human.json"], "agreement with human pairs"),
        (two, "s was given before; name the audits apart with NAME=FILE"),
    ):
        ran = run(folder, *arguments)
        assert ran.exit_code == 3, ran.output
        assert message in ran.stderr
    assert run(folder / "none").exit_code == 3
    assert not (folder / "report.html").exists()


def test_a_page_with_the_name_of_its_markdown_is_an_error(folder):
    ran = run(folder, "--output", folder / "page.md")
    assert ran.exit_code == 2
    assert "name the page (.html)" in ran.stderr
    assert not (folder / "page.md").exists()
