"""Outputs are what they were: a small part of benchmarks/golden.py against the committed file, up to rounding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.goldens import told

from helpers.command import verb

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "docs" / "results" / "golden.json"
# One case of every way to read the models; all of them take minutes.
PART = [
    "method/pargs/reward/default", "method/pargs/state/default", "method/pargs/adapter/greedy",
    "method/pargs/pieces/default", "method/pargs/encoder/default", "method/farma/vocab/default",
    "method/genarm/autoregressive/default", "method/rad/reward/default", "method/cards/reward/default",
    "method/smc/state/default", "method/cd-blockwise/pieces/default", "method/best-of-n/reward/default",
    "method/policy/default",
    "setting/entropy-gate/vocab", "setting/everything/reward", "setting/no-tree/reward", "part/several/adapter-pieces",
    "part/draft/policy/default", "part/overlap/reward", "model/family/gpt2/pargs", "public/ids", "public/losses",
]  # fmt: skip


@pytest.fixture(scope="module")
def kept():
    return json.loads(COMMITTED.read_text(encoding="utf-8"))["cases"]


def test_tokens_texts_and_counts_are_those_that_were_committed():
    """Another processor, or another torch, rounds otherwise: figures may differ in their last digits."""
    command = [
        sys.executable, ROOT / "benchmarks" / "golden.py", "--against", COMMITTED, "--tolerance", "1e-3", "--only",
        *PART,
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(PART)} of {len(PART)} cases are what they were" in ran.stdout


def test_every_method_is_among_the_cases_and_none_failed(kept):
    methods = {row["name"] for row in json.loads(verb("methods")("--json").stdout)["methods"]}
    assert methods == {name.split("/")[1] for name in kept if name.startswith("method/")}
    assert {name.split("/")[0] for name in kept} == {
        "method", "setting", "part", "model", "public", "served", "job", "killed", "command", "train",
    }  # fmt: skip
    assert not [name for name, record in kept.items() if "error" in record and not name.startswith("served/")]


def test_jobs_that_were_killed_ended_as_those_that_were_not(kept):
    killed = [record for name, record in kept.items() if name.startswith("killed/")]
    assert [(record["half-way"], record["as-if-not-killed"]) for record in killed] == [(True, True)] * 2
    assert kept["served/at-once"]["other-than-alone"] == []


def test_a_difference_is_named():
    before = {"eight": {"text": ["ab", "c"], "score": [0.5, 1], "trace": ["12"]}, "error": "none"}
    now = {"eight": {"text": ["ab", "d"], "score": [0.5000001, 1], "trace": ["34"]}}
    exact = {field for field, *_ in told.differences(before, now)}
    assert exact == {".eight.text[1]", ".eight.score[0]", ".eight.trace[0]", ".error"}
    near = told.differences(before, now, tolerance=1e-3)
    assert near == [(".eight.text[1]", "c", "d"), (".error", "none", "absent")]
    assert told.differences({"ids": [[1, 2]]}, {"ids": [[1, 2, 3]]}, tolerance=1e-3) == [(".ids[0]", [1, 2], [1, 2, 3])]
    assert told.differences({"n": 1}, {"n": 1.0}), "a whole number stays one"
