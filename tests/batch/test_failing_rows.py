"""A job of eight rows, of which one fails: the others are completed with the tokens that they get alone."""

import json
from functools import cache

import pytest

from helpers import faults
from helpers.encoders import encoder_model, encoder_tokenizer
from helpers.naive import info
from helpers.other_tokenizers import byte_level, reward_model_with
from helpers.scorer_kinds import every_scorer
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.batch.run import run_job
from rgtg.config import GenerateSettings
from rgtg.data.prompts import read_prompt_rows
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.errors import DataError
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.reward_model import PrefixScorer

PROMPTS = ["Once upon a time", "Hi", "What is it?", "The dog", "A cat sat", "No", "Why me", "zz top"]
# What fails: the place, and the method with its settings.
CASES = {
    "policy": ("policy", "policy", {}),
    "separate scorer": ("separate scorer", "pargs", {}),
    "second separate scorer": ("second separate scorer", "pargs", {}),
    "token reward": ("token reward", "farma", {}),
    "state head": ("state head", "pargs", {}),
    "vocabulary head": ("vocabulary head", "pargs", {}),
    "fused adapter": ("fused adapter", "pargs", {}),
    "text scorer's model": ("text scorer's model", "pargs", {}),
    "encoder": ("encoder", "pargs", {}),
    "drafts": ("separate scorer", "pargs", {"draft": "policy", "draft_length": 2}),
    "best of n": ("separate scorer", "best-of-n", {"n": 2}),
    "blockwise": ("separate scorer", "cd-blockwise", {"n": 2, "segment_length": 3}),
}  # fmt: skip
MODES = [(case, mode) for case in CASES for mode in ("row", "nan") if case != "encoder" or mode == "row"]
SHORT = {"max_new_tokens": 8, "min_new_tokens": 8}


def run(guided, folder, prompts, decoding=SHORT, **given):
    """Run a job over a file of these prompts; its completions and failures by line."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    settings = GenerateSettings(policy="p", output=folder / "out.jsonl", batch_size=8, seed=3, force=True, **given)
    result = run_job(settings, decoding, read_prompt_rows(folder / "prompts.jsonl"), guided)
    errors = folder / "out.jsonl.errors.jsonl"
    done = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    failed = [json.loads(line) for line in errors.read_text().splitlines()] if errors.exists() else []
    assert len(done) == result.completions
    assert len(failed) == result.failed
    return {int(row["id"].removeprefix("row-")): row for row in done}, {row["line"]: row for row in failed}


class Rows:
    """A policy and scorers with a fault, and what each row gets alone."""

    def __init__(self, case):
        place, method, settings = CASES[case]
        policy, every = every_scorer()
        names, fault, owner = faults.PLACES[place]
        self.fault = fault(every.get(owner, policy))
        given = dict(settings)
        draft, self.decoding = given.pop("draft", None), SHORT | given
        beta = [1.0] * len(names) if len(names) > 1 else None
        self.guided = GuidedPolicy(
            policy, {name: every[name] for name in names} or None, method=method, top_k=4, beta=beta, draft=draft
        )
        self.guided.generate(PROMPTS[:1], **self.decoding)  # the load-time checks of models are not steps of a row
        self.alone, self.seen = [], []
        for prompt, seed in zip(PROMPTS, self.guided.row_seeds(PROMPTS, 3), strict=True):
            self.fault.start(None)
            (done,) = self.guided.generate([prompt], seed=[seed], **self.decoding)
            self.alone.append(done.token_ids)
            self.seen.append(self.fault.seen)
        prompts = {token for prompt in PROMPTS for token in policy.tokenizer(prompt).input_ids}
        self.victim, self.bad = faults.victim(self.seen, lambda i, value: value not in prompts)


rows_of = cache(Rows)


@pytest.mark.parametrize(("case", "mode"), MODES)
def test_a_row_that_fails_costs_no_other(case, mode, tmp_path):
    rows = rows_of(case)
    rows.fault.start(mode, rows.bad)
    done, failed = run(rows.guided, tmp_path, PROMPTS, rows.decoding)
    assert rows.fault.failed
    rows.fault.start(None)
    assert list(failed) == [rows.victim + 1]
    assert failed[rows.victim + 1]["reason"] == ("error" if mode == "row" else "not a finite number")
    for i, tokens in enumerate(rows.alone):
        if i != rows.victim:
            assert done[i + 1]["token_ids"] == tokens


def crowded(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["[MORE]"]})
    return tokenizer


def text_scorer():
    words = byte_level()
    model = reward_model_with(words)
    return PrefixScorer(model, crowded(words), info=info(), name="scorer")


def encoder(family):
    return PrefixScorer(encoder_model(family), encoder_tokenizer(), info=info(), name="scorer")


# Rows that cannot be read: the policy's tokenizer, the scorer, the prompt, and the reason.
UNREADABLE = {
    "policy": (lambda: crowded(tiny_tokenizer()), lambda: None, "what is [MORE]", "unknown token"),
    "text scorer": (tiny_tokenizer, text_scorer, "what is [MORE]", "unknown token"),
    "bert": (tiny_tokenizer, lambda: encoder("bert"), "word " * 9, "too long"),
    "roberta": (tiny_tokenizer, lambda: encoder("roberta"), "word " * 9, "too long"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_row_that_cannot_be_read_is_bad_before_decoding(case, tmp_path):
    tokenizer, scorer, prompt, reason = UNREADABLE[case]
    steering = scorer()
    guided = GuidedPolicy(Policy(tiny_policy(), tokenizer()), steering, method="pargs" if steering else "policy")
    prompts = [*PROMPTS[:3], prompt, *PROMPTS[3:7]]
    with pytest.raises(DataError, match=rf"cannot use 1 of 8 rows \({reason}: 1\)"):
        run(guided, tmp_path, prompts)
    assert not (tmp_path / "out.jsonl").exists()
    done, failed = run(guided, tmp_path, prompts, on_bad="skip")
    assert [(line, row["reason"]) for line, row in failed.items()] == [(4, reason)]
    others = [one for one in prompts if one != prompt]
    seeds = dict(zip(others, guided.row_seeds(others, 3), strict=True))
    for i, one in enumerate(prompts, start=1):
        if i != 4:
            (alone,) = guided.generate([one], seed=[seeds[one]], **SHORT)
            assert done[i]["token_ids"] == alone.token_ids


@pytest.mark.filterwarnings("ignore:.*is not steered")
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "deberta-v2", "modernbert"])
def test_a_row_that_outgrows_an_encoder_is_completed(family, tmp_path):
    guided = GuidedPolicy(Policy(tiny_policy(), tiny_tokenizer()), encoder(family), method="pargs")
    prompts = [*PROMPTS[:3], "word " * 5, *PROMPTS[3:7]]
    long = {"max_new_tokens": 30, "min_new_tokens": 30}
    done, failed = run(guided, tmp_path, prompts, long)
    assert not failed
    assert done[4]["unscored"] > 0
    for i, (prompt, seed) in enumerate(zip(prompts, guided.row_seeds(prompts, 3), strict=True), start=1):
        (alone,) = guided.generate([prompt], seed=[seed], **long)
        assert (done[i]["token_ids"], done[i]["unscored"]) == (alone.token_ids, alone.unscored)
