"""``echo`` of ``/v1/completions``: prompts with the policy's own log-probabilities, against stock forward passes."""

import math

import pytest
import torch

from helpers.naive import next_log_probs
from helpers.other_tokenizers import policy_with, tokenizer_of
from helpers.served import chat_tokenizer, close, events_of, scorer, serving
from helpers.tiny_models import tiny_policy
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.runners import factory, model_runner
from rgtg.models.loading.policy import Policy
from rgtg.serving.engine.models import ServedModels

TEXTS = ["Once upon a time", "Hi", "What is it? It is a cat, and it sat on a mat."]


@pytest.fixture(scope="module")
def served():
    with serving(prefill_chunk=5) as made:  # so that prompts take several chunks
        yield made


def echoed(served, prompt, **body):
    answer = served.post("/v1/completions", **{"model": "tiny", "prompt": prompt, "echo": True, "max_tokens": 0} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def name_of(tokenizer, token):
    return tokenizer.convert_ids_to_tokens(token)


def require_own_log_probs(told, model, tokenizer, ids, count):
    """The first ``len(ids)`` tokens have the log-probabilities of a stock forward pass over the whole prompt."""
    with torch.no_grad():
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    assert told["tokens"][: len(ids)] == [name_of(tokenizer, token) for token in ids]
    assert (told["token_logprobs"][0], told["top_logprobs"] and told["top_logprobs"][0]) == (None, None)
    for place, token in enumerate(ids[1:], 1):
        own = log_probs[place - 1]
        assert told["token_logprobs"][place] == pytest.approx(float(own[token]), abs=1e-4)
        if count:
            best = {name_of(tokenizer, int(t)): float(own[t]) for t in [token, *own.topk(count).indices]}
            assert told["top_logprobs"][place] == pytest.approx(best, abs=1e-4)
            greedy = told["token_logprobs"][place] == max(told["top_logprobs"][place].values())
            assert greedy == (int(own.argmax()) == token)  # as lm-evaluation-harness finds out


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "opt"])
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("tree", [True, False])
def test_echoed_log_probs_are_those_of_a_stock_forward(family, count, tree, monkeypatch):
    monkeypatch.setattr(model_runner, "supports_token_tree", lambda *_: tree)
    monkeypatch.setattr(
        factory, "make_runner", lambda *args, **kwargs: model_runner.make_runner(*args, **kwargs | {"tree": tree})
    )
    tokenizer = chat_tokenizer()
    models = ServedModels(Policy(tiny_policy(family), tokenizer), {}, "tiny")
    with serving(models, prefill_chunk=5) as served:
        for text in TEXTS:
            ids = tokenizer(text).input_ids
            for prompt in (text, ids):
                told = echoed(served, prompt, logprobs=count)
                (choice,) = told["choices"]
                assert (choice["text"], choice["finish_reason"]) == (text, "length")
                require_own_log_probs(choice["logprobs"], models.policy.model, tokenizer, ids, count)
                assert told["usage"]["prompt_tokens"] == told["usage"]["total_tokens"] == len(ids)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"top_p": 0.3}, {"logit_bias": {"7": 50}}])
def test_what_shapes_new_tokens_leaves_the_prompt_as_it_is(served, sampling):
    told = echoed(served, TEXTS[0], logprobs=2, max_tokens=3, seed=1, **sampling)["choices"][0]
    ids = served.models.tokenizer(TEXTS[0]).input_ids
    require_own_log_probs(told["logprobs"], served.models.policy.model, served.models.tokenizer, ids, 2)


def test_new_tokens_follow_the_echo_as_they_do_without_it(served):
    asked = {"model": "tiny", "prompt": TEXTS, "max_tokens": 6, "seed": 3, "n": 2, "logprobs": 3}
    plain = served.post("/v1/completions", **asked).json()
    told = served.post("/v1/completions", **asked, echo=True).json()
    assert [choice["index"] for choice in told["choices"]] == list(range(6))
    for index, (with_echo, without) in enumerate(zip(told["choices"], plain["choices"], strict=True)):
        text = TEXTS[index // 2]
        ids = served.models.tokenizer(text).input_ids
        assert with_echo["text"] == text + without["text"]
        assert with_echo["finish_reason"] == without["finish_reason"]
        new = {name: values[len(ids) :] for name, values in with_echo["logprobs"].items()}
        assert new["text_offset"] == [len(text) + at for at in without["logprobs"]["text_offset"]]
        assert close(new | {"text_offset": None}, without["logprobs"] | {"text_offset": None})
        require_own_log_probs(with_echo["logprobs"], served.models.policy.model, served.models.tokenizer, ids, 3)
    assert told["usage"]["total_tokens"] == plain["usage"]["total_tokens"]
    # the prompts were read for their log-probabilities, and not once more
    cached = sum(len(served.models.tokenizer(text).input_ids) - 1 for text in TEXTS if len(text) > 8)
    assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_stream_begins_with_the_prompt(served, tokens):
    asked = {"model": "tiny", "prompt": TEXTS[:2], "max_tokens": tokens, "seed": 3, "n": 2, "logprobs": 2, "echo": True}
    whole = served.post("/v1/completions", **asked).json()
    events, done = events_of(served.post("/v1/completions", **asked, stream=True))
    assert done
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"] and e["choices"][0]["index"] == choice["index"]]
        assert mine[0]["text"] == TEXTS[choice["index"] // 2]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        joined = {name: [] for name in choice["logprobs"]}
        for one in mine:
            for name, values in (one["logprobs"] or {}).items():
                joined[name] += values
        assert close(joined, choice["logprobs"])


def test_echo_without_log_probs_is_text_for_every_method(served):
    guided = GuidedPolicy(served.models.policy, served.models.scorers["kind"], method="pargs")
    (done,) = guided.generate(TEXTS[:1], seed=3, max_new_tokens=5)
    told = echoed(served, TEXTS[0], model="tiny+kind", max_tokens=5, seed=3)["choices"][0]
    assert (told["text"], told["logprobs"]) == (TEXTS[0] + done.text, None)
    assert told["guidance"]["method"] == "pargs"
    alone = echoed(served, TEXTS[0], model="tiny+kind")["choices"][0]
    assert (alone["text"], alone["finish_reason"]) == (TEXTS[0], "length")


@pytest.mark.parametrize("model", ["tiny+kind", "tiny"])
def test_echoed_log_probs_of_a_guided_request_are_refused(served, model):
    guidance = {} if "+" in model else {"guidance": {"method": "best-of-n", "scorers": ["kind"], "n": 2}}
    answer = served.post("/v1/completions", model=model, prompt="Hi", echo=True, logprobs=1, **guidance)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "logprobs", "unsupported_parameter")
    assert "the policy's own log-probabilities" in error["message"]
    assert "ask for 'tiny' without a scorer" in error["message"]


def test_no_new_tokens_need_an_echo_and_no_room(served):
    answer = served.post("/v1/completions", model="tiny", prompt="Hi", max_tokens=0)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
    full = [5 + i % 40 for i in range(128)]
    told = echoed(served, full, logprobs=1)["choices"][0]
    require_own_log_probs(told["logprobs"], served.models.policy.model, served.models.tokenizer, full, 1)
    for prompt, tokens in ((full, 1), ([*full, 5], 0)):
        answer = served.post("/v1/completions", model="tiny", prompt=prompt, echo=True, max_tokens=tokens, logprobs=1)
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_one_token_has_no_log_prob(served):
    told = echoed(served, [5], logprobs=1)["choices"][0]["logprobs"]
    assert told == {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}


@pytest.mark.filterwarnings("ignore:.*cannot read a token tree")
def test_nan_fails_the_request_alone():
    model = tiny_policy()
    model.lm_head.weight[40] = math.nan
    with serving(ServedModels(Policy(model, chat_tokenizer()), {}, "tiny")) as served:
        answer = served.post("/v1/completions", model="tiny", prompt="Hi", echo=True, logprobs=1, max_tokens=0)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "non_finite")
        assert echoed(served, "Hi")["choices"][0]["text"] == "Hi"


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-bos", "llama", "unigram"])
@pytest.mark.parametrize("text", ["Once upon a time", "né 日本 x", "a  b\n c"])
def test_offsets_say_where_tokens_begin_in_the_text(kind, text):
    tokenizer = tokenizer_of(kind)
    with serving(ServedModels(Policy(policy_with(tokenizer), tokenizer), {}, "tiny")) as served:
        told = echoed(served, text, logprobs=1)["choices"][0]
        ids = served.post("/tokenize", prompt=text).json()["tokens"]
        again = echoed(served, ids, logprobs=1)["choices"][0]
    offsets = told["logprobs"]["text_offset"]
    assert told["text"] == text
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    ends = [*offsets[1:], len(text)]
    for name, start, end in zip(told["logprobs"]["tokens"], offsets, ends, strict=True):
        if start < end and "\\x" not in name and "<unk>" not in name:
            assert text[start:end].strip() == name.strip()
    assert close(again["logprobs"]["token_logprobs"], told["logprobs"]["token_logprobs"])
    for name, start in zip(again["logprobs"]["tokens"], again["logprobs"]["text_offset"], strict=True):
        if "\\x" not in name:
            assert again["text"][start:].startswith((name, name.removeprefix(" ")))


def test_prompts_are_read_between_the_steps_of_others(served):
    with serving(prefill_chunk=4) as other:
        calls = other.engine.prompt_log_probs(list(range(5, 24)), 1)
        assert len(calls) == 5
        steps = [[step.token_id for step in call.result()] for call in other.engine.run_all(calls)]
    assert steps == [[6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21], [22, 23]]


def test_a_policy_with_a_head_on_its_states_has_the_same_log_probs():
    models = ServedModels(Policy(tiny_policy(), chat_tokenizer()), {"kind": scorer(1)}, "tiny")
    with serving(models) as served:
        told = echoed(served, "Hi", logprobs=1)["choices"][0]["logprobs"]
    ids = models.tokenizer("Hi").input_ids
    assert told["token_logprobs"][1] == pytest.approx(float(next_log_probs(models.policy.model, ids[:1])[ids[1]]))
