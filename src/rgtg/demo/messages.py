"""Everyday prompts of the demo on real English: something happened to somebody; what should one say to them?"""

import itertools
import random

PEOPLE = (
    ("My neighbour", "him"), ("My sister", "her"), ("My boss", "her"), ("My brother", "him"), ("My friend Sam", "him"),
    ("My aunt", "her"), ("My colleague", "him"), ("My roommate", "her"), ("My teacher", "her"), ("My cousin", "him"),
)  # fmt: skip
SEEN = (
    "lost the house keys", "burnt the dinner", "forgot my birthday", "got a new job", "broke my favourite cup",
    "missed the bus", "is moving to another city", "failed the driving test", "won a prize",
    "spilled coffee on my coat",
    "is late again", "bought a new bicycle", "is ill", "has passed the exam", "painted the kitchen green",
    "lost the umbrella", "sings in the shower", "wants to borrow my car", "has a new haircut", "is learning the piano",
    "ate my sandwich", "cannot sleep", "planted tomatoes", "wrote a long letter", "dropped the phone",
    "is afraid of dogs", "cleaned the whole flat", "sent the parcel to the wrong address", "is going on holiday",
    "crashed the computer",
)  # fmt: skip
UNSEEN = (
    "forgot the meeting", "baked a cake", "lost the train ticket", "broke the window", "got a puppy",
    "missed the party",
    "plays loud music", "has a cold", "moved into a new flat", "is nervous about the interview",
)  # fmt: skip


def draw_prompts(happenings: tuple[str, ...], count: int, seed: int) -> list[str]:
    """That many different prompts, over all people and happenings, in an order that depends on the seed.

    Example:
        >>> len(draw_prompts(UNSEEN, 4, 0)), draw_prompts(("baked a cake",), 1, 1)[0].split(".")[1]
        (4, ' What should I say to her in one sentence?')
    """
    every = [
        f"{person} {happening}. What should I say to {pronoun} in one sentence?"
        for (person, pronoun), happening in itertools.product(PEOPLE, happenings)
    ]
    random.Random(f"messages-{seed}").shuffle(every)
    return every[:count]
