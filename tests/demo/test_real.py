"""The demo with a chat model, on a tiny one: files, labels, runs, and the fall-back to the small world."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from helpers.chats import chat_tokenizer
from helpers.tiny_models import randomise
from rgtg.config import DemoSettings
from rgtg.demo import real
from rgtg.demo.messages import PEOPLE, SEEN, UNSEEN, draw_prompts
from rgtg.errors import ModelNotFoundError, UsageError
from rgtg.types.comparison import ComparisonResult

pytest.importorskip("vaderSentiment", reason="the demo's gold needs: pip install 'rgtg[demo]'")


@pytest.fixture
def chat_model(tmp_path):
    """A saved tiny chat model that ends many of its replies."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = chat_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = randomise(LlamaForCausalLM(config), 0)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] *= 2.5
    folder = tmp_path / "chat-model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def demo(*arguments):
    from rgtg.cli.main import app

    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


def test_prompts_of_training_are_never_asked_again():
    seen, unseen = draw_prompts(SEEN, 10**6, 0), draw_prompts(UNSEEN, 10**6, 0)
    assert len(set(seen)) == len(seen) == len(PEOPLE) * len(SEEN)
    assert not set(seen) & set(unseen)
    assert not set(SEEN) & set(UNSEEN)
    assert draw_prompts(SEEN, 5, 0) != draw_prompts(SEEN, 5, 1)


def test_a_tiny_demo_writes_all_files(tmp_path, chat_model, monkeypatch):
    monkeypatch.setattr(real, "MIN_PAIRS", 1)
    output = tmp_path / "out"
    done = demo(
        "--policy", chat_model, "--output", output, "--prompts", "4", "--set", "seen_prompts=24", "--set",
        "betas=[1.0, 2.0]", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = ComparisonResult.model_validate_json((output / "results.json").read_bytes())
    assert json.loads(done.stdout)["result"] == result.model_dump(mode="json")
    assert result.baseline == "policy"
    assert [row.label for row in result.methods] == [
        "policy", "best of 8", "args-sample β=1", "args-sample β=2", "pargs β=1", "pargs β=2",
        "greedy: policy", "greedy: args β=1", "greedy: args β=2", "greedy: pargs β=1", "greedy: pargs β=2",
    ]  # fmt: skip
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.endswith("</html>\n")
    assert "Sampled methods at about equal KL" in page
    for name in real.SCORERS:
        assert (output / name / "head.safetensors").is_file()
        assert (output / f"audit-{name}" / "audit.json").is_file()
    trained = {row["prompt"][0]["content"] for row in rows(output / "pairs.jsonl")}
    audited = {row["prompt"][0]["content"] for row in rows(output / "audit-pairs.jsonl")}
    asked = {row["prompt"][0]["content"] for row in rows(output / "prompts.jsonl")}
    assert trained
    assert audited
    assert not trained & audited
    assert not asked & (trained | audited)
    replies = rows(output / "completions" / "pargs-beta1.jsonl")
    pargs = next(row for row in result.methods if row.label == "pargs β=1")
    assert pargs.metrics["reward"].mean == pytest.approx(sum(row["gold"] for row in replies) / 4)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_policy_that_never_ends_is_an_error(tmp_path, chat_model, monkeypatch):
    monkeypatch.setattr(real, "MAX_NEW_TOKENS", 1)
    done = demo("--policy", chat_model, "--output", tmp_path / "out", "--set", "seen_prompts=8", "--quiet")
    assert done.exit_code == 2
    assert "within 1 tokens" in done.stderr


def test_the_strength_nearest_to_the_budget_is_named():
    def row(label, method, kl, beta=None):
        interval = {"low": kl, "high": kl, "n": 1}
        metrics = {"reward": {"mean": 1.0} | interval, "kl_nats": {"mean": kl} | interval}
        return {
            "label": label, "method": method, "beta": beta, "metrics": metrics, "seconds": 1, "tokens_per_second": 1,
            "policy_calls": 1, "scorer_calls": 1,
        }  # fmt: skip

    methods = [
        row("policy", "policy", 1.0), row("best of 8", "best-of-n", 3.0), row("pargs β=1", "pargs", 2.0, 1.0),
        row("pargs β=2", "pargs", 3.5, 2.0), row("pargs β=4", "pargs", 9.0, 4.0),
    ]  # fmt: skip
    result = ComparisonResult.model_validate({
        "reward": "points", "prompts": 1, "methods": methods, "provenance": {"version": "0", "command": ""},
    })  # fmt: skip
    assert real.at_equal_kl(result) == (
        "Sampled methods at about equal KL, in points: policy 1.00 at 1.0 nats; best of 8 1.00 at 3.0 nats; "
        "pargs β=2 1.00 at 3.5 nats."
    )
    assert math.isfinite(result.methods[0].metrics["reward"].mean)


def test_without_a_model_the_small_world_stands_in_and_says_so(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise ModelNotFoundError("cannot get smollm2-135m")

    ran = []
    monkeypatch.setattr("rgtg.models.loading.known_models.fetch_model", fail)
    monkeypatch.setattr("rgtg.demo.run.run_demo", lambda settings, stage: ran.append(settings) or 1 / 0)
    done = demo("--output", tmp_path / "out")
    assert isinstance(done.exception, ZeroDivisionError)
    assert ran
    assert "the small world stands in for the real model: cannot get smollm2-135m" in done.stderr
    refused = demo("--output", tmp_path / "out", "--world", "smollm")
    assert refused.exit_code == 2
    assert "cannot get smollm2-135m" in refused.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world": "smollm", "corpus": 20}, "corpus belongs to the world small"),
        ({"world": "small", "policy": "x"}, "policy belongs to the world smollm"),
        ({"policy": "x", "policy_steps": 3}, "policy_steps belongs to the world small"),
    ],
)
def test_settings_of_the_other_world_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**given)


def test_settings_of_one_world_choose_it():
    assert DemoSettings().chosen_world == "auto"
    assert DemoSettings(corpus=20).chosen_world == "small"
    assert DemoSettings(policy="x").chosen_world == "smollm"
    with pytest.raises(UsageError):
        DemoSettings.resolve(None, ["world=large"])
