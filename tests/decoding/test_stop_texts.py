"""Stop texts that are special tokens of the tokenizer, or hold some: wherever a completion is made."""

from functools import cache

import pytest

from helpers.naive import info
from helpers.other_tokenizers import byte_level, llama_like, policy_with, reward_model_with, unigram
from helpers.served import serving
from helpers.tiny_models import CONFIGS, randomise, tiny_tokenizer
from rgtg.decoding.detokenizer import IncrementalDetokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.stop_texts import MarkedText, StopTexts, special_tokens
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.serving.engine.models import ServedModels
from rgtg.tokenization.encoding import decode_completion

END, START = "<|im_end|>", "<|im_start|>"
PROMPTS = ["Once upon a time", "The dog", "What is it?"]
TOKENIZERS = {"characters": tiny_tokenizer, "byte-level": byte_level, "llama": llama_like, "unigram": unigram}
CARDS = {"reward_threshold": 0.5, "segment_length": 4, "min_segment": 1, "entropy_threshold": 9.0, "retries": 1}
# How to decode: arguments of GuidedPolicy, and settings of the call. Draws of the first ones do not depend on the end.
WAYS = {
    "unguided": ({"method": "policy", "top_k": None}, {}),
    "token-wise": ({"method": "pargs", "top_k": 4}, {}),
    "text": ({"method": "pargs", "top_k": 4, "text": True}, {}),
    "drafts of the policy": ({"method": "pargs", "top_k": 4, "draft": "policy"}, {"draft_length": 3}),
    "drafts of the text": ({"method": "pargs-greedy", "top_k": 4, "draft": "prompt-lookup"}, {"draft_length": 3}),
    "best of n": ({"method": "best-of-n", "n": 2}, {}),
    "blockwise": ({"method": "cd-blockwise", "n": 2}, {"segment_length": 4}),
    "cards": ({"method": "cards"}, CARDS),
}  # fmt: skip


@cache
def chat_tokenizer(kind):
    """A tokenizer with the special tokens of ChatML beside its own end."""
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    return tokenizer


@cache
def policy_of(kind, family="llama"):
    """A policy that says them often."""
    tokenizer = chat_tokenizer(kind)
    if family == "llama":
        model = policy_with(tokenizer)
    else:
        from transformers import AutoModelForCausalLM

        config = CONFIGS[family]()
        config.vocab_size = len(tokenizer)
        model = randomise(AutoModelForCausalLM.from_config(config), 0)
    specials = tokenizer.convert_tokens_to_ids([START, END])
    output = model.get_output_embeddings()
    output.weight[specials] *= 2.5
    model.generation_config.eos_token_id = None
    return Policy(model, tokenizer)


def guided_of(kind, way, family="llama"):
    made = dict(WAYS[way][0])
    scorer = None
    if made["method"] != "policy":
        tokenizer = byte_level() if made.pop("text", False) else chat_tokenizer(kind)
        scorer = PrefixScorer(reward_model_with(tokenizer), tokenizer, info=info(), name="scorer")
    return GuidedPolicy(policy_of(kind, family), scorer, **made)


def written(tokenizer, ids):
    """The text of tokens, special ones too."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def require_right_end(tokenizer, done, stop):
    """A completion ends with the token that completes a stop text, and its text ends before that."""
    ended = any(s in written(tokenizer, done.token_ids) for s in stop)
    assert (done.finish_reason == "stop") == (ended or done.token_ids[-1] == tokenizer.eos_token_id)
    assert not any(s in written(tokenizer, done.token_ids[:-1]) for s in stop)
    assert not any(name in done.text for name in special_tokens(tokenizer).values())
    return ended


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_special_token_stops(kind, way):
    guided, settings = guided_of(kind, way), {"max_new_tokens": 40} | WAYS[way][1]
    tokenizer = guided.policy.tokenizer
    free = guided.generate(PROMPTS, seed=3, **settings)
    done = guided.generate(PROMPTS, seed=3, stop=[END], **settings)
    assert True in [require_right_end(tokenizer, one, [END]) for one in done]
    # a scorer that reads text closes a candidate that ends the completion, so that its scores depend on the end
    if guided.method.unit == "token" and way != "text":
        for one, whole in zip(done, free, strict=True):
            assert one.token_ids == whole.token_ids[: len(one.token_ids)]
            ended = one.token_ids[-1] == tokenizer.convert_tokens_to_ids(END)
            before = one.token_ids[:-1] if ended else one.token_ids
            assert one.text == decode_completion(tokenizer, tokenizer(one.prompt).input_ids, before)
    for prompt in PROMPTS:
        (one,) = guided.generate(prompt, seed=3, stop=[END], **settings)
        assert "".join(guided.stream(prompt, seed=3, stop=[END], **settings)) == one.text


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mistral"])
def test_in_every_family(family):
    guided = guided_of("characters", "unguided", family)
    done = guided.generate(PROMPTS * 3, seed=3, stop=[END, START], max_new_tokens=60)
    assert True in [require_right_end(guided.policy.tokenizer, one, [END, START]) for one in done]


def stops_of(tokenizer, ids):
    """Stop texts that occur in a completion and hold a special token: between others, before one, and after one."""
    specials = tokenizer.convert_tokens_to_ids([START, END])
    at = next(i for i, token in enumerate(ids) if token in specials and 2 < i < len(ids) - 3 and "�" not in
              written(tokenizer, ids[i - 2 : i + 3]))  # fmt: skip
    return [written(tokenizer, ids[a:b]).strip() for a, b in ((at - 1, at + 2), (at, at + 2), (at - 1, at + 1))]


@pytest.mark.parametrize("kind", ["characters", "byte-level"])
def test_a_longer_stop_text_that_holds_a_special_token_stops(kind):
    guided = guided_of(kind, "token-wise")
    tokenizer, found = guided.policy.tokenizer, 0
    for seed in range(12):
        (free,) = guided.generate("The dog", max_new_tokens=60, seed=seed)
        try:
            stops = stops_of(tokenizer, free.token_ids)
        except StopIteration:
            continue
        for stop in stops:
            (done,) = guided.generate("The dog", max_new_tokens=60, seed=seed, stop=[stop, "never there"])
            assert require_right_end(tokenizer, done, [stop])
            assert done.token_ids == free.token_ids[: len(done.token_ids)]
            before = written(tokenizer, done.token_ids).partition(stop)[0]
            for name in special_tokens(tokenizer).values():
                before = before.replace(name, "")
            assert done.text == before or "�" in before  # a character around a special token is whole in the text
            assert "".join(guided.stream("The dog", max_new_tokens=60, seed=seed, stop=[stop])) == done.text
            found += 1
    assert found >= 6


def test_a_special_token_within_the_least_tokens_does_not_count():
    guided = guided_of("characters", "unguided")
    end = guided.policy.tokenizer.convert_tokens_to_ids(END)
    for seed in range(30):
        (free,) = guided.generate("Hi", max_new_tokens=60, seed=[seed])
        places = [i for i, token in enumerate(free.token_ids) if token == end]
        if len(places) < 2:
            continue
        settings = {"max_new_tokens": 60, "min_new_tokens": places[0] + 2, "seed": [seed], "stop": [END]}
        (done,) = guided.generate("Hi", **settings)
        later = next(i for i in places if i + 1 >= settings["min_new_tokens"])
        assert done.token_ids == free.token_ids[: later + 1]
        return
    raise AssertionError("no seed writes the token twice")


def test_the_reward_of_a_completion_that_a_special_token_ends_is_that_of_its_text():
    guided = guided_of("characters", "best of n")
    done = guided.generate(PROMPTS * 8, seed=1, stop=[END, START], max_new_tokens=12)
    ends = guided.policy.tokenizer.convert_tokens_to_ids([START, END])
    other = set(guided.policy.tokenizer.all_special_ids) - set(ends)  # they have no text that could be scored
    done = [one for one in done if other.isdisjoint(one.token_ids)]
    assert sum(one.token_ids[-1] in ends for one in done) > 3
    rewards = guided.scorer.score(
        [one.prompt for one in done], [one.text for one in done], finished=[one.finish_reason == "stop" for one in done]
    )
    assert [one.score for one in done] == pytest.approx(rewards, abs=1e-4)


def test_on_the_server_whole_and_in_parts():
    models = ServedModels(policy_of("characters"), {}, "tiny")
    guided = GuidedPolicy(models.policy, method="policy")
    with serving(models) as served:
        for seed in range(4):
            asked = {"model": "tiny", "prompt": "The dog", "max_tokens": 40, "seed": seed, "stop": [END]}
            body = served.post("/v1/completions", **asked).json()["choices"][0]
            (done,) = guided.generate("The dog", seed=seed, stop=[END], max_new_tokens=40)
            assert (body["text"], body["finish_reason"]) == (done.text, done.finish_reason)
            parts = served.openai.completions.create(**asked, stream=True)
            choices = [part.choices[0] for part in parts]
            assert "".join(choice.text for choice in choices) == done.text
            assert choices[-1].finish_reason == done.finish_reason


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_parts_of_a_text_with_special_tokens_are_never_taken_back(kind):
    guided = guided_of(kind, "unguided")
    tokenizer = guided.policy.tokenizer
    for seed in range(6):
        settings = {"max_new_tokens": 60, "seed": [seed], "stop": [f"{END}a", f"e{START}", "qu", f"{END}{END}"]}
        (done,) = guided.generate("The dog", **settings)
        stream = IncrementalDetokenizer(tokenizer, tokenizer("The dog").input_ids, settings["stop"])
        parts = [stream.add(token) for token in done.token_ids]
        assert done.text.startswith("".join(parts))
        assert "".join(parts) + stream.end(done.text) == done.text


def test_special_tokens_are_written_where_they_stand():
    stop = StopTexts(chat_tokenizer("characters"), [END, f"{START}b"])
    start, end = chat_tokenizer("characters").convert_tokens_to_ids([START, END])
    assert (stop.special, stop.tokens) == ({start: START, end: END}, {end})
    marked = stop.mark("abc", [(1, start), (1, end), (3, start)])
    assert marked.text == f"a{START}{END}bc{START}"
    assert [marked.visible(at) for at in (0, 1, 5, len(marked.text) - len(START), len(marked.text))] == [0, 1, 1, 3, 3]
    assert (stop.find(marked), stop.find(MarkedText("abc"))) == (1, None)
    assert stop.certain("abc", stop.mark("abc", [(3, start)])) == "abc"
    assert not StopTexts(None, [])
