"""A head's folder read without torch: equal to the torch head, checked against its policy's files; damages."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from helpers.naive import info
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.config import TrainSettings
from rgtg.errors import DataError, RgtgError, TokenizerMismatchError, UsageError
from rgtg.models.loading.policy_files import describe_policy_files
from rgtg.models.scorers.head_file import gelu, read_head, read_info
from rgtg.models.scorers.heads import StateHead, VocabularyHead, load_head, round_to_half, save_head
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.training.train_head import candidate_layers
from rgtg.types.scorer import ScorerInfo

SIZES = {"hidden": 32, "width": 8, "rank": 4, "vocabulary": 64, "policy_layers": 2, "layer": 2}


def write_head(folder, policy_folder, kind="vocab", **changes):
    """A random head with a complete description of its policy."""
    torch.manual_seed(3)
    head = StateHead(32, 8) if kind == "state" else VocabularyHead(32, 8, 4, 64)
    with torch.no_grad():
        head.mlp.mean.normal_()
        head.mlp.std.uniform_(0.5, 2.0)
    round_to_half(head)
    folder.mkdir(exist_ok=True)
    save_head(folder, head)
    sizes = SIZES if kind == "vocab" else SIZES | {"rank": None, "vocabulary": None}
    about = {
        "trunk": "own", "head": kind, "base_model": str(policy_folder), "normalisation": "standardize",
        "activation": "gelu", "policy_files": [describe_policy_files(str(policy_folder))],
        "tokenizer_hash": tokenizer_hash(tiny_tokenizer()), **sizes,
    }  # fmt: skip
    described = info().model_copy(update=about | changes)
    (folder / "rgtg.json").write_text(described.model_dump_json())
    return head.requires_grad_(False)


@pytest.fixture
def head_folder(tmp_path, policy_folder):
    write_head(tmp_path / "head", policy_folder)
    return tmp_path / "head"


def rewrite(folder, **changes):
    described = json.loads((folder / "rgtg.json").read_text()) | changes
    (folder / "rgtg.json").write_text(json.dumps(described))


def rewrite_tensors(folder, change):
    tensors = load_file(folder / "head.safetensors")
    change(tensors)
    save_file(tensors, folder / "head.safetensors")


def test_the_example_of_the_specification(tmp_path, policy_folder):
    head = write_head(tmp_path / "head", policy_folder, hidden=2, width=1, rank=2, vocabulary=3)
    assert isinstance(head, VocabularyHead)
    tensors = {
        "mlp.mean": [1, 0], "mlp.std": [2, 1], "mlp.first.weight": [[1, -1]], "mlp.first.bias": [0.5],
        "mlp.second.weight": [[1], [2]], "mlp.second.bias": [0, -1],
        "table.weight": [[0, 0], [1, 1], [2, -1]], "bias": [0.25, 0, -1],
    }  # fmt: skip
    save_file({name: np.float32(value) for name, value in tensors.items()}, tmp_path / "head" / "head.safetensors")
    scores = read_head(str(tmp_path / "head")).score(np.float32([[3, 0.5]]))
    np.testing.assert_allclose(scores, [[0.25, 1.524034, 0.0]], atol=1e-6)


@pytest.mark.parametrize("kind", ["state", "vocab"])
def test_it_scores_as_the_torch_head(tmp_path, policy_folder, kind):
    torch_head = write_head(tmp_path / "head", policy_folder, kind)
    head = read_head(str(tmp_path / "head"))
    states = torch.randn(5, 32, dtype=torch.float16)
    ids = torch.randint(0, 64, (5, 3))
    if kind == "state":
        np.testing.assert_allclose(head.score(states.numpy()), torch_head(states).numpy(), atol=1e-5)
        return
    wanted = torch_head(states, torch.arange(64).expand(5, -1)).numpy()
    np.testing.assert_allclose(head.score(states.numpy()), wanted, atol=1e-5)
    np.testing.assert_allclose(head.score(states.numpy(), ids.numpy()), torch_head(states, ids).numpy(), atol=1e-5)
    assert head.score(states.numpy()).dtype == np.float32


def test_gelu_is_that_of_torch():
    x = np.linspace(-6, 6, 200, dtype=np.float32)
    np.testing.assert_allclose(gelu(x), torch.nn.functional.gelu(torch.from_numpy(x)).numpy(), atol=1e-6)


def test_reading_a_head_loads_no_torch(head_folder):
    code = f"from rgtg.models.scorers.head_file import read_head as r; h = r({str(head_folder)!r}); "
    code += "h.require_policy_files(h.info.base_model); import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


# --- which policy it belongs to


def test_the_files_are_recognised_in_any_sharding_and_in_16_bits(head_folder, policy_folder, tmp_path):
    head = read_head(str(head_folder))
    head.require_policy_files(str(policy_folder))
    tiny_policy().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    head.require_policy_files(str(tmp_path / "sharded"))
    for dtype in (torch.bfloat16, torch.float16):
        tiny_policy().to(dtype).save_pretrained(tmp_path / str(dtype))
        head.require_policy_files(str(tmp_path / str(dtype)))
    tiny_policy(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="holds other weights"):
        head.require_policy_files(str(tmp_path / "other"))


def test_one_changed_value_in_every_tensor_changes_the_fingerprint(policy_folder):
    before = describe_policy_files(str(policy_folder)).fingerprint
    path = policy_folder / "model.safetensors"
    original = path.read_bytes()
    for name in load_file(path):
        tensors = load_file(path)
        tensors[name] = tensors[name].copy()
        tensors[name].flat[0] += 1
        save_file(tensors, path)
        assert describe_policy_files(str(policy_folder)).fingerprint != before, name
        path.write_bytes(original)
    assert describe_policy_files(str(policy_folder)).fingerprint == before


@pytest.mark.parametrize("size", [10, 5000, 9_000_000])
def test_a_gguf_file_is_identified_by_its_bytes(tmp_path, size):
    path = tmp_path / "model.gguf"
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    path.write_bytes(content.tobytes())
    found = describe_policy_files(str(path))
    assert (found.format, found.casts) == ("gguf", {})
    assert describe_policy_files(str(tmp_path)) == found  # a folder with one of them
    for at in (0, size - 1):
        changed = content.copy()
        changed[at] ^= 1
        path.write_bytes(changed.tobytes())
        assert describe_policy_files(str(path)).fingerprint != found.fingerprint
    path.write_bytes(content.tobytes()[:-1])
    assert describe_policy_files(str(path)).fingerprint != found.fingerprint


def test_a_split_gguf_model_is_all_its_files(tmp_path):
    for i in (1, 2):
        (tmp_path / f"m-0000{i}-of-00002.gguf").write_bytes(b"GGUF" + bytes([i]) * 100)
    whole = describe_policy_files(str(tmp_path)).fingerprint
    assert describe_policy_files(str(tmp_path / "m-00001-of-00002.gguf")).fingerprint == whole
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"GGUF" + bytes(100))
    assert describe_policy_files(str(tmp_path)).fingerprint != whole


def test_another_tokenizer_is_refused(head_folder):
    head = read_head(str(head_folder))
    head.require_tokenizer(tokenizer_hash(tiny_tokenizer()))
    with pytest.raises(TokenizerMismatchError, match="another tokenizer"):
        head.require_tokenizer("0" * 16)


# --- heads that an engine cannot carry


def test_an_engine_of_final_states_refuses_other_heads(tmp_path, policy_folder):
    write_head(tmp_path / "vocab", policy_folder)
    read_head(str(tmp_path / "vocab")).require_vocabulary_of_final_states("an engine")
    write_head(tmp_path / "early", policy_folder, layer=1)
    with pytest.raises(UsageError, match=r"reads layer 1 of 2, and an engine gives only .*--layer final"):
        read_head(str(tmp_path / "early")).require_vocabulary_of_final_states("an engine")
    write_head(tmp_path / "state", policy_folder, "state")
    with pytest.raises(UsageError, match="state head"):
        read_head(str(tmp_path / "state")).require_vocabulary_of_final_states("an engine")


def test_final_is_the_last_layer(tmp_path):
    given = {"pairs": "p", "base": "b", "output": tmp_path, "trunk": "own", "head": "vocab"}
    assert candidate_layers(TrainSettings(**given, layer="final"), tiny_policy()) == [2]
    assert candidate_layers(TrainSettings(**given, layer="auto"), tiny_policy()) == [2, 1]


# --- damaged and contradictory files


def _set(name, value):
    return lambda folder: rewrite(folder, **{name: value})


def _tensor(name, change):
    return lambda folder: rewrite_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name])}))


def _drop(name):
    return lambda folder: rewrite_tensors(folder, lambda tensors: tensors.pop(name))


def _one(array, value):
    changed = array.copy()
    changed.flat[0] = value
    return changed


DAMAGES = {
    "no description": (lambda folder: (folder / "rgtg.json").unlink(), "has no rgtg.json"),
    "no tensors": (lambda folder: (folder / "head.safetensors").unlink(), "missing or damaged"),
    "not JSON": (lambda folder: (folder / "rgtg.json").write_bytes(b"\xff{"), "not a valid scorer description"),
    "a list": (lambda folder: (folder / "rgtg.json").write_text("[]"), "not a valid scorer description"),
    "an unknown field": (_set("surprise", 1), "surprise"),
    "a later version": (_set("version", 2), "install a newer rgtg"),
    "no head": (_set("trunk", "separate"), "no head on a policy's own states"),
    "an unknown activation": (_set("activation", "relu"), "activation"),
    "no policy layers": (_set("policy_layers", None), "does not say policy_layers"),
    "no activation": (_set("activation", None), "does not say activation"),
    "a layer beyond the last": (_set("layer", 3), "not one of 0 to 2"),
    "a negative layer": (_set("layer", -1), "not one of 0 to 2"),
    "no policy files": (_set("policy_files", []), "names no policy files"),
    "another hidden size": (_set("hidden", 31), "hidden of rgtg.json says 31 instead of 32"),
    "another width": (_set("width", 9), "width of rgtg.json says 9 instead of 8"),
    "another rank": (_set("rank", 5), "rank of rgtg.json says 5 instead of 4"),
    "another vocabulary": (_set("vocabulary", 65), "vocabulary of rgtg.json says 65 instead of 64"),
    "a state head's name": (_set("head", "state"), "no state head"),
    "a missing tensor": (_drop("bias"), "it lacks ['bias']"),
    "a further tensor": (lambda f: rewrite_tensors(f, lambda t: t.update(x=np.zeros(1, np.float32))), "has ['x']"),
    "a tensor of another size": (_tensor("bias", lambda a: a[1:]), "bias has shape [63]"),
    "a tensor of another rank": (_tensor("bias", lambda a: a[None]), "has 1 sizes"),
    "integers": (_tensor("bias", lambda a: a.astype(np.int32)), "dtype I32"),
    "NaN": (_tensor("mlp.second.weight", lambda a: _one(a, np.nan)), "not finite"),
    "infinity": (_tensor("table.weight", lambda a: _one(a, np.inf)), "not finite"),
    "a deviation of zero": (_tensor("mlp.std", lambda a: _one(a, 0)), "not positive"),
    "a negative deviation": (_tensor("mlp.std", lambda a: _one(a, -1)), "not positive"),
    "a header that lies": (
        lambda f: (f / "head.safetensors").write_bytes(b"\xff" * 8 + (f / "head.safetensors").read_bytes()[8:]),
        "missing or damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_head_is_refused_in_one_line(head_folder, policy_folder, name):
    damage, message = DAMAGES[name]
    damage(head_folder)
    with pytest.raises(RgtgError) as caught:
        read_head(str(head_folder)).require_policy_files(str(policy_folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_and_flipped_files_end_with_a_message(head_folder):
    """Every cut, and a thousand flipped bits: the head loads with finite numbers, or an error of rgtg says why not."""
    path = head_folder / "head.safetensors"
    original = path.read_bytes()
    random = np.random.default_rng(0)
    variants = [original[:cut] for cut in range(0, len(original), 97)]
    for _ in range(1000):
        changed = bytearray(original)
        changed[int(random.integers(0, min(len(original), 1200)))] ^= 1 << int(random.integers(0, 8))
        variants.append(bytes(changed))
    messages = []
    for content in variants:
        path.write_bytes(content)
        try:
            head = read_head(str(head_folder))
        except DataError as error:
            messages.append(str(error))
        else:
            assert head.vocabulary == 64
            assert np.isfinite(head.table).all()
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def test_a_head_without_the_new_fields_still_loads_in_torch(head_folder):
    described = read_info(head_folder)
    assert isinstance(described, ScorerInfo)
    old = described.model_copy(
        update=dict.fromkeys(("hidden", "vocabulary", "policy_layers", "activation", "normalisation"))
        | {"policy_files": []}
    )
    assert isinstance(load_head(head_folder, old), VocabularyHead)


@pytest.mark.parametrize("cut", [4, 100, 3000])
def test_damaged_weights_of_the_policy_are_named(head_folder, policy_folder, cut):
    path = policy_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UsageError, match="damaged"):
        read_head(str(head_folder)).require_policy_files(str(policy_folder))
