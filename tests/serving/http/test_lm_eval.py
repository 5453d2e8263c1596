"""lm-evaluation-harness against the server, if it is installed (.ci/run installs it; the dev extra does not)."""

import json
import warnings
from functools import partial

import pytest

from helpers.served import on_a_socket, serving
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy

QUESTIONS = ["Once upon a time", "Hi", "A cat sat", "What is it?"]
TASK = """
task: rgtg_tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICES = [" a time", " you", " on a mat", " it is", "!", " x y z"]
MULTIPLE_CHOICE = """
task: rgtg_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    """The package, without a network and without its warnings."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip(
            "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lm-eval[api]'"
        )


def evaluate(lm_eval, folder, task, text, rows, **model):
    """Results of one task of one's own."""
    from lm_eval.tasks import TaskManager

    file = folder / f"{task}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{task}.yaml").write_text(text.format(file=file))
    return lm_eval.simple_evaluate(
        tasks=[task], task_manager=TaskManager(include_path=str(folder), include_defaults=False), bootstrap_iters=0,
        **model,
    )  # fmt: skip


def test_generated_answers(tmp_path, lm_eval):
    """Two of four answers equal the guided policy's, so exact_match is one half."""
    with serving() as served:
        guided = GuidedPolicy(served.models.policy, served.models.scorers["kind"], method="pargs")
        made = guided.generate(QUESTIONS, max_new_tokens=12, temperature=0, stop=["e"])
        answers = [done.text if i % 2 else done.text + "?" for i, done in enumerate(made)]
        rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
        with on_a_socket(served) as url:
            results = evaluate(
                lm_eval, tmp_path, "rgtg_tiny", TASK, rows, model="local-completions",
                model_args={
                    "model": "tiny+kind", "base_url": f"{url}/v1/completions", "num_concurrent": 2,
                    "tokenizer_backend": None, "tokenized_requests": False, "max_retries": 1,
                },
            )  # fmt: skip
    assert results["results"]["rgtg_tiny"]["exact_match,none"] == 0.5
    assert [sample["resps"][0][0] for sample in results["samples"]["rgtg_tiny"]] == [done.text for done in made]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_those_of_the_stock_model(tmp_path, lm_eval, batch_size):
    """A multiple-choice task through the server, and by the package's own model of the same folder."""
    policy = tmp_path / "policy"
    tiny_policy().save_pretrained(policy)
    tiny_tokenizer().save_pretrained(policy)
    rows = [
        {"question": question, "choices": CHOICES[i % 3 :] + CHOICES[: i % 3], "answer": i % len(CHOICES)}
        for i, question in enumerate(QUESTIONS * 3)
    ]
    run = partial(evaluate, lm_eval, tmp_path, "rgtg_choices", MULTIPLE_CHOICE, rows)
    stock = run(model="hf", model_args={"pretrained": str(policy), "dtype": "float32"}, device="cpu")
    with serving() as served, on_a_socket(served) as url:
        told = run(
            model="local-completions", batch_size=batch_size,
            model_args={
                "model": "tiny", "base_url": f"{url}/v1/completions", "num_concurrent": 2, "max_retries": 1,
                "tokenizer_backend": "huggingface", "tokenizer": str(policy), "max_length": 128,
            },
        )  # fmt: skip
    for metric in ("acc,none", "acc_norm,none"):
        assert told["results"]["rgtg_choices"][metric] == stock["results"]["rgtg_choices"][metric]
    assert 0 < told["results"]["rgtg_choices"]["acc,none"] < 1
    samples = zip(told["samples"]["rgtg_choices"], stock["samples"]["rgtg_choices"], strict=True)
    for ours, theirs in samples:
        for (log_prob, greedy), (expected, expected_greedy) in zip(
            ours["filtered_resps"], theirs["filtered_resps"], strict=True
        ):
            assert float(log_prob) == pytest.approx(float(expected), abs=1e-3)
            assert str(greedy) == str(expected_greedy)
