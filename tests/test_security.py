"""Every promise of SECURITY.md, by its number."""

import json
import os
import re
import shutil
import socket
import struct
from pathlib import Path

import pytest
import torch

import hub_server
from conftest import tiny_policy, tiny_tokenizer, verb
from judge_server import serve
from made_report import audit, steered
from publishing.test_push import scorer as pushed_scorer  # noqa: F401  a folder as rgtg train leaves it
from rgtg import GuidedPolicy
from rgtg.config import TrainSettings
from rgtg.errors import DataError, ModelNotFoundError, OutputError, UsageError
from rgtg.models.policy import load_policy
from rgtg.outputs import atomic_write
from rgtg.report import write_report
from rgtg.training.checkpoints import MARKER, Marker, seal
from rgtg.training.run import train_scorer
from synthetic import synthetic_rows, write_rows

ROOT = Path(__file__).parents[1]
# the hub client uploads large files by a name that httpx2 calls old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SCRIPT = "<script>alert(1)</script>"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_every_promise_has_a_test_and_every_test_a_promise():
    promised = set(re.findall(r"^\| (S\d\d) \|", (ROOT / "SECURITY.md").read_text(), re.M))
    tested = {name[5:8].upper() for name in globals() if re.match(r"test_s\d\d_", name)}
    assert promised == tested
    assert promised


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.00.pth"])
def test_s01_pickles_are_not_loaded_as_models(policy_folder, tmp_path, hub, name):
    (policy_folder / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "ran"), policy_folder / name)
    hub.put("me/pickled", {path.name: path.read_bytes() for path in policy_folder.iterdir()})
    for source in (str(policy_folder), "me/pickled"):
        with pytest.raises(UsageError, match="pickled weights only, which can run code"):
            load_policy(source)
    assert not (tmp_path / "ran").exists()
    assert not [path for _, path in hub.requests if path.endswith(name)]


def test_s02_code_of_a_repository_does_not_run(policy_folder, tmp_path, hub):
    config = json.loads((policy_folder / "config.json").read_text())
    evil = config | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (policy_folder / "config.json").write_text(json.dumps(evil))
    (policy_folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    hub.put("me/evil", {path.name: path.read_bytes() for path in policy_folder.iterdir()})
    for source in (str(policy_folder), "me/evil"):
        with pytest.raises(ModelNotFoundError, match="cannot load the policy"):
            load_policy(source)
    assert not (tmp_path / "ran").exists()
    assert not [path for _, path in hub.requests if path.endswith(".py")]


def test_s02_chat_templates_run_in_a_sandbox():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    guided = GuidedPolicy.from_pretrained((tiny_policy(), tokenizer), method="policy")
    with pytest.raises(DataError, match="chat template refuses"):
        guided.generate([[{"role": "user", "content": "Hi"}]])


def header(length, body=b"{}"):
    return struct.pack("<Q", length) + body


def spoil_weights(content):
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def spoil_config(**values):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return spoil


def point_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny_policy().state_dict(), "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


TERABYTES = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
HOSTILE = {
    "a header that is too large": spoil_weights(header(2**60)),
    "a header that is cut off": spoil_weights(header(1000)),
    "an empty file": spoil_weights(b""),
    "terabytes in a small file": spoil_weights(header(len(TERABYTES), TERABYTES)),
    "weights outside of the folder": point_outside,
    "an index that is none": lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 100_000),
    "nesting without end": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "sizes beyond any memory": spoil_config(hidden_size=10**9, vocab_size=10**9),
    "sizes that are none": spoil_config(hidden_size="many"),
    "a tokenizer that is none": lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'),
    "no text": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_s03_hostile_model_files_end_in_one_line(policy_folder, what):
    HOSTILE[what](policy_folder)
    ran = verb("generate")("--policy", policy_folder, "--method", "policy", "--prompt", "Hi")
    assert ran.exit_code == 2, ran.exception
    assert [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in ran.stderr


@pytest.fixture
def unfinished(policy_folder, tmp_path):
    """A run with a checkpoint and no result yet, as an interruption leaves it."""
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
    shutil.rmtree(last)  # so that steps are left to take
    return run, before


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_s04_a_pickle_in_a_checkpoint_runs_nothing(unfinished, tmp_path, name):
    run, checkpoint = unfinished
    marker = Marker.model_validate_json((checkpoint / MARKER).read_text())
    torch.save(Bomb(tmp_path / "ran"), checkpoint / name)
    seal(checkpoint, step=marker.step, processes=1, run=marker.run)  # whoever can write the file can seal it too
    with pytest.raises(DataError, match="holds a pickle of more than tensors and numbers"):
        train_scorer(run)
    assert not (tmp_path / "ran").exists()


def test_s04_a_seal_that_reaches_out_of_its_folder_is_no_seal(unfinished):
    run, checkpoint = unfinished
    marker = Marker.model_validate_json((checkpoint / MARKER).read_text())
    one = next(iter(marker.files.values()))
    outside = marker.model_copy(update={"files": marker.files | {"../../../pairs.jsonl": one}})
    (checkpoint / MARKER).write_text(outside.model_dump_json())
    with pytest.warns(UserWarning, match=r"names '\.\./\.\./\.\./pairs\.jsonl', outside of it"):
        train_scorer(run)


def test_s04_a_changed_checkpoint_is_passed_over(unfinished):
    run, checkpoint = unfinished
    with (checkpoint / "optimizer.pt").open("r+b") as file:
        file.write(b"x")
    with pytest.warns(UserWarning, match=r"is passed over: optimizer\.pt is damaged"):
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
        assert judge.headers[0]["authorization"].endswith(key), "it was used"
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


def test_s08_settings_and_data_are_data(tmp_path, policy_folder):
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


def test_s09_reports_show_what_models_wrote_as_text(tmp_path):
    result = steered().model_copy(update={"reward": SCRIPT})
    page, markdown, *_ = write_report(result, tmp_path / "report.html", audits={SCRIPT: audit()}, title=SCRIPT)
    html = page.read_text()
    assert "<script" not in html
    assert "alert(1)" in html
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    assert SCRIPT not in markdown.read_text()


def test_s10_results_name_no_folder_of_this_machine(scorer_folder, tmp_path):
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
