"""A language model as a scorer of next tokens equals the stock model on each prefix."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from helpers.naive import info
from helpers.tiny_models import CONFIGS, VOCAB, tiny_policy, tiny_tokenizer
from rgtg.errors import UsageError
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import read_info, write_info
from rgtg.models.scorers.base import load_named_scorer, load_scorer
from rgtg.models.scorers.token_reward import VocabularyScorer

PROMPTS = [[0, 5, 9], [7]]
COMPLETIONS = [[20, 21, 2], [30, 2, 31, 32, 8]]


def capped():
    """A family that soft-caps its logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = Gemma2Config(**sizes, vocab_size=VOCAB, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config).eval()


def saved(folder, objective=None, family="llama"):
    tiny_policy(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if objective:
        write_info(folder, info(objective).model_copy(update={"head": "vocab"}))
    return folder


@torch.no_grad()
def naive(model, prompt, completion, objective):
    """Scores by one forward pass per prefix, without the token that is scored."""
    scores, total = [], 0.0
    for i, token in enumerate(completion):
        logits = model(input_ids=torch.tensor([prompt + completion[:i]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        scores.append(total if objective == "autoregressive" else float(logits[token]))
    return torch.tensor(scores)


@pytest.mark.parametrize("objective", ["farma", "autoregressive"])
@pytest.mark.parametrize("model", [*sorted(CONFIGS), capped])
def test_one_pass_equals_one_pass_per_prefix(model, objective):
    model = model() if callable(model) else tiny_policy(model)
    scorer = VocabularyScorer(Policy(model, tiny_tokenizer()), objective=objective)
    for scores, prompt, completion in zip(
        scorer.score_prefixes(PROMPTS, COMPLETIONS, batch_size=2), PROMPTS, COMPLETIONS, strict=True
    ):
        torch.testing.assert_close(scores, naive(model, prompt, completion, objective), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model", [tiny_policy, capped])
def test_candidates_get_the_models_own_logits(model):
    scorer = VocabularyScorer(Policy(model(), tiny_tokenizer()))
    out = scorer.model(input_ids=torch.tensor([[5, 9, 3]]), output_hidden_states=True)
    ids = torch.tensor([[7, 2, 40]])
    scores = scorer.head(out.hidden_states[-1][:, -1], ids)
    torch.testing.assert_close(scores, out.logits[:, -1].gather(-1, ids), atol=1e-5, rtol=1e-5)


def test_a_finished_text_ends_with_eos_also_without_a_description():
    scorer = VocabularyScorer(Policy(tiny_policy(), tiny_tokenizer()))
    prompt, text = tiny_tokenizer()("so ").input_ids, tiny_tokenizer()("ab").input_ids
    whole, cut = scorer.score(["so ", "so "], ["ab", "ab"], finished=[True, False])
    closed = naive(scorer.model, prompt, [*text, 2], "autoregressive")
    assert (cut, whole) == pytest.approx((float(closed[1]), float(closed[2])), abs=1e-4)


def test_a_trained_folder_is_loaded_by_its_description(tmp_path):
    folder = str(saved(tmp_path / "farma", "farma"))
    scorer = load_scorer(folder, device="cpu")
    assert isinstance(scorer, VocabularyScorer)
    assert (scorer.objective, scorer.append_eos, read_info(folder).head) == ("farma", True, "vocab")
    assert load_scorer(scorer) is scorer
    assert load_named_scorer(folder, device="cpu").score(["so "], ["ab"]) == scorer.score(["so "], ["ab"])
    with pytest.raises(UsageError, match="logits are values"):
        load_scorer(folder, kind="autoregressive", device="cpu")


def test_any_language_model_is_an_autoregressive_scorer(tmp_path, scorer_folder):
    folder = str(saved(tmp_path / "lm"))
    assert load_scorer(folder, kind="autoregressive", device="cpu").objective == "autoregressive"
    assert load_scorer((tiny_policy(), tiny_tokenizer()), kind="autoregressive").objective == "autoregressive"
    with pytest.raises(UsageError, match='kind="autoregressive"'):
        load_scorer(folder, device="cpu")
    with pytest.raises(UsageError, match="expected 'autoregressive'"):
        load_scorer(folder, kind="farma", device="cpu")
    write_info(scorer_folder, info("full-bt"))
    with pytest.raises(UsageError, match="trained with full-bt"):
        load_scorer(str(scorer_folder), kind="autoregressive", device="cpu")
