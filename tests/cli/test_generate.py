"""``rgtg generate``, and ``rgtg score`` of its output."""

import json

import pytest

from helpers.command import verb
from helpers.files import snapshot
from helpers.naive import info
from helpers.other_tokenizers import reward_model_with, tokenizer_of
from rgtg.models.loading.scorer_info import write_info
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.types.generation import Completion

run = verb()


@pytest.fixture
def models(policy_folder, scorer_folder):
    write_info(scorer_folder, info())
    return ["--policy", policy_folder, "--scorer", scorer_folder, "--max-new-tokens", 8, "--set", "device=cpu"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("Once", "Hi you", "What")))
    return path


def refused(result, code, message):
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    assert result.stdout == ""


def test_one_prompt_is_completed_on_the_terminal(models):
    result = run("generate", *models, "--prompt", "Once", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    (plain,) = run("generate", *models, "--prompt", "Once", "--seed", 3, "--json").stdout.splitlines()
    done = Completion.model_validate_json(plain)
    assert result.stdout == "Once" + done.text + "\n"
    assert run("generate", *models, "--prompt", "Once", "--seed", 3, "--quiet").stdout == done.text + "\n"
    greedy = [run("generate", *models, "--prompt", "Once", "--temperature", 0, "--seed", s).stdout for s in (0, 1)]
    assert greedy[0] == greedy[1]
    traced = Completion.model_validate_json(run("generate", *models, "--prompt", "Once", "--seed", 3, "--trace").stdout)
    assert len(traced.trace) == len(done.token_ids)
    biased = run(
        "generate", *models, "--prompt", "Once", "--set", "logit_bias.9=60", "--set", "logit_bias.2=-100", "--json"
    )
    assert Completion.model_validate_json(biased.stdout).token_ids == [9] * 8


def test_a_file_of_prompts_is_completed_and_scored(models, prompts, scorer_folder, tmp_path):
    output, scored = tmp_path / "out" / "done.jsonl", tmp_path / "scored.jsonl"
    result = run("generate", *models, "--prompts", prompts, "--output", output, "--set", "batch_size=2")
    assert result.exit_code == 0, result.stderr
    done = [Completion.model_validate_json(line) for line in output.read_text().splitlines()]
    assert [c.prompt for c in done] == ["Once", "Hi you", "What"]
    assert json.loads((output.parent / "done.jsonl.settings.json").read_text())["max_new_tokens"] == 8
    beside = [f"done.jsonl{kind}" for kind in ("", ".job.json", ".settings.json")]
    assert sorted(p.name for p in output.parent.iterdir()) == beside
    assert [c.id for c in done] == ["row-1", "row-2", "row-3"]
    again = tmp_path / "again.jsonl"
    run("generate", *models, "--prompts", prompts, "--output", again, "--json")
    redone = [Completion.model_validate_json(line) for line in again.read_text().splitlines()]
    assert [(c.token_ids, c.seed) for c in redone] == [(c.token_ids, c.seed) for c in done]
    result = run("score", "--scorer", scorer_folder, "--input", output, "--output", scored, "--json")
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in scored.read_text().splitlines()]
    scorer = PrefixScorer.from_pretrained(str(scorer_folder), device="cpu")
    for row, c in zip(rows, done, strict=True):
        (reward,) = scorer.score([c.prompt], [c.text], finished=c.finish_reason == "stop")
        assert row["reward"] == pytest.approx(reward, abs=1e-5)
    assert json.loads(result.stdout)["rows"] == 3


@pytest.mark.parametrize("method", ["pargs", "policy", "best-of-n", "pargs-greedy"])
def test_the_saved_settings_repeat_the_run(models, prompts, tmp_path, method):
    output = tmp_path / "out.jsonl"
    flags = ["generate", *models[: 2 if method == "policy" else 4], "--method", method, "--max-new-tokens", 4]
    first = run(*flags, "--prompts", prompts, "--output", output, "--quiet")
    assert first.exit_code == 0, first.stderr
    saved = tmp_path / "saved.json"
    saved.write_text((tmp_path / "out.jsonl.settings.json").read_text())
    before = snapshot(output)
    again = run("generate", "--config", saved, "--json")  # the same job, or it would be refused
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["rows"] == 3
    assert snapshot(output) == before
    assert "top_k" in json.loads(saved.read_text())


def test_options_of_files_are_errors_for_one_prompt(models):
    refused(
        run("generate", *models, "--prompt", "Hi", "--batch-size", 3, "--force"), 2, "batch_size, force: needs a file"
    )


@pytest.mark.filterwarnings("default:.*the model")
def test_an_openai_batch_gives_an_openai_batch_output(models, tmp_path):
    prompts, output = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
    body = {"model": "policy", "prompt": "Once", "max_tokens": 3}
    rows = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(2)]
    rows.append(rows[0] | {"custom_id": "no", "body": body | {"echo": True}})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["generate", *models, "--prompts", prompts, "--output", output]
    refused(run(*flags), 3, "batch.jsonl:3: unsupported field: body.echo")
    result = run(*flags, "--on-bad", "skip", "--json")
    assert result.exit_code == 0, result.stderr
    errors = tmp_path / "out.jsonl.errors.jsonl"
    assert json.loads(result.stdout) == {"rows": 2, "output": str(output), "failed": 1, "errors": str(errors)}
    assert json.loads(errors.read_text())["custom_id"] == "no"
    texts = [json.loads(line)["response"]["body"]["choices"][0]["text"] for line in output.read_text().splitlines()]
    assert len(texts) == 2
    assert texts[0] != texts[1], "the same prompt twice is sampled twice"


def test_rows_that_fail_while_decoding_end_with_exit_code_1(models, prompts, tmp_path, monkeypatch):
    from rgtg.batch import tasks as work

    whole = work.complete_batch

    def failing(guided, batch, settings, **given):
        outcomes = whole(guided, batch, settings, **given)
        nan = "not a finite number", "NaN"
        return [work.FailedTask(o.task, *nan) if o.task.row.prompt == "What" else o for o in outcomes]

    monkeypatch.setattr(work, "complete_batch", failing)
    output = tmp_path / "out.jsonl"
    result = run("generate", *models, "--prompts", prompts, "--output", output)
    assert result.exit_code == 1
    assert "1 of 3 rows have none" in result.stdout
    assert "1 of 3 rows failed during decoding" in result.stderr
    assert len(output.read_text().splitlines()) == 2
    monkeypatch.undo()
    again = run("generate", *models, "--prompts", prompts, "--output", output, "--quiet")
    assert (again.exit_code, again.output) == (0, "")
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["Once", "Hi you", "What"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", "Hi", "--beta", "nan"], 2, "beta"),
        (["--prompt", "Hi", "--top-k", "0"], 2, "top_k must be at least 1"),
        (["--prompt", ""], 3, "the prompt is empty"),
        (["--prompt", "x" * 200], 3, "context of 128 tokens"),
        (["--prompt", "Hi", "--method", "prags"], 2, "unknown method 'prags'"),
        (["--prompt", "Hi", "--set", "topk=3"], 2, "did you mean top_k?"),
        (["--prompt", "Hi", "--policy", "./absent"], 2, "no model folder ./absent"),
        (["--prompt", "Hi", "--n", "3"], 2, "n applies to cd-blockwise, best-of-n, smc, beam, not to pargs"),
        ([], 2, "give either --prompt TEXT or --prompts FILE"),
        (["--prompts", "p", "--output", "o", "--ray", "--tp-plan", "auto"], 2, "not among Ray's workers"),
        (["--prompts", "absent.jsonl"], 2, "--prompts and --output go together"),
    ],
)
def test_invalid_use_prints_one_message(models, arguments, code, message):
    refused(run("generate", *models, *arguments), code, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "Hi"], "--engine vllm completes files of prompts on Ray: add --ray"),
        (["--prompts", "p", "--output", "o", "--ray", "--method", "best-of-n"], "vllm cannot carry best-of-n"),
        (["--prompts", "p", "--output", "o", "--ray", "--trace"], "the engine vllm cannot carry traces"),
        (["--prompts", "p", "--output", "o", "--ray", "--threads", "2"], "vLLM chooses its devices and threads itself"),
        (["--prompts", "p", "--output", "o", "--ray"], "is started there (docs/ray.md says how to make one)"),
    ],
)
def test_vllm_is_refused_where_it_cannot_run(arguments, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(run("generate", "--policy", "policy", "--engine", "vllm", *arguments), 2, message)


def test_invalid_prompt_files_leave_no_output(models, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    target = ["--prompts", prompts, "--output", output, "--quiet"]
    prompts.write_text('{"prompt": "Hi"}\nnonsense\n')
    refused(run("generate", *models, *target), 3, "prompts.jsonl:2: not JSON")
    prompts.write_text('{"prompt": "Hi"}\n{"prompt": "' + "x" * 200 + '"}\n')
    refused(run("generate", *models, *target), 3, "prompts.jsonl:2: too long: a prompt of")
    refused(run("generate", *models, *target, "--policy", "./absent"), 2, "no model folder")
    assert not [p for p in tmp_path.iterdir() if "out.jsonl" in p.name]


def test_unwritable_outputs_are_errors(models, prompts, scorer_folder, tmp_path):
    under = prompts / "out.jsonl"
    refused(run("generate", *models, "--prompts", prompts, "--output", under), 1, "cannot write")
    refused(run("generate", *models, "--prompts", prompts, "--output", tmp_path), 1, "it is a folder")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "text": "b"}\n')
    refused(run("score", "--scorer", scorer_folder, "--input", rows, "--output", rows / "x"), 1, "cannot write")


def test_speculation_is_counted_in_the_completion(models):
    flags = ["generate", *models[:4], "--prompt", "Once", "--json", "--max-new-tokens", 24, "--min-new-tokens", 20]
    result = run(*flags, "--draft", "policy", "--draft-length", 3)
    assert result.exit_code == 0, result.stderr
    done = json.loads(result.stdout)
    assert done["drafted"] >= done["accepted"] > 0
    refused(run(*flags, "--draft-length", 3), 2, "say where drafts come from")


@pytest.mark.filterwarnings("default:.*is not steered")
def test_a_scorer_with_another_tokenizer_shows_its_counts(policy_folder, prompts, tmp_path):
    other, output = tmp_path / "other", tmp_path / "out.jsonl"
    reward_model_with(tokenizer_of("llama"), positions=20).save_pretrained(other)
    tokenizer_of("llama").save_pretrained(other)
    write_info(other, info())
    flags = ["generate", "--policy", policy_folder, "--scorer", other, "--set", "device=cpu", "--prompts", prompts]
    result = run(*flags, "--output", output, "--max-new-tokens", 30, "--min-new-tokens", 30)
    assert result.exit_code == 0, result.output
    assert "is not steered" in result.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    names = ("candidates", "retokenised", "unscored")
    candidates, retokenised, unscored = (sum(row[name] for row in rows) for name in names)
    assert 0 < retokenised < candidates
    assert 0 < unscored < 90
    assert f"{retokenised / candidates:.1%} of {candidates} candidates were not exactly one" in result.stdout
    assert f"did not read {unscored} tokens" in result.stdout
    again = run(*flags, "--output", output, "--max-new-tokens", 30, "--min-new-tokens", 30, "--json")
    assert json.loads(again.stdout) == {
        "rows": 3, "output": str(output), "candidates": candidates, "retokenised": retokenised, "unscored": unscored,
    }  # fmt: skip


def test_all_candidates_have_a_name(policy_folder):
    """--top-k all is the whole vocabulary, from the command line and --set."""
    run = verb("generate")
    flags = ["--policy", policy_folder, "--method", "policy", "--prompt", "Hi", "--trace", "--max-new-tokens", "2"]
    for given in (["--top-k", "all"], ["--set", "top_k=all"], ["--set", "top_k=null"]):
        ran = run(*flags, *given)
        assert ran.exit_code == 0, ran.stderr
        assert {len(step["candidate_ids"]) for step in json.loads(ran.stdout)["trace"]} == {64}
    assert run(*flags, "--top-k", "some").exit_code == 2
