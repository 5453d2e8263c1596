import itertools
import statistics

from rgtg.demo import sentences
from rgtg.demo.gold import gold_reward, parse_reply
from rgtg.demo.world import Customer, customers, draw_pair, random_stream, right_remedy, write_reply


def _customers(seed: int, count: int, **options) -> list[Customer]:
    return list(itertools.islice(customers(seed, "test", **options), count))


def test_the_seed_decides_everything():
    def texts(seed):
        rng = random_stream(seed, "replies")
        return [(c.prompt, write_reply(c, rng)) for c in _customers(seed, 20)]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_unseen_messages_avoid_the_given_ones():
    seen = {customer.prompt for customer in _customers(0, 300)}
    assert len(seen) == 300
    assert not seen & {customer.prompt for customer in _customers(0, 300, avoid=seen)}


def test_replies_parse_and_messages_contain_the_customers_facts():
    rng = random_stream(3, "replies")
    for customer in _customers(3, 500):
        assert customer.name in customer.prompt
        assert customer.product in customer.prompt
        reply = write_reply(customer, rng)
        assert reply.startswith(" ")
        assert None not in parse_reply(reply).kinds


def test_rewards_of_replies_vary():
    rng = random_stream(0, "replies")
    marks = [gold_reward(customer, write_reply(customer, rng)) for customer in _customers(0, 2000)]
    assert statistics.pstdev(marks) > 1
    assert max(marks) == 5.0


def test_every_problem_has_a_remedy():
    found = {right_remedy(problem, recent=recent) for problem in sentences.PROBLEMS for recent in (True, False)}
    assert found == set(sentences.REMEDIES)


def test_labels_follow_bradley_terry():
    """Among pairs whose gold differs by d, the better side is chosen with probability σ(d)."""
    rng, right = random_stream(0, "labels"), []
    for customer in _customers(0, 6000):
        pair = draw_pair(customer, rng)
        difference = gold_reward(customer, pair.chosen) - gold_reward(customer, pair.rejected)
        if abs(difference) == 1.0:
            right.append(difference > 0)
    assert abs(statistics.mean(right) - 0.731) < 4 * (0.2 / len(right)) ** 0.5
