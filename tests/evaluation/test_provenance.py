"""Provenance: what it contains, and what it must not contain."""

import re
from pathlib import Path

import torch

import rgtg
from rgtg.evaluation import provenance as module
from rgtg.evaluation.provenance import provenance


def made(**settings):
    model = torch.nn.Linear(2, 1)
    model.dtype, model.device = torch.float32, torch.device("cpu")
    return provenance(command="rgtg audit", settings=settings, seed=3, models={"scorer": model}, data={"pairs": "ab"})


def test_provenance_contains_what_is_needed_to_reproduce_a_result():
    found = made(batch_size=8)
    assert (found.version, found.seed, found.settings) == (rgtg.__version__, 3, {"batch_size": 8})
    assert (found.dtype, found.device, found.data) == ("float32", "cpu", {"pairs": "ab"})
    assert re.fullmatch("[0-9a-f]{16}", found.models["scorer"])
    assert found.git_commit is None or re.fullmatch("[0-9a-f]{40}", found.git_commit)


def test_paths_of_this_machine_are_reduced_to_names():
    found = made(scorer="/some/where/scorer", output=Path("/tmp/out"), methods=[{"scorer": "../a/b"}], stop=["."])
    assert found.settings == {"scorer": "scorer", "output": "out", "methods": [{"scorer": "b"}], "stop": ["."]}


def test_an_installed_package_has_no_git_commit(tmp_path, monkeypatch):
    # an environment inside a user's own repository: ROOT/.git and ROOT/lib/site-packages/rgtg
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site-packages" / "rgtg" / "evaluation" / "provenance.py"))
    assert made().git_commit is None
