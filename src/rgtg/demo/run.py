"""``run_demo``: data → policy → two scorers → audits → guided replies → gold rewards, connected by files."""

import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgtg.config import CompareRun, CompareSettings, DemoSettings, TrainSettings
from rgtg.decoding.request import Prompt
from rgtg.demo.gold import gold_reward
from rgtg.demo.policy import train_policy
from rgtg.demo.world import Customer, customers, draw_pair, random_stream, write_reply
from rgtg.errors import MissingExtraError, OutputError, UsageError
from rgtg.evaluation.audit.prefix_accuracy import audit_prefixes
from rgtg.evaluation.compare.comparison import assemble, run_method
from rgtg.evaluation.compare.grid import MethodRun, expand_runs
from rgtg.evaluation.compare.rewards import RewardFunction
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.scorers.base import AnyScorer, CompletionScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.types.audit import AuditResult
from rgtg.types.base import Record
from rgtg.types.comparison import ComparisonResult, MethodResult
from rgtg.types.generation import Completion, PreferencePair
from rgtg.utils.files import make_folder, write_text

SCORERS = ("full-bt", "prefix-bt")
PROMPTS = 100  # unseen, that every method answers
MAX_NEW_TOKENS = 96  # the longest reply of the corpus has about 80
# The same budget for both scorers, fixed before the first result.
SCORER_TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3, "per_device_train_batch_size": 16, "num_train_epochs": 1, "warmup_steps": 0.1,
}  # fmt: skip
OWN_FILES = (
    "corpus.jsonl", "pairs.jsonl", "audit-pairs.jsonl", "prompts.jsonl", "results.json", "report.html", "report.md",
    "report-figures", "settings.json", "policy", "completions", "states", *SCORERS,
    *(f"audit-{name}" for name in SCORERS),
)  # fmt: skip

Stage = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


@dataclass
class DemoOutput:
    """The demo's results, which are also in the output folder."""

    result: ComparisonResult
    audits: dict[str, AuditResult]


@dataclass
class DemoData:
    """The texts of one seed for training, auditing and answering. No message is in two of them."""

    corpus: list[tuple[str, str]]
    pairs: list[PreferencePair]
    audit_pairs: list[PreferencePair]
    unseen: list[Customer]


@contextmanager
def silent(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A stage without progress output."""
    yield lambda: None


def run_demo(settings: DemoSettings, stage: Stage = silent) -> DemoOutput:
    """Run every stage; results.json is written last.

    Args:
        settings: output folder, seed and sizes.
        stage: called with a stage's name and number of steps; returns a context manager, whose value is called at each
            step.

    Raises:
        UsageError: the folder contains something that is not an earlier demo.
        MissingExtraError: a part of rgtg[train] is not installed.
        OutputError: the folder cannot be written.
    """
    folder = settings.output
    prepare_folder(folder)
    write_text(folder / "settings.json", settings.model_dump_json(indent=2) + "\n")  # marks the folder as a demo
    with stage("write the data", 1) as step:
        data = make_data(settings)
        save_data(folder, data)
        step()
    with stage("train the policy", settings.policy_steps) as step:
        train_policy(
            folder / "policy", data.corpus, steps=settings.policy_steps, seed=settings.seed,
            progress=lambda *_: step(),
        )  # fmt: skip
    audits = {}
    for name in SCORERS:
        with stage(f"train and audit the {name} scorer", 2) as step:
            train(settings, name, str(folder / "policy"), {"eval_fraction": 0.0, "train": SCORER_TRAINING})
            step()
            audits[name] = audit(settings, name, str(folder / name), batch_size=32)
            step()
    result = compare_methods(settings, data.unseen, stage)
    write_text(folder / "results.json", as_json(result))
    return DemoOutput(result, audits)


def prepare_folder(folder: Path) -> None:
    """Create the folder, or delete an earlier demo in it. The report goes first, so that none looks complete.

    Raises:
        UsageError: it contains files that no demo wrote.
        OutputError: it cannot be created, cleared or written.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file; give a folder that is new, empty or an earlier demo's")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in held if name not in OWN_FILES]
    if foreign or (held and "settings.json" not in held):
        raise UsageError(
            f"--output {folder} holds {', '.join((foreign or held)[:3])}, which is not an earlier demo's output; give "
            "a folder that is new or empty"
        )
    try:
        for name in sorted(held, key=lambda name: (name != "report.html", name == "settings.json")):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise OutputError(f"cannot clear {folder}: {error.strerror}; choose another --output") from error
    make_folder(folder)


def make_data(settings: DemoSettings) -> DemoData:
    """Generate the corpus, the pairs and the unseen messages from the seed."""
    seed, seen = settings.seed, set[str]()

    def draw(purpose: str, count: int) -> list[Customer]:
        drawn = list(itertools.islice(customers(seed, purpose, avoid=seen), count))
        seen.update(customer.prompt for customer in drawn)
        return drawn

    agents, labels, held_out = (
        random_stream(seed, "agents"),
        random_stream(seed, "labels"),
        random_stream(seed, "audit labels"),
    )
    return DemoData(
        corpus=[(c.prompt, write_reply(c, agents)) for c in draw("corpus", settings.corpus)],
        pairs=[draw_pair(c, labels) for c in draw("pairs", settings.pairs)],
        audit_pairs=[draw_pair(c, held_out) for c in draw("audit", settings.audit_pairs)],
        unseen=draw("unseen", settings.prompts or PROMPTS),
    )


def save_data(folder: Path, data: DemoData) -> None:
    """Write the data in the file formats of the commands."""
    write_rows(folder / "corpus.jsonl", ({"prompt": prompt, "completion": reply} for prompt, reply in data.corpus))
    for name, pairs in (("pairs", data.pairs), ("audit-pairs", data.audit_pairs)):
        write_rows(folder / f"{name}.jsonl", (p.model_dump(include={"prompt", "chosen", "rejected"}) for p in pairs))
    write_rows(folder / "prompts.jsonl", ({"prompt": customer.prompt} for customer in data.unseen))


def train(settings: DemoSettings, objective: str, base: str, more: dict[str, Any]) -> None:
    """Train one scorer, as ``rgtg train`` does.

    Args:
        settings: output folder, which holds the pairs, and seed.
        objective: also the name of the scorer's folder.
        base: folder of the policy.
        more: settings of the training.
    """
    try:
        from rgtg.training.train import train_scorer
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the demo needs {error.name}: pip install 'rgtg[train,report]'") from error
    folder = settings.output
    values = {
        "pairs": str(folder / "pairs.jsonl"), "base": base, "objective": objective, "output": folder / objective,
        "seed": settings.seed,
    }  # fmt: skip
    train_scorer(TrainSettings.model_validate(values | more))


def audit(settings: DemoSettings, name: str, scorer: CompletionScorer | str, *, batch_size: int) -> AuditResult:
    """Audit one scorer on pairs it has not seen, and write the result."""
    folder = settings.output
    result = audit_prefixes(scorer, folder / "audit-pairs.jsonl", batch_size=batch_size, seed=settings.seed)
    (folder / f"audit-{name}").mkdir()
    write_text(folder / f"audit-{name}" / "audit.json", as_json(result))
    return result


def method_runs(betas: Sequence[float]) -> list[MethodRun]:
    """The runs to compare: every method, and the guided ones at each beta."""
    with_betas = {"args": "full-bt", "args-sample": "full-bt", "pargs": "prefix-bt", "pargs-greedy": "prefix-bt"}
    return expand_runs(
        [
            CompareRun(method="policy"),
            CompareRun(method="policy", label="policy (greedy)", temperature=0.0),
            *(CompareRun(method=name, scorer=scorer, beta=list(betas)) for name, scorer in with_betas.items()),
            CompareRun(method="best-of-n", scorer="full-bt", n=10),
        ]
    )


def compare_methods(settings: DemoSettings, unseen: Sequence[Customer], stage: Stage = silent) -> ComparisonResult:
    """Answer the unseen messages with every method and score the replies with the gold reward."""
    folder = settings.output
    policy = load_policy(str(folder / "policy"))
    scorers = {name: PrefixScorer.from_pretrained(str(folder / name)) for name in SCORERS}
    runs = method_runs(settings.betas)
    shared = CompareSettings(
        prompts=folder / "prompts.jsonl", methods=[CompareRun(method="policy")], output=folder, seed=settings.seed,
        max_new_tokens=MAX_NEW_TOKENS, batch_size=32,
    )  # fmt: skip
    prompts = [customer.prompt for customer in unseen]
    with stage("answer unseen messages", len(runs)) as step:
        results = run_all(
            policy, scorers, runs, prompts, shared, gold=gold_reward, asked=unseen, file_name=_file_name, progress=step
        )
    return assemble(
        results, reward="gold points", prompts=len(unseen),
        made=provenance(
            command="rgtg demo", settings=settings.model_dump(mode="json") | {"scorer_training": SCORER_TRAINING},
            seed=settings.seed, data={},
            models={"policy": policy.model} | {name: scorer.model for name, scorer in scorers.items()},
        ),
    )  # fmt: skip


def run_all(
    policy: Policy,
    scorers: Mapping[str, AnyScorer],
    runs: Sequence[MethodRun],
    prompts: Sequence[Prompt],
    shared: CompareSettings,
    *,
    gold: Callable[..., float],
    asked: Sequence[Any],
    file_name: Callable[[MethodRun], str],
    progress: Callable[[], None],
) -> list[MethodResult]:
    """The result of every run; its replies and their points are written to a file each.

    Args:
        policy: that answers.
        scorers: by the names that the runs give.
        runs: to make.
        prompts: that every run answers.
        shared: decoding settings, seed, and the output folder.
        gold: points of one of ``asked``, a reply to it, and whether it ended by itself (``finished``).
        asked: what the prompts are made of.
        file_name: of a run's replies.
        progress: called after each run.
    """
    folder = shared.output / "completions"
    folder.mkdir()
    results = []
    with warnings.catch_warnings():
        # args uses a full-sequence scorer on purpose; the audit shows what that costs
        warnings.filterwarnings("ignore", message=".*scores of partial sequences are arbitrary.*")
        for run in runs:
            reward = _reward_and_save(folder / f"{file_name(run)}.jsonl", gold, asked)
            results.append(run_method(policy, scorers.get(run.scorer or ""), run, prompts, shared, reward))
            progress()
    return results


def _reward_and_save(path: Path, gold: Callable[..., float], asked: Sequence[Any]) -> RewardFunction:
    """The gold reward, which also writes the replies and their points to a file."""

    def reward(done: Sequence[Completion]) -> list[float]:
        rewards = [gold(one, c.text, finished=c.finish_reason == "stop") for one, c in zip(asked, done, strict=True)]
        rows = [c.model_dump(exclude={"trace"}) | {"gold": r} for c, r in zip(done, rewards, strict=True)]
        write_rows(path, rows)
        return rewards

    return reward


def _file_name(run: MethodRun) -> str:
    if isinstance(run.beta, float):
        return f"{run.method}-beta{run.beta:g}"
    return f"{run.method}-greedy" if run.given.get("temperature") == 0 else run.method


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def as_json(record: Record) -> str:
    """A record as a JSON document, in which NaN stays NaN."""
    return json.dumps(record.model_dump(mode="json"), indent=2) + "\n"
