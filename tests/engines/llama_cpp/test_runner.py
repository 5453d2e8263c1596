"""Sequences of llama.cpp as rows: trees equal whole texts, and rows stay what they are when copied, cut and moved."""

import pytest
import torch

from helpers.llama_models import require_llama_cpp, tiny_llama_policy
from helpers.tiny_models import VOCAB, tiny_policy
from rgtg.decoding.engine.prefix_cache import PrefixCache
from rgtg.decoding.engine.prompt_log_probs import PromptLogProbs
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.models.ops.tree_attention import pack_row, packed_states_of

require_llama_cpp()

PROMPTS = [[5, 9, 20, 33, 7], [4, 40, 11]]
CLOSE = {"atol": 2e-4, "rtol": 0}


@pytest.fixture
def runner():
    made = tiny_llama_policy().model.runner(64, 2)
    made.prefill(PROMPTS)
    return made


@torch.no_grad()
def whole(text):
    """Logits and final state after a text, by the same weights in torch."""
    out = tiny_policy()(torch.tensor([text]), output_hidden_states=True)
    return out.logits[0, -1], out.hidden_states[-1][0, -1]


def newest(runner):
    """The texts that the rows hold, judged by what they say about one more token."""
    states = runner.read(TokenTree.leaves(torch.full((runner.rows, 1), 6)))
    return states.final[:, 0]


def assert_holds(runner, texts):
    assert runner.cache.lengths == [len(text) for text in texts]
    for found, text in zip(newest(runner), texts, strict=True):
        torch.testing.assert_close(found, whole([*text, 6])[0], **CLOSE)


def test_a_prompt_gives_the_logits_and_final_states_of_torch():
    states = tiny_llama_policy().model.runner(64, 2).prefill(PROMPTS)
    for row, text in enumerate(PROMPTS):
        logits, hidden = whole(text)
        torch.testing.assert_close(states.final[row], logits, **CLOSE)
        torch.testing.assert_close(states.hooked[row], hidden, **CLOSE)


@pytest.mark.parametrize("few", [False, True], ids=["at once", "in parts"])
def test_every_node_of_a_tree_reads_its_own_path(runner, few, monkeypatch):
    if few:
        monkeypatch.setattr(type(runner.context), "free_sequences", 2)
    tree = TokenTree(torch.tensor([[3, 4, 5, 6, 7], [7, 8, 9, 10, 11]]), (-1, 0, 0, -1, 2))
    states = runner.read(tree)
    for row, prompt in enumerate(PROMPTS):
        for node in range(5):
            path = [int(tree.tokens[row, j]) for j in tree.path(node)]
            logits, hidden = whole([*prompt, *path])
            torch.testing.assert_close(states.final[row, node], logits, **CLOSE)
            torch.testing.assert_close(states.hooked[row, node], hidden, **CLOSE)
    runner.commit(torch.tensor([[0, 2], [3, 0]]), [2, 1])
    assert_holds(runner, [[*PROMPTS[0], 3, 5], [*PROMPTS[1], 10]])


def test_what_is_not_committed_leaves_nothing_behind(runner):
    for _ in range(3):
        runner.read(TokenTree.leaves(torch.tensor([[3, 4, 5], [6, 7, 8]])))
    assert_holds(runner, PROMPTS)
    runner.read(TokenTree.chain(torch.tensor([[3, 4], [5, 6]])))
    runner.commit(torch.tensor([[0, 1], [0, 1]]), [0, 1])
    assert_holds(runner, [PROMPTS[0], [*PROMPTS[1], 5]])


def test_appended_tokens_and_rollbacks(runner):
    runner.append(torch.tensor([[8, 9, 10], [11, 12, 13]]))
    assert_holds(runner, [[*PROMPTS[0], 8, 9, 10], [*PROMPTS[1], 11, 12, 13]])
    runner.rollback([2, 0])
    assert_holds(runner, [[*PROMPTS[0], 8], [*PROMPTS[1], 11, 12, 13]])


def test_rows_are_chosen_forked_copied_and_added(runner):
    copied = runner.copy_rows([1])
    copied.append(torch.tensor([[20]]))
    runner.select_rows([1, 0, 1])
    runner.append(torch.tensor([[3], [4], [5]]))
    runner.add(copied)
    assert_holds(runner, [[*PROMPTS[1], 3], [*PROMPTS[0], 4], [*PROMPTS[1], 5], [*PROMPTS[1], 20]])
    assert_holds(copied, [[*PROMPTS[1], 20]])


def test_the_cache_grows_and_keeps_its_sequences_and_what_they_share():
    model = tiny_llama_policy().model
    runner = model.runner(8, None)
    runner.prefill([PROMPTS[0]])
    runner.select_rows([0] * 12)
    before = model.context.cells
    for step in range(40):
        runner.append(torch.full((12, 1), 3 + step))
    model.context._grow(2 * before)
    assert model.context.cells == 2 * before
    assert_holds(runner, [[*PROMPTS[0], *range(3, 43)]] * 12)


def test_a_full_cache_grows_by_itself(monkeypatch):
    from rgtg.engines.llama_cpp import context
    from rgtg.engines.llama_cpp.model import LlamaModel

    monkeypatch.setattr(context, "_FIRST_CELLS", 256)
    path = tiny_llama_policy().model.path
    model = LlamaModel(str(path), path, threads=1, exact=True)
    runner = model.runner(1, None)
    runner.prefill([list(range(3, 60)) for _ in range(4)])
    for _ in range(12):
        runner.append(torch.full((4, 1), 9))
    assert model.context.cells >= 512
    assert_holds(runner, [[*range(3, 60), *[9] * 12]] * 4)


def test_saved_prefixes_begin_other_texts(runner):
    saved = runner.cache.copy_rows([0])
    assert saved.nbytes > 0
    other = runner.fresh(64)
    other.reset(1)
    other.cache.copy_prefix(saved, 3)
    other.append(torch.tensor([[17, 18]]))
    assert_holds(other, [[*PROMPTS[0][:3], 17, 18]])


def test_too_many_sequences_are_an_error_that_a_job_can_halve(runner):
    with pytest.raises(RuntimeError, match=r"not enough memory for another sequence: .* holds at most 128"):
        runner.select_rows([0] * 200)
    assert runner.context.free_sequences >= runner.context.max_sequences - 8, "none are lost"
    assert_holds(runner, PROMPTS)


def test_the_same_texts_give_the_same_bits_whatever_was_read_before():
    model = tiny_llama_policy().model

    def read():
        runner = model.runner(64, 2)
        first = runner.prefill(PROMPTS)
        return [first, runner.read(TokenTree.leaves(torch.tensor([[3, 4], [5, 6]])))]

    found = read()
    model.runner(64, 2).prefill([[9] * 30, [8] * 11, [7] * 2])
    for one, other in zip(found, read(), strict=True):
        assert torch.equal(one.final, other.final)
        assert torch.equal(one.hooked, other.hooked)


def test_a_failed_pass_changes_nothing(runner, monkeypatch):
    lib = runner.context._lib

    class Broken:
        def __getattr__(self, name):
            return (lambda *_: -3) if name == "llama_decode" else getattr(lib, name)

    monkeypatch.setattr(runner.context, "_lib", Broken())
    for read in (
        lambda: runner.append(torch.tensor([[3, 4], [5, 6]])),
        lambda: runner.read(TokenTree.leaves(torch.tensor([[3, 4], [5, 6]]))),
    ):
        with pytest.raises(RuntimeError, match="could not read"):
            read()
    monkeypatch.undo()
    assert_holds(runner, PROMPTS)


def test_whole_texts_give_logits_and_states_at_every_token():
    model = tiny_llama_policy().model
    ids = torch.tensor([[5, 9, 20, 33], [4, 40, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    logits, states = model.logits(ids, mask), model.hidden_states(ids, mask, [2])[2]
    assert logits.shape == (2, 4, VOCAB)
    for row, length in ((0, 4), (1, 2)):
        for place in range(length):
            expected = whole(ids[row, : place + 1].tolist())
            torch.testing.assert_close(logits[row, place], expected[0], **CLOSE)
            torch.testing.assert_close(states[row, place], expected[1], **CLOSE)


@pytest.mark.parametrize("chunk", [3, 64])
def test_log_probs_of_a_prompt_are_those_of_torch(chunk):
    ids = [*PROMPTS[0], *PROMPTS[1], 12, 30]
    runner, reader, cache = tiny_llama_policy().model.runner(64, None), PromptLogProbs(ids, 2), PrefixCache(2**20)
    steps = [step for _ in range(4) for step in reader.read(runner, chunk, cache)]
    assert [step.token_id for step in steps] == ids[1:]
    for place, step in enumerate(steps, 1):
        expected = torch.log_softmax(whole(ids[:place])[0], -1)
        for token, log_prob in zip(step.candidate_ids, step.policy_log_probs, strict=True):
            assert log_prob == pytest.approx(float(expected[token]), abs=2e-4)
    assert cache.find(("policy", None), [*ids, 5])[1] == len(ids)


def test_completions_that_share_their_prompt_are_read_as_each_alone():
    model, prompt = tiny_llama_policy().model, list(range(3, 60)) * 2  # more than the tokens of one call
    completions = [[8, 9, 10], [8, 20], [30, 31, 32, 33, 34]]
    packed = [pack_row(prompt, completions), pack_row([5], [[6]])]
    states = packed_states_of(model, packed, [2])[2]
    for columns, completion in zip(packed[0].columns, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        alone = model.hidden_states(ids, torch.ones_like(ids), [2])[2][0]
        torch.testing.assert_close(states[0, columns], alone, **CLOSE)
    torch.testing.assert_close(states[1, 1], whole([5, 6])[1], **CLOSE)
