"""Eight requests at once, of which one fails: the others are answered with the tokens that they get alone."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import httpx2
import pytest

from helpers import faults
from helpers.encoders import encoder_model, encoder_tokenizer
from helpers.naive import info, tiny_scorer
from helpers.other_tokenizers import byte_level, reward_model_with
from helpers.scorer_kinds import every_scorer
from helpers.served import on_a_socket, serving
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.serving.engine.models import ServedModels

PROMPTS = ["Once upon a time", "Hi", "What is it?", "The dog", "A cat sat", "No", "Why me", "zz top"]
PLACES = {name: place for name, place in faults.PLACES.items() if not name.startswith("overlapped")}
STEERED_POLICY = "policy that a scorer steers"
METHODS = {"token reward": "farma"}
# Requests that are not batched: each has caches and steps of its own.
UNBATCHED = {
    "best-of-n": {"n": 2},
    "cd-blockwise": {"n": 2, "segment_length": 3},
    "smc": {"n": 2}, "beam": {"n": 2},
    "cards": {"reward_threshold": 0.5, "segment_length": 3, "min_segment": 1, "entropy_threshold": 9.0, "retries": 2},
}  # fmt: skip
NAN = ["policy", "separate scorer", "second separate scorer", "token reward", "state head", "vocabulary head",
       "text scorer's model"]  # fmt: skip


def ask(client, prompt, seed, guidance, max_tokens=10):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "seed": seed}
    return client.post("/v1/completions", json=body | {"guidance": guidance | {"trace": True}})


def tokens_of(answer):
    assert answer.status_code == 200, answer.text
    return [step["token_id"] for step in answer.json()["choices"][0]["guidance"]["trace"]]


def ask_together(served, guidance, prompts=PROMPTS, **more):
    """The answers to all prompts, sent at the same time."""
    with (
        on_a_socket(served) as url,
        httpx2.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        asked = [pool.submit(ask, client, prompt, i, guidance, **more) for i, prompt in enumerate(prompts)]
        return [one.result() for one in asked]


class Company:
    """A server whose policy or scorer has a fault, and what each prompt gets alone."""

    def __init__(self, place, method=None):
        policy, every = every_scorer()
        names, fault, owner = PLACES.get(place, (("separate",), faults.of_tokens, "policy"))
        self.fault = fault(every.get(owner, policy))
        self.models = ServedModels(policy, {name: every[name] for name in names}, "tiny")
        method = method or METHODS.get(place, "pargs" if names else "policy")
        self.guidance = {"method": method, "top_k": 4} | UNBATCHED.get(method, {})
        if names:
            self.guidance["scorers"] = list(names)
        self.alone, self.seen = [], []
        with self.serving() as served:
            for i, prompt in enumerate(PROMPTS):
                self.fault.start(None)
                self.alone.append(tokens_of(ask(served.client, prompt, i, self.guidance)))
                self.seen.append(self.fault.seen)
        # neighbours read the tokens of prompts, and those that fill up a row (0, and the padding token)
        shared = {token for prompt in PROMPTS for token in policy.tokenizer(prompt).input_ids}
        shared |= {0, policy.tokenizer.pad_token_id}
        self.victim, self.bad = faults.victim(self.seen, lambda i, value: value not in shared)

    def serving(self):
        return serving(self.models, prefix_cache_mib=0, on_nan="fail")

    def require_one_failure(self, mode):
        """Send all prompts at once, one of which fails in this way."""
        with self.serving() as served:
            self.fault.start(mode, self.bad)
            answers = ask_together(served, self.guidance)
            assert self.fault.failed
            self.fault.start(None)
        for i, answer in enumerate(answers):
            if i == self.victim:
                assert answer.status_code == 500, answer.text
            else:
                assert tokens_of(answer) == self.alone[i]
        return answers[self.victim].json()["error"]


company_of = cache(Company)


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_fails_its_request_alone(place):
    error = company_of(place).require_one_failure("row")
    assert error["message"] == "the request failed inside the server"


@pytest.mark.parametrize("place", NAN)
def test_nan_fails_its_request_alone(place):
    error = company_of(place).require_one_failure("nan")
    assert error["code"] == "non_finite"


@pytest.mark.parametrize("mode", ["row", "nan"])
@pytest.mark.parametrize("place", [STEERED_POLICY, "separate scorer"])
@pytest.mark.parametrize("method", UNBATCHED)
def test_a_request_that_is_not_batched_fails_alone(method, place, mode):
    company_of(place, method).require_one_failure(mode)


# Texts that a model cannot read


def crowded_tokenizer():
    """A tokenizer with a token that no model here has an embedding for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[MORE]"]})
    return tokenizer


def text_scorer():
    words = byte_level()
    model = reward_model_with(words)
    words.add_special_tokens({"additional_special_tokens": ["[MORE]"]})
    return PrefixScorer(model, words, info=info(), name="scorer")


def encoder(family):
    return lambda: PrefixScorer(encoder_model(family), encoder_tokenizer(), info=info(), name="scorer")


# The scorer, the prompt that cannot be read, and what the client is told.
UNREADABLE = {
    "policy": (None, "what is [MORE]", "the text has token 64, and the policy has embeddings for tokens 0 to 63"),
    "separate scorer": (tiny_scorer, "what is [MORE]", "the text has token 64, and the policy has"),
    "text scorer": (text_scorer, "what is [MORE]", "and the scorer scorer has embeddings for tokens 0 to"),
    "bert": (encoder("bert"), "word " * 9, "to the scorer scorer, whose context of 34 has no room"),
    "roberta": (encoder("roberta"), "word " * 9, "to the scorer scorer, whose context of 32 has no room"),
}  # fmt: skip


def models_of(make, tokenizer):
    scorers = {} if make is None else {"scorer": make()}
    for one in scorers.values():
        if one.name == "tiny":
            one.tokenizer = tokenizer
    return ServedModels(Policy(tiny_policy(), tokenizer), scorers, "tiny")


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_text_that_cannot_be_read_is_the_clients_error_alone(case):
    make, prompt, message = UNREADABLE[case]
    tokenizer = tiny_tokenizer() if case == "text scorer" else crowded_tokenizer()
    models = models_of(make, tokenizer)
    guidance = {"method": "policy"} if make is None else {"method": "pargs", "scorers": ["scorer"], "top_k": 4}
    prompts = [*PROMPTS[:3], prompt, *PROMPTS[3:7]]
    with serving(models) as served:
        alone = [ask(served.client, one, i, guidance) for i, one in enumerate(prompts)]
        answers = ask_together(served, guidance, prompts)
    for i, answer in enumerate(answers):
        if i == 3:
            assert answer.status_code == alone[3].status_code == 400
            assert message in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] == "prompt"
        else:
            assert tokens_of(answer) == tokens_of(alone[i])


@pytest.mark.filterwarnings("ignore:.*is not steered")
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "deberta-v2"])
def test_a_request_that_outgrows_an_encoder_is_answered_and_harms_nobody(family):
    models = models_of(encoder(family), tiny_tokenizer())
    guidance = {"method": "pargs", "scorers": ["scorer"], "top_k": 4}
    prompts, long = [*PROMPTS[:3], "word " * 5, *PROMPTS[3:7]], {"max_tokens": 30}
    with serving(models) as served:
        with pytest.warns(UserWarning, match="is not steered"):
            alone = [tokens_of(ask(served.client, one, i, guidance, **long)) for i, one in enumerate(prompts)]
        assert [tokens_of(answer) for answer in ask_together(served, guidance, prompts, **long)] == alone
