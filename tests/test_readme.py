"""The README: its snippet prints what it shows, its files exist, and it stays short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = 90
SNIPPET, SHOWN = re.search(r"```python\n(.+?)```\n\n```text\n(.+?)```", README, re.S).groups()


def real_model():
    """Where RGTG_SMOLLM2 says, where `make try` puts it, or where `rgtg demo` does; skips if it is nowhere."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rgtg" / "smollm2-135m"
    for folder in (Path(os.environ.get("RGTG_SMOLLM2", "")), ROOT / "smollm2", cache):
        if (folder / "model.safetensors").is_file():
            return folder.resolve()
    return pytest.skip("the real model is absent: make try brings it, or RGTG_SMOLLM2 names its folder")


@pytest.mark.timeout(900)  # seconds on an idle machine
def test_the_snippet_prints_what_the_readme_shows(tmp_path):
    (tmp_path / "smollm2").symlink_to(real_model())
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ran = subprocess.run(
        [sys.executable, "-c", SNIPPET], cwd=tmp_path, capture_output=True, text=True, timeout=880,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == SHOWN


def test_the_snippet_is_six_lines_and_the_readme_is_read_in_half_a_minute():
    assert len([line for line in SNIPPET.splitlines() if line and not line.startswith("import")]) <= 6
    assert len(README.splitlines()) < LINES


def test_every_file_that_the_readme_names_exists():
    linked = re.findall(r'\]\(([^)#]+)[^)]*\)|(?:src|srcset)="([^"]+)"', README)
    files = [one for pair in linked for one in pair if one and not one.startswith("https://")]
    assert len(files) > 10
    assert not [name for name in files if not (ROOT / name).exists()]
    heads = [part for part in re.findall(r'"(examples/\w+)"', SNIPPET) if (ROOT / part / "rgtg.json").is_file()]
    assert heads, "the snippet's head is committed"


def test_pictures_are_small():
    pictures = [*ROOT.glob("docs/images/*.png"), ROOT / "docs/results/demo-smollm.png"]
    assert not [path.name for path in pictures if path.stat().st_size > 250_000]
