"""Runners of the policy with a scorer of every kind equal scores and logits of whole texts read one by one."""

import json

import pytest
import torch
from safetensors.torch import save_file

from helpers.batches import make_request, run, start
from helpers.naive import info, make_guided, next_log_probs, tiny_scorer
from helpers.scorer_kinds import final_states, lora, merged, noisy, own
from helpers.tiny_models import VOCAB, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.runners import policy_runner, scorer_runner
from rgtg.decoding.runners.factory import RunnerFactory, TokenRunners
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.policy_runner import LoraPolicyRunner, TorchPolicyRunner
from rgtg.decoding.runners.scorer_runner import (
    SeparateScorerRunner,
    StateHeadRunner,
    TokenRewardRunner,
    VocabHeadRunner,
)
from rgtg.decoding.runners.token_tree import States
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
# How a scorer scores: by a model of its own (with the policy reading the candidates at the same time, or not), in the
# policy's pass over the candidates, or from the policy's state at the prefix.
KINDS = ["separate", "overlapped", "lora", "state head", "vocab head"]


def case(kind, family):
    """A policy, a scorer, and the score of a whole text by definition."""
    policy = Policy(tiny_policy(family), tiny_tokenizer())
    if kind in ("separate", "overlapped"):
        scorer = tiny_scorer(family)
        return policy, scorer, lambda ids: scorer.score_prefixes([ids[:-1]], [ids[-1:]])[0]
    if kind == "lora":
        adapter, head = lora(policy.model)
        scorer = SharedTrunkScorer(policy, adapter, head)
        stock = merged(family, adapter)
        return policy, scorer, lambda ids: head @ final_states(stock, ids)[-1]
    if kind == "state head":
        policy, scorer = own(family, "state")
        return policy, scorer, lambda ids: scorer.head(final_states(policy.model, ids, 1)[-1])
    policy, scorer = own(family, "vocab")
    return (
        policy,
        scorer,
        lambda ids: scorer.head(final_states(policy.model, ids[:-1], 1)[-1:], torch.tensor([ids[-1:]])),
    )


def runners_of(policy, scorer=None, tree=None):
    named = {} if scorer is None else {"scorer": scorer}
    return RunnerFactory(policy, named, tree).token_runners(tuple(named))


def require_steps(runners, policy, definition=None, overlapped=False):
    """Walk four tokens, removing a row on the way; every score and all logits are those of the definition."""
    rows = [list(prompt) for prompt in PROMPTS]
    of_policy = runners.policy.fresh(24, 5)
    state = of_policy.prefill(rows)
    separate = [runner.fresh(24, 5) for runner in runners.scorers.values()]
    for runner in separate:
        runner.prefill([make_request(policy, prompt) for prompt in rows], rows)
    for step in range(4):
        for row, mine in zip(rows, state.logits, strict=True):
            expected = next_log_probs(policy.model, row)
            torch.testing.assert_close(mine.double().log_softmax(-1), expected, atol=1e-5, rtol=1e-5)
        ids = torch.randint(3, VOCAB, (len(rows), 5), generator=torch.Generator().manual_seed(step))
        choice = torch.tensor([(step + i) % 5 for i in range(len(rows))])
        tree, scores = None, None
        if overlapped or runners.options["fused"] is not None:
            tree = of_policy.tree(ids)
        if runners.options["fused"] is not None:
            scores = runners.options["fused"][1].score(tree)
        for head in runners.options["heads"].values():
            scores = head.score(state.hidden, ids)
        for runner in separate:
            scores = runner.score(ids)
        if definition is not None:
            for row, mine, candidates in zip(rows, scores, ids.tolist(), strict=True):
                naive = torch.tensor([float(definition([*row, token])) for token in candidates])
                torch.testing.assert_close(mine, naive, atol=2e-5, rtol=2e-5)
        for runner in separate:
            runner.commit(ids, choice)
        tokens, at = ids.gather(1, choice[:, None]), torch.arange(len(rows))
        if tree is not None:
            of_policy.commit(ids, choice)
            tree = States(tree.final[at, choice], None if tree.hooked is None else tree.hooked[at, choice])
        for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            row.append(token)
        if step == 1:
            for runner in (of_policy, *separate):
                runner.select_rows([0, 2])
            rows, tokens = [rows[0], rows[2]], tokens[[0, 2]]
            tree = None if tree is None else States(*(None if part is None else part[[0, 2]] for part in tree))
        state = of_policy.step(tokens) if tree is None else of_policy.predict(tree)


@torch.inference_mode()
@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_logits_equal_those_of_whole_texts(family, kind, tree):
    policy, scorer, definition = case(kind, family)
    runners = runners_of(policy, scorer, tree)
    assert type(runners.policy) is (LoraPolicyRunner if kind == "lora" else TorchPolicyRunner)
    fused, heads = runners.options["fused"], runners.options["heads"]
    assert (type(fused[1]) is StateHeadRunner) if kind in ("lora", "state head") else fused is None
    assert list(map(type, heads.values())) == [VocabHeadRunner] * (kind == "vocab head")
    separate = kind in ("separate", "overlapped")
    assert list(map(type, runners.scorers.values())) == [SeparateScorerRunner] * separate
    require_steps(runners, policy, definition, overlapped=kind == "overlapped")


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["separate", "lora", "state head"])
def test_more_candidates_than_one_pass_takes_are_read_in_several(kind, monkeypatch):
    for module in (policy_runner, scorer_runner):
        monkeypatch.setattr(module, "MAX_WIDTH", 2)
    policy, scorer, definition = case(kind, "llama")
    require_steps(runners_of(policy, scorer), policy, definition)


@torch.inference_mode()
def test_a_vocabulary_scorer_with_a_model_of_its_own():
    policy, model = Policy(tiny_policy(), tiny_tokenizer()), tiny_policy(seed=9)
    scorer = VocabularyScorer(Policy(model, tiny_tokenizer()), info=info())
    runners = runners_of(policy, scorer)
    assert type(runners.scorers["scorer"]) is TokenRewardRunner
    require_steps(runners, policy, lambda ids: model(input_ids=torch.tensor([ids[:-1]])).logits[0, -1, ids[-1]])


@torch.inference_mode()
def test_a_vocabulary_head_on_an_adapted_trunk():
    policy = Policy(tiny_policy(), tiny_tokenizer())
    adapter, head = lora(policy.model)
    twin = SharedTrunkScorer(policy, adapter, head).model
    table = noisy(VocabularyHead(32, 8, 5, VOCAB))
    doubled = LoraPolicyRunner(TreeRunner(twin, policy_logits, layer=2))
    runners = TokenRunners(None, doubled, {}, {"fused": None, "heads": {"table": VocabHeadRunner(twin, table)}})
    stock = merged("llama", adapter)
    require_steps(runners, policy, lambda ids: table(final_states(stock, ids[:-1])[-1:], torch.tensor([ids[-1:]])))


@torch.inference_mode()
def test_the_policy_without_a_scorer():
    policy = Policy(tiny_policy(), tiny_tokenizer())
    runners = runners_of(policy)
    assert type(runners.policy) is TorchPolicyRunner
    assert (runners.scorers, runners.options) == ({}, {"fused": None, "heads": {}})
    require_steps(runners, policy)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["separate", "lora", "vocab head"])
def test_a_step_that_raises_in_the_output_head_changes_nothing(kind, monkeypatch):
    policy, scorer, _ = case(kind, "llama")
    runner = runners_of(policy, scorer).policy.fresh(24, 5)
    runner.prefill(PROMPTS)
    again = runner.copy_rows([0, 1, 2])
    head = runner.runner.head
    monkeypatch.setattr(runner.runner, "head", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.step(torch.tensor([[4], [5], [6]]))
    monkeypatch.setattr(runner.runner, "head", head)
    one, other = (each.step(torch.tensor([[4], [5], [6]])) for each in (runner, again))
    torch.testing.assert_close(one.logits, other.logits)


PASSES = [("separate", (10, 11)), ("lora", (11, 0)), ("state head", (11, 0)), ("vocab head", (10, 0))]


@pytest.mark.parametrize(("kind", "passes"), PASSES)
def test_passes_for_ten_tokens(kind, passes):
    policy, scorer, _ = case(kind, "llama")
    request = make_request(policy, PROMPTS[0], ["scorer"], [1.0], top_k=5, max_new_tokens=10)
    request.stopping.eos_ids = set()
    batch = start(policy, {"scorer": scorer}, [request])
    model_runner, separate = batch.policy.runner, [entry.runner for entry in batch.separate.values()]
    assert run(batch) == 10
    assert (model_runner.calls, sum(runner.calls for runner in separate)) == passes


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


NOT_OVERLAPPED = [
    ({"top_k": None}, "set top_k"),
    ({"draft": "policy"}, "a draft"),
    ({"method": "policy"}, "of its own"),
]


@pytest.mark.parametrize(("settings", "message"), NOT_OVERLAPPED)
def test_setups_that_cannot_overlap_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_guided(overlap=True, **settings)


@pytest.mark.parametrize("method", ["pargs", "pargs-greedy"])
def test_overlapped_passes_draw_the_same_tokens(method):
    plain, overlapped = (
        make_guided(method, beta=1.5, overlap=overlap).generate_ids(PROMPTS, max_new_tokens=10, seed=3)
        for overlap in (False, True)
    )
    assert [c.token_ids for c in plain] == [c.token_ids for c in overlapped]


def test_a_scorer_device_is_refused_for_a_loaded_scorer():
    with pytest.raises(ValueError, match="scorer_device"):
        GuidedPolicy.from_pretrained(
            (tiny_policy(), tiny_tokenizer()), PrefixScorer(tiny_reward_model(), tiny_tokenizer()), scorer_device="cpu"
        )
