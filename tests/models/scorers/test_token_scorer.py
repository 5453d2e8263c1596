"""What all scorers of the policy's tokens require, and how they end a text."""

import pytest

from helpers.scorer_kinds import kinds
from helpers.tiny_models import tiny_tokenizer
from rgtg.errors import DataError, UsageError

KINDS = ["separate", "state", "vocab", "vocabulary scorer"]
READS_PREVIOUS_STATE = ["vocab", "vocabulary scorer"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def scorer(kind):
    return kinds()[1][kind][0]


def test_an_empty_completion_raises_an_error(scorer):
    with pytest.raises(DataError, match="at least one token"):
        scorer.score_prefixes([[0]], [[]])


def test_a_text_that_exceeds_the_context_raises_an_error(scorer):
    with pytest.raises(DataError, match=r"1 \+ 200 tokens exceeds the scorer's context of 128"):
        scorer.score(["x"], ["y" * 200], finished=False)


def test_an_empty_prompt_raises_an_error_if_the_state_before_a_token_is_read(scorer, kind):
    if kind in READS_PREVIOUS_STATE:
        with pytest.raises(DataError, match="reads the state before a token: the prompt must have one"):
            scorer.score_prefixes([[]], [[5]])
    else:
        assert scorer.score_prefixes([[]], [[5]])[0].shape == (1,)


def test_each_completion_has_its_own_finished_flag(scorer):
    scorer.append_eos = True
    prompts, completions = ["Once", "Hi you"], [" upon a time", "!"]
    ended, cut = (scorer.score(prompts, completions, finished=finished) for finished in (True, False))
    assert ended[0] != pytest.approx(cut[0], abs=1e-4)
    assert scorer.score(prompts, completions, finished=[True, False]) == pytest.approx([ended[0], cut[1]], abs=1e-4)
    assert scorer.score(prompts, completions, finished=(False, True)) == pytest.approx([cut[0], ended[1]], abs=1e-4)
    with pytest.raises(UsageError, match="finished has 1 values for 2 completions"):
        scorer.score(prompts, completions, finished=[True])


def test_a_finished_text_ends_with_eos_and_an_empty_one_has_the_score_of_its_prompt(kind):
    _, scorers = kinds()
    scorer, definition = scorers[kind]
    scorer.append_eos = True
    ids = tiny_tokenizer()("Hi you").input_ids
    assert scorer.score(["Hi"], [" you"]) == pytest.approx([float(definition([*ids, 2]))], abs=1e-4)
    assert scorer.score(["Hi"], [" you"], finished=False) == pytest.approx([float(definition(ids))], abs=1e-4)
    assert scorer.score(["Hi"], [""], finished=False) == pytest.approx([float(definition(ids[:2]))], abs=1e-4)
