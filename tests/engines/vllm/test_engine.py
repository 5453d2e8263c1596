"""The real vLLM on a CPU against the torch engine: the same greedy tokens, and the exact distribution at T = 1."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from helpers.naive import next_log_probs
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.base import load_scorer
from rgtg.models.scorers.head_file import read_head

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:.*was trained on")]
PROMPTS = ["the cat sat on the mat. ", "Once upon a time, ", "a", "Why not? Because " * 5]
# scorers, betas and settings of guided requests; None is unguided
GUIDES = [
    None,
    {"scorers": "kind", "betas": 2.0},
    {"scorers": ["kind", "short"], "betas": [1.5, -3.0], "top_k": 5},
    {"scorers": "short", "betas": -2.0, "top_k": "all", "method": "genarm"},
    {"scorers": "short", "betas": 4.0, "top_k": 3, "method": "farma"},
    {"scorers": "kind", "betas": 9.0, "top_k": 4, "method": "rad"},
    {"scorers": "reward", "betas": 3.0, "top_k": 6},
    {"scorers": "values", "betas": -0.4, "method": "genarm"},
    {"scorers": ["reward", "kind", "values"], "betas": [-1.0, 2.0, 0.3], "top_k": 4},
]


@pytest.fixture(scope="module")
def policy(vllm_world):
    return load_policy(str(vllm_world.policy), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def scorers(vllm_world, policy):
    return {name: load_scorer(str(folder), policy=policy, device="cpu") for name, folder in vllm_world.scorers.items()}


def by_torch(policy, scorers, prompt, guide, tokens):
    """Greedy tokens of the torch engine."""
    given = dict(guide or {"method": "policy"})
    names = given.pop("scorers", [])
    names = [names] if isinstance(names, str) else names
    if "betas" in given:
        given["beta"] = given.pop("betas")
    if given.get("top_k") == "all":
        given["top_k"] = None
    guided = GuidedPolicy(policy, {name: scorers[name] for name in names} or None, **given)
    (done,) = guided.generate_ids([prompt], temperature=0.0, max_new_tokens=tokens)
    return done.token_ids


@pytest.mark.parametrize("second_runner", [False, True])
def test_greedy_tokens_of_24_requests_that_join_and_leave(run_vllm, policy, scorers, second_runner):
    """Guided and unguided in one batch, with prefill in chunks, preemption and prefix caching."""
    requests = []
    for i in range(24):
        prompt = policy.tokenizer(PROMPTS[i % 4] + "abcdefgh"[i // 4 :]).input_ids
        params = {"temperature": 0.0, "max_tokens": 20 + 3 * (i % 7)}
        if i % 5 == 0:  # these compute logits of prompts too
            params |= {"prompt_logprobs": 2, "logprobs": 3}
        requests.append({"join": 2 * i, "prompt": prompt, "params": params, "guide": GUIDES[i % len(GUIDES)]})
    found, counters = run_vllm(
        requests, second_runner=second_runner, max_model_len=160, max_num_seqs=8, max_num_batched_tokens=24,
        block_size=32, num_gpu_blocks_override=13, enable_chunked_prefill=True, enable_prefix_caching=True,
    )  # fmt: skip
    assert counters["num_preemptions"] > 0
    assert counters["prefix_cache_hits"] > 0
    for request, (tokens,) in zip(requests, found, strict=True):
        wanted = by_torch(policy, scorers, request["prompt"], request["guide"], request["params"]["max_tokens"])
        assert tokens == wanted, request


def test_drafts_are_verified_against_the_guided_distribution(run_vllm, policy, scorers, vllm_world):
    """vLLM's second runner with n-gram drafts; heads are what can guide them."""
    guides = [None, GUIDES[1], GUIDES[2]]
    requests = [
        {"join": i, "prompt": policy.tokenizer("abcabc " * 3 + "abcdefghi"[i]).input_ids, "guide": guides[i % 3],
         "params": {"temperature": 0.0, "max_tokens": 24}}
        for i in range(9)
    ]  # fmt: skip
    drafts = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    world = SimpleNamespace(policy=vllm_world.policy, file=vllm_world.folder / "heads.json")
    found, counters = run_vllm(
        requests, world, second_runner=True, max_model_len=160, max_num_seqs=4, speculative_config=drafts
    )
    assert counters["spec_decode_num_accepted_tokens"] > 0
    for request, (tokens,) in zip(requests, found, strict=True):
        assert tokens == by_torch(policy, scorers, request["prompt"], request["guide"], 24), request


def test_samples_have_the_exact_distribution(run_vllm, policy, vllm_world):
    """Two tokens at T = 1 among three candidates each: the frequencies of all nine pairs, against enumeration."""
    prompt, beta, k, n = policy.tokenizer("a cat").input_ids, 1.5, 3, 4000
    guide = {"scorers": "kind", "betas": beta, "top_k": k}
    params = {"temperature": 1.0, "max_tokens": 2, "n": n, "seed": 0, "ignore_eos": True}
    ((samples,), _) = run_vllm(
        [{"join": 0, "prompt": prompt, "params": params, "guide": guide}], max_model_len=64, max_num_seqs=64
    )
    head = read_head(str(vllm_world.scorers["kind"]))

    def step(ids):
        log_probs = next_log_probs(policy.model, ids)
        state = policy.model.model(torch.tensor([ids])).last_hidden_state[0, -1].numpy()
        best = log_probs.topk(k)
        guided = best.values + beta * torch.from_numpy(head.score(state[None])[0])[best.indices].double()
        return dict(zip(best.indices.tolist(), torch.softmax(guided, -1).tolist(), strict=True))

    expected = {}
    for first, p in step(prompt).items():
        expected |= {(first, second): p * q for second, q in step([*prompt, first]).items()}
    counts = Counter(map(tuple, samples))
    assert len(samples) == n
    assert set(counts) <= set(expected)
    chi2 = sum((counts[pair] - n * p) ** 2 / (n * p) for pair, p in expected.items())
    assert chi2 < _chi2_quantile(len(expected) - 1), (chi2, counts, expected)


def _chi2_quantile(degrees, z=3.7):
    """About the 99.99 % quantile, by Wilson and Hilferty."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def test_guides_steer(policy, scorers):
    """The requests above differ: a test in which guidance changes nothing would prove nothing."""
    prompt = policy.tokenizer(PROMPTS[0]).input_ids
    tokens = [by_torch(policy, scorers, prompt, guide, 12) for guide in GUIDES]
    assert all(one != other for one, other in itertools.combinations(tokens, 2)), tokens
