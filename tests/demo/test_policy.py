import itertools

import pytest
import torch

from rgtg.demo.policy import new_policy, reply_loss, train_policy, train_tokenizer
from rgtg.demo.world import customers, random_stream, write_reply
from rgtg.models.loading.policy import load_policy
from rgtg.tokenization.encoding import encode_completion, encode_prompt, tokenizer_hash


@pytest.fixture(scope="module")
def corpus():
    rng = random_stream(0, "replies")
    return [(c.prompt, write_reply(c, rng)) for c in itertools.islice(customers(0, "corpus"), 200)]


def test_training_lowers_the_loss_and_the_folder_is_an_ordinary_policy(corpus, tmp_path):
    losses = []
    train_policy(tmp_path, corpus, steps=12, seed=0, progress=lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 1
    policy = load_policy(str(tmp_path))
    trained = train_tokenizer([prompt + reply for prompt, reply in corpus])
    assert tokenizer_hash(policy.tokenizer) == tokenizer_hash(trained)
    prompt, reply = corpus[0]
    ids = encode_prompt(policy.tokenizer, prompt) + encode_completion(policy.tokenizer, prompt, reply)
    assert policy.tokenizer.decode(ids) == f"<s>{prompt}{reply}</s>"
    assert policy.max_length > max(len(trained(p + r).input_ids) for p, r in corpus) + 96


def test_weights_depend_on_the_seed_and_not_on_the_global_generator():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, same, other = (new_policy(300, seed).model.embed_tokens.weight for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_loss_of_a_batch_is_the_mean_over_its_reply_tokens():
    model = new_policy(300, 0).eval()
    rows = [([0, 5, 6, 7], [8, 9, 2]), ([0, 4], [11, 2])]
    total, count = 0.0, 0
    with torch.no_grad():
        for prompt, reply in rows:
            log_probs = model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
            for i, token in enumerate(reply):
                total -= float(log_probs[len(prompt) + i - 1, token])
                count += 1
        assert float(reply_loss(model, rows)) == pytest.approx(total / count, abs=1e-5)
