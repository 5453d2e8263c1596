"""Every way to join a policy with a scorer, against scores and logits of whole texts read one by one."""

import json

import pytest
import torch
from rgtg.decoding.engine.tokenwise import TokenRule, decode
from safetensors.torch import save_file

from helpers.naive import info, make_guided, next_log_probs, tiny_scorer
from helpers.scorer_kinds import final_states, lora, merged, noisy, own
from helpers.tiny_models import VOCAB, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.config import DecodingSettings
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.request import Request, Stopping
from rgtg.decoding.runners import factory as join
from rgtg.decoding.runners import policy_runner as steps
from rgtg.decoding.runners import scorer_runner as readers
from rgtg.decoding.runners.factory import make_stepper
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.policy_runner import (
    Alone,
    Apart,
    AtOnce,
    InOnePass,
    InOnePassOnPrefix,
    OnCandidates,
    OnPrefix,
)
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.ops.lm_head import policy_logits
from rgtg.models.scorers.heads import VocabularyHead
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer
from rgtg.tokenization.encoding import tokenizer_hash

PROMPTS = [[0, 5, 9, 12, 33, 40, 8, 21, 17, 60], [0, 44], [0, 7, 7, 30, 31, 3, 52]]
FAMILIES = ["llama", "mistral", "gpt2", "opt", "gpt_neox", "qwen3"]


def case(kind, family):
    """A policy, a scorer, what joins them, and the score of a whole text by definition."""
    policy = Policy(tiny_policy(family), tiny_tokenizer())
    if kind in (Apart, AtOnce):
        scorer = tiny_scorer(family)
        return policy, scorer, lambda ids: scorer.score_prefixes([ids[:-1]], [ids[-1:]])[0]
    if kind is InOnePass:
        adapter, head = lora(policy.model)
        scorer = SharedTrunkScorer(policy, adapter, head)
        stock = merged(family, adapter)
        return policy, scorer, lambda ids: head @ final_states(stock, ids)[-1]
    if kind is OnCandidates:
        policy, scorer = own(family, "state")
        return policy, scorer, lambda ids: scorer.head(final_states(policy.model, ids, 1)[-1])
    policy, scorer = own(family, "vocab")
    return (
        policy,
        scorer,
        lambda ids: scorer.head(final_states(policy.model, ids[:-1], 1)[-1:], torch.tensor([ids[-1:]])),
    )


def require_steps(stepper, policy, definition, scored=True):
    """Walk four tokens, dropping a row on the way; every score and every logit is the definition's."""
    rows = [list(p) for p in PROMPTS]
    logits = stepper.prefill(rows)
    for step in range(4):
        for row, mine in zip(rows, logits, strict=True):
            expected = next_log_probs(policy.model, row)
            torch.testing.assert_close(mine.double().log_softmax(-1), expected, atol=1e-5, rtol=1e-5)
        ids = torch.randint(3, VOCAB, (len(rows), 5), generator=torch.Generator().manual_seed(step))
        scores = stepper.score(ids)
        if scored:
            for row, mine, candidates in zip(rows, scores, ids.tolist(), strict=True):
                naive = torch.tensor([float(definition([*row, token])) for token in candidates])
                torch.testing.assert_close(mine, naive, atol=2e-5, rtol=2e-5)
        choice = torch.tensor([(step + i) % 5 for i in range(len(rows))])
        stepper.keep(ids, choice)
        for row, candidates, chosen in zip(rows, ids.tolist(), choice.tolist(), strict=True):
            row.append(candidates[chosen])
        if step == 1:
            stepper.select_rows(torch.tensor([0, 2]))
            rows = [rows[0], rows[2]]
        logits = stepper.advance()


@torch.inference_mode()
@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("kind", [Apart, AtOnce, InOnePass, OnCandidates, OnPrefix])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_logits_are_those_of_whole_texts(family, kind, tree):
    policy, scorer, definition = case(kind, family)
    stepper = make_stepper(policy, scorer, 24, top_k=5, tree=tree, overlap=kind is AtOnce)
    assert type(stepper) is kind
    require_steps(stepper, policy, definition)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [Apart, InOnePass, OnCandidates])
def test_more_candidates_than_one_pass_takes(kind, monkeypatch):
    for module in (steps, readers, join):
        monkeypatch.setattr(module, "MAX_WIDTH", 2)
    policy, scorer, definition = case(kind, "llama")
    require_steps(make_stepper(policy, scorer, 24, top_k=5), policy, definition)


@torch.inference_mode()
def test_a_vocabulary_scorer_of_its_own():
    policy, model = Policy(tiny_policy(), tiny_tokenizer()), tiny_policy(seed=9)
    scorer = VocabularyScorer(Policy(model, tiny_tokenizer()), info=info())
    stepper = make_stepper(policy, scorer, 24, top_k=5)
    assert type(stepper) is Apart
    require_steps(stepper, policy, lambda ids: model(input_ids=torch.tensor([ids[:-1]])).logits[0, -1, ids[-1]])


@torch.inference_mode()
def test_a_vocabulary_head_on_an_adapted_trunk():
    policy = Policy(tiny_policy(), tiny_tokenizer())
    adapter, head = lora(policy.model)
    twin = SharedTrunkScorer(policy, adapter, head).model
    table = noisy(VocabularyHead(32, 8, 5, VOCAB))
    stepper = InOnePassOnPrefix(TreeRunner(twin, policy_logits, 32, layer=2), table)
    stock = merged("llama", adapter)
    require_steps(stepper, policy, lambda ids: table(final_states(stock, ids[:-1])[-1:], torch.tensor([ids[-1:]])))


@torch.inference_mode()
def test_the_policy_alone():
    policy = Policy(tiny_policy(), tiny_tokenizer())
    stepper = make_stepper(policy, None, 24)
    assert type(stepper) is Alone
    assert stepper.score(torch.tensor([[1]])) is None
    require_steps(stepper, policy, None, scored=False)


PASSES = [(Apart, (10, 11)), (InOnePass, (11, 0)), (OnCandidates, (11, 0)), (OnPrefix, (10, 0))]


@pytest.mark.parametrize(("kind", "passes"), PASSES)
def test_passes_for_ten_tokens(kind, passes):
    policy, scorer, _ = case(kind, "llama")
    stepper = make_stepper(policy, scorer, 24, top_k=5, overlap=False)
    rule = TokenRule(beta=1.0, top_k=5, top_p=1.0, temperature=1.0, greedy=False)
    stopping = Stopping(policy.tokenizer, set(), DecodingSettings(max_new_tokens=10))
    list(decode([Request("", PROMPTS[0], 0, [])], stepper, rule, stopping))
    assert (stepper.policy.calls, getattr(getattr(stepper, "reader", None), "calls", 0)) == passes


# Adapters on disk


def write_adapter(folder, policy, adapter, head, **config):
    folder.mkdir()
    tensors = {"base_model.model.score.weight": head}
    for name, (down, up) in adapter.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 6, "r": 3, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    about = info().model_copy(
        update={"trunk": "shared", "base_fingerprint": fingerprint_weights(policy.model), "base_model": "tiny",
                "tokenizer_hash": tokenizer_hash(policy.tokenizer)}
    )  # fmt: skip
    (folder / "rgtg.json").write_text(about.model_dump_json())
    return folder


def test_an_adapter_is_read_from_its_folder(tmp_path):
    policy = Policy(tiny_policy(), tiny_tokenizer())
    adapter, head = lora(policy.model)
    folder = write_adapter(tmp_path / "adapter", policy, adapter, head)
    scaled = {name: (down, up * 2) for name, (down, up) in adapter.items()}  # alpha / r
    guided = GuidedPolicy.from_pretrained(policy, str(folder), beta=1.5, top_k=4)
    assert isinstance(guided.scorer, SharedTrunkScorer)
    with pytest.raises(ValueError, match="a model of its own"):
        GuidedPolicy.from_pretrained(policy, str(folder), scorer_device="cpu")
    done = guided.generate_ids(PROMPTS, max_new_tokens=4, trace=True)
    stock = merged("llama", scaled)
    for prompt, completion in zip(PROMPTS, done, strict=True):
        ids = list(prompt)
        for step in completion.trace:
            with torch.no_grad():
                naive = [float(head @ final_states(stock, [*ids, t])[-1]) for t in step.candidate_ids]
            assert step.scores == pytest.approx(naive, abs=2e-5, rel=2e-5)
            ids.append(step.token_id)


def test_an_adapter_of_another_policy_or_kind_is_refused(tmp_path):
    policy = Policy(tiny_policy(), tiny_tokenizer())
    adapter, head = lora(policy.model)
    folder = write_adapter(tmp_path / "adapter", policy, adapter, head)
    other = Policy(tiny_policy(seed=3), tiny_tokenizer())
    with pytest.raises(ValueError, match="weights"):
        GuidedPolicy.from_pretrained(other, str(folder))
    odd = write_adapter(tmp_path / "dora", policy, adapter, head, use_dora=True)
    with pytest.raises(ValueError, match="not a plain LoRA"):
        GuidedPolicy.from_pretrained(policy, str(odd))
    (folder / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot read the LoRA scorer"):
        GuidedPolicy.from_pretrained(policy, str(folder))


def test_best_of_n_reads_finished_completions_with_a_vocabulary_scorer():
    policy = Policy(tiny_policy(), tiny_tokenizer())
    scorer = VocabularyScorer(Policy(tiny_policy(seed=9), tiny_tokenizer()), info=info())
    drawn = GuidedPolicy(policy, scorer, method="best-of-n", n=3).generate_ids(PROMPTS[:1], max_new_tokens=4)[0]
    assert drawn.scorer_calls == 3
    whole = scorer.score_prefixes(PROMPTS[:1], [drawn.token_ids])[0][-1]
    assert drawn.score == pytest.approx(float(whole), abs=1e-4)


NOT_AT_ONCE = [({"top_k": None}, "set top_k"), ({"draft": "policy"}, "a draft"), ({"method": "policy"}, "of its own")]


@pytest.mark.parametrize(("settings", "message"), NOT_AT_ONCE)
def test_what_cannot_run_at_once_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_guided(overlap=True, **settings)


@pytest.mark.parametrize("method", ["pargs", "pargs-greedy"])
def test_at_once_gives_what_apart_gives(method):
    apart, at_once = (
        make_guided(method, beta=1.5, overlap=overlap).generate_ids(PROMPTS, max_new_tokens=10, seed=3)
        for overlap in (False, True)
    )
    assert [c.token_ids for c in apart] == [c.token_ids for c in at_once]


def test_the_scorer_may_be_asked_for_elsewhere_only_by_name():
    with pytest.raises(ValueError, match="scorer_device"):
        GuidedPolicy.from_pretrained(
            (tiny_policy(), tiny_tokenizer()), PrefixScorer(tiny_reward_model(), tiny_tokenizer()), scorer_device="cpu"
        )
