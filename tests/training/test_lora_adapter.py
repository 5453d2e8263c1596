"""An adapter on the policy's trunk: trained, saved, and read in one pass with the policy it was trained on."""

import pytest
import torch

from helpers.synthetic import synthetic_rows, write_rows
from rgtg import GuidedPolicy
from rgtg.config import TrainSettings
from rgtg.errors import UsageError
from rgtg.models.loading.scorer_info import read_info
from rgtg.models.scorers.base import load_scorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.training.train import train_scorer

PROMPTS = [[0, 5, 9, 12, 33], [0, 44]]


@pytest.fixture
def trained(policy_folder, tmp_path):
    torch.set_num_threads(1)
    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(64))
    output = tmp_path / "adapter"
    train = {"per_device_train_batch_size": 8, "num_train_epochs": 6, "learning_rate": 5e-3, "use_cpu": True}
    report = train_scorer(
        TrainSettings(
            pairs=str(pairs), base=str(policy_folder), trunk="shared", output=output, eval_fraction=0.25, train=train
        )
    )
    return output, report


def test_a_trained_adapter_steers_in_one_pass(trained, policy_folder):
    folder, report = trained
    assert report.evaluation["accuracy_100"] > 0.75
    assert read_info(folder).trunk == "shared"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size < sum(path.stat().st_size for path in policy_folder.glob("*.safetensors"))
    guided = GuidedPolicy.from_pretrained(str(policy_folder), str(folder), beta=1.5, top_k=4)
    assert isinstance(guided.scorer, SharedTrunkScorer)
    merged = load_scorer(str(folder))
    assert isinstance(merged, PrefixScorer)
    apart = GuidedPolicy.from_pretrained(str(policy_folder), merged, beta=1.5, top_k=4)
    for one, other in zip(
        *(g.generate_ids(PROMPTS, max_new_tokens=8, trace=True) for g in (guided, apart)), strict=True
    ):
        assert one.token_ids == other.token_ids
        for mine, theirs in zip(one.trace, other.trace, strict=True):
            assert mine.scores == pytest.approx(theirs.scores, abs=1e-4)


def test_best_of_n_uses_the_adapter_as_a_reward_model(trained, policy_folder):
    guided = GuidedPolicy.from_pretrained(str(policy_folder), str(trained[0]), method="best-of-n", n=2)
    assert isinstance(guided.scorer, PrefixScorer)
    assert len(guided.generate_ids(PROMPTS, max_new_tokens=4)) == 2


def test_settings_of_heads_raise_an_error_for_an_adapter(policy_folder, tmp_path):
    with pytest.raises(UsageError, match="--trunk shared --head vocab is not supported"):
        train_scorer(
            TrainSettings(pairs="p.jsonl", base=str(policy_folder), trunk="shared", head="vocab", output=tmp_path / "x")
        )
