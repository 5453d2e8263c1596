"""Whole jobs in this process: resuming, refusing, retrying, stopping at every step of writing."""

import hashlib
import json

import pytest

from helpers.files import snapshot
from helpers.naive import make_guided
from rgtg.batch import output as output_module
from rgtg.batch import run as run_module
from rgtg.batch.output import JobOutput
from rgtg.batch.run import run_job
from rgtg.batch.tasks import FailedTask, complete_batch
from rgtg.config import GenerateSettings
from rgtg.data.prompts import read_prompt_rows
from rgtg.errors import DataError, OutputError, RgtgError, UsageError
from rgtg.types.batch import JobResult, RowFailure
from rgtg.types.generation import Completion

SHORT = {"max_new_tokens": 3}


class Stop(BaseException):
    """Stop the process like a kill: nothing catches it."""


@pytest.fixture(scope="module")
def guided():
    return make_guided(beta=1.0)


@pytest.fixture
def job(tmp_path, guided):
    """Run a job over the same file of prompts; return its result."""

    def run(rows=None, decoding=SHORT, output="out.jsonl", **given):
        path = tmp_path / "prompts.jsonl"
        if rows is not None:
            path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        about = {k: given.pop(k) for k in ("progress", "complete") if k in given}
        steered = given.pop("guided", guided)
        settings = GenerateSettings(policy="p", output=tmp_path / output, batch_tokens=24, **given)
        JobOutput(settings.output).check(force=settings.force)
        return run_job(settings, decoding, read_prompt_rows(path), steered, **about)

    return run


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


ROWS = [{"prompt": "ab" * n, "id": f"id{n}"} for n in (3, 1, 4, 2, 5, 1)]
ROWS[5] = ROWS[5] | {"id": "again"}


def test_the_output_is_in_prompt_order_and_its_counts_add_up(job, tmp_path):
    result = job(ROWS)
    done = [Completion.model_validate(line) for line in lines(tmp_path / "out.jsonl")]
    assert [(c.id, c.prompt) for c in done] == [(row["id"], row["prompt"]) for row in ROWS]
    assert (result.rows, result.completions, result.failed, result.undecoded) == (6, 6, 0, 0)
    kept = JobResult.model_validate_json((tmp_path / "out.jsonl.job.json").read_bytes())
    assert kept == result
    assert result.made_with["beta"] == 1.0
    assert result.provenance.models["policy"] == result.made_with["policy"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.job.json", "prompts.jsonl"]


def test_a_job_stopped_after_any_batch_resumes_to_the_same_bytes(job, tmp_path, guided):
    job(ROWS)
    whole = (tmp_path / "out.jsonl").read_bytes()
    batches = []

    def stopping(after):
        def complete(pending):
            for i, batch in enumerate(pending):
                if i == after:
                    raise Stop
                batches.append(len(batch.tasks))
                yield complete_batch(guided, batch, SHORT)

        return complete

    job(output="other.jsonl", complete=stopping(99))
    count, batches[:] = len(batches), []
    assert count == 3
    for after in [0, 1, 1]:
        with pytest.raises(Stop):
            job(output="again.jsonl", complete=stopping(after))
        assert not (tmp_path / "again.jsonl").exists()
    told = []
    job(output="again.jsonl", complete=stopping(99), progress=lambda state: told.append((state.before, state.done)))
    assert len(batches) == count, "what was finished was not done again"
    assert told[0][0] == told[0][1] > 0
    assert (tmp_path / "again.jsonl").read_bytes() == whole


@pytest.mark.parametrize("step", range(5))
def test_a_job_stopped_at_any_step_of_writing_resumes_to_the_same_bytes(job, tmp_path, monkeypatch, step):
    rows = [*ROWS, "{"]
    job(rows, on_bad="skip")
    names = ["out.jsonl", "out.jsonl.errors.jsonl"]
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    about = JobResult.model_validate_json((tmp_path / "out.jsonl.job.json").read_bytes())
    calls = []
    write, remove = output_module._write_lines, output_module.Journal.remove

    def counted(function):
        def call(*args):
            calls.append(function)
            if len(calls) == step + 1:
                raise Stop
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(output_module, "_write_lines", counted(write))
        patch.setattr(output_module.Journal, "remove", counted(remove))
        if step < 4:
            with pytest.raises(Stop):
                job(rows, on_bad="skip", output="b.jsonl")
        else:
            job(rows, on_bad="skip", output="b.jsonl")
            assert len(calls) == 4
    result = job(rows, on_bad="skip", output="b.jsonl", complete=lambda pending: iter(()))
    assert result.model_dump(exclude={"provenance"}) == about.model_dump(exclude={"provenance"})
    assert {name: (tmp_path / name.replace("out", "b")).read_bytes() for name in names} == whole
    assert not (tmp_path / "b.jsonl.partial").exists()


def test_a_finished_job_is_not_repeated(job, tmp_path):
    first = job(ROWS)
    before = snapshot(tmp_path / "out.jsonl")
    assert job(ROWS, complete=lambda pending: pytest.fail("nothing is to be done")) == first
    assert snapshot(tmp_path / "out.jsonl") == before


def cut(text):
    return text[: len(text) // 2]


def lost(text):
    return b"".join(text.splitlines(keepends=True)[:-1])


def turned(text):
    return text[:-2] + bytes([text[-2] ^ 1]) + text[-1:]


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, r"[\d,]+ bytes there, [\d,]+ written"),
        (lost, r"[\d,]+ bytes there, [\d,]+ written"),
        (lambda text: b"", r"0 bytes there, [\d,]+ written"),
        (lambda text: text + text, r"[\d,]+ bytes there, [\d,]+ written"),
        (turned, r"SHA-256 [0-9a-f]{12}… there, [0-9a-f]{12}… written"),
    ],
)
def test_a_damaged_output_is_refused_and_force_replaces_it(job, tmp_path, guided, failed, damage, told):
    path = tmp_path / "out.jsonl"
    job(ROWS, **({"complete": failing(guided, "ab" * 4, [])} if failed else {}))
    job(ROWS, output="whole.jsonl")
    path.write_bytes(damage(path.read_bytes()))
    damaged = path.read_bytes()
    with pytest.raises(
        UsageError, match=rf"out\.jsonl was changed after the job wrote it \({told}\): .*--force to replace"
    ):
        job(ROWS)
    assert path.read_bytes() == damaged
    assert job(ROWS, force=True).completions == len(ROWS)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    nothing = {"complete": lambda pending: pytest.fail("nothing is to be done")}
    assert job(ROWS, force=True, **nothing).completions == len(ROWS), "sound, it is not made again"


def test_a_result_without_a_checksum_is_checked_by_its_number_of_lines(job, tmp_path):
    job(ROWS)
    path, about = tmp_path / "out.jsonl", tmp_path / "out.jsonl.job.json"
    early = json.loads(about.read_text())
    assert early.pop("content") == {
        "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
    }  # fmt: skip
    about.write_text(json.dumps(early))
    assert job(ROWS, complete=lambda pending: pytest.fail("nothing is to be done")).completions == 6
    path.write_bytes(lost(path.read_bytes()))
    with pytest.raises(UsageError, match=r"\(5 lines there, 6 written\)"):
        job(ROWS)
    assert job(ROWS, force=True).completions == len(lines(path)) == 6


def test_a_deleted_output_is_made_again(job, tmp_path):
    job(ROWS)
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    job(ROWS)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"decoding": SHORT | {"temperature": 0.5}}, "temperature"),
        ({"seed": 1}, "seed"),
        ({"rows": ROWS[1:]}, "prompts"),
        ({"trace": True}, "trace"),
        ({"output_format": "openai"}, "format"),
        ({"guided": make_guided(beta=2.0)}, "beta"),
        ({"guided": make_guided("policy")}, "method"),
        ({"guided": make_guided(family="qwen2", beta=1.0)}, "policy"),
    ],
)
def test_a_job_with_other_settings_is_refused_without_force(job, tmp_path, finished, change, name):
    def stopped(pending):
        raise Stop

    if finished:
        job(ROWS)
    else:
        with pytest.raises(Stop):
            job(ROWS, complete=stopped)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    given = {"rows": ROWS} | change
    with pytest.raises(UsageError, match=rf"made with another (\w+, )*{name}.*--force"):
        job(**given)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if "prompts" not in p.name}.items() <= kept.items()
    result = job(**given, force=True)
    assert result.completions == len(given["rows"])
    assert len(lines(tmp_path / "out.jsonl")) == len(given["rows"])


def test_batch_settings_may_change_between_runs(job, tmp_path):
    def one(pending):
        yield complete_batch(make_guided(beta=1.0), pending[0], SHORT)
        raise Stop

    job(ROWS, output="whole.jsonl")
    with pytest.raises(Stop):
        job(ROWS, complete=one)
    job(ROWS, batch_size=1)
    ids = [[line["token_ids"] for line in lines(tmp_path / name)] for name in ("out.jsonl", "whole.jsonl")]
    assert ids[0] == ids[1]


def test_an_output_that_no_job_made_is_not_overwritten(job, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match="no job made it"):
        job(ROWS)
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    assert job(ROWS, force=True).completions == 6


def test_bad_rows_raise_an_error_or_are_listed(job, tmp_path):
    rows = [ROWS[0], "{", {"prompt": "x" * 200, "id": "long"}, ROWS[1]]
    with pytest.raises(DataError, match=r"(?s)cannot use 2 of 4 rows .*jsonl:2: not JSON.*jsonl:3: too long"):
        job(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]
    result = job(rows, on_bad="skip")
    assert (result.rows, result.completions, result.failed, result.undecoded) == (4, 2, 2, 0)
    failures = [RowFailure.model_validate(line) for line in lines(tmp_path / "out.jsonl.errors.jsonl")]
    assert [(f.id, f.line, f.reason) for f in failures] == [(None, 2, "not JSON"), ("long", 3, "too long")]
    with pytest.raises(DataError, match="no row can be completed; the first error is: not JSON"):
        job(["{"], on_bad="skip", output="none.jsonl")


def failing(guided, bad, calls):
    """Complete batches, and fail for rows whose prompt is ``bad``."""

    def complete(pending):
        for batch in pending:
            calls.append([task.row.prompt for task in batch.tasks])
            outcomes = complete_batch(guided, batch, SHORT)
            nan = "not a finite number", "the scorer returned NaN"
            yield [FailedTask(o.task, *nan) if o.task.row.prompt == bad else o for o in outcomes]

    return complete


def test_failed_rows_are_listed_and_the_next_run_tries_them_again(job, tmp_path, guided):
    job(ROWS, output="whole.jsonl")
    calls = []
    result = job(ROWS, complete=failing(guided, "ab" * 4, calls))
    assert (result.completions, result.failed, result.undecoded) == (5, 1, 1)
    assert lines(tmp_path / "out.jsonl.errors.jsonl") == [
        {"version": 1, "id": "id4", "line": 3, "reason": "not a finite number", "error": "the scorer returned NaN"}
    ]
    assert "id4" not in [line["id"] for line in lines(tmp_path / "out.jsonl")]
    calls.clear()
    job(ROWS, complete=failing(guided, "none", calls))
    assert sorted({prompt for prompts in calls for prompt in prompts}) == ["ab" * 3, "ab" * 4], "its batch, not all"
    tokens = [[line["token_ids"] for line in lines(tmp_path / name)] for name in ("out.jsonl", "whole.jsonl")]
    assert tokens[0] == tokens[1]
    assert not (tmp_path / "out.jsonl.errors.jsonl").exists()


def test_a_retry_refuses_an_output_that_was_changed(job, tmp_path, guided):
    job(ROWS, complete=failing(guided, "ab" * 4, []))
    path = tmp_path / "out.jsonl"
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(UsageError, match="was changed after the job wrote it"):
        job(ROWS)


def test_the_job_stops_if_every_row_fails(job, guided, monkeypatch):
    monkeypatch.setattr(run_module, "_MOST_FAILURES", 3)
    calls = []

    def complete(pending):
        for batch in pending:
            calls.append(batch)
            yield [FailedTask(task, "not a finite number", "NaN") for task in batch.tasks]

    with pytest.raises(RgtgError, match=r"the first [34] rows all failed; the last error is: NaN"):
        job(ROWS, complete=complete)
    assert len(calls) < 5


def test_an_output_with_missing_rows_is_not_written(job, tmp_path):
    with pytest.raises(RgtgError, match="do not add up"):
        job(ROWS, complete=lambda pending: iter(()))
    assert not (tmp_path / "out.jsonl.job.json").exists()
    assert (tmp_path / "out.jsonl.partial").exists()


def test_openai_batch_lines_give_openai_batch_results(job, tmp_path):
    body = {"prompt": "abc", "max_tokens": 2, "seed": 5, "model": "p"}
    rows = [
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "ab", "temperature": 0}},
    ]
    job(rows)
    done = lines(tmp_path / "out.jsonl")
    assert [line["custom_id"] for line in done] == ["a", "b"]
    first = done[0]["response"]["body"]
    assert done[0]["error"] is None
    assert (first["object"], first["model"], first["created"]) == ("text_completion", "p", 0)
    assert first["usage"]["prompt_tokens"] == 3
    assert first["usage"]["completion_tokens"] == len(first["rgtg"]["token_ids"]) <= 2
    assert first["rgtg"]["seed"] == 5
    assert set(first["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}
    job(rows, output="plain.jsonl", output_format="records")
    plain = [Completion.model_validate(line) for line in lines(tmp_path / "plain.jsonl")]
    assert [c.text for c in plain] == [line["response"]["body"]["choices"][0]["text"] for line in done]
    assert [c.id for c in plain] == ["a", "b"]


def test_rows_bias_their_own_tokens_and_jobs_without_a_bias_do_not_mention_it(job, tmp_path, guided):
    body = {"prompt": "abc", "max_tokens": 6, "seed": 5}
    rows = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body | more}
        for name, more in (("a", {}), ("b", {"logit_bias": {"9": 50, "2": -100}}), ("c", {"logit_bias": {"64": 1}}))
    ]
    job(rows, output_format="records", on_bad="skip")
    plain, biased = [Completion.model_validate(line) for line in lines(tmp_path / "out.jsonl")]
    assert biased.token_ids == [9] * 6 != plain.token_ids
    (failure,) = lines(tmp_path / "out.jsonl.errors.jsonl")
    assert "64 is not a token id" in json.dumps(failure)
    result = json.loads((tmp_path / "out.jsonl.job.json").read_text())
    assert "logit_bias" not in result["made_with"]  # as jobs were before there was one, which can still be resumed


def test_openai_failures_are_listed_and_retried(job, tmp_path, guided):
    rows = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, "model": "other"}}
        for name, prompt in (("a", "abc"), ("b", "abcd"), ("c", "abcde"))
    ]
    with pytest.warns(UserWarning, match="ask for the model 'other'; p answers them"):
        job(rows, complete=failing(guided, "abcd", []))
    (failure,) = lines(tmp_path / "out.jsonl.errors.jsonl")
    assert (failure["custom_id"], failure["response"]) == ("b", None)
    assert failure["error"] == {"code": "not_a_finite_number", "message": "the scorer returned NaN", "line": 2}
    with pytest.warns(UserWarning, match="p answers them"):
        assert job(rows).failed == 0
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == ["a", "b", "c"]


def test_a_read_only_output_is_refused(job, tmp_path, unprivileged):
    for name, mode in (("shut", 0o555), ("open", 0o777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    job(ROWS, output="open/there.jsonl")
    (tmp_path / "open" / "there.jsonl").chmod(0o444)
    with unprivileged():
        with pytest.raises(OutputError, match=r"cannot write to .*shut: Permission denied"):
            job(output="shut/out.jsonl")
        with pytest.raises(OutputError, match=r"there\.jsonl: Permission denied"):
            job(output="open/there.jsonl", force=True, seed=2)
    assert len(lines(tmp_path / "open" / "there.jsonl")) == 6
