"""Guidance over llama.cpp equals a plain loop over its own outputs, and the torch engine with the same weights."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from helpers.llama_models import require_llama_cpp, tiny_llama_policy
from helpers.naive import info, tiny_scorer
from helpers.other_tokenizers import byte_level, reward_model_with
from helpers.scorer_kinds import lora, noisy
from helpers.tiny_models import VOCAB, tiny_policy, tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS
from rgtg.errors import UsageError
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.heads import StateHead, VocabularyHead
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer

require_llama_cpp()

OWN = {"n": 3, "reward_threshold": 0.5, "value_threshold": 0.0}  # settings that some methods need
TEXTS = ["Once upon a time", "Hi", "What is it?", "a cat sat on a mat. It", "the end", "no", "why not", "to be"]


def torch_policy():
    return Policy(tiny_policy(), tiny_tokenizer())


def head_on(policy, kind="vocab", layer=2):
    made = noisy(StateHead(32, 8) if kind == "state" else VocabularyHead(32, 8, 5, VOCAB))
    about = info().model_copy(update={"trunk": "own", "head": kind, "layer": layer})
    return OwnStateScorer(policy, made, about)


def vocabulary_scorer(objective):
    return VocabularyScorer(Policy(tiny_policy(seed=9), tiny_tokenizer()), info=info(objective), name="tiny")


def text_scorer():
    words = byte_level()
    return PrefixScorer(reward_model_with(words), words, info=info(), name="text")


def scorer_for(method, policy):
    row = METHODS[method]
    if row.scorer is None:
        return None
    if row.vocabulary:
        return vocabulary_scorer(row.scorer)
    return tiny_scorer(objective="cumulative-mse" if row.clip else "prefix-bt")


# -- a plain loop over the library's own outputs --------------------------------------------------------------------


class PlainLoop:
    """One prompt, one pass for each token, numpy formulas."""

    def __init__(self, head, beta, top_k):
        self.model, self.beta, self.top_k = tiny_llama_policy().model, beta, top_k
        self.head = {name: value.numpy().astype(np.float64) for name, value in head.state_dict().items()}

    def scores(self, state):
        h, w = (state.astype(np.float64) - self.head["mlp.mean"]) / self.head["mlp.std"], self.head
        inner = w["mlp.first.weight"] @ h + w["mlp.first.bias"]
        gelu = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        return w["table.weight"] @ (w["mlp.second.weight"] @ gelu + w["mlp.second.bias"]) + w["bias"]

    def guided(self, outputs):
        """Candidates, and their guided probabilities."""
        logits = outputs.final[0].numpy().astype(np.float64)
        log_probs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        ids = np.argsort(-log_probs)[: self.top_k]
        energy = log_probs[ids] + self.beta * self.scores(outputs.hooked[0].numpy())[ids]
        return ids, np.exp(energy - energy.max()) / np.exp(energy - energy.max()).sum()

    def greedy(self, prompt, length):
        runner = self.model.runner(128, 2)
        outputs, tokens = runner.prefill([prompt]), []
        while len(tokens) < length and (not tokens or tokens[-1] != 2):
            ids, chances = self.guided(outputs)
            tokens.append(int(ids[chances.argmax()]))
            outputs = runner.append(torch.tensor([[tokens[-1]]]))
        return tokens

    def distribution(self, prompt, length):
        """Probability of every completion of ``length`` tokens, shorter ones ended by EOS."""
        done, grown = {}, {(): 1.0}
        for _ in range(length):
            before, grown = grown, {}
            for tokens, mass in before.items():
                ids, chances = self.guided(self.model.runner(128, 2).prefill([[*prompt, *tokens]]))
                for token, chance in zip(ids.tolist(), chances.tolist(), strict=True):
                    (done if token == 2 else grown)[(*tokens, token)] = mass * chance
        return done | grown


@pytest.fixture(scope="module")
def guided():
    return GuidedPolicy(tiny_llama_policy(), head_on(tiny_llama_policy()), method="pargs", beta=2.0, top_k=6)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_greedy_tokens_equal_those_of_a_plain_loop(guided, batch_size):
    loop = PlainLoop(guided.scorer.head, 2.0, 6)
    done = guided.generate(TEXTS, temperature=0.0, max_new_tokens=24, batch_size=batch_size)
    unguided = guided.generate(TEXTS, temperature=0.0, max_new_tokens=24, beta=0.0)
    for text, completion in zip(TEXTS, done, strict=True):
        assert completion.token_ids == loop.greedy(tiny_tokenizer()(text).input_ids, 24)
    assert [c.token_ids for c in done] != [c.token_ids for c in unguided], "guidance changes something"


def test_the_distribution_at_temperature_one_is_the_enumerated_one():
    steered = GuidedPolicy(tiny_llama_policy(), head_on(tiny_llama_policy()), method="pargs", beta=1.5, top_k=3)
    loop, draws = PlainLoop(steered.scorer.head, 1.5, 3), 3000
    expected = loop.distribution(tiny_tokenizer()("Hi").input_ids, 2)
    done = steered.generate(["Hi"] * draws, seed=list(range(draws)), max_new_tokens=2, batch_size=100)
    found = Counter(tuple(c.token_ids) for c in done)
    assert set(found) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1)
    chi_square = sum((found[t] - draws * p) ** 2 / (draws * p) for t, p in expected.items())
    assert chi_square < len(expected) + 4 * math.sqrt(2 * len(expected))


def test_what_is_recorded_is_the_guided_probability(guided):
    (done,) = guided.generate(TEXTS[:1], max_new_tokens=6, trace=True)
    loop = PlainLoop(guided.scorer.head, 2.0, 6)
    text, total = tiny_tokenizer()(TEXTS[0]).input_ids, 0.0
    for token in done.token_ids:
        ids, chances = loop.guided(loop.model.runner(128, 2).prefill([text]))
        total += math.log(chances[ids.tolist().index(token)])
        text = [*text, token]
    assert done.guided_log_prob == pytest.approx(total, abs=0.02)
    assert len(done.trace) == len(done.token_ids)


# -- the torch engine with the same weights -------------------------------------------------------------------------


def alike(one, other):
    """Whether two records are the same up to what fp16 keys and values change."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, float):
            assert value == pytest.approx(other[name], abs=0.002), name
        elif name != "trace":
            assert value == other[name], name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_records_of_the_torch_engine(method):
    settings = {"max_new_tokens": 12, "seed": 3, "trace": METHODS[method].unit == "token"}
    settings |= {name: value for name, value in OWN.items() if name in METHODS[method].takes}
    if method == "cards":
        settings |= {"segment_length": 4, "entropy_threshold": 50.0}
    done = []
    for policy in (torch_policy(), tiny_llama_policy()):
        guided = GuidedPolicy(
            policy, scorer_for(method, policy), method=method, top_k=None if method == "genarm" else 4
        )
        done.append(guided.generate(TEXTS[:3], **settings))
    for mine, theirs in zip(*done, strict=True):
        alike(mine.model_dump(), theirs.model_dump())
        for step, other in zip(mine.trace or (), theirs.trace or (), strict=True):
            assert set(step.candidate_ids) == set(other.candidate_ids)


@pytest.mark.parametrize(
    "make",
    [
        lambda policy: head_on(policy, "vocab"),
        lambda policy: head_on(policy, "state"),
        lambda policy: tiny_scorer(),
        lambda policy: vocabulary_scorer("value"),
        lambda policy: text_scorer(),
        lambda policy: [head_on(policy, "vocab"), tiny_scorer()],
    ],
    ids=["vocabulary head", "state head", "separate", "vocabulary scorer", "other tokenizer", "a head and a scorer"],
)
def test_every_kind_of_scorer_steers_as_in_torch(make):
    done = []
    for policy in (torch_policy(), tiny_llama_policy()):
        scorer = make(policy)
        beta = [1.0, 0.5] if isinstance(scorer, list) else 1.0
        guided = GuidedPolicy(policy, scorer, method="pargs", beta=beta, top_k=5)
        done.append(guided.generate(TEXTS[:4], max_new_tokens=10, seed=1))
    for mine, theirs in zip(*done, strict=True):
        alike(mine.model_dump(), theirs.model_dump())


def test_more_forks_than_sequences_are_read_in_parts():
    policy = tiny_llama_policy()
    wide = GuidedPolicy(policy, head_on(policy, "state"), method="pargs", top_k=40)
    alone = wide.generate(TEXTS, max_new_tokens=6, seed=1, batch_size=1)
    together = wide.generate(TEXTS, max_new_tokens=6, seed=1, batch_size=8)
    assert [c.token_ids for c in alone] == [c.token_ids for c in together]
    whole = GuidedPolicy(policy, head_on(policy, "state"), method="pargs", top_k=None)
    assert whole.generate(TEXTS[:1], max_new_tokens=3)[0].token_ids


def test_best_of_n_reads_the_prompt_once(monkeypatch):
    policy, read = tiny_llama_policy(), []
    decode = type(policy.model.context)._decode
    monkeypatch.setattr(
        type(policy.model.context),
        "_decode",
        lambda self: read.append(self._batch.struct.n_tokens) or decode(self),
    )
    guided = GuidedPolicy(policy, tiny_scorer(), method="best-of-n", n=16)
    (request,) = guided.prepare(["a long prompt, which sixteen completions share"], max_new_tokens=4)
    guided.complete([request])
    assert request.error is None
    assert sum(read) <= len(request.prompt_ids) + 16 * 3
    assert policy.model.context.free_sequences == policy.model.context.max_sequences, "all sequences are gone"


def test_streams_join_to_the_text(guided):
    parts = list(guided.stream(TEXTS[0], seed=5, max_new_tokens=12))
    (done,) = guided.generate(TEXTS[:1], seed=5, max_new_tokens=12)
    assert len(parts) > 1
    assert "".join(parts) == done.text


def test_requests_join_and_leave_a_running_batch(guided):
    alone = {text: guided.generate([text], seed=[7], max_new_tokens=10)[0].token_ids for text in TEXTS}
    requests = [guided.prepare([text], seed=[7], max_new_tokens=10)[0] for text in TEXTS]
    runners = guided.factory.token_runners(guided.names)
    from rgtg.decoding.engine.batch import Batch

    batch = Batch(**runners.options)
    waiting = list(requests)
    while waiting or batch.requests:
        if waiting:
            batch.add(waiting[:1], guided._prefill(waiting[:1], runners, False))
            waiting.pop(0)
        batch.step()
    assert {text: r.token_ids for text, r in zip(TEXTS, requests, strict=True)} == alone


# -- what it cannot do ----------------------------------------------------------------------------------------------


def test_what_it_cannot_carry_is_refused_with_the_reason():
    policy = tiny_llama_policy()
    with pytest.raises(UsageError, match=r"layer 1.*--layer final"):
        head_on(policy, layer=1)
    adapter, head = lora(tiny_policy())
    fused = SharedTrunkScorer(torch_policy(), adapter, head, info=info())
    with pytest.raises(UsageError, match="llama-cpp cannot carry LoRA adapter on the policy: the adapter is a part"):
        GuidedPolicy(policy, fused, method="pargs")
    with pytest.raises(UsageError, match="llama-cpp cannot carry drafts"):
        GuidedPolicy(policy, method="policy", draft="prompt-lookup")
    with pytest.raises(UsageError, match="llama-cpp cannot carry overlap"):
        GuidedPolicy(policy, tiny_scorer(), method="pargs", overlap=True)
    with pytest.raises(UsageError, match="this one runs in llama-cpp already"):
        GuidedPolicy.from_pretrained(policy, method="policy", engine="torch")


def test_one_head_scores_texts_on_both_engines():
    scores = [
        head_on(policy).score(TEXTS, [" and so on"] * len(TEXTS)) for policy in (torch_policy(), tiny_llama_policy())
    ]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)
