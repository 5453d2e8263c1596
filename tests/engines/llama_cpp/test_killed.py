"""A job on llama.cpp that is killed at random moments gives the same bytes as one that was not killed."""

import json
import random
import time

import pytest

from cli import test_killed as of_torch
from helpers.gguf_files import write_gguf
from helpers.killing import finish, in_process
from helpers.llama_models import require_llama_cpp
from helpers.naive import info
from helpers.tiny_models import tiny_reward_model, tiny_tokenizer
from rgtg.models.loading.scorer_info import write_info

require_llama_cpp()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments of the job, and its output and duration without kills."""
    folder = tmp_path_factory.mktemp("killed")
    write_gguf(folder / "model.gguf", quantised=True)
    tiny_reward_model().save_pretrained(folder / "scorer")  # it has a tokenizer of its own, and reads text
    write_info(folder / "scorer", info())
    tiny_tokenizer().save_pretrained(folder / "scorer")
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdef ghij", k=draw.randint(2, 60))) + "." for _ in range(of_torch.ROWS)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "id": f"p{i}"}) + "\n" for i, text in enumerate(texts)))
    arguments = [
        "generate", "--policy", folder / "model.gguf", "--engine", "llama-cpp", "--scorer", folder / "scorer",
        "--max-new-tokens", 4, "--prompts", prompts, "--batch-tokens", 512, "--seed", 3,
    ]  # fmt: skip
    whole = folder / "whole.jsonl"
    in_process("--version").join()
    start = time.monotonic()
    assert finish(in_process(*arguments, "--output", whole)) == 0
    return arguments, whole.read_bytes(), time.monotonic() - start


def test_a_killed_job_resumes_to_the_same_bytes(job, tmp_path):
    of_torch.killed_until(job, tmp_path, 4, random.Random(2))
