"""Every causal family of transformers under guidance, against a naive loop of stock forward passes."""

from pathlib import Path

import pytest
import transformers
from benchmarks import families

TABLE = Path(__file__).parents[1] / "docs" / "results" / "families.md"
# Families of each kind that needs something of its own: chunked attention and another base model name, router logits
# read of the trunk's output, attention that selects tokens, no attention, an encoder as decoder, soft-capped logits.
KINDS = ["llama4", "llama4_text", "cohere2_moe", "deepseek_v32", "mamba", "bert", "gemma2"]


@pytest.mark.parametrize("family", KINDS)
def test_families_of_every_kind_decode_as_their_stock_models(family, monkeypatch):
    monkeypatch.setattr(families, "refusal", lambda *_: "")  # the slow test trains
    monkeypatch.setattr(families, "train", lambda *_: pytest.skip("trained in the slow test"))
    monkeypatch.setattr(families.AutoModelForSequenceClassification, "_model_mapping", {})
    (row,) = families.measure([family])
    assert (row.policy, row.guided, row.scorer) == ("equal", "equal", "state head"), row


@pytest.mark.parametrize("family", ["xlnet", "cpmant"])
def test_families_that_read_later_tokens_are_refused(family):
    (row,) = families.measure([family])
    assert row.policy == "refused"
    assert "does not continue text" in row.note


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_family_decodes_as_its_stock_model_or_is_refused():
    rows = list(families.measure(families.families()))
    assert not [row for row in rows if row.fails]
    assert sum(row.policy == "equal" for row in rows) >= 150
    assert sum(row.rewards == "equal" for row in rows) >= 60


def test_the_table_has_a_line_for_every_family():
    if f"transformers {transformers.__version__}" not in TABLE.read_text():
        pytest.skip("the table is of another version of transformers")
    text = TABLE.read_text()
    assert not [name for name in families.families() if f"| {name} |" not in text and f"- {name}: " not in text]
    assert "FAILS" not in text
