"""vLLM's own batch command on an OpenAI batch file: guided, unguided and malformed lines in one file."""

import json
import subprocess

import pytest

from helpers.vllm_world import vllm_environment
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.engines.vllm import xargs
from rgtg.models.loading.policy import load_policy

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:.*was trained on")]


def test_a_batch_file_is_completed_with_guidance(vllm_python, vllm_world, tmp_path):
    bodies = [
        {"vllm_xargs": xargs("kind", 3.0, top_k=5)},
        {},
        {"vllm_xargs": xargs("nobody", 3.0)},
        {"vllm_xargs": xargs("reward", 2.0, top_k=5)},
    ]
    lines = [
        {
            "custom_id": str(i), "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": str(vllm_world.policy), "messages": [{"role": "user", "content": "the cat sat"}],
                     "max_tokens": 10, "temperature": 0, **body},
        }
        for i, body in enumerate(bodies)
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    done = subprocess.run(
        [
            vllm_python, "-m", "vllm.entrypoints.openai.run_batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model",
            str(vllm_world.policy), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
            "--chat-template", "template.jinja", "--logits-processors", "rgtg.engines.vllm:Guidance",
        ],
        cwd=tmp_path, env=vllm_environment(vllm_world.file) | {"VLLM_CPU_KVCACHE_SPACE": "1"}, capture_output=True,
        text=True, timeout=500, check=False,
    )  # fmt: skip
    assert (tmp_path / "out.jsonl").exists(), done.stderr[-6000:]
    answers = {row["custom_id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    policy = load_policy(str(vllm_world.policy), dtype="float32", device="cpu")

    def wanted(scorer, **settings):
        guided = GuidedPolicy.from_pretrained(policy, scorer, **settings)
        return guided.generate(["the cat sat"], max_new_tokens=10, temperature=0.0)[0].text

    found = {
        name: row["response"]["body"]["choices"][0]["message"]["content"]
        for name, row in answers.items()
        if name != "2"
    }
    assert found == {
        "0": wanted(str(vllm_world.scorers["kind"]), beta=3.0, top_k=5),
        "1": wanted(None, method="policy"),
        "3": wanted(str(vllm_world.scorers["reward"]), beta=2.0, top_k=5),
    }
    assert answers["2"]["response"]["status_code"] == 400
    assert "unknown scorer 'nobody'" in json.dumps(answers["2"])
