"""lm-evaluation-harness against the server, if it is installed (.ci/run installs it; the dev extra does not)."""

import json
import warnings

import pytest

from helpers.served import on_a_socket, serving
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


def test_lm_eval_scores_a_tiny_task(tmp_path, monkeypatch):
    """Two of four answers equal the guided policy's, so exact_match is one half."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm_eval = pytest.importorskip(
            "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lm-eval[api]'"
        )
        from lm_eval.tasks import TaskManager

        with serving() as served:
            guided = GuidedPolicy(served.models.policy, served.models.scorers["kind"], method="pargs")
            made = guided.generate(QUESTIONS, max_new_tokens=12, temperature=0, stop=["e"])
            answers = [done.text if i % 2 else done.text + "?" for i, done in enumerate(made)]
            rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
            file = tmp_path / "tiny.jsonl"
            file.write_text("\n".join(map(json.dumps, rows)))
            (tmp_path / "tiny.yaml").write_text(TASK.format(file=file))
            with on_a_socket(served) as url:
                results = lm_eval.simple_evaluate(
                    model="local-completions",
                    model_args={
                        "model": "tiny+kind", "base_url": f"{url}/v1/completions", "num_concurrent": 2,
                        "tokenizer_backend": None, "tokenized_requests": False, "max_retries": 1,
                    },
                    tasks=["rgtg_tiny"],
                    task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
                    bootstrap_iters=0,
                )  # fmt: skip
    assert results["results"]["rgtg_tiny"]["exact_match,none"] == 0.5
    assert [sample["resps"][0][0] for sample in results["samples"]["rgtg_tiny"]] == [done.text for done in made]
