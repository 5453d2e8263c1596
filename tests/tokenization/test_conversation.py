"""Conversations become the same tokens everywhere: those of transformers' own rendering by the owner's template."""

import importlib.resources
import json
import re
from functools import cache

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from helpers.chats import TEMPLATES, chat_tokenizer
from helpers.naive import info, reward
from rgtg.data.formats import to_pair
from rgtg.data.pairs import tokenize_pairs
from rgtg.data.rollouts import read_rollouts, tokenize_rollouts
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.request import end_tokens
from rgtg.errors import DataError, UsageError
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer
from rgtg.tokenization.conversation import (
    TurnEnd,
    check_template_kwargs,
    encode_completed,
    encode_source,
    render_chat,
    same_chat_template,
    turn_end,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Written for one kind each; those of real models come with trl.
OWN = {
    "chatml": CHATML,
    "turns and trimmed replies": TURNS,
    "eos after the last reply": CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}"
                                               "{% endif %}{% if add"),
    "replies that are not ended": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
                                  "{% if add_generation_prompt %}[assistant] {% endif %}",
    "replies ended with eos": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} "
                              "{{ m['content'] }}{{ eos_token }}{% else %}[INST] {{ m['content'] }} [/INST]"
                              "{% endif %}{% endfor %}",
    "parts only": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] | "
                  "selectattr('type', 'equalto', 'text') %}{{ p['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
                  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "a thought opened for generation": CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
    "thoughts removed": CHATML.replace("m['content'] }}", "m['content'].split('</think>')[-1].lstrip('\n') }}"),
}  # fmt: skip
USER = [{"role": "user", "content": "What is two and two?"}]
REPLIES = ["It is four.", " Four. ", "<think>\nAdding.\n</think>\n\nIt is four.", "<b>4</b>", "Vier 🙂\n"]


@cache
def shipped():
    """The chat templates of real models that trl brings, by name."""
    folder = importlib.resources.files("trl") / "chat_templates"
    files = sorted(f for f in folder.iterdir() if f.name.endswith(".jinja")) if folder.is_dir() else []
    return {f.name.removesuffix(".jinja"): f.read_text() for f in files if "_training" not in f.name}


def tokenizer_with(template, *, bos=True, eos_added=False):
    """A byte-level tokenizer with the special tokens that a template writes; BOS before any text, as Llama's."""
    special = ["<pad>", "<s>", "</s>", *sorted(set(re.findall(r"<[^<>\s{}%'\"/]+>|<\|[^<>\s]+\|>", template)))]
    special = [t for t in dict.fromkeys(special) if t not in ("<think>", "<b>")]
    vocabulary = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos_added else ''}"
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = template
    return tokenizer


def scorer_of(tokenizer, trained=None, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=2048, num_labels=1, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    return PrefixScorer(model, tokenizer, info=trained, name="scorer")


def by_transformers(tokenizer, messages, **more):
    """Token ids of transformers' own rendering; templates that read parts only get parts."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **more)
    except Exception:
        text = ""
    if "What is two" not in text:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **more)


def starts_with(whole, ids):
    return list(whole[: len(ids)]) == list(ids)


def templates():
    return [*OWN, *shipped()]


def template_of(name):
    return OWN.get(name) or shipped()[name]


def test_enough_templates_of_real_models():
    if not shipped():
        pytest.skip("this version of trl brings no chat templates")
    assert len(shipped()) >= 12


@pytest.mark.parametrize("name", templates())
def test_training_scoring_and_transformers_read_the_same_tokens(name):
    tokenizer = tokenizer_with(template_of(name))
    trained, stock = scorer_of(tokenizer, info()), scorer_of(tokenizer)
    for reply in REPLIES:
        answer = [{"role": "assistant", "content": reply}]
        whole = by_transformers(tokenizer, [*USER, *answer])
        # 1. a pair in training
        pair = to_pair({"prompt": USER, "chosen": answer, "rejected": [{**answer[0], "content": "No."}]}, tokenizer)
        (ids,) = tokenize_pairs([pair], tokenizer)
        read = [*ids.prompt_ids, *ids.chosen_ids]
        # 2. is transformers' rendering up to the token that ends the reply (EOS where the template ends none)
        end = turn_end(tokenizer)
        assert starts_with(whole, read) or read == [*whole, tokenizer.eos_token_id]
        assert end.token_id in (None, read[-1])
        assert read.count(tokenizer.bos_token_id) == whole.count(tokenizer.bos_token_id) <= 1
        # 3. and what a scorer trained here reads; a stock model reads all that transformers writes
        scored = encode_completed(tokenizer, USER, reply, finished=True, append_eos=True)
        assert [*scored[0], *scored[1]] == read
        assert trained.score([USER], [reply]) == pytest.approx([reward(trained.model, read)], abs=1e-5)
        assert stock.score([USER], [reply]) == pytest.approx([reward(stock.model, whole)], abs=1e-5)
        # 4. also as a text in the scorer's own tokens
        for scorer in (trained, stock):
            text = CrossTokenizerScorer(scorer)
            assert text.score([USER], [reply]) == pytest.approx(scorer.score([USER], [reply]), abs=1e-5)


@pytest.mark.parametrize("name", [n for n in templates() if n not in ("parts only", "replies that are not ended")])
def test_pairs_are_read_as_trl_reads_them(name):
    from trl.data_utils import apply_chat_template

    tokenizer = tokenizer_with(template_of(name))
    if turn_end(tokenizer).text == "":
        pytest.skip("trl does not end a reply that its template does not end")
    if "What is two" not in tokenizer.apply_chat_template(USER, tokenize=False):
        pytest.skip("trl gives this template's content as it is, text, which the template leaves out")
    for reply in REPLIES:
        row = {"prompt": USER, "chosen": [{"role": "assistant", "content": reply}],
               "rejected": [{"role": "assistant", "content": "No."}]}  # fmt: skip
        pair = to_pair(row, tokenizer)
        assert {k: getattr(pair, k) for k in ("prompt", "chosen", "rejected")} == apply_chat_template(row, tokenizer)


@pytest.mark.parametrize("name", templates())
def test_prompts_are_transformers_own_rendering(name):
    tokenizer = tokenizer_with(template_of(name))
    ids = by_transformers(tokenizer, USER, add_generation_prompt=True)
    assert encode_source(tokenizer, USER)[1] == ids
    scorer = scorer_of(tokenizer)
    half = [*ids, *tokenizer("It is", add_special_tokens=False).input_ids]
    expected = pytest.approx([reward(scorer.model, half)], abs=1e-5)
    assert scorer.score([USER], ["It is"], finished=False) == expected
    assert CrossTokenizerScorer(scorer).score([USER], ["It is"], finished=False) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ("<|im_end|>\n", "<|im_end|>")),
        ("turns and trimmed replies", ("<end_of_turn>\n", "<end_of_turn>")),
        ("eos after the last reply", ("<|im_end|>\n</s>", "<|im_end|>")),
        ("replies that are not ended", ("\n", "\n</s>")),
        ("replies ended with eos", ("</s>", "</s>")),
        ("phi3", ("<|end|>\n</s>", "<|end|>")),
        ("gemma3", ("<end_of_turn>\n", "<end_of_turn>")),
        ("llama3_2", ("<|eot_id|>", "<|eot_id|>")),
        ("cohere2", ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",) * 2),
        ("glm4moe", ("", "</s>")),
    ],
)
def test_how_a_template_ends_a_reply(name, expected):
    if name not in OWN and name not in shipped():
        pytest.skip("this version of trl does not bring the template")
    tokenizer = tokenizer_with(template_of(name))
    end = turn_end(tokenizer)
    last = re.findall(r"<[^<>]+>", expected[1])[-1]
    assert end == TurnEnd(*expected, tokenizer.convert_tokens_to_ids(last))


def test_a_reply_ends_generation_where_the_template_ends_it():
    tokenizer = tokenizer_with(CHATML)
    tokenizer.chat_template = CHATML
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        eos_token_id=2,
    )  # fmt: skip
    policy = Policy(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(policy) == {2, end}
    ids = torch.tensor([encode_source(tokenizer, USER)[1]])
    with torch.no_grad():  # so that the first token is the end
        state = policy.model.model(ids).last_hidden_state[0, -1]
        policy.model.lm_head.weight.zero_()
        policy.model.lm_head.weight[end] = state
    (completion,) = GuidedPolicy(policy, method="policy").generate([USER], temperature=0, max_new_tokens=5)
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([end], "", "stop")


@pytest.mark.parametrize("trained", [None, info()])
def test_a_tokenizer_that_appends_eos_gives_the_same_scores_on_every_path(trained):
    tokenizer = tokenizer_with(CHATML, eos_added=True)
    scorer = scorer_of(tokenizer, trained)
    text = CrossTokenizerScorer(scorer)
    ids = tokenizer("One two").input_ids
    assert ids[-1] == 2
    assert scorer.score(["One"], [" two"]) == pytest.approx([reward(scorer.model, ids)], abs=1e-5)
    assert scorer.score(["One"], [" two"], finished=False) == pytest.approx([reward(scorer.model, ids[:-1])], abs=1e-5)
    for finished in (True, False):
        expected = pytest.approx(scorer.score(["One"], [" two"], finished=finished), abs=1e-5)
        assert text.score(["One"], [" two"], finished=finished) == expected


def test_prompts_that_are_rendered_already_are_closed_as_the_template_closes_a_turn():
    tokenizer = tokenizer_with(TURNS)
    scorer = scorer_of(tokenizer, info())
    text = render_chat(tokenizer, USER, add_generation_prompt=True)
    expected = pytest.approx(scorer.score([USER], ["Four."]), abs=1e-5)
    assert scorer.score([text], ["Four."], templated=True) == expected


def test_a_template_that_leaves_messages_out():
    silent = tokenizer_with("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(UsageError, match="leaves the user's message out"):
        render_chat(silent, USER, add_generation_prompt=True)
    no_system = tokenizer_with("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(DataError, match="leaves out messages of the role 'system'"):
        render_chat(no_system, [{"role": "system", "content": "Be brief."}, *USER], add_generation_prompt=True)


def test_a_template_that_refuses_a_role():
    refusing = CHATML.replace("{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
                              "supported') }}{% endif %}{% for")  # fmt: skip
    with pytest.raises(DataError, match="refuses these messages: System role not supported"):
        render_chat(tokenizer_with(refusing), [{"role": "system", "content": "a"}, *USER], add_generation_prompt=True)


def test_template_variables():
    template = CHATML.replace("{% if add", "{% if enable_thinking is defined and not enable_thinking %}<fast>"
                              "{% endif %}{% if add")  # fmt: skip
    tokenizer = tokenizer_with(template)
    kwargs = {"enable_thinking": False}
    check_template_kwargs(tokenizer, kwargs)
    assert "<fast>" in render_chat(tokenizer, USER, add_generation_prompt=True, template_kwargs=kwargs)
    assert "<fast>" not in render_chat(tokenizer, USER, add_generation_prompt=True)
    for name in ("enable_thinkin", "chat_template", "tokenize", "messages"):
        with pytest.raises(UsageError, match=rf"does not read {name}; it reads enable_thinking"):
            check_template_kwargs(tokenizer, {name: 1})


def test_names_that_a_template_assigns_itself_are_no_variables_of_it():
    template = (
        "{% if not enable_thinking is defined %}{% set enable_thinking = true %}{% endif %}"
        "{% if messages | length > 1 %}{% set opening = 'two' %}{% endif %}{{ opening }}{{ date | default('today') }}"
        "{% set brief = brief | default(false) %}"
        "{% for m in messages %}{% if m.content is string %}{% set content = m.content %}{% endif %}"
        "{{ content }}{% for part in part %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(UsageError, match=r"does not read content; it reads brief, date, enable_thinking, part$"):
        check_template_kwargs(tokenizer_with(template), {"content": "x", "part": []})


def test_templates_that_are_not_valid_are_refused_and_cost_plain_text_nothing():
    broken, several = tokenizer_with("{% for m in messages %}\n{{ m.content }"), tokenizer_with(CHATML)
    several.chat_template = {"rag": CHATML, "tool_use": CHATML}
    for tokenizer, says in (
        (broken, r"not valid \(line 2: .*\): set another"),
        (several, r"\(rag, tool_use\), and none"),
    ):
        with pytest.raises(UsageError, match=says):
            render_chat(tokenizer, USER, add_generation_prompt=True)
        with pytest.raises(UsageError, match=says):
            scorer_of(tokenizer).score([USER], ["Four."])
        assert turn_end(tokenizer) is None
        assert encode_source(tokenizer, "Hi")[1] == tokenizer("Hi").input_ids


def test_templates_are_compared_by_what_they_write():
    one = tokenizer_with(CHATML)
    assert same_chat_template(one, tokenizer_with(CHATML.replace("{% for", "{# a comment #}{% for")))
    assert not same_chat_template(one, tokenizer_with(TURNS))
    assert same_chat_template(one, tokenizer_with(CHATML.replace(CHATML, "")))


@pytest.mark.parametrize("trained", [None, info()])
@pytest.mark.parametrize("name", [n for n in templates() if n in OWN or n in ("phi3", "gemma3", "nemotron_3_nano")])
def test_best_of_n_scores_replies_as_rgtg_score_does(name, trained, monkeypatch):
    tokenizer = tokenizer_with(template_of(name))
    scorer = scorer_of(tokenizer, trained)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=2048, eos_token_id=2,
    )  # fmt: skip
    policy = Policy(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    end = turn_end(tokenizer).token_id
    with torch.no_grad():  # so that some replies end
        policy.model.lm_head.weight[end] = (
            0.5 * policy.model.model(torch.tensor([encode_source(tokenizer, USER)[1]])).last_hidden_state[0, -1]
        )
    guided = GuidedPolicy(policy, scorer, method="best-of-n", n=6, top_k=None)
    drawn = guided.generate([USER] * 6, max_new_tokens=12, seed=4)
    ended = [one for one in drawn if one.finish_reason == "stop"]
    assert ended
    for best in ended:
        assert best.score == pytest.approx(scorer.score([USER], [best.text])[0], abs=1e-4)


def test_calls_and_answers_of_tools_are_rendered_or_refused():
    tokenizer = chat_tokenizer(TEMPLATES["chatml"])
    user = {"role": "user", "content": "Two and two?"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    answer = {"role": "tool", "content": '{"sum": 4}'}
    assert '{"sum": 4}' in render_chat(tokenizer, [user, answer], add_generation_prompt=True)
    with pytest.raises(DataError, match="does not read tool_calls"):
        render_chat(tokenizer, [user, called, answer], add_generation_prompt=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content|tojson }}{{ m.tool_calls }}{% endfor %}"
    assert "'add'" in render_chat(tokenizer, [user, called, answer], add_generation_prompt=True)
    tokenizer.chat_template = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="leaves out messages of the role 'tool'"):
        render_chat(tokenizer, [user, answer], add_generation_prompt=True)


def small_policy(tokenizer):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=2048, eos_token_id=2,
    )  # fmt: skip
    policy = Policy(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    text = torch.tensor([token.isascii() and token.isalpha() for token in tokens])
    with torch.no_grad():  # ASCII only, so that tokens and text say the same
        policy.model.lm_head.weight.mul_(3)
        policy.model.lm_head.weight[~text] = 0
    return policy


@torch.no_grad()
def test_a_reward_model_with_the_policys_tokenizer_reads_chats_in_its_own_template():
    template = (
        "[{{ messages[0]['role'] }}] {{ messages[0]['content'] }}\n[reply]"
        "{% for m in messages[1:] %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    policy = small_policy(tokenizer_with(CHATML))
    own = tokenizer_with(CHATML)
    own.chat_template = template
    scorer = scorer_of(own, info())
    guided = GuidedPolicy(policy, scorer, method="pargs-greedy", beta=5.0, top_k=4)
    (completion,) = guided.generate([USER], max_new_tokens=6)
    prompt_ids, read = encode_source(policy.tokenizer, USER)[1], encode_source(own, USER)[1]
    assert read != prompt_ids
    drawn = []
    for _ in range(6):
        logits = policy.model(torch.tensor([[*prompt_ids, *drawn]])).logits[0, -1].log_softmax(-1)
        top = logits.topk(4)
        scores = [reward(scorer.model, [*read, *drawn, int(token)]) for token in top.indices]
        drawn.append(int(top.indices[int((top.values + 5.0 * torch.tensor(scores)).argmax())]))
    assert completion.token_ids == drawn
    (best,) = GuidedPolicy(policy, scorer, method="best-of-n", n=3).generate([USER], max_new_tokens=6, seed=1)
    assert best.score == pytest.approx(reward(scorer.model, [*read, *best.token_ids]), abs=1e-4)


def test_a_scorer_of_the_policys_tokens_says_that_it_reads_the_policys_template():
    policy, own = small_policy(tokenizer_with(CHATML)), tokenizer_with(CHATML)
    own.chat_template = TURNS
    scorer = VocabularyScorer(Policy(small_policy(own).model, own))
    with pytest.warns(UserWarning, match="reads chats in the policy's chat template"):
        GuidedPolicy(policy, scorer, method="genarm")


@pytest.mark.parametrize("name", templates())
def test_training_on_rollouts_reads_what_the_policy_was_given_and_wrote(name, tmp_path):
    tokenizer = tokenizer_with(template_of(name))
    given = by_transformers(tokenizer, USER, add_generation_prompt=True)
    end = turn_end(tokenizer)
    rows = [{"prompt": render_chat(tokenizer, USER, add_generation_prompt=True), "messages": USER, "text": REPLIES[0],
             "reward": 1, "finish_reason": reason} for reason in ("stop", "length")]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished, cut = tokenize_rollouts(read_rollouts(tmp_path / "rows.jsonl", tokenizer=tokenizer).rows, tokenizer)
    text = tokenizer(REPLIES[0], add_special_tokens=False).input_ids
    assert (cut.prompt_ids, cut.completion_ids) == (given, text)
    closing = [2] if end is None else tokenizer(end.closing, add_special_tokens=False).input_ids
    assert (finished.prompt_ids, finished.completion_ids) == (given, [*text, *closing])
    assert end is None or end.token_id is None or finished.completion_ids[-1] == end.token_id
