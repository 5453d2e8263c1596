"""Generates the demo's customers, who have a problem, and the replies of agents with different skill (docs/demo.md)."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from rgtg.demo import sentences
from rgtg.demo.gold import gold_reward
from rgtg.types.generation import PreferencePair

CUE = "\nReply:"


@dataclass(frozen=True)
class Customer:
    """A customer and the message as a prompt; ``product`` is a colour and a thing, such as "blue kettle"."""

    name: str
    product: str
    problem: str
    recent: bool
    prompt: str

    @property
    def remedy(self) -> str:
        """The correct remedy."""
        return right_remedy(self.problem, recent=self.recent)

    @property
    def at_fault(self) -> bool:
        """Whether the shop owes an apology."""
        return self.problem in sentences.AT_FAULT


def right_remedy(problem: str, *, recent: bool) -> str:
    """The correct remedy for a problem.

    >>> right_remedy("broken", recent=True), right_remedy("broken", recent=False)
    ('replace', 'repair')
    """
    by_age = {"broken": ("replace", "repair"), "unwanted": ("refund", "decline")}
    fixed = {"missing": "trace", "charged": "repay", "swapped": "exchange", "unclear": "instruct"}
    return fixed[problem] if problem in fixed else by_age[problem][0 if recent else 1]


def random_stream(seed: int, purpose: str) -> random.Random:
    """A separate random generator for each purpose, so that the stages are independent."""
    return random.Random(f"rgtg-demo/{seed}/{purpose}")


def draw_product(rng: random.Random) -> str:
    """A colour and a thing."""
    return f"{rng.choice(sentences.COLOURS)} {rng.choice(sentences.THINGS)}"


def draw_customer(rng: random.Random) -> Customer:
    """A random customer, with the message as a prompt."""
    name, product = rng.choice(sentences.NAMES), draw_product(rng)
    problem, recent = rng.choice(list(sentences.PROBLEMS)), rng.random() < 0.5
    parts = [
        rng.choice(sentences.OPENINGS),
        rng.choice(sentences.INTRODUCTIONS).format(name=name),
        rng.choice(sentences.PROBLEMS[problem]).format(product=product, other=another_product(product, rng)),
        rng.choice(sentences.RECENT if recent else sentences.OLD),
        rng.choice(sentences.ENDINGS),
    ]
    return Customer(name, product, problem, recent, f"Customer: {' '.join(parts)}{CUE}")


def another_product(product: str, rng: random.Random) -> str:
    """The same thing in another colour, or another thing."""
    colour, thing = product.split()
    if rng.random() < 0.5:
        return f"{rng.choice([c for c in sentences.COLOURS if c != colour])} {thing}"
    return f"{rng.choice(sentences.COLOURS)} {rng.choice([t for t in sentences.THINGS if t != thing])}"


def write_reply(customer: Customer, rng: random.Random) -> str:
    """One agent's reply, with a leading space. Each part is correct with a probability that is the agent's skill."""
    skill = rng.uniform(0.15, 0.85)

    def right() -> bool:
        return rng.random() < skill

    kinds: list[str] = []
    name = customer.name
    if right():
        kinds.append("greeting")
    else:
        kinds += rng.choice((["greeting"], ["thanks"], []))
        name = rng.choice([n for n in sentences.NAMES if n != customer.name])
    kinds += ["apology"] if right() else rng.choice((["reproach"], []))
    remedy = customer.remedy if right() else _wrong_remedy(customer.remedy, rng)
    kinds += [remedy] if remedy else []
    if not right() and rng.random() < 0.4:
        kinds.append(rng.choice([r for r in sentences.REMEDIES if r != remedy]))
    kinds += ["time"] if right() else rng.choice((["promise"], []))
    kinds += ["closing"] if right() else rng.choice((["dismissal"], []))
    product = customer.product if right() else another_product(customer.product, rng)
    chosen = [rng.choice(sentences.SENTENCES[kind]) for kind in kinds or ["thanks"]]
    return " " + " ".join(chosen).format(name=name, product=product)


def _wrong_remedy(right: str, rng: random.Random) -> str | None:
    return None if rng.random() < 0.2 else rng.choice([r for r in sentences.REMEDIES if r != right])


def customers(seed: int, purpose: str, *, avoid: set[str] | None = None) -> Iterator[Customer]:
    """An endless sequence of customers with different prompts, none of them in ``avoid``."""
    rng, seen = random_stream(seed, purpose), set(avoid or ())
    while True:
        customer = draw_customer(rng)
        if customer.prompt not in seen:
            seen.add(customer.prompt)
            yield customer


def draw_pair(customer: Customer, rng: random.Random) -> PreferencePair:
    """Two agents' replies to one message, labelled with Bradley–Terry noise: P(first wins) = σ(gold difference)."""
    first, second = write_reply(customer, rng), write_reply(customer, rng)
    while second == first:
        second = write_reply(customer, rng)
    difference = gold_reward(customer, first) - gold_reward(customer, second)
    if rng.random() >= 1 / (1 + math.exp(-difference)):
        first, second = second, first
    return PreferencePair(prompt=customer.prompt, chosen=first, rejected=second)
