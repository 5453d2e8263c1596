"""What a track gives to every method: a policy, prompts for tuning and testing, pairs, and a gold reward."""

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stories import OPENINGS

from rgtg import GuidedPolicy
from rgtg.models.loading.policy import load_policy
from rgtg.utils.files import write_text

from .attributes import ATTRIBUTES
from .golds import GOLDS
from .human_data import SOURCES, all_rows, as_judged, as_pair, as_text, by_length, short_chats
from .judge import train as train_judge

MOST_DRAWS = 10  # of as many openings as are needed


@dataclass
class World:
    """One cell of the study: everything that depends on track, gold reward and seed, but not on a method."""

    track: str
    gold_name: str
    seed: int
    policy: str  # folder
    original: str  # the same weights, for TRL
    folder: Path  # of this cell's parts
    tune: list[Any]  # texts or chats
    test: list[Any]
    pairs: list[dict[str, Any]]
    gold: Callable[[list[Any]], list[float]]
    max_new_tokens: int
    batch_size: int
    held_out: list[dict[str, Any]] | None = None  # pairs that nothing is trained on, for the audit
    dtype: str = "float32"  # of the policy
    states: Path | None = None  # where the policy's hidden states of all cells are kept


def write_rows(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def once(path, make):
    """Rows of a part file, which is made if it does not exist."""
    if not path.exists():
        write_rows(path, make())
    return read_rows(path)


def story_prompts(policy, count):
    """Distinct story openings: fixed starts with eight sampled tokens, drawn until there are enough."""
    guided = GuidedPolicy(load_policy(policy, dtype="float32", device="cpu"), method="policy", top_k=None)
    starts = [OPENINGS[i % len(OPENINGS)] for i in range(count)]
    found = {}  # in order
    for draw in range(MOST_DRAWS):
        done = guided.generate(starts, max_new_tokens=8, seed=draw, batch_size=500)
        found |= dict.fromkeys(c.prompt + c.text.rstrip() for c in done if c.finish_reason == "length")
        if len(found) >= count:
            return [{"prompt": text} for text in list(found)[:count]]
    raise ValueError(f"{count} distinct openings are needed, {MOST_DRAWS} draws gave {len(found)}; ask for fewer pairs")


def sample_twice(policy, prompts, tokens):
    """Two completions of every prompt, sampled from the policy's whole vocabulary."""
    guided = GuidedPolicy(load_policy(policy, dtype="float32", device="cpu"), method="policy", top_k=None)
    done = guided.generate([p for p in prompts for _ in range(2)], max_new_tokens=tokens, seed=1, batch_size=500)
    rows = []
    for a, b in zip(done[::2], done[1::2], strict=True):
        if a.text.strip() and b.text.strip() and a.text != b.text:
            reasons = [a.finish_reason, b.finish_reason]
            rows.append({"prompt": a.prompt, "texts": [a.text, b.text], "finish_reasons": reasons})
    return rows


def label(rows, reward, seed):
    """Pairs with Bradley–Terry noise: the first wins with probability σ(difference of rewards)."""
    noise = random.Random(seed)
    pairs = []
    for row in rows:
        first, second = row["texts"]
        p = 1 / (1 + math.exp(reward(row["prompt"], second) - reward(row["prompt"], first)))
        won, lost = (first, second) if noise.random() < p else (second, first)
        pairs.append({"prompt": row["prompt"], "chosen": won, "rejected": lost})
    return pairs


def without_eos(source, folder):
    """A copy of the policy whose tokenizer has no EOS, because stories are cut at a length and never end."""
    if not (folder / "tokenizer_config.json").exists():
        shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        config = json.loads((Path(source) / "tokenizer_config.json").read_text())
        config.pop("eos_token")
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
    return str(folder)


def stories(args, gold_name, seed):
    """A cell of track A: seed s uses the s-th slice of the sampled pairs, so that seeds share no pair."""
    size, work = args.pairs + 200, args.work / "stories"
    policy = without_eos(args.policy, work / "policy")
    count = args.tune + args.test + 3 * size  # three seeds
    everything = once(work / "prompts.jsonl", lambda: story_prompts(policy, count))
    prompts = [row["prompt"] for row in everything]
    tune, test = prompts[: args.tune], prompts[args.tune : args.tune + args.test]
    mine = prompts[args.tune + args.test :][seed * size : (seed + 1) * size]
    rows = once(work / f"samples-s{seed}.jsonl", lambda: sample_twice(policy, mine, args.tokens))
    if len(rows) < args.pairs:  # every seed pays the same
        raise ValueError(f"seed {seed} has {len(rows)} pairs of {args.pairs}: there are three slices, seeds 0 to 2")
    reward = GOLDS[gold_name]
    folder = work / f"{gold_name}-s{seed}"
    pairs = label(rows, reward, seed)[: args.pairs]
    once(folder / "pairs.jsonl", lambda: pairs)
    return World(
        track="stories", gold_name=gold_name, seed=seed, policy=policy, original=args.policy, folder=folder,
        tune=tune, test=test, pairs=pairs, gold=lambda done: [reward(c.prompt, c.text) for c in done],
        max_new_tokens=args.tokens, batch_size=args.batch,
    )  # fmt: skip


def human(args, gold_name, seed):
    """A cell of track B: a source of human preferences; the judge has another trunk and other conversations."""
    parts, work = all_rows(args.data, gold_name), args.work / "human"
    judge = train_judge(
        args.judge, [as_judged(r) for r in parts["judge"]], [as_judged(r) for r in parts["prompts"]],
        work / f"judge-{gold_name}",
    )  # fmt: skip
    prompts = short_chats(parts["prompts"])
    return World(
        track="human", gold_name=gold_name, seed=seed, policy=args.policy, original=args.policy,
        folder=work / f"{gold_name}-s{seed}", tune=by_length(prompts[: args.tune]),
        test=by_length(prompts[args.tune :][: args.test]),
        pairs=[as_pair(row) for row in parts["scorers"]][: args.pairs],
        held_out=[as_pair(row) for row in parts["prompts"]],
        gold=lambda done: judge.score([f"{as_text(c.messages)} {c.text.strip()}" for c in done]),
        max_new_tokens=args.tokens, batch_size=args.batch, dtype="bfloat16", states=args.work / "states",
    )  # fmt: skip


def attributes(args, gold_name, seed):
    """A cell of track C: pairs of the policy's own replies to chats, labelled by an attribute with noise.

    All attributes and seeds label the same replies; the noise of the labels depends on the seed.
    """
    parts, work = all_rows(args.data, "dialogue"), args.work / "attributes"
    asked, kept = (short_chats(parts[name]) for name in ("scorers", "prompts"))
    settings = {"tokens": args.tokens, "batch": args.batch}
    rows = once(work / "samples.jsonl", lambda: chat_twice(args.policy, asked[: args.pairs], **settings))
    held = once(work / "held-out.jsonl", lambda: chat_twice(args.policy, kept[args.tune + args.test :], **settings))
    reward = ATTRIBUTES[gold_name]
    label_chats = lambda rows, seed: [  # noqa: E731
        {k: v if k == "prompt" else [{"role": "assistant", "content": v}] for k, v in pair.items()}
        for pair in label(rows, lambda _, text: reward(text), seed)
    ]
    return World(
        track="attributes", gold_name=gold_name, seed=seed, policy=args.policy, original=args.policy,
        folder=work / f"{gold_name}-s{seed}", tune=by_length(kept[: args.tune]),
        test=by_length(kept[args.tune :][: args.test]),
        pairs=label_chats(rows, seed), held_out=label_chats(held, 1000),
        gold=lambda done: [reward(c.text) for c in done],
        max_new_tokens=args.tokens, batch_size=args.batch, dtype="bfloat16", states=args.work / "states",
    )  # fmt: skip


def chat_twice(policy, chats, tokens, batch):
    """Two replies to every chat, sampled from the policy's ten likeliest tokens; those that are equal are left out."""
    guided = GuidedPolicy(load_policy(policy, dtype="bfloat16", device="cpu"), method="policy", top_k=10)
    done = guided.generate(
        [c for c in by_length(chats) for _ in range(2)], max_new_tokens=tokens, seed=1, batch_size=batch
    )
    return [
        {"prompt": a.messages, "texts": [a.text.strip(), b.text.strip()]}
        for a, b in zip(done[::2], done[1::2], strict=True)
        if a.text.strip() and b.text.strip() and a.text.strip() != b.text.strip()
    ]


def demo(args, gold_name, seed):
    """A cell of the demo's customer letters: a policy trained in a minute, and the demo's gold reward."""
    from rgtg.config import DemoSettings
    from rgtg.demo.gold import gold_reward
    from rgtg.demo.policy import train_policy
    from rgtg.demo.run import make_data

    world = make_data(DemoSettings(seed=seed, prompts=args.tune + args.test))
    folder = args.work / "demo" / f"{gold_name}-s{seed}"
    policy = folder / "policy"
    if not (policy / "model.safetensors").exists():
        train_policy(policy, world.corpus, steps=600, seed=seed)
    customers = {c.prompt: c for c in world.unseen}
    prompts = [c.prompt for c in world.unseen]
    pairs = [p.model_dump(include={"prompt", "chosen", "rejected"}) for p in world.pairs[: args.pairs]]
    return World(
        track="demo", gold_name=gold_name, seed=seed, policy=str(policy), original=str(policy), folder=folder,
        tune=prompts[: args.tune], test=prompts[args.tune :], pairs=pairs,
        max_new_tokens=args.tokens, batch_size=args.batch,
        gold=lambda done: [
            gold_reward(customers[c.prompt], c.text, finished=c.finish_reason == "stop") for c in done
        ],
    )  # fmt: skip


MAKERS = {"stories": stories, "human": human, "attributes": attributes, "demo": demo}
GOLD_NAMES = {
    "stories": list(GOLDS), "human": list(SOURCES), "attributes": list(ATTRIBUTES), "demo": ["letter"],
}  # fmt: skip
