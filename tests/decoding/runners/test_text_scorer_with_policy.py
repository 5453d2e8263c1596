"""Decoding with a scorer of another tokenizer: distributions, batches, methods, what is refused, what is counted."""

import math
from collections import Counter

import pytest
import torch

from helpers.naive import info, next_log_probs
from helpers.other_tokenizers import byte_level, encoder_with, policy_with, reward_model_with, tokenizer_of
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.request import derive_seed
from rgtg.decoding.runners.text_scorer_runner import CachedTextScorerRunner, TextScorerRunner
from rgtg.errors import PromptTooLongError, TokenizerMismatchError, UsageError
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer
from rgtg.tokenization.encoding import decode_completion

EOS = 1
PROMPTS = ["Once upon a time, there was a", "The dog's name was", "中文"]


def policy(kind="byte-level", **more):
    tokenizer = tokenizer_of(kind)
    return Policy(policy_with(tokenizer, **more), tokenizer)


def scorer(kind="llama", trained=None, **more):
    tokenizer = tokenizer_of(kind)
    if kind == "word-piece":
        return PrefixScorer(encoder_with(tokenizer, **more), tokenizer, info=trained or info(), name="encoder")
    return PrefixScorer(reward_model_with(tokenizer, **more), tokenizer, info=trained or info(), name="other")


def distribution(guided, prompt, length, *, beta, k):
    """Probability of every completion of at most ``length`` tokens, by the definition: each candidate's text anew."""
    ids = guided.policy.tokenizer(prompt).input_ids
    done, open_ = {}, {(): 0.0}
    for _ in range(length):
        grown = {}
        for said, before in open_.items():
            log_probs = next_log_probs(guided.policy.model, [*ids, *said])
            tokens = log_probs.argsort(descending=True)[:k].tolist()
            texts = [decode_completion(guided.policy.tokenizer, ids, [*said, t]) for t in tokens]
            read = CrossTokenizerScorer(
                PrefixScorer(guided.scorer.model, guided.scorer.tokenizer, info=guided.scorer.info)
            )
            scores = [read.score([prompt], [text], finished=t == EOS)[0] for text, t in zip(texts, tokens, strict=True)]
            energy = [float(log_probs[t]) + beta * s for t, s in zip(tokens, scores, strict=True)]
            total = math.log(sum(map(math.exp, energy)))
            for t, e in zip(tokens, energy, strict=True):
                (done if t == EOS else grown)[(*said, t)] = before + e - total
        open_ = grown
    return {said: math.exp(log_prob) for said, log_prob in (done | open_).items()}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["llama", "byte-level-cl100k", "word-piece"])
def test_the_distribution_is_the_enumerated_one(kind):
    """2,000 rows of 3 tokens over 3 candidates: 27 completions; χ² at a level of 1 in 10,000."""
    guided = GuidedPolicy(policy(), scorer(kind), beta=1.5, top_k=3)
    want = distribution(guided, PROMPTS[0], 3, beta=1.5, k=3)
    assert sum(want.values()) == pytest.approx(1)
    n = 2000
    drawn = guided.generate([PROMPTS[0]] * n, max_new_tokens=3, batch_size=500)
    counts = Counter(tuple(c.token_ids) for c in drawn)
    assert counts.keys() <= want.keys()
    big = {said: p for said, p in want.items() if n * p >= 5}
    small = 1 - sum(big.values())
    chi = sum((counts[said] - n * p) ** 2 / (n * p) for said, p in big.items())
    rest = n - sum(counts[said] for said in big)
    chi += (rest - n * small) ** 2 / max(n * small, 5)
    assert chi < len(big) + 3.7 * math.sqrt(2 * len(big)) + 12
    for completion in drawn[:50]:
        assert completion.guided_log_prob == pytest.approx(math.log(want[tuple(completion.token_ids)]), abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "unigram", "word-piece"])
@pytest.mark.parametrize("method", ["best-of-n", "cd-blockwise", "cards"])
def test_a_request_is_the_same_alone_and_in_a_batch(method, kind):
    own = {
        "best-of-n": {"n": 3}, "cd-blockwise": {"n": 2, "segment_length": 3},
        "cards": {"reward_threshold": 0.5, "segment_length": 4, "retries": 3},
    }[method]  # fmt: skip
    guided = GuidedPolicy(policy(), scorer(kind), method=method, top_k=5)
    together = guided.generate(PROMPTS, max_new_tokens=9, seed=3, **own)
    alone = [guided.generate(prompt, max_new_tokens=9, seed=3, **own)[0] for prompt in PROMPTS]
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.score == pytest.approx(other.score, abs=1e-3)
        assert (one.candidates, one.retokenised) == (other.candidates, other.retokenised)


def test_the_score_is_that_of_the_text():
    guided = GuidedPolicy(policy(), scorer("llama"), beta=2.0, top_k=4)
    for done in guided.generate(PROMPTS, max_new_tokens=8):
        (want,) = guided.scorer.score([done.prompt], [done.text], finished=done.finish_reason == "stop")
        assert done.score == pytest.approx(want, abs=1e-3)
        assert done.candidates <= 4 * len(done.token_ids)
        assert 0 < done.retokenised <= done.candidates


def test_best_of_n_takes_the_text_of_highest_reward():
    guided = GuidedPolicy(policy(), scorer("unigram"), method="best-of-n", top_k=5, n=6)
    (done,) = guided.generate(PROMPTS[0], max_new_tokens=6, seed=1)
    drawn = GuidedPolicy(policy(), method="policy", top_k=5)
    seeds = [derive_seed(guided.row_seeds([PROMPTS[0]], 1)[0], j) for j in range(6)]
    texts = drawn.generate([PROMPTS[0]] * 6, max_new_tokens=6, seed=seeds)
    ended = [c.finish_reason == "stop" for c in texts]
    rewards = guided.scorer.score([PROMPTS[0]] * 6, [c.text for c in texts], finished=ended)
    assert len({c.text for c in texts}) > 1
    assert done.text == texts[max(range(6), key=rewards.__getitem__)].text
    assert done.score == pytest.approx(max(rewards), abs=1e-4)


def test_an_entropy_gate_skips_and_catches_up():
    gated = GuidedPolicy(policy(), scorer("llama"), beta=2.0, top_k=4)
    done = gated.generate(PROMPTS, max_new_tokens=12, entropy_gate=4.95, trace=True)
    steered = [sum(step.scores is not None for step in c.trace) for c in done]
    assert 0 < sum(steered) < sum(len(c.trace) for c in done)
    for completion in done:
        ids = gated.policy.tokenizer(completion.prompt).input_ids
        for i, step in enumerate(completion.trace):
            if step.scores is not None:
                said = completion.token_ids[:i]
                texts = [decode_completion(gated.policy.tokenizer, ids, [*said, t]) for t in step.candidate_ids]
                ended = [t == EOS for t in step.candidate_ids]
                want = gated.scorer.score([completion.prompt] * 4, texts, finished=ended)
                assert step.scores == pytest.approx(want, abs=1e-3)


def test_scorers_with_several_tokenizers_steer_together():
    mine = PrefixScorer(reward_model_with(tokenizer_of("byte-level")), tokenizer_of("byte-level"), info=info())
    guided = GuidedPolicy(policy(), [mine, scorer("llama"), scorer("word-piece")], beta=[1.0, 0.5, 2.0], top_k=4)
    (done,) = guided.generate(PROMPTS[1], max_new_tokens=5, trace=True)
    for i, step in enumerate(done.trace):
        ids = guided.policy.tokenizer(PROMPTS[1]).input_ids
        texts = [decode_completion(guided.policy.tokenizer, ids, [*done.token_ids[:i], t]) for t in step.candidate_ids]
        ended = [t == EOS for t in step.candidate_ids]
        for read, scores in zip(guided.scorers[1:], step.scores_of_each[1:], strict=True):
            assert scores == pytest.approx(read.score([PROMPTS[1]] * 4, texts, finished=ended), abs=1e-3)


def test_overlapped_passes_draw_the_same_tokens():
    settings = {"beta": 2.0, "top_k": 4}
    plain = GuidedPolicy(policy(), scorer("llama"), **settings).generate(PROMPTS, max_new_tokens=6)
    overlapped = GuidedPolicy(policy(), scorer("llama"), overlap=True, **settings).generate(PROMPTS, max_new_tokens=6)
    assert [c.token_ids for c in overlapped] == [c.token_ids for c in plain]


def test_without_token_trees_whole_texts_are_read():
    settings = {"beta": 2.0, "top_k": 4}
    tree = GuidedPolicy(policy(), scorer("llama"), **settings).generate(PROMPTS, max_new_tokens=6)
    whole = GuidedPolicy(policy(), scorer("llama"), token_tree=False, **settings).generate(PROMPTS, max_new_tokens=6)
    assert [c.token_ids for c in whole] == [c.token_ids for c in tree]
    assert [c.retokenised for c in whole] == [c.retokenised for c in tree]


@pytest.mark.parametrize(("kind", "runner"), [("llama", CachedTextScorerRunner), ("word-piece", TextScorerRunner)])
def test_causal_scorers_get_a_cache_and_encoders_read_whole_texts(kind, runner):
    guided = GuidedPolicy(policy(), scorer(kind), top_k=3)
    assert type(guided.factory.scorer_runner(guided.names[0])) is runner


def test_chats_are_rendered_by_both_templates():
    tokenizer, other = byte_level(), byte_level(340, bos=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [reply]"
    other.chat_template = (
        "{% for m in messages %}#{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}#assistant: {% endif %}"
    )
    reads = PrefixScorer(reward_model_with(other), other, info=info(), name="other")
    guided = GuidedPolicy(Policy(policy_with(tokenizer), tokenizer), reads, beta=2.0, top_k=4)
    chat = [{"role": "user", "content": "Who is Max?"}]
    (done,) = guided.generate([chat], max_new_tokens=6)
    assert done.prompt == "[user] Who is Max? [reply]"
    said = done.text + "</s>" if done.finish_reason == "stop" else done.text.rstrip("\ufffd")
    text = f"#user: Who is Max?</s>#assistant: {said}"
    (want,) = guided.scorer.score_ids([other(text, add_special_tokens=False).input_ids]).tolist()
    assert done.score == pytest.approx(want, abs=1e-3)
    (best,) = GuidedPolicy(guided.policy, reads, method="best-of-n", n=2, top_k=4).generate([chat], max_new_tokens=6)
    assert best.score == pytest.approx(
        guided.scorer.score([chat], [best.text], finished=best.finish_reason == "stop")[0], abs=1e-3
    )


def test_prompts_of_token_ids_are_read_as_their_text():
    guided = GuidedPolicy(policy("llama"), scorer("byte-level"), beta=2.0, top_k=4)
    by_text = guided.generate(PROMPTS[0], max_new_tokens=6, seed=[7])
    by_ids = guided.generate_ids([guided.policy.tokenizer(PROMPTS[0]).input_ids], max_new_tokens=6, seed=[7])
    assert by_ids[0].token_ids == by_text[0].token_ids


def test_a_scorer_of_next_tokens_must_have_the_policys_tokenizer():
    tokenizer = tokenizer_of("llama")
    other = VocabularyScorer(Policy(policy_with(tokenizer), tokenizer), info=info("farma"))
    with pytest.raises(TokenizerMismatchError, match="different tokenizers"):
        GuidedPolicy(policy(), other, method="farma")


def test_drafts_are_refused():
    with pytest.raises(UsageError, match=r"other reads text, with a\s+tokenizer of its own"):
        GuidedPolicy(policy(), scorer(), draft="prompt-lookup")


def test_a_prompt_over_the_scorers_context_is_refused_before_decoding():
    guided = GuidedPolicy(policy(), scorer("llama", positions=16), top_k=3)
    with pytest.raises(PromptTooLongError, match=r"prompt 2 of 2: the prompt is \d+ tokens to the scorer other"):
        guided.generate(["a", "the dog's name was Max and the dog was very very old" * 2], max_new_tokens=2)


def test_a_completion_over_the_scorers_context_is_finished_unsteered_and_counted():
    guided = GuidedPolicy(policy(), scorer("llama", positions=24), beta=2.0, top_k=3)
    with pytest.warns(UserWarning, match="is not steered"):
        (done,) = guided.generate("the dog", max_new_tokens=40, min_new_tokens=40)
    assert len(done.token_ids) == 40
    assert 0 < done.unscored < 40


@pytest.mark.parametrize("method", ["best-of-n", "cd-blockwise", "cards"])
def test_texts_over_the_scorers_context_are_never_preferred_and_nothing_is_lost(method):
    own = {
        "best-of-n": {"n": 3}, "cd-blockwise": {"n": 2, "segment_length": 6},
        "cards": {"reward_threshold": -9.0, "segment_length": 6, "min_segment": 6},
    }[method]  # fmt: skip
    guided = GuidedPolicy(policy(), scorer("llama", info("full-bt"), positions=24), method=method, top_k=5)
    (done,) = guided.generate("the dog", max_new_tokens=60, min_new_tokens=60, **own)
    assert len(done.token_ids) == 60
    assert done.unscored > 0
    assert done.score is None


@torch.no_grad()
def test_an_encoder_with_the_policys_tokenizer_reads_text_too():
    tokenizer = byte_level()
    encoder = PrefixScorer(encoder_with(tokenizer), tokenizer, name="encoder")
    with pytest.warns(UserWarning, match="unknown objective"):
        guided = GuidedPolicy(Policy(policy_with(tokenizer), tokenizer), encoder, beta=2.0, top_k=3)
    (done,) = guided.generate("the dog", max_new_tokens=3)
    said = done.text if done.finish_reason == "stop" else done.text.rstrip("\ufffd")  # half a character is no text
    ids = tokenizer("the dog" + said, return_tensors="pt")
    assert done.score == pytest.approx(float(encoder.model(**ids).logits), abs=1e-4)
