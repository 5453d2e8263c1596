"""The house rules: who may import whom, what importing costs, what is public, how long files are."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rgtg

SRC = Path(rgtg.__file__).parent
# The longest matching name decides.
LAYERS = {
    "rgtg": 0, "rgtg.errors": 0, "rgtg.types": 0, "rgtg.types_rollouts": 0, "rgtg.config": 0, "rgtg.outputs": 0,
    "rgtg.disk": 0,
    "rgtg.losses": 1, "rgtg.decoding.rules": 1, "rgtg.decoding.candidates": 1, "rgtg.decoding.token_tree": 1,
    "rgtg.evaluation.metrics": 1, "rgtg.evaluation.choices": 1,
    "rgtg.theory": 2, "rgtg.models": 2, "rgtg.data": 2, "rgtg.data_sources": 2, "rgtg.data_formats": 2,
    "rgtg.data_completions": 2, "rgtg.data_rollouts": 2, "rgtg.data_rejects": 2, "rgtg.data_prompts": 2,
    "rgtg.data_openai": 2, "rgtg.data_tokens": 2, "rgtg.jobs": 4,
    "rgtg.training": 3, "rgtg.decoding": 3,
    "rgtg.evaluation": 4, "rgtg.serving": 4, "rgtg.integrations": 4, "rgtg.demo": 4,
    "rgtg.publishing": 4, "rgtg.planning": 4,
    "rgtg.report": 5, "rgtg.cli": 5, "rgtg.__main__": 5,
}  # fmt: skip
MODULES = {
    ".".join(("rgtg", *path.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SRC.rglob("*.py"))
}


def layer(module: str) -> int:
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return LAYERS[module]


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules a file imports, those inside functions too unless only the top level is asked for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names
            }
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if m != "rgtg"])
def test_imports_point_down(module):
    upward = [name for name in imports(MODULES[module]) if name.startswith("rgtg") and layer(name) > layer(module)]
    assert not upward, f"{module} (layer {layer(module)}) imports {upward}"


def test_training_and_decoding_never_meet():
    for module, path in MODULES.items():
        for one, other in (("rgtg.training", "rgtg.decoding"), ("rgtg.decoding", "rgtg.training")):
            if module.startswith(one):
                assert not [name for name in imports(path) if name.startswith(other)], module


@pytest.mark.parametrize(("top", "banned"), [(0, {"torch", "transformers", "trl"}), (1, {"transformers", "trl"})])
def test_low_layers_are_light(top, banned):
    for module, path in MODULES.items():
        if layer(module) <= top and module != "rgtg":
            assert not {name.partition(".")[0] for name in imports(path)} & banned, module


def test_the_command_line_is_lazy():
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "matplotlib"}
    for module, path in MODULES.items():
        if module.startswith("rgtg.cli"):
            assert not {name.partition(".")[0] for name in imports(path, top_level=True)} & heavy, module


@pytest.mark.parametrize(
    "code",
    [
        "import rgtg",
        "from rgtg.cli.main import app; app(['--help'], standalone_mode=False)",
        "from rgtg.cli.main import app; app(['methods'], standalone_mode=False)",
    ],
)
def test_no_torch_until_it_is_needed(code):
    check = f"import sys; {code}; print('heavy:', [m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_public_names():
    assert rgtg.__all__ == ["__version__", *sorted(set(rgtg.__all__) - {"__version__"})]
    assert dir(rgtg) == sorted(rgtg.__all__)
    for name in rgtg.__all__:
        assert getattr(rgtg, name) is not None
    declared = {
        alias.asname
        for node in ast.walk(ast.parse(MODULES["rgtg"].read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert declared == set(rgtg.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'Guided'"):
        importlib.import_module("rgtg").Guided  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_over_400_lines(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 400
