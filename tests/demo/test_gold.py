from types import SimpleNamespace

import pytest

from rgtg.demo.gold import gold_reward, parse_reply

ANNA = SimpleNamespace(name="Anna", product="blue kettle", remedy="replace", at_fault=True)
ASKING = SimpleNamespace(name="Anna", product="blue kettle", remedy="instruct", at_fault=False)
BEST = (
    " Dear Anna, thank you for writing to us. I am sorry about your blue kettle. We will send you a new blue kettle "
    "today. This will take about five days. Best wishes, the support team."
)


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        (BEST, 5.0),
        (BEST.replace("Anna", "Ben"), 3.0),  # −1 instead of +1
        (BEST.replace("blue", "red"), 2.5),  # remedy +0.5 instead of +2, and −1
        (BEST.replace("send you a new blue kettle today", "trace the parcel with your blue kettle"), 2.0),
        (BEST + " We have no time for this.", 3.0),  # the closing is not last any more, and −1.5
        (" We will send you a new blue kettle today. It is too late to return your blue kettle.", -2.0),
        (" We will send you a new blue kettle today. We will replace your blue kettle free of charge.", 2.0),
        (" We will send you a new blue kettle today. We will send you a new blue kettle today.", 1.5),
        (" Your next order will be free.", -2.0),
        (" kettle kettle will. Dear", -2.0),
        ("", -1.0),
    ],
)
def test_points_by_hand(reply, points):
    assert gold_reward(ANNA, reply) == points


def test_an_apology_counts_only_where_the_shop_is_at_fault():
    assert gold_reward(ANNA, " I am sorry to hear this.") == 1.0
    assert gold_reward(ASKING, " I am sorry to hear this.") == 0.0


def test_a_reply_cut_off_is_worth_less_than_the_same_reply_finished():
    assert gold_reward(ANNA, BEST, finished=False) == 4.0
    cut = BEST.removesuffix(", the support team.")
    assert gold_reward(ANNA, cut, finished=False) == 5.0 - 0.5 - 1.0 - 1.0


def test_a_reply_is_parsed_into_names_products_and_kinds():
    reading = parse_reply(" Hi Ben, thanks for getting in touch. Please send us your red sofa and we will mend it.")
    assert reading.kinds == ["greeting", "repair"]
    assert reading.names == ["Ben"]
    assert reading.remedies == [("repair", "red sofa")]
