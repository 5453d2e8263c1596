"""train_scorer end to end on tiny models: what it learns and saves, and the errors it raises."""

import itertools
import json
import random
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import TensorBoardCallback

from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.config import TrainSettings
from rgtg.config.training import PrefixBtSettings
from rgtg.errors import DataError, MissingExtraError, NonFiniteError, OutputError, UsageError
from rgtg.evaluation.audit.prefix_accuracy import audit_prefixes
from rgtg.models.loading.scorer_info import read_info
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.tokenization.padding import pad_right
from rgtg.training.arguments import reward_config
from rgtg.training.objectives import pair_losses
from rgtg.training.train import train_scorer

FAST = {"learning_rate": 3e-3, "num_train_epochs": 4, "logging_steps": 2}
IDS = [[5, 6, 7, 20, 21, 2], [8, 9, 30, 31, 32, 33, 2]]


@pytest.fixture
def pairs_file(tmp_path):
    torch.set_num_threads(1)
    return write_rows(tmp_path / "pairs.jsonl", synthetic_rows(48))


def settings(policy_folder, pairs_file, output, **changes):
    train = FAST | changes.pop("train", {})
    values = {"pairs": str(pairs_file), "base": str(policy_folder), "output": output, "eval_fraction": 0.25}
    return TrainSettings(**(values | {"train": train} | changes))


@pytest.mark.parametrize("objective", ["prefix-bt", "full-bt"])
def test_learns_a_rule_and_saves_a_stock_model(policy_folder, pairs_file, tmp_path, objective):
    output = tmp_path / "scorer"
    report = train_scorer(settings(policy_folder, pairs_file, output, objective=objective))
    assert report.pairs + report.eval_pairs == 48
    assert report.evaluation["accuracy_100"] >= 0.9
    assert report.evaluation["margin"] > 0
    first = json.loads((output / "train-log.jsonl").read_text().splitlines()[0])
    assert {"loss", "accuracy_10", "accuracy_25", "accuracy_50", "accuracy_75", "accuracy_100", "margin"} <= set(first)
    assert report.evaluation["loss"] < first["loss"]

    info = read_info(output)
    assert info.objective == objective
    assert info.data_fingerprint == report.data_fingerprint
    assert info.tokenizer_hash == tokenizer_hash(tiny_tokenizer())
    assert objective in (output / "README.md").read_text()
    assert not list(output.rglob("*.bin"))
    assert not list(output.glob(".unfinished*"))
    assert not (output / "checkpoints").exists()


def test_plain_transformers_gives_the_same_reward(policy_folder, pairs_file, tmp_path):
    output = tmp_path / "scorer"
    train_scorer(settings(policy_folder, pairs_file, output, train={"max_steps": 2}))
    stock = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert stock.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    ids, mask = pad_right(IDS, tokenizer.pad_token_id, "cpu")
    rewards = stock(input_ids=ids, attention_mask=mask).logits[:, 0].detach()
    ours = PrefixScorer.from_pretrained(str(output), device="cpu").score_prefixes(
        [r[:2] for r in IDS], [r[2:] for r in IDS]
    )
    torch.testing.assert_close(torch.stack([scores[-1] for scores in ours]), rewards, atol=1e-5, rtol=1e-5)


def test_lora_adapter_gives_the_scores_it_was_trained_to(policy_folder, pairs_file, tmp_path, monkeypatch):
    seen = {}
    from rgtg.training import train as run

    def keep(folder, model, *rest, **named):
        ids, mask = pad_right(IDS, 1, "cpu")
        seen["rewards"] = model.eval()(input_ids=ids, attention_mask=mask).logits[:, 0].detach()
        return real(folder, model, *rest, **named)

    real = run.save_scorer
    monkeypatch.setattr(run, "save_scorer", keep)
    output = tmp_path / "scorer"
    report = train_scorer(settings(policy_folder, pairs_file, output, lora={"r": 4}, train={"learning_rate": 1e-2}))
    assert (output / "adapter_config.json").is_file()
    assert report.evaluation["accuracy_100"] >= 0.8
    scorer = PrefixScorer.from_pretrained(str(output), device="cpu")
    ours = scorer.score_prefixes([row[:2] for row in IDS], [row[2:] for row in IDS])
    torch.testing.assert_close(torch.stack([s[-1] for s in ours]), seen["rewards"], atol=1e-5, rtol=1e-5)
    assert scorer.info.objective == "prefix-bt"
    again = train_scorer(settings(output, pairs_file, tmp_path / "further", train={"max_steps": 1}))  # from an adapter
    assert again.steps == 1


def test_a_trained_reward_model_is_trained_further_with_its_own_head(scorer_folder, pairs_file, tmp_path):
    output = tmp_path / "further"
    train_scorer(settings(scorer_folder, pairs_file, output, train={"max_steps": 1, "learning_rate": 1e-30}))
    before, after = (load_file(folder / "model.safetensors")["score.weight"] for folder in (scorer_folder, output))
    assert torch.equal(before, after)


def test_new_head_depends_on_the_seed_alone(policy_folder):
    from rgtg.training.trainers.reward import load_base

    torch.manual_seed(123)
    one, _ = load_base(str(policy_folder), 0)
    torch.manual_seed(456)
    same, _ = load_base(str(policy_folder), 0)
    other, _ = load_base(str(policy_folder), 1)
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)


def test_non_finite_loss_stops_and_names_the_step(policy_folder, pairs_file, tmp_path):
    with pytest.raises(NonFiniteError, match=r"at step \d+"):
        train_scorer(
            settings(policy_folder, pairs_file, tmp_path / "out", train={"learning_rate": 1e30, "max_grad_norm": 0})
        )
    assert not (tmp_path / "out" / "rgtg.json").exists()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"learning_rat": 1.0}, "did you mean train.learning_rate"),
        ({"warmup_ratio": 0.1}, "unknown setting train.warmup_ratio"),
        ({"output_dir": "x"}, "use --output"),
        ({"max_length": 12}, "use --max-length"),
        ({"per_device_train_batch_size": "many"}, "expected a number"),
        ({"eval_strategy": "never"}, "refused"),
    ],
)
def test_train_names_are_checked(policy_folder, pairs_file, tmp_path, train, message):
    with pytest.raises(UsageError, match=message):
        train_scorer(settings(policy_folder, pairs_file, tmp_path / "out", train=train))


@pytest.mark.parametrize("changes", [{}, {"trunk": "own", "head": "state", "layer": 1, "width": 8}])
def test_figures_are_sent_to_the_reporters_that_are_set(policy_folder, pairs_file, tmp_path, monkeypatch, changes):
    output, real, ticks = tmp_path / "out", time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + next(ticks))  # files of the same second have the same name
    start, writers = TensorBoardCallback._init_summary_writer, []

    def keep(self, args):
        start(self, args)
        writers.append(self.tb_writer)

    monkeypatch.setattr(TensorBoardCallback, "_init_summary_writer", keep)
    train_scorer(settings(policy_folder, pairs_file, output, train={"report_to": "tensorboard"}, **changes))
    for writer in writers:
        writer.close()  # as the end of the process does
    events = [e for path in output.glob("checkpoints/**/events.out.tfevents.*") for e in read_events(path)]
    told = {(event.step, value.tag): value.simple_value for event in events for value in event.summary.value}
    lines = [json.loads(line) for line in (output / "train-log.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("loss", "accuracy_50"):
            if name in line:
                assert told[line["step"], f"train/{name}"] == pytest.approx(line[name])
    assert told[lines[-1]["step"], "eval/loss"] == pytest.approx(lines[-1]["eval_loss"])


def read_events(path):
    """Records of a TFRecord file: length, its checksum, the data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_an_unusable_reporter_raises_an_error_before_training(policy_folder, pairs_file, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    for name, error, message in (
        ("wandb", MissingExtraError, "report_to=wandb: .*pip install wandb"),
        ("nowhere", UsageError, "report_to=nowhere: .*tensorboard"),
    ):
        with pytest.raises(error, match=message):
            train_scorer(settings(policy_folder, pairs_file, tmp_path / "out", train={"report_to": name}))


def test_scientific_notation_in_yaml_is_a_number(tmp_path):
    values = TrainSettings(pairs="x", base="y", output=tmp_path, train={"learning_rate": "5e-6"})
    assert reward_config(values, 64).learning_rate == 5e-6


def test_unusable_outputs_raise_an_error_before_training(policy_folder, scorer_folder, pairs_file, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        train_scorer(settings(policy_folder, pairs_file, taken))
    with pytest.raises(UsageError, match="already holds a model"):
        train_scorer(settings(policy_folder, pairs_file, scorer_folder))
    with pytest.raises(OutputError, match="cannot write"):
        train_scorer(settings(policy_folder, pairs_file, taken / "below"))


def test_unusable_input_raises_an_error(policy_folder, pairs_file, tmp_path):
    with pytest.raises(UsageError, match="exceeds the context"):
        train_scorer(settings(policy_folder, pairs_file, tmp_path / "a", max_length=4096))
    with pytest.raises(DataError, match="10"):
        train_scorer(settings(policy_folder, pairs_file, tmp_path / "b", max_length=10))
    with pytest.raises(UsageError, match="held-out"):
        train_scorer(
            settings(policy_folder, pairs_file, tmp_path / "c", eval_fraction=0, train={"eval_strategy": "epoch"})
        )


def test_without_held_out_pairs_nothing_is_evaluated(policy_folder, pairs_file, tmp_path):
    report = train_scorer(
        settings(policy_folder, pairs_file, tmp_path / "out", eval_fraction=0, train={"max_steps": 1})
    )
    assert report.evaluation == {}
    assert report.eval_pairs == 0


def test_skipped_rows_are_written_beside_the_scorer(policy_folder, tmp_path):
    rows = [*synthetic_rows(12), {"prompt": "same? ", "chosen": "a", "rejected": "a"}]
    pairs = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.warns(UserWarning, match=r"left out 1 of 13 rows \(chosen equals rejected: 1\); they are in .*rejects"):
        report = train_scorer(settings(policy_folder, pairs, tmp_path / "out", on_bad="skip", train={"max_steps": 1}))
    assert report.pairs + report.eval_pairs == 12
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 1


def test_prompts_that_are_also_in_eval_pairs_cause_a_warning(policy_folder, pairs_file, tmp_path):
    run = settings(policy_folder, pairs_file, tmp_path / "out", eval_pairs=str(pairs_file), train={"max_steps": 1})
    with pytest.warns(UserWarning, match="evaluation is optimistic"):
        train_scorer(run)


def test_policy_without_a_pad_token_gets_one_that_is_not_eos(pairs_file, tmp_path):
    folder, tokenizer = tmp_path / "bare", tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.unk_token = tokenizer.bos_token = None
    tiny_policy().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_scorer(settings(folder, pairs_file, tmp_path / "out", train={"max_steps": 1}))
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert saved.pad_token_id == config.pad_token_id != saved.eos_token_id


@pytest.mark.parametrize("objective", ["prefix-bt", "full-bt"])
@pytest.mark.parametrize("trunk", ["separate", "own"])
def test_a_scorer_with_length_control_follows_length_less(policy_folder, tmp_path, objective, trunk):
    """The longer completion wins nine pairs of ten, and nothing else does."""
    letters = random.Random(4)
    rows = []
    for i in range(60):
        short, long = sorted((letters.randint(2, 6), letters.randint(7, 12)))
        texts = ["".join(letters.choices("abcdef", k=n)) for n in (long, short)]
        chosen, rejected = texts if i % 10 else texts[::-1]
        rows.append({"prompt": "Hi ", "chosen": chosen, "rejected": rejected})
    pairs = write_rows(tmp_path / "lengths.jsonl", rows)
    kind = {}
    if trunk == "own":  # a head takes more steps to see it
        kind = {"trunk": "own", "head": "state", "layer": "final", "width": 16, "train": {"num_train_epochs": 40}}
    name = objective.replace("-", "_")
    found = {}
    for control in (False, True):
        output = tmp_path / f"scorer-{control}"
        given = {name: {"length_control": control}}
        train_scorer(settings(policy_folder, pairs, output, objective=objective, **kind, **given))
        found[control] = audit_prefixes(str(output), str(pairs), bootstrap=100).length_correlation.mean
        kept = json.loads((output / "settings.json").read_text())[name]
        assert (kept["length_offset"] is not None) == control
    assert kept["length_offset"] > 0
    assert found[True] < found[False]


def test_length_control_needs_its_offset(policy_folder, pairs_file, tmp_path):
    with pytest.raises(ValueError, match="length_offset belongs to length_control"):
        settings(policy_folder, pairs_file, tmp_path / "scorer", prefix_bt={"length_offset": 0.1})
    with pytest.raises(UsageError, match="length_control needs length_offset"):
        pair_losses("prefix-bt", None, PrefixBtSettings(length_control=True), 0)
