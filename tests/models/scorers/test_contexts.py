"""Texts over a scorer's context: an error that names the row in scores; no steering, and a warning, while decoding."""

import json

import pytest

from helpers.command import verb
from helpers.encoders import CONTEXTS, encoder_model, encoder_tokenizer
from helpers.naive import info
from helpers.other_tokenizers import byte_level, reward_model_with
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.errors import DataError
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer

ENCODERS = ["bert", "roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "deberta-v2", "modernbert"]
KINDS = [*ENCODERS, "llama", "gpt2", "genarm", "text"]
CARDS = {"reward_threshold": 0.5, "segment_length": 4, "min_segment": 1, "entropy_threshold": 9.0, "retries": 1}


def scorer_of(kind):
    """A scorer with a context of 34 or 32 tokens."""
    if kind in ENCODERS:
        return PrefixScorer(encoder_model(kind), encoder_tokenizer(), info=info(), name=kind)
    if kind == "text":
        words = byte_level()
        return CrossTokenizerScorer(PrefixScorer(reward_model_with(words, positions=34), words, info=info(), name=kind))
    model = tiny_policy(seed=9) if kind == "genarm" else tiny_reward_model(kind)
    model.config.max_position_embeddings = 34
    if kind == "genarm":
        return VocabularyScorer(Policy(model, tiny_tokenizer()), info=info("autoregressive"), name=kind)
    return PrefixScorer(model, tiny_tokenizer(), info=info(), name=kind)


def fitting(scorer, prompt):
    """The longest run of a letter that fits after a prompt."""
    n = 0
    while True:
        try:
            scorer.score([prompt], ["a" + " b" * n])
        except DataError:
            return "a" + " b" * (n - 1)
        n += 1


@pytest.mark.parametrize("kind", KINDS)
def test_scores_name_the_row_that_does_not_fit(kind):
    scorer = scorer_of(kind)
    fits = fitting(scorer, "Once")
    assert len(fits) > 20
    assert len(scorer.score(["Once"] * 2, ["a", fits])) == 2
    with pytest.raises(DataError, match=r"(text|completion) 3 of 4.* context of (32|34)") as caught:
        scorer.score(["Once"] * 4, ["a", fits, fits + " b", "a"])
    assert caught.value.row == 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "text"])
def test_scores_of_prefixes_name_the_row_too(kind):
    scorer, words = scorer_of(kind), (encoder_tokenizer if kind in ENCODERS else tiny_tokenizer)()
    fits, long = (words(text, add_special_tokens=False).input_ids for text in ("a b", " b" * 40))
    with pytest.raises(DataError, match=r"text 2 of 2: a text of .* exceeds the .*context of") as caught:
        scorer.score_prefixes([[5], [5]], [fits, long])
    assert caught.value.row == 1
    assert len(scorer.score_prefixes([[5]], [fits])[0]) == len(fits)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "deberta-v2", "llama"])
def test_the_command_names_file_line_and_id(kind, tmp_path):
    scorer, folder = scorer_of(kind), tmp_path / kind
    scorer.model.save_pretrained(folder)
    scorer.tokenizer.save_pretrained(folder)
    rows = [{"prompt": "Once", "text": " a"}, {"prompt": "Once", "text": " b" * 40, "id": "the-long-one"}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text(f"{lines[0]}\n\n{lines[1]}\n")
    run = verb("score")
    result = run("--scorer", folder, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 3, result.output
    assert "rows.jsonl:3 (id the-long-one): text 2 of 2: a text of " in result.stderr
    assert "context of" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("method", ["pargs", "cd-blockwise", "cards", "best-of-n"])
def test_an_encoder_steers_until_its_context_is_full(kind, method):
    guided = GuidedPolicy(Policy(tiny_policy(), tiny_tokenizer()), scorer_of(kind), method=method)
    settings = {"cards": CARDS, "cd-blockwise": {"segment_length": 4, "n": 2}, "best-of-n": {"n": 2}}.get(method, {})
    asked = {"max_new_tokens": 60, "min_new_tokens": 60, "seed": 1} | settings
    if method == "pargs":
        with pytest.warns(UserWarning, match=rf"the scorer {kind} has a context of {CONTEXTS[kind]} of its own tokens"):
            done = guided.generate(["Once upon", "Hi"], **asked)
    else:
        done = guided.generate(["Once upon", "Hi"], **asked)
    for one in done:
        assert len(one.token_ids) == 60
        assert one.unscored > 0
    short = guided.generate(["Hi"], **asked | {"max_new_tokens": 6, "min_new_tokens": 6})[0]
    assert short.unscored == 0
    assert short.score == pytest.approx(guided.scorer.score(["Hi"], [short.text], finished=False)[0], abs=1e-4)
