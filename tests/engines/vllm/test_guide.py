"""Guidance on logits: equal to the decoding loop's own draw, for every method that decides token by token."""

import pytest
import torch

from helpers.random_heads import write_random_head
from rgtg.config.engines import ENGINES
from rgtg.decoding.methods import METHODS
from rgtg.decoding.sampling import SamplingParams, draw, guided_log_probs, propose_candidates
from rgtg.engines.vllm.arguments import Guide, read_guide, xargs
from rgtg.engines.vllm.guide import HeadOnStates, TorchHead, guide_rows
from rgtg.engines.vllm.states import LatestStates
from rgtg.models.scorers.head_file import read_head

KNOWN = {"a": True, "b": True}
LACKS = ENGINES["vllm"].lacks
TOKEN_METHODS = [name for name, row in METHODS.items() if row.unit == "token" and row.scorer and name not in LACKS]


class Table:
    """A scorer that gives every row fixed scores (B, V)."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, wanted):
        own = [(self.scores[list(rows)], ids) for rows, ids in wanted]
        return [scores if ids is None else scores.gather(1, ids) for scores, ids in own]


def scorers(rows=3, vocabulary=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: Table(torch.randn(rows, vocabulary, generator=generator)) for name in KNOWN}


def test_a_row_computed_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    guide = read_guide(xargs("a", 2.0, top_k=2), KNOWN)
    assert guide_rows(logits, {0: guide}, {"a": Table(torch.tensor([[0.0, 1.0, 5.0]]))}).tolist() == [False]
    # log 0.5 + 0 against log 0.3 + 2; the third token is no candidate
    assert logits[0].tolist() == pytest.approx([torch.log(torch.tensor(0.5 / 0.3)).item() - 2, 0.0, -torch.inf])


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
@pytest.mark.parametrize("top_k", [None, 1, 5, 40, 1000])
@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_equal_to_the_draw_of_the_decoding_loop(method, top_k, names):
    row, tables = METHODS[method], scorers()
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(7)) * 3
    logits[1, :30] = -torch.inf  # banned tokens, also among the candidates
    betas = [1.5, -0.75][: len(names)]
    k = row.top_k if top_k is None else top_k
    params = SamplingParams(
        beta=1.0 if len(names) > 1 else betas[0], top_k=k, greedy=row.rule == "greedy", clip=row.clip,
        top_k_of_sums=row.candidates == "sum",
    )  # fmt: skip
    log_probs = torch.log_softmax(logits, -1)
    candidates = propose_candidates(log_probs, log_probs, params)
    each = torch.stack([tables[name].scores.gather(1, candidates.ids) for name in names])
    total = each[0] if len(names) == 1 else torch.einsum("s,sbk->bk", torch.tensor(betas), each)
    drawn = draw(candidates, total, [0.5] * 3, params)
    expected = torch.zeros(3, 40).scatter(1, drawn.ids, drawn.guided.exp())

    guide = read_guide(xargs(names, betas, top_k=top_k, method=method), KNOWN)
    guide_rows(logits, dict.fromkeys(range(3), guide), tables)
    torch.testing.assert_close(torch.softmax(logits, -1), expected, atol=1e-5, rtol=1e-5)


def test_other_rows_are_not_touched_and_order_does_not_matter():
    tables, logits = scorers(5), torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    guides = {
        4: read_guide(xargs("a", 2.0, top_k=3), KNOWN),
        1: read_guide(xargs(["b", "a"], [1.0, 3.0], top_k=3), KNOWN),
        2: read_guide(xargs("b", 1.0, method="genarm"), KNOWN),
    }
    guide_rows(logits, guides, tables)
    assert torch.equal(logits[[0, 3]], before[[0, 3]])
    for row, guide in guides.items():
        alone = before.clone()
        guide_rows(alone, {row: guide}, tables)
        torch.testing.assert_close(logits[row], alone[row])


def test_padding_is_no_candidate():
    logits, tables = torch.zeros(1, 40), scorers(1)
    logits[0, 38:] = 50.0
    guide_rows(logits, {0: read_guide(xargs("a", 1.0, top_k=39), KNOWN)}, tables, torch.tensor([38, 39]))
    assert logits[0].isfinite().tolist() == [True] * 38 + [False] * 2


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_finite_scores_is_left_to_the_policy(wrong):
    tables, logits = scorers(2), torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    tables["a"].scores[1] = wrong
    guide = read_guide(xargs("a", 2.0, top_k=4), KNOWN)
    values, ids = logits.topk(4)
    policy = torch.full_like(logits, -torch.inf).scatter(1, ids, values)
    assert guide_rows(logits, {0: guide, 1: guide}, tables).tolist() == [False, True]
    torch.testing.assert_close(torch.softmax(logits[1], -1), torch.softmax(policy[1], -1))


@pytest.mark.parametrize("beta", [-1e30, -30.0, 0.0, 1e30])
def test_extreme_betas_stay_finite(beta):
    logits, tables = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)), scorers(1)
    values, ids = logits.topk(5)
    wanted = guided_log_probs(torch.log_softmax(values, -1), tables["a"].scores.gather(1, ids), beta)
    guide_rows(logits, {0: read_guide(xargs("a", beta, top_k=5), KNOWN)}, tables)
    torch.testing.assert_close(torch.log_softmax(logits, -1).gather(1, ids), wanted, atol=1e-4, rtol=1e-4)


def test_a_head_scores_as_its_file_says(tmp_path, policy_folder):
    write_random_head(tmp_path / "head", policy_folder)
    file = read_head(str(tmp_path / "head"))
    head = TorchHead(file, torch.device("cpu"))
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 9], [60, 0]])
    on_states = HeadOnStates(head, states)
    wanted = torch.from_numpy(file.score(states.numpy()))
    every, some = on_states.score([([0, 1, 2, 3], None), ([3, 1], ids)])
    torch.testing.assert_close(every, wanted)
    torch.testing.assert_close(some, wanted[[3, 1]].gather(1, ids))
    assert some.dtype == head.score(states.bfloat16(), None).dtype == torch.float32


def test_states_are_handed_out_in_order():
    latest = LatestStates()
    with pytest.raises(RuntimeError, match="cannot be guided"):
        latest.take(1)
    latest.put(torch.arange(5)[:, None])
    assert latest.take(2)[:, 0].tolist() == [0, 1]
    assert latest.take(3)[:, 0].tolist() == [2, 3, 4]
    with pytest.raises(RuntimeError, match="has 0"):
        latest.take(1)
    latest.put(torch.arange(3)[:, None])
    assert latest.take(3)[:, 0].tolist() == [0, 1, 2]


def test_a_guide_is_hashable():
    assert isinstance(hash(read_guide(xargs("a"), KNOWN)), int)
    assert read_guide(xargs("a"), KNOWN) == Guide(("a",), (1.0,), 10, METHODS["pargs"])
