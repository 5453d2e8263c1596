"""Every objective end to end on tiny models: what it learns, saves and loads, and the errors it raises."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import RewardConfig

from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import CONFIGS, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.config import TrainSettings
from rgtg.data.pairs import TokenizedPair
from rgtg.errors import DataError, UsageError
from rgtg.losses import fudge_losses
from rgtg.models.loading.scorer_info import fingerprint_weights, read_info
from rgtg.models.scorers.base import load_scorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer
from rgtg.training.data.pair_weights import pair_weights
from rgtg.training.data.state_cache import cache_states
from rgtg.training.objectives import OBJECTIVES
from rgtg.training.train import TRAINERS, train_scorer
from rgtg.training.trainers.head import HeadTrainer, StatePairs, collate_pairs, new_head, starting_table
from rgtg.training.trainers.language_model import AutoregressiveTrainer, FarmaTrainer, load_language_base
from rgtg.training.trainers.reward import PrefixRewardTrainer
from rgtg.training.trainers.value import ValueTrainer

FAST = {"learning_rate": 3e-3, "num_train_epochs": 4, "logging_steps": 2, "use_cpu": True}
HEADS = {"per_device_train_batch_size": 8, "num_train_epochs": 16, "logging_steps": 2, "use_cpu": True}
ROWS = {
    "chosen_ids": [[5, 6, 20, 21, 2], [5, 30, 2]],
    "rejected_ids": [[5, 6, 22, 2], [5, 31, 2]],
    "prompt_length": [2, 1],
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path):
    """The same completions as pairs, and as rollouts with rewards 3 and -1."""
    rows = synthetic_rows(64)
    rollouts = [
        {"prompt": row["prompt"], "text": row[side], "reward": reward}
        for row in rows
        for side, reward in (("chosen", 3.0), ("rejected", -1.0))
    ]
    return {
        "pairs": str(write_rows(tmp_path / "pairs.jsonl", rows)),
        "rollouts": str(write_rows(tmp_path / "rollouts.jsonl", rollouts)),
    }


def settings(policy_folder, data, output, objective, kind="pairs", **changes):
    values = {"base": str(policy_folder), "output": output, "eval_fraction": 0.25, "objective": objective}
    return TrainSettings(**(values | {kind: data[kind], "train": FAST} | changes))


RANGE = {"cumulative_mse": {"reward_range": [-1, 3]}}
RUNS = [
    ("tcrm", "pairs", {}),
    ("tcrm", "pairs", {"trunk": "shared"}),
    ("tcrm", "pairs", {"trunk": "own", "head": "state"}),
    ("farma", "pairs", {"farma": {"output_scale": 0.1}}),
    ("farma", "pairs", {"farma": {"output_scale": 0.1}, "lora": {"r": 4}}),
    ("farma", "pairs", {"trunk": "own", "head": "vocab"}),
    ("autoregressive", "pairs", {}),
    ("autoregressive", "pairs", {"lora": {"r": 4}}),
    ("value", "rollouts", {}),
    ("value", "rollouts", {"value": {"target": "q"}, "lora": {"r": 4}}),
    ("value", "rollouts", {"trunk": "shared"}),
    ("value", "rollouts", {"trunk": "own", "head": "state"}),
    ("cumulative-mse", "pairs", {}),
    ("cumulative-mse", "pairs", {"trunk": "own", "head": "vocab"}),
    ("cumulative-mse", "rollouts", RANGE),
    ("cumulative-mse", "rollouts", RANGE | {"trunk": "own", "head": "state"}),
    ("prefix-bt", "pairs", {"prefix_bt": {"position_weights": "linear", "prefixes": 2}}),
    ("prefix-bt", "pairs", {"prefix_bt": {"position_weights": "inverse"}, "trunk": "own", "head": "state"}),
]


@pytest.mark.parametrize(("objective", "kind", "changes"), RUNS)
def test_learns_a_rule_and_reads_back_what_was_trained(policy_folder, data, tmp_path, objective, kind, changes):
    output = tmp_path / "scorer"
    if changes.get("trunk") == "own":
        changes = {"train": HEADS, "layer": 2, "width": 64} | changes
    report = train_scorer(settings(policy_folder, data, output, objective, kind, **changes))
    figures, counts = report.evaluation, report.counts()
    assert counts[kind] + counts[f"eval_{kind}"] == (64 if kind == "pairs" else 128)
    if kind == "pairs":
        assert figures["accuracy_100"] >= 0.75
    else:
        assert figures["explained_50"] > 0.3
        assert figures["mse_50"] > 0
    assert "loss" in figures
    info = read_info(output)
    assert info.objective == objective
    assert not list(output.rglob("*.bin"))
    card = (output / "README.md").read_text()
    assert f"`{objective}`" in card
    assert f"held-out {kind}" in card
    scorer = load_scorer(str(output), device="cpu")
    if objective in ("farma", "autoregressive") and info.trunk == "separate":
        assert isinstance(scorer, VocabularyScorer)
        assert info.head == "vocab"
    good, bad = scorer.score(["mnopx? "] * 2, ["so abcdef", "so ghijkl"])
    assert good > bad
    first = json.loads((output / "train-log.jsonl").read_text().splitlines()[0])
    assert ("accuracy_50" if kind == "pairs" else "mse_50") in first
    given = json.loads((output / "settings.json").read_text())
    assert TrainSettings.model_validate(given).objective == objective  # --config reads it back


def test_every_objective_has_a_trainer_for_its_data():
    assert set(TRAINERS) == {(row.name, kind) for row in OBJECTIVES.values() for kind in row.data}
    assert all(trainer.objective == name for (name, _), trainer in TRAINERS.items())


def config(tmp_path, **changes):
    plain = {"gradient_checkpointing": None, "activation_checkpointing": False, "bf16": False, "use_cpu": True}
    values = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    return RewardConfig(str(tmp_path), **(plain | values | changes))


def trainer(cls, tmp_path, model, rows=None, **kwargs):
    data = Dataset.from_dict(rows or ROWS)
    kwargs |= {"train_dataset": data, "processing_class": tiny_tokenizer()}
    return cls(model.requires_grad_(True), config(tmp_path), **kwargs)


def left_padded(batch):
    """The same batch with its padding on the left."""
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
    for row, inside in zip(ids, mask, strict=True):
        row.copy_(torch.cat([row[inside == 0], row[inside == 1]]))
    return batch | {"input_ids": ids, "attention_mask": mask.flip(-1)}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("cls", [FarmaTrainer, AutoregressiveTrainer])
def test_one_forward_reads_what_single_prefixes_give(cls, family, side, tmp_path):
    ours = trainer(cls, tmp_path, tiny_policy(family))
    ours.model.eval()
    batch = ours.data_collator([ours.train_dataset[i] for i in range(2)])
    scores, _ = ours.read(ours.model, left_padded(batch) if side == "left" else batch)
    texts = ROWS["chosen_ids"] + ROWS["rejected_ids"]
    rows, masks = [*scores.chosen, *scores.rejected], [*scores.chosen_mask, *scores.rejected_mask]
    for n, (row, inside) in enumerate(zip(rows, masks, strict=True)):
        ids, first, total = texts[n], ROWS["prompt_length"][n % 2], 0.0
        expected, best = [], []
        for i in range(first, len(ids)):
            logits = ours.model(input_ids=torch.tensor([ids[:i]])).logits[0, -1]
            total += float(logits.log_softmax(-1)[ids[i]])
            expected.append(float(logits[ids[i]]) if cls is FarmaTrainer else total)
            best.append(float(ours.model(input_ids=torch.tensor([ids[: i + 1]])).logits[0, -1].max()))
        torch.testing.assert_close(row[inside], torch.tensor(expected), atol=2e-5, rtol=1e-5)
        if cls is FarmaTrainer and n < 2:
            torch.testing.assert_close(scores.best_next[n][inside], torch.tensor(best), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_rollouts_may_be_padded_on_either_side(tmp_path, side):
    rows = {"completion_ids": ROWS["chosen_ids"], "prompt_length": [2, 1], "reward": [1.0, -2.0]}
    ours = trainer(ValueTrainer, tmp_path, tiny_reward_model(), rows)
    batch = ours.data_collator([ours.train_dataset[i] for i in range(2)])
    loss = ours.compute_loss(ours.model, left_padded(batch) if side == "left" else batch)
    scorer = PrefixScorer(ours.model, tiny_tokenizer())
    values = scorer.score_prefixes([[5, 6], [5]], [[20, 21, 2], [30, 2]])
    expected = [
        fudge_losses(v[None], torch.tensor([r]), torch.ones(1, len(v), dtype=torch.bool))
        for v, r in zip(values, (1.0, -2.0), strict=True)
    ]
    assert loss.item() == pytest.approx(torch.cat(expected).mean().item() / 2.5, rel=1e-5)


def test_farma_alternates_its_two_losses(tmp_path):
    ours = trainer(FarmaTrainer, tmp_path, tiny_policy())
    batch = ours.data_collator([ours.train_dataset[i] for i in range(2)])
    losses = {}
    for step in (0, 1, 2):
        ours.state.global_step = step
        losses[step] = ours.compute_loss(ours.model.train(), dict(batch)).item()
    both = ours.compute_loss(ours.model.eval(), dict(batch)).item()
    assert losses[0] == losses[2] != losses[1]
    assert both == pytest.approx(losses[0] + losses[1], rel=1e-5)


def test_farma_ignores_tokens_that_the_tokenizer_does_not_have(tmp_path):
    model = tiny_policy()
    with torch.no_grad():
        model.resize_token_embeddings(len(tiny_tokenizer()) + 3)
        model.lm_head.weight[-3:] = 1e3 * model.lm_head.weight[-4]  # huge values of tokens that no text contains
    ours = trainer(FarmaTrainer, tmp_path, model)
    scores, _ = ours.read(ours.model.eval(), ours.data_collator([ours.train_dataset[0]]))
    assert scores.best_next.abs().max() < 100


@torch.no_grad()
def test_a_head_reads_the_best_next_token_at_the_state_after_each_prefix(tmp_path):
    pairs = [TokenizedPair([0, 9, 4], [7, 30, 31, 2], [7, 8, 2]), TokenizedPair([0, 5], [6, 2], [40, 41, 42, 2])]
    cache = cache_states(tiny_policy(), pairs, [2], "vocab")
    head = new_head(cache.states[2], 8, starting_table(tiny_policy(), 4, 0), seed=0)
    settings = TrainSettings(pairs="p", base="b", output=tmp_path, trunk="own", head="vocab")
    from rgtg.training.arguments import reward_config

    ours = HeadTrainer(
        head, reward_config(settings, None), objective="farma", about={}, vocabulary=50,
        train_dataset=StatePairs(cache, 2),
    )  # fmt: skip
    _, _, scores = ours.losses(head.eval(), collate_pairs([ours.train_dataset[i] for i in range(2)]))
    for n, pair in enumerate(pairs):
        states, _ = cache.completion(2, 2 * n)
        every = torch.arange(50).expand(len(states), -1)
        best = head(states, every).amax(-1)
        last = len(pair.chosen_ids) - 1
        torch.testing.assert_close(scores.best_next[n, :last], best[1:])


def test_the_output_layer_starts_scaled_and_untied(tmp_path):
    folder = tmp_path / "policy"
    tiny_policy("gpt2").save_pretrained(folder)  # its input and output embeddings are tied
    tiny_tokenizer().save_pretrained(folder)
    plain, _ = load_language_base(str(folder))
    scaled, tokenizer = load_language_base(str(folder), output_scale=0.5)
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert torch.equal(scaled.lm_head.weight, 0.5 * plain.lm_head.weight)
    assert torch.equal(scaled.transformer.wte.weight, plain.transformer.wte.weight)
    scaled.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, scaled.lm_head.weight)
    assert torch.equal(again.transformer.wte.weight, plain.transformer.wte.weight)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_an_adapter_with_its_own_output_layer_is_loaded_as_it_was_trained(data, tmp_path, family, monkeypatch):
    from rgtg.training import train as run

    folder, seen, real = tmp_path / "policy", {}, run.save_scorer
    tiny_policy(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

    def keep(where, model, *rest, **named):
        seen["logits"] = model.eval()(input_ids=torch.tensor([[0, 5, 9, 30]])).logits.detach()
        return real(where, model, *rest, **named)

    monkeypatch.setattr(run, "save_scorer", keep)
    changes = {
        "lora": {"r": 4},
        "farma": {"output_scale": 0.1},
        "train": FAST | {"max_steps": 4, "learning_rate": 1e-2},
    }
    train_scorer(settings(folder, data, tmp_path / "s", "farma", **changes))
    scorer = load_scorer(str(tmp_path / "s"), device="cpu")
    logits = scorer.model(input_ids=torch.tensor([[0, 5, 9, 30]])).logits
    torch.testing.assert_close(logits, seen["logits"], atol=1e-5, rtol=1e-4)
    further = settings(
        tmp_path / "s", data, tmp_path / "f", "farma", train=FAST | {"max_steps": 1, "learning_rate": 1e-30}
    )
    train_scorer(further)  # from the adapter, its output layer as it is
    again = load_scorer(str(tmp_path / "f"), device="cpu").model(input_ids=torch.tensor([[0, 5, 9, 30]])).logits
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="trained further with the output layer it has"):
        train_scorer(settings(tmp_path / "s", data, tmp_path / "g", "farma", farma={"output_scale": 0.5}))
    with pytest.raises(UsageError, match="an adapter of an adapter"):
        train_scorer(settings(tmp_path / "s", data, tmp_path / "g", "farma", lora={"r": 4}))


def test_a_tokenizer_without_padding_keeps_its_vocabulary(data, tmp_path):
    folder, tokenizer = tmp_path / "bare", tiny_tokenizer()
    tokenizer.pad_token = tokenizer.unk_token = tokenizer.bos_token = None
    tiny_policy().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    train_scorer(settings(folder, data, tmp_path / "s", "autoregressive", train=FAST | {"max_steps": 1}))
    scorer = load_scorer(str(tmp_path / "s"), device="cpu")
    assert scorer.model.get_input_embeddings().weight.shape[0] == 64


def test_evaluation_uses_every_prefix_with_weight_one(tmp_path):
    trust = [[0.1, 0.2, 0.3], [0.4, 0.5]]
    plain = trainer(PrefixRewardTrainer, tmp_path, tiny_reward_model())
    options = TrainSettings(base="b", output="o", prefix_bt={"prefixes": 1}).options
    ours = trainer(PrefixRewardTrainer, tmp_path, tiny_reward_model(), ROWS | {"pair_weights": trust}, options=options)
    batch = ours.data_collator([ours.train_dataset[i] for i in range(2)])
    assert batch["pair_weights"].tolist() == [pytest.approx([0.1, 0.2, 0.3]), pytest.approx([0.4, 0.5, 0.0])]
    bare = {name: value for name, value in batch.items() if name != "pair_weights"}
    expected = plain.compute_loss(plain.model.eval(), bare).item()
    assert ours.compute_loss(ours.model.eval(), batch).item() == pytest.approx(expected)
    assert ours.compute_loss(ours.model.train(), batch).item() < 0.9 * expected


def test_pair_weights_are_the_agreement_of_the_reference_scorer():
    pairs = [TokenizedPair([0, 9], [7, 30, 2], [8, 2]), TokenizedPair([0], [40, 2], [41, 42, 43, 2])]
    reference = PrefixScorer(tiny_reward_model(), tiny_tokenizer())
    whole, prefixes = (pair_weights(reference, pairs, kind) for kind in ("pair", "prefix"))
    for pair, one, every in zip(pairs, whole, prefixes, strict=True):
        won, lost = reference.score_prefixes([pair.prompt_ids] * 2, [pair.chosen_ids, pair.rejected_ids])
        longest = max(len(won), len(lost))
        margins = [won[min(i, len(won) - 1)] - lost[min(i, len(lost) - 1)] for i in range(longest)]
        assert every == pytest.approx([float(m.sigmoid()) for m in margins], abs=1e-5)
        assert one == pytest.approx([float(margins[-1].sigmoid())] * longest, abs=1e-5)


@pytest.mark.parametrize("trunk", [{}, {"trunk": "own", "head": "state", "layer": 2, "width": 8, "train": HEADS}])
def test_a_reference_scorer_changes_what_is_learned(policy_folder, data, tmp_path, trunk):
    """Half of the judgements are reversed; a reference scorer that disagrees keeps them from being learned."""
    rows = synthetic_rows(64)
    wrong = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[::2]]
    mixed = {"pairs": str(write_rows(tmp_path / "mixed.jsonl", [*wrong, *rows[1::2]]))}
    held = write_rows(
        tmp_path / "held.jsonl", [row | {"prompt": "New " + row["prompt"]} for row in synthetic_rows(24, 7)]
    )
    train_scorer(settings(policy_folder, data, tmp_path / "reference", "full-bt"))
    given = {"eval_pairs": str(held)} | trunk
    alone = train_scorer(settings(policy_folder, mixed, tmp_path / "alone", "prefix-bt", **given))
    given["reference_scorer"] = str(tmp_path / "reference")
    helped = train_scorer(settings(policy_folder, mixed, tmp_path / "helped", "prefix-bt", **given))
    assert alone.evaluation["accuracy_50"] < 0.7
    assert helped.evaluation["accuracy_50"] > 0.8
    reference = PrefixScorer.from_pretrained(str(tmp_path / "reference"))  # rgtg compare rejects it as gold
    assert read_info(tmp_path / "helped").reference_fingerprint == fingerprint_weights(reference.model)
    assert read_info(tmp_path / "alone").reference_fingerprint is None


def test_a_reference_scorer_with_another_tokenizer_raises_an_error(policy_folder, scorer_folder, data, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "Z"
    tokenizer.save_pretrained(scorer_folder)
    run = settings(policy_folder, data, tmp_path / "s", "prefix-bt", reference_scorer=str(scorer_folder))
    with pytest.raises(UsageError, match="another tokenizer"):
        train_scorer(run)


def test_labels_out_of_range_are_reported_by_line(policy_folder, data, tmp_path):
    with pytest.raises(DataError, match=r"rollouts\.jsonl:1: .*not in \[0, 1\]"):
        train_scorer(settings(policy_folder, data, tmp_path / "s", "cumulative-mse", "rollouts"))


def test_held_out_rollouts_can_be_given(policy_folder, data, tmp_path):
    run = settings(policy_folder, data, tmp_path / "s", "value", "rollouts", eval_rollouts=data["rollouts"])
    with pytest.warns(UserWarning, match="are in --rollouts and --eval-rollouts"):
        report = train_scorer(run.model_copy(update={"train": FAST | {"max_steps": 1}}))
    assert report.counts() == {"pairs": 0, "eval_pairs": 0, "rollouts": 128, "eval_rollouts": 128}


@pytest.mark.parametrize(
    ("objective", "kind", "changes", "message"),
    [
        ("value", "pairs", {}, "completions with rewards, which pairs do not have"),
        ("farma", "rollouts", {}, "farma learns from pairs"),
        ("value", "rollouts", {"rollouts": None}, "value needs --rollouts FILE"),
        ("cumulative-mse", "pairs", {"rollouts": "r.jsonl"}, "not both"),
        ("cumulative-mse", "pairs", {"eval_rollouts": "r.jsonl"}, "of the same kind as the training data"),
        ("cumulative-mse", "pairs", RANGE, "scales the rewards of --rollouts"),
        ("full-bt", "pairs", {"tcrm": {}}, "tcrm belongs to another objective than full-bt"),
        ("full-bt", "pairs", {"reference_scorer": "x"}, "--reference-scorer weights the pairs of prefix-bt"),
        ("prefix-bt", "pairs", {"prefix_bt": {"consistency": "pair"}}, "give --reference-scorer"),
        ("autoregressive", "pairs", {"trunk": "own", "head": "vocab"}, "autoregressive trains a language model"),
        ("autoregressive", "pairs", {"trunk": "shared"}, "leave --trunk out and add --set lora.r=16"),
        ("farma", "pairs", {"trunk": "shared"}, "--trunk own --head vocab"),
        ("farma", "pairs", {"trunk": "own", "head": "state"}, "use --head vocab"),
        ("tcrm", "pairs", {"trunk": "own", "head": "vocab"}, "closing tokens only"),
        ("farma", "pairs", {"trunk": "own", "head": "vocab", "farma": {"output_scale": 0.5}}, "a table of its own"),
        ("prefix-bt", "pairs", {"trunk": "shared", "head": "vocab"}, "--trunk shared --head vocab is not supported"),
        ("value", "rollouts", {"train": {"center_rewards_coefficient": 0.1}}, "has no meaning for value"),
        ("farma", "pairs", {"train": {"center_rewards_coefficient": 0.1}}, "has no meaning for farma"),
    ],
)
def test_incompatible_settings_raise_an_error_before_anything_is_read(tmp_path, objective, kind, changes, message):
    paths = {"pairs": "./nowhere.jsonl", "rollouts": "./nowhere.jsonl"}
    with pytest.raises(UsageError, match=message):
        train_scorer(settings("./nowhere", paths, tmp_path / "out", objective, kind, **changes))
    assert not (tmp_path / "out").exists()


def test_a_reward_model_cannot_be_the_base_of_a_language_model(scorer_folder, policy_folder, data, tmp_path):
    with pytest.raises(UsageError, match="not a complete language model"):
        train_scorer(settings(scorer_folder, data, tmp_path / "a", "farma"))
    train_scorer(settings(policy_folder, data, tmp_path / "trained", "full-bt", train=FAST | {"max_steps": 1}))
    with pytest.raises(UsageError, match="scalar head"):
        train_scorer(settings(tmp_path / "trained", data, tmp_path / "b", "autoregressive"))
