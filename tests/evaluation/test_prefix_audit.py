import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from conftest import tiny_reward_model, tiny_tokenizer
from rgtg.errors import DataError
from rgtg.evaluation.prefix_audit import audit_prefixes, verdict
from rgtg.models.prefix_scorer import PrefixScorer
from rgtg.types import Interval, PreferencePair


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


def test_a_scorer_that_speaks_only_at_the_end_has_ties_before_it():
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
    assert verdict(early, full).startswith(word)
