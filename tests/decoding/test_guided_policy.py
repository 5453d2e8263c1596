"""GuidedPolicy as users meet it: texts, endings, streams, agreement with transformers, refusals."""

import math
from functools import cache

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from helpers import faults
from helpers.faults import BOOM
from helpers.naive import EOS, info, make_guided, next_log_probs, tiny_scorer
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS
from rgtg.errors import DataError, NonFiniteError, PromptTooLongError, TokenizerMismatchError, UsageError
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer

TEXTS = ["Once upon a time", "Hi", "What is it?"]


def policy():
    return tiny_policy(), tiny_tokenizer()


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "opt"])
def test_greedy_equals_transformers(family, penalty):
    guided = make_guided("policy", family, top_k=None)
    model = guided.policy.model
    prompts = [[0, 5, 9, 12, 33, 40, 8, 21], [0, 44], [0, 7, 30]]
    settings = {"max_new_tokens": 16, "min_new_tokens": 6, "repetition_penalty": penalty}
    done = guided.generate_ids(prompts, temperature=0.0, **settings)
    for prompt, completion in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt])
        stock = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=1,
            no_repeat_ngram_size=0,
            **settings,
        )
        assert completion.token_ids == stock[0, len(prompt) :].tolist()


def test_policy_log_prob_is_of_the_whole_vocabulary():
    guided = make_guided("pargs", top_k=4)
    (done,) = guided.generate(TEXTS[:1], max_new_tokens=5)
    ids, total = guided.policy.tokenizer(TEXTS[0]).input_ids, 0.0
    for token in done.token_ids:
        total += float(next_log_probs(guided.policy.model, ids)[token])
        ids.append(token)
    assert done.policy_log_prob == pytest.approx(total, abs=1e-4)
    assert (done.policy_calls, done.scorer_calls) == (len(done.token_ids),) * 2


@pytest.mark.parametrize("settings", [{"top_k": 4}, {"top_k": 6, "draft": "policy"}])
def test_candidates_log_prob_is_of_the_policy_cut_to_the_candidates(settings):
    guided = make_guided("pargs", beta=2.0, **settings)
    (done,) = guided.generate(TEXTS[:1], max_new_tokens=9, trace=True)
    total = 0.0
    for step in done.trace:
        mass = sum(map(math.exp, step.policy_log_probs))
        total += step.policy_log_probs[step.candidate_ids.index(step.token_id)] - math.log(mass)
    assert done.candidates_log_prob == pytest.approx(total, abs=1e-5)
    (plain,) = guided.generate(TEXTS[:1], max_new_tokens=9, beta=0)
    assert plain.candidates_log_prob == pytest.approx(plain.guided_log_prob, abs=1e-5)
    (best,) = make_guided("best-of-n", top_k=4, n=3).generate(TEXTS[:1], max_new_tokens=9)
    assert best.candidates_log_prob == pytest.approx(best.guided_log_prob, abs=1e-5)
    assert best.candidates_log_prob > best.policy_log_prob


def test_completions_end_at_eos_or_at_their_limit():
    guided = make_guided("policy", top_k=None)
    done = guided.generate_ids([[0, 9]] * 300, max_new_tokens=20, batch_size=300)
    assert {c.finish_reason for c in done} == {"stop", "length"}
    for c in done:
        assert (c.finish_reason == "stop") == (c.token_ids[-1] == EOS)
        assert EOS not in c.token_ids[:-1]
        assert "</s>" not in c.text
        assert c.finish_reason == "stop" or len(c.token_ids) == 20
    long = guided.generate_ids([[0, 9]] * 300, max_new_tokens=20, min_new_tokens=12, batch_size=300)
    assert min(len(c.token_ids) for c in long) >= 12


def test_a_stop_text_ends_and_is_left_out():
    guided = make_guided("pargs", beta=0.5)
    (free,) = guided.generate("Hello", max_new_tokens=24, seed=5, min_new_tokens=24)
    stop = free.text[6:8]
    cut = free.text.find(stop)
    (done,) = guided.generate("Hello", max_new_tokens=24, seed=5, stop=["never there", stop])
    assert (done.text, done.finish_reason) == (free.text[:cut], "stop")
    assert done.token_ids == free.token_ids[: len(done.token_ids)]
    assert len(done.token_ids) < 24
    assert "".join(guided.stream("Hello", max_new_tokens=24, seed=5, stop=[stop])) == free.text[:cut]


def test_a_stop_text_within_the_least_tokens_does_not_count():
    guided = make_guided("pargs", beta=0.5)
    settings = {"max_new_tokens": 24, "min_new_tokens": 12, "seed": 5}
    (free,) = guided.generate("Hello", **settings)
    (done,) = guided.generate("Hello", stop=[free.text[1:3]], **settings)
    assert done.text.startswith(free.text[:11])
    assert "".join(guided.stream("Hello", stop=[free.text[1:3]], **settings)) == done.text


@pytest.mark.parametrize("method", METHODS)
def test_stream_pieces_are_generates_text(method):
    guided = make_guided(method)
    for seed in range(4):
        settings = {"seed": seed, "max_new_tokens": 20, "stop": ["e", "ab"]}
        settings |= {"reward_threshold": 0.5, "min_segment": 1} if method == "cards" else {}
        settings |= {"value_threshold": 0.2} if method == "vfd" else {}
        pieces = list(guided.stream("Hello", **settings))
        assert "".join(pieces) == guided.generate("Hello", **settings)[0].text


def test_texts_and_ids_are_the_same_request():
    guided = make_guided()
    ids = [guided.policy.tokenizer(text).input_ids for text in TEXTS]
    texts = guided.generate(TEXTS, max_new_tokens=6)
    assert [c.token_ids for c in texts] == [c.token_ids for c in guided.generate_ids(ids, max_new_tokens=6)]
    assert [c.prompt for c in texts] == TEXTS
    assert guided.generate([]) == []


def test_chat_messages_go_through_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a:"
    guided = GuidedPolicy.from_pretrained((tiny_policy(), tokenizer), method="policy")
    message = [{"role": "user", "content": "Hi"}]
    (done,) = guided.generate(message, max_new_tokens=3)
    assert done.prompt == "user: Hi\na:"
    assert len(guided.generate([message, message], max_new_tokens=3)) == 2
    with pytest.raises(UsageError, match="no chat template"):
        make_guided().generate(message)


def test_the_same_seed_gives_the_same_completions():
    guided = make_guided()
    once, again = (guided.generate(TEXTS, max_new_tokens=10, seed=9, trace=True) for _ in range(2))
    assert once == again
    assert once != guided.generate(TEXTS, max_new_tokens=10, seed=10, trace=True)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": math.nan}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 exceeds"),
        ({"stop": [""]}, "a stop text must not be empty"),
        ({"max_tokens": 3}, "unknown setting max_tokens"),
        ({"n": 3}, "n applies to cd-blockwise, best-of-n"),
        ({"method": "policy"}, "decodes with pargs"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        make_guided().generate(["Hi"], **settings)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("best-of-n", {"beta": 1.0}, "best-of-n has no beta"),
        ("policy", {"beta": 1.0}, "policy has no beta"),
        ("policy", {"n": 2}, "n applies to cd-blockwise, best-of-n, smc, beam, not to policy"),
        ("pargs", {"beta": math.nan}, "beta"),
        ("pargs", {"top_k": 0}, "top_k"),
        ("prags", {}, "unknown method 'prags'; choose one of policy, pargs"),
    ],
)
def test_unusable_settings_are_refused_when_models_are_loaded(method, settings, message):
    scorer = None if method == "policy" else tiny_scorer()
    with pytest.raises(UsageError, match=message):
        GuidedPolicy.from_pretrained(policy(), scorer, method=method, **settings)


@pytest.mark.parametrize("method", ["pargs-greedy", "args"])
def test_greedy_methods_refuse_a_temperature(method):
    with pytest.raises(UsageError, match="has no temperature"):
        make_guided(method).generate("Hi", temperature=0.7)


def test_unusable_prompts_are_refused():
    guided = make_guided()
    with pytest.raises(DataError, match=r"^the prompt is empty"):
        guided.generate("")
    with pytest.raises(DataError, match="prompt 2 of 2: the prompt is empty"):
        guided.generate(["Hi", ""])
    with pytest.raises(DataError, match="no tokens"):
        guided.generate_ids([[]])
    with pytest.raises(PromptTooLongError, match=r"prompt 2 of 2: .*policy's context of 128 tokens"):
        guided.generate(["Hi", "x" * 100])
    assert guided.generate("x" * 100, max_new_tokens=27)[0].token_ids


def test_a_prompt_over_the_scorers_context_is_refused():
    scorer = tiny_scorer()
    scorer.max_length = 20
    guided = GuidedPolicy.from_pretrained(policy(), scorer)
    with pytest.raises(PromptTooLongError, match="scorer's context of 20"):
        guided.generate("Hello there")


def test_a_missing_scorer_is_refused_and_an_unused_one_warned_about():
    with pytest.raises(UsageError, match="pargs needs a scorer"):
        GuidedPolicy.from_pretrained(policy())
    with pytest.warns(UserWarning, match="policy does not use the scorer"):
        GuidedPolicy.from_pretrained(policy(), tiny_scorer(), method="policy")


def test_a_drafting_model_of_another_tokenizer_is_refused():
    other = tiny_tokenizer()
    other.add_tokens(["Once"])
    draft = Policy(tiny_policy(), other)
    with pytest.raises(TokenizerMismatchError, match=r"'Once upon a time.* to the policy and .* to the scorer"):
        GuidedPolicy.from_pretrained(policy(), tiny_scorer(), draft=draft)


def test_an_encoder_steers_and_ranks():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=64, num_labels=1,
        pad_token_id=1,
    )  # fmt: skip
    encoder = PrefixScorer(BertForSequenceClassification(config), tiny_tokenizer(), info=info(), name="encoder")
    for method in ("pargs", "best-of-n"):
        guided = GuidedPolicy.from_pretrained(policy(), encoder, method=method)
        assert guided.generate("Hi", max_new_tokens=4)[0].score is not None


@pytest.mark.parametrize("objective", ["full-bt", None])
def test_a_scorer_of_whole_texts_is_warned_about_token_wise(objective):
    known = info(objective) if objective else None
    scorer = PrefixScorer(tiny_reward_model(), tiny_tokenizer(), info=known, name="whole")
    with pytest.warns(UserWarning, match="scores of partial sequences are arbitrary.*rgtg audit"):
        GuidedPolicy.from_pretrained(policy(), scorer, method="args")


@pytest.mark.parametrize("part", ["policy", "scorer"])
def test_nan_weights_are_refused(part):
    guided = make_guided()
    model = getattr(guided, part).model
    (model.lm_head if part == "policy" else model.score).weight.fill_(math.nan)
    with pytest.raises(
        NonFiniteError, match="policy gives no finite" if part == "policy" else "scorer tiny returned NaN"
    ):
        guided.generate("Hi")


def test_any_language_model_can_be_genarms_scorer(policy_folder):
    by_name = GuidedPolicy.from_pretrained(str(policy_folder), str(policy_folder), method="genarm", beta=1.0)
    pair = (tiny_policy(), tiny_tokenizer())
    loaded = GuidedPolicy.from_pretrained(pair, pair, method="genarm", beta=1.0)
    settings = {"seed": 5, "max_new_tokens": 8}
    # the policy against itself: π·π^1, which is temperature 1/2
    cool = GuidedPolicy.from_pretrained(pair, method="policy", top_k=None).generate(TEXTS, temperature=0.5, **settings)
    for guided in (by_name, loaded):
        done = guided.generate(TEXTS, **settings)
        assert [c.token_ids for c in done] == [c.token_ids for c in cool]
        assert guided.scorers[0].name == str(policy_folder) or guided is loaded
    with pytest.raises(UsageError, match="language model, not a reward model"):
        GuidedPolicy.from_pretrained(str(policy_folder), str(policy_folder), method="pargs")


@pytest.mark.parametrize("kind", ["prefix", "vocabulary"])
def test_a_scorer_with_fewer_embeddings_than_tokens_is_refused(kind):
    small = tiny_policy() if kind == "vocabulary" else tiny_reward_model()
    small.resize_token_embeddings(60)
    scorer = (
        VocabularyScorer(Policy(small, tiny_tokenizer()), name="small")
        if kind == "vocabulary"
        else PrefixScorer(small, tiny_tokenizer(), info=info(), name="small")
    )
    with pytest.raises(UsageError, match=r"small has embeddings for 60 tokens, and the policy writes 64: .*resize"):
        GuidedPolicy(Policy(*policy()), scorer, method="genarm" if kind == "vocabulary" else "pargs")


def test_embeddings_after_the_last_token_are_no_candidates_where_the_whole_vocabulary_is_scored():
    padded, rows = tiny_policy(), len(tiny_tokenizer())
    padded.resize_token_embeddings(rows + 6)
    padded.get_output_embeddings().weight[rows:] = 0.0
    scorer = VocabularyScorer(Policy(tiny_policy(seed=2), tiny_tokenizer()), name="tight")
    guided = GuidedPolicy(Policy(padded, tiny_tokenizer()), scorer, method="genarm", top_k=5)
    assert all(guided.generate(TEXTS, max_new_tokens=4, seed=1))
    for done in guided.generate(TEXTS, max_new_tokens=4, top_k=None, trace=True):
        assert all(len(step.candidate_ids) == rows for step in done.trace)


# One request of several fails

PROMPTS = [[0, 5, 9, 12, 33], [0, 44, 40, 41], [0, 7, 28, 30, 31], [0, 11, 25, 50]]
CARDS = {"reward_threshold": 0.5, "segment_length": 3, "min_segment": 1, "entropy_threshold": 3.0, "retries": 2}
WAYS = {
    "policy": ("policy", {}, {}),
    "token-wise": ("pargs", {}, {}),
    "token reward": ("genarm", {}, {}),
    "overlapped": ("pargs", {"overlap": True}, {}),
    "drafts of the policy": ("pargs", {"draft": "policy"}, {"draft_length": 2}),
    "drafts of the text": ("pargs", {"draft": "prompt-lookup"}, {"draft_length": 2}),
    "best of n": ("best-of-n", {"n": 2}, {}),
    "blockwise": ("cd-blockwise", {"n": 2}, {"segment_length": 2}),
    "cards": ("cards", {}, CARDS),
}  # fmt: skip
CASES = [(way, part) for way in WAYS for part in ("policy", "scorer") if (way, part) != ("policy", "scorer")]
# The prompt's pass, and a later one; best-of-n calls its scorer only once.
CALLS = [(*case, at) for case in CASES for at in (1, 4) if at == 1 or case != ("best of n", "scorer")]


class Company:
    """Four requests of one method, with a fault of the policy or the scorer, and what each gets alone."""

    def __init__(self, way, part):
        method, made, self.settings = WAYS[way]
        self.guided = make_guided(method, top_k=3, **made)
        self.fault = faults.of_tokens(getattr(self.guided, part))
        self.alone, self.seen = [], []
        for i in range(len(PROMPTS)):
            request = self.requests()[i]
            self.fault.start(None)
            self.guided.complete([request])
            assert request.error is None
            self.alone.append(request.token_ids)
            self.seen.append(self.fault.seen)

    def requests(self):
        texts = list(map(self.guided.policy.tokenizer.decode, PROMPTS))
        settings = {"max_new_tokens": 6, "min_new_tokens": 6} | self.settings
        return self.guided.make_requests(PROMPTS, texts, texts, list(range(len(PROMPTS))), settings)

    def complete(self, mode, bad=None, at=3):
        """Complete them together."""
        self.fault.start(mode, bad, at)
        requests = self.requests()
        self.guided.complete(requests)
        assert self.fault.failed
        return requests

    def require_others(self, requests, victim):
        """All but one have what they get alone."""
        for i, request in enumerate(requests):
            if i != victim:
                assert request.error is None
                assert request.token_ids == self.alone[i]
                assert request.to_completion().finish_reason == "length"


company_of = cache(Company)


@pytest.mark.parametrize("moment", ["prompt", "completion"])
@pytest.mark.parametrize(("way", "part"), CASES)
def test_an_exception_of_one_request_fails_it_alone(way, part, moment):
    company = company_of(way, part)
    said = {token for prompt in PROMPTS for token in prompt}
    victim, bad = faults.victim(
        company.seen, lambda i, token: token in PROMPTS[i] if moment == "prompt" else token not in said
    )
    requests = company.complete("row", bad)
    assert requests[victim].error is BOOM
    company.require_others(requests, victim)
    with pytest.raises(RuntimeError) as raised:
        company.guided.generate_ids(
            PROMPTS, seed=list(range(4)), max_new_tokens=6, min_new_tokens=6, **company.settings
        )
    assert raised.value is BOOM


@pytest.mark.parametrize(("way", "part", "at"), CALLS)
def test_an_exception_that_is_raised_once_fails_nobody(way, part, at):
    company = company_of(way, part)
    company.require_others(company.complete("once", at=at), None)


@pytest.mark.parametrize(("way", "part", "at"), CALLS)
def test_an_exception_that_is_raised_for_all_fails_all(way, part, at):
    requests = company_of(way, part).complete("always", at=at)
    assert [request.error for request in requests] == [BOOM] * len(PROMPTS)


@pytest.mark.parametrize(("way", "part"), CASES)
def test_nan_of_one_request_fails_it_alone(way, part):
    company = company_of(way, part)
    said = {token for prompt in PROMPTS for token in prompt}
    # not in the last pass of an overlapped policy, over candidates of which none is read any further
    last = [max(seen.values()) + (part == "scorer") for seen in company.seen]
    victim, bad = faults.victim(company.seen, lambda i, token: token not in said and company.seen[i][token] < last[i])
    requests = company.complete("nan", bad)
    assert isinstance(requests[victim].error, NonFiniteError)
    company.require_others(requests, victim)


def test_a_bias_of_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(
        UsageError, match="logit_bias: 64 is not a token id; the vocabulary has 64 tokens, from 0 to 63"
    ):
        make_guided("policy").generate(TEXTS[:1], logit_bias={5: 1.0, 64: 1.0})
