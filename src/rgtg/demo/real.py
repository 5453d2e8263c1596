"""``run_real_demo``: a real chat model steered towards friendliness by heads trained on its own replies."""

import itertools
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgtg.config import CompareRun, CompareSettings, DemoSettings
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.demo.friendliness import friendliness
from rgtg.demo.messages import SEEN, UNSEEN, draw_prompts
from rgtg.demo.run import DemoOutput, Stage, as_json, audit, prepare_folder, run_all, silent, train, write_rows
from rgtg.errors import UsageError
from rgtg.evaluation.compare.comparison import assemble
from rgtg.evaluation.compare.grid import MethodRun, expand_runs
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.types.comparison import ComparisonResult, MethodResult
from rgtg.utils.files import write_text

SCORERS = ("full-bt", "prefix-bt")
PROMPTS = 24  # unseen, that every method answers
SEEN_PROMPTS, REPLIES, AUDITED = 150, 4, 0.2  # prompts with labelled replies, replies to each, share for the audit
MAX_NEW_TOKENS, TEMPERATURE, TOP_K, N = 48, 0.7, 5, 8
MIN_PAIRS = 4
BATCH = 120  # replies at once, 600 MB of keys and values: a pass over many rows reads the weights once
# The same for both heads, fixed before the first result.
HEAD: dict[str, Any] = {"trunk": "own", "head": "state", "width": 64, "eval_fraction": 0.2}


def run_real_demo(settings: DemoSettings, policy: Policy, source: str, stage: Stage = silent) -> DemoOutput:
    """Run every stage; results.json is written last.

    Args:
        settings: output folder, seed and sizes.
        policy: a chat model.
        source: where it was loaded from.
        stage: as for `rgtg.demo.run.run_demo`.

    Raises:
        UsageError: the folder contains something that is not an earlier demo.
        MissingExtraError: a part of rgtg[train,demo] is not installed.
        OutputError: the folder cannot be written.
    """
    folder = settings.output
    prepare_folder(folder)
    write_text(folder / "settings.json", settings.model_dump_json(indent=2) + "\n")  # marks the folder as a demo
    seen = draw_prompts(SEEN, settings.seen_prompts or SEEN_PROMPTS, settings.seed)
    unseen = draw_prompts(UNSEEN, settings.prompts or PROMPTS, settings.seed)
    with stage("the policy answers, a rule labels", 1) as step:
        write_pairs(folder, policy, seen, settings.seed)
        step()
    audits, scorers = {}, {}
    for name in SCORERS:
        with stage(f"train and audit the {name} head", 2) as step:
            train(settings, name, source, HEAD | {"states": folder / "states"})  # of both heads
            step()
            scorers[name] = OwnStateScorer.from_pretrained(str(folder / name), policy=policy)
            audits[name] = audit(settings, name, scorers[name], batch_size=16)
            step()
    shutil.rmtree(folder / "states")
    result = compare_methods(settings, policy, scorers, unseen, stage)
    write_text(folder / "results.json", as_json(result))
    return DemoOutput(result, audits)


def write_pairs(folder: Path, policy: Policy, prompts: Sequence[str], seed: int) -> None:
    """Sample replies of the policy, label pairs of finished ones by the Bradley–Terry model, and write them.

    Reply a is preferred to reply b with probability σ(gold a − gold b). Pairs for the audit have prompts of their own.

    Raises:
        UsageError: the policy ends too few replies.
    """
    guided = GuidedPolicy.from_pretrained(policy, method="policy", top_k=TOP_K)
    asked = [prompt for prompt in prompts for _ in range(REPLIES)]
    done = guided.generate(
        list(map(as_chat, asked)), max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, seed=seed, batch_size=BATCH
    )
    label, rows = random.Random(f"labels-{seed}"), []
    for i, prompt in enumerate(prompts):
        replies = [
            c.text for c in done[REPLIES * i : REPLIES * (i + 1)] if c.finish_reason == "stop" and c.text.strip()
        ]
        for one, other in itertools.combinations(dict.fromkeys(replies), 2):
            gap = friendliness(prompt, one, finished=True) - friendliness(prompt, other, finished=True)
            first = label.random() < 1 / (1 + math.exp(-gap))
            chosen, rejected = (one, other) if first else (other, one)
            sides = {"chosen": chosen, "rejected": rejected}
            rows.append(
                {"prompt": as_chat(prompt)} | {k: [{"role": "assistant", "content": v}] for k, v in sides.items()}
            )
    audited = set(prompts[: round(AUDITED * len(prompts))])
    held = [row["prompt"][0]["content"] in audited for row in rows]
    if min(held.count(True), held.count(False)) < MIN_PAIRS:
        finished = sum(c.finish_reason == "stop" for c in done)
        raise UsageError(
            f"the policy ended {finished} of {len(done)} replies within {MAX_NEW_TOKENS} tokens, which leaves "
            f"{len(rows)} pairs: give more --set seen_prompts, or another --policy (an instruction-tuned model)"
        )
    for name, wanted in (("pairs", False), ("audit-pairs", True)):
        write_rows(
            folder / f"{name}.jsonl", [row for row, is_held in zip(rows, held, strict=True) if is_held == wanted]
        )


def as_chat(prompt: str) -> list[dict[str, str]]:
    """A conversation that begins with this message."""
    return [{"role": "user", "content": prompt}]


def method_runs(betas: Sequence[float]) -> list[MethodRun]:
    """The runs to compare: sampled methods, then greedy ones, each with the policy first."""

    def guided(label: str, method: str, scorer: str) -> CompareRun:
        return CompareRun(method=method, scorer=scorer, beta=list(betas), label=label)

    return expand_runs([
        CompareRun(method="policy"),
        CompareRun(method="best-of-n", scorer="full-bt", n=N, label=f"best of {N}"),
        guided("args-sample", "args-sample", "full-bt"),
        guided("pargs", "pargs", "prefix-bt"),
        CompareRun(method="policy", label="greedy: policy", temperature=0.0),
        guided("greedy: args", "args", "full-bt"),
        guided("greedy: pargs", "pargs-greedy", "prefix-bt"),
    ])  # fmt: skip


def compare_methods(
    settings: DemoSettings,
    policy: Policy,
    scorers: Mapping[str, OwnStateScorer],
    unseen: Sequence[str],
    stage: Stage = silent,
) -> ComparisonResult:
    """Answer the unseen prompts with every method and score the replies with the gold reward."""
    folder = settings.output
    runs = method_runs(settings.betas)
    shared = CompareSettings(
        prompts=folder / "prompts.jsonl", methods=[CompareRun(method="policy")], output=folder, seed=settings.seed,
        max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, top_k=TOP_K, batch_size=32,
    )  # fmt: skip
    chats = list(map(as_chat, unseen))
    write_rows(folder / "prompts.jsonl", ({"prompt": chat} for chat in chats))
    with stage("answer unseen prompts", len(runs)) as step:
        results = run_all(
            policy, scorers, runs, chats, shared, gold=friendliness, asked=unseen, file_name=_file_name, progress=step
        )
    return assemble(
        results, reward="friendliness points", prompts=len(unseen),
        made=provenance(
            command="rgtg demo --world smollm", seed=settings.seed, data={},
            settings=settings.model_dump(mode="json") | {"head": HEAD, "temperature": TEMPERATURE, "top_k": TOP_K},
            models={"policy": policy.model},
        ),
    )  # fmt: skip


def _file_name(run: MethodRun) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in run.label.replace("β=", "beta"))


def at_equal_kl(result: ComparisonResult) -> str:
    """One line: the reward of each guided method at the strength whose KL is nearest to that of best-of-n.

    The policy's own KL (of the cut to the likeliest tokens and the temperature) is part of every method's.
    """
    kl = {row.label: row.metrics["kl_nats"].mean for row in result.methods}
    budget = next(kl[row.label] for row in result.methods if row.method == "best-of-n")
    nearest: dict[str, MethodResult] = {}
    for row in result.methods:
        best = nearest.get(row.method)
        if row.beta is not None and (best is None or abs(kl[row.label] - budget) < abs(kl[best.label] - budget)):
            nearest[row.method] = row
    sampled = [row for row in result.methods if row.label == "policy" or row.method == "best-of-n"]
    sampled += [nearest[name] for name in ("args-sample", "pargs") if name in nearest]
    said = (f"{row.label} {row.metrics['reward'].mean:.2f} at {kl[row.label]:.1f} nats" for row in sampled)
    return f"Sampled methods at about equal KL, in {result.reward}: {'; '.join(said)}."
