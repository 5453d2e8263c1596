import math
from typing import get_args

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from helpers.naive import info
from helpers.tiny_models import tiny_reward_model, tiny_tokenizer
from rgtg.config.training import Objective
from rgtg.errors import DataError, UsageError
from rgtg.evaluation.audit.prefix_accuracy import audit_prefixes, verdict
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.types.base import Interval
from rgtg.types.generation import PreferencePair


class CountingScorer(PrefixScorer):
    """Scores a prefix by its number of letters "a", early or only at the very end."""

    def __init__(self, *, early: bool) -> None:
        super().__init__(tiny_reward_model(), tiny_tokenizer(), name="counting")
        self.early = early

    def score_prefixes(self, prompt_ids, completion_ids, *, batch_size=8):
        letter = self.tokenizer.convert_tokens_to_ids("a")
        scores = [(torch.tensor(c) == letter).cumsum(0).float() for c in completion_ids]
        return scores if self.early else [torch.where(torch.arange(len(s)) == len(s) - 1, s, 0.0) for s in scores]


PAIRS = [PreferencePair(prompt="x", chosen="b" + "a" * n + "c", rejected="b" * (n + 2)) for n in range(4, 30)]


def test_a_scorer_that_sees_the_difference_early_is_fit():
    result = audit_prefixes(CountingScorer(early=True), PAIRS, bootstrap=200)
    assert result.full_accuracy.mean == 1.0
    assert result.verdict.startswith("Fit")
    assert result.by_tokens[0].pairs == 0  # the first token is the same on both sides
    assert result.by_tokens[1].accuracy.mean == 1.0
    assert result.by_tokens[1].margin.mean == 1.0


def test_a_scorer_that_differs_only_at_the_end_has_ties_before():
    result = audit_prefixes(CountingScorer(early=False), PAIRS, bootstrap=200)
    assert result.full_accuracy.mean == 1.0
    middle = result.by_fraction[4]
    assert middle.ties == middle.pairs == len(PAIRS)
    assert math.isnan(middle.accuracy.mean)


def test_margins_equal_the_stock_model_on_each_prefix():
    model, tokenizer = tiny_reward_model("qwen2"), tiny_tokenizer()
    pair = PreferencePair(prompt="Hello", chosen="abc", rejected="xyzuv")
    result = audit_prefixes((model, tokenizer), [pair], bootstrap=100)

    def stock(text):
        return float(model(torch.tensor([tokenizer(text).input_ids])).logits)

    assert result.by_tokens[1].margin.mean == pytest.approx(stock("Helloab") - stock("Helloxy"), abs=1e-5)
    assert result.by_tokens[2].margin.mean == pytest.approx(stock("Helloabc") - stock("Helloxyzu"), abs=1e-5)
    assert result.by_fraction[-1].margin.mean == pytest.approx(stock("Helloabc") - stock("Helloxyzuv"), abs=1e-5)


def test_an_encoder_reads_each_prefix_as_a_text():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "day", "night"]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
        )
    ).eval()
    pair = PreferencePair(prompt="good", chosen=" day night", rejected=" bad bad")
    result = audit_prefixes((model, tokenizer), [pair], bootstrap=100)
    with torch.no_grad():
        won, lost = (
            model(**tokenizer(text, return_tensors="pt")).logits.item() for text in ("good day night", "good bad bad")
        )
    assert result.by_fraction[-1].margin.mean == pytest.approx(won - lost, abs=1e-5)


def test_no_pairs_is_an_error():
    with pytest.raises(DataError, match="no pairs"):
        audit_prefixes(CountingScorer(early=True), [])


def test_pairs_that_never_differ_are_an_error():
    same = PreferencePair(prompt="x", chosen="ab", rejected="ab")
    with pytest.raises(DataError, match="nothing to distinguish"):
        audit_prefixes(CountingScorer(early=True), [same])


def test_a_list_and_its_file_have_the_same_fingerprint(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(pair.model_dump_json(exclude={"prompt_templated"}) + "\n" for pair in PAIRS))
    listed, read = (audit_prefixes(CountingScorer(early=True), p, bootstrap=100) for p in (PAIRS, path))
    assert listed == read
    assert len(listed.provenance.data["pairs"]) == 16


def test_pairs_longer_than_the_context_are_an_error_or_skipped_with_a_warning():
    long = PreferencePair(prompt="x", chosen="a" * 200, rejected="b")
    scorer = tiny_reward_model(), tiny_tokenizer()
    with pytest.raises(DataError, match="exceeds the scorer's context of 128"):
        audit_prefixes(scorer, [*PAIRS, long], bootstrap=100)
    with pytest.warns(UserWarning, match="left out 1 of 27 pairs"):
        assert audit_prefixes(scorer, [*PAIRS, long], bootstrap=100, on_bad="skip").pairs == 26


@pytest.mark.parametrize(("pairs", "on_bad"), [("pairs.jsonl", "error"), (PAIRS, "skip")])
def test_rejects_without_a_file_to_skip_rows_of_is_an_error(tmp_path, pairs, on_bad):
    with pytest.raises(UsageError, match="rejects"):
        audit_prefixes(CountingScorer(early=True), pairs, on_bad=on_bad, rejects=tmp_path / "rejects.jsonl")


def test_token_positions_end_when_too_few_pairs_reach_them():
    result = audit_prefixes(CountingScorer(early=True), PAIRS, bootstrap=100)
    # completions of 6 to 31 tokens: all 26 reach 4, 24 reach 8, only 16 reach 16
    assert [(p.position, p.pairs) for p in result.by_tokens] == [(1, 0), (2, 26), (4, 26), (8, 24)]


def test_calibration_error_by_hand():
    # margins 0, 1, 2 … of the one pair: σ(0) ½ is left out (identical), then σ(1), σ(2) and σ(2), read from both sides
    pair = PreferencePair(prompt="x", chosen="baac", rejected="bbbb")
    found = audit_prefixes(CountingScorer(early=True), [pair], bootstrap=100).calibration_error
    sure = [1 / (1 + math.exp(-m)) for m in (1, 2, 2)]
    assert found == pytest.approx(1 - sum(sure) / 3)


def test_only_ties_give_no_verdict():
    none = Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    assert verdict(none, none, "prefix-bt").startswith("No verdict")
    assert audit_prefixes(CountingScorer(early=False), PAIRS, bootstrap=100).verdict.startswith("No verdict")


def _interval(low, mean, high):
    return Interval(mean=mean, low=low, high=high, n=100)


@pytest.mark.parametrize(
    ("early", "full", "word"),
    [
        (_interval(0.55, 0.6, 0.65), _interval(0.65, 0.7, 0.75), "Fit"),
        (_interval(0.51, 0.53, 0.55), _interval(0.75, 0.8, 0.85), "Weak"),
        (_interval(0.45, 0.5, 0.55), _interval(0.65, 0.7, 0.75), "Unfit"),
        (_interval(0.45, 0.5, 0.55), _interval(0.45, 0.52, 0.59), "No evidence"),
    ],
)
def test_verdicts(early, full, word):
    assert verdict(early, full, "full-bt").startswith(word)


@pytest.mark.parametrize("objective", [*get_args(Objective), "unknown"])
def test_the_advice_fits_what_the_scorer_was_trained_with(objective):
    full = _interval(0.75, 0.8, 0.85)
    weak, unfit = (
        verdict(_interval(0.51, 0.53, 0.55), full, objective),
        verdict(_interval(0.4, 0.5, 0.6), full, objective),
    )
    for text in (weak, unfit):
        # only a scorer that was not trained on prefixes is told to train with an objective of prefixes
        assert ("train a scorer on prefixes" in text) == (objective in ("full-bt", "unknown"))
        assert (f"already trained on prefixes ({objective})" in text) == (objective not in ("full-bt", "unknown"))
        assert ("rewards" in text) == (
            objective in ("value", "cumulative-mse")
        )  # these learn from rewards, not from pairs
    assert "best-of-n" in unfit


class LateScorer(CountingScorer):
    """Right on whole completions, and right on half of the pairs before that."""

    def score_prefixes(self, prompt_ids, completion_ids, *, batch_size=8):
        letter = self.tokenizer.convert_tokens_to_ids("a")
        signs = [float(letter in c) * (1 if len(c) % 2 else -1) for c in completion_ids]
        return [
            torch.tensor([sign] * (len(c) - 1) + [abs(sign)]) for sign, c in zip(signs, completion_ids, strict=True)
        ]


def test_the_advice_follows_the_scorers_own_description():
    scorer = LateScorer(early=False)
    assert "train a scorer on prefixes" in audit_prefixes(scorer, PAIRS, bootstrap=100).verdict
    scorer.info = info(objective="prefix-bt")
    found = audit_prefixes(scorer, PAIRS, bootstrap=100).verdict
    assert found.startswith("Unfit")
    assert "It is already trained on prefixes (prefix-bt)" in found


def test_correlation_with_length_by_hand():
    """Both orders of every pair: scores differ by 4, 1, 2, 3 and lengths by 3, -2, -2, 0; labels by 1."""
    texts = [("aaaa", "b"), ("a", "bbb"), ("aa", "bbbb"), ("aaa", "bbb")]
    pairs = [PreferencePair(prompt="x", chosen=chosen, rejected=rejected) for chosen, rejected in texts]
    result = audit_prefixes(CountingScorer(early=False), pairs, bootstrap=100)
    assert result.label_length_correlation.mean == pytest.approx((3 - 2 - 2) / math.sqrt(4 * 17))
    scores = result.length_correlation
    assert scores.mean == pytest.approx((12 - 2 - 4) / math.sqrt(30 * 17))
    assert -1 <= scores.low <= scores.mean <= scores.high <= 1
    same = [PreferencePair(prompt="x", chosen="ab", rejected="ba")]
    assert audit_prefixes(CountingScorer(early=True), same, bootstrap=100).length_correlation is None
