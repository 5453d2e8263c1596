"""Embeddings padded beyond the tokenizer: padding is never a candidate, and changes nothing else."""

import copy
from functools import cache

import pytest
import torch

from helpers.naive import info, next_log_probs
from helpers.other_tokenizers import byte_level, encoder_with, reward_model_with
from helpers.scorer_kinds import lora, noisy
from helpers.tiny_models import VOCAB, padded, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.decoding.engine.prompt_log_probs import PromptLogProbs
from rgtg.decoding.engine.rollouts import next_candidates, roll_out
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.runners.model_runner import make_runner
from rgtg.errors import UnknownTokenError, UsageError
from rgtg.models.loading.policy import Policy
from rgtg.models.ops.lm_head import policy_logits
from rgtg.models.scorers.heads import StateHead, VocabularyHead
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer

TEXTS = ["Once upon a time", "Hi", "What is it?"]
FAMILIES = ["llama", "qwen2", "gpt2", "opt", "gpt_neox", "mistral"]
POLICY, SCORER, DRAFT = VOCAB + 16, VOCAB + 5, VOCAB + 9  # rows of each embedding
CARDS = {"reward_threshold": 0.5, "segment_length": 3, "min_segment": 1, "entropy_threshold": 9.0, "retries": 2}
# How to decode: arguments of GuidedPolicy, and settings of the call.
WAYS = {
    "unguided": ({"method": "policy", "top_k": None}, {}),
    "unguided, likeliest": ({"method": "policy", "top_k": None}, {"temperature": 0.0}),
    "nucleus": ({"method": "policy", "top_k": None}, {"top_p": 0.8}),
    "penalty": ({"method": "policy", "top_k": None}, {"repetition_penalty": 1.4}),
    "token-wise": ({"method": "pargs", "top_k": 6}, {}),
    "greedy": ({"method": "pargs-greedy", "top_k": 6}, {}),
    "whole vocabulary": ({"method": "pargs", "top_k": None}, {}),
    "more than there are": ({"method": "pargs", "top_k": 500}, {}),
    "token reward": ({"method": "genarm", "top_k": None}, {}),
    "best of n": ({"method": "best-of-n", "n": 3}, {}),
    "blockwise": ({"method": "cd-blockwise", "n": 2}, {"segment_length": 2}),
    "cards": ({"method": "cards"}, CARDS),
    "overlapped": ({"method": "pargs", "top_k": 6, "overlap": True}, {}),
    "drafts of the policy": ({"method": "pargs", "top_k": 6, "draft": "policy"}, {"draft_length": 2}),
    "drafts of the text": ({"method": "pargs", "top_k": 6, "draft": "prompt-lookup"}, {"draft_length": 2}),
    "drafts of a model": ({"method": "pargs", "top_k": 6, "draft": "model"}, {"draft_length": 2}),
    "drafts of a model, unguided": ({"method": "policy", "top_k": None, "draft": "model"}, {"draft_length": 2}),
    "state head": ({"method": "pargs", "top_k": 6, "scorer": "state"}, {}),
    "vocabulary head": ({"method": "farma", "top_k": 6, "scorer": "vocab"}, {}),
    "adapter": ({"method": "pargs", "top_k": 6, "scorer": "adapter"}, {}),
    "text": ({"method": "pargs", "top_k": 6, "scorer": "text"}, {}),
    "encoder": ({"method": "pargs", "top_k": 6, "scorer": "encoder"}, {}),
}  # fmt: skip
# Every family decodes in these ways; llama in all.
SOME = ["unguided", "unguided, likeliest", "token-wise", "whole vocabulary"]
CASES = [("llama", way) for way in WAYS] + [(family, way) for family in FAMILIES[1:] for way in SOME]


def scorer_of(kind, family, policy, rows):
    if kind == "genarm":
        return VocabularyScorer(Policy(padded(tiny_policy(family, seed=9), rows), tiny_tokenizer()), info=info("farma"))
    if kind in ("state", "vocab"):
        head = noisy(StateHead(32, 8) if kind == "state" else VocabularyHead(32, 8, 5, VOCAB))
        about = info("farma" if kind == "vocab" else "prefix-bt")
        return OwnStateScorer(policy, head, about.model_copy(update={"trunk": "own", "head": kind, "layer": 2}))
    if kind == "adapter":
        return SharedTrunkScorer(policy, *lora(policy.model), info=info())
    if kind in ("text", "encoder"):
        words = byte_level()
        return PrefixScorer((encoder_with if kind == "encoder" else reward_model_with)(words), words, info=info())
    return PrefixScorer(padded(tiny_reward_model(family), rows), tiny_tokenizer(), info=info(), name="scorer")


def guided_of(family, way, rows=(VOCAB, VOCAB, VOCAB)):
    """The policy, its scorer and its draft with these numbers of embeddings."""
    made = dict(WAYS[way][0])
    policy = Policy(padded(tiny_policy(family), rows[0]), tiny_tokenizer())
    kind = made.pop("scorer", made["method"])
    scorer = None if made["method"] == "policy" else scorer_of(kind, family, policy, rows[1])
    if made.get("draft") == "model":
        made["draft"] = Policy(padded(tiny_policy(family, seed=3), rows[2]), tiny_tokenizer())
    return GuidedPolicy(policy, scorer, **made)


@pytest.mark.parametrize(("family", "way"), CASES)
def test_padding_changes_no_token(family, way):
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "seed": 5} | WAYS[way][1]
    tight = guided_of(family, way).generate(TEXTS, **settings)
    loose = guided_of(family, way, (POLICY, SCORER, DRAFT))
    done = loose.generate(TEXTS, **settings)
    assert [one.token_ids for one in done] == [one.token_ids for one in tight]
    assert all(token < VOCAB for one in done for token in one.token_ids)
    for one, other in zip(done, tight, strict=True):
        assert one.guided_log_prob == pytest.approx(other.guided_log_prob, abs=1e-3)
        # log π is the model's own, padding included, as transformers computes it
        ids, total = list(tiny_tokenizer()(one.prompt).input_ids), 0.0
        for token in one.token_ids:
            total += float(next_log_probs(loose.policy.model, ids)[token])
            ids.append(token)
        assert one.policy_log_prob == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_of_these_tests_would_write_padding(family):
    model = padded(tiny_policy(family), POLICY)
    ids = torch.tensor([tiny_tokenizer()(TEXTS[0]).input_ids])
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=1)
    assert int(drawn.max()) >= VOCAB


@cache
def tokenizer_with_holes():
    """As ``tiny_tokenizer``, without tokens for ids 20 to 22, and with one more at the end."""
    from tokenizers import Tokenizer, models

    raw = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = {token: i for token, i in raw.get_vocab().items() if not 20 <= i <= 22} | {"%": 70}
    raw.model = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")
    made = copy.copy(tiny_tokenizer())
    return type(made)(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@pytest.mark.parametrize("top_k", [None, 5])
def test_ids_between_the_tokens_are_no_candidates_either(top_k):
    model = padded(tiny_policy(), POLICY)
    model.get_output_embeddings().weight[20:23] = model.get_output_embeddings().weight[VOCAB : VOCAB + 3]
    policy = Policy(model, tokenizer_with_holes())
    assert (policy.vocabulary.size, policy.vocabulary.missing) == (71, (20, 21, 22, *range(64, 70)))
    guided = GuidedPolicy(policy, method="policy", top_k=top_k)
    for temperature in (0.0, 1.0):
        for done in guided.generate(TEXTS, max_new_tokens=20, temperature=temperature):
            assert set(done.token_ids) <= set(tokenizer_with_holes().get_vocab().values())


def test_roll_outs_have_no_padding():
    policy = Policy(padded(tiny_policy(), POLICY), tiny_tokenizer())
    ids, _ = next_candidates(policy, [0, 5, 9], top_k=500)
    assert sorted(ids) == list(range(VOCAB))
    for group in roll_out(policy, "", [0, 5, 9], [], ids[:4], n=3, max_new_tokens=8, seed=0):
        assert all(token < VOCAB for request in group for token in request.token_ids)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_scorer_or_draft_without_an_embedding_for_some_token_is_refused(family):
    with pytest.raises(UsageError, match=r"scorer has embeddings for 63 tokens, and the policy writes 64: .*resize"):
        guided_of(family, "token-wise", (POLICY, VOCAB - 1, VOCAB))
    with pytest.raises(UsageError, match=r"the drafting model has embeddings for 63 tokens, and the policy writes 64"):
        guided_of(family, "drafts of a model", (POLICY, VOCAB, VOCAB - 1))
    # a policy that cannot write the token does not need a scorer that reads it
    assert guided_of(family, "token-wise", (VOCAB - 1, VOCAB - 1, VOCAB)).generate(["Hi"], max_new_tokens=3)


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_with_a_token_without_embedding_is_refused(way):
    guided = guided_of("llama", way, (POLICY, SCORER, DRAFT))
    settings = {"max_new_tokens": 2} | WAYS[way][1]
    for bad in (POLICY, -1):
        with pytest.raises(UnknownTokenError, match=rf"prompt 2 of 2: the text has token {bad}, and the policy has"):
            guided.generate_ids([[0, 5], [0, bad]], **settings)
    reads_tokens = isinstance(guided.scorer, PrefixScorer | VocabularyScorer)
    if reads_tokens or isinstance(guided.draft, Policy):
        reader = "the scorer" if reads_tokens else "the drafting model"
        with pytest.raises(UnknownTokenError, match=rf"the text has token {DRAFT}, and {reader}"):
            guided.generate_ids([[0, 5, DRAFT]], **settings)
    else:
        assert guided.generate_ids([[0, 5, DRAFT]], **settings)


def test_the_likeliest_tokens_of_an_echoed_prompt_are_tokens():
    policy = Policy(padded(tiny_policy(), POLICY), tiny_tokenizer())
    runner = make_runner(policy.model, policy_logits, 0)
    ids = [0, 5, 9, 12, 33]
    steps = PromptLogProbs(ids, 100, policy.vocabulary).read(runner, len(ids))
    for i, step in enumerate(steps):
        assert sorted(step.candidate_ids) == list(range(VOCAB))
        own = step.policy_log_probs[step.candidate_ids.index(ids[i + 1])]
        assert own == pytest.approx(float(next_log_probs(policy.model, ids[: i + 1])[ids[i + 1]]), abs=1e-4)
