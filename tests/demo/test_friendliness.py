"""The demo's gold on real English: points by hand, and what does not pay."""

import pytest

pytest.importorskip("vaderSentiment", reason="the demo's gold needs: pip install 'rgtg[demo]'")

from rgtg.demo.friendliness import friendliness

PROMPT = "My neighbour lost the house keys. What should I say to him in one sentence?"
KIND = "I am so sorry that you lost your keys, I would love to help you."


def points(reply, finished=True):
    return friendliness(PROMPT, reply, finished=finished)


def test_points_by_hand():
    neutral = "The keys of the house are on the table."
    assert points(neutral) == 0
    assert points(neutral, finished=False) == -1
    assert points("The table is in the other room.") == -2  # it has left the prompt
    assert points("The keys.") == -2  # too short
    assert points("") == -4
    # eight words, of seven pairs of neighbours three repeat
    assert points("the keys the keys the keys the keys") == pytest.approx(-4 * 5 / 7)


def test_friendly_beats_neutral_beats_hostile():
    hostile = "You lost your keys because you are a stupid and horrible person."
    assert points(KIND) > 1 > points("Where did you see the house keys for the last time?") > points(hostile)


def test_repetition_length_and_empty_praise_do_not_pay():
    assert points(f"{KIND} {KIND} {KIND}") < points(KIND)
    assert points(f"{KIND} The table is in the other room.") < points(KIND)
    assert points("love love love love love love love love") < points(KIND)
    assert points("Great!") < points(KIND)
    assert points("What a wonderful, lovely, happy and beautiful day!") < points(f"{KIND} What a lovely house!")
