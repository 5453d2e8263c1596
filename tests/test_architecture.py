"""Architecture: who may import whom, what importing costs, what is public, how many files a folder holds."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rgtg

SRC = Path(rgtg.__file__).parent
MODULES = {
    ".".join(("rgtg", *path.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SRC.rglob("*.py"))
}
CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Who may import whom: a module imports from its own layer and from earlier layers.
# A name stands for a module or a folder; the longest matching name decides. CONTRIBUTING.md shows this table.
LAYERS: list[tuple[str, str]] = [
    ("errors version types config utils", "no torch"),
    ("losses decoding.sampling", "torch"),
    ("tokenization", "transformers"),
    ("data models", ""),
    ("training decoding", "never each other"),
    ("evaluation batch serving integrations engines publishing planning", ""),
    ("report demo cli __main__", "cli imports inside functions"),
]
_LAYER_OF = {f"rgtg.{name}": i for i, (names, _) in enumerate(LAYERS) for name in names.split()} | {"rgtg": 0}


def layer(module: str) -> int:
    while module not in _LAYER_OF:
        module = module.rpartition(".")[0]
    return _LAYER_OF[module]


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


IMPORTS = {module: imports(path) for module, path in MODULES.items() if module != "rgtg"}
# Private words of the first build, each with the standard term that replaced it (docs/notation.md).
PRIVATE_WORDS = {
    "Lane": "Batch", "Lanes": "Batch", "Member": "running request", "Seat": "sequence", "Solo": "non-batched request",
    "Arrival": "prefilling request", "Ticket": "handle", "Flight": "response stream", "Duel": "comparison",
    "Planner": "input processor", "Stepper": "policy runner", "Reader": "scorer runner", "Mixture": "ScorerSum",
    "Gate": "middleware", "Guarded": "middleware", "Written": "parameter names", "Contestants": "models",
    "Alone": "unguided", "Apart": "sequential", "AtOnce": "overlapped", "Ahead": "lookahead",
    "OnCandidates": "StateHead", "OnPrefix": "VocabHead", "InOnePass": "fused LoRA", "TwoHalves": "doubled batch",
    "OwnPass": "separate scorer", "Branches": "token tree", "Twin": "packed copy", "Tracks": "masked rows",
    "Fitted": "trained head", "read_ahead": "lookahead", "unread": "pending tokens", "teller": "stream formatter",
    "readout": "lm_head", "settle": "roll back", "ridge": "roofline", "together": "distributed",
}  # fmt: skip


def test_no_module_imports_from_a_higher_layer():
    upward = [
        f"{module} (layer {layer(module)}) imports {name} (layer {layer(name)})"
        for module, names in IMPORTS.items()
        for name in names
        if name.startswith("rgtg.") and layer(name) > layer(module)
    ]
    assert not upward, "\n".join(upward)


def test_no_import_cycles():
    """Imports inside functions count too."""
    try:
        TopologicalSorter({m: imports(path) & set(MODULES) - {m} for m, path in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_private_word_is_a_name():
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        names = {node.name for node in ast.walk(tree) if isinstance(node, kinds)} | {module.rpartition(".")[2]}
        found = {name: PRIVATE_WORDS[name.strip("_")] for name in names if name.strip("_") in PRIVATE_WORDS}
        assert not found, f"{module} has names with a standard term: {found}"


def test_the_map_of_contributing_names_existing_modules_and_names():
    section = CONTRIBUTING.partition("## Where to find things")[2].partition("\n## ")[0]
    places = re.findall(r"`([\w/]+\.py)`(?:: ((?:`[\w.]+`(?:, )?)+))?", section)
    assert len(places) > 20
    for path, names in places:
        tree = ast.parse((SRC / path).read_text(encoding="utf-8"))
        defined = {node.name: node for node in tree.body if hasattr(node, "name")} | {
            target.id: node
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for name in re.findall(r"[\w.]+", names):
            first, _, method = name.partition(".")
            assert first in defined, f"{path} has no {name}"
            assert not method or method in {getattr(item, "name", "") for item in defined[first].body}, f"no {name}"


def test_contributing_shows_the_layers():
    rows = [
        f"| {i} | {', '.join(f'`{name}`' for name in names.split())} | {rule}{' ' * bool(rule)}|"
        for i, (names, rule) in enumerate(LAYERS)
    ]
    assert "| layer | modules | rule |\n|---|---|---|\n" + "\n".join(rows) + "\n\n" in CONTRIBUTING


def test_training_and_decoding_never_import_each_other():
    for module, names in IMPORTS.items():
        for one, other in (("rgtg.training", "rgtg.decoding"), ("rgtg.decoding", "rgtg.training")):
            if module.startswith(one):
                assert not [name for name in names if name.startswith(other)], module


def test_low_layers_are_light():
    heavy = {0: {"torch", "transformers", "trl"}, 1: {"transformers", "trl"}}
    for module, names in IMPORTS.items():
        banned = heavy.get(layer(module), set())
        assert not {name.partition(".")[0] for name in names} & banned, module


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


def test_the_root_holds_few_modules_and_no_folder_is_crowded():
    root = {path.name for path in SRC.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(root) <= 4, sorted(root)
    for folder in {path.parent for path in MODULES.values()} - {SRC / "cli"}:
        files = sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")
        assert len(files) <= 15, f"{folder.relative_to(SRC)} holds {len(files)} files: {files}"
