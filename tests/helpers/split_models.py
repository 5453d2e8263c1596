"""What tests run in two processes that split models between them: started once, since starting costs most.

Each process leaves what it saw in ``split-RANK.json``, which tests compare with what one process gives.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch

from helpers.command import verb
from rgtg import GuidedPolicy
from rgtg.batch import tasks as work
from rgtg.cli.common import hush_libraries
from rgtg.errors import UsageError
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.loading.tensor_parallel import is_sharded
from rgtg.models.scorers.base import load_scorer, weights_of

PROMPTS = ["so it ", "A long time ago, "]
AUTO = {"tp_plan": "auto"}, {"scorer_tp_plan": "auto"}, {"tp_plan": "auto", "scorer_tp_plan": "auto"}
# Settings of one completion each, with every way of reading a model that is split.
WAYS = {
    "sampled": {},
    "greedy": {"drawn": {"temperature": 0.0}},
    "whole texts": {"token_tree": False},
    "best of n": {"method": "best-of-n", "n": 3},
    "segments": {"method": "cards", "drawn": {"reward_threshold": 1.0}},
    "drafted": {"draft": "policy"},
    "genarm": {"method": "genarm", "scorer": "language-model"},
    "reads text": {"scorer": "other-tokenizer"},
    "head": {"scorer": "head"},
    "next-token head": {"scorer": "vocab-head"},
    "two scorers": {"scorer": ["scorer", "head"], "beta": [1.0, 0.5]},
    "norms of heads": {"policy": "qwen3", "method": "policy", "scorer": None},
    "tied": {"policy": "tied", "method": "policy", "scorer": None},
}
JOB = ["--policy", "policy", "--scorer", "scorer", "--prompts", "prompts.jsonl", "--max-new-tokens", "5",
       "--batch-size", "2"]  # fmt: skip
# Ways whose scorer is no model of its own, or that have none.
JOINED = ("head", "next-token head", "two scorers", "norms of heads", "tied")
REFUSED = {
    "no plan": {"policy": "gpt2", "scorer": None, "method": "policy"},
    "heads": {"policy": "one-head", "scorer": None, "method": "policy"},
    "unknown module": {"tp_plan": {"nonsense": "colwise"}},
    "unfit": {"tp_plan": {"model.layers.*.mlp.up_proj": "rowwise"}},
    "device": {"device": "cpu"},
    "device map": {"device_map": "auto"},
    "overlap": {"overlap": True},
    "adapter": {"tp_plan": None, "scorer": "adapter", "scorer_tp_plan": "auto"},
    "joined adapter": {"scorer": "joined-adapter"},
    "plan of a joined adapter": {"tp_plan": None, "scorer": "joined-adapter", "scorer_tp_plan": "auto"},
    "plan of a head": {"tp_plan": None, "scorer": "head", "scorer_tp_plan": "auto"},
}  # fmt: skip


def models(plan, policy="policy", scorer="scorer", drawn=None, **named):
    return GuidedPolicy.from_pretrained(policy, scorer, **named | plan)


def tokens(guided, way):
    settings = {"max_new_tokens": 4, "temperature": 0.8, "seed": 3} | way.get("drawn", {})
    return [one.token_ids for one in guided.generate(PROMPTS, **settings)]


def plans(name):
    return AUTO[:1] if name in JOINED else AUTO if name in ("sampled", "greedy") else AUTO[2:]


def drawn():
    """Tokens of every way and plan, and fingerprints of the models."""
    found = {}
    for name, way in WAYS.items():
        for plan in plans(name):
            guided = models(plan, **way)
            every = [guided.policy.model, *(scorer.model for scorer in guided.scorers)]
            found[f"{name} {' '.join(plan)}"] = {
                "tokens": tokens(guided, way), "split": [is_sharded(model) for model in every],
                "prints": [fingerprint_weights(model) for model in (every[0], *map(weights_of, guided.scorers))],
            }  # fmt: skip
    return found


def scored():
    """Rewards of whole texts."""
    return load_scorer("scorer", tp_plan="auto").score(PROMPTS, ["ab", "c."])


def refused():
    """What cannot be, in words."""
    said = {}
    for name, way in REFUSED.items():
        try:
            models({}, **{"tp_plan": "auto"} | way)
        except UsageError as error:
            said[name] = str(error)
    return said


def disagreeing():
    """The second process reads another scorer: what is drawn is the first one's."""
    guided = models(AUTO[0])
    if os.environ["RANK"] == "1":
        guided.scorers[0].model.score.weight.mul_(-1)
    return tokens(guided, {})


def said():
    """What one prompt on the command line prints."""
    arguments = ["--policy", "policy", "--scorer", "scorer", "--prompt", PROMPTS[0], "--max-new-tokens", "6"]
    return [verb("generate")(*arguments, "--tp-plan", "auto", *more).stdout for more in ((), ("--json",))]


def completed():
    """A file of prompts that was stopped, then completed: how the runs ended, and which batches each one decoded."""
    real, runs = work.complete_batch, []

    def watched(guided, batch, *rest, **named):
        if not runs[1:] and len(runs[0]) == 2:
            raise KeyboardInterrupt  # what SIGTERM becomes, in all processes
        runs[-1].append([task.index for task in batch.tasks])
        return real(guided, batch, *rest, **named)

    work.complete_batch = watched
    ended = []
    again = ["split.jsonl"]
    for more in (again, again, again, [*again, "--seed", "9"], ["at-once.jsonl"]):
        runs.append([])
        ended.append(verb("generate")(*JOB, "--output", *more, "--json", "--tp-plan=auto", "--scorer-tp-plan=auto"))
    work.complete_batch = real
    return [(one.exit_code, one.stdout, run) for one, run in zip(ended, runs, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    hush_libraries()
    warnings.simplefilter("ignore", UserWarning)
    seen = {part: globals()[part]() for part in sys.argv[1:]}
    Path(f"split-{os.environ['RANK']}.json").write_text(json.dumps(seen))
