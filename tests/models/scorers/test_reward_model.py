"""PrefixScorer equals plain transformers; loading from folders."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from helpers.naive import info, reward
from helpers.tiny_models import CONFIGS, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.errors import DataError, ModelNotFoundError, UsageError
from rgtg.models.loading.scorer_info import read_info, write_info
from rgtg.models.scorers.reward_model import PrefixScorer, position_scores

PROMPTS, COMPLETIONS = ["Once", "Hi you"], [" upon a time", "!"]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_prefix_equals_the_stock_reward(family):
    scorer = PrefixScorer(tiny_reward_model(family), tiny_tokenizer())
    prompts, completions = [[0, 9, 4], [0, 44, 8, 8, 20]], [[7, 30, 31, 3, 52, 12, 9], [5, 2]]
    for prompt, completion, scores in zip(
        prompts, completions, scorer.score_prefixes(prompts, completions), strict=True
    ):
        naive = [reward(scorer.model, [*prompt, *completion[: i + 1]]) for i in range(len(completion))]
        torch.testing.assert_close(scores, torch.tensor(naive), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("append_eos", [False, True])
def test_score_equals_plain_transformers(scorer_folder, append_eos):
    write_info(scorer_folder, info(append_eos=append_eos))
    scorer = PrefixScorer.from_pretrained(str(scorer_folder), device="cpu")
    assert scorer.info == read_info(scorer_folder)
    stock, tokenizer = AutoModelForSequenceClassification.from_pretrained(scorer_folder), tiny_tokenizer()
    texts = [p + c + ("</s>" if append_eos else "") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        plain = stock(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].tolist()
    assert scorer.score(PROMPTS, COMPLETIONS) == pytest.approx(plain, abs=1e-5)
    assert scorer.score(PROMPTS, COMPLETIONS, batch_size=1) == pytest.approx(plain, abs=1e-5)


def test_padding_on_the_left_changes_nothing():
    model, ids = tiny_reward_model("gpt2"), torch.tensor([[0, 9, 4, 7]])
    right = position_scores(model, ids, torch.ones_like(ids))
    left = position_scores(model, torch.tensor([[1, 1, 0, 9, 4, 7]]), torch.tensor([[0, 0, 1, 1, 1, 1]]))
    torch.testing.assert_close(left[:, 2:], right, atol=1e-5, rtol=1e-5)


def test_a_classifier_with_several_labels_raises_an_error():
    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.num_labels = 3
    with pytest.raises(UsageError, match="3 labels"):
        PrefixScorer(LlamaForSequenceClassification(config), tiny_tokenizer())


def test_folders_of_other_models_raise_an_error(policy_folder, scorer_folder, tmp_path):
    with pytest.raises(UsageError, match="no trained reward head"):
        PrefixScorer.from_pretrained(str(policy_folder))
    with pytest.raises(ModelNotFoundError, match="no model folder"):
        PrefixScorer.from_pretrained(str(tmp_path / "absent" / "scorer"))
    (scorer_folder / "rgtg.json").write_text(json.dumps({"objective": "none"}))
    with pytest.raises(DataError, match="not a valid scorer description"):
        PrefixScorer.from_pretrained(str(scorer_folder))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_error_says_what_to_do_about_an_adapter_whose_base_has_moved(policy_folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1)
    adapter = tmp_path / "adapter"
    lora = peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], r=2, target_modules="all-linear")
    peft.get_peft_model(base, lora).save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    expected = PrefixScorer.from_pretrained(str(adapter), device="cpu").score(PROMPTS, COMPLETIONS)

    moved = policy_folder.rename(tmp_path / "moved")
    with pytest.raises(ModelNotFoundError) as caught:
        PrefixScorer.from_pretrained(str(adapter))
    for part in (f"{adapter} is a LoRA adapter of {policy_folder}", "no model folder", "adapter_config.json"):
        assert part in str(caught.value)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(moved)}))
    assert PrefixScorer.from_pretrained(str(adapter), device="cpu").score(PROMPTS, COMPLETIONS) == expected


def test_pickled_weights_raise_an_error(tmp_path):
    tiny_policy().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="pickled weights"):
        PrefixScorer.from_pretrained(str(tmp_path))
