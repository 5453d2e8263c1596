"""How many files and functions of rgtg a guided token, a request over HTTP and a run of training pass through."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# A reader follows each of them from file to file: at most so many files and functions.
LIMITS = {"token": (10, 60), "http": (20, None), "train": (20, None)}


@pytest.mark.thorough
@pytest.mark.parametrize("path", LIMITS)
def test_a_reader_passes_few_files(path):
    files, functions = LIMITS[path]
    command = [sys.executable, BENCHMARKS / f"trace_{path}.py", str(files)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counted = re.search(r": (\d+) files, (\d+) functions$", ran.stdout.strip())
    assert counted, ran.stdout
    assert functions is None or int(counted[2]) <= functions, ran.stdout
