"""GGUF files: the weights and tokenizer that they hold, conversions kept beside them, and files that are no model."""

import json
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from helpers.command import verb
from helpers.gguf_files import CONFIGS, TEMPLATE, gguf_model, weights, write_gguf
from helpers.tiny_models import tiny_tokenizer
from rgtg import GuidedPolicy
from rgtg.errors import ModelNotFoundError, OutputError, UsageError
from rgtg.models.loading.gguf import converted_folder
from rgtg.models.loading.policy import load_policy
from rgtg.models.loading.pretrained import find_gguf
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.scorers.base import load_scorer
from rgtg.tokenization.encoding import tokenizer_hash

MESSAGES = [{"role": "user", "content": "the hen"}]
# transformers announces its own defaults of GPT-2, whose ids lie outside of a tiny vocabulary
pytestmark = pytest.mark.filterwarnings("ignore:.*must be `None` or an integer within the vocabulary")


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_weights_and_tokenizer_are_those_of_the_file(tmp_path, family):
    policy = load_policy(str(write_gguf(tmp_path / "model.gguf", family)), dtype="float32")
    written, read = weights(gguf_model(family)), weights(policy.model)
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in written)
    assert policy.tokenizer.chat_template == TEMPLATE
    assert (policy.tokenizer.eos_token, policy.model.generation_config.eos_token_id) == ("<|im_end|>", 3)
    assert not any(parameter.requires_grad for parameter in policy.model.parameters())


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_quantised_files_decode_as_transformers_own(tmp_path, family):
    path = write_gguf(tmp_path / "model.gguf", family, quantised=True)

    def stock_model(dtype):
        quantisation = GgufConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, quantization_config=quantisation, dtype=dtype
        )

    assert fingerprint_weights(load_policy(str(path)).model) == fingerprint_weights(stock_model(torch.bfloat16))
    # tokens are compared in fp32: in bf16 several of a tiny model's logits are equal
    stock = stock_model(torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    guided = GuidedPolicy.from_pretrained(str(path), method="policy", dtype="float32", engine="torch")
    (done,) = guided.generate([MESSAGES], max_new_tokens=12, temperature=0)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = stock.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.input_ids.shape[1] :]
    assert done.token_ids == [i for i in expected.tolist() if i != 3]


def test_a_folder_that_holds_one_file(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = write_gguf(folder / "a.gguf")
    (folder / "mmproj-a.gguf").write_bytes(b"GGUF")
    assert find_gguf(str(folder)) == path
    assert load_policy(str(folder)).model.name_or_path == str(folder)
    (folder / "b.gguf").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\): name one of them"):
        load_policy(str(folder))


def test_tokenizer_files_of_another_model_beside_it_are_not_read(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    alone = load_policy(str(path))
    other = tiny_tokenizer()
    other.chat_template = "another"
    other.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    loaded = load_policy(str(path))
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert tokenizer_hash(loaded.tokenizer) == tokenizer_hash(alone.tokenizer)
    assert loaded.model.generation_config.eos_token_id == 3


def test_files_of_a_hub_repository(tmp_path, hub):
    path = write_gguf(tmp_path / "a.gguf")
    hub.put("me/files", {"a.Q8_0.gguf": path.read_bytes(), "b.gguf": b"", "README.md": b""})
    policy = load_policy("me/files/a.Q8_0.gguf")
    assert policy.model.name_or_path == "me/files/a.Q8_0.gguf"
    assert fingerprint_weights(policy.model) == fingerprint_weights(load_policy(str(path)).model)
    assert load_policy("me/files/a.Q8_0.gguf", revision="main").model.name_or_path == "me/files/a.Q8_0.gguf@main"
    with pytest.raises(ModelNotFoundError, match=r"holds GGUF files: name one, as in me/files/a\.Q8_0\.gguf"):
        load_policy("me/files")
    with pytest.raises(ModelNotFoundError, match=r"me/files has no c\.gguf"):
        load_policy("me/files/c.gguf")


def test_the_conversion_is_kept_on_request(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "qwen2", quantised=True)
    plain = load_policy(str(path))
    assert converted_folder(path) is None
    kept = load_policy(str(path), cache_gguf=True)
    folder = tmp_path / "a.gguf.bf16"
    assert converted_folder(path) == folder
    assert {found.name for found in tmp_path.iterdir()} == {"a.gguf", "a.gguf.bf16"}
    for policy in (kept, load_policy(str(folder))):
        assert fingerprint_weights(policy.model) == fingerprint_weights(plain.model)
        assert tokenizer_hash(policy.tokenizer) == tokenizer_hash(plain.tokenizer)
        assert policy.tokenizer.chat_template == TEMPLATE
        assert policy.model.generation_config.eos_token_id == 3
    assert kept.model.name_or_path == str(path)
    # it is what later loads read, without a request and without the file's weights
    made = (folder / "model.safetensors").stat().st_mtime_ns
    load_policy(str(path), cache_gguf=True)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="cannot load the policy"):
        load_policy(str(path))
    # other precisions are dequantised from the file
    assert load_policy(str(path), dtype="float32").model.dtype == torch.float32


def test_a_conversion_of_another_file_is_not_used(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    old = fingerprint_weights(load_policy(str(path), cache_gguf=True).model)
    write_gguf(path, seed=1)
    assert converted_folder(path) is None
    new = fingerprint_weights(load_policy(str(path)).model)
    assert new != old
    assert fingerprint_weights(load_policy(str(path), cache_gguf=True).model) == new
    (tmp_path / "a.gguf.bf16" / "gguf.json").write_text("[")
    assert converted_folder(path) is None
    assert {found.name for found in tmp_path.iterdir()} == {"a.gguf", "a.gguf.bf16"}


def test_requests_for_a_conversion_that_cannot_be_met(tmp_path, policy_folder, unprivileged):
    path = write_gguf(tmp_path / "a.gguf")
    with pytest.raises(UsageError, match="is not a GGUF file, and loads as it is; leave cache_gguf out"):
        load_policy(str(policy_folder), cache_gguf=True)
    with pytest.raises(UsageError, match="cache_gguf keeps bf16 weights, and dtype is float32"):
        load_policy(str(path), dtype="float32", cache_gguf=True)
    with pytest.raises(UsageError, match="apply to a policy loaded by name"):
        load_policy(load_policy(str(path)), cache_gguf=True)
    tmp_path.chmod(0o555)
    try:
        with (
            unprivileged(),
            pytest.raises(OutputError, match=r"cannot write .*a\.gguf\.bf16: .*; leave cache_gguf out"),
        ):
            load_policy(str(path), cache_gguf=True)
    finally:
        tmp_path.chmod(0o755)


def test_the_command_line(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    ran = verb("generate")(
        "--policy", path, "--engine", "torch", "--method", "policy", "--prompt", "the hen", "--max-new-tokens", 4
    )
    assert ran.exit_code == 0, ran.output
    ran = verb("generate")(
        "--policy",
        path,
        "--engine",
        "torch",
        "--method",
        "policy",
        "--prompt",
        "the",
        "--max-new-tokens",
        4,
        "--cache-gguf",
    )
    assert ran.exit_code == 0, ran.output
    assert converted_folder(path)


def test_a_language_model_in_a_gguf_file_as_scorer(tmp_path):
    path = str(write_gguf(tmp_path / "a.gguf"))
    scorer = load_scorer(path, kind="autoregressive")
    assert len(scorer.score(["the "], ["hen"])) == 1
    with pytest.raises(UsageError, match="no trained reward head"):
        load_scorer(path)


def spoiled(path, **places):
    """The file with some of its bytes replaced: magic, version, tensors, metadata (counts)."""
    data = bytearray(path.read_bytes())
    offsets = {"magic": (0, "4s"), "version": (4, "<I"), "tensors": (8, "<Q"), "metadata": (16, "<Q")}
    for name, value in places.items():
        struct.pack_into(offsets[name][1], data, offsets[name][0], value)
    path.write_bytes(data)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


SPOILED = {
    "no GGUF": lambda path: spoiled(path, magic=b"FUGG"),
    "an empty file": lambda path: cut(path, 0),
    "a cut header": lambda path: cut(path, 100),
    "cut metadata": lambda path: cut(path, 4000),
    "cut weights": lambda path: cut(path, -50_000),
    "an unknown version": lambda path: spoiled(path, version=9),
    "too many tensors": lambda path: spoiled(path, tensors=2**60),
    "too much metadata": lambda path: spoiled(path, metadata=2**60),
    "too few tensors": lambda path: spoiled(path, tensors=3),
    "a huge string": lambda path: path.write_bytes(path.read_bytes()[:24] + struct.pack("<Q", 2**62)),
    "another kind": lambda path: write_gguf(path, change=lambda w: w.add_type("adapter")),
    "a part": lambda path: write_gguf(path, change=lambda w: w.add_uint16("split.count", 3)),
    "an alignment of nought": lambda path: write_gguf(path, change=lambda w: w.add_uint32("general.alignment", 0)),
}


@pytest.mark.parametrize("what", SPOILED)
def test_files_that_cannot_be_read_end_in_a_one_line_error(tmp_path, what):
    path = write_gguf(tmp_path / "a.gguf")
    SPOILED[what](path)
    ran = verb("generate")("--policy", path, "--engine", "torch", "--method", "policy", "--prompt", "the")
    assert ran.exit_code == 2, (ran.output, ran.exception)
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert "a.gguf" in line
    assert "Traceback" not in ran.stderr


def change_field(key, value):
    """Metadata that lies about the weights."""
    return lambda writer: setattr(writer.kv_data[0][key], "value", value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.embedding_length", 10**9), ("llama.embedding_length", 16), ("llama.block_count", 10**6),
        ("llama.block_count", 3), ("llama.attention.head_count", 0), ("llama.attention.head_count", 3),
        ("tokenizer.ggml.eos_token_id", 10**6), ("general.architecture", "unheard-of"),
        ("tokenizer.ggml.model", "unheard-of"),
    ],
)  # fmt: skip
def test_headers_that_lie_end_in_a_one_line_error(tmp_path, key, value):
    path = write_gguf(tmp_path / "a.gguf", change=change_field(key, value))
    ran = verb("generate")("--policy", path, "--engine", "torch", "--method", "policy", "--prompt", "the")
    assert ran.exit_code == 2, (ran.output, ran.exception)
    assert len([line for line in ran.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in ran.stderr
