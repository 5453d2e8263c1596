"""Signals during the import of the command line or the libraries, before there is anything to resume."""

import subprocess
import sys

import pytest

from rgtg.version import __version__

SIGNALLED = """
import importlib.abc, os, signal, sys
class Sender(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.{how})
        return None
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored
sys.meta_path.insert(0, Sender())
from rgtg.__main__ import main
main()
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", ["rgtg.cli.main", "rgtg.cli.generate", "transformers"])
def test_a_signal_during_imports_prints_one_line(tmp_path, module, how):
    code = SIGNALLED.format(module=module, how=how)
    asked = ["generate", "--policy", tmp_path / "policy", "--method", "policy", "--prompt", "Hi"]
    ended = subprocess.run([sys.executable, "-c", code, *map(str, asked)], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr, ended.stdout) == (75, "error: stopped\n", "")


def test_python_m_rgtg_runs_the_command():
    ran = subprocess.run([sys.executable, "-m", "rgtg", "--help"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0
    assert "Reward-guided text generation" in ran.stdout


def test_the_version():
    ran = subprocess.run([sys.executable, "-m", "rgtg", "--version"], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, f"rgtg {__version__}\n")
