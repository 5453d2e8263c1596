"""The trainers as trl users call them, their batches and figures."""

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BloomConfig, BloomForSequenceClassification
from trl import RewardConfig

from helpers.synthetic import synthetic_rows
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.errors import DataError, UsageError
from rgtg.losses import prefix_bradley_terry_loss
from rgtg.training.objectives import PairScores, align_pairs, pair_figures
from rgtg.training.trainers import reward
from rgtg.training.trainers.language_model import AutoregressiveTrainer, FarmaTrainer
from rgtg.training.trainers.reward import FullRewardTrainer, PrefixRewardTrainer, pack_pairs, score_every_position

ROWS = {
    "chosen_ids": [[5, 6, 20, 21, 2], [5, 30, 2]],
    "rejected_ids": [[5, 6, 22, 2], [5, 31, 2]],
    "prompt_length": [2, 1],
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def config(tmp_path, **changes):
    plain = {"gradient_checkpointing": None, "activation_checkpointing": False, "bf16": False, "use_cpu": True}
    values = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    return RewardConfig(str(tmp_path), **(plain | values | changes))


def trainer(cls, tmp_path, rows=None, **changes):
    model = tiny_reward_model().requires_grad_(True)
    data = Dataset.from_dict(rows or ROWS)
    return cls(
        model, config(tmp_path, **changes), train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer()
    )


def test_prefix_trainer_minimises_the_prefix_loss(tmp_path):
    ours = trainer(PrefixRewardTrainer, tmp_path)
    batch = ours.data_collator([ours.train_dataset[i] for i in range(2)])
    every, _ = score_every_position(ours.model, ours.model, batch["input_ids"], batch["attention_mask"])
    s = align_pairs(every, batch["input_ids"], batch["attention_mask"], batch["prompt_lengths"])
    expected = prefix_bradley_terry_loss(s.chosen, s.rejected, s.chosen_mask, s.rejected_mask, s.differs)
    assert ours.compute_loss(ours.model, batch).item() == pytest.approx(expected.item(), abs=1e-6)


def test_full_trainer_reads_what_the_stock_model_pools(tmp_path):
    ours = trainer(FullRewardTrainer, tmp_path)
    batch = ours.data_collator([ours.train_dataset[i] for i in range(2)])
    rewards = ours.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    expected = -torch.nn.functional.logsigmoid(rewards[:2] - rewards[2:]).mean()
    assert ours.compute_loss(ours.model, batch).item() == pytest.approx(expected.item(), abs=1e-6)


def test_one_forward_pass_scores_any_number_of_prefixes(tmp_path):
    ours = trainer(PrefixRewardTrainer, tmp_path)
    calls = []
    ours.model.model.register_forward_hook(lambda *_: calls.append(1))
    ours.compute_loss(ours.model, ours.data_collator([ours.train_dataset[0]]))
    assert len(calls) == 1


def test_evaluation_is_the_mean_over_pairs_for_any_batch_size(tmp_path):
    rows = {name: values + values[:1] for name, values in ROWS.items()}  # 3 pairs: the last batch is smaller
    few = trainer(PrefixRewardTrainer, tmp_path, rows, per_device_eval_batch_size=2).evaluate()
    one = trainer(PrefixRewardTrainer, tmp_path, rows, per_device_eval_batch_size=3).evaluate()
    for name in ("eval_loss", "eval_accuracy_50", "eval_accuracy_100", "eval_margin"):
        assert few[name] == pytest.approx(one[name], abs=1e-6), name


def test_figures_by_hand():
    true, false = True, False
    scores = PairScores(
        chosen=torch.tensor([[0.0, 1.0, 3.0, 0.0]]), rejected=torch.tensor([[0.0, 2.0, 2.0, 3.0]]),
        chosen_mask=torch.tensor([[true, true, true, false]]), rejected_mask=torch.tensor([[true] * 4]),
        differs=torch.tensor([[false, true, true, true]]),
    )  # fmt: skip
    figures = pair_figures(scores)[0].tolist()
    assert figures[0] != figures[0]  # 10 % → 1 token, still identical
    assert figures[2:5] == [0.0, 1.0, 0.5]  # 2 tokens behind, 3 tokens ahead, a tie at the end
    assert figures[5] == 0.0


def test_gradient_accumulation_gives_the_gradient_of_one_batch(tmp_path):
    states = []
    for size, steps in ((4, 1), (1, 4)):
        rows = {name: values * 2 for name, values in ROWS.items()}
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "learning_rate": 1e-2}
        ours = trainer(PrefixRewardTrainer, tmp_path, rows, optim="sgd", max_grad_norm=0, **batch)
        ours.train()
        states.append(ours.model.state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], atol=1e-6, rtol=1e-5)


def test_datasets_of_texts_and_a_model_folder_are_accepted(policy_folder, tmp_path):
    data = Dataset.from_list(synthetic_rows(4))
    ours = PrefixRewardTrainer(str(policy_folder), config(tmp_path / "out"), train_dataset=data)
    assert set(ours.train_dataset.column_names) == {"chosen_ids", "rejected_ids", "prompt_length"}
    ours.train()
    assert ours.processing_class.pad_token_id != ours.processing_class.eos_token_id


def test_centring_adds_its_penalty_to_the_loss(tmp_path):
    plain = trainer(PrefixRewardTrainer, tmp_path)
    centred = trainer(PrefixRewardTrainer, tmp_path, center_rewards_coefficient=0.5)
    batch = plain.data_collator([plain.train_dataset[i] for i in range(2)])
    rewards = plain.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    extra = 0.5 * (rewards[:2] + rewards[2:]).square().mean()
    difference = centred.compute_loss(centred.model, dict(batch)) - plain.compute_loss(plain.model, dict(batch))
    assert difference.item() == pytest.approx(extra.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt_length": [5, 1]}, DataError, "empty prompt or an empty completion"),
        ({"chosen_ids": [[5, *range(20, 40)], [5, 6]]}, DataError, "more than max_length"),
        ({"margin": [1.0, 1.0]}, UsageError, "margin"),
    ],
)
def test_unusable_rows_raise_an_error(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        trainer(PrefixRewardTrainer, tmp_path, ROWS | change, max_length=16)


def test_unknown_columns_raise_an_error(tmp_path):
    with pytest.raises(UsageError, match="expected texts"):
        trainer(PrefixRewardTrainer, tmp_path, {"text": ["a"]})


def test_a_model_that_is_not_causal_raises_an_error(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    bert = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=1, **sizes))
    with pytest.raises(UsageError, match="causal"):
        PrefixRewardTrainer(
            bert, config(tmp_path), train_dataset=Dataset.from_dict(ROWS), processing_class=tiny_tokenizer()
        )


def long_prompts(trainer_class, tmp_path, model, padding_side):
    """A trainer whose pairs have prompts that pay to be read once, and a batch of them."""
    prompt = "a long prompt of the pair "
    rows = {
        "prompt": [prompt, prompt * 2, prompt], "chosen": ["good text", "fine", "good"],
        "rejected": ["bad", "good lines, but fewer", "good text, and more of it"],
    }  # fmt: skip
    data = Dataset.from_dict(rows)
    ours = trainer_class(
        model, config(tmp_path), train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer()
    )
    assert ours.packs
    batch = ours.data_collator([ours.train_dataset[i] for i in range(3)])
    if padding_side == "left":
        width = batch["input_ids"].shape[1]
        shift = width - batch["attention_mask"].sum(-1)
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.stack([row.roll(int(n)) for row, n in zip(batch[name], shift, strict=True)])
    return ours, batch


def loss_and_gradients(ours, batch):
    """Loss, rewards and gradients of a batch, and how many rows each call of the model had."""
    calls = []
    watch = ours.model.register_forward_pre_hook(
        lambda _model, _args, given: calls.append(len(given["input_ids"])), with_kwargs=True
    )
    ours.model.zero_grad()
    loss, outputs = ours.compute_loss(ours.model, batch, return_outputs=True)
    watch.remove()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in ours.model.named_parameters() if p.grad is not None}
    return loss.detach(), outputs.logits.detach(), gradients, calls


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral", "opt"])
@pytest.mark.parametrize("trainer_class", [PrefixRewardTrainer, AutoregressiveTrainer, FarmaTrainer])
def test_shared_prompts_and_parts_of_a_batch_have_its_loss_and_gradients(
    tmp_path, monkeypatch, family, padding_side, trainer_class
):
    model = (tiny_reward_model if trainer_class is PrefixRewardTrainer else tiny_policy)(family).requires_grad_(True)
    ours, batch = long_prompts(trainer_class, tmp_path, model, padding_side)
    ours.state.global_step = 1  # farma's constraint, which reads max_v V
    monkeypatch.setattr(reward, "CPU_TOKENS", 10**6)
    ours.packs = False
    loss, logits, expected, calls = loss_and_gradients(ours, batch)
    assert calls == [6]
    for packs, limit, rows in ((False, 1, [1] * 6), (True, 10**6, [3]), (True, 1, [1] * 3)):
        ours.packs = packs
        monkeypatch.setattr(reward, "CPU_TOKENS", limit)
        other, others, gradients, calls = loss_and_gradients(ours, batch)
        assert calls == rows
        torch.testing.assert_close(other, loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(others, logits, atol=1e-5, rtol=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_rewards_of_a_batch_are_those_that_the_stock_model_pools(tmp_path, monkeypatch, family):
    monkeypatch.setattr(reward, "CPU_TOKENS", 1)
    model = tiny_reward_model(family)
    data = Dataset.from_dict(ROWS)
    ours = PrefixRewardTrainer(
        model, config(tmp_path), train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer()
    )
    batch = ours.data_collator([ours.train_dataset[i] for i in range(2)])
    _, outputs = ours.compute_loss(model, batch, return_outputs=True)
    stock = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(outputs.logits, stock.logits, atol=1e-5, rtol=1e-5)


def test_several_processes_and_accelerators_read_a_batch_in_one_call(tmp_path, monkeypatch):
    ours = trainer(PrefixRewardTrainer, tmp_path)
    assert ours.tokens_of_a_pass == reward.CPU_TOKENS
    monkeypatch.setattr(type(ours.accelerator), "num_processes", 2)
    assert ours.tokens_of_a_pass is None
    monkeypatch.setattr(type(ours.accelerator), "num_processes", 1)
    monkeypatch.setattr(type(ours.args), "device", torch.device("cuda"))
    assert ours.tokens_of_a_pass is None


def test_short_prompts_and_models_without_masks_are_read_whole(tmp_path):
    ours = trainer(PrefixRewardTrainer, tmp_path)
    short = {"prompt": ["a"], "chosen": ["b" * 60], "rejected": ["c" * 60]}
    data = trainer(PrefixRewardTrainer, tmp_path, rows=short).train_dataset
    batch = ours.data_collator([data[0]])
    arguments = (ours.model, batch["input_ids"], batch["attention_mask"], batch["prompt_lengths"])
    assert pack_pairs(*arguments) == []
    bloom = BloomForSequenceClassification(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, pad_token_id=1, num_labels=1)
    )
    data = Dataset.from_dict(ROWS)
    whole = PrefixRewardTrainer(bloom, config(tmp_path), train_dataset=data, processing_class=tiny_tokenizer())
    assert not whole.packs
