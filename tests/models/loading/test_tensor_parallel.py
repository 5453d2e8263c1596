"""Models that two processes shard between them give the results of one process; wrong settings raise errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.command import verb
from helpers.naive import info, write_adapter, write_head
from helpers.other_tokenizers import reward_model_with, tokenizer_of
from helpers.split_models import JOB, JOINED, PROMPTS, REFUSED, WAYS, models, plans, tokens
from helpers.tiny_models import CONFIGS, randomise, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg import GuidedPolicy
from rgtg.errors import UsageError
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import fingerprint_weights, write_info
from rgtg.models.loading.tensor_parallel import (
    broadcast_from_rank0,
    is_tensor_parallel,
    register_parallel_models,
    require_divisible,
)
from rgtg.models.scorers.base import load_scorer, weights_of
from rgtg.models.scorers.reward_model import PrefixScorer

TESTS = Path(__file__).parents[2]
PARTS = ("drawn", "scored", "refused", "disagreeing", "said", "completed")
# peft reads an attribute that transformers has renamed; the models have no rgtg.json
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def variant(**changes):
    from transformers import AutoModelForCausalLM

    config = CONFIGS["llama"]()
    for name, value in changes.items():
        setattr(config, name, value)
    return randomise(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), 0)


def write_world(folder):
    """Every model that the processes load, by the name of its folder."""
    pytest.importorskip("peft")
    saved = {
        "policy": tiny_policy(), "scorer": tiny_reward_model(), "language-model": tiny_policy(seed=5),
        "tied": variant(tie_word_embeddings=True), "one-head": variant(num_key_value_heads=1),
        **{family: tiny_policy(family) for family in ("qwen3", "gpt2")},
    }  # fmt: skip
    for name, model in saved.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    other = tokenizer_of("byte-level")
    reward_model_with(other).save_pretrained(folder / "other-tokenizer")
    other.save_pretrained(folder / "other-tokenizer")
    for name, kind in (("head", "state"), ("vocab-head", "vocab")):
        write_head(folder / name, folder / "policy", kind)
    write_adapter(folder / "adapter", folder / "base")
    rows = [{"prompt": "ab c "[: 2 + i % 4], "id": f"row {i}"} for i in range(9)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "joined-adapter").mkdir()
    write_info(folder / "joined-adapter", info().model_copy(update={"trunk": "shared"}))


def start(folder, *arguments):
    """Run a script in two processes on the CPU, which communicate through gloo."""
    paths = [*sys.path, str(TESTS)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*command, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


SAID = {
    "no plan": "no tensor parallel plan for the policy gpt2 (gpt2)",
    "heads": "the 1 key value heads of the policy one-head cannot be split among 2 processes",
    "unknown module": "['nonsense'] match nothing",
    "unfit": "the tensor parallel plan does not fit policy",
    "device": "leave its device out",
    "device map": "leave its device out",
    "overlap": "must read in one order",
    "adapter": "without device_map or tp_plan, save the merged model",
    "joined adapter": "load the policy without device_map and tp_plan",
    "plan of a joined adapter": "an adapter is where its policy is",
    "plan of a head": "a head is where its policy is",
}


def test_two_processes_give_the_results_of_one(tmp_path, monkeypatch):
    """One test, because starting two processes takes longer than what they do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_world(tmp_path)
    start(tmp_path, TESTS / "helpers" / "split_models.py", *PARTS)
    both = [json.loads(Path(f"split-{rank}.json").read_text()) for rank in range(2)]
    for name in WAYS:
        require_same_tokens(*(part["drawn"] for part in both), name)
    expected = load_scorer("scorer", device="cpu").score(PROMPTS, ["ab", "c."])
    assert both[0]["scored"] == both[1]["scored"] == pytest.approx(expected, abs=1e-5)
    # the second process has the opposite scorer
    assert both[0]["disagreeing"] == both[1]["disagreeing"] == tokens(models({"device": "cpu"}), {})
    require_one_printed(*(part["said"] for part in both))
    require_one_wrote()
    require_resumed(*(part["completed"] for part in both))
    require_refused(*(part["refused"] for part in both))


def require_same_tokens(first, second, name):
    whole = models({"device": "cpu"}, **WAYS[name])
    expected = tokens(whole, WAYS[name])
    prints = [fingerprint_weights(model) for model in (whole.policy.model, *map(weights_of, whole.scorers))]
    for plan in plans(name):
        found = first[f"{name} {' '.join(plan)}"]
        assert found == second[f"{name} {' '.join(plan)}"], name
        assert found["tokens"] == expected, name
        assert found["prints"] == prints, name
        scorers = ["scorer_tp_plan" in plan] * len(whole.scorers) if name not in JOINED else found["split"][1:]
        assert found["split"] == ["tp_plan" in plan, *scorers], name


def require_one_printed(first, second):
    arguments = ["--policy", "policy", "--scorer", "scorer", "--prompt", PROMPTS[0], "--max-new-tokens", "6"]
    expected = [verb("generate")(*arguments, "--device", "cpu", *more).stdout for more in ((), ("--json",))]
    text, record = first
    assert text == expected[0]
    assert json.loads(record)["token_ids"] == json.loads(expected[1])["token_ids"]
    assert second == ["", ""]


def require_one_wrote():
    whole = verb("generate")(*JOB, "--device", "cpu", "--output", "whole.jsonl")
    assert whole.exit_code == 0, whole.stderr
    expected, found = (Path(name).read_text().splitlines() for name in ("whole.jsonl", "split.jsonl"))
    assert len(found) == 9
    for one, other in zip(map(json.loads, expected), map(json.loads, found), strict=True):
        assert (one["id"], one["token_ids"]) == (other["id"], other["token_ids"])
    assert Path("split.jsonl").read_bytes() == Path("at-once.jsonl").read_bytes()


def require_resumed(first, second):
    """Both processes continue a stopped file from what the first one wrote; if the first one fails, the other stops."""
    assert [code for code, _, _ in first] == [75, 0, 0, 2, 0]
    assert [code for code, _, _ in second] == [75, 0, 0, 0, 0]
    assert [len(run) for _, _, run in first] == [2, 3, 0, 0, 5]
    assert [run for _, _, run in first] == [run for _, _, run in second]
    assert json.loads(first[1][1])["rows"] == 9
    assert not any(stdout for _, stdout, _ in second)


def require_refused(first, second):
    """Both processes raise the same error, of one line."""
    assert first == second
    assert set(first) == set(REFUSED) == set(SAID)
    for name, said in SAID.items():
        assert said in first[name]
        assert "\n" not in first[name]


def test_a_plan_outside_torchrun_says_how_to_start_it(policy_folder, scorer_folder):
    for plan in ({"tp_plan": "auto"}, {"scorer_tp_plan": "auto"}):
        with pytest.raises(UsageError, match="there is only this one: start it with torchrun"):
            GuidedPolicy.from_pretrained(str(policy_folder), str(scorer_folder), **plan)
    done = verb("generate")("--policy", policy_folder, "--prompt", "so ", "--method", "policy", "--tp-plan", "auto")
    assert (done.exit_code, "torchrun" in done.stderr) == (2, True)


def test_a_plan_must_be_auto_or_styles(policy_folder):
    with pytest.raises(UsageError, match="expected auto"):
        load_policy(str(policy_folder), tp_plan="all")
    done = verb("generate")("--policy", policy_folder, "--prompt", "so ", "--method", "policy", "--tp-plan", "all")
    assert (done.exit_code, "tp_plan" in done.stderr) == (2, True)


def test_a_plan_for_a_loaded_model_raises_an_error(policy_folder, scorer_folder):
    loaded, pair = Policy(tiny_policy(), tiny_tokenizer()), (tiny_reward_model(), tiny_tokenizer())
    with pytest.raises(UsageError, match="tp_plan applies to a policy loaded by name"):
        GuidedPolicy.from_pretrained(loaded, str(scorer_folder), tp_plan="auto")
    with pytest.raises(UsageError, match="loaded by name"):
        load_policy(loaded, tp_plan="auto")
    for scorer in (PrefixScorer(*pair), pair):
        with pytest.raises(UsageError, match="scorer_tp_plan apply to a scorer loaded by name"):
            GuidedPolicy.from_pretrained(str(policy_folder), scorer, scorer_tp_plan="auto")


def test_attention_heads_must_be_divisible(monkeypatch):
    config = CONFIGS["llama"]()  # 4 heads, of which 2 hold keys and values
    for processes in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        require_divisible(config, "auto", "it")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="the 2 key value heads of it cannot be split among 4 processes: start 1 or 2"):
        require_divisible(config, "auto", "it")
    require_divisible(config, {"layers.*.mlp.up_proj": "colwise"}, "it")


def test_models_on_one_device_are_not_broadcast():
    model, values = tiny_policy(), torch.ones(2)
    assert not register_parallel_models([model])
    assert not is_tensor_parallel(model)
    assert broadcast_from_rank0(model, values) is values
