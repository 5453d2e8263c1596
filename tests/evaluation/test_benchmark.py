"""What the speed measurement counts; the speed of this machine is not tested."""

import torch

from helpers.naive import info, tiny_scorer
from helpers.tiny_models import VOCAB, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.evaluation.benchmark import bytes_per_token, measure_speed, memory_bandwidth, seconds_per_token, start_batch
from rgtg.models.loading.policy import Policy
from rgtg.models.ops.packed_linear import decode_bytes, group_linears
from rgtg.models.scorers.heads import StateHead
from rgtg.models.scorers.hidden_state_head import OwnStateScorer


def test_bytes_of_weights_read_per_token():
    model, reward = tiny_policy(), tiny_reward_model()
    embedding = VOCAB * 32 * 4
    assert decode_bytes(model) == sum(p.nbytes for p in model.parameters()) - embedding
    assert decode_bytes(reward) == sum(p.nbytes for p in reward.parameters()) - embedding
    assert decode_bytes(group_linears(model, pack=False)) == decode_bytes(model)
    tied = tiny_policy("gpt2")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert decode_bytes(tied) == sum(p.nbytes for p in tied.parameters())


def test_a_separate_scorer_and_a_head_add_their_bytes():
    policy = Policy(tiny_policy(), tiny_tokenizer())
    alone = bytes_per_token(policy, None)
    scorer = tiny_scorer()
    assert bytes_per_token(policy, scorer) == alone + decode_bytes(scorer.model)
    about = info().model_copy(update={"trunk": "own", "head": "state", "layer": 2})
    head = StateHead(32, 4)
    expected = alone + sum(p.nbytes for p in head.parameters())
    assert bytes_per_token(policy, OwnStateScorer(policy, head, about)) == expected


def test_the_requested_number_of_steps_is_timed():
    policy = Policy(tiny_policy(), tiny_tokenizer())
    batch = start_batch(policy, None, [[3, 4], [5]], top_k=4, tokens=6)
    assert seconds_per_token(batch, 6) > 0
    assert [len(request.token_ids) for request in batch.requests] == [
        1 + 6
    ] * 2  # the step that warms up, and the timed


def test_guided_and_unguided_speed_are_measured_in_turn():
    said = []
    policy = Policy(tiny_policy(), tiny_tokenizer())
    rows = measure_speed(policy, tiny_scorer(), prompt_length=4, top_k=3, tokens=3, repeats=2, progress=said.append)
    assert [row.name for row in rows] == ["unguided", "guided"]
    assert rows[0].of_unguided == 1
    assert rows[1].limit_ms > rows[0].limit_ms > 0
    assert len(said) == 2 * 3
    assert memory_bandwidth(torch.device("cpu"), repeats=1) > 0
