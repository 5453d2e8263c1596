"""Heads end to end on a tiny policy: what they learn, cache and save, and the errors they raise."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.config import TrainSettings
from rgtg.data.pairs import TokenizedPair, tokenize_pairs
from rgtg.errors import DataError, NonFiniteError, OutputError, UsageError
from rgtg.losses import prefix_bradley_terry_loss
from rgtg.models.loading.policy import load_policy
from rgtg.models.loading.policy_files import describe_policy_files
from rgtg.models.loading.scorer_info import fingerprint_weights, read_info
from rgtg.models.scorers.base import load_scorer
from rgtg.training.arguments import reward_config
from rgtg.training.data import state_cache
from rgtg.training.data.state_cache import cache_states
from rgtg.training.train import train_scorer
from rgtg.training.train_head import RANK, TABLE_ENTRIES, policy_files, table_rank
from rgtg.training.trainers.head import (
    HeadTrainer,
    StatePairs,
    collate_pairs,
    head_pair_scores,
    moments,
    new_head,
    starting_table,
)
from rgtg.types.generation import PreferencePair
from rgtg.utils.files import lock_folder

QUICK = {"per_device_train_batch_size": 8, "num_train_epochs": 8, "logging_steps": 20}
PAIRS = [
    TokenizedPair([0, 9, 4], [7, 30, 31, 2], [7, 8, 2]),
    TokenizedPair([0, 5], [6, 2], [40, 41, 42, 43, 2]),
    TokenizedPair([0, 5, 6, 7, 8], [20, 2], [21, 2]),
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def pairs_file(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", synthetic_rows(64))


def settings(policy_folder, pairs_file, output, head="state", **changes):
    values = {"pairs": str(pairs_file), "base": str(policy_folder), "output": output, "eval_fraction": 0.25}
    about = {"trunk": "own", "head": head, "train": QUICK | changes.pop("train", {})}
    return TrainSettings(**(values | about | changes))


@pytest.mark.parametrize(("head", "objective"), [("state", "prefix-bt"), ("vocab", "prefix-bt"), ("state", "full-bt")])
def test_learns_a_rule_and_keeps_the_best_held_out(policy_folder, pairs_file, tmp_path, head, objective):
    output = tmp_path / "head"
    report = train_scorer(settings(policy_folder, pairs_file, output, head, objective=objective))
    if objective == "prefix-bt":
        assert report.evaluation["prefix_accuracy"] > 0.75
    assert report.evaluation["accuracy_100"] > 0.75
    assert {(c.layer, c.width) for c in report.choices} == {(layer, width) for layer in (1, 2) for width in (64, 256)}
    losses = {(c.layer, c.width): c.evaluation["loss"] for c in report.choices}
    assert losses[report.layer, report.width] == min(losses.values()) == report.evaluation["loss"]

    info = read_info(output)
    assert (info.trunk, info.head, info.objective) == ("own", head, objective)
    assert (info.layer, info.width) == (report.layer, report.width)
    assert info.base_fingerprint == fingerprint_weights(load_policy(str(policy_folder)).model)
    assert info.data_fingerprint == report.data_fingerprint
    files = {"README.md", "head.safetensors", "rgtg.json", "settings.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in output.iterdir()} == files | {"train-log.jsonl", "train-report.json"}
    assert (output / "head.safetensors").stat().st_size < 80_000
    lines = [json.loads(line) for line in (output / "train-log.jsonl").read_text().splitlines()]
    assert {"layer", "width", "loss", "accuracy_50", "prefix_accuracy"} <= set(lines[0])
    assert f"layer {info.layer}" in (output / "README.md").read_text()


@pytest.mark.parametrize("head", ["state", "vocab"])
def test_a_loaded_head_scores_as_it_was_evaluated(policy_folder, pairs_file, tmp_path, head):
    rows = [row | {"prompt": "New. " + row["prompt"]} for row in synthetic_rows(12, seed=3)]
    held = write_rows(tmp_path / "held.jsonl", rows)
    report = train_scorer(
        settings(policy_folder, pairs_file, tmp_path / "head", head, eval_pairs=str(held), layer=1, width=16)
    )
    scorer = load_scorer(str(tmp_path / "head"), device="cpu")
    margins = []
    for pair in tokenize_pairs([PreferencePair(**row) for row in rows], scorer.tokenizer):
        won, lost = scorer.score_prefixes([pair.prompt_ids] * 2, [pair.chosen_ids, pair.rejected_ids])
        margins.append(float(won[-1] - lost[-1]))
    assert report.evaluation["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert report.evaluation["accuracy_100"] == pytest.approx(np.mean(np.array(margins) > 0))


@pytest.mark.parametrize("kind", ["state", "vocab"])
def test_the_cache_holds_the_hidden_states_of_transformers(kind):
    model = tiny_policy()
    cache = cache_states(model, PAIRS, [1, 2], kind)
    back = 1 if kind == "vocab" else 0
    rows = [(pair.prompt_ids, ids) for pair in PAIRS for ids in (pair.chosen_ids, pair.rejected_ids)]
    for c, (prompt, completion) in enumerate(rows):
        expected = model(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states
        for layer in (1, 2):
            states, ids = cache.completion(layer, c)
            window = slice(len(prompt) - back, len(prompt) + len(completion) - back)
            torch.testing.assert_close(states, expected[layer][0, window], atol=1e-5, rtol=1e-5)
            assert ids.tolist() == completion


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_on_disk_equals_one_in_memory(dtype, monkeypatch):
    monkeypatch.setattr(state_cache, "CPU_TOKENS", 20)  # several batches
    model = tiny_policy().to(dtype)
    memory = cache_states(model, PAIRS, [1, 2], "state")
    disk = cache_states(model, PAIRS, [1, 2], "state", memory_limit=100)
    assert (memory.on_disk, disk.on_disk) == (False, True)
    assert memory.bytes == disk.bytes == 2 * 18 * 32 * dtype.itemsize
    for layer in (1, 2):
        assert disk.states[layer].dtype == dtype
        assert torch.equal(memory.states[layer], disk.states[layer])


def test_training_from_disk_gives_the_same_head(policy_folder, pairs_file, tmp_path, monkeypatch):
    given = {"layer": 2, "width": 8}
    train_scorer(settings(policy_folder, pairs_file, tmp_path / "memory", "vocab", **given))
    monkeypatch.setattr(cache_states, "__kwdefaults__", cache_states.__kwdefaults__ | {"memory_limit": 100})
    train_scorer(settings(policy_folder, pairs_file, tmp_path / "disk", "vocab", **given))
    one, other = (load_file(tmp_path / name / "head.safetensors") for name in ("memory", "disk"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_too_little_disk_space_for_the_states_raises_an_error(monkeypatch):
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr(state_cache.shutil, "disk_usage", lambda _folder: usage)
    with pytest.raises(OutputError, match="TMPDIR"):
        cache_states(tiny_policy(), PAIRS, [2], "state", memory_limit=100)


def test_the_policy_runs_once_for_any_number_of_epochs(policy_folder, pairs_file, tmp_path, monkeypatch):
    read = []
    real = state_cache.packed_states_of
    monkeypatch.setattr(
        state_cache,
        "packed_states_of",
        lambda model, rows, *more: read.extend(len(row.columns) for row in rows) or real(model, rows, *more),
    )
    train_scorer(settings(policy_folder, pairs_file, tmp_path / "head", train={"num_train_epochs": 3}))
    assert sum(read) == 2 * 64


def test_moments_by_hand():
    mean, std = moments(torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 8.0]]))
    assert mean.tolist() == [2.0, 5.0, 4.0]
    assert std.tolist() == pytest.approx([1.0, 1e-3 * (17 / 3) ** 0.5, 4.0])  # the constant one has a floor


def test_the_table_starts_along_the_principal_directions():
    model = tiny_policy()
    table = starting_table(model, 4, 0)
    weight = model.get_output_embeddings().weight.double()
    centred = weight - weight.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    best = torch.linalg.norm(u[:, :4] * s[:4]) / torch.linalg.norm(centred)
    q = torch.linalg.qr(table.double()).Q
    kept = torch.linalg.norm(q.T @ centred) / torch.linalg.norm(centred)
    assert kept > 0.97 * best
    assert table.std().item() == pytest.approx(0.1)
    assert torch.equal(table, starting_table(model, 4, 0))


@pytest.mark.parametrize("kind", ["state", "vocab"])
def test_the_loss_is_that_of_the_formula(kind, tmp_path):
    model = tiny_policy()
    cache = cache_states(model, PAIRS, [2], kind)
    table = starting_table(model, 4, 0) if kind == "vocab" else None
    head = new_head(cache.states[2], 8, table, seed=0)
    batch = collate_pairs([StatePairs(cache, 2)[i] for i in range(3)])
    scores = head_pair_scores(head, **batch)
    naive = []
    for c in (0, 2, 4, 1, 3, 5):
        states, ids = cache.completion(2, c)
        naive.append(head(states) if kind == "state" else head.positions(states[None], ids[None])[0])
    rows = [*scores.chosen, *scores.rejected]
    for row, mask, expected in zip(rows, [*scores.chosen_mask, *scores.rejected_mask], naive, strict=True):
        torch.testing.assert_close(row[mask], expected)
    config = reward_config(settings("p", "x", tmp_path / "o"), None)
    trainer = HeadTrainer(head, config, objective="prefix-bt", about={}, train_dataset=StatePairs(cache, 2))
    expected = prefix_bradley_terry_loss(
        scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask, scores.differs
    )
    assert trainer.compute_loss(head, batch).item() == pytest.approx(expected.item(), abs=1e-6)
    # the figures are means over pairs for any batch size
    one = trainer.evaluate(StatePairs(cache, 2))
    trainer.args.per_device_eval_batch_size = 2
    assert trainer.evaluate(StatePairs(cache, 2)) == pytest.approx(one, abs=1e-6)
    assert one["eval_loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_the_same_seed_gives_the_same_head(policy_folder, pairs_file, tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        random.seed(name)
        torch.manual_seed(len(name))
        train_scorer(settings(policy_folder, pairs_file, tmp_path / name, "vocab", layer=2, width=8, seed=seed))
    one, same, other = (load_file(tmp_path / n / "head.safetensors") for n in ("one", "same", "other"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["table.weight"], other["table.weight"])


def test_a_large_vocabulary_gets_a_lower_rank(tmp_path):
    model = tiny_policy()
    asked = settings("p", "x", tmp_path)
    assert table_rank(asked, model) == RANK
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.empty(152_000, 32, device="meta"))
    assert table_rank(asked, model) == TABLE_ENTRIES // 152_000 == 13
    with pytest.raises(UsageError, match="exceeds the policy's hidden size, 32"):
        table_rank(settings("p", "x", tmp_path, "vocab", rank=33), model)


def test_a_choice_among_heads_needs_held_out_pairs(policy_folder, pairs_file, tmp_path):
    with pytest.raises(UsageError, match="chosen by held-out pairs"):
        train_scorer(settings(policy_folder, pairs_file, tmp_path / "a", eval_fraction=0))
    report = train_scorer(settings(policy_folder, pairs_file, tmp_path / "b", eval_fraction=0, layer=1, width=8))
    assert report.evaluation == {}
    assert (report.layer, report.width, report.eval_pairs) == (1, 8, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": None}, "--head state"),
        ({"lora": {"r": 4}}, "lora adapts a model"),
        ({"head": "vocab", "objective": "full-bt"}, "closing tokens only"),
        ({"rank": 4}, "rank is of the token table"),
        ({"width": 0}, "at least 1"),
        ({"layer": 7}, "layer 7 is not one of this model's"),
        ({"train": {"gradient_checkpointing": True}}, "train.gradient_checkpointing does not apply"),
        ({"train": {"center_rewards_coefficient": 0.1}}, "does not apply"),
        ({"train": {"save_only_model": True}}, "does not apply"),
        ({"train": {"learning_rats": 1}}, "did you mean train.learning_rate"),
        ({"train": {"model_init_kwargs": {"attn_implementation": "eager"}}}, "dtype only"),
        ({"trunk": "separate"}, "head belongs to a head on the policy's own states"),
        ({"trunk": "separate", "head": None, "layer": 2}, "layer belongs"),
        ({"train": {"eval_strategy": "epoch"}, "eval_fraction": 0, "layer": 1, "width": 8}, "needs held-out pairs"),
    ],
)
def test_unsupported_settings_raise_an_error(policy_folder, pairs_file, tmp_path, changes, message):
    values = settings(policy_folder, pairs_file, tmp_path / "out", **({"head": "state"} | changes))
    with pytest.raises(UsageError, match=message):
        train_scorer(values)
    assert not (tmp_path / "out" / "rgtg.json").exists()


def test_several_processes_raise_an_error(policy_folder, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        train_scorer(settings(policy_folder, pairs_file, tmp_path / "out"))


def test_non_finite_loss_stops_and_names_the_step(policy_folder, pairs_file, tmp_path):
    wild = {"learning_rate": 1e30, "max_grad_norm": 0}
    with pytest.raises(NonFiniteError, match=r"at step \d+"):
        train_scorer(settings(policy_folder, pairs_file, tmp_path / "out", train=wild))
    assert not (tmp_path / "out" / "rgtg.json").exists()


def test_a_failed_save_leaves_no_scorer(policy_folder, pairs_file, tmp_path, monkeypatch):
    from rgtg.training.checkpoint import save

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_info", full)
    output = tmp_path / "out"
    with pytest.raises(OutputError, match="No space left"):
        train_scorer(settings(policy_folder, pairs_file, output, layer=1, width=8))
    assert {path.name for path in output.iterdir()} == {"train-log.jsonl", "checkpoints"}


def test_a_policy_in_16_bits_keeps_its_dtype(pairs_file, tmp_path):
    folder = tmp_path / "policy"
    tiny_policy("gpt2").to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    report = train_scorer(settings(folder, pairs_file, tmp_path / "head", "vocab", layer=2, width=16))
    assert report.evaluation["prefix_accuracy"] > 0.7
    wide = load_policy(str(folder), dtype="float32", device="cpu")  # the same values in a wider dtype
    assert load_scorer(str(tmp_path / "head"), policy=wide).model is wide.model


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluation_during_training_is_logged(policy_folder, pairs_file, tmp_path, strategy):
    when = {"eval_strategy": strategy, "eval_steps": 5, "logging_steps": 3, "max_steps": 12}
    train_scorer(settings(policy_folder, pairs_file, tmp_path / "head", layer=1, width=8, train=when))
    lines = [json.loads(line) for line in (tmp_path / "head" / "train-log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12]
    assert len([line for line in lines if "eval_loss" in line]) >= 3
    assert all(line["layer"] == 1 for line in lines)


def test_a_gguf_policy_is_known_by_its_file_and_by_its_conversion(tmp_path):
    from helpers.gguf_files import write_gguf

    path = write_gguf(tmp_path / "a.gguf", "qwen2")
    (alone,) = policy_files(str(path))
    assert alone == describe_policy_files(str(path))
    load_policy(str(path), cache_gguf=True)
    folder = str(tmp_path / "a.gguf.bf16")
    both = {"gguf": alone.fingerprint, "safetensors": describe_policy_files(folder).fingerprint}
    for source in (str(path), folder):
        assert {files.format: files.fingerprint for files in policy_files(source)} == both


def test_rows_with_tokens_that_the_policy_cannot_read_are_bad_rows(policy_folder, pairs_file, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[MORE]"]})
    tokenizer.save_pretrained(policy_folder)
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    rows[3]["chosen"] += "[MORE]"
    write_rows(pairs_file, rows)
    quick = {"train": {"num_train_epochs": 1}, "layer": 2, "width": 16}
    with pytest.raises(DataError, match=r"pairs.jsonl:4: unknown token: the text has token 64, and the model has emb"):
        train_scorer(settings(policy_folder, pairs_file, tmp_path / "head", **quick))
    with pytest.warns(UserWarning, match="left out 1 of 64 rows"):
        report = train_scorer(settings(policy_folder, pairs_file, tmp_path / "head", on_bad="skip", **quick))
    assert report.pairs + report.eval_pairs == 63
    assert "unknown token" in (tmp_path / "head" / "rejects.jsonl").read_text()


def test_heads_on_the_same_completions_share_the_states(policy_folder, pairs_file, tmp_path, monkeypatch):
    states, fixed = tmp_path / "states", {"layer": 2, "width": 64}
    alone = settings(policy_folder, pairs_file, tmp_path / "alone", "state", objective="full-bt", **fixed)
    train_scorer(alone)
    train_scorer(settings(policy_folder, pairs_file, tmp_path / "first", "state", states=states, **fixed))
    monkeypatch.setattr(state_cache, "_read", lambda *_: pytest.fail("the policy is read again"))
    shared = {"objective": "full-bt", "states": states} | fixed
    train_scorer(settings(policy_folder, pairs_file, tmp_path / "second", "state", **shared))
    assert (tmp_path / "second" / "head.safetensors").read_bytes() == (
        tmp_path / "alone" / "head.safetensors"
    ).read_bytes()
    assert {path.name for path in states.iterdir()} == {"train", "held-out"}


def test_other_states_in_the_folder_are_computed_anew(policy_folder, pairs_file, tmp_path):
    states, fixed = tmp_path / "states", {"layer": 2, "width": 64}
    for name, kind, more in (
        ("a", "vocab", {"states": states}),
        ("b", "state", {"states": states}),
        ("c", "state", {}),
    ):
        train_scorer(settings(policy_folder, pairs_file, tmp_path / name, kind, **more, **fixed))
    assert (tmp_path / "b" / "head.safetensors").read_bytes() == (tmp_path / "c" / "head.safetensors").read_bytes()


def test_a_folder_of_states_belongs_to_one_run_at_a_time(policy_folder, pairs_file, tmp_path):
    of_both = {"layer": 2, "width": 64, "states": tmp_path / "states"}
    with lock_folder(tmp_path / "states"), pytest.raises(UsageError, match="states"):
        train_scorer(settings(policy_folder, pairs_file, tmp_path / "head", "state", **of_both))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file; name a folder"):
        train_scorer(settings(policy_folder, pairs_file, tmp_path / "head", "state", states=tmp_path / "file"))
    with pytest.raises(UsageError, match="states belongs to a head"):
        train_scorer(TrainSettings(
            pairs=str(pairs_file), base=str(policy_folder), output=tmp_path / "x", states=tmp_path / "states"
        ))  # fmt: skip
