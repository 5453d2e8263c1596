"""``rgtg push`` with a local hub: published files, files left out, the model card, and errors."""

import json
import re

import pytest
import torch
import yaml
from typer.main import get_command

import rgtg
from helpers.command import verb
from helpers.hub_server import READ
from helpers.made_report import audit, rollout_audit
from helpers.tiny_models import tiny_reward_model, tiny_tokenizer
from rgtg.cli.main import app
from rgtg.config import PushSettings
from rgtg.models.loading.hub import clear_snapshot_cache
from rgtg.models.loading.policy import load_policy
from rgtg.models.loading.scorer_info import ScorerInfo, fingerprint_weights
from rgtg.models.scorers.heads import StateHead, round_to_half
from rgtg.publishing.model_card import is_public
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.training.checkpoint.save import save_scorer
from rgtg.training.report import model_card

push = verb("push")
# the hub client uploads large files by a name that httpx2 calls old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
COUNTS = {"pairs": 40, "rollouts": 0, "eval_pairs": 8}


def made(folder, base="policy", **about):
    """A folder as rgtg train leaves it, without the training."""
    info = ScorerInfo(
        rgtg_version=rgtg.__version__, objective="prefix-bt", base_model=str(base), base_fingerprint="b" * 16,
        tokenizer_hash=tokenizer_hash(tiny_tokenizer()), data_fingerprint="d" * 16,
    ).model_copy(update=about)  # fmt: skip
    settings = {"pairs": "/home/alice/pairs.jsonl", "base": str(base), "output": str(folder)}
    card = model_card(folder, info, settings, {"accuracy_50": 0.61}, COUNTS)
    return info, card, settings


@pytest.fixture
def scorer(tmp_path):
    folder = tmp_path / "scorer"
    info, card, settings = made(folder, tmp_path / "policy")
    save_scorer(folder, tiny_reward_model(), tiny_tokenizer(), info, card, settings=settings)
    (folder / "checkpoints").mkdir()
    (folder / "train-log.jsonl").write_text("{}\n")
    (folder / "rejects.jsonl").write_text('{"raw": "private"}\n')
    return folder


@pytest.fixture
def audited(scorer):
    """The output of rgtg audit on this scorer."""
    folder = scorer.parent / "audit"
    folder.mkdir()
    about = {
        "models": {"scorer": fingerprint_weights(tiny_reward_model())},
        "dtype": "float32",
        "data": {"pairs": "e5"},
    }
    for name, made_ in (("audit", audit()), ("rollout-audit", rollout_audit())):
        found = made_.model_copy(update={"provenance": made_.provenance.model_copy(update=about)})
        (folder / f"{name}.json").write_text(found.model_dump_json())
    (folder / "audit.png").write_bytes(b"\x89PNG")
    return folder


def test_a_scorer_is_published_and_loaded_again(hub, scorer, audited):
    ran = push(scorer, "me/scorer", "--audit", audited, "--json")
    assert ran.exit_code == 0, ran.stderr
    report = json.loads(ran.stdout)
    there = hub.repos["me/scorer"].files()
    assert set(there) == set(report["files"]) == {
        "README.md", "audit.json", "audit.png", "config.json", "model.safetensors", "rgtg.json", "rollout-audit.json",
        "settings.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert report["left_out"] == ["checkpoints", "rejects.jsonl", "train-log.jsonl"]
    assert (report["private"], report["url"], report["audited"]) == (False, f"{hub.url}/me/scorer", True)
    assert report["commit"] == hub.repos["me/scorer"].branches["main"]

    loaded = rgtg.load_scorer("me/scorer")
    assert loaded.info.data_fingerprint == "d" * 16
    assert loaded.score(["the cat"], [" sat"]) == rgtg.load_scorer(str(scorer)).score(["the cat"], [" sat"])


def test_the_card_has_the_repository_and_audit_and_no_local_path(hub, scorer, audited):
    push(scorer, "me/scorer", "--audit", audited, "--revision", "v2")
    there = hub.repos["me/scorer"].files("v2")
    card = there["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front, "a folder of this machine is no hub id"
    assert {"rgtg", "reward-model", "prefix-bt"} <= set(front["tags"])
    for said in (
        "# me/scorer", 'rgtg.load_scorer("me/scorer@v2")', 'from_pretrained("me/scorer", revision="v2")',
        f"| data fingerprint | `{'d' * 16}` |", "data `e5`", audit().verdict, rollout_audit().verdict, "(audit.png)",
    ):  # fmt: skip
        assert said in card
    assert card.index("## Audit") < card.index("## Use")
    assert "(rollout-audit.png)" not in card, "there is no such figure"
    for name, content in there.items():
        for private in (str(scorer.parent), "/home/alice"):
            assert private.encode() not in content, name
    assert json.loads(there["settings.json"])["pairs"] == "pairs.jsonl"
    assert json.loads(there["rgtg.json"])["base_model"] == "policy"


def test_a_dry_run_lists_the_files_and_sends_nothing(hub, scorer, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    ran = push(scorer, "me/scorer", "--dry-run")
    assert ran.exit_code == 0, ran.stderr
    assert "model.safetensors" in ran.stdout
    assert "left here: checkpoints, rejects.jsonl, train-log.jsonl" in ran.stdout
    assert "nothing was sent" in ran.stdout
    assert not hub.requests


def test_a_public_repository_is_an_error_with_private(hub, scorer):
    push(scorer, "me/secret", "--private")
    assert hub.repos["me/secret"].private
    assert json.loads(push(scorer, "me/secret", "--json").stdout)["private"] is True, "and stays so"
    hub.put("me/open", {})
    refused = push(scorer, "me/open", "--private")
    assert refused.exit_code == 2
    assert "me/open exists and is public" in refused.stderr
    assert not hub.repos["me/open"].files()


def test_a_branch_keeps_no_weights_of_an_earlier_scorer(hub, scorer):
    hub.put("me/scorer", {"head.safetensors": b"old", "audit.json": b"old", "NOTES": b"kept"})
    report = json.loads(push(scorer, "me/scorer", "--json", "--revision", "next").stdout)
    assert report["removed"] == ["audit.json", "head.safetensors"]
    repo = hub.repos["me/scorer"]
    assert {"NOTES", "model.safetensors"} <= set(repo.files("next"))
    assert not {"head.safetensors", "audit.json"} & set(repo.files("next"))
    assert set(repo.files("main")) == {"head.safetensors", "audit.json", "NOTES"}


def test_a_head_is_published_with_the_name_of_its_policy(hub, policy_folder, tmp_path):
    policy = load_policy(str(policy_folder))
    head, folder = StateHead(32, 8), tmp_path / "head"
    round_to_half(head)
    info, card, settings = made(
        folder, policy_folder, trunk="own", head="state", layer=2, width=8,
        base_fingerprint=fingerprint_weights(policy.model),
    )  # fmt: skip
    save_scorer(folder, head, tiny_tokenizer(), info, card, settings=settings)
    refused = push(folder, "me/head")
    assert refused.exit_code == 2
    assert f"its base {policy_folder}, which is no hub repository" in refused.stderr
    assert push(folder, "me/head", "--base-model", "me/policy").exit_code == 0

    hub.put("me/policy", {path.name: path.read_bytes() for path in policy_folder.iterdir()})
    loaded = rgtg.load_scorer("me/head")
    assert loaded.info.base_model == loaded.model.name_or_path == "me/policy"
    expected = rgtg.load_scorer(str(folder), policy=policy).score(["the cat"], [" sat"])
    assert loaded.score(["the cat"], [" sat"]) == expected
    card = hub.repos["me/head"].files()["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "me/policy"
    assert "hidden states of `me/policy`" in card


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_published_with_its_base(hub, policy_folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_reward_model()
    base.name_or_path = str(policy_folder)
    lora = peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], r=2, target_modules="all-linear")
    folder = tmp_path / "adapter"
    info, card, settings = made(folder)
    save_scorer(folder, peft.get_peft_model(base, lora), tiny_tokenizer(), info, card, settings=settings)
    refused = push(folder, "me/adapter")
    assert (refused.exit_code, f"its base {policy_folder}" in refused.stderr) == (2, True)
    assert push(folder, "me/adapter", "--base-model", "me/policy@v1").exit_code == 0
    config = json.loads(hub.repos["me/adapter"].files()["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/policy", "v1")
    sha = hub.put("me/policy", {path.name: path.read_bytes() for path in policy_folder.iterdir()}, branch="v1")
    rgtg.load_scorer("me/adapter")
    assert [path for _, path in hub.requests if f"me/policy/resolve/{sha}/model.safetensors" in path]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", b"x", "is a pickle"),
        ("optimizer.pt", b"x", "is a pickle"),
        ("dump.parquet", b"x" * 2**21, r"dump.parquet \(2.1 MB\) is no file that a scorer is made of"),
    ],
)
def test_files_that_must_not_be_published_are_errors_unless_excluded(hub, scorer, name, content, message):
    (scorer / name).write_bytes(content)
    refused = push(scorer, "me/scorer")
    assert refused.exit_code == 2
    assert re.search(message, refused.stderr)
    assert not hub.requests
    assert push(scorer, "me/scorer", "--exclude", name).exit_code == 0
    assert name not in hub.repos["me/scorer"].files()


def test_links_out_of_the_folder_are_errors(scorer, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (scorer / "vocab.json").symlink_to(tmp_path / "secret.json")
    refused = push(scorer, "me/scorer", "--dry-run")
    assert (refused.exit_code, "is a link out of the folder" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda folder: (folder / "rgtg.json").unlink(), 2, "has no rgtg.json: publish a folder that"),
        (lambda folder: (folder / "README.md").unlink(), 2, "has no README.md; rgtg train writes one"),
        (lambda folder: (folder / "model.safetensors").unlink(), 3, "is not whole: it has no *.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), 3, "is not whole: it has no config.json"),
    ],
)
def test_an_incomplete_scorer_is_an_error(scorer, spoil, code, message):
    spoil(scorer)
    refused = push(scorer, "me/scorer", "--dry-run")
    assert (refused.exit_code, message in refused.stderr) == (code, True), refused.stderr


def test_an_audit_of_other_weights_is_an_error(hub, scorer, audited):
    model = tiny_reward_model()
    with torch.no_grad():
        model.score.weight.add_(1)
    model.save_pretrained(scorer)
    refused = push(scorer, "me/scorer", "--audit", audited)
    assert refused.exit_code == 3
    assert "audit.json is of other weights" in refused.stderr
    assert push(scorer, "me/scorer", "--audit", scorer).exit_code == 3, "no audit there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["me/scorer/x"], "is no name of a repository; expected owner/name"),
        (["scorer"], "is no name of a repository"),
        (["me/scorer", "--exclude", "nothing.*"], "--exclude nothing.*: no such file"),
        (["me/scorer", "--exclude", "rgtg.json"], "a scorer without rgtg.json cannot be loaded"),
        ([], "error: repo is required (argument 2)"),
    ],
)
def test_unusable_arguments_are_errors(scorer, arguments, message):
    refused = push(scorer, *arguments, "--dry-run")
    assert (refused.exit_code, message in refused.stderr) == (2, True), refused.stderr


def test_a_missing_argument_is_named_as_the_command_spells_it():
    refused = push()
    assert (refused.exit_code, refused.stderr) == (
        2,
        "error: folder is required (argument 1); repo is required (argument 2)\n",
    )
    arguments = [p.name for p in get_command(app).commands["push"].params if p.param_type_name == "argument"]
    assert tuple(arguments) == PushSettings.positional


def test_refusals_of_the_hub_say_what_to_do_and_commit_nothing(hub, scorer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ)
    refused = push(scorer, "me/scorer")
    assert (refused.exit_code, "(403, read-only): the token may not write to me/scorer" in refused.stderr) == (1, True)
    assert READ not in refused.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    refused = push(scorer, "me/scorer")
    assert (refused.exit_code, "the token is not known there: hf auth login" in refused.stderr) == (1, True)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    hub.fail["/commit/"] = 418
    refused = push(scorer, "me/scorer")
    assert (refused.exit_code, "nothing was committed" in refused.stderr) == (1, True)
    assert not hub.repos["me/scorer"].files()


def test_without_a_token_no_request_is_made(hub, scorer, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(scorer / "no-token"))
    refused = push(scorer, "me/scorer")
    assert (refused.exit_code, "no token of the hub: log in with hf auth login" in refused.stderr) == (2, True)
    assert not hub.requests


def test_an_unreachable_hub_is_an_error(hub, scorer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    clear_snapshot_cache()
    refused = push(scorer, "me/scorer")
    assert (refused.exit_code, "cannot publish to http://127.0.0.1:9" in refused.stderr) == (1, True)


def test_public_model_names_are_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert is_public("owner/name@v1")
    assert not any(map(is_public, ("a/b", "/a/b", "./a/b", "name", "~/a", "a/b/c")))
