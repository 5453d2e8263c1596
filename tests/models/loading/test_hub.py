"""Loading by hub id and revision, from a local imitation of the hub."""

import json
import os
import subprocess
import sys

import pytest
import torch

from helpers.command import verb
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg import GuidedPolicy, load_scorer
from rgtg.errors import ModelNotFoundError, UsageError
from rgtg.models.loading.hub import clear_snapshot_cache, local_folder, split_revision
from rgtg.models.loading.policy import load_policy


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def policies(hub, policy_folder, tmp_path):
    """me/policy with two commits: tag-like branch v1 holds other weights than main."""
    other = tmp_path / "other"
    tiny_policy(seed=5).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    hub.put("me/policy", contents(policy_folder))
    sha = hub.put("me/policy", contents(other), branch="v1")
    return hub, policy_folder, other, sha


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_revision_is_a_branch_or_a_commit(policies):
    _, folder, other, sha = policies
    main, v1 = load_policy(str(folder)).model, load_policy(str(other)).model
    assert same(load_policy("me/policy").model, main)
    assert not same(main, v1)
    for name, revision in (("me/policy@v1", None), ("me/policy", "v1"), ("me/policy", sha), (f"me/policy@{sha}", None)):
        assert same(load_policy(name, revision=revision).model, v1)


def test_weights_and_tokenizer_are_of_one_commit(policies):
    hub, _folder, other, _ = policies
    first = local_folder("me/policy")
    hub.put("me/policy", contents(other))
    assert local_folder("me/policy") == first, "in one process a name stands for one commit"
    clear_snapshot_cache()
    assert local_folder("me/policy") != first


def test_guided_generation_and_scorers_by_hub_id(policies, scorer_folder):
    hub, folder, *_ = policies
    hub.put("me/scorer", contents(scorer_folder))
    with pytest.warns(UserWarning, match="me/scorer was trained on an unknown objective"):
        by_name = GuidedPolicy.from_pretrained("me/policy", scorer="me/scorer", beta=2)
    with pytest.warns(UserWarning, match="unknown objective"):
        by_folder = GuidedPolicy.from_pretrained(str(folder), scorer=str(scorer_folder), beta=2)
    assert by_name.generate(["the cat"], max_new_tokens=5)[0].text == (
        by_folder.generate(["the cat"], max_new_tokens=5)[0].text
    )
    assert load_scorer("me/scorer", revision="main").name == "me/scorer@main"
    assert load_policy("me/policy@v1").model.name_or_path == "me/policy@v1"


def test_code_and_pickles_are_never_downloaded(hub, policy_folder):
    files = contents(policy_folder)
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    evil = {"modeling_evil.py": b"raise SystemExit", "training_args.bin": b"x", "onnx/model.safetensors": b"x"}
    hub.put("me/evil", files | evil | {"config.json": json.dumps(config).encode()})
    load_policy("me/evil")
    asked = [path for _, path in hub.requests if "/resolve/" in path]
    assert asked
    assert not [path for path in asked if path.endswith((".py", ".bin")) or "onnx" in path]

    hub.put("me/pickled", {"config.json": files["config.json"], "pytorch_model.bin": b"cos\nsystem"})
    with pytest.raises(UsageError, match="me/pickled holds pickled weights only"):
        load_policy("me/pickled")
    assert not [path for _, path in hub.requests if path.endswith("pytorch_model.bin")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/absent", "cannot load 'me/absent': there is no such folder, and no such model at http://127"),
        ("me/policy@v9", "cannot load 'me/policy@v9': the repository has no such revision"),
        ("./absent", "no model folder ./absent"),
        ("a/b/c", "no model folder a/b/c"),
    ],
)
def test_the_error_says_why_a_model_cannot_be_loaded(policies, name, message):
    with pytest.raises(ModelNotFoundError, match=message):
        load_policy(name)


def test_private_repositories_need_the_token(hub, policy_folder, monkeypatch):
    hub.put("me/secret", contents(policy_folder), private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelNotFoundError, match="or it is private: log in with hf auth login, or set HF_TOKEN"):
        load_policy("me/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    load_policy("me/secret")


def test_the_cache_is_used_offline(policies, monkeypatch):
    from huggingface_hub import constants

    load_policy("me/policy")
    clear_snapshot_cache()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_policy("me/policy")
    with pytest.raises(ModelNotFoundError, match="nor such a model in the hub's cache, and HF_HUB_OFFLINE is set"):
        load_policy("me/other")


def test_contradicting_revisions_raise_an_error(policy_folder):
    with pytest.raises(UsageError, match="is a local folder and has no revision"):
        load_policy(str(policy_folder), revision="v1")
    with pytest.raises(UsageError, match="names one revision and 'v2' is another"):
        load_scorer("me/policy@v1", revision="v2")
    with pytest.raises(UsageError, match="revision applies to a scorer loaded by its hub id"):
        load_scorer((None, None), revision="v2")
    with pytest.raises(UsageError, match="dtype, device, device_map, tp_plan, cache_gguf and revision"):
        load_policy((None, None), revision="v2")
    assert split_revision("me/policy@refs/pr/1") == ("me/policy", "refs/pr/1")


def test_a_lora_base_on_the_hub_is_found_again(policies, tmp_path):
    pytest.importorskip("peft")
    from helpers.synthetic import synthetic_rows, write_rows
    from rgtg.config import TrainSettings
    from rgtg.training.train import train_scorer

    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(8))
    train_scorer(
        TrainSettings(
            pairs=str(pairs), base="me/policy@v1", output=tmp_path / "lora", lora={"r": 2},
            train={"max_steps": 1}, eval_fraction=0,
        )
    )  # fmt: skip
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/policy", "v1")
    assert json.loads((tmp_path / "lora" / "rgtg.json").read_text())["base_model"] == "me/policy@v1"
    load_scorer(str(tmp_path / "lora"))
    assert [path for _, path in policies[0].requests if "/revision/v1" in path]


def test_the_command_line_uses_the_hub_clients_environment_variables(policies, tmp_path):
    """In a process of its own: HF_ENDPOINT, HF_HOME and HF_TOKEN as a user sets them."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": policies[0].url, "HF_HOME": str(tmp_path / "home")}
    code = "from rgtg.models.loading.hub import local_folder; print(local_folder('me/policy@v1'))"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().startswith(str(tmp_path / "home"))


def test_generate_takes_a_revision(policies):
    ran = verb("generate")("--policy", "me/policy@v1", "--method", "policy", "--prompt", "the cat", "--json")
    assert ran.exit_code == 0, ran.stderr
    refused = verb("generate")("--policy", "me/policy@v9", "--method", "policy", "--prompt", "the cat")
    assert refused.exit_code == 2
    assert "no such revision" in refused.stderr
