"""Measures one row of the study: completes prompts and writes reward, KL and cost of every prompt to a part file."""

import json
import math
import time
import warnings
from functools import cache

import torch

from rgtg import GuidedPolicy
from rgtg.decoding.methods import find_method
from rgtg.evaluation.metrics import distinct_n
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.tokenization.encoding import encode_prompt
from rgtg.tokenization.padding import pad_right
from rgtg.utils.files import write_text

from . import scorers
from .rows import REAL, key_of

FORMAT = 1
FRONTIER = 200  # test prompts on which the values that were not chosen are measured


def settings_of(world, row, value):
    """Everything that determines the completions, except prompts and seeds."""
    settings = {"method": row.method, "top_k": 10} | row.settings
    if row.tuned:
        settings["tuned_policy"] = value
    elif row.knob != "beta":
        settings[row.knob] = value
    elif value is not None:
        more = len(row.scorers) - 1
        settings["beta"] = [value] + [2 * value] * more if more > 0 else value
    return settings | {"scorer": row.scorer, "max_new_tokens": world.max_new_tokens}


def file_of(key):
    return f"{key.replace(' ', '_').replace('/', '-')}.json"


def part_of(world, row, value, split):
    return world.folder / "rows" / split / file_of(key_of(row, value))


def measured(world, row, value, split, models):
    """The row's figures on the prompts of a split, from its part file if there is one."""
    path = part_of(world, row, value, split)
    if path.exists():
        return json.loads(path.read_text())
    prompts = {"tune": world.tune, "test": world.test, "frontier": world.test[:FRONTIER]}[split]
    part = measure(world, row, value, prompts, models)
    part["split"] = split
    write_text(path, json.dumps(part) + "\n")
    return part


def measure(world, row, value, prompts, models):
    """Complete the prompts and measure; lists have one figure per prompt."""
    settings = settings_of(world, row, value)
    policy = models.policy(world, value if row.tuned else None)
    scorer = models.scorers(world, row, policy)
    given = {k: v for k, v in settings.items() if k not in ("scorer", "max_new_tokens", "temperature", "tuned_policy")}
    if given.get("reward_threshold") == "best-of-n":
        given["reward_threshold"] = settings["reward_threshold"] = models.threshold(world)
    made = {k: given.pop(k) for k in ("method", "beta", "top_k", "n") if k in given}
    sampled = {k: settings[k] for k in ("temperature",) if k in settings}
    batch = world.batch_size if find_method(row.method).unit == "token" else max(1, world.batch_size // 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # full-sequence scorers guide token by token on purpose
        guided = GuidedPolicy(policy, scorer, **made)
        start = time.perf_counter()
        done = guided.generate(
            prompts, seed=world.seed, batch_size=batch, max_new_tokens=world.max_new_tokens, **sampled, **given
        )
        seconds = time.perf_counter() - start
    original = original_log_probs(models.policy(world, None), done) if row.tuned else [c.policy_log_prob for c in done]
    bytes_of = models.bytes_of(world, row)
    return {
        "format": FORMAT, "commit": commit(), "cpu": cpu(), "row": row.name, "key": key_of(row, value), "value": value,
        "settings": settings,
        "seed": world.seed, "rewards": rounded(world.gold(done)), "proxy": rounded(models.proxy(world, done)),
        "perplexity": round(math.exp(-sum(original) / sum(len(c.token_ids) for c in done)), 3),
        "kl": rounded([c.guided_log_prob - p + c.selection_nats for c, p in zip(done, original, strict=True)]),
        "kl_cut": None if row.tuned else rounded(
            [c.guided_log_prob - c.candidates_log_prob + c.selection_nats
             for c in done if c.candidates_log_prob is not None]),
        "tokens": [len(c.token_ids) for c in done], "stopped": sum(c.finish_reason == "stop" for c in done),
        "distinct_2": round(sum(distinct_n([c.token_ids], 2) for c in done) / len(done), 4),
        "policy_calls": sum(c.policy_calls for c in done), "scorer_calls": sum(c.scorer_calls for c in done),
        "policy_bytes": bytes_of[0], "scorer_bytes": bytes_of[1], "seconds": round(seconds, 2),
        "texts": [c.text for c in done], "samples": [{"prompt": c.prompt, "text": c.text} for c in done[:2]],
    }  # fmt: skip


@cache
def commit():
    """The commit of the checkout when the process started."""
    return provenance(command="", settings={}, seed=None, models={}, data={}).git_commit


@cache
def cpu():
    """What kernels are chosen by: on another kind of processor, bf16 rounds otherwise, and draws differ."""
    able = torch.cpu.get_capabilities()
    chosen_by = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "avx10_2")
    return " ".join([able["architecture"], *(name for name in chosen_by if able.get(name))])


def rounded(values):
    return [round(float(v), 4) for v in values]


@torch.inference_mode()
def original_log_probs(policy, done, batch=64):
    """Log-probability, in nats, of each completion's tokens under the original policy (whole vocabulary, T = 1)."""
    found = []
    encoded = [(encode_prompt(policy.tokenizer, c.prompt), c.token_ids) for c in done]
    for start in range(0, len(encoded), batch):
        rows = encoded[start : start + batch]
        ids, mask = pad_right([prompt + tokens for prompt, tokens in rows], 0, "cpu")
        logits = policy.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        for i, (prompt, tokens) in enumerate(rows):
            found.append(float(each[i, len(prompt) - 1 : len(prompt) - 1 + len(tokens)].sum()))
    return found


class Models:
    """Loads each model once; the models of a cell are dropped when the next cell begins."""

    def __init__(self):
        self.loaded, self.cell = {}, None

    def _once(self, world, key, make):
        if self.cell != world.folder:
            self.loaded, self.cell = {}, world.folder
        if key not in self.loaded:
            self.loaded[key] = make()
        return self.loaded[key]

    def policy(self, world, tuned):
        folder = world.policy if tuned is None else str(scorers.fine_tune(world, tuned))
        return self._once(world, f"policy {tuned}", lambda: load_policy(folder, dtype=world.dtype, device="cpu"))

    def scorers(self, world, row, policy):
        found = [self._once(world, name, lambda name=name: scorers.load(world, policy, name)) for name in row.scorers]
        return found[0] if len(found) == 1 else found or None

    def proxy(self, world, done):
        """The reward of the separate full-bt scorer, which best-of-n, ARGS and RLOO maximise; none on real models."""
        if world.track in REAL:
            return []
        scorer = self._once(
            world, "proxy", lambda: PrefixScorer.from_pretrained(str(scorers.train(world, "full-bt")), device="cpu")
        )
        texts = [c.text if c.text.strip() else " ." for c in done]
        finished = [c.finish_reason == "stop" for c in done]
        return scorer.score([c.prompt for c in done], texts, finished=finished, batch_size=64)

    def threshold(self, world):
        """The reward threshold of CARDS: the mean full-bt reward of best-of-4 on the tuning prompts."""
        from .rows import BY_NAME

        part = measured(world, BY_NAME["best-of-n"], 4, "tune", self)
        return round(sum(part["proxy"]) / len(part["proxy"]), 3)

    def bytes_of(self, world, row):
        """Bytes of weights read by one call of the policy, and by one call of the scorer."""
        read = [sum(p.stat().st_size for p in scorers.train(world, n).glob("*.safetensors")) for n in row.scorers]
        model = self.policy(world, None).model
        return sum(p.numel() * p.element_size() for p in model.parameters()), sum(read)
