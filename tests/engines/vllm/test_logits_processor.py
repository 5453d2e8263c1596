"""The logits processor in vLLM's environment: both runner interfaces, drafts, and what a start refuses."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from helpers.random_heads import write_random_head
from helpers.tiny_models import randomise, tiny_tokenizer
from helpers.vllm_world import vllm_environment

SCRIPT = Path(__file__).parents[2] / "helpers" / "vllm_interfaces.py"


pytestmark = pytest.mark.timeout(600)  # vLLM alone takes half a minute to be imported


@pytest.fixture(scope="module")
def found(vllm_python, vllm_world):
    world = vllm_world.folder
    write_random_head(world / "state", vllm_world.policy, "state")
    shutil.copytree(world / "reward", world / "foreign")
    shutil.copytree(world / "reward", world / "brief")
    config = json.loads((world / "brief" / "config.json").read_text()) | {"max_position_embeddings": 256}
    (world / "brief" / "config.json").write_text(json.dumps(config))
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "a"
    tokenizer.save_pretrained(world / "foreign")
    other = randomise(AutoModelForCausalLM.from_pretrained(vllm_world.policy, dtype="float32"), 5)
    other.save_pretrained(world / "other")
    tiny_tokenizer().save_pretrained(world / "other")
    done = subprocess.run(
        [vllm_python, str(SCRIPT), str(world), str(world / "result.json")],
        env=vllm_environment(vllm_world.file), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert (world / "result.json").exists(), done.stderr[-6000:]
    return json.loads((world / "result.json").read_text())


def test_the_plug_in_registers_once(found):
    assert found["registered"] == [False, True]


def test_rows_and_slots_of_both_runners(found):
    assert found["rows"] == dict.fromkeys(found["rows"], True)
    assert len(found["rows"]) == 6


def test_separate_scorers_read_the_same_tokens_in_both_runners(found):
    assert found["texts"] == [True] * 5


def test_drafts_are_verified_a_few_rows_at_a_time(found):
    assert found["drafts"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another policy", "holds other weights"),
        ("a short context", "give --max-model-len 256"),
        ("another tokenizer", "another tokenizer than the policy"),
        ("a state head", "state head"),
        ("adapters", "--enable-lora exclude each other"),
        ("no file", "set RGTG_VLLM_SCORERS"),
    ],
)
def test_a_start_that_cannot_work_says_why(found, case, message):
    assert message in found["refused"][case]
    assert "\n" not in found["refused"][case]
