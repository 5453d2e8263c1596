"""Heads on the policy's own hidden states: values by hand, the definition, and loading from folders."""

import json

import pytest
import torch

from helpers.naive import info
from helpers.tiny_models import CONFIGS, tiny_policy, tiny_tokenizer
from rgtg.errors import DataError, ModelNotFoundError, TokenizerMismatchError, UsageError
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import cast_fingerprints, fingerprint_weights, read_info, write_info
from rgtg.models.scorers.base import load_scorer
from rgtg.models.scorers.heads import StateHead, VocabularyHead, round_to_half, save_head
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.tokenization.encoding import tokenizer_hash

PROMPTS, COMPLETIONS = [[0, 9, 4], [0, 44, 8, 8, 20]], [[7, 30, 31, 3, 52, 12, 9], [5, 2]]
FAMILIES = sorted(CONFIGS)


def make_head(kind, seed=0):
    torch.manual_seed(seed)
    head = StateHead(32, 8) if kind == "state" else VocabularyHead(32, 8, 4, 64)
    with torch.no_grad():
        head.mlp.mean.normal_()
        head.mlp.std.uniform_(0.5, 2.0)
        if kind == "vocab":
            head.bias.normal_()
    round_to_half(head)
    return head.requires_grad_(False)


def describe(kind, layer, policy, **changes):
    about = {
        "trunk": "own", "head": kind, "layer": layer, "width": 8, "base_model": "tiny",
        "base_fingerprint": fingerprint_weights(policy.model), "base_casts": cast_fingerprints(policy.model),
        "tokenizer_hash": tokenizer_hash(policy.tokenizer),
    }  # fmt: skip
    return info().model_copy(update=about | changes)


def make_scorer(kind, family="llama", layer=2, **changes):
    policy = Policy(tiny_policy(family), tiny_tokenizer())
    return OwnStateScorer(policy, make_head(kind), describe(kind, layer, policy, **changes))


@pytest.fixture
def head_folder(tmp_path, policy_folder):
    """A saved vocabulary head that names the saved policy."""
    folder = tmp_path / "head"
    folder.mkdir()
    save_head(folder, make_head("vocab"))
    write_info(folder, describe("vocab", 1, load_policy(str(policy_folder)), base_model=str(policy_folder)))
    return folder


@torch.no_grad()
def definition(scorer, prompt, completion):
    """r(y_{1:i}), one prefix at a time, through transformers' own hidden states."""
    scores = []
    for i in range(1, len(completion) + 1):
        ids = torch.tensor([[*prompt, *completion[:i]]])
        states = scorer.model(ids, output_hidden_states=True).hidden_states[scorer.layer][0]
        if scorer.kind == "state":
            scores.append(scorer.head(states[-1]))
        else:
            scores.append(scorer.head(states[-2:-1], ids[:, -1:])[0, 0])
    return torch.stack(scores)


def test_state_head_computed_by_hand():
    head = StateHead(2, 1)
    with torch.no_grad():
        head.mlp.mean.copy_(torch.tensor([1.0, 0.0]))
        head.mlp.std.copy_(torch.tensor([2.0, 1.0]))
        head.mlp.first.weight.copy_(torch.tensor([[1.0, -1.0]]))
        head.mlp.first.bias.fill_(0.5)
        head.mlp.second.weight.fill_(3.0)
        head.mlp.second.bias.fill_(-1.0)
    # h̃ = ((3 − 1) / 2, 0.5), 1 − 0.5 + 0.5 = 1; GELU(1) = Φ(1) = 0.841345; 3 · 0.841345 − 1
    score = head(torch.tensor([3.0, 0.5]))
    assert score.item() == pytest.approx(1.524034, abs=1e-5)
    assert head(torch.zeros(5, 7, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_vocabulary_head_computed_by_hand():
    head = VocabularyHead(1, 1, 2, 3)
    with torch.no_grad():
        head.mlp.first.weight.fill_(1.0)
        head.mlp.first.bias.fill_(0.0)
        head.mlp.second.weight.copy_(torch.tensor([[1.0], [2.0]]))
        head.mlp.second.bias.copy_(torch.tensor([0.0, -1.0]))
        head.table.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, -1.0]]))
        head.bias.copy_(torch.tensor([0.25, 0.0, -1.0]))
    # GELU(1) = 0.841345; q = (0.841345, 0.682689); ⟨q, (2, −1)⟩ − 1, 0 + 0.25, ⟨q, (1, 1)⟩
    scores = head(torch.tensor([[1.0]]), torch.tensor([[2, 0, 1]]))
    assert scores.tolist() == [pytest.approx([0.0, 0.25, 1.524034], abs=1e-5)]


def test_candidates_equal_the_product_over_the_whole_vocabulary():
    head, states = make_head("vocab"), torch.randn(3, 32)
    candidates = torch.tensor([[5, 0, 63], [9, 9, 1], [2, 30, 31]])
    everything = head.mlp(states) @ head.table.weight.T + head.bias
    torch.testing.assert_close(head(states, candidates), everything.gather(-1, candidates))
    at = head.positions(states[None], candidates[None, :, 0])
    torch.testing.assert_close(at, everything[torch.arange(3), candidates[:, 0]][None])


def test_only_the_rows_of_the_candidates_get_a_gradient():
    head = make_head("vocab").requires_grad_(True)
    head(torch.randn(1, 32), torch.tensor([[7, 9]])).sum().backward()
    assert head.table.weight.grad.abs().sum(-1).nonzero().flatten().tolist() == [7, 9]


@pytest.mark.parametrize("kind", ["state", "vocab"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_prefix_equals_the_definition(family, kind):
    for layer in (1, 2):
        scorer = make_scorer(kind, family, layer)
        scores = scorer.score_prefixes(PROMPTS, COMPLETIONS, batch_size=2)
        for prompt, completion, found in zip(PROMPTS, COMPLETIONS, scores, strict=True):
            torch.testing.assert_close(found, definition(scorer, prompt, completion), atol=1e-4, rtol=1e-4)


def test_a_saved_head_is_loaded_as_it_was(head_folder, policy_folder):
    policy = load_policy(str(policy_folder))
    scorer = load_scorer(str(head_folder), policy=policy)
    assert isinstance(scorer, OwnStateScorer)
    assert scorer.model is policy.model
    assert (scorer.kind, scorer.layer, scorer.info) == ("vocab", 1, read_info(head_folder))
    wanted = make_head("vocab").state_dict()
    for name, tensor in scorer.head.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    alone = load_scorer(str(head_folder), device="cpu")  # loads the policy that its description names
    for one, other in zip(
        scorer.score_prefixes(PROMPTS, COMPLETIONS), alone.score_prefixes(PROMPTS, COMPLETIONS), strict=True
    ):
        assert torch.equal(one, other)
    assert load_scorer(alone) is alone
    with pytest.raises(UsageError, match="another loaded policy"):
        load_scorer(alone, policy=policy)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_policy_in_16_bits_is_recognized(head_folder, policy_folder, dtype):
    policy = load_policy(str(policy_folder), dtype=dtype)
    assert load_scorer(str(head_folder), policy=policy, dtype=dtype).model is policy.model
    with pytest.raises(UsageError, match="is loaded in"):
        load_scorer(str(head_folder), policy=policy, dtype="float32")


def test_another_policy_raises_an_error(head_folder):
    stranger = Policy(tiny_policy(seed=5), tiny_tokenizer())
    with pytest.raises(UsageError, match=r"was trained on the states of .*policy .*train one for this policy"):
        load_scorer(str(head_folder), policy=stranger)


def test_another_tokenizer_raises_an_error(head_folder, policy_folder):
    policy = load_policy(str(policy_folder))
    policy.tokenizer.add_tokens(["new"])
    with pytest.raises(TokenizerMismatchError, match="another tokenizer"):
        load_scorer(str(head_folder), policy=policy)


def test_a_packed_policy_keeps_its_fingerprint():
    model = tiny_policy()
    model._rgtg_fingerprint = "kept"
    assert fingerprint_weights(model) == "kept"


def test_damaged_folders_and_those_of_other_models_raise_an_error(head_folder, policy_folder, scorer_folder, tmp_path):
    policy = load_policy(str(policy_folder))
    with pytest.raises(UsageError, match="a head on its policy's own states"):
        PrefixScorer.from_pretrained(str(head_folder))
    with pytest.raises(ModelNotFoundError, match="no model folder"):
        OwnStateScorer.from_pretrained(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="no head on a policy's own states"):
        OwnStateScorer.from_pretrained(str(scorer_folder))
    assert isinstance(load_scorer(str(scorer_folder), policy=policy), PrefixScorer)
    weights = head_folder / "head.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(DataError, match="damaged"):
        load_scorer(str(head_folder), policy=policy)
    weights.write_bytes(whole)
    told = json.loads((head_folder / "rgtg.json").read_text())
    (head_folder / "rgtg.json").write_text(json.dumps(told | {"head": "state"}))
    with pytest.raises(DataError, match="no state head"):
        load_scorer(str(head_folder), policy=policy)
    (head_folder / "rgtg.json").unlink()
    for load in (load_scorer, OwnStateScorer.from_pretrained):
        with pytest.raises(UsageError, match="interrupted"):
            load(str(head_folder))


def test_the_error_says_how_to_name_a_policy_that_has_moved(head_folder):
    write_info(head_folder, read_info(head_folder).model_copy(update={"base_model": "./gone/policy"}))
    with pytest.raises(ModelNotFoundError, match="--policy"):
        load_scorer(str(head_folder))


def test_a_description_without_the_newer_fields_is_read(scorer_folder):
    old = info().model_dump(exclude={"trunk", "head", "layer", "width", "rank", "base_casts"})
    (scorer_folder / "rgtg.json").write_text(json.dumps(old))
    assert read_info(scorer_folder).trunk == "separate"
