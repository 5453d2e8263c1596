"""Every script of examples/ runs as people would run it, on tiny models."""

import runpy
import sys
from pathlib import Path

import pytest

from helpers.chats import chat_policy, chat_tokenizer, save
from helpers.gguf_files import write_gguf
from helpers.served import on_a_socket, serving
from helpers.synthetic import synthetic_rows, write_rows
from rgtg.config import TrainSettings
from rgtg.training.train import train_scorer

EXAMPLES = Path(__file__).parents[1] / "examples"
RAN = ("audit_scorer", "call_server", "steer_chat", "steer_llama_cpp", "train_on_pairs")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", synthetic_rows(40))


def test_every_example_is_run_here():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == list(RAN)


def test_a_head_is_trained_audited_and_steers_a_chat(run, tmp_path, pairs):
    policy = save(chat_policy(), chat_tokenizer(), tmp_path / "policy")
    said = run("train_on_pairs", pairs, "--policy", policy, "--output", tmp_path / "head")
    assert "held-out pairs" in said
    assert "prefix_accuracy" in said
    assert "100% read" in run("audit_scorer", tmp_path / "head", pairs)
    said = run("steer_chat", tmp_path / "head", "--policy", policy, "--message", "Hello!", "--tokens", "6")
    assert [line.partition(",")[0] for line in said.splitlines()] == ["beta 0", "beta 1", "beta 2", "beta 4"]


def test_a_server_is_called(run):
    with serving() as served, on_a_socket(served) as url:
        said = run("call_server", "kind", "--url", f"{url}/v1", "--message", "Hello", "--tokens", "6")
    assert [line.partition(":")[0] for line in said.splitlines()] == ["beta 0", "beta 2"]


@pytest.mark.filterwarnings("ignore:.*is dequantised and runs on torch")  # where llama.cpp is not installed
def test_a_gguf_file_is_steered(run, tmp_path, pairs):
    path = write_gguf(tmp_path / "model.gguf")
    train_scorer(
        TrainSettings(
            pairs=str(pairs), base=str(path), output=tmp_path / "head", trunk="own", head="vocab", layer="final",
            width=8, eval_fraction=0,
        )
    )  # fmt: skip
    said = run("steer_llama_cpp", path, tmp_path / "head", "--prompt", "Once upon", "--tokens", "5")
    assert "tokens, " in said
