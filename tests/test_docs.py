"""Runs every fenced block of every documentation page, in a folder with the models and files that the pages name.

A block that cannot run here has ``<!-- needs: WHAT -->`` on the line before it; the number of these is limited. A
``text`` block is not run, but its options must exist. ``SMALLER`` has settings that shorten long runs.
"""

import ast
import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

import rgtg
from helpers import docs_world
from helpers.command import verb
from helpers.judge_server import serve
from helpers.served import Served, on_a_socket
from rgtg.cli.main import app
from rgtg.errors import RgtgError
from rgtg.serving.settings import ServeSettings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if "```" in path.read_text()
)
MARKED = 8  # that of the README is run by test_readme.py
_FENCE = re.compile(r"(?:<!-- needs: (?P<needs>.+?) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
# Smaller values of settings, so that the commands of the pages finish in seconds.
SMALLER = {
    "audit": ["bootstrap=100"],
    "compare": ["bootstrap=100", "max_new_tokens=8", "seeds=[0]"],
    "sweep": ["max_new_tokens=8", "bootstrap=100", "tolerance=2"],
    "judge": ["bootstrap=100", "concurrency=2"],
    "doctor": ["tokens=2", "repeats=1", "prompt_length=8"],
    "train": ["train.num_train_epochs=1"],
}
FEW = {"prefixes": 2, "per_candidate": 2, "candidates": 3, "max_new_tokens": 6}  # of roll-outs
TRAINED = set()
pytestmark = pytest.mark.filterwarnings("ignore")  # the pages explain the warnings


@dataclass
class Block:
    page: str
    line: int
    kind: str
    body: str
    needs: str | None


def blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start("body")].count("\n"), found["kind"], found["body"], found["needs"])
        for found in _FENCE.finditer(text)
    ]


ALL = [block for page in PAGES for block in blocks(page)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs-world")
    docs_world.build(folder)
    return folder


@pytest.fixture
def world(built, tmp_path, monkeypatch):
    """A copy of the built folder as working directory, and the URL of a running judge."""
    folder = tmp_path / "world"
    shutil.copytree(built, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(rgtg, "make_rollouts", functools.partial(rgtg.make_rollouts, **FEW), raising=False)
    with serve(lambda shown, _: f"[[{'A' if shown[0] < shown[1] else 'B'}]]") as judge, SERVER:
        monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
        yield folder, judge.url


class Server:
    """The server that a page starts with ``rgtg serve``. It runs until the page ends, on a free port."""

    def __enter__(self):
        self.stack, self.url = contextlib.ExitStack(), None

    def __exit__(self, *_):
        self.stack.close()

    def start(self, words):
        """Serve with these options, on a free port."""
        names = [word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")]
        given = {name: [] for name in names}
        for option, value in zip(words[::2], words[1::2], strict=True):
            given[option.removeprefix("--").replace("-", "_")].append(value)
        flags = {name: values if name == "scorer" else values[0] for name, values in given.items()}
        served = Served.of(ServeSettings.resolve(None, None, flags | {"port": 0}))
        self.stack.callback(served.close)
        self.url = self.stack.enter_context(on_a_socket(served))

    def on_the_page(self, text):
        """Replace the page's address with that of the running server."""
        return text.replace("http://localhost:8000", self.url) if self.url else text


SERVER = Server()


@pytest.mark.parametrize("page", PAGES)
def test_every_example_runs(page, world, hub, monkeypatch, capsys):
    folder, url = world
    for name, branch in (("owner/policy", "v1"), ("owner/scorer", "v1"), ("owner/scorer", "8f3c2d1")):
        source = folder / name.partition("/")[2]
        hub.put(name, {path.name: path.read_bytes() for path in source.iterdir()}, branch=branch, private=True)
    if page == "docs/report.md":
        docs_world.results(folder)
    names = context()
    for block in blocks(page):
        if block.needs is None:
            RUN[block.kind](block, names, url, monkeypatch)


def context():
    """Names that a page's Python examples may use without defining them."""
    policy = rgtg.GuidedPolicy.from_pretrained("policy", scorer="scorer")
    prompts = docs_world.PROMPTS[:2]
    tokenizer = policy.policy.tokenizer
    done = policy.generate(prompts, max_new_tokens=4)
    return {
        "rgtg": rgtg, "guided": policy, "prompts": prompts, "tokenizer": tokenizer, "done": done[0], "many": done,
        "messages": [{"role": "user", "content": "Hi"}], "scorer": rgtg.load_scorer("scorer"),
        "model": policy.policy.model, "prompt_ids": [5, 6], "candidate": 7, "scorer_prefix_ids": [5],
        "scorer_tokenizer": tokenizer, "text_of_candidate": "em", "prompt": "a", "completion": " th",
    }  # fmt: skip


def run_python(block, names, url, monkeypatch):
    body = SERVER.on_the_page(block.body)
    lines = body.split("\n")
    for statement in ast.parse(body).body:
        fails = statement.lineno > 1 and "an error here" in lines[statement.lineno - 2]
        code = compile(ast.Module([statement], []), f"{block.page}:{block.line}", "exec")
        if fails:
            with pytest.raises(RgtgError):
                exec(code, names)
        else:
            exec(code, names)


def run_bash(block, names, url, monkeypatch):
    text = block.body.replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            command(words, f"{block.page}:{block.line}: {line}", url, monkeypatch)


def command(words, where, url, monkeypatch):
    if words[:2] == ["rgtg", "serve"]:
        SERVER.start(words[2:])
    elif words[0] == "curl":
        ran = subprocess.run(map(SERVER.on_the_page, words), capture_output=True, text=True, timeout=60, check=True)
        assert "error" not in json.loads(ran.stdout), f"{where}: {ran.stdout}"
    elif words[0] == "rgtg":
        rgtg_command(words[1:], where, url)
    elif words[0] == "make":
        # -o: do not run set-up; make runs a line with $(MAKE) even with -n
        dry = subprocess.run(
            ["make", "-n", "-o", ".venv/.rgtg-setup", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert dry.returncode == 0, f"{where}: {dry.stderr}"
    elif words[:2] == ["pip", "install"]:
        asked = set(re.findall(r"\[([\w,-]+)\]", words[2])[0].split(","))
        assert asked <= set(extras()), where
    elif words[0] == "export":
        name, _, value = words[1].partition("=")
        if value != "…":
            monkeypatch.setenv(name, value)
    else:
        pytest.fail(f"{where}: cannot run {words[0]} here; mark the block <!-- needs: ... -->")


def extras():
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def rgtg_command(words, where, url):
    words = [url if word in ("URL", "http://localhost:8000/v1") else word for word in words]
    smaller = list(SMALLER.get(words[0], []))
    if (
        words[0] == "generate"
        and "--output" in words
        and not Path(words[words.index("--output") + 1] + ".job.json").exists()
    ):
        Path(words[words.index("--output") + 1]).unlink(missing_ok=True)  # this page did not make this output
    if words[0] == "audit" and "--rollouts" in words:
        smaller += [f"{name}={value}" for name, value in FEW.items()] if "--prompts" in words else []
    if words[0] == "train":
        if tuple(words) in TRAINED:  # another page trained it already
            return
        TRAINED.add(tuple(words))
        shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
        smaller = [] if "own" in words else smaller
    ran = verb()(*words, *(part for setting in smaller for part in ("--set", setting)))
    assert ran.exit_code == 0, f"{where}\n{ran.stderr}{ran.exception!r}"


def parse_json(block, *_):
    for line in block.body.splitlines():
        json.loads(line.replace('{\\"prompt\\": ...}', ""))


def parse_yaml(block, *_):
    assert isinstance(yaml.safe_load(block.body), dict)
    if found := re.match(r"# (\w+\.yaml)", block.body):
        Path(found[1]).write_text(block.body)


def check_options(block, *_):
    for line in block.body.splitlines():
        words = line.split()
        if words[:1] == ["rgtg"]:
            known = {option for parameter in verb_of(words[1:]).params for option in parameter.opts}
            assert set(re.findall(r"--[\w-]+", line)) <= known, f"{block.page}:{block.line}: {line}"


def verb_of(words):
    found = typer.main.get_command(app)
    while hasattr(found, "commands"):
        found, words = found.commands[words[0]], words[1:]
    return found


RUN = {"python": run_python, "bash": run_bash, "json": parse_json, "yaml": parse_yaml, "text": check_options}


def test_every_block_has_a_known_kind():
    assert len(ALL) > 70
    assert not [f"{b.page}:{b.line}" for b in ALL if b.kind not in RUN]


def test_few_blocks_cannot_run_here():
    marked = [f"{block.page}:{block.line} needs {block.needs}" for block in ALL if block.needs]
    assert len(marked) <= MARKED, marked
    assert not [block for block in ALL if block.needs and block.kind in ("text", "json")], "never run anyway"


def test_a_wrong_block_fails(world, monkeypatch):
    _, url = world
    for kind, body in (
        ("bash", "rgtg generate --policy absent --method policy --prompt x\n"),
        ("bash", "make nothing-of-this-name\n"),
        ("bash", "pip install 'rgtg[nothing]'\n"),
        ("python", "import rgtg\nrgtg.load_scorer('absent')\n"),
        ("python", "# wrong (an error here)\nx = 1\n"),
        ("text", "rgtg theory --nothing\n"),
        ("json", "{'a': 1}\n"),
        ("yaml", "- a list\n"),
    ):
        with pytest.raises((Exception, pytest.fail.Exception)):
            RUN[kind](Block("page", 1, kind, body, None), {}, url, monkeypatch)


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="the documentation site needs: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                         env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "WARNING" not in ran.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "quickstart.html" in home
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', home)
    assert not fetched, "the site loads files from other servers"
