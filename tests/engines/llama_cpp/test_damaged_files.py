"""GGUF files that are cut off, lie about themselves, or hold something else end with a message, never the process."""

import random
import struct
import subprocess
import sys

import pytest

from helpers.gguf_files import write_gguf
from helpers.llama_models import require_llama_cpp
from rgtg.engines.llama_cpp.library import library
from rgtg.engines.llama_cpp.probe import may_repack, require_readable
from rgtg.errors import ModelNotFoundError, RgtgError
from rgtg.models.loading.policy import load_policy

require_llama_cpp()

MANY = 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def place_of(data, key):
    """Where the value of a key of the header begins: after its name and type."""
    return data.index(key.encode()) + len(key) + 4


def changed(data, key, value, form="<I"):
    at = place_of(data, key)
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


LIES = {
    "no bytes": lambda data: b"",
    "another format": lambda data: b"GGML" + data[4:],
    "a version from the future": lambda data: data[:4] + struct.pack("<I", 99) + data[8:],
    "cut off in the header": lambda data: data[:200],
    "cut off in the vocabulary": lambda data: data[:2000],
    "cut off in the weights": lambda data: data[:-2000],
    "more tensors than there are": lambda data: data[:8] + struct.pack("<Q", 10**6) + data[16:],
    "tensors beyond counting": lambda data: data[:8] + struct.pack("<Q", 2**63) + data[16:],
    "more keys than there are": lambda data: data[:16] + struct.pack("<Q", 10**6) + data[24:],
    "a string longer than the file": lambda data: data[:24] + struct.pack("<Q", 2**40) + data[32:],
    "an offset beyond the file": lambda data: data.replace(
        struct.pack("<Q", 32 * 262 * 4), struct.pack("<Q", 2**40 // 32 * 32), 1
    ),
    "no layers": lambda data: changed(data, "llama.block_count", 0),
    "more layers than there are": lambda data: changed(data, "llama.block_count", 40),
    "layers beyond counting": lambda data: changed(data, "llama.block_count", 2**31),
    "no heads": lambda data: changed(data, "llama.attention.head_count", 0),
    "heads that do not divide": lambda data: changed(data, "llama.attention.head_count", 5),
    "heads beyond counting": lambda data: changed(data, "llama.attention.head_count", 2**31),
    "no width": lambda data: changed(data, "llama.embedding_length", 0),
    "another width": lambda data: changed(data, "llama.embedding_length", 4096),
    "no key heads": lambda data: changed(data, "llama.attention.head_count_kv", 0),
    "an unknown architecture": lambda data: data.replace(b"llama", b"lxama"),
    "a token type that is none": lambda data: changed(data, "tokenizer.ggml.model", 2**33, "<Q"),
    "an end token out of the vocabulary": lambda data: changed(data, "tokenizer.ggml.eos_token_id", 10**6),
}


def load(path):
    """What loading a file ends with: a policy, or an error that says what to do."""
    try:
        return load_policy(str(path), engine="llama-cpp")
    except RgtgError as error:
        return error


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_ends_with_a_message(whole, tmp_path, lie):
    damaged = LIES[lie](whole)
    path = tmp_path / "model.gguf"
    path.write_bytes(damaged)
    found = load(path)
    if damaged == whole:
        pytest.skip("the file has no such place")
    if lie != "an end token out of the vocabulary":
        assert isinstance(found, RgtgError), lie
        assert found.exit_code in (2, 3)
        assert "\n" not in str(found)
        assert str(path) in str(found)


def test_an_abort_of_the_library_is_a_message(whole, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    require_readable(path)
    script = tmp_path / "aborts.py"
    script.write_text("import os\nos.abort()\n")
    run = subprocess.run

    def aborts(command, **more):
        return run([sys.executable, str(script)], **more)

    monkeypatch.setattr(subprocess, "run", aborts)
    path.write_bytes(whole + b"\0")  # another file: it is tried again
    with pytest.raises(ModelNotFoundError, match=r"llama.cpp cannot read .*: it ended the process \(-6\)"):
        require_readable(path)


@pytest.mark.parametrize("code", [0, -11, None], ids=["work", "crash", "take too long"])
def test_weights_are_repacked_for_amx_only_where_its_kernels_work(whole, tmp_path, monkeypatch, code):
    """Some compilers build llama.cpp's AMX kernels so that they end the process."""
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    commands = []

    def ends(command, **_):
        commands.append(command)
        if code is None:
            raise subprocess.TimeoutExpired(command, 300)
        return subprocess.CompletedProcess(command, code, "", "")

    monkeypatch.setattr(subprocess, "run", ends)
    monkeypatch.setattr(library(), "llama_print_system_info", lambda: b"CPU : AVX512 = 1 | REPACK = 1 | ")
    assert may_repack(path)
    assert not commands, "without AMX nothing is tried"
    monkeypatch.setattr(library(), "llama_print_system_info", lambda: b"CPU : AMX_INT8 = 1 | REPACK = 1 | ")
    assert may_repack(path) is (code == 0)
    assert may_repack(path) is (code == 0)
    assert len(commands) == 1, "a file is tried once"


@pytest.mark.slow
def test_random_damage_ends_with_a_message(whole, tmp_path):
    draw = random.Random(0)
    header = whole.index(b"token_embd.weight") + 2000
    for i in range(MANY):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(header)
            data[at : at + draw.choice((0, 1, 8))] = draw.randbytes(draw.choice((0, 1, 8)))
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(bytes(data))
        load(path)
