"""``rgtg generate --ray --engine vllm`` on one node, in vLLM's environment: the job of the torch engine, resumed."""

import json
import subprocess

import pytest

from helpers.vllm_world import vllm_environment
from rgtg.batch.journal import Journal, JournalEntry
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.models.loading.policy import load_policy

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:.*was trained on")]
ROWS = 8


@pytest.fixture(scope="module")
def python_with_ray(vllm_python):
    """vLLM's interpreter, if Ray is installed there."""
    found = subprocess.run([vllm_python, "-c", "import ray"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("vLLM's environment has no Ray: run these tests by make test-vllm")
    return vllm_python


@pytest.fixture
def run_job(python_with_ray, vllm_world):
    """Run ``rgtg generate --ray --engine vllm`` with these arguments; returns the finished process."""

    def run(*arguments):
        environment = vllm_environment(vllm_world.file) | {"VLLM_CPU_KVCACHE_SPACE": "1", "RAY_worker_niceness": "0"}
        words = ["--ray", "--engine", "vllm", "--actors", "1", "--policy", vllm_world.policy, "--dtype", "float32"]
        done = subprocess.run(
            [python_with_ray, "-m", "rgtg", "generate", *map(str, [*words, *arguments])],
            env=environment, capture_output=True, text=True, timeout=800, check=False,
        )  # fmt: skip
        if "Ray could not start" in done.stderr and "timed out" in done.stderr:
            pytest.skip("this machine is too busy: Ray's processes did not start in time")
        return done

    return run


def batch_line(name, prompt, **settings):
    """A line of an OpenAI batch file: rows of such files may have settings of their own."""
    body = {"prompt": prompt, **settings}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_job_gives_the_torch_engine_s_records_and_resumes(run_job, vllm_world, tmp_path):
    """Greedy rows equal torch's; sampled rows have figures; a bad row has an error; a second start does nothing."""
    texts = ["the cat sat" + "abcdefgh"[:i] for i in range(ROWS)]
    rows = [batch_line(f"greedy-{i}", text, temperature=0) for i, text in enumerate(texts)]
    rows += [batch_line(f"sampled-{i}", "the cat", temperature=1, beta=0.5) for i in range(2)]
    rows += [batch_line("nucleus", "the cat", top_p=0.5), batch_line("empty", "")]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    guidance = ["--scorer", vllm_world.scorers["kind"], "--beta", 3, "--top-k", 5, "--max-new-tokens", 12]
    files = ["--on-bad", "skip", "--output-format", "records", "--prompts", prompts, "--output", output]
    job = [*guidance, *files]
    done = run_job(*job)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    # 1. greedy rows: text, tokens, seeds and log π are the torch engine's
    found = {row["id"]: row for row in lines(output)}
    assert list(found) == [row["custom_id"] for row in rows[:-2]], "in the order of the prompts"
    policy = load_policy(str(vllm_world.policy), dtype="float32", device="cpu")
    guided = GuidedPolicy.from_pretrained(policy, str(vllm_world.scorers["kind"]), beta=3.0, top_k=5)
    for row, wanted in zip(rows, guided.generate(texts, temperature=0.0, max_new_tokens=12), strict=False):
        made = found[row["custom_id"]]
        for name in ("prompt", "text", "token_ids", "finish_reason", "method", "seed", "guided_log_prob"):
            assert made[name] == getattr(wanted, name), (row["custom_id"], name)
        assert made["policy_log_prob"] == pytest.approx(wanted.policy_log_prob, abs=1e-3)
        assert made["candidates_log_prob"] is made["score"] is None

    # 2. sampled rows: guided and unguided log-probabilities are those that torch gives the drawn tokens
    for name in ("sampled-0", "sampled-1"):
        made = found[name]
        ids = guided.prepare(made["prompt"])[0].prompt_ids
        total = 0.0
        for i, token in enumerate(made["token_ids"]):
            (step,) = guided.generate_ids([[*ids, *made["token_ids"][:i]]], max_new_tokens=1, beta=0.5, trace=True)
            total += step.trace[0].guided_log_probs[step.trace[0].candidate_ids.index(token)]
        assert made["guided_log_prob"] == pytest.approx(total, abs=1e-3)
        assert made["guided_log_prob"] < 0
    assert found["sampled-0"]["token_ids"] != found["sampled-1"]["token_ids"], "each row has a seed of its own"

    # 3. errors belong to their rows
    failed = {row["id"]: row for row in lines(output.with_name("out.jsonl.errors.jsonl"))}
    assert failed["nucleus"]["reason"] == "bad value"
    assert "cannot carry top_p" in failed["nucleus"]["error"]
    assert failed["empty"]["reason"] == "empty prompt"

    # 4. a job that lost its last rows completes them again, and only them
    whole = output.read_bytes()
    made_with = json.loads(output.with_name("out.jsonl.job.json").read_text())["made_with"]
    kept = [JournalEntry(i, line, (0, 0, 0)) for i, line in enumerate(whole.decode().splitlines()[:-1])]
    partial = output.with_name("out.jsonl.partial")
    with Journal.open(partial, made_with, rows=len(found), counts=3) as journal:
        journal.append(kept)
    output.unlink()
    output.with_name("out.jsonl.job.json").unlink()
    done = run_job(*job)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    again = lines(output)
    assert [row["id"] for row in again] == list(found)
    assert output.read_bytes().splitlines()[:-1] == whole.splitlines()[:-1]
    assert again[-1]["token_ids"] == found[again[-1]["id"]]["token_ids"], "the seed is the row's own"


def test_what_vllm_cannot_carry_is_refused_in_a_worker(run_job, vllm_world, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    files = ["--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl"]
    done = run_job("--scorer", vllm_world.scorers["kind"], "--entropy-gate", 1.0, *files)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "the engine vllm cannot carry entropy_gate" in done.stderr
