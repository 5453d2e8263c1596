"""Gold rewards of replies in real English that need no judge: rules and a classifier that no method reads.

- ``positive``: VADER's compound score of a sentence (−1 to 1), mean over the reply's sentences, times 4. A lexicon with
  negation and emphasis, so that the value of a word depends on its neighbours.
- ``plain``: minus a quarter of the automated readability index (Senter and Smith 1967; textstat), counted from 0 to 20:
  short words in short sentences. It depends on where sentences end.
- ``clean``: minus the log-odds that a linear classifier of human toxicity labels (alt-profanity-check) gives the reply,
  counted from −6 to 6.

Fixed before the first run. Rewards are log-odds: pairs are labelled with probability σ(difference).
"""

import math
import re
from functools import cache


@cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def positive(text):
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]
    return 4 * sum(_vader().polarity_scores(s)["compound"] for s in sentences) / max(1, len(sentences))


def plain(text):
    import textstat

    if not re.search(r"\w", text):
        return -5.0
    return -min(20.0, max(0.0, textstat.automated_readability_index(text))) / 4


def clean(text):
    from profanity_check import predict_prob

    p = min(1 - 1e-9, max(1e-9, float(predict_prob([text])[0])))
    return -min(6.0, max(-6.0, math.log(p / (1 - p))))


ATTRIBUTES = {"positive": positive, "plain": plain, "clean": clean}
