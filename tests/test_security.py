"""Tests of the promises in SECURITY.md, named by number. test_security_models.py has those about model files."""

import hmac
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch

from helpers import hub_server
from helpers.command import verb
from helpers.judge_server import serve
from helpers.made_report import audit, steered
from helpers.served import serving
from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import tiny_reward_model, tiny_tokenizer
from publishing.test_push import scorer as pushed_scorer  # noqa: F401  a folder as rgtg train leaves it
from rgtg.config import TrainSettings
from rgtg.errors import DataError, OutputError
from rgtg.models.loading.scorer_info import read_info
from rgtg.models.scorers.heads import StateHead, save_head
from rgtg.report import write_report
from rgtg.training.checkpoint.manager import MARKER, Marker, seal
from rgtg.training.checkpoint.save import save_scorer
from rgtg.training.train import train_scorer
from rgtg.utils.files import atomic_write
from test_security_models import Bomb

ROOT = Path(__file__).parents[1]
# the hub client uploads large files by a name that httpx2 calls old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SCRIPT = "<script>alert(1)</script>"


def test_every_promise_has_tests_and_every_test_has_a_promise():
    promised = dict(re.findall(r"^\| (S\d\d) \| (.*) \|$", (ROOT / "SECURITY.md").read_text(), re.M))
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_security*.py"))
    here = {number.upper() for number in re.findall(r"^def test_(s\d\d)_", sources, re.M)}
    assert here <= set(promised)
    for number, text in promised.items():
        elsewhere = re.findall(r"`(tests/[\w/]+\.py)`: ((?:`test_\w+`(?:, )?)+)", text)
        assert number in here or elsewhere, f"{number} has no test"
        for path, names in elsewhere:
            for name in re.findall(r"test_\w+", names):
                assert f"def {name}(" in (ROOT / path).read_text(), f"{number}: {path} has no {name}"


@pytest.fixture
def unfinished(policy_folder, tmp_path):
    """An interrupted run: it has a checkpoint and no result."""
    torch.set_num_threads(1)
    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(8))
    run = TrainSettings(
        pairs=str(pairs), base=str(policy_folder), output=tmp_path / "out", resume=True, eval_fraction=0,
        train={"max_steps": 4, "save_steps": 1, "learning_rate": 1e-3},
    )  # fmt: skip
    train_scorer(run)
    for path in run.output.iterdir():
        if path.is_file():
            path.unlink()
    *_, before, last = sorted((run.output / "checkpoints").glob("checkpoint-*"))
    shutil.rmtree(last)  # so that some steps remain
    return run, before


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_s04_a_pickle_in_a_checkpoint_runs_nothing(unfinished, tmp_path, name):
    run, checkpoint = unfinished
    marker = Marker.model_validate_json((checkpoint / MARKER).read_text())
    torch.save(Bomb(tmp_path / "ran"), checkpoint / name)
    seal(checkpoint, step=marker.step, processes=1, run=marker.run)  # whoever can write the file can write its checksum
    with pytest.raises(DataError, match="holds a pickle of more than tensors and numbers"):
        train_scorer(run)
    assert not (tmp_path / "ran").exists()


def test_s04_a_marker_that_names_files_outside_its_folder_is_invalid(unfinished):
    run, checkpoint = unfinished
    marker = Marker.model_validate_json((checkpoint / MARKER).read_text())
    one = next(iter(marker.files.values()))
    outside = marker.model_copy(update={"files": marker.files | {"../../../pairs.jsonl": one}})
    (checkpoint / MARKER).write_text(outside.model_dump_json())
    with pytest.warns(UserWarning, match=r"names '\.\./\.\./\.\./pairs\.jsonl', outside of it"):
        train_scorer(run)


def test_s04_a_changed_checkpoint_is_skipped(unfinished):
    run, checkpoint = unfinished
    with (checkpoint / "optimizer.pt").open("r+b") as file:
        file.write(b"x")
    with pytest.warns(UserWarning, match=r"is skipped: optimizer\.pt is damaged"):
        report = train_scorer(run)
    assert not str(report.resumed_from).endswith(checkpoint.name)


def test_s05_local_folders_are_used_without_a_connection(policy_folder, scorer_folder, tmp_path, hub, monkeypatch):
    reached = []
    monkeypatch.setattr(socket.socket, "connect", lambda _self, address: reached.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: reached.append(address))
    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(12))
    for command in (
        ["generate", "--policy", policy_folder, "--method", "policy", "--prompt", "Hi", "--max-new-tokens", "2"],
        ["audit", "--scorer", scorer_folder, "--pairs", pairs, "--set", "bootstrap=100"],
        ["train", "--pairs", pairs, "--base", policy_folder, "--output", tmp_path / "o", "--set", "train.max_steps=1"],
        ["doctor"],
    ):
        ran = verb()(*command)
        assert ran.exit_code == 0, ran.stderr
    assert not reached
    assert not hub.requests


def test_s06_tokens_and_keys_are_written_nowhere(hub, pushed_scorer, tmp_path, monkeypatch):  # noqa: F811
    key, out = "sk-secret-0123456789", tmp_path / "judged"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    rows = [{"prompt": "a", "text": "b"}], [{"prompt": "a", "text": "c"}]
    sides = [write_rows(tmp_path / f"{name}.jsonl", side) for name, side in zip("ab", rows, strict=True)]
    with serve(lambda *_: "[[A]]") as judge:
        options = ["--model", "m", "--base-url", judge.url, "--output", out, "--set", "bootstrap=100"]
        said = verb("judge")("--a", sides[0], "--b", sides[1], *options)
        assert said.exit_code == 0, said.stderr
        assert judge.headers[0]["authorization"].endswith(key), "the judge was called without the key"
    pushed = verb("push")(pushed_scorer, "me/scorer", "--json")
    hub.fail["/commit/"] = 500
    monkeypatch.setattr("time.sleep", lambda _: None)
    failed = verb("push")(pushed_scorer, "me/scorer", "--set", "message=again", "--revision", "other")
    assert (pushed.exit_code, failed.exit_code) == (0, 1)
    written = "".join(path.read_text("utf-8", "replace") for path in out.rglob("*") if path.is_file())
    shown = "".join(ran.stdout + ran.stderr for ran in (said, pushed, failed))
    committed = b"".join(hub.repos["me/scorer"].files().values()).decode("utf-8", "replace")
    for secret in (key, hub_server.WRITE):
        assert secret not in written + shown + committed


def test_s07_push_publishes_what_its_dry_run_lists(hub, pushed_scorer):  # noqa: F811
    listed = json.loads(verb("push")(pushed_scorer, "me/scorer", "--dry-run", "--json").stdout)["files"]
    assert not hub.requests
    assert verb("push")(pushed_scorer, "me/scorer", "--private").exit_code == 0
    there = hub.repos["me/scorer"]
    assert there.private
    assert {name: len(content) for name, content in there.files().items()} == listed
    assert not [name for name in listed if name.endswith((".bin", ".pt", ".jsonl")) or "checkpoint" in name]
    assert not [name for name, content in there.files().items() if str(pushed_scorer.parent).encode() in content]
    hub.put("me/open", {})
    assert verb("push")(pushed_scorer, "me/open", "--private").exit_code == 2
    assert not hub.repos["me/open"].files()
    (pushed_scorer / "vocab.json").symlink_to("/etc/hostname")
    assert verb("push")(pushed_scorer, "me/scorer").exit_code == 2


def test_s08_settings_and_data_are_not_executed(tmp_path, policy_folder):
    marker = tmp_path / "ran"
    call = f"!!python/object/apply:os.mkdir ['{marker}']"
    (tmp_path / "config.yaml").write_text(f"policy: {call}\n")
    generate = verb("generate")
    assert generate("--config", tmp_path / "config.yaml").exit_code == 2
    refused = generate("--policy", policy_folder, "--method", "policy", "--prompt", "x", "--set", f"n={call}")
    assert refused.exit_code == 2
    sums = generate("--policy", policy_folder, "--method", "policy", "--prompt", "x", "--set", "max_new_tokens=1+1")
    assert (sums.exit_code, "max_new_tokens" in sums.stderr) == (2, True)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "\n")
    checked = verb("data", "check")(tmp_path / "pairs.jsonl")
    assert (checked.exit_code, "pairs.jsonl:1: not JSON" in checked.stderr) == (3, True)
    assert not marker.exists()


def test_s09_reports_show_model_output_as_plain_text(tmp_path):
    result = steered().model_copy(update={"reward": SCRIPT})
    page, markdown, *_ = write_report(result, tmp_path / "report.html", audits={SCRIPT: audit()}, title=SCRIPT)
    html = page.read_text()
    assert "<script" not in html
    assert "alert(1)" in html
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    assert SCRIPT not in markdown.read_text()


def test_s10_results_contain_no_local_paths(scorer_folder, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(12))
    out = tmp_path / "audit"
    ran = verb("audit")("--scorer", scorer_folder, "--pairs", pairs, "--output", out, "--set", "bootstrap=100")
    assert ran.exit_code == 0, ran.stderr
    result = (out / "audit.json").read_text()
    assert str(tmp_path) not in result
    assert json.loads(result)["scorer"] == scorer_folder.name


def test_s11_outputs_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("before")

    def write():
        with atomic_write(path) as partial:
            partial.write_text("half of it")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="cannot write"):
        write()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_s12_containers_run_without_privileges():
    for path in (ROOT / "docker").glob("Dockerfile.*"):
        users = re.findall(r"^USER (\S+)$", path.read_text(), re.M)
        assert users, path
        assert users[-1] not in ("root", "0"), path


# The server: SECURITY.md names its other tests.


def test_s14_keys_are_compared_in_constant_time_and_not_shown(monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(
        "rgtg.serving.http.middleware.hmac.compare_digest", lambda a, b: compared.append((a, b)) or real(a, b)
    )
    with serving(api_key="sesame") as served:
        answers = [
            served.client.get("/v1/models", headers={"Authorization": f"Bearer {given}"})
            for given in ("", "s", "sesam", "sesame", "sesame" * 1000)
        ]
        shown = served.client.get("/metrics", headers={"Authorization": "Bearer sesame"}).text
    assert [answer.status_code for answer in answers] == [401, 401, 401, 200, 401]
    assert len(compared) == 6
    assert len({len(side) for pair in compared for side in pair}) == 1, "lengths depend on the given key"
    assert "sesame" not in shown + "".join(answer.text for answer in answers)


ASKED_FOR = [
    *({"model": name} for name in ("/etc/passwd", "../policy", "tiny+/etc/passwd", "owner/name", "file:///etc/passwd")),
    *({"guidance": {"scorers": [name]}} for name in ("/etc", "../x", "owner/name")),
    *({name: "{{ 1 }}"} for name in ("chat_template", "template", "policy", "trust_remote_code", "code", "revision")),
    {"guidance": {"scorers": ["kind"], "revision": "main"}}, {"tools": [{"type": "function"}]},
]  # fmt: skip


@pytest.mark.parametrize("asked", ASKED_FOR, ids=str)
def test_s15_requests_choose_among_the_loaded_models(asked, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a request loads nothing")

    for name in ("policy.load_policy", "pretrained.load_pretrained", "hub.local_folder"):
        monkeypatch.setattr(f"rgtg.models.loading.{name}", load)
    monkeypatch.setattr("rgtg.models.scorers.base.load_scorer", load)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    with serving() as served:
        answer = served.post("/v1/chat/completions", **chat | asked)
        assert answer.status_code in (400, 404), answer.text
        assert "root:" not in answer.text
        assert served.post("/v1/chat/completions", **chat).status_code == 200


@pytest.mark.parametrize(("umask", "opened"), [(0o077, 0o600), (0o022, 0o644)])
def test_outputs_have_the_permissions_that_the_umask_allows(policy_folder, pushed_scorer, tmp_path, umask, opened):  # noqa: F811
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\nnonsense\n')
    models = ["--policy", policy_folder, "--scorer", pushed_scorer, "--max-new-tokens", 2]
    about = read_info(pushed_scorer)
    before = os.umask(umask)
    try:
        job = ["--prompts", prompts, "--output", tmp_path / "out" / "done.jsonl", "--on-bad", "skip", "--quiet"]
        assert verb("generate")(*models, *job).exit_code == 0
        save_scorer(tmp_path / "out" / "scorer", tiny_reward_model(), tiny_tokenizer(), about, "card")
        head = StateHead(32, 8)
        save_scorer(tmp_path / "out" / "head", head, tiny_tokenizer(), about, "card", settings={})
        save_head(tmp_path / "out", head)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    names = {path.name for path in modes}
    assert names >= {"done.jsonl", "done.jsonl.errors.jsonl", "model.safetensors", "head.safetensors", "rgtg.json"}
    assert set(modes.values()) == {opened}, modes
