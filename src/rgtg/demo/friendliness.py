"""The gold reward of the demo on real English: how friendly a finished reply is, in points, by rules one can read.

| what | points |
|---|---|
| VADER's compound score of a sentence (a lexicon of 7,500 rated words, −1 to 1), mean over the reply's sentences | ×4 |
| no word of what happened or of the person occurs in the reply: it has left the prompt | −2 |
| fewer than six words | −2 |
| share of word pairs that occur before in the reply, so that no reply gains by repeating itself | ×−4 |
| it had not ended when the token limit came | −1 |

The mean over sentences, not the sum, keeps long replies from gaining by their length.
"""

import functools
import itertools
import re
from typing import Any

from rgtg.errors import MissingExtraError

MIN_WORDS = 6
_COMMON = frozenset({
    "my", "the", "a", "an", "is", "has", "to", "of", "in", "on", "for", "and", "got", "again", "about", "into", "one",
    "what", "should", "i", "say", "him", "her", "sentence",
})  # fmt: skip


def friendliness(prompt: str, reply: str, *, finished: bool) -> float:
    """Points of a reply to a prompt of `rgtg.demo.messages`.

    Args:
        prompt: what the user wrote.
        reply: what the model wrote.
        finished: whether it ended by itself.
    """
    words = re.findall(r"[a-z']+", reply.lower())
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n+", reply.strip()) if re.search(r"\w", part)]
    tone = sum(_analyser().polarity_scores(part)["compound"] for part in sentences) / max(len(sentences), 1)
    topic = {word[:4] for word in re.findall(r"[a-z']+", prompt.lower()) if word not in _COMMON}
    points = 4.0 * float(tone)
    points -= 2.0 * (not topic & {word[:4] for word in words})
    points -= 2.0 * (len(words) < MIN_WORDS)
    points -= 4.0 * repeated_share(words)
    points -= 1.0 * (not finished)
    return points


def repeated_share(words: list[str]) -> float:
    """Share of neighbouring word pairs that stand earlier in the text.

    Example:
        >>> repeated_share("so so so so so".split()), repeated_share("how are you".split())
        (0.75, 0.0)
    """
    pairs = list(itertools.pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


@functools.cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise MissingExtraError("the demo needs vaderSentiment: pip install 'rgtg[demo]'") from error
    return SentimentIntensityAnalyzer()
