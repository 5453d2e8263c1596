"""The page's pure functions under node: their unit tests, and the guided distribution against the decoder's."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from helpers.naive import info
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.sampling import guided_log_probs
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.reward_model import PrefixScorer

HERE = Path(__file__).parent / "page"
STATIC = Path(__file__).parents[2] / "src/rgtg/serving/static"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the modules and their tests, which node loads as modules."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    made = tmp_path_factory.mktemp("page")
    for path in (*STATIC.glob("*.js"), *HERE.glob("*.js")):
        shutil.copy(path, made)
    (made / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    return made


def node(folder, *arguments, given=None):
    return subprocess.run(
        ["node", *arguments], cwd=folder, input=given, capture_output=True, text=True, timeout=120, encoding="utf-8"
    )


def test_the_javascript_unit_tests_pass(folder):
    done = node(folder, "--test", "--test-reporter=tap", "unit.test.js")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^# pass (1[5-9]|[2-9]\d)$", done.stdout, re.MULTILINE), done.stdout[-500:]


def test_the_report_and_the_export_inline_the_same_script(folder):
    from rgtg.report.trace_viewer import viewer_script

    parts = json.loads((STATIC / "viewer.json").read_text(encoding="utf-8"))
    (folder / "bundle.js").write_text(
        'import { readFileSync } from "node:fs";\nimport { bundle } from "./files.js";\n'
        "process.stdout.write(bundle(process.argv.slice(2).map((name) => readFileSync(name, 'utf8'))));\n",
        encoding="utf-8",
    )
    assert node(folder, "bundle.js", *parts["scripts"]).stdout == viewer_script()
    (folder / "whole.cjs").write_text(viewer_script(), encoding="utf-8")
    assert node(folder, "--check", "whole.cjs").returncode == 0


def scorer(seed, objective="prefix-bt"):
    return PrefixScorer(tiny_reward_model(seed=seed), tiny_tokenizer(), info=info(objective), name=f"scorer {seed}")


CASES = {
    "pargs": ("pargs", [2.0], {}),
    "warm": ("pargs", [1.5], {"temperature": 0.7}),
    "cold": ("pargs", [1.5], {"temperature": 0.0}),
    "nucleus": ("pargs", [1.0], {"top_p": 0.6}),
    "greedy": ("pargs-greedy", [1.0], {}),
    "clipped": ("rad", [3.0], {}),
    "gated": ("pargs", [2.0], {"entropy_gate": 3.2}),
    "two scorers": ("pargs", [2.0, -0.5], {"temperature": 1.3}),
    "alone": ("policy", [], {"temperature": 0.8}),
}


def traced(method, betas, settings, top_k=6):
    """Steps of one completion, and its decoding rule as the page gets it."""
    scorers = [scorer(i + 1, "cumulative-mse" if method == "rad" else "prefix-bt") for i in range(len(betas))]
    guided = GuidedPolicy(
        Policy(tiny_policy(), tiny_tokenizer()), scorers or None, method=method, top_k=top_k,
        beta=(betas if len(betas) > 1 else betas[0]) if betas else None,
    )  # fmt: skip
    (done,) = guided.generate(
        ["Once upon a time"], seed=3, max_new_tokens=12, min_new_tokens=12, trace=True, **settings
    )
    rule = {
        "scorers": [one.name for one in scorers], "betas": betas, "temperature": settings.get("temperature", 1.0),
        "greedy": method == "pargs-greedy", "clip": method == "rad",
    }  # fmt: skip
    return done.trace, rule


def recomputed(folder, steps, rules):
    """The page's results for steps."""
    read = [json.loads(step.model_dump_json()) for step in steps]
    pairs = [{"step": step, "rule": rule} for step, rule in zip(read, rules, strict=True)]
    answered = node(folder, "recompute.js", given=json.dumps(pairs))
    assert answered.returncode == 0, answered.stderr
    return json.loads(answered.stdout)


def test_a_recomputed_step_equals_the_decoders_step(folder):
    made = {name: traced(*case) for name, case in CASES.items()}
    steps = [step for trace, _ in made.values() for step in trace]
    names = [name for name in made for _ in range(12)]
    found = recomputed(folder, steps, [made[name][1] for name in names])
    for name, one, step in zip(names, found, steps, strict=True):
        assert one["agrees"], name
        assert [float(v) for v in one["guided"]] == pytest.approx(step.guided_log_probs, abs=1e-4), name
    assert {step.scores is None for step in made["gated"][0]} == {True, False}
    assert any(-torch.inf in step.policy_log_probs for step in made["nucleus"][0])


def test_a_step_at_another_beta_equals_guided_log_probs(folder):
    steps, rule = traced("pargs", [2.0], {"temperature": 0.7})
    found = recomputed(folder, steps, [rule | {"betas": [0.3]}] * len(steps))
    for one, step in zip(found, steps, strict=True):
        policy, scores = torch.tensor([step.policy_log_probs]), torch.tensor([step.scores])
        expected = guided_log_probs(policy, scores, 0.3, 0.7)[0].tolist()
        assert [float(v) for v in one["guided"]] == pytest.approx(expected, abs=1e-4)
    assert not all(one["agrees"] for one in found)


def test_no_module_creates_markup_or_code_from_text():
    """No module turns text into markup or code, and the page has nothing inline that its CSP forbids."""
    markup = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\(|new Function"
    )
    for path in STATIC.glob("*.js"):
        assert not markup.search(path.read_text(encoding="utf-8")), path.name
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|https?://", page)


def test_modules_of_the_bundle_are_ordered_and_share_no_names():
    parts = json.loads((STATIC / "viewer.json").read_text(encoding="utf-8"))
    seen = {}
    for name in parts["scripts"]:
        source = (STATIC / name).read_text(encoding="utf-8")
        for declared in re.findall(r"^(?:export )?(?:async )?(?:function|class|const|let) (\w+)", source, re.MULTILINE):
            assert declared not in seen, f"{declared} is in {seen[declared]} and {name}: one script holds both"
            seen[declared] = name
        used = set(re.findall(r'from "\./(\w+\.js)"', source))
        assert used <= set(parts["scripts"][: parts["scripts"].index(name)]), f"{name} comes before what it needs"
        assert "</script" not in source
    for path in STATIC.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name
