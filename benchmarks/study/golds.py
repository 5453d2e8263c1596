"""Track A's gold rewards of whole stories (prompt and completion), fixed before any run. No method uses them.

- ``lexicon`` is a sum over words: kind words minus harsh words.
- ``distinct`` depends on the whole history: distinct words / 4. The value of a word depends on all previous words.
- ``one-name`` is consistency: the story's hero is the first name in it. Half a point for every mention of the hero in
  the completion (at most four count), less half a point for every other name that the completion brings in.

Rewards are log-odds: pairs are labelled with probability σ(difference).
"""

import re

from benchmarks.stories import HARSH, KIND

# Capitalised words that are not names; every other capitalised word is a name.
_NO_NAMES = """
a after all an and are as at be big but by can could dad daddy did do don every finally for from go he her here hey
hi his how i i'm if in inside isn it it's its just let let's little look maybe mom mommy mum my no not now of oh
okay on once one please she so some soon sorry suddenly thank thanks that the then there they this to today tomorrow
too under up very wait we well what when where who why will with would wow yes yesterday you your
"""
NO_NAMES = frozenset(_NO_NAMES.split())


def words(text):
    return re.findall(r"[a-z']+", text.lower())


def names(text):
    """Names in order of mention."""
    return [w for w in re.findall(r"\b[A-Z][a-z]{2,}\b", text) if w.lower() not in NO_NAMES]


def lexicon(prompt, completion):
    return float(sum((w in KIND) - (w in HARSH) for w in words(prompt + completion)))


def distinct(prompt, completion):
    return len(set(words(prompt + completion))) / 4


def one_name(prompt, completion):
    everyone = names(prompt + completion)
    if not everyone:
        return 0.0
    hero, here = everyone[0], names((prompt + completion)[len(prompt) :])
    return min(here.count(hero), 4) / 2 - len(set(here) - {hero}) / 2


GOLDS = {"lexicon": lexicon, "distinct": distinct, "one-name": one_name}
