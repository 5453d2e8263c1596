"""Promises of SECURITY.md about model files: pickles, code and hostile content, in policies and scorers."""

import json
import os
import shutil
import struct

import pytest
import torch

from helpers.command import verb
from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg import GuidedPolicy
from rgtg.config import TrainSettings
from rgtg.errors import DataError, ModelNotFoundError, UsageError
from rgtg.models.loading.policy import load_policy
from rgtg.training.train import train_scorer


class Bomb:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


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


def test_s02_file_names_of_a_repository_cannot_leave_the_cache(policy_folder, tmp_path, hub):
    files = {path.name: path.read_bytes() for path in policy_folder.iterdir()}
    hub.put("me/outside", files | {"../outside.json": b"{}", "sub/../../../outside.json": b"{}"})
    load_policy("me/outside")
    assert not list(tmp_path.rglob("outside.json"))
    assert not [path for _, path in hub.requests if "outside.json" in path]


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
    "an invalid index": lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 100_000),
    "endless nesting": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "sizes beyond any memory": spoil_config(hidden_size=10**9, vocab_size=10**9),
    "invalid sizes": spoil_config(hidden_size="many"),
    "an invalid tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'),
    "not UTF-8": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_s03_hostile_model_files_end_in_a_one_line_error(policy_folder, what):
    HOSTILE[what](policy_folder)
    ran = verb("generate")("--policy", policy_folder, "--method", "policy", "--prompt", "Hi")
    assert ran.exit_code == 2, ran.exception
    assert [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in ran.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy, pairs, and one scorer of each kind: model, LoRA scorer, LoRA adapter on the policy, head."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trained")
    tiny_policy().save_pretrained(root / "policy")
    tiny_tokenizer().save_pretrained(root / "policy")
    pairs = write_rows(root / "pairs.jsonl", synthetic_rows(8))
    kinds = {"model": {}, "lora": {"lora": {"r": 2}}, "shared": {"trunk": "shared"},
             "head": {"trunk": "own", "head": "state", "layer": 1, "width": 8}}  # fmt: skip
    for name, kind in kinds.items():
        given = {"pairs": str(pairs), "base": str(root / "policy"), "output": root / name, "eval_fraction": 0}
        train_scorer(TrainSettings(**given, train={"max_steps": 1}, **kind))
    return root


def edit(name, **values):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def pickled(name):
    """Replace the weights by a pickle that creates a folder when it is loaded."""

    def spoil(folder):
        (folder / f"{name}.safetensors").unlink()
        torch.save(Bomb(folder.parent / "ran"), folder / f"{name}.bin")

    return spoil


def disguised(name):
    return lambda folder: torch.save(Bomb(folder.parent / "ran"), folder / f"{name}.safetensors")


DEEP, CODE = b"[" * 100_000, {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", None]}
WEIGHTS = {"model": "model", "lora": "adapter_model", "shared": "adapter_model", "head": "head"}
HOSTILE_SCORERS = [
    *((kind, f"{what} weights", spoil(name)) for kind, name in WEIGHTS.items()
      for what, spoil in {"pickled": pickled, "disguised": disguised}.items()),
    *((kind, f"weights with {what}", put(f"{name}.safetensors", content)) for kind, name in WEIGHTS.items()
      for what, content in {"a huge header": header(2**60), "terabytes": header(len(TERABYTES), TERABYTES)}.items()),
    *((kind, "an invalid description", put("rgtg.json", DEEP)) for kind in WEIGHTS),
    ("model", "code in its config", edit("config.json", model_type="evil", auto_map=CODE)),
    ("model", "code in its tokenizer", edit("tokenizer_config.json", tokenizer_class="Evil", auto_map=CODE)),
    ("head", "an invalid layer", edit("rgtg.json", layer=10**9)),
    *(("lora", f"an adapter's config: {what}", spoil) for what, spoil in {
        "endless nesting": put("adapter_config.json", DEEP),
        "a list": put("adapter_config.json", b"[]"),
        "another kind": edit("adapter_config.json", peft_type="EVIL"),
        "a base elsewhere": edit("adapter_config.json", base_model_name_or_path="../../../etc/passwd"),
        "no base": edit("adapter_config.json", base_model_name_or_path=None),
        "a rank beyond any memory": edit("adapter_config.json", r=10**12),
        "an invalid scale": edit("adapter_config.json", lora_alpha="x"),
    }.items()),
    ("shared", "an adapter's config: a list", put("adapter_config.json", b"[]")),
    ("shared", "an adapter's config: an invalid scale", edit("adapter_config.json", lora_alpha="x")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "spoil"), [pytest.param(k, s, id=f"{k}, {w}") for k, w, s in HOSTILE_SCORERS])
def test_s03_hostile_scorers_end_in_a_one_line_error(trained, tmp_path, kind, spoil):
    folder = tmp_path / "scorer"
    shutil.copytree(trained / kind, folder)
    spoil(folder)
    joined = verb("generate")("--policy", trained / "policy", "--scorer", folder, "--prompt", "Hi")
    alone = verb("audit")("--scorer", folder, "--pairs", trained / "pairs.jsonl", "--set", "bootstrap=100")
    for ran in (joined, alone):
        assert ran.exit_code in (2, 3), ran.exception
        assert [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in ran.stderr
    assert not (tmp_path / "ran").exists()
